"""Ray marching (march.py) on a GPU in Triton: places fine samples, sorts and composites all; and the gradient
of this.

A program takes a few rays, one row of its blocks each. Samples stay in the slots where they were drawn,
coarse before fine; `order` holds the slot of the k-th sample along each ray.
"""

import triton.language as tl

from latentscenes.rendering.field import FEATURE_MARGIN
from latentscenes.rendering.kernels.triton_field import jit
from latentscenes.rendering.march import BLUR_PADDING

MARGIN = tl.constexpr(FEATURE_MARGIN)
PADDING = tl.constexpr(BLUR_PADDING)


@jit
def one_minus_exp_minus(x):
    """Computes 1 − e^-x for x ≥ 0, by a series where the difference would lose digits."""
    series = x * (1 - x * (1 / 2) * (1 - x * (1 / 3) * (1 - x * (1 / 4) * (1 - x * (1 / 5)))))
    return tl.where(x < 0.1, series, 1 - tl.exp(-x))


@jit
def coarse_interval(t, density, slot, valid, before):
    """Returns weight and optical thickness of the interval after `slot`; `before` is that before it."""
    length = tl.load(t + slot + 1, mask=valid, other=0.0) - tl.load(t + slot, mask=valid, other=0.0)
    ends = tl.load(density + slot, mask=valid, other=0.0) + tl.load(density + slot + 1, mask=valid, other=0.0)
    optical = 0.5 * ends * length
    return tl.exp(-before) * one_minus_exp_minus(optical), optical


@jit
def place_fine(t, density, u, rays, coarse, fine, R: tl.constexpr, M: tl.constexpr):
    """Writes the `fine` samples after the `coarse` ones, placed as by march.importance.

    The first of two passes over the intervals sums their blurred weights. In the second, each fine sample
    gets its place in the interval where the running sum passes its share.
    """
    ray = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    valid, row = ray < rays, ray * (coarse + fine)
    k = tl.arange(0, M)[None, :]
    share = (k + tl.load(u + ray * fine + k, mask=valid & (k < fine), other=0.0)) / fine
    wanted, place = share, share
    for PLACING in tl.static_range(2):
        here, before = coarse_interval(t, density, row, valid, tl.zeros((R, 1), tl.float32))
        previous, passed = here, tl.zeros((R, 1), tl.float32)
        for interval in range(coarse - 1):
            slot = row + interval
            further = valid & (slot + 2 < row + coarse)
            ahead, optical = coarse_interval(t, density, slot + 1, further, before)
            before += optical
            ahead = tl.where(further, ahead, here)
            widened = 0.5 * (tl.maximum(previous, here) + tl.maximum(here, ahead)) + PADDING
            if PLACING:
                start = tl.load(t + slot, mask=valid, other=0.0)
                end = tl.load(t + slot + 1, mask=valid, other=0.0)
                found = start + tl.minimum((wanted - passed) / widened, 1.0) * (end - start)
                place = tl.where(wanted >= passed, found, place)
            passed += widened
            previous, here = here, ahead
        wanted = share * passed
    tl.store(t + row + coarse + k, place, mask=valid & (k < fine))


@jit
def sort_samples(t, order, rays, samples, R: tl.constexpr, N: tl.constexpr):
    """Writes `order`. A sample's rank is the number of its ray's samples before it; of equal ones, the lower
    slot is first."""
    ray = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    row = ray * samples
    k = tl.arange(0, N)[None, :]
    valid = (ray < rays) & (k < samples)
    here = tl.load(t + row + k, mask=valid, other=0.0)
    rank = tl.zeros((R, N), tl.int32)
    for other in range(samples):
        there = tl.load(t + row + other, mask=ray < rays, other=0.0)
        rank += ((there < here) | ((there == here) & (other < k))).to(tl.int32)
    tl.store(order + row + rank, k + tl.zeros((R, N), tl.int32), mask=valid)


@jit
def slot_of(order, row, k, valid, samples):
    """Returns the slot of the k-th sample of each ray, and whether there is one."""
    there = valid & (k >= 0) & (k < samples)
    return row + tl.load(order + row + k, mask=there, other=0), there


@jit
def interval_after(t, density, order, row, k, valid, samples):
    """Returns optical thickness, length and middle of the interval after the k-th sample; 0 if none."""
    here, there = slot_of(order, row, k, valid, samples)
    following, also = slot_of(order, row, k + 1, valid, samples)
    there &= also
    start, end = tl.load(t + here, mask=there, other=0.0), tl.load(t + following, mask=there, other=0.0)
    ends = tl.load(density + here, mask=there, other=0.0) + tl.load(
        density + following, mask=there, other=0.0
    )
    return 0.5 * ends * (end - start), end - start, 0.5 * (start + end)


