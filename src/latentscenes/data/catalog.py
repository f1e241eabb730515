"""Catalogs: a table of objects (CSV, JSON or Java properties) as tags of scenes.

A row names a file and holds texts about it. Columns are recognized by common names, in any case. The texts
are data: control characters are taken out, lengths are limited, and nothing in them is interpreted.

Sweet Home 3D's furniture libraries hold a catalog of their own, PluginFurnitureCatalog.properties, with
keys such as `name#7`. Source of the keys: its class DefaultFurnitureCatalog.PropertyKey. Of the escapes: the
method `load` of java.util.Properties.
"""

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, plain_text
from latentscenes.core.reading import parse_json, read_bytes, reason

OWN = "PluginFurnitureCatalog.properties"
"""The catalog inside a furniture library."""
FORMATS = {".csv", ".json", ".properties"}
COLUMNS = {
    "file": "file filename path filepath model modelfile mesh meshfile",
    "name": "name title label",
    "category": "category class type kind group",
    "tags": "tags tag keywords keyword",
    "size": "size dimensions dimension",
    "license": "license licence rights copyright",
    "creator": "creator author artist designer",
    "description": "description information",
    "id": "id sku",
}
"""Names of columns, and the names that they go by in catalogs, without spaces and signs."""
KNOWN = {word: name for name, words in COLUMNS.items() for word in words.split()}
SIDES = ("width", "depth", "height")
MOST_TAGS, MOST_COLUMNS = 32, 64
NAMED = 8
"""Objects that a remark names; of more it gives the number."""
Tags = dict[str, str | list[str]]


@dataclass(frozen=True)
class Row:
    """One object of a catalog."""

    file: str | None
    """Path of the mesh, of its folder or archive; None if the row names no file."""
    tags: Tags = field(default_factory=dict)
    """Texts by column; `tags` is a list."""
    rotation: tuple[float, ...] | None = None
    """Turns the mesh in its own axes: a 3x3 matrix, row by row (only in furniture libraries)."""

    @property
    def shown(self) -> str:
        return str(self.file or self.tags.get("id") or self.tags.get("name"))


def read_catalog(path: Path) -> list[Row]:
    """Reads a catalog.

    Raises:
        UserError: the file cannot be read as its ending says, or no column names the object of a row.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: no catalog format; give {', '.join(sorted(FORMATS))}.")
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from None
    if path.suffix.lower() == ".properties":
        return [_furniture(entry) for entry in _entries(_text(data, "latin-1"))]
    lines = list((_cells if path.suffix.lower() == ".csv" else _objects)(path, data))
    if any(len(cells) > MOST_COLUMNS for cells in lines):
        raise UserError(f"{path}: a row has more than {MOST_COLUMNS} columns; leave some out.")
    found = [_row(cells) for cells in lines]
    if found and not any(row.file or row.tags.keys() & {"id", "name"} for row in found):
        raise UserError(f"{path}: no column says which file a row is about; name one of them `file`.")
    return found


def _text(data: bytes, otherwise: str) -> str:
    """Decodes UTF-8, UTF-16 with its mark, or else `otherwise`."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode(otherwise, "replace")


# CSV and JSON


def _cells(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file, separated by the sign that is most frequent in its first line."""
    text = _text(data, "cp1252")
    first = text.lstrip().split("\n", 1)[0]
    separator = max(",;\t|", key=first.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        for cells in lines:
            if any(cell.strip() for cell in cells[len(header) :]):
                raise UserError(
                    f"{path}: line {lines.line_num} has {len(cells)} cells, but the first line names "
                    f"{len(header)} columns. Quote texts that hold {separator!r}."
                )
            if any(cell.strip() for cell in cells):
                yield dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.line_num} is no CSV ({error}).") from None


def _objects(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file: a list of objects, an object that holds one, or objects by the names of files."""
    try:
        content = parse_json(_text(data, "latin-1"))
    except ValueError as error:
        raise UserError(f"{path}: not a readable JSON file ({reason(error)}).") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if lists:
            content = lists[0]
        elif all(isinstance(value, dict) for value in content.values()):
            content = [{"file": file} | entry for file, entry in content.items()]
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f'{path}: a catalog looks like [{{"file": "chair.obj", "name": "Chair", …}}, …].')
    yield from content


