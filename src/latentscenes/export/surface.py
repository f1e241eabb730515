"""Extracts the surface of a learned scene: the boundary of the space that light from outside reaches.

Notable:
- A density has no surface of its own, and the best threshold differs from run to run. The share of light that
  reaches a point does not depend on units. A point is outside if at least three quarters arrive from at least
  one direction.
- Space that no light reaches counts as inside, even if it is empty. So the surface is closed and has no
  cavities.
- Pictures over white do not distinguish white matter around an object from empty space, and fields do grow
  such matter. It is removed: a cell that many pictures show as white background counts as empty.
- docs/export.md compares this with a threshold on density and with fused depth maps.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras, look_at, spread_directions
from latentscenes.core.errors import UserError
from latentscenes.data.images import white_background
from latentscenes.model.model import Model
from latentscenes.rendering.field import FusedPlanes, sample_planes

DIRECTIONS = 64
"""Number of directions that light comes from, spread over the sphere."""
REACHED = 0.75
"""A point is outside if this share of the light from one of them reaches it."""
GROUND = 0.15
"""A cell is empty if a larger share of the pictures shows it as background. A single picture may mistake a
white part at the object's edge for background; many pictures do not."""
SMALLEST = 0.02
"""Parts with a smaller share of the largest part's volume are left out."""
FEWEST, MOST = 8, 512
"""Allowed numbers of cells along the longest side."""
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
    points, _ = model.box.normalize(points, points)
    downward = points.new_tensor([0.0, 0.0, -1.0])
    found = []
    for some in points.split(CHUNK):
        features = sample_planes(planes.texels, some[None], settings.axes, settings.aggregation)
        found.append(model.field(features, some[None], downward.expand(1, len(some), 3))[0][0])
    return torch.cat(found).reshape(grid.count)


def most_light(
    density: Float[Tensor, "x y z"], step: float, directions: Float[Tensor, "n 3"]
) -> Float[Tensor, "x y z"]:
    """Returns, for each cell of side `step`, the largest share of light in [0, 1] that reaches its middle
    from any of the directions (unit vectors toward the light): max exp(−∫ σ), as in eq. 1 of NeRF (arXiv
    2003.08934)."""
    size = step * torch.tensor(density.shape, dtype=density.dtype, device=density.device)
    found = torch.zeros_like(density)
    for toward in directions:
        right, down, forward = look_at(toward[None])[0, :, :3].unbind(1)
        axes = torch.stack([right, down, -forward]).to(density.device)
        count = ((axes.abs() @ size) / step).ceil().int().add(2).tolist()
        turned_size = step * torch.tensor(count).to(size)
        turned = _resampled(density, axes.T * turned_size / size[:, None], count)
        passed = turned.flip(2).cumsum(2).flip(2) - turned / 2
        light = torch.exp(-step * passed)
        light = _resampled(light, axes * size / turned_size[:, None], list(density.shape))
        found = torch.maximum(found, light)
    return found


def _resampled(
    values: Float[Tensor, "x y z"], matrix: Float[Tensor, "3 3"], count: list[int]
) -> Float[Tensor, "a b c"]:
    """Resamples values on another grid. `matrix` maps its coordinates, in (−1, 1)³, to those of `values`."""
    theta = torch.nn.functional.pad(matrix.flip(0, 1), (0, 1))[None]  # torch orders coordinates z, y, x
    places = torch.nn.functional.affine_grid(theta, [1, 1, *count], align_corners=False)
    return torch.nn.functional.grid_sample(values[None, None], places, align_corners=False)[0, 0]


class Surface(NamedTuple):
    """A closed surface around the solid parts of a scene."""

    vertices: Float[np.ndarray, "p 3"]
    """World units."""
    faces: Int[np.ndarray, "f 3"]
    """Corners counter-clockwise, seen from outside."""
    step: float
    """Side of the cells it was extracted from, world units."""

    def normals(self) -> Float[np.ndarray, "p 3"]:
        """Unit vectors outward at the vertices: means of the adjacent faces' normals, weighted by area."""
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        across, total = np.cross(b - a, c - a), np.zeros_like(self.vertices)
        for corner in range(3):
            np.add.at(total, self.faces[:, corner], across)
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def surface(
    model: Model,
    planes: FusedPlanes,
    pictures: UInt8[np.ndarray, "v H W 3"],
    cameras: Cameras,
    cells: int = 128,
) -> Surface:
    """Extracts the surface of a scene from its fused planes.

    Args:
        pictures: pictures of the scene from all around.
        cells: number of cubic cells along the box's longest side.

    Raises:
        UserError: the export extra is absent, `cells` is out of range, or nothing is solid.
    """
    if not FEWEST <= cells <= MOST:
        raise UserError(
            f"--cells {cells}: choose between {FEWEST} and {MOST}; planes of this model have "
            f"{model.config.planes.resolution} texels a side."
        )
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise UserError(
            "meshes and points need scikit-image. Run: pip install latentscenes[export]"
        ) from None
    grid = Grid.filling(model.box, cells)
    light = most_light(density(model, planes, grid), grid.step, spread_directions(DIRECTIONS)).cpu()
    light[seen_as_ground(grid, pictures, cameras) > GROUND] = 1.0
    light = np.pad(light.numpy(), 1, constant_values=1.0)
    solid = large_parts(light < REACHED)
    if not solid.any():
        raise UserError(
            "nothing in this scene is solid, so it has no surface. Check whether it was learned long enough: "
            "latentscenes render --mode opacity"
        )
    air = large_parts(~solid, 1.0)  # keeps only the outer space: light leaks through thin cracks
    field = np.where(air, np.maximum(light, REACHED + 1e-3), np.minimum(light, REACHED - 1e-3))
    vertices, faces, _, _ = marching_cubes(field, REACHED, gradient_direction="descent")
    return Surface(
        grid.origin + grid.step * (vertices - 1).astype(np.float64), faces.astype(np.int64), grid.step
    )


def seen_as_ground(
    grid: Grid, pictures: UInt8[np.ndarray, "v H W 3"], cameras: Cameras
) -> Float[Tensor, "x y z"]:
    """Returns the share of pictures in which each cell's middle projects onto white that is connected to the
    border."""
    ground = torch.from_numpy(white_background(pictures)).float()
    points, total = grid.points().reshape(-1, 3), torch.zeros(grid.count)
    for view in range(len(cameras)):
        places, depth = cameras[view : view + 1].project(points)
        shown = torch.nn.functional.grid_sample(
            ground[view][None, None], 2 * places[None] - 1, align_corners=False
        )
        total += ((shown[0, 0, 0] > 0.5) & (depth[0] > 0)).reshape(grid.count)
    return total / len(cameras)


def large_parts(cells: Bool[np.ndarray, "x y z"], smallest: float = SMALLEST) -> Bool[np.ndarray, "x y z"]:
    """Removes connected parts smaller than `smallest` times the largest part. Cells that share a face are
    connected."""
    from skimage.measure import label

    parts = label(cells, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return cells & (sizes >= smallest * sizes.max())[parts]
