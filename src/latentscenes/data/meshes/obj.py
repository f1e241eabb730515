"""Wavefront OBJ; its materials are in mtl.py.

Honored: polygons of any shape, negative indices, vertex colors, `vn` and smoothing groups (without either,
faces are flat), several material libraries. Source: Wavefront's "Object Files" (Advanced Visualizer, appendix
B1).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from latentscenes.core.errors import UserError
from latentscenes.core.reading import reason
from latentscenes.data.meshes.mtl import NUMBER, ObjMaterial, read_lines, read_materials
from latentscenes.data.meshes.surfaces import (
    DAMAGE,
    Remarks,
    Surface,
    corner_faces,
    linear_colors,
    smooth_normals,
    unit_colors,
)

LEFT_OUT = {"p": "points", "l": "lines"} | dict.fromkeys(("curv", "curv2", "surf"), "curved surfaces")
"""Statements that are left out, with a remark."""


@dataclass
class _Faces:
    """Polygons with one material: numbers of points, texture coordinates and normals, corner by corner."""

    points: list[list[int]] = field(default_factory=list)
    uv: list[int] = field(default_factory=list)
    normals: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """The smoothing group of each polygon; 0 for none."""


def read_obj(path: Path, remarks: Remarks, multiply: bool = False) -> list[Surface]:
    """Reads an OBJ file and its materials. `multiply`: a texture is multiplied by Kd.

    Raises:
        UserError: the file cannot be read as OBJ.
    """
    try:
        return _read(path, remarks, multiply)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from None
    except DAMAGE as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {reason(error)}).") from None


def _read(path: Path, remarks: Remarks, multiply: bool) -> list[Surface]:
    tables, faces, libraries = _parse(read_lines(path), path, remarks)
    materials = read_materials(path, libraries, remarks, multiply)
    for name in [name for name in faces if name and name not in materials]:
        root = name.rpartition("_")[0]  # old exporters append the texture's name, or NONE
        if root in materials:
            materials[name] = materials[root]
        elif materials or not libraries:  # else the remark on the library says it all
            remarks.add(f"material {name!r} is in no library; its faces are white")
    if "colors" in tables:
        tables["colors"] = unit_colors(tables["colors"], "colors of vertices", remarks)
    surfaces = []
    for name, group in faces.items():
        if group.points:
            if materials.get(name, ObjMaterial()).textured and min(group.uv) < 0:
                remarks.add(f"faces without texture coordinates have the mean color of the texture of {name}")
            surfaces += _surfaces(path, tables, group, materials.get(name, ObjMaterial()))
    return surfaces


def _parse(
    text: str, path: Path, remarks: Remarks
) -> tuple[dict[str, np.ndarray], dict[str, _Faces], list[str]]:
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
        elif key in LEFT_OUT:
            remarks.add(f"{LEFT_OUT[key]} are left out")
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
    """A table of numbers; shorter rows are filled with zeros. Vertices (width 0) have 3, or 6 where some have
    a color: those without one get no number (nan)."""
    if not rows:
        return np.zeros((0, width or 3))
    if not width:
        width = 6 if max(map(len, rows)) >= 6 else 3
        rows = _colored(rows) if width == 6 else [row[:3] for row in rows]
    try:
        if {len(row) for row in rows} == {width}:
            return np.array(rows, dtype=np.float64)
        return np.array([[*row[:width], *["0"] * (width - len(row))] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path}: a line {key!r} holds something else than numbers ({error}).") from None


def _colored(rows: list[list[str]]) -> list[list[str]]:
    """Vertices as x y z r g b. Lines hold x y z r g b, x y z w r g b with w = 1, or x y z r g b a."""
    weighted = all(NUMBER.match(row[3]) and float(row[3]) == 1 for row in rows if len(row) >= 7)
    first = {len(row): 4 if len(row) >= 7 and weighted else 3 for row in rows}
    return [
        [*row[:3], *["0"] * (3 - len(row)), *(row[first[len(row)] :][:3] if len(row) >= 6 else ["nan"] * 3)]
        for row in rows
    ]


def _surfaces(path: Path, tables: dict[str, np.ndarray], faces: _Faces, paint: ObjMaterial) -> list[Surface]:
    """The triangles of one material; those without texture coordinates apart."""
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
