"""Wavefront OBJ with MTL materials.

Honored: polygons of any shape, negative indices, vertex colors, `vn` and smoothing groups (without either,
faces are flat), several material libraries; of MTL: Kd, Ke, d, Tr, map_Kd and map_d with their options -s,
-o, -clamp, -mm. A texture replaces Kd: exporters leave grays and browns in Kd that the renderers of these
catalogs ignore. `multiply` multiplies instead, as the format's text says. Without Kd the factor is 1. Source:
Wavefront's "Object Files" (Advanced Visualizer, appendix B1) and "MTL material format".
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from latentscenes.core.errors import UserError
from latentscenes.data.meshes.surfaces import (
    Material,
    Remarks,
    Surface,
    corner_faces,
    linear_colors,
    read_texture,
    smooth_normals,
)
from latentscenes.data.raycast import BLEND, OPAQUE
from latentscenes.data.shading import to_linear

OPTIONS = {
    "blendu": 1,
    "blendv": 1,
    "boost": 1,
    "bm": 1,
    "cc": 1,
    "clamp": 1,
    "imfchan": 1,
    "texres": 1,
    "type": 1,
}
"""Options of a texture with a fixed number of arguments; -mm has two, -o, -s and -t have one to three
numbers."""
LEFT_OUT = (
    (("ks", "map_ks"), "highlights (Ks) are"),
    (("bump", "map_bump", "norm", "disp"), "relief (bump and normal maps) is"),
    (("map_ke",), "emission textures are"),
)
"""Statements of MTL that are left out, and how the remark begins."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


@dataclass
class _Faces:
    """Polygons with one material: numbers of points, texture coordinates and normals, corner by corner."""

    points: list[list[int]] = field(default_factory=list)
    uv: list[int] = field(default_factory=list)
    normals: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """The smoothing group of each polygon; 0 for none."""


@dataclass(frozen=True)
class _Painted:
    """A material: as it looks without its texture, and with it; how its texture coordinates are moved."""

    plain: Material = Material()
    textured: Material | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Map:
    """A texture statement of MTL."""

    file: str
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    clamp: bool = False
    base: float = 0.0
    gain: float = 1.0


