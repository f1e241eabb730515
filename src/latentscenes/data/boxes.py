"""The scene box: fitted to silhouettes by space carving, from what cameras see, or given by hand.

A tight box gives finer planes, since texels outside the object are wasted.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.checks import converging_point
from latentscenes.data.options import box_numbers

Extent = tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"], Float[np.ndarray, "3"]]
"""Lower and upper corner of an object, and the voxel size they are known to."""

GRID = 64
"""Voxels along each side of the carved grid."""
MASK_SIDE = 128
"""Most pixels along the longer side of a silhouette."""
CARVING_VIEWS = 32
"""Most silhouettes per scene, evenly chosen."""
BAD_SILHOUETTES = 0.03
"""Share of silhouettes that may wrongly exclude a point of the object; none for fewer than 12 silhouettes."""
MARGIN = 1.5
"""Free space around the objects, in voxels of the last grid."""
UNEXPLAINED = 0.0005
"""Share of the masks' pixels that `standing_bounds` may leave empty."""
COARSE = 64
"""Pixels along each side at which `standing_bounds` compares masks with the hull."""


def parse_box(box: str | float | Box) -> Box:
    """Returns a box given as a half side (a cube around the origin), as "cx,cy,cz,hx,hy,hz", or as a Box."""
    if isinstance(box, Box):
        return box
    numbers = box_numbers(box)
    return Box(tuple(numbers[:3]), tuple(numbers[3:]))


def small_masks(foreground: Bool[np.ndarray, "v H W"]) -> Bool[np.ndarray, "v h w"]:
    """Reduces silhouettes to MASK_SIDE pixels on the longer side. A pixel is object if part of it is."""
    shrink = max(1.0, max(foreground.shape[1:]) / MASK_SIDE)
    counts = [(side, round(side / shrink)) for side in foreground.shape[1:]]
    rows, columns = (np.arange(count) * side // count for side, count in counts)
    return np.logical_or.reduceat(np.logical_or.reduceat(foreground, rows, axis=1), columns, axis=2)


def carving_views(count: int) -> list[int]:
    """Returns which of `count` views to carve with."""
    return np.unique(np.linspace(0, count - 1, min(count, CARVING_VIEWS)).round().astype(int)).tolist()


def allowed_wrong(count: int) -> int:
    """Returns how many of `count` silhouettes may be wrong."""
    return math.ceil(BAD_SILHOUETTES * count) if count >= 12 else 0


def visible_cube(cameras: Cameras) -> Box:
    """Returns a cube around the point the cameras look at. Its half side is the median over cameras of the
    reach of the image at that distance."""
    point, depth, _ = converging_point(cameras)
    reach = np.abs(depth) * 0.5 / cameras.intrinsics[:, :2].amin(1).double().numpy()
    return Box(tuple(point.tolist()), (float(np.median(reach)),) * 3)


def carve(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, grid: Float[np.ndarray, "p 3"]
) -> Float[np.ndarray, "q 3"]:
    """Returns the points of `grid` that lie within all silhouettes except a few (BAD_SILHOUETTES).

    Points outside of a view's image count as empty in it, unless its silhouette touches the image's edge:
    then the object is cut off, and the view says nothing about points outside.
    """
    height, width = masks.shape[1:]
    allowed = allowed_wrong(len(masks))
    cut_off = masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2))
    points, misses = np.ascontiguousarray(grid.T), np.zeros(len(grid), dtype=np.int32)
    matrices = cameras.cam2world.numpy().astype(grid.dtype)
    intrinsics = cameras.intrinsics.numpy().astype(grid.dtype)
    stride = next((k for k in (7, 5, 3) if len(masks) % k), 1)  # views far apart first: they carve most
    for view in (np.arange(len(masks)) * stride) % len(masks):
        # Project the remaining points
        rotation, eye, (fx, fy, cx, cy) = matrices[view, :, :3], matrices[view, :, 3:], intrinsics[view]
        x, y, depth = rotation.T @ (points - eye)
        ahead = depth > 1e-6
        depth[~ahead] = 1
        column, row = np.floor((fx * x / depth + cx) * width), np.floor((fy * y / depth + cy) * height)
        # Look them up in the silhouette
        shown = ahead & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        cell = np.where(shown, row * width + column, 0).astype(np.int64)
        misses += ~np.where(shown, masks[view].ravel()[cell], cut_off[view])
        # Carve
        keep = misses <= allowed
        if not keep.all():
            points, misses = points[:, keep], misses[keep]
    return points.T


def fit_extent(masks: Bool[np.ndarray, "v h w"], cameras: Cameras, name: str) -> Extent:
    """Returns the extent of one object's visual hull.

    `masks` are True on the object and cover whole images. A first grid covers all that the cameras see, a
    second one only the part that the first left. `name` names the scene in errors.
    """
    cube = visible_cube(cameras)
    center, half = np.array(cube.center), np.array(cube.half) * 1.25
    widened = _dilate(masks)
    for _ in range(3):
        low, high = _bounds(widened, cameras, center - half, center + half, name)
        if (low > center - half).all() and (high < center + half).all():
            break
        half = 1.6 * half  # the object reaches the grid's edge
    else:
        raise UserError(
            f"scene {name!r}: its {len(masks)} silhouettes do not bound the object (few views, or images "
            "that cut it off). Give the box by hand (--box)."
        )
    voxel = (high - low).max() / GRID
    low, high = _bounds(masks, cameras, low - voxel, high + voxel, name)
    return low, high, (high - low) / GRID


