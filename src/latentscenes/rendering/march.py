"""Ray marching as pure functions, for features of any width: place samples, weigh them, composite.

This is the readable truth that every fast path in `kernels/` is tested against. Randomness comes in as
numbers u in [0, 1), so a caller decides between jitter (u random) and determinism (u = 1/2).

Quadrature: densities and features are averaged over the two ends of each interval between neighboring
samples; α = 1 − exp(−σδ), weights = α · transmittance (Max 1995, as used by NeRF, arXiv 2003.08934, eq. 3,
with midpoints as in Mip-NeRF, arXiv 2103.13415).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLUR_PADDING = 0.01
"""Added to blurred weights before importance sampling, so that no interval is ever left out."""


def intersect_cube(
    origins: Float[Tensor, "*b 3"], directions: Float[Tensor, "*b 3"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Entry and exit (near, far) of rays through [-1, 1]³, never behind the origin; near = far on a miss."""
    tiny = torch.finfo(directions.dtype).tiny
    inverse = 1 / torch.where(directions.abs() < tiny, torch.full_like(directions, 1e-12), directions)
    first, second = (-1 - origins) * inverse, (1 - origins) * inverse
    near = torch.minimum(first, second).amax(-1).clamp(min=0)
    far = torch.maximum(first, second).amin(-1)
    return near, torch.maximum(near, far)


def stratified(
    near: Float[Tensor, "*b"], far: Float[Tensor, "*b"], u: Float[Tensor, "*b n"]
) -> Float[Tensor, "*b n"]:
    """One sample in each of n equal slices of [near, far], at the fraction u of its slice."""
    n = u.shape[-1]
    slice_index = torch.arange(n, dtype=u.dtype, device=u.device)
    return near[..., None] + (far - near)[..., None] * ((slice_index + u) / n)


def importance(
    t: Float[Tensor, "*b n"], weights: Float[Tensor, "*b n-1"], u: Float[Tensor, "*b m"]
) -> Float[Tensor, "*b m"]:
    """m samples distributed like `weights` over the intervals between the sorted `t`.

    Weights are first widened to the larger of their neighbors, averaged, and padded (Mip-NeRF, eq. 18), so that
    a surface between two coarse samples is not missed. Stratified: slice k of m of the cumulative distribution is
    read at the fraction u[k], hence the result is sorted.
    """
    padded = torch.cat([weights[..., :1], weights, weights[..., -1:]], -1)
    larger = torch.maximum(padded[..., :-1], padded[..., 1:])
    blurred = 0.5 * (larger[..., :-1] + larger[..., 1:]) + BLUR_PADDING
    cumulative = blurred.cumsum(-1)
    cumulative = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], -1)
    total = cumulative[..., -1:]

    m = u.shape[-1]
    wanted = (torch.arange(m, dtype=u.dtype, device=u.device) + u) / m * total
    above = torch.searchsorted(cumulative, wanted, right=True).clamp(1, cumulative.shape[-1] - 1)
    low, high = cumulative.gather(-1, above - 1), cumulative.gather(-1, above)
    fraction = ((wanted - low) / (high - low)).clamp(0, 1)
    start, end = t.gather(-1, above - 1), t.gather(-1, above)
    return start + fraction * (end - start)


class Composite(NamedTuple):
    """What rays gather on their way; a background comes in afterwards, weighted by 1 − opacity."""

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
    """Composite samples at sorted `t` front to back."""
    middle_density = 0.5 * (density[..., 1:] + density[..., :-1])
    middle_features = 0.5 * (features[..., 1:, :] + features[..., :-1, :])
    middle_t = 0.5 * (t[..., 1:] + t[..., :-1])
    optical = middle_density * (t[..., 1:] - t[..., :-1])
    before = torch.cumsum(torch.cat([torch.zeros_like(optical[..., :1]), optical[..., :-1]], -1), -1)
    weights = torch.exp(-before) * -torch.expm1(-optical)
    return Composite(
        features=(weights[..., None] * middle_features).sum(-2),
        depth=(weights * middle_t).sum(-1),
        opacity=weights.sum(-1),
        weights=weights,
    )
