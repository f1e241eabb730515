"""Learned scenes as colored meshes and point clouds.

Notable:
- Features live in a latent space, so colors are those of decoded pictures: taken all around, laid on the surface where
  it is seen, and blended by how squarely it is looked at.
- What no picture shows, such as the underside of a car photographed from above, takes the colors of the nearest
  places that one does. Point clouds leave it out.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Int

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, write_bytes, writing_to
from latentscenes.core.version import __version__
from latentscenes.export.surface import Surface, surface
from latentscenes.model.model import RenderedImages, render_images, to_uint8
from latentscenes.storage.scene_set import SceneSet

VIEWS = 48
"""Pictures that colors come from."""
GRAZING = 0.15
"""Cosine between normal and view below which a picture says nothing about a place."""
SQUARELY = 4
"""Pictures are blended by that cosine to this power."""
OPAQUE = 0.95
"""Opacity of a pixel below which too much of the background shines through."""
NEAREST = 32
"""Places whose mean colors one that no picture shows."""
LIFTED = 0.3
"""How far above the surface rays to cameras start, in cells, so as not to meet it at once."""


@dataclass(frozen=True)
class Mesh:
    """p vertices and f triangles; world units, z up."""

    vertices: Float[np.ndarray, "p 3"]
    faces: Int[np.ndarray, "f 3"]
    """Corners counter-clockwise, seen from outside."""
    normals: Float[np.ndarray, "p 3"]
    """Unit vectors outward, at the vertices."""
    colors: Float[np.ndarray, "p 3"]
    """sRGB in [0, 1]."""


@dataclass(frozen=True)
class Points:
    """n points of a surface; world units, z up."""

    positions: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    """Unit vectors outward."""
    colors: Float[np.ndarray, "n 3"]
    """sRGB in [0, 1]."""


def scene_mesh(loaded: SceneSet, scene: str, view: Viewpoint, cells: int = 128, lowest: float = 0.0) -> Mesh:
    """The closed surface of a scene, in color.

    Args:
        view: how its dataset looks at it; colors come from pictures taken alike.
        cells: along the longest side of the scene box; the surface is as fine as these.
        lowest: elevation in degrees of the lowest camera that pictures are taken from. What a dataset never saw from
            below is arbitrary there; −90 for one that did.

    Raises:
        UserError: the export extra is absent, nothing in the scene is solid, or no picture shows it.
    """
    found, shown, cameras = _photographed(loaded, scene, view, cells, lowest)
    from scipy.spatial import cKDTree  # comes with scikit-image, without which there is no surface

    normals = found.normals()
    colors, seen = paint(found.vertices, normals, found, shown, cameras)
    if not seen.any():
        raise UserError(
            f"{scene}: no picture shows its surface, so it has no colors. Look at it: latentscenes render --mode opacity"
        )
    distance, nearest = cKDTree(found.vertices[seen]).query(found.vertices[~seen], min(NEAREST, seen.sum()))
    weights = 1 / np.maximum(distance.reshape(len(nearest), -1), found.step)
    colors[~seen] = (weights[..., None] * colors[seen][nearest.reshape(weights.shape)]).sum(1) / weights.sum(
        1, keepdims=True
    )
    return Mesh(found.vertices, found.faces, normals, colors)


def scene_points(
    loaded: SceneSet, scene: str, view: Viewpoint, count: int = 100_000, cells: int = 128, lowest: float = 0.0
) -> Points:
    """`count` points at random places of the surface, evenly over what pictures show of it. Other arguments and errors
    as for `scene_mesh`."""
    if count < 1:
        raise UserError(f"--count {count}: at least 1.")
    found, shown, cameras = _photographed(loaded, scene, view, cells, lowest)
    random, parts = np.random.default_rng(0), []
    while sum(len(part[0]) for part in parts) < count:
        positions, normals = sampled(found, count, random)
        colors, seen = paint(positions, normals, found, shown, cameras)
        if not seen.any():
            raise UserError(
                f"{scene}: no picture shows its surface. Look at it: latentscenes render --mode opacity"
            )
        parts.append((positions[seen], normals[seen], colors[seen]))
    return Points(*(np.concatenate(values)[:count] for values in zip(*parts, strict=True)))


def sampled(
    found: Surface, count: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Points of a surface, uniform over its area, and the normals there."""
    corners = found.vertices[found.faces]
    face, weights = random_places(corners, count, random)
    normals = (weights * found.normals()[found.faces[face]]).sum(1)
    return (weights * corners[face]).sum(1), normals / np.maximum(
        np.linalg.norm(normals, axis=1, keepdims=True), 1e-12
    )


