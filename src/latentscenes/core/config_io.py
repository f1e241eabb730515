"""Reads a Config strictly from YAML and writes it back.

Errors name the nearest known key for an unknown one, and the expected type for a wrong value. Overrides such
as `planes.resolution=32` change the YAML tree before it is read.
"""

import dataclasses
import difflib
import math
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
from latentscenes.core.names import short
from latentscenes.core.reading import read_text, reason

LARGER = "larger_pictures"
"""Key of settings that change with the size of pictures. Runs and libraries keep what it led to, not the
key."""
MOST_YAML = 64 << 10
"""Bytes of the largest configuration."""
LIMITS = {
    "codec": {"downsampling": 64, "channels": 256, "width": 4096},
    "normalizer": {"window": 100_000},
    "planes": {"resolution": 4096, "micro": 1024, "macro": 1024, "bases": 100_000},
    "field": {"hidden": 4096, "frequencies": 32},
    "render": {"coarse": 4096, "fine": 4096},
}
"""The largest sizes that a configuration may state."""
MOST_TEXELS = 1 << 26
"""Numbers in the planes of one scene."""
MOST_VALUES = 20_000
"""Values in a configuration, those that aliases repeat counted each time."""


def load(source: str | Path, overrides: Sequence[str] = (), size: int = 0) -> Config:
    """Reads a YAML file or a preset.

    Args:
        source: the file, or the name of the preset.
        overrides: settings to change, such as `planes.resolution=32` or `train.0.epochs=5`. A stage is
            selected by its number or name.
        size: longer side of the pictures, pixels; settings under `larger_pictures` apply to it.
    """
    path = Path(source)
    preset = resources.files("latentscenes") / "presets" / f"{source}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise UserError(f"{path}: no such configuration file. Presets: {', '.join(presets())}.")
        try:
            text = read_text(path, MOST_YAML)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}). Correct or replace it.") from None
    elif preset.is_file():
        text = preset.read_text()
    else:
        raise UserError(f"{source}: neither a YAML file nor a preset. Presets: {', '.join(presets())}.")
    return parse(text, str(source), overrides, size)


def presets() -> list[str]:
    """Returns the names of the configurations in the package."""
    names = (entry.name for entry in (resources.files("latentscenes") / "presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def parse(text: str, where: str, overrides: Sequence[str] = (), size: int = 0) -> Config:
    """Reads a Config from YAML text; `where` names the source in errors. The rest as in `load`."""
    try:
        tree = parse_yaml(text) or {}
    except ValueError as error:
        raise UserError(f"{where}: not valid YAML: {reason(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected settings, got {short(tree)}.")
    for override in (*_for_size(tree, size, where), *overrides):
        change(tree, override)
    config = build(Config, tree, where)
    _check_limits(config, where)
    return config


def _for_size(tree: dict, size: int, where: str) -> list[str]:
    """Takes `larger_pictures` out of a settings tree and returns what it changes for pictures of that size:
    {least longer side in pixels: {setting: value}}; of several that apply, larger ones come last."""
    larger = tree.pop(LARGER, None) or {}
    well_formed = isinstance(larger, dict) and all(
        isinstance(least, int) and isinstance(changes, dict) for least, changes in larger.items()
    )
    if not well_formed:
        raise UserError(
            f"{where}: {LARGER}: give settings by the least side in pixels, for instance "
            "{192: {planes.resolution: 96}}."
        )
    applying = (larger[least] for least in sorted(larger) if least <= size)
    return [f"{key}={value}" for changes in applying for key, value in changes.items()]


def _check_limits(config: Config, where: str) -> None:
    """Refuses numbers that no model needs and no machine could hold, before anything is allocated."""
    if abs(config.seed) >= 1 << 63 or not _finite(plain(config)):
        raise UserError(f"{where}: a number is not finite, or the seed has more than 63 bits.")
    for part, limits in LIMITS.items():
        for name, most in limits.items():
            if (value := getattr(getattr(config, part), name)) > most:
                raise UserError(f"{where}: {part}.{name}: {value} is above {most}, the most.")
    planes = config.planes
    if 3 * planes.resolution**2 * planes.features > MOST_TEXELS:
        raise UserError(f"{where}: planes: a scene would have more than {MOST_TEXELS} numbers.")


def _finite(tree: Any) -> bool:
    if isinstance(tree, dict | list):
        return all(map(_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def parse_yaml(text: str) -> Any:
    """Parses YAML. Raises a ValueError if it is not valid, nested too deeply, or has more than MOST_VALUES
    values with those that aliases repeat."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values")
        return loader.construct_document(root)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(reason(error)) from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the number of values below a node. Aliases lead to one node, whose number is added each time;
    a node that holds itself has values without end. Raises a ValueError if a key comes twice."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in parts if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise ValueError(f"of the keys {short(', '.join(keys))}, one comes twice")
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


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
        tree[last] = parse_yaml(value)
    except ValueError:
        raise UserError(f"--set {override}: {value!r} is not valid YAML.") from None


def _stage_index(stages: list, name: str, override: str) -> int:
    names = [str(stage.get("name") if isinstance(stage, dict) else stage) for stage in stages]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(stages):
        return int(name)
    raise UserError(f"--set {override}: no stage {name!r}; there are {', '.join(names) or 'none'}.")


def build(kind: Any, value: Any, where: object) -> Any:
    """Converts a plain value of YAML or JSON to the type `kind`: a dataclass, tuple, list, dict, Literal,
    optional, or plain type. Raises a UserError if it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _built_dataclass(kind, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected settings, got {short(value)}.")
        return {build(arguments[0], key, where): build(arguments[1], value[key], where) for key in value}
    if origin in (tuple, list):
        return _built_list(origin, arguments, value, where)
    if origin is Literal:
        if not isinstance(value, str | int) or value not in arguments:
            raise UserError(f"{where}: {short(value)} is not one of {', '.join(map(str, arguments))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        (inner,) = set(arguments) - {type(None)}
        return None if value is None else build(inner, value, where)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            pass
    if kind is not Any and type(value) is not kind:
        raise UserError(f"{where}: expected {kind.__name__}, got {short(value)}.")
    return value


def _built_dataclass(kind: Any, value: Any, where: object) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected settings, got {short(value)}.")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key)[:100], hints, n=1, cutoff=0)
            raise UserError(f"{where}: unknown setting {short(key)}; the nearest known is {near[0]!r}.")
    for entry in fields(kind):
        if entry.name not in value and entry.default is entry.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {entry.name!r} is missing.")
    return kind(**{key: build(hints[key], item, f"{where}: {key}") for key, item in value.items()})


def _built_list(origin: type, arguments: tuple, value: Any, where: object) -> Any:
    """Converts a list: of one kind and any length (list[T], tuple[T, ...]), or of a kind at each place."""
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {short(value)}.")
    kinds = arguments
    if origin is list or arguments[-1] is Ellipsis:
        kinds = arguments[:1] * len(value)
    elif len(arguments) != len(value):
        raise UserError(f"{where}: expected {len(arguments)} values, got {len(value)}.")
    items = zip(kinds, value, strict=True)
    return origin(build(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(items))
