"""Ray marching against closed forms (slab, Gaussian blob, walls), brute force and finite differences."""

import math

import pytest
import torch

from latentscenes.rendering import march

DOUBLE = torch.float64


def along(near, far, count):
    return torch.linspace(near, far, count, dtype=DOUBLE)


# Compositing


def test_slab_of_constant_density():
    sigma, near, far = 1.7, 0.5, 2.1
    t = along(near, far, 4001)
    color = torch.tensor([0.2, -0.4, 0.9], dtype=DOUBLE)
    out = march.composite(t, torch.full_like(t, sigma), color.expand(len(t), 3))
    opacity = 1 - math.exp(-sigma * (far - near))
    assert float(out.opacity) == pytest.approx(opacity, abs=1e-12)  # exact for any number of samples
    assert torch.allclose(out.features, opacity * color)
    # ∫ t σ exp(−σ(t − near)) dt = (near + 1/σ) − (far + 1/σ) exp(−σL)
    depth = (near + 1 / sigma) - (far + 1 / sigma) * math.exp(-sigma * (far - near))
    assert float(out.depth) == pytest.approx(depth, abs=1e-6)
    # the light stopped up to t_k is 1 − exp(−σ (t_k − near))
    stopped = out.weights.cumsum(-1)
    assert torch.allclose(stopped, 1 - torch.exp(-sigma * (t[1:] - near)), atol=1e-12)


def test_gaussian_blob_is_as_opaque_as_its_integral():
    peak, middle, width = 3.0, 1.2, 0.15
    t = along(0.0, 2.5, 5001)
    density = peak * torch.exp(-0.5 * ((t - middle) / width) ** 2)
    out = march.composite(t, density, t[:, None])

    def optical(x):
        scale = width * math.sqrt(2)
        return (
            peak
            * width
            * math.sqrt(math.pi / 2)
            * (math.erf((x - middle) / scale) - math.erf((0 - middle) / scale))
        )

    assert float(out.opacity) == pytest.approx(1 - math.exp(-optical(2.5)), abs=1e-7)
    for k in (2000, 2500, 3000):
        assert float(out.weights[:k].sum()) == pytest.approx(1 - math.exp(-optical(float(t[k]))), abs=1e-6)
    assert torch.allclose(out.features[0], out.depth)  # features that equal t gather the depth


def test_linear_color_in_a_slab():
    # color g(t) = t − near: ∫ (t − near) σ exp(−σ(t − near)) dt = 1/σ − (L + 1/σ) exp(−σL)
    sigma, near, length = 2.5, 0.3, 1.1
    t = along(near, near + length, 4001)
    out = march.composite(t, torch.full_like(t, sigma), (t - near)[:, None])
    assert float(out.features) == pytest.approx(
        1 / sigma - (length + 1 / sigma) * math.exp(-sigma * length), abs=1e-6
    )


def test_of_two_opaque_walls_the_front_one_is_seen():
    t = along(0.0, 3.0, 301)
    first, second = (t >= 1.0) & (t <= 1.2), (t >= 2.0) & (t <= 2.2)
    density = 1e4 * (first | second).to(DOUBLE)
    features = torch.stack([first.to(DOUBLE), second.to(DOUBLE)], -1)
    out = march.composite(t, density, features)
    assert float(out.opacity) == pytest.approx(1)
    assert float(out.features[1]) == 0
    assert float(out.depth) == pytest.approx(1.0, abs=0.011)  # within the sampling distance
    # All in the interval whose ends are air and wall: their mean
    assert float(out.features[0]) == pytest.approx(0.5, abs=1e-9)


def test_nothing_is_seen_of_empty_space():
    t = along(0.5, 2.0, 9)
    out = march.composite(t, torch.zeros_like(t), torch.ones(9, 2, dtype=DOUBLE))
    assert (
        float(out.opacity) == 0
        and float(out.depth) == 0
        and torch.equal(out.features, torch.zeros(2, dtype=DOUBLE))
    )


