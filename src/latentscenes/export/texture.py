"""Learned scenes as meshes with few triangles and a texture: a picture that holds the colors of the surface.

Notable:
- xatlas cuts the surface into flat charts and packs them into a square. Rays onto the charts (Embree) find
  the place on the surface that each texel shows.
- Texels are colored like vertices (mesh.py), from pictures twice as fine as the scene's data. Texels that no
  picture shows take the mean color of the nearest visible vertices.
- Gaps between charts hold the color of the nearest texel of a chart, so that smooth reading and small
  versions of the texture show no seams.
"""

from dataclasses import dataclass

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Float32, Int, UInt8

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.export.mesh import NEAREST, paint, photographed, unseen
from latentscenes.export.surface import Surface, simplified
from latentscenes.model.model import RenderedImages
from latentscenes.storage.scene_set import SceneSet

TEXELS, FACES, CELLS = 1024, 20_000, 192
"""Defaults: texels along each side, most triangles, cells along the longest side of the scene box."""
REACHED = 0.8
"""Share of light at the surface. In cells this fine, surfaces at 0.8 lie nearer to their sources than at
0.75, and their pictures nearer to photographs."""
FEWEST, MOST = 64, 8192
"""Allowed numbers of texels along a side."""
FINER = 2
"""Colors come from pictures with this many times the dataset's pixels on each side."""
GUTTER = 4
"""Free texels between charts."""
BLOCK = 1 << 19
"""Texels that are found or colored at once."""


@dataclass(frozen=True)
class TexturedMesh:
    """p vertices and f triangles; world units, z up. Vertices at edges of charts occur once for each."""

    vertices: Float[np.ndarray, "p 3"]
    faces: Int[np.ndarray, "f 3"]
    """Corners counter-clockwise, seen from outside."""
    normals: Float[np.ndarray, "p 3"]
    """Unit vectors outward, at the vertices."""
    uv: Float32[np.ndarray, "p 2"]
    """Places in the texture, in [0, 1]; (0, 0) is its upper left corner."""
    texture: UInt8[np.ndarray, "t t 3"]
    """sRGB, first row on top."""


def textured_mesh(
    loaded: SceneSet,
    scene: str,
    view: Viewpoint,
    side: int = TEXELS,
    faces: int = FACES,
    cells: int = CELLS,
    lowest: float = 0.0,
) -> TexturedMesh:
    """Extracts the surface of a scene with at most `faces` triangles and a texture of `side` x `side` texels.
    Other arguments and errors are as for `scene_mesh`.

    Raises:
        UserError: also if `side` is out of range.
    """
    if not FEWEST <= side <= MOST:
        raise UserError(f"--texture {side}: choose between {FEWEST} and {MOST} texels a side.")
    found, shown, cameras = photographed(loaded, scene, view, cells, lowest, FINER, REACHED)
    found = simplified(found, faces)
    rows, corners, uv = unwrapped(found, side)
    inside, face, weights = texels(corners, uv, side)
    picture = np.zeros((side, side, 3))
    picture[inside] = _baked(scene, found, rows[corners[face]], weights, (shown, cameras))
    texture = np.round(255 * spread_out(picture, inside).clip(0, 1)).astype(np.uint8)
    return TexturedMesh(found.vertices[rows], corners, found.normals()[rows], uv, texture)


def _baked(
    scene: str,
    found: Surface,
    corners: Int[np.ndarray, "n 3"],
    weights: Float[np.ndarray, "n 3 1"],
    photographs: tuple[RenderedImages, Cameras],
) -> Float[np.ndarray, "n 3"]:
    """Returns the colors of places, given by the three vertices around each and their weights."""
    from scipy.spatial import cKDTree

    normals, colors = found.normals(), np.zeros((len(corners), 3))
    of_vertices, visible = paint(found.vertices, normals, found, *photographs)
    if not visible.any():
        raise unseen(scene)
    tree, palette = cKDTree(found.vertices[visible]), of_vertices[visible]
    for start in range(0, len(corners), BLOCK):
        part = slice(start, start + BLOCK)
        places = (weights[part] * found.vertices[corners[part]]).sum(1)
        outward = (weights[part] * normals[corners[part]]).sum(1)
        outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-12)
        colors[part], seen = paint(places, outward, found, *photographs)
        hidden = np.flatnonzero(~seen)
        distance, nearest = tree.query(places[hidden], min(NEAREST, len(palette)))
        near = 1 / np.maximum(distance.reshape(len(hidden), -1, 1), found.step)
        mixed = (near * palette[nearest.reshape(near.shape[:2])]).sum(1) / near.sum(1)
        colors[start + hidden] = mixed
    return colors


def unwrapped(
    found: Surface, side: int
) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "f 3"], Float32[np.ndarray, "p 2"]]:
    """Cuts a surface into flat charts in a square of `side` x `side` texels.

    Returns:
        For each vertex of the charts, the surface's vertex that it is; the triangles; and the places of the
        vertices in the square, in [0, 1], (0, 0) being its upper left corner.

    Raises:
        UserError: xatlas is absent.
    """
    try:
        import xatlas
    except ImportError:
        raise UserError("textures need xatlas. Run: pip install latentscenes[export]") from None
    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = side, GUTTER, True
    atlas.add_mesh(found.vertices.astype(np.float32), found.faces.astype(np.uint32))
    atlas.generate(xatlas.ChartOptions(), packing)
    rows, corners, uv = atlas[0]
    return rows.astype(np.int64), corners.astype(np.int64), uv.astype(np.float32)


def texels(
    corners: Int[np.ndarray, "f 3"], uv: Float32[np.ndarray, "p 2"], side: int
) -> tuple[Bool[np.ndarray, "s s"], Int[np.ndarray, "n"], Float[np.ndarray, "n 3 1"]]:
    """Returns which texels have their middle in a triangle, and for each of these, row by row, the triangle
    and the weights of its corners at the middle."""
    flat = np.pad(side * uv, ((0, 0), (0, 1))).astype(np.float32)
    charts = rtcore_scene.EmbreeScene()
    TriangleMesh(charts, np.ascontiguousarray(flat[corners]))
    face, weights = [], []
    for start in range(0, side * side, BLOCK):
        row, column = np.divmod(np.arange(start, min(start + BLOCK, side * side)), side)
        above = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], 1).astype(np.float32)
        hit = charts.run(above, np.tile(np.float32([0, 0, -1]), (len(row), 1)), output=True)
        u, v = hit["u"].astype(np.float64), hit["v"].astype(np.float64)
        face.append(hit["primID"].astype(np.int64))
        weights.append(np.stack([1 - u - v, u, v], 1)[..., None])
    met = np.concatenate(face)
    return (met >= 0).reshape(side, side), met[met >= 0], np.concatenate(weights)[met >= 0]


def spread_out(
    picture: Float[np.ndarray, "h w 3"], known: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w 3"]:
    """Returns a picture in which unknown pixels have the color of the nearest known one."""
    from scipy.ndimage import distance_transform_edt

    row, column = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return picture[row, column]
