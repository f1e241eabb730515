"""Learned scenes as 3D Gaussian splats: PLY in the layout of 3D Gaussian splatting, glTF, SPZ and SOG.

Notable:
- Splats lie on the surface (surface.py). Many points of it are sampled and painted as in mesh.py; k-means
  gathers them into cells of about one size, and each cell becomes one flat splat with its mean color.
- splat_fit.py fits these splats to pictures. docs/results/exports.md states how near their pictures come.
- SPZ and SOG are small files, which the package gaussforge makes of the PLY file.
- Parts that no picture shows get no splats.
- Sources: Kerbl et al., 3D Gaussian Splatting (arXiv 2308.04079); glTF's extension KHR_gaussian_splatting.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from latentscenes.core.cameras import Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.core.version import __version__
from latentscenes.data.shading import to_linear
from latentscenes.export.mesh import photographed, sampled
from latentscenes.export.sheets import save_file
from latentscenes.export.texture import CELLS, FINER, REACHED
from latentscenes.storage.scene_set import SceneSet

COUNT, MOST = 20_000, 2_000_000
"""Splats of a scene where nothing else is asked for, and at most."""
POINTS_EACH = 12
"""Points of the surface sampled for each splat."""
ROUNDS = 4
"""Rounds of k-means."""
WIDTH = 2.1
"""Standard deviations of a splat, over those of the points in its cell. Narrower splats leave gaps, wider
ones blur."""
INSET = 0.6
"""Splats lie this far below the surface, in median standard deviations, since they reach beyond it."""
THICKNESS = 0.15
"""Least standard deviation of a splat, over the greatest one: across the surface it is flat."""
OPACITY = 0.99
"""Of every splat."""
HARMONIC = 0.28209479177387814
"""The spherical harmonic of degree 0, 1 / (2 √π); colors are stored as (color − 1/2) / HARMONIC."""


@dataclass(frozen=True)
class Splats:
    """n Gaussians; world units, z up."""

    positions: Float[np.ndarray, "n 3"]
    rotations: Float[np.ndarray, "n 3 3"]
    """Columns are the axes of the ellipsoid: right-handed, the last one across the surface."""
    scales: Float[np.ndarray, "n 3"]
    """Standard deviations along the axes."""
    opacities: Float[np.ndarray, "n"]
    colors: Float[np.ndarray, "n 3"]
    """sRGB in [0, 1]."""

    def turned(self, turn: Float[np.ndarray, "3 3"]) -> "Splats":
        """Returns the splats with every point p moved to `turn` p."""
        positions, rotations = self.positions @ turn.T, turn @ self.rotations
        return Splats(positions, rotations, self.scales, self.opacities, self.colors)

    def quaternions(self) -> Float[np.ndarray, "n 4"]:
        """Unit quaternions of the rotations, w last."""
        from scipy.spatial.transform import Rotation

        return Rotation.from_matrix(self.rotations).as_quat()


Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""Turns z up into y up, as in glTF."""
Y_DOWN = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
"""Turns z up into y down, as in scenes that 3D Gaussian splatting learns from COLMAP's cameras."""


def scene_splats(
    loaded: SceneSet, scene: str, view: Viewpoint, count: int = COUNT, cells: int = CELLS, lowest: float = 0.0
) -> Splats:
    """Covers the visible surface of a scene with at most `count` splats. Other arguments and errors are as
    for `scene_mesh`."""
    if not 1 <= count <= MOST:
        raise UserError(f"--count {count}: choose between 1 and {MOST}.")
    shot = photographed(loaded, scene, view, cells, lowest, finer=FINER, reached=REACHED)
    random = np.random.default_rng(0)
    points, normals = sampled(shot.surface, POINTS_EACH * count, random)
    colors, seen = shot.visible_colors(points, normals)
    points, normals, colors = points[seen], normals[seen], colors[seen]
    middles, cell = gathered(points, min(count, len(points)), random)
    positions, rotations, scales = _ellipsoids(points, normals, middles, cell, shot.surface.step)
    colors = _means(colors, cell, len(middles)).clip(0, 1)
    return Splats(positions, rotations, scales, np.full(len(middles), OPACITY), colors)


def gathered(
    points: Float[np.ndarray, "p 3"], count: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "p"]]:
    """Gathers points into at most `count` cells of about one size, by k-means. Returns the cells' middles,
    and the cell of each point; none is empty."""
    from scipy.spatial import cKDTree

    middles = points[random.choice(len(points), count, replace=False)]
    for _ in range(ROUNDS):
        cell = cKDTree(middles).query(points)[1]
        present, cell = np.unique(cell, return_inverse=True)
        middles = _means(points, cell, len(present))
    return middles, cell


def _means(values: Float[np.ndarray, "p c"], cell: Int[np.ndarray, "p"], count: int):
    """Returns the mean of the values in each cell (count c)."""
    total = np.stack([np.bincount(cell, column, count) for column in values.T], 1)
    return total / np.bincount(cell, minlength=count)[:, None]


