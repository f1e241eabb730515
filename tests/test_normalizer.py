"""Normalizer: round trips, statistics against those of all latents in the window, forgetting, resuming."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentscenes.core.errors import UserError
from latentscenes.model.normalizer import DEVIATIONS, REACH, Normalizer

KINDS = ["none", "tanh", "minmax", "meanstd", "meanstd_tanh"]
WINDOWED = KINDS[2:]


def batches(count, channels=3, seed=0):
    """Batches of different sizes, means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 5.0, 0.3])[:channels, None, None]
    return [scale * torch.randn(2 + k, channels, 4, 5, generator=generator) + k for k in range(count)]


def fed(kind, latents, **options):
    normalizer = Normalizer(kind, 3, **options)
    for batch in latents:
        normalizer.update(batch)
    return normalizer


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind):
    latents = batches(4)
    normalizer = fed(kind, latents)
    probe = torch.cat(latents)
    torch.testing.assert_close(
        normalizer.denormalize(normalizer.normalize(probe)), probe, rtol=1e-3, atol=1e-3
    )


def test_tanh_is_the_published_formula():
    z = 30 * torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Normalizer("tanh", 3).normalize(z), torch.tanh(0.02 * z))
    torch.testing.assert_close(Normalizer("tanh", 3, scale=0.5).normalize(z), torch.tanh(0.5 * z))


def test_minmax_touches_both_ends_per_channel():
    latents = batches(3)
    y = fed("minmax", latents).normalize(torch.cat(latents))
    torch.testing.assert_close(y.amin((0, 2, 3)), -torch.ones(3))
    torch.testing.assert_close(y.amax((0, 2, 3)), torch.ones(3))


@pytest.mark.parametrize("kind", ["meanstd", "meanstd_tanh"])
def test_moments_equal_those_of_all_latents_together(kind):
    latents = batches(5)
    normalizer = fed(kind, latents)
    pooled = torch.cat(latents).double()
    deviation = pooled.std((0, 2, 3), correction=0)
    torch.testing.assert_close(normalizer.shift.double(), pooled.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    factor = DEVIATIONS if kind == "meanstd" else 1
    torch.testing.assert_close(normalizer.span.double(), factor * deviation, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", WINDOWED)
def test_the_window_forgets(kind):
    latents = batches(9)
    long, short = fed(kind, latents, window=4), fed(kind, latents[-4:], window=4)
    torch.testing.assert_close(long.shift, short.shift)
    torch.testing.assert_close(long.span, short.span)
    assert not torch.equal(long.shift, fed(kind, latents, window=5).shift)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_last_bit(kind, tmp_path):
    latents = batches(7)
    straight = fed(kind, latents, window=4)
    save_file(fed(kind, latents[:5], window=4).state_dict(), tmp_path / "state.safetensors")
    resumed = Normalizer(kind, 3, window=4)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for batch in latents[5:]:
        resumed.update(batch)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_and_constant_input_stay_finite(kind):
    normalizer = fed(kind, [torch.full((2, 3, 4, 4), 0.7)])
    y = torch.tensor([-2.0, -1.0, 1.0, 2.0]).expand(1, 3, 1, 4).clone().requires_grad_()
    z = normalizer.denormalize(y)
    z.sum().backward()
    assert z.isfinite().all() and y.grad.isfinite().all()
    if kind == "tanh":
        assert z.abs().max().item() == pytest.approx(torch.atanh(torch.tensor(REACH)).item() / 0.02, rel=1e-4)


def test_update_leaves_no_graph_and_gradients_flow():
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    normalizer = fed("meanstd_tanh", [z])
    assert not normalizer.shift.requires_grad
    normalizer.denormalize(normalizer.normalize(z)).sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z), rtol=1e-3, atol=1e-3)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="tan"):
        Normalizer("tan", 3)
    with pytest.raises(UserError, match="window"):
        Normalizer("minmax", 3, window=0)