def union_box(extents: list[Extent]) -> Box:
    """Returns the box around all extents, with a margin."""
    voxel = np.max([size for _, _, size in extents], axis=0)
    low = np.min([low for low, _, _ in extents], axis=0) - MARGIN * voxel
    high = np.max([high for _, high, _ in extents], axis=0) + MARGIN * voxel
    return Box(tuple(((low + high) / 2).tolist()), tuple(((high - low) / 2).tolist()))


def fit_box(scenes: list[tuple[str, Bool[np.ndarray, "_ _ _"], Cameras]]) -> Box:
    """Returns the box of several objects, from (name, silhouettes, cameras) of each."""
    return union_box([fit_extent(small_masks(masks), cameras, name) for name, masks, cameras in scenes])


def _bounds(
    masks: Bool[np.ndarray, "v h w"],
    cameras: Cameras,
    low: Float[np.ndarray, "3"],
    high: Float[np.ndarray, "3"],
    name: str,
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Returns the corners of the part that carving leaves of the grid between `low` and `high`."""
    voxel = (high - low) / GRID
    left = carve(masks, cameras, _grid(low, high))
    if not len(left):
        raise UserError(
            f"scene {name!r}: no place in space lies within the object's silhouette in all of its "
            f"{len(masks)} views. Either cameras and images do not belong together (order? axes? "
            "world-to-camera matrices?), or the background was guessed wrongly: pass --background unknown "
            "and --box, or leave the scene out (with a split file)."
        )
    return left.min(0) - voxel / 2, left.max(0) + voxel / 2


def _grid(
    low: Float[np.ndarray, "3"], high: Float[np.ndarray, "3"], side: int = GRID
) -> Float[np.ndarray, "p 3"]:
    """Returns the centers of side³ voxels between two corners."""
    steps = (np.arange(side) + 0.5) / side
    axes = [low[k] + steps * (high[k] - low[k]) for k in range(3)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)


def visual_hull(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, box: Box, side: int
) -> Bool[np.ndarray, "n n n"]:
    """Returns which of side³ cells of a box, indexed x, y, z, lie within nearly all silhouettes (see
    `carve`), after these are widened: by a pixel, or by more where cameras are so close that the middles of
    cells could otherwise lie on both sides of a thin part."""
    center, half = np.array(box.center), np.array(box.half)
    distance = np.linalg.norm(cameras.cam2world[:, :, 3].numpy() - center, axis=1).clip(min=half.max())
    focal = (cameras.intrinsics[:, :2].numpy() * masks.shape[:0:-1]).max(1)
    cell = 2 * half.max() / side * (focal / distance).max()  # pixels
    for _ in range(max(1, math.ceil((cell - 1) / 2))):
        masks = _dilate(masks)
    left = carve(masks, cameras, _grid(center - half, center + half, side))
    index = np.round(((left - center) / half + 1) * (side / 2) - 0.5).astype(np.int64)
    found = np.zeros((side, side, side), dtype=bool)
    found[tuple(index.T)] = True
    return found


def _dilate(masks: Bool[np.ndarray, "v h w"]) -> Bool[np.ndarray, "v h w"]:
    """Widens silhouettes by one pixel on every side, so that a coarse grid does not miss thin parts."""
    wide = masks.copy()
    wide[:, 1:] |= masks[:, :-1]
    wide[:, :-1] |= masks[:, 1:]
    tall = wide.copy()
    wide[:, :, 1:] |= tall[:, :, :-1]
    wide[:, :, :-1] |= tall[:, :, 1:]
    return wide


# Objects that stand on the ground


def standing_bounds(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, name: str
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Returns lower and upper corner of an object from its silhouettes, in a world whose z is up.

    Views from above leave the visual hull open below: points under the object hide behind it in every view.
    So floor and ceiling are moved inward as long as the rest of the hull still fills the masks.
    """
    chosen = carving_views(len(masks))
    masks, cameras = small_masks(masks[chosen]), cameras[torch.tensor(chosen)]
    try:
        low, high, voxel = fit_extent(masks, cameras, name)
        hull = torch.from_numpy(np.ascontiguousarray(carve(masks, cameras, _grid(low, high))))
    except UserError:
        hull = torch.empty(0, 3)
    if not len(hull):
        raise UserError(
            f"{name}: no object stands out of its masks: no place in space lies within nearly all of the "
            f"{len(masks)} examined masks, or they do not bound it. Check that masks are white only on the "
            "object, that they belong to these photographs, that the object was not moved, and that "
            "photographs were taken from all around."
        )
    # Pixel of each hull point in each view
    places, _ = cameras.project(hull)
    column, row = (places * COARSE).long().clamp(0, COARSE - 1).unbind(-1)
    cells = (torch.arange(len(cameras))[:, None] * COARSE + row) * COARSE + column
    # Narrow from below, then from above
    floor = _lowest_needed(cells, hull[:, 2])
    above = hull[:, 2] >= floor
    ceiling = -_lowest_needed(cells[:, above], -hull[above, 2])
    slack = 1.5 * voxel[2]
    return (
        np.array([*low[:2], max(low[2], floor - slack)]),
        np.array([*high[:2], min(high[2], ceiling + slack)]),
    )


def _lowest_needed(cells: Int[Tensor, "v p"], height: Float[Tensor, "p"]) -> float:
    """Returns the height below which no hull point is needed: only UNEXPLAINED pixels then stay empty."""
    highest = torch.full((int(cells.max()) + 1,), -math.inf)
    highest.scatter_reduce_(0, cells.reshape(-1), height.expand(len(cells), -1).reshape(-1), "amax")
    return float(torch.quantile(highest[highest.isfinite()], UNEXPLAINED))
