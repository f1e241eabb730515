"""Moves a colored surface until its outlines lie where the scene's pictures show them.

Notable:
- One Gauss-Newton step. The unknowns are how far the vertices move along their normals, in cells.
- Where a ray meets a surface and its neighbor passes by, or meets one far behind, an outline lies between
  them. If the nearer surface moves, so does the outline, and pixels change by the difference of both colors.
  Only these changes count, as at the edges of differentiable ray tracing (Li et al., SIGGRAPH Asia 2018).
- Colors are compared, not opacity: what is opaque at an outline is often paler than the object.
- Vertices that no picture shows at an outline follow their neighbors, and most stay where they are.
"""

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Float, Int

from latentscenes.core.cameras import Cameras
from latentscenes.core.console import tracked
from latentscenes.export.surface import Surface
from latentscenes.model.model import RenderedImages

BEHIND = 3.0
"""An outline lies between neighboring rays whose surfaces are so many cells apart."""
SMOOTH, STILL = 0.02, 0.02
"""Weights of squared differences between a vertex and the mean of its neighbors, and of squared ways, both in
cells, over a squared error of color in one picture."""
FARTHEST = 0.5
"""No vertex moves farther, cells."""
SAMPLES = 2
"""Rays along each side of a pixel."""
MARGIN = 2
"""Pixels around the object that are compared, too."""


def outlined(
    found: Surface,
    faces: Int[np.ndarray, "f 3"],
    uv: Float[np.ndarray, "f 3 2"],
    texture: Float[np.ndarray, "t t 3"],
    shown: RenderedImages,
    cameras: Cameras,
) -> Surface:
    """Returns a surface whose outlines fit pictures better. Vertices are as many, and triangles the same.

    Args:
        faces: vertices of the triangles.
        uv: places of their corners in the texture, in [0, 1].
        texture: colors of the surface, also a little beyond its charts.
        shown: pictures with as many pixels as the dataset's.
    """
    from scipy.sparse import csr_matrix, diags, identity, vstack  # comes with scikit-image
    from scipy.sparse.linalg import cg

    caster, count, normals = rtcore_scene.EmbreeScene(), len(found.vertices), found.normals()
    TriangleMesh(caster, np.ascontiguousarray(found.vertices[faces], np.float32))
    ends = torch.from_numpy(np.stack([found.vertices, found.vertices + found.step * normals])).float()
    parts = []
    for view in tracked(range(len(cameras)), "fitting outlines"):
        camera, image = cameras[view : view + 1], shown.images[view].movedim(0, -1).numpy()
        places = torch.stack([camera.project(points)[0][0] for points in ends]).double().numpy()
        places *= [image.shape[1], image.shape[0]]
        window = _window(places[0], image.shape)
        hits, colors = _seen(caster, camera, image.shape, window, (uv, texture))
        parts.append(_changes(image[window], hits, colors, faces, places[1] - places[0], BEHIND * found.step))
    changes = vstack([part[0] for part in parts]).tocsr()
    missing = np.concatenate([part[1] for part in parts])
    first, second = np.concatenate([faces, np.roll(faces, 1, 1), np.roll(faces, 2, 1)])[:, :2].T
    beside = csr_matrix((np.ones(len(first)), (first, second)), (count, count))
    beside += beside.T
    bend = diags(1 / np.maximum(np.asarray(beside.sum(1)).ravel(), 1)) @ beside - identity(count)
    curved = changes.T @ changes / len(cameras) + SMOOTH * (bend.T @ bend) + STILL * identity(count)
    ways, _ = cg(curved, changes.T @ missing / len(cameras), rtol=1e-4, maxiter=300)
    ways = ways.clip(-FARTHEST, FARTHEST)[:, None]
    return Surface(found.vertices + found.step * ways * normals, found.faces, found.step)


def _window(places: Float[np.ndarray, "p 2"], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Returns the rows and columns of a picture that show points, with a margin."""
    first = np.floor(places.min(0)).astype(int) - MARGIN
    last = np.ceil(places.max(0)).astype(int) + MARGIN
    (left, top), (right, bottom) = first.clip(0), last.clip(0, [shape[1], shape[0]])
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def _seen(caster, camera: Cameras, shape, window, painted):
    """Returns what rays through a window of a picture meet: distances (h w; infinite where nothing),
    triangles (h w) and weights of their corners (h w 3); and their colors (h w 3), white where they meet
    nothing."""
    uv, texture = painted
    height, width = SAMPLES * shape[0], SAMPLES * shape[1]
    row, column = (np.arange(SAMPLES * part.start, SAMPLES * part.stop) for part in window)
    pixels = torch.from_numpy((row[:, None] * width + column).reshape(1, -1))
    origins, directions = (values[0].numpy() for values in camera.rays(height, width, pixels))
    hit = caster.run(origins.astype(np.float32), directions.astype(np.float32), output=True)
    met = hit["primID"] >= 0
    weights = np.stack([1 - hit["u"] - hit["v"], hit["u"], hit["v"]], 1)
    at = (weights[met][..., None] * uv[hit["primID"][met]]).sum(1) * len(texture)
    x, y = at.astype(int).clip(0, len(texture) - 1).T
    colors = np.ones((len(met), 3))
    colors[met] = texture[y, x]
    distance, grid = np.where(met, hit["tfar"], np.inf), (len(row), len(column))
    of_rays = distance.reshape(grid), hit["primID"].reshape(grid), weights.reshape(*grid, 3)
    return of_rays, colors.reshape(*grid, 3)


def _changes(image, hits, colors, faces, speed: Float[np.ndarray, "p 2"], behind: float):
    """Returns the matrix (colors of pixels, vertices) of how pixels at outlines change if vertices move
    outward by a cell, and what these pixels lack.

    Args:
        image: the part of the picture that the rays show.
        speed: pixels that a vertex moves in the picture, right and down, if it moves outward by a cell.
    """
    from scipy.sparse import csr_matrix

    (distance, face, weights), (height, width) = hits, image.shape[:2]
    lacking = image - colors.reshape(height, SAMPLES, width, SAMPLES, 3).mean((1, 3))
    pixel = np.arange(height * width).reshape(height, width).repeat(SAMPLES, 0).repeat(SAMPLES, 1)
    rows, vertices, values = [], [], []
    for axis in (0, 1):
        one, other = (
            tuple(part if way == axis else slice(None) for way in (0, 1))
            for part in (slice(None, -1), slice(1, None))
        )
        near, far = distance[one], distance[other]
        with np.errstate(invalid="ignore"):  # where both rays pass by
            edge = np.nonzero((np.minimum(near, far) < np.inf) & ~(np.abs(near - far) < behind))
        ours = (near[edge] < far[edge])[:, None]
        step = (colors[one][edge] - colors[other][edge]) / SAMPLES
        corners = faces[np.where(ours[:, 0], face[one][edge], face[other][edge])]
        share = np.where(ours, weights[one][edge], weights[other][edge]) * speed[corners, 1 - axis]
        change = 0.5 * share[..., None] * step[:, None]
        for side in (one, other):  # an outline between two pixels changes both by half
            place = 3 * pixel[side][edge][:, None, None] + np.arange(3)
            rows.append(np.broadcast_to(place, change.shape).ravel())
            vertices.append(corners[..., None].repeat(3, 2).ravel())
            values.append(change.ravel())
    found = csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(vertices))),
        (3 * height * width, len(speed)),
    )
    used = np.flatnonzero(np.diff(found.indptr))
    return found[used], lacking.ravel()[used]
