"""The scene box: fitted to the objects' silhouettes by space carving, laid around what the cameras see, or set by hand.

A tight box is free resolution: every texel of a plane that lies outside the object is wasted.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.checks import converging_point

GRID = 64
"""Voxels along each side of the grid that is carved."""
MASK_SIDE = 128
"""Silhouettes are kept at no more pixels than this along their longer side."""
CARVING_VIEWS = 32
"""At most so many silhouettes per scene, evenly chosen."""
BAD_SILHOUETTES = 0.03
"""Share of silhouettes that may wrongly exclude a point of the object; at least one, if there are a dozen."""
MARGIN = 1.5
"""Free space left around the objects, in voxels of the last grid."""


def parse_box(text: str | int | float | Box) -> Box:
    """A box from its half side (a cube around the origin), from "cx,cy,cz,hx,hy,hz", or as it is."""
    if isinstance(text, Box):
        return text
    try:
        numbers = [float(part) for part in str(text).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers = [0.0, 0.0, 0.0, *numbers * 3]
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)) or min(numbers[3:]) <= 0:
        raise UserError(
            f"box={text!r}: give a half side above 0, or center and half sides as cx,cy,cz,hx,hy,hz."
        )
    return Box(tuple(numbers[:3]), tuple(numbers[3:]))


def small_masks(foreground: Bool[np.ndarray, "v H W"]) -> Bool[np.ndarray, "v h w"]:
    """Silhouettes at no more than MASK_SIDE pixels along the longer side: a pixel is object if any part of it is."""
    height, width = foreground.shape[1:]
    shrink = max(1.0, max(height, width) / MASK_SIDE)
    rows, columns = (
        (np.arange(count) * side) // count
        for side, count in ((height, round(height / shrink)), (width, round(width / shrink)))
    )
    return np.logical_or.reduceat(np.logical_or.reduceat(foreground, rows, axis=1), columns, axis=2)


def carving_views(count: int) -> list[int]:
    """Which of `count` views to carve with."""
    return np.unique(np.linspace(0, count - 1, min(count, CARVING_VIEWS)).round().astype(int)).tolist()


def visible_cube(cameras: Cameras) -> Box:
    """A cube around the point the cameras look at, as large as the widest of them shows at that distance."""
    point, depth, _ = converging_point(cameras)
    reach = np.abs(depth) * 0.5 / cameras.intrinsics[:, :2].amin(1).double().numpy()
    return Box(tuple(point.tolist()), (float(np.median(reach)),) * 3)


def carve(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, grid: Float[np.ndarray, "p 3"]
) -> Float[np.ndarray, "q 3"]:
    """Those points of `grid` that lie within all silhouettes but a few (BAD_SILHOUETTES).

    What a view does not show counts as empty there, unless its silhouette touches the image's edge: then the object
    is cut off and the view tells nothing about what lies outside.
    """
    height, width = masks.shape[1:]
    allowed = math.ceil(BAD_SILHOUETTES * len(masks)) if len(masks) >= 12 else 0
    cut_off = masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2))
    points, misses = np.ascontiguousarray(grid.T), np.zeros(len(grid), dtype=np.int32)
    matrices, intrinsics = (
        cameras.cam2world.numpy().astype(grid.dtype),
        cameras.intrinsics.numpy().astype(grid.dtype),
    )
    stride = next((k for k in (7, 5, 3) if len(masks) % k), 1)  # views far apart first: they carve away most
    for view in (np.arange(len(masks)) * stride) % len(masks):
        rotation, eye, (fx, fy, cx, cy) = matrices[view, :, :3], matrices[view, :, 3:], intrinsics[view]
        x, y, depth = rotation.T @ (points - eye)
        ahead = depth > 1e-6
        depth[~ahead] = 1
        column, row = np.floor((fx * x / depth + cx) * width), np.floor((fy * y / depth + cy) * height)
        shown = ahead & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        cell = np.where(shown, row * width + column, 0).astype(np.int64)
        misses += ~np.where(shown, masks[view].ravel()[cell], cut_off[view])
        keep = misses <= allowed
        if not keep.all():
            points, misses = points[:, keep], misses[keep]
    return points.T


def fit_extent(
    masks: Bool[np.ndarray, "v h w"], cameras: Cameras, name: str
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Lower and upper corner of one object's visual hull, and the voxel size they are known to.

    `masks` are True on the object, pixel grids over the whole image; every view shows the same object. A first grid
    covers all the cameras can see, a second only what the first one left.
    """
    cube = visible_cube(cameras)
    center, half = np.array(cube.center), np.array(cube.half) * 1.25
    widened = _dilate(masks)
    for _ in range(3):
        low, high = _bounds(widened, cameras, center - half, center + half, name)
        if (low > center - half).all() and (high < center + half).all():
            break
        half = 1.6 * half  # the object reaches the grid's edge: look further
    else:
        raise UserError(
            f"scene {name!r}: its {len(masks)} silhouettes do not bound the object (few views, or images that cut it off). "
            "Give the box by hand (box=…)."
        )
    voxel = (high - low).max() / GRID
    low, high = _bounds(masks, cameras, low - voxel, high + voxel, name)
    return low, high, (high - low) / GRID


def union_box(
    extents: list[tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"], Float[np.ndarray, "3"]]],
) -> Box:
    """The box that holds every extent (see `fit_extent`) and a margin."""
    voxel = np.max([size for _, _, size in extents], axis=0)
    low = np.min([low for low, _, _ in extents], axis=0) - MARGIN * voxel
    high = np.max([high for _, high, _ in extents], axis=0) + MARGIN * voxel
    return Box(tuple(((low + high) / 2).tolist()), tuple(((high - low) / 2).tolist()))


def fit_box(scenes: list[tuple[str, Bool[np.ndarray, "_ _ _"], Cameras]]) -> Box:
    """The box of several objects at once, from (name, silhouettes, cameras) of each."""
    return union_box([fit_extent(small_masks(masks), cameras, name) for name, masks, cameras in scenes])


def _bounds(
    masks: Bool[np.ndarray, "v h w"],
    cameras: Cameras,
    low: Float[np.ndarray, "3"],
    high: Float[np.ndarray, "3"],
    name: str,
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """Corners of what carving leaves of the grid between `low` and `high`."""
    voxel = (high - low) / GRID
    steps = (np.arange(GRID) + 0.5) / GRID
    axes = [low[k] + steps * (high[k] - low[k]) for k in range(3)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    left = carve(masks, cameras, grid)
    if not len(left):
        raise UserError(
            f"scene {name!r}: no place in space lies within the object's silhouette in all of its {len(masks)} views. Either "
            "cameras and images do not belong together (order? axes? world-to-camera matrices?), or the background is not "
            "what it was taken for: pass background='unknown' and box=…, or leave the scene out (by a split file)."
        )
    return left.min(0) - voxel / 2, left.max(0) + voxel / 2


def _dilate(masks: Bool[np.ndarray, "v h w"]) -> Bool[np.ndarray, "v h w"]:
    """Silhouettes one pixel wider on every side, so that a coarse grid does not miss thin parts."""
    wide = masks.copy()
    wide[:, 1:] |= masks[:, :-1]
    wide[:, :-1] |= masks[:, 1:]
    tall = wide.copy()
    wide[:, :, 1:] |= tall[:, :, :-1]
    wide[:, :, :-1] |= tall[:, :, 1:]
    return wide