def test_compositing_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(3, 8, dtype=DOUBLE, generator=generator).sort(-1).values
    density = 5 * torch.rand(3, 8, dtype=DOUBLE, generator=generator)
    features = torch.randn(3, 8, 2, dtype=DOUBLE, generator=generator)
    out = march.composite(t, density, features)
    for ray in range(3):
        light, color, depth = 1.0, [0.0, 0.0], 0.0
        for k in range(7):
            sigma = (density[ray, k] + density[ray, k + 1]).item() / 2
            alpha = 1 - math.exp(-sigma * (t[ray, k + 1] - t[ray, k]).item())
            for c in range(2):
                color[c] += light * alpha * (features[ray, k, c] + features[ray, k + 1, c]).item() / 2
            depth += light * alpha * (t[ray, k] + t[ray, k + 1]).item() / 2
            light *= 1 - alpha
        assert out.features[ray].tolist() == pytest.approx(color)
        assert float(out.depth[ray]) == pytest.approx(depth) and float(out.opacity[ray]) == pytest.approx(
            1 - light
        )


def test_gradients_of_compositing():
    generator = torch.Generator().manual_seed(1)
    t = (
        torch.arange(6, dtype=DOUBLE) + 0.8 * torch.rand(2, 6, dtype=DOUBLE, generator=generator)
    ).requires_grad_()
    density = torch.rand(2, 6, dtype=DOUBLE, generator=generator).requires_grad_()
    features = torch.randn(2, 6, 3, dtype=DOUBLE, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: tuple(march.composite(*inputs)), (t, density, features))


# Where samples are placed


def test_stratified_puts_one_sample_in_each_slice():
    generator = torch.Generator().manual_seed(2)
    near, far = torch.tensor([0.5, 1.0], dtype=DOUBLE), torch.tensor([2.1, 1.5], dtype=DOUBLE)
    u = torch.rand(2, 16, dtype=DOUBLE, generator=generator)
    t = march.stratified(near, far, u)
    for ray in range(2):
        slice_length = (far[ray] - near[ray]) / 16
        found = ((t[ray] - near[ray]) / slice_length).floor().long()
        assert found.tolist() == list(range(16))
    halves = march.stratified(near, far, torch.full((2, 4), 0.5, dtype=DOUBLE))
    assert torch.allclose(halves[1], torch.tensor([1.0625, 1.1875, 1.3125, 1.4375], dtype=DOUBLE))


def target_distribution(t, weights):
    """Computes the cumulative distribution at each t in plain Python. A weight becomes the mean of its maxima
    with the left and with the right neighbor, plus padding, spread evenly over its interval."""
    w = list(weights)
    n = len(w)
    mass = []
    for k in range(n):
        left = max(w[max(k - 1, 0)], w[k])
        right = max(w[k], w[min(k + 1, n - 1)])
        mass.append((left + right) / 2 + 0.01)
    cumulative = [0.0]
    for value in mass:
        cumulative.append(cumulative[-1] + value)
    return [value / cumulative[-1] for value in cumulative]


def read(t, cumulative, x):
    """Reads the piecewise linear cumulative distribution at x."""
    for k in range(len(t) - 1):
        if x <= t[k + 1]:
            return cumulative[k] + (cumulative[k + 1] - cumulative[k]) * (x - t[k]) / (t[k + 1] - t[k])
    return 1.0


T = [0.5, 0.7, 0.8, 1.1, 1.15, 1.6, 2.1]
WEIGHTS = [0.0, 0.3, 0.05, 0.6, 0.0, 0.02]


def test_importance_samples_follow_their_distribution():
    generator = torch.Generator().manual_seed(3)
    m = 5000
    u = torch.rand(m, dtype=DOUBLE, generator=generator)
    samples = march.importance(torch.tensor(T, dtype=DOUBLE), torch.tensor(WEIGHTS, dtype=DOUBLE), u).tolist()
    cumulative = target_distribution(T, WEIGHTS)
    # stratified: sample k lies at the quantile (k + u) / m, so the distance to the target is at most 1 / m
    worst = max(abs(read(T, cumulative, x) - (k + float(u[k])) / m) for k, x in enumerate(samples))
    assert worst < 1e-9


def test_single_importance_samples_are_distributed_alike():
    # one sample a ray, many rays: Kolmogorov-Smirnov
    generator = torch.Generator().manual_seed(4)
    n = 4000
    t, weights = (
        torch.tensor(T, dtype=DOUBLE).expand(n, -1),
        torch.tensor(WEIGHTS, dtype=DOUBLE).expand(n, -1),
    )
    samples = (
        march.importance(t, weights, torch.rand(n, 1, dtype=DOUBLE, generator=generator))
        .flatten()
        .sort()
        .values.tolist()
    )
    cumulative = target_distribution(T, WEIGHTS)
    distance = max(abs(read(T, cumulative, x) - (k + 0.5) / n) for k, x in enumerate(samples))
    assert distance < 1.63 / math.sqrt(n)  # 1 % level


