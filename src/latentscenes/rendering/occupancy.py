"""Occupied cells of scene boxes, which bound the samples of rays: no ray samples before its first occupied
cell, nor after its last.

Cells come from silhouettes while a scene is learned (its visual hull), and from its own densities where it is
shown.
"""

import ctypes

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from latentscenes.rendering.field import Field, FusedPlanes, mix, sample_planes
from latentscenes.rendering.kernels import native
from latentscenes.rendering.render import Rays

SIDE = 48
"""Cells along each side of a box."""
STEPS_PER_CELL = 1.5
"""Places along a ray that are looked up, for each cell along a side."""
TOGETHER = 16
"""Places along rays that torch looks up together."""
LOOKUPS = 4
"""Most places along each side of a cell at which densities are looked up."""
CLEAR = 1e-3
"""Largest opacity, by its mean density, of a cell that counts as empty. Behind SIDE such cells, 95 % of the
light is left."""


def bound_rays(rays: Rays, cells: UInt8[Tensor, "s n n n"]) -> Rays:
    """Returns rays that begin where they enter their first occupied cell (indexed x, y, z) and end where they
    leave their last. A ray that meets none ends where it begins. Near and far are without gradients.

    Each ray is looked up at STEPS_PER_CELL · n places. So it can miss a cell that it cuts at a corner: cells
    next to occupied ones should be occupied, too.
    """
    given = [part.detach().contiguous() for part in rays]
    if not native.serves(*given):
        return bound_rays_in_torch(rays, cells)
    near, far = torch.empty_like(rays.near), torch.empty_like(rays.far)
    sizes = (*near.shape, cells.shape[1], int(STEPS_PER_CELL * cells.shape[1]), torch.get_num_threads())
    arrays = map(native.pointer, (cells.contiguous(), *given, near, far))
    native.library().latentscenes_bound_rays(*map(ctypes.c_int64, sizes), *arrays)
    return rays._replace(near=near, far=far)


@torch.no_grad()
def bound_rays_in_torch(rays: Rays, cells: UInt8[Tensor, "s n n n"]) -> Rays:
    """Computes `bound_rays` in plain torch."""
    side = cells.shape[1]
    steps = int(STEPS_PER_CELL * side)
    width = (rays.far - rays.near) / steps
    scene = torch.arange(len(cells), device=cells.device)[:, None, None]
    first, last = torch.full_like(rays.near, steps), torch.full_like(rays.near, -1)
    for part in torch.arange(steps, device=width.device).split(TOGETHER):
        t = rays.near[..., None] + (part + 0.5) * width[..., None]
        points = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
        x, y, z = ((points + 1) * (0.5 * side)).nan_to_num().clamp(0, side - 1).long().unbind(-1)
        hit = cells[scene, x, y, z] > 0
        first = torch.minimum(first, torch.where(hit, part, steps).amin(-1))
        last = torch.maximum(last, torch.where(hit, part, -1).amax(-1))
    met = last >= 0
    near, far = rays.near + first * width, rays.near + (last + 1) * width
    return rays._replace(near=torch.where(met, near, rays.near), far=torch.where(met, far, rays.near))


@torch.no_grad()
def occupied_cells(
    planes: FusedPlanes, field: Field, length: Float[Tensor, "s"], side: int = SIDE
) -> UInt8[Tensor, "s n n n"] | None:
    """Returns the cells in which a scene has matter, and the cells next to them; None if its density depends
    on the direction or on more than the planes.

    Args:
        planes: mixed.
        length: the longest side of a cell of each scene, in the unit of its densities.
        side: n, cells along each side of the box.
    """
    if field.view_direction or field.frequencies:
        return None
    texels = planes.texels if planes.mixing is None else mix(planes.texels, planes.mixing)
    planes = planes._replace(texels=texels, mixing=None)
    places = _lookup_points(-(-texels.shape[2] // side))
    density = sum(_densities(planes, field, side, place) for place in places) / len(places)
    solid = (1 - torch.exp(-density * length[:, None, None, None]) > CLEAR).float()
    return dilated(solid)


def _lookup_points(count: int) -> list[tuple[float, float, float]]:
    """Returns the places in a cell, as fractions of its sides, at which densities are looked up: c² of the
    c³ places of a grid, so that a plate or a rod along an axis, wider than 1 / c of the cell, meets some."""
    count = min(count, LOOKUPS)
    places = [(x, y, -(x + y) % count) for x in range(count) for y in range(count)]
    return [tuple((k + 0.5) / count for k in place) for place in places]


def dilated(solid: Float[Tensor, "s n n n"]) -> UInt8[Tensor, "s n n n"]:
    """Returns cells that are 1 where they or one of their 26 neighbors are above 0."""
    return nn.functional.max_pool3d(solid[:, None], 3, stride=1, padding=1)[:, 0].byte()


def _densities(
    planes: FusedPlanes, field: Field, side: int, place: tuple[float, float, float] = (0.5, 0.5, 0.5)
) -> Float[Tensor, "s n n n"]:
    """Returns densities of mixed planes at one place in each cell, given as fractions of its sides."""
    texels = planes.texels
    across, down, along = ((torch.arange(side, device=texels.device) + k) * (2 / side) - 1 for k in place)
    if native.serves(texels, field.hidden.weight):  # along columns of cells
        x, y = torch.meshgrid(across, down, indexing="ij")
        network = (field.hidden.weight, field.hidden.bias, field.out.weight, field.out.bias)
        origins = torch.stack([x, y, torch.full_like(x, -1)], -1).view(1, -1, 3).expand(len(texels), -1, 3)
        near = origins.new_zeros(origins.shape[:2])
        rays = (origins, origins.new_tensor([0.0, 0, 1]).expand_as(origins), near, near + 2)
        u = near.new_full((*near.shape, side), place[2])
        style = {"axes": planes.axes, "aggregation": planes.aggregation}
        found = native.samples(texels, *network, *rays, u, **style)
        return found.view(-1, side, side, side)
    points = torch.stack(torch.meshgrid(across, down, along, indexing="ij"), -1).reshape(1, -1, 3)
    found = []
    for part in points.expand(len(texels), -1, 3).split(side * side, 1):
        features = sample_planes(texels, part, planes.axes, planes.aggregation)
        found.append(field(features, part, torch.zeros_like(part))[0])
    return torch.cat(found, 1).unflatten(1, (side, side, side))
