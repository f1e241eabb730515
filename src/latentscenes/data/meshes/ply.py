"""PLY: ASCII and binary of either byte order.

Honored: polygons, triangle strips, vertex normals, colors of vertices or faces in any number type, a texture
named in a comment with coordinates of vertices or of faces' corners. Alpha is left out: nothing in PLY says
that it means opacity. Source: Greg Turk, "The PLY Polygon File Format" (1994), and the properties that
MeshLab and Blender write.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentscenes.core.errors import UserError
from latentscenes.core.reading import MOST_MESH, read_bytes, reason
from latentscenes.data.meshes.mtl import find_beside
from latentscenes.data.meshes.surfaces import (
    DAMAGE,
    Material,
    Remarks,
    Surface,
    corner_faces,
    linear_colors,
    read_texture,
    unit_colors,
)

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
COLORS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
COORDINATES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"))


@dataclass
class _Element:
    """A table of the file. Scalars are columns; lists are Python lists, row by row."""

    count: int
    scalars: list[tuple[str, str]] = field(default_factory=list)
    lists: dict[str, tuple[str, str]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)


def read_ply(path: Path, remarks: Remarks) -> list[Surface]:
    """Reads a PLY file.

    Raises:
        UserError: the file is damaged, or holds points or Gaussians without faces.
    """
    content = read_bytes(path, MOST_MESH)
    try:
        return _surfaces(content, path, remarks)
    except DAMAGE as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {reason(error)}).") from None


def _surfaces(content: bytes, path: Path, remarks: Remarks) -> list[Surface]:
    kind, elements, textures, start = _header(content, path)
    _read(content[start:], kind, elements, path)
    vertices, faces = elements.get("vertex"), elements.get("face")
    if vertices is not None and "packed_position" in vertices.columns:
        raise UserError(f"{path}: holds Gaussian splats and no faces; only meshes are read.")
    if vertices is None or not {"x", "y", "z"} <= set(vertices.columns):
        raise UserError(f"{path}: holds no vertices with x, y and z.")
    polygons = _polygons(faces, elements.get("tristrips"))
    if not polygons:
        kind = (
            "Gaussian splats" if "f_dc_0" in vertices.columns else "points" if vertices.count else "nothing"
        )
        raise UserError(f"{path}: holds {kind} and no faces; only meshes are read.")
    points = np.stack([vertices.columns[name] for name in "xyz"], 1).astype(np.float64)
    flat = np.concatenate(polygons)
    if flat.min() < 0 or flat.max() >= len(points):
        raise UserError(f"{path}: a face names a vertex that is not there.")
    cut = corner_faces([polygon.tolist() for polygon in polygons], points)
    corners = flat[cut]
    face = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])[cut[:, 0]]
    normals = _columns(vertices, (("nx", "ny", "nz"),))
    uv = _corner_uv(vertices, faces, polygons, cut, corners)
    material = _textured(path, textures, uv is not None, remarks)
    colors = None
    if (found := _columns(vertices, COLORS)) is not None:
        colors = linear_colors(unit_colors(found, "colors of vertices", remarks))[corners]
    elif faces and (found := _columns(faces, COLORS)) is not None:
        colors = linear_colors(unit_colors(found, "colors of faces", remarks))[face]
        colors = np.repeat(colors[:, None], 3, 1)
    if material.texture is not None:
        colors = None  # scanners write both; the texture is the finer one
    return [Surface(points[corners], material, None if normals is None else normals[corners], uv, colors)]


def _header(content: bytes, path: Path) -> tuple[str, dict[str, _Element], list[str], int]:
    """The format, the elements in order, names of textures, and where the data begin."""
    end = content.find(b"end_header")
    if not content.startswith(b"ply") or end < 0:
        raise UserError(f"{path}: is no PLY file, or its header is cut short.")
    start = content.index(b"\n", end) + 1 if b"\n" in content[end:] else len(content)
    kind, elements, textures = "", {}, []
    for line in content[:end].decode("latin-1").replace("\r", "\n").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            kind = words[1]
        elif words[:1] == ["element"]:
            current = elements[words[1]] = _Element(int(words[2]))
        elif words[:1] == ["property"] and not elements:
            raise ValueError("a property comes before any element")
        elif words[:2] == ["property", "list"]:
            current.lists[words[4]] = (TYPES[words[2]], TYPES[words[3]])
            current.order.append(words[4])
        elif words[:1] == ["property"]:
            current.scalars.append((words[2], TYPES[words[1]]))
            current.order.append(words[2])
        elif words[:2] == ["comment", "TextureFile"]:
            textures.append(" ".join(words[2:]))
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise UserError(f"{path}: is of the unknown format {kind!r}.")
    if any(element.count > len(content) for element in elements.values()):
        raise UserError(f"{path}: is cut short: it names more rows than it has bytes.")
    return kind, elements, textures, start


def _read(data: bytes, kind: str, elements: dict[str, _Element], path: Path) -> None:
    if kind == "ascii":
        words, place = data.split(), 0
        try:
            for element in elements.values():
                place = _read_words(words, place, element)
        except (IndexError, ValueError):
            raise UserError(f"{path}: is cut short, or its rows are not as its header says.") from None
        return
    place, order = 0, "<" if "little" in kind else ">"
    for element in elements.values():
        if element.lists:
            place = _read_lists(data, place, element, order)
            continue
        dtype = np.dtype([(name, order + code) for name, code in element.scalars])
        if place + element.count * dtype.itemsize > len(data):
            raise ValueError("it is cut short")
        table = np.frombuffer(data, dtype, element.count, place)
        element.columns = {name: table[name].astype(code) for name, code in element.scalars}
        place += element.count * dtype.itemsize


def _read_words(words: list[bytes], place: int, element: _Element) -> int:
    codes = dict(element.scalars)
    if not element.lists:
        width = len(element.order)
        table = np.array(words[place : place + element.count * width], np.float64).reshape(
            element.count, width
        )
        element.columns = {name: table[:, k].astype(codes[name]) for k, name in enumerate(element.order)}
        return place + element.count * width
    scalars: dict[str, list[float]] = {name: [] for name in codes}
    element.rows = {name: [] for name in element.lists}
    for _ in range(element.count):
        for name in element.order:
            if name in codes:
                scalars[name].append(float(words[place]))
                place += 1
            else:
                count = int(words[place])
                values = words[place + 1 : place + 1 + count]
                if len(values) < count:
                    raise ValueError("it is cut short")
                element.rows[name].append(np.array(values, np.float64).astype(element.lists[name][1]))
                place += 1 + count
    element.columns = {name: np.array(values).astype(codes[name]) for name, values in scalars.items()}
    return place


def _read_lists(data: bytes, place: int, element: _Element, order: str) -> int:
    """Rows with lists: at once if all lists are as long as those of the first row, else row by row."""
    codes, lengths, spot = dict(element.scalars), {}, place
    for name in element.order if element.count else ():
        if name in codes:
            spot += np.dtype(codes[name]).itemsize
        else:
            count_code, code = element.lists[name]
            lengths[name] = int(np.frombuffer(data, order + count_code, 1, spot)[0])
            spot += np.dtype(count_code).itemsize + lengths[name] * np.dtype(code).itemsize
    fields = []
    for name in element.order:
        if name in codes:
            fields.append((name, order + codes[name]))
        else:
            count_code, code = element.lists[name]
            fields += [(f"{name} count", order + count_code), (name, order + code, (lengths.get(name, 0),))]
    dtype = np.dtype(fields)
    if place + element.count * dtype.itemsize <= len(data):
        table = np.frombuffer(data, dtype, element.count, place)
        if all((table[f"{name} count"] == length).all() for name, length in lengths.items()):
            element.columns = {name: table[name].astype(code) for name, code in codes.items()}
            element.rows = {name: list(table[name].astype(element.lists[name][1])) for name in element.lists}
            return place + element.count * dtype.itemsize
    return _read_rows(data, place, element, order)


def _read_rows(data: bytes, place: int, element: _Element, order: str) -> int:
    codes = {name: np.dtype(order + code) for name, code in element.scalars}
    scalars: dict[str, list[float]] = {name: [] for name in codes}
    element.rows = {name: [] for name in element.lists}
    for _ in range(element.count):
        for name in element.order:
            if name in codes:
                scalars[name].append(np.frombuffer(data, codes[name], 1, place)[0])
                place += codes[name].itemsize
            else:
                count_type, code = (np.dtype(order + part) for part in element.lists[name])
                count = int(np.frombuffer(data, count_type, 1, place)[0])
                place += count_type.itemsize
                element.rows[name].append(
                    np.frombuffer(data, code, count, place).astype(code.newbyteorder("="))
                )
                place += count * code.itemsize
    element.columns = {name: np.array(values) for name, values in scalars.items()}
    return place


def _polygons(faces: _Element | None, strips: _Element | None) -> list[np.ndarray]:
    found = [row.astype(np.int64) for row in _indices(faces)]
    for row in _indices(strips):
        for strip in np.split(row, np.flatnonzero(row == -1)):
            strip = strip[strip >= 0].astype(np.int64)
            found += [strip[k : k + 3][:: 1 if k % 2 == 0 else -1] for k in range(len(strip) - 2)]
    return found


def _indices(element: _Element | None) -> list[np.ndarray]:
    """The numbers of vertices in each row of an element; none without it."""
    rows = element.rows if element else {}
    return rows.get("vertex_indices", rows.get("vertex_index", []))


def _columns(element: _Element, names: tuple[tuple[str, ...], ...]) -> np.ndarray | None:
    """The first of some sets of columns that the element has, side by side."""
    for group in names:
        if all(name in element.columns for name in group):
            return np.stack([element.columns[name] for name in group], 1)
    return None


def _corner_uv(
    vertices: _Element,
    faces: _Element | None,
    polygons: list[np.ndarray],
    cut: np.ndarray,
    corners: np.ndarray,
) -> np.ndarray | None:
    """Texture coordinates of triangles' corners (t 3 2)."""
    if faces and (wedges := faces.rows.get("texcoord")):
        if all(len(wedge) == 2 * len(polygon) for wedge, polygon in zip(wedges, polygons, strict=False)):
            return np.concatenate(wedges).reshape(-1, 2)[cut].astype(np.float64)
    found = _columns(vertices, COORDINATES)
    return None if found is None else found[corners].astype(np.float64)


def _textured(path: Path, textures: list[str], mapped: bool, remarks: Remarks) -> Material:
    if not textures or not mapped:
        return Material()
    if len(textures) > 1:
        remarks.add("only the first of its textures is used")
    file = find_beside(path, textures[0])
    if file is None:
        remarks.add(f"the texture {textures[0]!r} is not there")
        return Material()
    try:
        return Material(texture=read_texture(file, file.name))
    except UserError as error:
        remarks.add(str(error))
        return Material()
