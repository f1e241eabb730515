"""How an object stands in a world whose origin, orientation and scale mean nothing: up, front, middle and
size.

Notable:
- Up is the direction at right angles to all horizons: photographs are held level far better than at one
  height.
- The object's box is that of its visual hull, carved from the masks. Photographs from above leave the hull
  open below: a point under the object hides behind it in every view. So floor and ceiling of the box are
  moved inward as long as what is left of the hull still fills the masks.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import GRID, carve, carving_views, fit_extent, small_masks
from latentscenes.data.photos.colmap import Photograph

UNEXPLAINED = 0.0005
"""Share of the masks' pixels that the narrowed box may leave empty."""
COARSE = 64
"""Pixels along each side at which masks are compared with the narrowed hull."""


def up_direction(photographs: list[Photograph]) -> Float[np.ndarray, "3"] | None:
    """Up in COLMAP's world, of length 1; None if the photographs do not tell.

    The least eigenvector of Σ x xᵀ over the photographs' horizontal directions x, on the side to which their
    tops point. They do not tell if their horizons agree on no plane, or are all parallel (photographs from
    one side only).
    """
    tops = np.stack([photograph.rotation @ photograph.up for photograph in photographs])
    forward = np.stack([photograph.rotation[:, 2] for photograph in photographs])
    horizons = np.cross(forward, tops)
    spread, directions = np.linalg.eigh(horizons.T @ horizons / len(horizons))
    up = directions[:, 0] * np.sign(tops.mean(0) @ directions[:, 0])
    told = spread[0] < spread[1] / 4 and tops.mean(0) @ up > 0.2
    return up if told else None


def rotation_to(up: Float[np.ndarray, "3"], front: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation that takes `up` to z and the horizontal part of `front` to x; both of any length."""
    z = up / np.linalg.norm(up)
    y = np.cross(z, front)
    y /= np.linalg.norm(y)
    return np.stack([np.cross(y, z), y, z])


def object_bounds(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, name: str
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Lower and upper corner of the object, in a world whose z is up, from its silhouettes."""
    chosen = carving_views(len(masks))
    masks, cameras = small_masks(masks[chosen]), cameras[torch.tensor(chosen)]
    try:
        low, high, _ = fit_extent(masks, cameras, name)
    except UserError:
        raise _no_object(name, len(masks)) from None
    steps = (np.arange(GRID) + 0.5) / GRID
    axes = [low[k] + steps * (high[k] - low[k]) for k in range(3)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    hull = torch.from_numpy(np.ascontiguousarray(carve(masks, cameras, grid)))
    if not len(hull):
        raise _no_object(name, len(masks))
    cells = _cells(hull, cameras)
    voxel = (high[2] - low[2]) / GRID
    floor = _lowest_needed(cells, hull[:, 2])
    above = hull[:, 2] >= floor
    ceiling = -_lowest_needed(cells[:, above], -hull[above, 2])
    return np.array([*low[:2], max(low[2], floor - 1.5 * voxel)]), np.array(
        [*high[:2], min(high[2], ceiling + 1.5 * voxel)]
    )


def _no_object(name: str, count: int) -> UserError:
    return UserError(
        f"{name}: no object stands out of its masks: no place in space lies within nearly all of the "
        f"{count} looked at, or they do not bound it. Check that masks are white on the object and nothing "
        "else, that they belong to these photographs, that the object was not moved, and that photographs "
        "were taken from all around."
    )


def _cells(points: Float[Tensor, "p 3"], cameras: Cameras) -> Tensor:
    """Which cell of all the views' coarse pictures each point appears in (v p)."""
    places, _ = cameras.project(points)
    column, row = (places * COARSE).long().clamp(0, COARSE - 1).unbind(-1)
    return (torch.arange(len(cameras))[:, None] * COARSE + row) * COARSE + column


def _lowest_needed(cells: Tensor, height: Float[Tensor, "p"]) -> float:
    """The height below which points explain no cell alone, but for a share of UNEXPLAINED."""
    highest = torch.full((int(cells.max()) + 1,), -math.inf)
    highest.scatter_reduce_(0, cells.reshape(-1), height.expand(len(cells), -1).reshape(-1), "amax")
    return float(torch.quantile(highest[highest.isfinite()], UNEXPLAINED))