def test_importance_samples_are_sorted_and_inside():
    generator = torch.Generator().manual_seed(5)
    t = torch.rand(200, 12, generator=generator).sort(-1).values
    weights = torch.rand(200, 11, generator=generator) ** 8
    samples = march.importance(t, weights, torch.rand(200, 20, generator=generator))
    assert (samples.diff(dim=-1) >= 0).all()
    assert (samples >= t[:, :1]).all() and (samples <= t[:, -1:]).all()


def test_importance_at_one_half_is_the_middle_quantile():
    t, weights = torch.tensor(T, dtype=DOUBLE), torch.tensor(WEIGHTS, dtype=DOUBLE)
    half = torch.full((4,), 0.5, dtype=DOUBLE)
    samples = march.importance(t, weights, half)
    assert torch.equal(samples, march.importance(t, weights, half))
    cumulative = target_distribution(T, WEIGHTS)
    assert [read(T, cumulative, x) for x in samples.tolist()] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    # no weights at all: even over the length in steps of intervals
    even = march.importance(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(2), torch.tensor([0.5, 0.5]))
    assert even.tolist() == pytest.approx([0.5, 1.5])


def test_importance_survives_a_ray_of_no_length():
    t = torch.full((1, 5), 0.7)
    samples = march.importance(
        t, torch.zeros(1, 4), torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    )
    assert torch.equal(samples, torch.full((1, 6), 0.7))


# The cube


def cube(origin, direction):
    near, far = march.intersect_cube(
        torch.tensor([origin], dtype=DOUBLE), torch.tensor([direction], dtype=DOUBLE)
    )
    return near.item(), far.item()


@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ((-3.0, 0.0, 0.0), (1.0, 0.0, 0.0), 2.0, 4.0),  # along an axis
        ((-3.0, 0.0, 0.0), (2.0, 0.0, 0.0), 1.0, 2.0),  # t counts in lengths of the direction
        ((0.0, 0.5, 0.0), (0.0, 0.0, -1.0), 0.0, 1.0),  # from inside
        ((-2.0, -2.0, -2.0), (1.0, 1.0, 1.0), 1.0, 3.0),  # along the diagonal
        ((-2.0, 0.0, 0.5), (1.0, 0.0, -0.0), 1.0, 3.0),  # negative zero
        ((0.25, -0.5, 4.0), (0.0, 0.0, -1.0), 3.0, 5.0),
    ],
)
def test_cube_worked_out_by_hand(origin, direction, near, far):
    assert cube(origin, direction) == pytest.approx((near, far))


@pytest.mark.parametrize(
    ("origin", "direction"),
    [
        ((-3.0, 1.5, 0.0), (1.0, 0.0, 0.0)),  # passes beside it
        ((-3.0, 0.0, 0.0), (-1.0, 0.0, 0.0)),  # leaves it behind
        ((-3.0, 0.0, 0.0), (0.0, 1.0, 0.0)),  # parallel to the faces, outside
        ((3.0, 3.0, 0.0), (-1.0, 1.0, 0.2)),
    ],
)
def test_a_ray_that_misses_has_no_length(origin, direction):
    near, far = cube(origin, direction)
    assert near == far and near >= 0 and math.isfinite(near)


def test_cube_against_brute_force_marching():
    generator = torch.Generator().manual_seed(6)
    origins = 4 * torch.rand(300, 3, dtype=DOUBLE, generator=generator) - 2
    directions = torch.nn.functional.normalize(torch.randn(300, 3, dtype=DOUBLE, generator=generator), dim=-1)
    near, far = march.intersect_cube(origins, directions)
    t = along(0.0, 8.0, 8001)
    inside = ((origins[:, None] + t[:, None] * directions[:, None]).abs() <= 1).all(-1)
    hit = inside.any(-1)
    assert 50 < int(hit.sum()) < 300  # both kinds are tried
    first = t[inside.to(torch.uint8).argmax(-1)]
    last = t[len(t) - 1 - inside.flip(-1).to(torch.uint8).argmax(-1)]
    assert torch.allclose(near[hit], first[hit], atol=1.1e-3) and torch.allclose(
        far[hit], last[hit], atol=1.1e-3
    )
    assert (far - near)[~hit].max() < 1e-3  # a clipped corner shorter than the steps may hide