@jit
def composite(
    t, density, features, order, out_features, depth, opacity, rays, samples, channels, R: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Composites samples in their order, as march.composite does."""
    ray = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    valid, row = ray < rays, ray * samples
    k = tl.arange(0, N)[None, :]
    optical, _, middle = interval_after(t, density, order, row, k, valid, samples)
    optical_back, _, _ = interval_after(t, density, order, row, k - 1, valid, samples)
    weight = tl.exp(-tl.cumsum(optical_back, 1)) * one_minus_exp_minus(optical)
    tl.store(opacity + ray, tl.sum(weight, 1)[:, None], mask=valid)
    tl.store(depth + ray, tl.sum(weight * middle, 1)[:, None], mask=valid)

    here, there = slot_of(order, row, k, valid, samples)
    following, also = slot_of(order, row, k + 1, valid, samples)
    for channel in range(channels):
        ends = tl.load(features + here * channels + channel, mask=there, other=0.0)
        ends += tl.load(features + following * channels + channel, mask=also, other=0.0)
        tl.store(out_features + ray * channels + channel, tl.sum(0.5 * weight * ends, 1)[:, None], mask=valid)


@jit
def value_at(t, features, order, up_features, d_depth, d_opacity, ray, row, k, valid, samples, channels):
    """Returns the gradient of the loss by a unit of weight at the k-th sample."""
    slot, there = slot_of(order, row, k, valid, samples)
    value = d_depth * tl.load(t + slot, mask=there, other=0.0) + d_opacity
    for channel in range(channels):
        d_feature = tl.load(up_features + ray * channels + channel, mask=valid, other=0.0)
        value += d_feature * tl.load(features + slot * channels + channel, mask=there, other=0.0)
    return value


@jit
def composite_backward(
    t, density, features, order, up_features, up_depth, up_opacity, thresholds, d_raw, keep,
    rays, samples, channels, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Writes gradients of samples' raw outputs, (slot x 1 + channels), and whether the largest exceeds the
    threshold of the ray.

    With v_k the gradient by weight k: dL/d optical_k = e^-(before + optical) v_k − Σ_{j>k} w_j v_j.
    """
    ray = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    valid, row = ray < rays, ray * samples
    k = tl.arange(0, N)[None, :]
    optical, length, _ = interval_after(t, density, order, row, k, valid, samples)
    optical_back, length_back, _ = interval_after(t, density, order, row, k - 1, valid, samples)
    optical_before, _, _ = interval_after(t, density, order, row, k - 2, valid, samples)
    before, before_back = tl.cumsum(optical_back, 1), tl.cumsum(optical_before, 1)
    weight = tl.exp(-before) * one_minus_exp_minus(optical)
    weight_back = tl.exp(-before_back) * one_minus_exp_minus(optical_back)

    d_depth = tl.load(up_depth + ray, mask=valid, other=0.0)
    d_opacity = tl.load(up_opacity + ray, mask=valid, other=0.0)
    at_back = value_at(
        t, features, order, up_features, d_depth, d_opacity, ray, row, k - 1, valid, samples, channels
    )
    at_here = value_at(
        t, features, order, up_features, d_depth, d_opacity, ray, row, k, valid, samples, channels
    )
    at_next = value_at(
        t, features, order, up_features, d_depth, d_opacity, ray, row, k + 1, valid, samples, channels
    )
    value, value_back = 0.5 * (at_here + at_next), 0.5 * (at_back + at_here)
    behind_back = tl.cumsum(weight * value, 1, reverse=True)
    d_optical = tl.exp(-(before + optical)) * value - (behind_back - weight * value)
    d_optical_back = tl.exp(-before) * value_back - behind_back

    # Through the activations: the slope of softplus is 1 − e^-y at its value y, that of a sigmoid s (1 − s).
    slot, there = slot_of(order, row, k, valid, samples)
    d_density = 0.5 * (length * d_optical + length_back * d_optical_back)
    d_density *= one_minus_exp_minus(tl.load(density + slot, mask=there, other=0.0))
    tl.store(d_raw + slot * (1 + channels), d_density, mask=there)
    largest = tl.abs(d_density)
    for channel in range(channels):
        d_feature = tl.load(up_features + ray * channels + channel, mask=valid, other=0.0)
        feature = tl.load(features + slot * channels + channel, mask=there, other=0.0)
        s = (0.5 * (feature + 1) + MARGIN) / (1 + 2 * MARGIN)
        d_sigmoid = 0.5 * (weight + weight_back) * d_feature * (2 + 4 * MARGIN) * s * (1 - s)
        tl.store(d_raw + slot * (1 + channels) + 1 + channel, d_sigmoid, mask=there)
        largest = tl.maximum(largest, tl.abs(d_sigmoid))
    threshold = tl.load(thresholds + ray, mask=valid, other=0.0)
    negligible = largest <= threshold  # false for NaN, which must show in the gradients
    tl.store(keep + slot, 1 - negligible.to(tl.int8), mask=there)