def _row(cells: Mapping[str, Any]) -> Row:
    """A row of a CSV or JSON file. The first column of a kind counts; others keep their own name."""
    tags: Tags = {}
    sides: dict[str, str] = {}
    for column, value in cells.items():
        plain = re.sub(r"[\W_]+", "", str(column).casefold())
        unit = next((unit for unit in ("mm", "cm", "m", "in") if plain == f"size{unit}"), "")
        key = "size" if unit else KNOWN.get(plain, plain_text(column).lower())
        if key in tags:
            key = plain_text(column).lower()
        if key in SIDES:
            sides[key] = plain_text(value)
        elif found := _value(key, value):
            tags[key] = f"{found} {unit}" if unit else found
    if all(sides.get(side) for side in SIDES):
        tags.setdefault("size", " x ".join(sides[side] for side in SIDES))
    else:
        tags |= {side: text for side, text in sides.items() if text}
    file = tags.pop("file", None)
    return Row(None if file is None else str(file), tags)


def _value(key: str, value: Any) -> str | list[str]:
    """The text kept of a cell; may be empty."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return plain_text(json.dumps(value, ensure_ascii=False))
    if key == "tags":
        parts = value if isinstance(value, list) else re.split("[,;|]", str(value))
        return [text for part in parts if (text := plain_text(part))][:MOST_TAGS]
    if isinstance(value, list):
        return plain_text((" x " if key == "size" else ", ").join(map(str, value)))
    return plain_text(value)


# Properties


def _entries(text: str) -> list[dict[str, str]]:
    """The numbered entries of a furniture catalog, each with the keys of the whole catalog as a default."""
    whole: dict[str, str] = {}
    numbered: dict[int, dict[str, str]] = defaultdict(dict)
    for key, value in properties(text):
        name, sign, number = key.partition("#")
        if sign and number.isdigit():
            numbered[int(number)][name] = value
        elif not sign:
            whole[name] = value
    usual = {"license": whole["license"]} if "license" in whole else {}
    return [usual | numbered[number] for number in sorted(numbered)]


def properties(text: str) -> Iterator[tuple[str, str]]:
    """Yields keys and values of a .properties file."""
    line = ""
    for part in re.split("\r\n|\r|\n", text):
        part = part.lstrip(" \t\f")
        if not line and part.startswith(("#", "!")):
            continue
        line += part
        if (len(line) - len(line.rstrip("\\"))) % 2:  # the line goes on
            line = line[:-1]
            continue
        if match := re.match(r"((?:\\.|[^\\:= \t\f])+)[ \t\f]*[:=]?[ \t\f]*(.*)", line, re.DOTALL):
            yield _unescaped(match[1]), _unescaped(match[2])
        line = ""


def _unescaped(text: str) -> str:
    signs = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def plain(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else signs.get(match[2], match[2])

    joined = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", plain, text, flags=re.DOTALL)
    return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs of \u to one letter


def _furniture(entry: Mapping[str, str]) -> Row:
    """An entry of a furniture catalog. Sizes are centimeters. What concerns only the drawing of plans is left
    out."""
    found = {key: _value(key, value) for key, value in entry.items() if KNOWN.get(key) == key}
    sides = [plain_text(entry.get(side, "")) for side in SIDES]
    if all(sides):
        found["size"] = " x ".join(sides) + " cm"
    rotation = None
    try:
        numbers = tuple(map(float, entry.get("modelRotation", "").split()))
        rotation = numbers if len(numbers) == 9 and all(map(math.isfinite, numbers)) else None
    except ValueError:
        pass
    return Row(entry.get("model") or None, {key: value for key, value in found.items() if value}, rotation)


# Which row belongs to which mesh


def assign(
    rows: Iterable[Row], meshes: Mapping[str, PurePath], root: PurePath
) -> tuple[dict[str, Row], list[Row], list[Row]]:
    """Finds the rows of scenes.

    A row's file is a path from the catalog's folder `root`, or the end of a path that only one mesh has; its
    ending may differ. A folder or an archive in `root` stands for all meshes in it. A row without a file is
    found by its id or name.

    Args:
        meshes: each scene's file, absolute.

    Returns:
        The row of each scene, rows that fit no scene, and rows whose scenes have another row already.
    """
    inside: dict[str, list[str]] = defaultdict(list)
    ends: dict[str, set[str]] = defaultdict(set)
    for scene, path in meshes.items():
        if path.is_relative_to(root):
            parts = _parts(path.relative_to(root).as_posix())
            for stop in range(1, len(parts) + 1):
                inside["/".join(parts[:stop])].append(scene)
        for full in (path, path.with_suffix("")):
            parts = _parts(full.as_posix())
            for start in range(len(parts)):
                ends["/".join(parts[start:])].add(scene)
        ends[scene.casefold()].add(scene)
    taken: dict[str, Row] = {}
    lost, late = [], []
    for row in rows:
        scenes = _scenes(row, inside, ends)
        free = [scene for scene in scenes if scene not in taken]
        taken |= dict.fromkeys(free, row)
        if not scenes:
            lost.append(row)
        elif not free:
            late.append(row)
    return taken, lost, late


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.replace("\\", "/").casefold().split("/") if part not in ("", "."))


def _scenes(row: Row, inside: Mapping[str, list[str]], ends: Mapping[str, set[str]]) -> list[str]:
    if row.file is None:
        wanted = [str(row.tags.get(key, "")).casefold() for key in ("id", "name")]
    else:
        parts = _parts(row.file)
        path = "/".join(parts)
        if path in inside:
            return inside[path]
        wanted = [path, path.rpartition(".")[0]]
        if re.match(r"[/\\]|[A-Za-z]:", row.file):  # a path of another machine
            wanted += ["/".join(parts[start:]) for start in range(1, len(parts))]
    return next((list(ends[text]) for text in wanted if len(ends.get(text, ())) == 1), [])


def tags_of_folders(
    catalog: Path | None, folder: Path, names: Sequence[str]
) -> tuple[dict[str, Tags], list[str]]:
    """Returns the tags of objects that are folders, and remarks on rows and objects that do not fit.

    Args:
        catalog: the table; None: no tags.
        folder: the folder of the objects, or the only object.
        names: the objects, named after their folders.

    Raises:
        UserError: the catalog cannot be read.
    """
    if catalog is None:
        return {}, []
    root = folder.absolute()
    places = {name: root if names == [root.resolve().name] else root / name for name in names}
    taken, lost, late = assign(
        read_catalog(catalog), places, root.parent if root in places.values() else root
    )
    return {name: row.tags for name, row in taken.items()}, unmatched(
        catalog, "object", places, taken, lost, late
    )


def unmatched(
    shown: Path, what: str, scenes: Iterable[str], taken: Mapping[str, Row], lost: list[Row], late: list[Row]
) -> list[str]:
    """Returns remarks on what `assign` could not put together; `what` are the scenes, `mesh` for instance."""
    many = "meshes" if what == "mesh" else f"{what}s"
    found = (
        ((f"row that names no {what}", f"rows that name no {what}"), [row.shown for row in lost]),
        (
            (f"row of a {what} that an earlier row names", f"rows of {many} that an earlier row names"),
            [row.shown for row in late],
        ),
        ((f"{what} without a row", f"{many} without a row"), [name for name in scenes if name not in taken]),
    )
    return [f"{shown}: {counted(len(names), *texts)}: {listed(names)}" for texts, names in found if names]


def listed(names: list[str]) -> str:
    """The first NAMED names, and the number of the others."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
