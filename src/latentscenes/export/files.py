"""Meshes as GLB and points as PLY, byte by byte.

Notable:
- glTF's y axis points up, ours is z: (x, y, z) becomes (x, z, −y), which is how `data meshes` turns it back. PLY knows
  no such custom and keeps z up.
- glTF's vertex colours are linear light, so sRGB values are converted, to 16 bits so that dark ones stay apart. They
  show light already, hence the material is unlit (KHR_materials_unlit).
"""

import json
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, write_bytes, writing_to
from latentscenes.core.version import __version__
from latentscenes.export.mesh import Mesh, Points

UNSIGNED_SHORT, UNSIGNED_INT, FLOAT = 5123, 5125, 5126
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
"""Constants of glTF 2.0, section 5."""


def write_glb(path: str | Path, mesh: Mesh, name: str = "") -> int:
    """Write a mesh as binary glTF 2.0, y up; its size in bytes."""
    vertices = _y_up(mesh.vertices)
    arrays = [  # array, glTF type, kind of component, target
        (vertices, "VEC3", FLOAT, ARRAY_BUFFER),
        (_y_up(mesh.normals), "VEC3", FLOAT, ARRAY_BUFFER),
        (_linear(mesh.colors), "VEC4", UNSIGNED_SHORT, ARRAY_BUFFER),
        (mesh.faces.astype("<u4").reshape(-1, 1), "SCALAR", UNSIGNED_INT, ELEMENT_ARRAY_BUFFER),
    ]
    starts = np.cumsum([0, *(array.nbytes for array, *_ in arrays)]).tolist()  # all are multiples of 4
    accessors = [{"bufferView": k, "componentType": kind, "count": len(array), "type": shape} for k, (array, shape, kind, _) in enumerate(arrays)]
    accessors[0] |= {"min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()}
    accessors[2] |= {"normalized": True}
    content = {
        "asset": {"version": "2.0", "generator": f"latentscenes {__version__}"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}, "extensions": {"KHR_materials_unlit": {}}}],
        "accessors": accessors,
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target} for start, (array, _, _, target) in zip(starts, arrays, strict=False)
        ],
        "buffers": [{"byteLength": starts[-1]}],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + starts[-1], len(text), 0x4E4F534A)  # the last: "JSON"
    binary = struct.pack("<II", starts[-1], 0x004E4942)  # "BIN"
    return _write(path, b"".join([head, text, binary, *(array.tobytes() for array, *_ in arrays)]))


def write_ply(path: str | Path, points: Points) -> int:
    """Write points as binary little-endian PLY, z up: positions, normals, colours as bytes; its size in bytes."""
    floats = ("x", "y", "z", "nx", "ny", "nz")
    rows = np.empty(len(points.positions), np.dtype([*((name, "<f4") for name in floats), *((name, "u1") for name in ("red", "green", "blue"))]))
    for name, column in zip(floats, np.concatenate([points.positions, points.normals], 1).T, strict=True):
        rows[name] = column
    for name, column in zip(("red", "green", "blue"), points.colors.T, strict=True):
        rows[name] = np.round(255 * np.clip(column, 0, 1))
    lines = ["ply", "format binary_little_endian 1.0", f"comment latentscenes {__version__}, z up", f"element vertex {len(rows)}"]
    lines += [f"property float {name}" for name in floats] + [f"property uchar {name}" for name in ("red", "green", "blue")]
    return _write(path, "\n".join([*lines, "end_header\n"]).encode() + rows.tobytes())


def _y_up(vectors: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
    x, y, z = vectors.astype("<f4").T
    return np.stack([x, z, -y], 1)


def _linear(colors: Float[np.ndarray, "p 3"]) -> np.ndarray:
    """sRGB values in [0, 1] to linear light with alpha, 16 bits each (p, 4): IEC 61966-2-1."""
    encoded = np.clip(colors, 0, 1)
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.round(65535 * np.concatenate([light, np.ones((len(light), 1))], 1)).astype("<u2")


def check_ending(path: Path, ending: str) -> None:
    """Refuse a file name of another kind, or where no file can be, before any work is done."""
    if path.suffix.lower() != ending:
        raise UserError(f"{path}: what is written here is {ending[1:].upper()}; name a file that ends in {ending}.")
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name a file.")
    check_place(path)


def _write(path: str | Path, content: bytes) -> int:
    with writing_to(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), content)
    return len(content)