def _ellipsoids(
    points: Float[np.ndarray, "p 3"],
    normals: Float[np.ndarray, "p 3"],
    middles: Float[np.ndarray, "n 3"],
    cell: Int[np.ndarray, "p"],
    step: float,
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 3"]]:
    """Returns positions, rotations and scales of a splat for each cell, by the covariance of its points. No
    splat is much smaller or larger than most; the third axis points outward."""
    offset = points - middles[cell]
    spread = _means((offset[:, :, None] * offset[:, None]).reshape(-1, 9), cell, len(middles))
    width, axes = np.linalg.eigh(spread.reshape(-1, 3, 3))
    width, axes = WIDTH * np.sqrt(width[:, ::-1].clip(0)), axes[:, :, ::-1].copy()
    usual = float(np.median(width[:, 1])) or step
    width = width.clip(0.5 * usual, 3 * usual) * [1, 1, 0] + [0, 0, THICKNESS * usual]
    outward = (axes[:, :, 2] * _means(normals, cell, len(middles))).sum(1)
    axes[:, :, 2] *= np.where(outward < 0, -1, 1)[:, None]
    axes[:, :, 0] *= np.sign(np.linalg.det(axes))[:, None]
    return middles - INSET * usual * axes[:, :, 2], axes, width


# Files


ENDINGS = (".ply", ".glb", ".spz", ".sog")
"""Kinds of files."""
SMALL = ENDINGS[2:]


def write_splats(
    path: str | Path, splats: Splats, name: str = "", tags: Mapping[str, Any] | None = None
) -> int:
    """Writes splats by the file's ending: as PLY or SOG (y down, as scenes of 3D Gaussian splatting are), as
    binary glTF or SPZ (y up). Returns the size in bytes. Name and tags are stored in glTF only.

    Raises:
        UserError: the ending is another one, the extra `splats` is absent, or the file cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending == ".ply":
        return save_file(path, _ply(splats.turned(Y_DOWN)))
    if ending == ".glb":
        return save_file(path, _glb(splats.turned(Y_UP), name, tags))
    if ending not in SMALL:
        raise UserError(f"{path}: splats are written as {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.")
    require_small(ending)
    from gaussforge import GaussForge

    turn = Y_UP if ending == ".spz" else Y_DOWN
    made = GaussForge().convert(_ply(splats.turned(turn)), "ply", ending[1:])
    if "data" not in made:
        raise UserError(f"{path}: gaussforge could not write it: {made.get('error')}. Write PLY.")
    return save_file(path, made["data"])


def require_small(ending: str) -> None:
    """Raises a UserError if a file of this kind needs a package that is absent."""
    if ending.lower() in SMALL:
        try:
            import gaussforge  # noqa: F401
        except ImportError:
            raise UserError(
                "SPZ and SOG files need gaussforge. Run: pip install latentscenes[splats]"
            ) from None


def _ply(splats: Splats) -> bytes:
    """The layout of the published code: logarithms of scales, opacities before the sigmoid, w first."""
    rows = {
        "x y z": splats.positions,
        "nx ny nz": splats.rotations[:, :, 2],
        "f_dc_0 f_dc_1 f_dc_2": (splats.colors - 0.5) / HARMONIC,
        "opacity": np.log(splats.opacities / (1 - splats.opacities))[:, None],
        "scale_0 scale_1 scale_2": np.log(splats.scales),
        "rot_0 rot_1 rot_2 rot_3": np.roll(splats.quaternions(), 1, 1),
    }
    lines = ["ply", "format binary_little_endian 1.0", f"comment latentscenes {__version__}"]
    lines.append(f"element vertex {len(splats.positions)}")
    lines += [f"property float {name}" for names in rows for name in names.split()]
    body = np.concatenate(list(rows.values()), 1).astype("<f4").tobytes()
    return "\n".join([*lines, "end_header", ""]).encode() + body


def _glb(splats: Splats, name: str, tags: Mapping[str, Any] | None) -> bytes:
    """Scales and opacities as they are, w last. Viewers without the extension show COLOR_0 as points."""
    light = np.concatenate([to_linear(splats.colors), splats.opacities[:, None]], 1)
    arrays = {
        "POSITION": splats.positions,
        "COLOR_0": np.round(65535 * light).astype("<u2"),
        "KHR_gaussian_splatting:ROTATION": splats.quaternions(),
        "KHR_gaussian_splatting:SCALE": splats.scales,
        "KHR_gaussian_splatting:OPACITY": splats.opacities[:, None],
        "KHR_gaussian_splatting:SH_DEGREE_0_COEF_0": (splats.colors - 0.5) / HARMONIC,
    }
    # Arrays one behind the other
    views, accessors, body = [], [], b""
    for values in arrays.values():
        whole = values.dtype == "<u2"
        packed = (values if whole else values.astype("<f4")).tobytes()
        kind = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[values.shape[1]]
        accessor = {"bufferView": len(views), "count": len(values), "type": kind}
        accessors.append(accessor | {"componentType": 5123 if whole else 5126, "normalized": whole})
        views.append({"buffer": 0, "byteOffset": len(body), "byteLength": len(packed)})
        body += packed
    # The scene that refers to them
    ends = splats.positions.astype("<f4")
    accessors[0] |= {"min": ends.min(0).tolist(), "max": ends.max(0).tolist()}
    extension = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    primitive = {
        "attributes": {key: place for place, key in enumerate(arrays)},
        "mode": 0,
        "material": 0,
        "extensions": {"KHR_gaussian_splatting": extension},
    }
    material = {"alphaMode": "OPAQUE", "extensions": {"KHR_materials_unlit": {}}}
    tree = {
        "asset": {"version": "2.0", "generator": f"latentscenes {__version__}"},
        "extensionsUsed": ["KHR_gaussian_splatting", "KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name} | ({"extras": dict(tags)} if tags else {})],
        "meshes": [{"name": name, "primitives": [primitive]}],
        "materials": [material],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(body)}],
    }
    # Header, JSON and arrays
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + 8 + len(body)
    header = struct.pack("<4sII", b"glTF", 2, size) + struct.pack("<I4s", len(text), b"JSON")
    return header + text + struct.pack("<I4s", len(body), b"BIN\0") + body
