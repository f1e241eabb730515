"""Learned scenes as meshes with few triangles and a texture: a picture that holds the colors of the surface.

Notable:
- xatlas cuts the surface into flat charts and packs them into a square. Rays onto the charts (Embree) find
  the place on the surface that each texel shows.
- Texels are colored like vertices (mesh.py), from pictures twice as fine as the scene's data, and then fitted
  (below). Texels that no picture shows take the mean color of the nearest visible vertices.
- The fit is damped least squares. A field is learned by one ray for each pixel, from pixels that are means
  over their area. So its pictures with the dataset's pixels are compared with means of several rays onto the
  mesh. Texels that are read from pictures only, as vertices are, would be blurred twice.
- Gaps between charts hold the color of the nearest texel of a chart, so that smooth reading and small
  versions of the texture show no seams.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Float32, Int, UInt8

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import spread_evenly
from latentscenes.export.mesh import GRAZING, OPAQUE, Photographed, Triangles, colors_nearby, photographed
from latentscenes.export.outlines import outlined
from latentscenes.export.surface import Surface
from latentscenes.model.model import RenderedImages, render_images
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
BLOCK = 1 << 17
"""Texels that are found or colored at once."""
ROUNDS = 10
"""Steps of the fit."""
DAMPING = 0.3
"""Weight of the colors that texels start with, over that of a pixel that shows one texel only."""
STEPS = 2
"""Steps of the fit of outlines."""
SAMPLES = 3
"""Rays along each side of a pixel, while pictures have up to LARGE pixels along a side; else two thirds."""
LARGE = 256
MOST_PIXELS = 4_000_000
"""If more pixels show the object, a share of the pictures is used."""


class Charts(NamedTuple):
    """A surface cut into flat charts; p vertices, f triangles."""

    rows: Int[np.ndarray, "p"]
    """The vertex of the surface that each vertex of a chart is."""
    corners: Int[np.ndarray, "f 3"]
    uv: Float32[np.ndarray, "p 2"]
    """Places in the texture, in [0, 1]; (0, 0) is its upper left corner."""


@dataclass(frozen=True)
class TexturedMesh(Triangles):
    """Triangles with a texture. Vertices at edges of charts occur once for each chart."""

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
    shot = photographed(loaded, scene, view, cells, lowest, faces, FINER, REACHED)
    found = shot.surface
    charts = rows, corners, uv = unwrapped(found, side)
    inside, face, weights = texels(corners, uv, side)
    picture = np.zeros((side, side, 3))
    picture[inside] = _baked(shot, rows[corners[face]], weights)
    as_learned = render_images(loaded.model, loaded.planes(scene), shot.cameras, view.size)
    around = spread_out(picture, inside)
    for _ in range(STEPS):
        found = outlined(found, rows[corners], uv[corners], around, as_learned, shot.cameras)
    picture = fitted_texels(picture, inside, found, charts, as_learned, shot.cameras)
    texture = np.round(255 * spread_out(picture, inside).clip(0, 1)).astype(np.uint8)
    return TexturedMesh(found.vertices[rows], corners, found.normals()[rows], uv, texture)


def _baked(
    shot: Photographed, corners: Int[np.ndarray, "n 3"], weights: Float[np.ndarray, "n 3 1"]
) -> Float[np.ndarray, "n 3"]:
    """Returns the colors of places, given by the three vertices around each and their weights."""
    from scipy.spatial import cKDTree

    vertices, normals, colors = shot.surface.vertices, shot.surface.normals(), np.zeros((len(corners), 3))
    of_vertices, visible = shot.visible_colors(vertices, normals)
    tree, palette = cKDTree(vertices[visible]), of_vertices[visible]
    for start in tracked(range(0, len(corners), BLOCK), "coloring the texture"):
        part = slice(start, start + BLOCK)
        places = (weights[part] * vertices[corners[part]]).sum(1)
        outward = (weights[part] * normals[corners[part]]).sum(1)
        outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-12)
        colors[part], seen = shot.paint(places, outward)
        hidden = np.flatnonzero(~seen)
        colors[start + hidden] = colors_nearby(tree, palette, places[hidden], shot.surface.step)
    return colors


def unwrapped(found: Surface, side: int) -> Charts:
    """Cuts a surface into flat charts in a square of `side` x `side` texels.

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
    return Charts(rows.astype(np.int64), corners.astype(np.int64), uv.astype(np.float32))


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


# The fit


