"""Makes the tables of docs/configuration.md from the docstrings of core/config.py.

`python docs/settings.py docs/configuration.md` writes them between the page's markers.
"""

import ast
import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from latentscenes.core import config

BEGIN, END = "<!-- settings -->", "<!-- /settings -->"
SECTIONS: tuple[tuple[type, str], ...] = (
    (config.Config, ""),
    (config.CodecConfig, "codec."),
    (config.NormalizerConfig, "normalizer."),
    (config.PlanesConfig, "planes."),
    (config.FieldConfig, "field."),
    (config.RenderConfig, "render."),
    (config.StageConfig, "train.STAGE."),
    (config.LossWeights, "train.STAGE.losses."),
    (config.Rates, "train.STAGE.rates."),
)
"""Every dataclass of config.py, with the prefix of its keys."""


def field_docs(kind: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass; fields without one are absent."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        entry.target.id: inspect.cleandoc(text.value.value)
        for entry, text in zip(body, body[1:])
        if isinstance(entry, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def tables() -> str:
    """Returns all sections in Markdown."""
    lines = []
    for kind, prefix in SECTIONS:
        lines += ["", f"### {f'`{prefix}…`' if prefix else 'Top level'}", "", inspect.getdoc(kind), ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        hints, docs = typing.get_type_hints(kind), field_docs(kind)
        for entry in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(hints[entry.name]):
                meaning = " ".join(docs.get(entry.name, "").split()).replace("|", "\\|")
                kind_text, default = _type(hints[entry.name]), _default(entry.default)
                lines.append(f"| `{prefix}{entry.name}` | {kind_text} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _type(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return f"{_type(arguments[0])} or unset"
    if typing.get_origin(kind) is tuple:
        return "list of stages"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[kind]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "unset" if value is None else "none" if value == () else f"`{value}`"


def updated(page: str) -> str:
    """Returns the page with new tables between its markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text()))
