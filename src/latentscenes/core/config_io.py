"""Reads a Config strictly from YAML and writes it back.

Errors name the nearest known key for an unknown one, and the expected type for a wrong value. Overrides such
as `planes.resolution=32` change the YAML tree before it is read.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from latentscenes.core.config import Config
from latentscenes.core.errors import UserError


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file or a preset and applies overrides such as `planes.resolution=32` or
    `train.0.epochs=5`. A stage is selected by its number or name."""
    path = Path(source)
    preset = resources.files("latentscenes") / "presets" / f"{source}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such configuration file. Presets: {', '.join(presets())}.")
        text = path.read_text()
    elif preset.is_file():
        text = preset.read_text()
    else:
        raise UserError(f"{source}: neither a YAML file nor a preset. Presets: {', '.join(presets())}.")
    return parse(text, str(source), overrides)


def presets() -> list[str]:
    """Returns the names of the configurations in the package."""
    names = (entry.name for entry in (resources.files("latentscenes") / "presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a Config from YAML text; `where` names the source in errors."""
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected settings, got {tree!r}.")
    for override in overrides:
        change(tree, override)
    return build(Config, tree, where)


def dump(config: Config) -> str:
    """Returns YAML text that `parse` reads back to an equal Config."""
    return yaml.safe_dump(plain(config), sort_keys=False, width=120)


# Between dataclasses and plain YAML values


def plain(value: Any) -> Any:
    """Converts dataclasses and tuples to dictionaries and lists."""
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def change(tree: Any, override: str) -> None:
    """Applies one override `key.key=value` to a settings tree; list entries go by number or name."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: write it as key=value, for instance planes.resolution=32.")
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(tree, list):
            tree = tree[_stage_index(tree, name, override)]
        else:
            if tree.get(name) is None:
                tree[name] = {}
            tree = tree[name]
        if not isinstance(tree, dict | list):
            raise UserError(f"--set {override}: {name} holds no further settings.")
    if isinstance(tree, list):
        raise UserError(f"--set {override}: {last} is a whole stage; name one of its settings.")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {value!r} is not valid YAML.") from None


def _stage_index(stages: list, name: str, override: str) -> int:
    names = [str(stage.get("name") if isinstance(stage, dict) else stage) for stage in stages]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(stages):
        return int(name)
    raise UserError(f"--set {override}: no stage {name!r}; there are {', '.join(names) or 'none'}.")


def build(kind: Any, value: Any, where: str) -> Any:
    """Converts a plain YAML value to the type `kind`. Raises a UserError if it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected settings, got {value!r}.")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)
                raise UserError(f"{where}: unknown setting {key!r}; the nearest known is {near[0]!r}.")
        for entry in fields(kind):
            if entry.name not in value and entry.default is entry.default_factory is dataclasses.MISSING:
                raise UserError(f"{where}: {entry.name!r} is missing.")
        return kind(**{key: build(hints[key], item, f"{where}: {key}") for key, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list, got {value!r}.")
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        (inner,) = set(arguments) - {type(None)}
        return None if value is None else build(inner, value, where)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if type(value) is not kind:
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value
