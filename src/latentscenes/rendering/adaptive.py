"""Whole pictures from few rays: a coarse grid of pixels first, then more rays where neighbors differ.

This is adaptive sampling of the image plane (Whitted, "An improved illumination model for shaded display",
1980), here below one ray a pixel. Notable:
- The first rays go through the corners of square cells. Cells whose corners differ and the cells around them
  get rays at half the distance, and so on down to single pixels. All other pixels are interpolated.
- Thin parts may lie between the corners of cells, and a pattern may be alike at all of them. So each first
  cell has a ray through its middle, and where a ray differs from the value interpolated there, the cells
  around it get more rays, too. A chair's leg is followed from the seat down.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CELL = 8
"""Pixels between the first rays. A power of 2."""


def render_adaptively(
    cast: Callable[[Int[Tensor, "k"]], Float[Tensor, "k c"]],
    height: int,
    width: int,
    tolerance: Float[Tensor, "c"],
    cell: int = CELL,
) -> Float[Tensor, "h w c"]:
    """Renders one view.

    Args:
        cast: renders the pixels row · w + column, c values each.
        tolerance: the largest difference of each value in a cell that is interpolated; infinite for values
            that place no rays.
        cell: pixels between the first rays, a power of 2.
    """
    rows, columns = (_places(side, cell, device=tolerance.device) for side in (height, width))
    values = cast((rows[:, None] * width + columns).flatten()).unflatten(0, (len(rows), len(columns)))
    known = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    probes = True
    while cell > 1:
        # Values at half the distance, interpolated
        cells = _around(_differences(values, tolerance))
        cell //= 2
        coarse, rows = rows, _places(height, cell, 2 * len(rows) - 1, rows.device)
        values = _interpolated(values, coarse, rows)
        coarse, columns = columns, _places(width, cell, 2 * len(columns) - 1, rows.device)
        values = _interpolated(values.transpose(0, 1), coarse, columns).transpose(0, 1).contiguous()
        known = _spread(known)

        # Rays in cells that differ, at first also through the middle of all others; then wherever these show
        # more than was expected
        wanted = _corners(cells)
        wanted[1::2, 1::2] |= probes
        probes = False
        while (missing := wanted & ~known).any():
            where = missing.nonzero(as_tuple=True)
            found = cast(rows[where[0]] * width + columns[where[1]])
            surprising = torch.zeros_like(known)
            surprising[where] = ((found - values[where]).abs() > tolerance).any(-1)
            values[where], known[where] = found, True
            cells |= _around(_cells_at(surprising))
            wanted = _corners(cells)
    return values[:height, :width]


def _places(
    length: int, cell: int, count: int | None = None, device: torch.device | None = None
) -> Int[Tensor, "n"]:
    """Returns every `cell`-th pixel of a side. The last one comes last, several times if `count` says so."""
    count = count or max(2, -(-(length - 1) // cell) + 1)
    return (cell * torch.arange(count, device=device)).clamp(max=length - 1)


def _differences(values: Float[Tensor, "n m c"], tolerance: Float[Tensor, "c"]) -> Bool[Tensor, "n-1 m-1"]:
    """Returns whether the corners of each cell differ by more than `tolerance`."""
    some = tolerance.isfinite()
    values = values[..., some]
    rows = torch.minimum(values[:-1], values[1:]), torch.maximum(values[:-1], values[1:])
    least = torch.minimum(rows[0][:, :-1], rows[0][:, 1:])
    most = torch.maximum(rows[1][:, :-1], rows[1][:, 1:])
    return (most - least > tolerance[some]).any(-1)


def _interpolated(
    values: Float[Tensor, "n m c"], places: Int[Tensor, "n"], finer: Int[Tensor, "k"]
) -> Float[Tensor, "2*n-1 m c"]:
    """Interpolates rows at `places` linearly, to those at `finer`, which are the places and one between each
    two of them."""
    share = (finer[1::2] - places[:-1]) / (places[1:] - places[:-1]).clamp(min=1)
    result = values.new_empty(len(finer), *values.shape[1:])
    result[::2] = values
    torch.lerp(values[:-1], values[1:], share.to(values)[:, None, None], out=result[1::2])
    return result


def _spread(known: Bool[Tensor, "n m"]) -> Bool[Tensor, "2*n-1 2*m-1"]:
    """Returns which pixels of the finer grid are known: those of the coarser grid that were."""
    finer = known.new_zeros(2 * known.shape[0] - 1, 2 * known.shape[1] - 1)
    finer[::2, ::2] = known
    return finer


def _corners(cells: Bool[Tensor, "n m"]) -> Bool[Tensor, "2*n+1 2*m+1"]:
    """Returns the pixels of the finer grid that lie in or around cells."""
    return _any_of_two(_any_of_two(cells).t()).t()


def _any_of_two(cells: Bool[Tensor, "n m"]) -> Bool[Tensor, "2*n+1 m"]:
    """Returns rows of the finer grid: those between cells belong to both, those within to one."""
    finer = cells.new_zeros(2 * len(cells) + 1, cells.shape[1])
    finer[1::2] = cells
    finer[:-1:2] = cells
    finer[2::2] |= cells
    return finer


def _cells_at(pixels: Bool[Tensor, "p q"]) -> Bool[Tensor, "(p-1)//2 (q-1)//2"]:
    """Returns the cells in or around which pixels of the finer grid lie."""
    rows = pixels[:-1:2] | pixels[1::2] | pixels[2::2]
    return rows[:, :-1:2] | rows[:, 1::2] | rows[:, 2::2]


def _around(cells: Bool[Tensor, "n m"]) -> Bool[Tensor, "n m"]:
    """Returns cells and their neighbors."""
    rows = cells.clone()
    rows[1:] |= cells[:-1]
    rows[:-1] |= cells[1:]
    both = rows.clone()
    both[:, 1:] |= rows[:, :-1]
    both[:, :-1] |= rows[:, 1:]
    return both
