"""Maps latents to (−1, 1), the range that a field can render, and back.

Every kind is an affine map per channel, y = (z − shift) / span, some with a tanh after it:

    none          y = z
    tanh          y = tanh(scale · z)                   the published choice, scale 0.02
    minmax        min and max of recent latents become −1 and 1
    meanstd       y = (z − mean) / (3 · deviation)      99.7 % of a normal distribution lie inside (−1, 1)
    meanstd_tanh  y = tanh((z − mean) / deviation)

The last three use per-channel statistics of the last `window` batches. These are buffers, so a resumed run
continues exactly.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError

Kind = Literal["none", "tanh", "minmax", "meanstd", "meanstd_tanh"]

REACH = 0.999
"""denormalize clamps to ±REACH before atanh, so its result stays within ±3.8. Rendered features may reach ±1,
where atanh and its gradient are infinite."""
DEVIATIONS = 3.0
"""Standard deviations that `meanstd` maps to 1."""
SMALLEST_SPAN = 1e-5
"""Lower bound of span, for channels that never vary."""


class Normalizer(nn.Module):
    """Invertible map per channel between latents of any range and (−1, 1). Kinds with a window are the
    identity (or plain tanh) until the first `update`."""

    def __init__(self, kind: Kind | str, channels: int, scale: float = 0.02, window: int = 100):
        super().__init__()
        if kind not in get_args(Kind):
            raise UserError(f"normalizer: no kind {kind!r}; choose one of {', '.join(get_args(Kind))}.")
        if scale <= 0 or window < 1:
            raise UserError(
                f"normalizer: scale {scale} must be above 0 and window {window} at least 1 batch."
            )
        self.kind, self.window = kind, window
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("span", torch.full((channels,), 1 / scale if kind == "tanh" else 1.0))
        if self.uses_statistics:
            # per batch and channel: (min, max), or (mean, variance)
            self.register_buffer("recent", torch.zeros(window, 2, channels))
            self.register_buffer("counts", torch.zeros(window))  # values per channel; 0 = slot still empty
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def uses_statistics(self) -> bool:
        """Whether this kind uses statistics of recent latents."""
        return self.kind in ("minmax", "meanstd", "meanstd_tanh")

    @property
    def has_no_statistics(self) -> bool:
        """Whether this kind uses statistics of recent latents and has none yet."""
        return self.uses_statistics and int(self.batches) == 0

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "n c h w"]) -> None:
        """Adds a batch to the window, in place of the oldest once the window is full."""
        if not self.uses_statistics:
            return
        values = latents.detach().float().transpose(0, 1).flatten(1)
        if self.kind == "minmax":
            statistics = torch.stack([values.amin(1), values.amax(1)])
        else:
            variance, mean = torch.var_mean(values, dim=1, correction=0)
            statistics = torch.stack([mean, variance])
        slot = (self.batches % self.window).view(1)
        self.recent.index_copy_(0, slot, statistics[None])
        self.counts.index_fill_(0, slot, values.shape[1])
        self.batches += 1
        self._compute_statistics()

    def _compute_statistics(self) -> None:
        """Computes shift and span from the window."""
        first, second = self.recent.unbind(1)
        if self.kind == "minmax":
            empty = (self.counts == 0)[:, None]
            low = first.masked_fill(empty, torch.inf).amin(0)
            high = second.masked_fill(empty, -torch.inf).amax(0)
            shift, span = (low + high) / 2, (high - low) / 2
        else:
            weight = (self.counts / self.counts.sum())[:, None]
            shift = (weight * first).sum(0)
            variance = (weight * (second + (first - shift).square())).sum(0)  # within batches + between them
            span = variance.sqrt() * (DEVIATIONS if self.kind == "meanstd" else 1.0)
        self.shift.copy_(shift)
        self.span.copy_(span.clamp_min(SMALLEST_SPAN))

    def normalize(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Maps latents to about (−1, 1)."""
        if self.kind == "none":
            return latents
        scaled = (latents - self.shift[:, None, None]) / self.span[:, None, None]
        return scaled.tanh() if self.kind.endswith("tanh") else scaled

    def denormalize(self, normalized: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Inverts `normalize`. Kinds with tanh clamp to ±REACH first."""
        if self.kind == "none":
            return normalized
        scaled = normalized.clamp(-REACH, REACH).atanh() if self.kind.endswith("tanh") else normalized
        return scaled * self.span[:, None, None] + self.shift[:, None, None]
