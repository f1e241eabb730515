"""Where rays are drawn: more of them where a scene still looks wrong.

Most of a view is learned after a few epochs: background, flat sides. So of each view a grid of cells remembers the mean
squared error of the last rays through it, and a share of the next rays is drawn in proportion to a power of that. The rest
stays uniform, so that every cell is seen again. Errors are not weighed back: pixels that are hard count more, which is meant.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIDE = 8
"""Cells along each side of the rectangle in which rays are drawn."""
EXPONENT = 0.7
"""What errors are raised to. In proportion to errors themselves, too few rays are left for what is nearly right."""
MEMORY = 0.5
"""How much of a cell's old error stays when new rays went through it."""

LEAST = 1e-12
"""Errors below this count as this: where all of a view is right, its cells are alike."""


class Focus:
    """The cells of n views. `errors` is its state."""

    def __init__(self, views: int, share: float, device: torch.device):
        """`share` in [0, 1] of the rays goes by errors."""
        self.share = share
        self.errors: Float[Tensor, "n c"] = torch.ones(views, SIDE * SIDE, device=device)

    def draw(
        self, views: Int[Tensor, "v"], x: Float[Tensor, "v p"], y: Float[Tensor, "v p"], u: Float[Tensor, "v p"]
    ) -> tuple[Float[Tensor, "v p"], Float[Tensor, "v p"], Int[Tensor, "v p"]]:
        """From uniform numbers in [0, 1): places in the rectangle, as fractions of its sides, and their cells. Each view's
        cells come in order, one from each p-th of their chances, so that chance leaves none of them out."""
        wrong = self.errors[views].clamp(min=LEAST) ** EXPONENT
        chances = (1 - self.share) / wrong.shape[1] + self.share * wrong / wrong.sum(1, keepdim=True)
        upper = chances.cumsum(1)
        strata = (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1]
        cells = torch.searchsorted(upper, strata * upper[:, -1:], right=True).clamp_(max=wrong.shape[1] - 1)
        return (cells % SIDE + x) / SIDE, (cells // SIDE + y) / SIDE, cells

    def learn(self, views: Int[Tensor, "v"], cells: Int[Tensor, "v p"], errors: Float[Tensor, "v p"]) -> None:
        """What rays through some cells of (different) views were wrong by."""
        count = self.errors.shape[1]
        at = (torch.arange(len(views), device=cells.device)[:, None] * count + cells).flatten()
        rays = torch.bincount(at, minlength=len(views) * count).view(len(views), count)
        sums = torch.bincount(at, errors.flatten(), len(views) * count).view(len(views), count)
        old = self.errors[views]
        self.errors[views] = torch.where(rays > 0, MEMORY * old + (1 - MEMORY) * sums / rays.clamp(min=1), old)
