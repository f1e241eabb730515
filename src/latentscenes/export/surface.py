"""Extracts the surface of a learned scene: the boundary of the space that light from outside reaches.

Notable:
- A density has no surface of its own, and the best threshold differs from run to run. The share of light that
  reaches a point does not depend on units. A point is outside if at least three quarters arrive from at least
  one direction.
- Space that no light reaches counts as inside, even if it is empty. So the surface is closed and has no
  cavities.
- Pictures over white do not distinguish white matter around an object from empty space, and fields that
  learn without silhouettes do grow such matter. It is removed: a cell that many pictures show as white
  background counts as empty. White parts of the object that hide a cell do not count as background.
- With silhouettes, background is where nothing is opaque, whatever its color.
- docs/export.md compares this with a threshold on density and with fused depth maps.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras, spread_directions
from latentscenes.core.errors import UserError
from latentscenes.data.images import white_background
from latentscenes.model.model import Model, RenderedImages, to_uint8
from latentscenes.rendering.field import FusedPlanes, sample_planes

DIRECTIONS = 64
"""Number of directions that light comes from, spread over the sphere."""
REACHED = 0.75
"""A point is outside if this share of the light from one of them reaches it."""
GROUND = 0.15
"""A cell is empty if a larger share of the pictures shows it as background. A single picture may mistake a
white part at the object's edge for background; many pictures do not."""
BEHIND = 2.0
"""Matter up to so many cells behind the depth of a picture is what the picture shows."""
MATTER = 0.9
"""Opaque matter is background if a larger share of the pictures that show it shows it as that. Some pictures
show a white part of an object in another color, or the object behind it."""
CLEAR = 0.02
"""Pixels of lower opacity show background, where opacity says where the object is: black matter of this
opacity is as white as background over white may be."""
SMALLEST = 0.02
"""Parts with a smaller share of the largest part's volume are left out."""
FEWEST, MOST = 8, 512
"""Allowed numbers of cells along the longest side."""
FEWEST_FACES = 100
"""Triangles that a simplified surface may have at least."""
CHUNK = 1 << 18
"""Number of points evaluated at once."""


class Grid(NamedTuple):
    """Cubic cells that fill a box."""

    origin: Float[np.ndarray, "3"]
    """Middle of the first cell, world units."""
    step: float
    """Side of a cell, world units."""
    count: tuple[int, int, int]
    """Cells along x, y, z."""

    @classmethod
    def filling(cls, box: Box, cells: int) -> "Grid":
        """The grid with `cells` cells along the box's longest side."""
        half = np.array(box.half)
        step = 2 * half.max() / cells
        count = np.ceil(2 * half / step - 1e-6).astype(int)
        return cls(np.array(box.center) - (count - 1) / 2 * step, float(step), tuple(count.tolist()))

    def points(self) -> Float[Tensor, "x y z 3"]:
        """Middles of all cells, world units."""
        lines = [
            torch.arange(count) * self.step + start for count, start in zip(self.count, self.origin.tolist())
        ]
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)


@torch.no_grad()
def density(model: Model, planes: FusedPlanes, grid: Grid) -> Float[Tensor, "x y z"]:
    """Returns a scene's density at the middles of cells, per world unit. A field with view directions is seen
    from above."""
    settings = model.config.planes
    points = grid.points().reshape(-1, 3).to(model.device)
    points, _ = model.box_of(planes).normalize(points, points)
    downward = points.new_tensor([0.0, 0.0, -1.0])
    found = []
    for some in points.split(CHUNK):
        features = sample_planes(planes.texels, some[None], settings.axes, settings.aggregation)
        found.append(model.field(features, some[None], downward.expand(1, len(some), 3))[0][0])
    return torch.cat(found).reshape(grid.count) / model.units(planes)


def max_transmittance(
    density: Float[np.ndarray, "x y z"], step: float, directions: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "x y z"]:
    """Returns, for each cell of side `step`, the largest share of light in [0, 1] that reaches its middle
    from any of the directions (unit vectors toward the light): max exp(−∫ σ), as in eq. 1 of NeRF (arXiv
    2003.08934)."""
    found = np.zeros_like(density)
    steepest = np.abs(directions).argmax(1)
    for axis in range(3):
        order = np.roll(np.arange(3), -axis)
        turned, most = np.ascontiguousarray(density.transpose(order)), np.zeros_like(density.transpose(order))
        for toward in directions[steepest == axis][:, order]:
            _shine(turned, most, step, toward)
        np.maximum(found, most.transpose(np.argsort(order)), out=found)
    return found