def read_obj(path: Path, remarks: Remarks, multiply: bool = False) -> list[Surface]:
    """Reads an OBJ file and its materials. `multiply`: a texture is multiplied by Kd.

    Raises:
        UserError: the file cannot be read as OBJ.
    """
    try:
        text = _text(path)
        tables, faces, libraries = _parse(text, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    materials = _materials(path, libraries, remarks, multiply)
    for name in [name for name in faces if name and name not in materials]:
        root = name.rpartition("_")[0]  # old exporters append the texture's name, or NONE
        if root in materials:
            materials[name] = materials[root]
        else:
            remarks.add(f"material {name!r} is in no library; its faces are white")
    surfaces = []
    for name, group in faces.items():
        if group.points:
            if materials.get(name, _Painted()).textured and min(group.uv) < 0:
                remarks.add(f"faces without texture coordinates have the plain color of material {name!r}")
            surfaces += _surfaces(path, tables, group, materials.get(name, _Painted()))
    return surfaces


def _text(path: Path) -> str:
    """A text file of any encoding; lines that end in a backslash go on."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    return text.replace("\\\r\n", " ").replace("\\\n", " ")


def _parse(text: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, _Faces], list[str]]:
    """Tables of numbers, polygons by material, and the names of material libraries."""
    points: list[list[str]] = []
    uv: list[list[str]] = []
    normals: list[list[str]] = []
    faces: dict[str, _Faces] = {"": _Faces()}
    current, group, libraries = faces[""], 0, []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition(" #")[0].split()
        if not words:
            continue
        key = words[0]
        if key == "v":
            points.append(words[1:])
        elif key == "vt":
            uv.append(words[1:3])
        elif key == "vn":
            normals.append(words[1:4])
        elif key == "f":
            sizes = len(points), len(uv), len(normals)
            try:
                corners = [_corner(word, sizes) for word in words[1:]]
            except (ValueError, IndexError):
                raise UserError(
                    f"{path}: line {number}: {line.strip()[:60]!r} is no face of vertices that exist."
                ) from None
            current.points.append([corner[0] for corner in corners])
            current.uv += [corner[1] for corner in corners]
            current.normals += [corner[2] for corner in corners]
            current.groups.append(group)
        elif key == "usemtl":
            current = faces.setdefault(line.split(None, 1)[1].strip() if len(words) > 1 else "", _Faces())
        elif key == "mtllib" and len(words) > 1:
            libraries.append(line.split(None, 1)[1].strip())
        elif key == "s" and len(words) > 1:
            group = 0 if words[1] in ("off", "0") else int(words[1]) if words[1].isdecimal() else 1
    table = _numbers(points, path, "v")
    tables = {"v": table[:, :3], "vt": _numbers(uv, path, "vt", 2), "vn": _numbers(normals, path, "vn", 3)}
    if table.shape[1] >= 6:
        tables["colors"] = table[:, -3:]
    return tables, faces, libraries


def _corner(word: str, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Numbers of a corner's point, texture coordinate and normal, from 0; −1 for none."""
    found = [-1, -1, -1]
    for place, part in enumerate(word.split("/")[:3]):
        if part:
            number = int(part)
            found[place] = number - 1 if number > 0 else sizes[place] + number
            if number == 0 or found[place] < 0:
                raise IndexError(word)
    if found[0] < 0:
        raise IndexError(word)
    return tuple(found)


def _numbers(rows: list[list[str]], path: Path, key: str, width: int = 0) -> Float[np.ndarray, "n k"]:
    """A table of numbers; shorter rows are filled with zeros. Vertices (width 0) have 3, or 6 with a
    color."""
    if not rows:
        return np.zeros((0, width or 3))
    counts = {len(row) for row in rows}
    if not width:
        width = 6 if min(counts) >= 6 else 3
        rows = [[*row[:3], *row[len(row) - 3 :]] if width == 6 else row[:3] for row in rows]
    try:
        if {len(row) for row in rows} == {width}:
            return np.array(rows, dtype=np.float64)
        return np.array([[*row[:width], *["0"] * (width - len(row))] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path}: a line {key!r} holds something else than numbers ({error}).") from None


def _surfaces(path: Path, tables: dict[str, np.ndarray], faces: _Faces, paint: "_Painted") -> list[Surface]:
    """The triangles of one material; those without texture coordinates apart, in the plain color."""
    flat = np.array([point for polygon in faces.points for point in polygon])
    if flat.max() >= len(tables["v"]):
        raise UserError(f"{path}: a face names vertex {flat.max() + 1}, but there are {len(tables['v'])}.")
    cut = corner_faces(faces.points, tables["v"])
    corners = tables["v"][flat[cut]]
    groups = np.repeat(np.array(faces.groups), [len(polygon) for polygon in faces.points])[cut]
    normals = _normals(np.array(faces.normals)[cut], tables["vn"], corners, groups, flat[cut])
    colors = linear_colors(tables["colors"])[flat[cut]] if "colors" in tables else None
    places = np.array(faces.uv)[cut]
    mapped = ((places >= 0) & (places < len(tables["vt"]))).all(1) & (paint.textured is not None)
    found = []
    for chosen, material in ((mapped, paint.textured), (~mapped, paint.plain)):
        if chosen.any():
            uv = (
                tables["vt"][places[chosen]] * paint.scale + paint.offset
                if material is paint.textured
                else None
            )
            own = None if normals is None else normals[chosen]
            found.append(
                Surface(corners[chosen], material, own, uv, None if colors is None else colors[chosen])
            )
    return found


def _normals(
    given: Int[np.ndarray, "f 3"],
    table: Float[np.ndarray, "n 3"],
    corners: Float[np.ndarray, "f 3 3"],
    groups: Int[np.ndarray, "f 3"],
    points: Int[np.ndarray, "f 3"],
) -> Float[np.ndarray, "f 3 3"] | None:
    """The file's normals where it gives them, else those of its smoothing groups; None where all is flat."""
    known = (given >= 0) & (given < len(table))
    if not known.any() and not groups.any():
        return None
    _, merged = np.unique(np.stack([groups.ravel(), points.ravel()]), axis=1, return_inverse=True)
    smooth = smooth_normals(corners, np.where(groups > 0, merged.reshape(groups.shape), -1))
    return np.where(known[..., None], table[np.where(known, given, 0)], smooth) if len(table) else smooth


# Materials


def _materials(path: Path, libraries: list[str], remarks: Remarks, multiply: bool) -> dict[str, _Painted]:
    found = {}
    for name in libraries:
        file = find_beside(path, name)
        files = [file] if file else [other for word in name.split() if (other := find_beside(path, word))]
        if not files:
            remarks.add(f"the material library {name!r} is not there")
        for one in files:
            for key, entry in _statements(_text(one)).items():
                found.setdefault(key, _material(one, path, key, entry, remarks, multiply))
    return found


def _statements(text: str) -> dict[str, dict[str, str]]:
    """The statements of each material of an MTL file; keywords in lower case."""
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ") if " " in line.strip() else line.strip().partition("\t")
        if key.lower() == "newmtl":
            current = found.setdefault(rest.strip(), {})
        elif key and not key.startswith("#"):
            current[key.lower()] = rest.strip()
    return found


def _material(
    file: Path, obj: Path, name: str, entry: dict[str, str], remarks: Remarks, multiply: bool
) -> _Painted:
    alpha = _alpha(entry, name, remarks)
    for keys, meaning in LEFT_OUT:
        if any(entry.get(key) and (key != "ks" or any(_color(entry[key], (0.0, 0.0, 0.0)))) for key in keys):
            remarks.add(f"{meaning} left out")
    color, emission = (
        tuple(to_linear(np.clip(_color(entry.get(key), default), 0, 1)).tolist())
        for key, default in (("kd", (1.0, 1.0, 1.0)), ("ke", (0.0, 0.0, 0.0)))
    )
    plain = Material((*color, alpha), cutoff=OPAQUE if alpha == 1 else BLEND, emission=emission)
    texture = _map(entry["map_kd"]) if entry.get("map_kd") else None
    picture = _picture(file, obj, texture, remarks) if texture else None
    mask = _picture(file, obj, _map(entry["map_d"]), remarks) if entry.get("map_d") else None
    if picture is None and mask is None:
        return _Painted(plain)
    texture = texture if picture is not None else _map(entry["map_d"])
    factor = plain.factor if multiply or picture is None else (1.0, 1.0, 1.0, alpha)
    cutoff = plain.cutoff
    if mask is not None:
        picture, cutoff = _masked(picture, mask), BLEND
    elif (picture[..., 3] < 255).any() and cutoff == OPAQUE:
        cutoff = 0.5
    wrap = ("clamp", "clamp") if texture.clamp else ("repeat", "repeat")
    return _Painted(plain, Material(factor, picture, wrap, cutoff, emission), texture.scale, texture.offset)


def _masked(picture: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """A picture whose alpha is the brightness of a mask, or the mask's own alpha if it has one."""
    alpha = mask[..., 3] if (mask[..., 3] < 255).any() else mask[..., :3].mean(-1).round().astype(np.uint8)
    height, width = alpha.shape
    if picture is None:
        picture = np.full((height, width, 4), 255, np.uint8)
    rows = np.arange(picture.shape[0]) * height // picture.shape[0]
    columns = np.arange(picture.shape[1]) * width // picture.shape[1]
    return np.concatenate([picture[..., :3], alpha[rows][:, columns][..., None]], -1)


def _color(text: str | None, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Three numbers, or one for all three."""
    numbers = [float(word) for word in (text or "").replace(", ", " ").split() if NUMBER.match(word)]
    return tuple(numbers[:3]) if len(numbers) >= 3 else (numbers[0],) * 3 if numbers else default


def _alpha(entry: dict[str, str], name: str, remarks: Remarks) -> float:
    """Opacity in (0, 1]: d, or 1 − Tr. A material that would be invisible (d 0, Tr 1) is meant to be
    opaque."""

    def number(key: str) -> float | None:
        found = [float(word) for word in entry.get(key, "").split() if NUMBER.match(word)]
        return found[0] if found else None

    dissolve, transparency = number("d"), number("tr")
    alpha = dissolve if dissolve is not None else 1.0 if transparency is None else 1 - transparency
    if alpha <= 0:
        remarks.add(f"material {name!r} would be invisible (d 0 or Tr 1); it is taken as opaque")
        return 1.0
    return min(alpha, 1.0)


def _map(text: str) -> _Map:
    """A texture statement: options, then a file name that may hold spaces."""
    words, options = text.split(), {}
    place = 0
    while place < len(words) - 1 and words[place].startswith("-") and not NUMBER.match(words[place]):
        key = words[place][1:].lower()
        place += 1
        if key in OPTIONS:
            most, numeric = OPTIONS[key], False
        elif key in ("s", "o", "t", "mm"):
            most, numeric = 2 if key == "mm" else 3, True
        else:
            break
        values = []
        while len(values) < most and place < len(words) - 1 and (not numeric or NUMBER.match(words[place])):
            values.append(words[place])
            place += 1
        options[key] = values
    found = _Map(" ".join(words[place:]).strip('"'))
    for key, name in (("s", "scale"), ("o", "offset")):
        if values := [float(value) for value in options.get(key, [])]:
            setattr(found, name, (values[0], values[1] if len(values) > 1 else getattr(found, name)[1]))
    found.clamp = options.get("clamp", [""])[0].lower() == "on"
    if len(values := options.get("mm", [])) == 2:
        found.base, found.gain = map(float, values)
    return found


def _picture(file: Path, obj: Path, texture: _Map, remarks: Remarks) -> np.ndarray | None:
    found = find_beside(file, texture.file) or find_beside(obj, texture.file)
    if found is None:
        remarks.add(f"the texture {texture.file!r} is not there")
        return None
    try:
        picture = read_texture(found, found.name)
    except UserError as error:
        remarks.add(str(error))
        return None
    if (texture.base, texture.gain) != (0.0, 1.0):
        light = texture.base + texture.gain * picture[..., :3].astype(np.float64) / 255
        picture = np.concatenate(
            [np.round(255 * np.clip(light, 0, 1)).astype(np.uint8), picture[..., 3:]], -1
        )
    return picture


def find_beside(file: Path, name: str) -> Path | None:
    """The file that a file names: at that path beside it, else by the bare name, whatever the case of
    letters.

    Backslashes separate folders. A drive letter or an absolute path is never followed.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts:
        return None
    absolute = name.replace("\\", "/").startswith("/") or ":" in parts[0]
    for chosen in [parts[-1:]] if absolute else [parts, parts[-1:]]:
        place = file.parent
        for part in chosen:
            place = place.parent if part == ".." else _entry(place, part)
            if place is None:
                break
        if place is not None and place.is_file():
            return place
    return None


def _entry(folder: Path, name: str) -> Path | None:
    """An entry of a folder by its name; if there is none, by its name in other letters' case."""
    if os.path.exists(folder / name):  # False also for a name that is too long
        return folder / name
    if not folder.is_dir():
        return None
    return next((entry for entry in folder.iterdir() if entry.name.lower() == name.lower()), None)