def fitted_texels(
    picture: Float[np.ndarray, "t t 3"],
    inside: Bool[np.ndarray, "t t"],
    found: Surface,
    charts: Charts,
    shown: RenderedImages,
    cameras: Cameras,
) -> Float[np.ndarray, "t t 3"]:
    """Returns a texture in which the texels `inside` charts are fitted, so that the mesh looks like pictures.

    Args:
        shown: pictures with as many pixels as the dataset's.

    A few steps of simultaneous iterative reconstruction (SIRT; Gilbert, Journal of Theoretical Biology 36,
    1972) start from the colors that are there. More would fit what differs from picture to picture.
    """
    from scipy.sparse import vstack  # comes with scikit-image

    views = list(range(len(cameras)))
    solid = int((shown.opacity > OPAQUE).sum())
    if solid > MOST_PIXELS:
        views = spread_evenly(views, max(1, len(views) * MOST_PIXELS // solid))
    caster = rtcore_scene.EmbreeScene()
    TriangleMesh(caster, np.ascontiguousarray(found.vertices[charts.rows][charts.corners], np.float32))
    normals, number = found.normals()[charts.rows], np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    parts = [
        _view(
            shown.images[view], shown.opacity[view], cameras[view : view + 1], caster, charts, normals, number
        )
        for view in tracked(views, "fitting the texture")
    ]
    reads, colors = vstack([part[0] for part in parts]).tocsr(), np.concatenate([part[1] for part in parts])
    texels = picture[inside].astype(np.float32)
    step = 1 / (reads.T @ np.asarray(reads.sum(1)).ravel() + np.float32(DAMPING))
    for _ in range(ROUNDS):
        texels += step[:, None] * (reads.T @ (colors - reads @ texels))
    fitted = picture.copy()
    fitted[inside] = texels
    return fitted


def _view(image, opacity, camera: Cameras, caster, charts: Charts, normals, number):
    """Returns the matrix (pixels, texels) by which the opaque pixels of a picture read texels, and their
    colors (pixels, 3); both are weighted by how frontally the camera looks. Left out are pixels not all of
    whose rays meet the surface, or that look at it from aside."""
    from scipy.sparse import csr_matrix

    (height, width), side = opacity.shape, len(number)
    samples = SAMPLES if max(height, width) <= LARGE else 2 * SAMPLES // 3
    row, column = (index.numpy() for index in (opacity > OPAQUE).nonzero(as_tuple=True))
    count, total = np.zeros(len(row)), np.zeros(len(row))
    pixels, texels, shares = [], [], []
    for place in range(samples * samples):
        down, across = divmod(place, samples)
        fine = (row * samples + down) * (width * samples) + column * samples + across
        rays = camera.rays(height * samples, width * samples, torch.from_numpy(fine)[None])
        origins, directions = (values[0].numpy().astype(np.float32) for values in rays)
        hit = caster.run(origins, directions, output=True)
        met = np.flatnonzero(hit["primID"] >= 0)
        u, v, of_face = hit["u"][met], hit["v"][met], charts.corners[hit["primID"][met]]
        weights = np.stack([1 - u - v, u, v], 1)[..., None]
        outward = (weights * normals[of_face]).sum(1)
        length = np.maximum(np.linalg.norm(outward, axis=1), 1e-12)
        facing = -(outward * directions[met]).sum(1) / length
        turned = np.flatnonzero(facing > GRAZING)
        met, at = met[turned], (weights[turned] * charts.uv[of_face[turned]]).sum(1) * side - 0.5
        count[met] += 1
        total[met] += facing[turned]
        low = np.floor(at).astype(np.int64)
        part = at - low
        for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = (low + [right, below]).clip(0, side - 1).T
            texel = number[y, x]
            share = np.abs(1 - right - part[:, 0]) * np.abs(1 - below - part[:, 1])
            known = texel >= 0
            pixels.append(met[known])
            texels.append(texel[known])
            shares.append(share[known])
    found = csr_matrix(
        (np.concatenate(shares), (np.concatenate(pixels), np.concatenate(texels))),
        (len(row), int(number.max()) + 1), np.float32,
    )  # fmt: skip
    known = np.asarray(found.sum(1)).ravel()
    used = np.flatnonzero((count == samples**2) & (known > 0.5 * samples**2))
    weight = np.sqrt(total[used] / samples**2).astype(np.float32)
    colors = image.numpy()[:, row[used], column[used]].T * weight[:, None]
    return found[used].multiply((weight / known[used])[:, None]).tocsr(), colors