def random_places(
    corners: Float[np.ndarray, "f 3 3"], count: int, random: np.random.Generator
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 3 1"]]:
    """Triangles and weights of their corners, such that points are uniform over the area."""
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    face = random.choice(len(area), count, p=area / area.sum(dtype=np.float64))
    root, share = np.sqrt(random.random(count)), random.random(count)
    return face, np.stack([1 - root, root * (1 - share), root * share], -1)[..., None]


def _photographed(
    loaded: SceneSet, scene: str, view: Viewpoint, cells: int, lowest: float
) -> tuple[Surface, RenderedImages, Cameras]:
    """The surface, and pictures of the scene all around."""
    if not -90 <= lowest < 90:
        raise UserError(f"--lowest {lowest:g}: an elevation in degrees, from -90 to below 90.")
    planes, cameras = loaded.planes(scene), view.dome(VIEWS, lowest)
    shown = render_images(loaded.model, planes, cameras, view.size)
    return surface(loaded.model, planes, to_uint8(shown.images), cameras, cells), shown, cameras


def paint(
    points: Float[np.ndarray, "n 3"],
    normals: Float[np.ndarray, "n 3"],
    found: Surface,
    shown: RenderedImages,
    cameras: Cameras,
) -> tuple[Float[np.ndarray, "n 3"], Bool[np.ndarray, "n"]]:
    """Colors of points of a surface (sRGB in [0, 1]; zero where no picture shows them), and which ones are seen: those
    from which a ray reaches a camera without meeting the surface again, and at whose place the picture is opaque."""
    caster = rtcore_scene.EmbreeScene()
    TriangleMesh(caster, np.ascontiguousarray(found.vertices[found.faces], np.float32))
    total, weight = np.zeros((len(points), 3)), np.zeros(len(points))
    places, _ = cameras.project(torch.tensor(points, dtype=torch.float32))
    for view, eye in enumerate(cameras.positions.double().numpy()):
        toward = eye - points
        distance = np.linalg.norm(toward, axis=1)
        facing = (toward * normals).sum(1) / distance
        turned = np.flatnonzero(facing > GRAZING)
        start = points[turned] + LIFTED * found.step * normals[turned]
        ray = toward[turned] / distance[turned, None]
        free = turned[
            caster.run(start.astype(np.float32), ray.astype(np.float32), output=True)["tfar"]
            > distance[turned]
        ]
        picture = torch.cat([shown.images[view], shown.opacity[view][None]])[None]
        read = (
            torch.nn.functional.grid_sample(
                picture, 2 * places[view, free][None, None] - 1, align_corners=False
            )[0, :, 0]
            .double()
            .numpy()
        )
        share = facing[free] ** SQUARELY * (read[3] > OPAQUE)
        total[free] += share[:, None] * read[:3].T
        weight[free] += share
    return total / np.maximum(weight, 1e-12)[:, None], weight > 0


# Files


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
    accessors = [
        {"bufferView": k, "componentType": kind, "count": len(array), "type": shape}
        for k, (array, shape, kind, _) in enumerate(arrays)
    ]
    accessors[0] |= {"min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()}
    accessors[2] |= {"normalized": True}
    content = {
        "asset": {"version": "2.0", "generator": f"latentscenes {__version__}"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [
            {
                "name": name,
                "primitives": [
                    {"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0}
                ],
            }
        ],
        "materials": [
            {
                "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
                "extensions": {"KHR_materials_unlit": {}},
            }
        ],
        "accessors": accessors,
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": array.nbytes, "target": target}
            for start, (array, _, _, target) in zip(starts, arrays, strict=False)
        ],
        "buffers": [{"byteLength": starts[-1]}],
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack(
        "<4sIIII", b"glTF", 2, 28 + len(text) + starts[-1], len(text), 0x4E4F534A
    )  # the last: "JSON"
    binary = struct.pack("<II", starts[-1], 0x004E4942)  # "BIN"
    return _write(path, b"".join([head, text, binary, *(array.tobytes() for array, *_ in arrays)]))


def write_ply(path: str | Path, points: Points) -> int:
    """Write points as binary little-endian PLY, z up: positions, normals, colors as bytes; its size in bytes."""
    floats = ("x", "y", "z", "nx", "ny", "nz")
    rows = np.empty(
        len(points.positions),
        np.dtype([*((name, "<f4") for name in floats), *((name, "u1") for name in ("red", "green", "blue"))]),
    )
    for name, column in zip(floats, np.concatenate([points.positions, points.normals], 1).T, strict=True):
        rows[name] = column
    for name, column in zip(("red", "green", "blue"), points.colors.T, strict=True):
        rows[name] = np.round(255 * np.clip(column, 0, 1))
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment latentscenes {__version__}, z up",
        f"element vertex {len(rows)}",
    ]
    lines += [f"property float {name}" for name in floats] + [
        f"property uchar {name}" for name in ("red", "green", "blue")
    ]
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
        raise UserError(
            f"{path}: what is written here is {ending[1:].upper()}; name a file that ends in {ending}."
        )
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name a file.")
    check_place(path)


def _write(path: str | Path, content: bytes) -> int:
    with writing_to(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), content)
    return len(content)