def _shine(
    density: Float[np.ndarray, "x y z"],
    most: Float[np.ndarray, "x y z"],
    step: float,
    toward: Float[np.ndarray, "3"],
) -> None:
    """Raises `most` to the light of one direction, which is steepest along x.

    Parallel rays start in a plane of cells and drift by at most a cell from one plane to the next. So each
    plane is read between four neighboring cells with the same weights everywhere, as in the shear-warp
    factorization (Lacroute and Levoy, SIGGRAPH 1994).
    """
    # Turned so that light meets the planes in order, and rays drift to higher rows and columns
    turned = tuple(slice(None, None, -1 if back else 1) for back in (toward[0] > 0, *(toward[1:] < 0)))
    density, most = density[turned], most[turned]
    drift = np.abs(toward[1:] / toward[0])
    height, width = density.shape[1:]
    reach = np.ceil((len(density) - 1) * drift).astype(int) + 1
    passed = np.zeros((height + reach[0], width + reach[1]), density.dtype)  # −∫ σ of each ray so far
    half = density.dtype.type(-0.5 * step / abs(toward[0]))
    for place, (plane, lightest) in enumerate(zip(density, most, strict=True)):
        (top, low), (left, right) = ((int(way), way % 1) for way in (place * drift).tolist())
        rays = passed[top : top + height + 1, left : left + width + 1]
        met = _bilinear(np.pad(half * plane, 1), 1 - low, 1 - right)
        rays += met
        np.maximum(lightest, _bilinear(np.exp(rays), low, right), out=lightest)
        rays += met


def _bilinear(values: Float[np.ndarray, "a b"], down: float, right: float) -> Float[np.ndarray, "c d"]:
    """Reads values between four neighbors, `down` rows and `right` columns (in [0, 1]) from the first."""
    rows = values[:-1] + down * (values[1:] - values[:-1])
    return rows[:, :-1] + right * (rows[:, 1:] - rows[:, :-1])


class Surface(NamedTuple):
    """A closed surface around the solid parts of a scene."""

    vertices: Float[np.ndarray, "p 3"]
    """World units."""
    faces: Int[np.ndarray, "f 3"]
    """Corners counter-clockwise, seen from outside."""
    step: float
    """Side of the cells it was extracted from, world units."""

    def normals(self) -> Float[np.ndarray, "p 3"]:
        """Unit vectors outward at the vertices: means of the adjacent faces' normals, weighted by area; up,
        where these cancel out."""
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        across, total = np.cross(b - a, c - a), np.zeros_like(self.vertices)
        for corner in range(3):
            np.add.at(total, self.faces[:, corner], across)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(length > 1e-15, total / np.maximum(length, 1e-15), [0.0, 0.0, 1.0])


def surface(
    model: Model,
    planes: FusedPlanes,
    shown: RenderedImages,
    cameras: Cameras,
    cells: int = 128,
    reached: float = REACHED,
    silhouettes: bool = False,
) -> Surface:
    """Extracts the surface of a scene from its fused planes.

    Args:
        shown: pictures of the scene from all around, with depth and opacity.
        cells: number of cubic cells along the box's longest side.
        reached: a point is outside if this share of the light reaches it.
        silhouettes: whether opacity says where the object is.

    Raises:
        UserError: the export extra is absent, `cells` is out of range, or nothing is solid.
    """
    if not FEWEST <= cells <= MOST:
        raise UserError(
            f"--cells {cells}: choose between {FEWEST} and {MOST}; planes of this model have "
            f"{model.config.planes.resolution} texels a side."
        )
    try:
        from scipy.ndimage import binary_dilation  # comes with scikit-image
        from skimage.measure import marching_cubes
    except ImportError:
        raise UserError(
            "meshes and points need scikit-image. Run: pip install latentscenes[export]"
        ) from None
    grid = Grid.filling(model.box_of(planes), cells)
    found = density(model, planes, grid).cpu().numpy()
    light = max_transmittance(found, grid.step, spread_directions(DIRECTIONS).numpy())
    near = np.argwhere(binary_dilation(light < reached))  # other cells do not touch the surface
    ground = background(shown, cameras, grid, near, silhouettes)
    light[tuple(near[background_share(grid.points()[tuple(near.T)], ground, cameras) > GROUND].T)] = 1.0
    light = np.pad(light, 1, constant_values=1.0)
    solid = large_parts(light < reached)
    if not solid.any():
        raise UserError(
            "nothing in this scene is solid, so it has no surface. Check whether it was learned long enough: "
            "latentscenes render --mode opacity"
        )
    air = large_parts(~solid, 1.0)  # keeps only the outer space: light leaks through thin cracks
    field = np.where(air, np.maximum(light, reached + 1e-3), np.minimum(light, reached - 1e-3))
    vertices, faces, _, _ = marching_cubes(field, reached, gradient_direction="descent")
    return Surface(
        grid.origin + grid.step * (vertices - 1).astype(np.float64), faces.astype(np.int64), grid.step
    )


