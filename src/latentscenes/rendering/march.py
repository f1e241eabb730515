"""Ray marching as pure functions: places samples on rays, weights and composites them. The reference for
`kernels/`.

Callers pass numbers u in [0, 1): random ones for jittered samples, 1/2 for deterministic ones.

Quadrature: an interval between neighboring samples has the mean density and features of its two ends; α = 1 −
exp(−σδ), weight = α · transmittance (Max 1995, as used by NeRF, arXiv 2003.08934, eq. 3, with midpoints as in
Mip-NeRF, arXiv 2103.13415).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLUR_PADDING = 0.01
"""Added to blurred weights before importance sampling, so that every interval can get samples."""


def intersect_cube(
    origins: Float[Tensor, "*b 3"], directions: Float[Tensor, "*b 3"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Returns entry and exit (near, far ≥ 0) of rays through [-1, 1]³. A ray that misses has near = far."""
    tiny = torch.finfo(directions.dtype).tiny
    inverse = 1 / torch.where(directions.abs() < tiny, torch.full_like(directions, 1e-12), directions)
    first, second = (-1 - origins) * inverse, (1 - origins) * inverse
    near = torch.minimum(first, second).amax(-1).clamp(min=0)
    far = torch.maximum(first, second).amin(-1)
    return near, torch.maximum(near, far)


def stratified(
    near: Float[Tensor, "*b"], far: Float[Tensor, "*b"], u: Float[Tensor, "*b n"]
) -> Float[Tensor, "*b n"]:
    """Places one sample in each of n equal slices of [near, far], at the fraction u of the slice."""
    n = u.shape[-1]
    slice_index = torch.arange(n, dtype=u.dtype, device=u.device)
    return near[..., None] + (far - near)[..., None] * ((slice_index + u) / n)


def importance(
    t: Float[Tensor, "*b n"], weights: Float[Tensor, "*b n-1"], u: Float[Tensor, "*b m"]
) -> Float[Tensor, "*b m"]:
    """Places m sorted samples, distributed like `weights` over the intervals between the sorted `t`.

    Weights are first blurred and padded (Mip-NeRF, eq. 18), so that a surface between two coarse samples is
    not missed. Sampling is stratified: sample k lies at (k + u[k]) / m of the cumulative distribution.
    """
    # Blur: the larger of two neighbors, then the mean of two
    padded = torch.cat([weights[..., :1], weights, weights[..., -1:]], -1)
    larger = torch.maximum(padded[..., :-1], padded[..., 1:])
    blurred = 0.5 * (larger[..., :-1] + larger[..., 1:]) + BLUR_PADDING

    # Cumulative distribution, not normalized
    cumulative = blurred.cumsum(-1)
    cumulative = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], -1)
    total = cumulative[..., -1:]

    # Invert it
    m = u.shape[-1]
    wanted = (torch.arange(m, dtype=u.dtype, device=u.device) + u) / m * total
    above = torch.searchsorted(cumulative, wanted, right=True).clamp(1, cumulative.shape[-1] - 1)
    low, high = cumulative.gather(-1, above - 1), cumulative.gather(-1, above)
    fraction = ((wanted - low) / (high - low)).clamp(0, 1)
    start, end = t.gather(-1, above - 1), t.gather(-1, above)
    return start + fraction * (end - start)


class Composite(NamedTuple):
    """Composited rays, before a background is added with weight 1 − opacity."""

    features: Float[Tensor, "*b c"]
    """Σ w f"""
    depth: Float[Tensor, "*b"]
    """Σ w t over interval midpoints, in units of t"""
    opacity: Float[Tensor, "*b"]
    """Σ w in [0, 1]"""
    weights: Float[Tensor, "*b n-1"]


def composite(
    t: Float[Tensor, "*b n"], density: Float[Tensor, "*b n"], features: Float[Tensor, "*b n c"]
) -> Composite:
    """Composites samples at sorted `t` front to back."""
    # Means over intervals
    middle_density = 0.5 * (density[..., 1:] + density[..., :-1])
    middle_features = 0.5 * (features[..., 1:, :] + features[..., :-1, :])
    middle_t = 0.5 * (t[..., 1:] + t[..., :-1])

    # Weight = transmittance · α
    optical = middle_density * (t[..., 1:] - t[..., :-1])
    before = torch.cumsum(torch.cat([torch.zeros_like(optical[..., :1]), optical[..., :-1]], -1), -1)
    weights = torch.exp(-before) * -torch.expm1(-optical)
    return Composite(
        features=(weights[..., None] * middle_features).sum(-2),
        depth=(weights * middle_t).sum(-1),
        opacity=weights.sum(-1),
        weights=weights,
    )