def simplified(found: Surface, faces: int) -> Surface:
    """Merges triangles of a surface until at most `faces` are left, those first whose loss moves it least
    (quadric error, Garland and Heckbert, SIGGRAPH 1997).

    Raises:
        UserError: the export extra is absent, or `faces` is too small for a closed surface.
    """
    if faces < FEWEST_FACES:
        raise UserError(f"--faces {faces}: at least {FEWEST_FACES}.")
    if len(found.faces) <= faces:
        return found
    try:
        from fast_simplification import simplify
    except ImportError:
        raise UserError("--faces needs fast-simplification. Run: pip install latentscenes[export]") from None
    vertices, triangles = simplify(
        found.vertices.astype(np.float32), found.faces.astype(np.int32), target_count=faces
    )
    return Surface(vertices.astype(np.float64), triangles.astype(np.int64), found.step)


def background(
    shown: RenderedImages,
    cameras: Cameras,
    grid: Grid,
    near: Int[np.ndarray, "n 3"],
    silhouettes: bool = False,
) -> Bool[np.ndarray, "v H W"]:
    """Returns which pixels show background: white that is connected to the border, unless it is a part of the
    object. Where the field is opaque behind such a pixel, its matter is background if nearly all pictures
    that show it show it as that.

    Args:
        near: cells that hold matter, or lie beside such cells.
        silhouettes: whether opacity says where the object is; then colors do not count.
    """
    if silhouettes:
        return (shown.opacity < CLEAR).numpy()
    ground = white_background(to_uint8(shown.images))
    opaque = ground & (shown.opacity > 0.5).numpy()
    if not opaque.any():
        return ground
    share = background_share(grid.points()[tuple(near.T)], ground, cameras, shown, BEHIND * grid.step)
    empty = np.zeros(grid.count, bool)
    empty[tuple(near[share > MATTER].T)] = True
    for view in np.flatnonzero(opaque.any((1, 2))):
        pixels = opaque[view].ravel().nonzero()[0]
        origins, directions = cameras[view : view + 1].rays(*opaque.shape[1:], torch.from_numpy(pixels)[None])
        inside = shown.depth[view].flatten()[pixels, None] + grid.step  # cells at the depth may hold the edge
        places = (origins + inside * directions)[0].numpy()
        cell = np.round((places - grid.origin) / grid.step).astype(int).clip(0, np.array(grid.count) - 1)
        ground[view].reshape(-1)[pixels] = empty[tuple(cell.T)]
    return ground


def background_share(
    points: Float[Tensor, "n 3"],
    ground: Bool[np.ndarray, "v H W"],
    cameras: Cameras,
    shown: RenderedImages | None = None,
    behind: float = 0.0,
) -> Float[np.ndarray, "n"]:
    """Returns the share of pictures in which each point projects onto background.

    Args:
        shown: if given, only pictures in which the point is visible count: nothing opaque lies more than
            `behind` world units before it.
    """
    total, visible = torch.zeros(len(points)), torch.zeros(len(points))
    for view in range(len(cameras)):
        places, depth = cameras[view : view + 1].project(points)
        layers = [torch.from_numpy(ground[view]).float()]
        layers += [] if shown is None else [shown.opacity[view], shown.depth[view]]
        read = torch.nn.functional.grid_sample(
            torch.stack(layers)[None], 2 * places[None] - 1, align_corners=False
        )[0, :, 0]
        counted = (read[0] > 0.5) & (depth[0] > 0)
        if shown is not None:
            distance = (points - cameras.positions[view]).norm(dim=1)
            free = (read[1] < 0.5) | (distance < read[2] + behind)
            counted &= free
            visible += free
        total += counted
    return (total / (len(cameras) if shown is None else visible.clamp_min(1))).numpy()


def large_parts(cells: Bool[np.ndarray, "x y z"], smallest: float = SMALLEST) -> Bool[np.ndarray, "x y z"]:
    """Removes connected parts smaller than `smallest` times the largest part. Cells that share a face are
    connected."""
    from skimage.measure import label

    parts = label(cells, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return cells & (sizes >= smallest * sizes.max())[parts]
