"""Large pictures from few rays: what they cost and how little they differ from all rays."""

import math
from dataclasses import replace

import pytest
import torch
from egg import VIEW, egg_parts
from torch import Tensor

from latentscenes.core.cameras import orbit
from latentscenes.core.config import CodecConfig
from latentscenes.model.model import LARGE, Model, adaptive_views, render_images
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.adaptive import render_adaptively


class Picture:
    """A picture of one channel or more. Counts how often each pixel is cast."""

    def __init__(self, values: Tensor):
        self.values = values if values.ndim == 3 else values[..., None]
        self.casts = torch.zeros(self.values.shape[:2], dtype=torch.int64)

    def __call__(self, pixels: Tensor) -> Tensor:
        self.casts.flatten().index_add_(0, pixels, torch.ones_like(pixels))
        return self.values.flatten(0, 1)[pixels]

    def rendered(self, *tolerance: float) -> Tensor:
        height, width, channels = self.values.shape
        limits = torch.tensor(tolerance or [0.05] * channels)
        return render_adaptively(self, height, width, limits)


def grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")


@pytest.mark.parametrize("size", [(64, 64), (65, 129), (37, 50), (3, 200), (1, 1)])
def test_smooth_pictures_need_corners_and_middles_of_cells_alone(size):
    rows, columns = grid(*size)
    plane = 0.3 + 0.002 * rows - 0.003 * columns
    picture = Picture(plane)
    assert torch.allclose(picture.rendered()[..., 0], plane, atol=1e-6)
    cells = [max(1, math.ceil((side - 1) / 8)) for side in size]
    assert picture.casts.sum() == (cells[0] + 1) * (cells[1] + 1) + cells[0] * cells[1]


def test_patterns_that_are_alike_at_all_corners_are_seen():
    columns = grid(64, 64)[1]
    stripes = ((columns + 1) % 8 < 3).float()
    picture = Picture(stripes)
    assert torch.equal(picture.rendered()[..., 0], stripes)


@pytest.mark.parametrize("size", [(200, 200), (123, 187)])
def test_edges_are_exact_and_thin_parts_are_followed(size):
    rows, columns = grid(*size)
    seat = ((rows - 50).abs() < 12) & ((columns - 60).abs() < 30)
    legs = (
        ((columns == 37) | (columns == 83)) & (rows >= 50) & (rows < 110)
    )  # one pixel wide, between corners
    wire = (columns - 0.9 * rows - 15).abs() < 0.8
    wire &= (rows > 55) & (rows < 100)
    shape = (seat | legs | wire).float()
    picture = Picture(shape)
    assert torch.equal(picture.rendered()[..., 0], shape)
    assert picture.casts.sum() < 0.35 * shape.numel() and picture.casts.max() <= 4  # the last row repeats


def test_noise_is_cast_everywhere_and_once():
    noise = torch.rand(97, 65, 2, generator=torch.Generator().manual_seed(0))  # sides of 8 k + 1
    picture = Picture(noise)
    assert torch.equal(picture.rendered(1e-3, 1e-3), noise)
    assert torch.equal(picture.casts, torch.ones(97, 65, dtype=torch.int64))


def test_values_without_a_limit_place_no_rays_but_are_exact_where_rays_are():
    rows, columns = grid(80, 80)
    edge, noise = (columns > 41).float(), torch.rand(80, 80)
    picture = Picture(torch.stack([edge, noise], -1))
    found = picture.rendered(0.05, math.inf)
    assert torch.equal(found[..., 0], edge)
    assert picture.casts.sum() < 0.4 * 80 * 80
    known = picture.casts > 0
    assert torch.equal(found[..., 1][known], noise[known])


def test_pictures_of_scenes_differ_little_and_small_ones_not_at_all():
    model, rows = egg_parts()
    planes, cameras = model.compose(rows), VIEW.orbit(3)
    for size, least in (((240, 320), 75.0), ((LARGE // 2, LARGE), math.inf)):
        exact, fast = (render_images(model, planes, cameras, size, adaptive=some) for some in (False, True))
        error = (exact.images - fast.images).square().mean((1, 2, 3))
        assert (-10 * error.log10()).min() >= least
        if least == math.inf:
            assert all(
                torch.equal(getattr(exact, name), getattr(fast, name)) for name in ("depth", "opacity")
            )
        else:
            assert (exact.opacity - fast.opacity).abs().max() < 0.03
            solid = exact.opacity > 0.95
            assert (exact.depth - fast.depth)[solid].abs().max() < 0.03


def test_far_fewer_rays_are_cast_and_a_watcher_can_stop_them():
    model, rows = egg_parts()
    planes, cameras = model.compose(rows), VIEW.orbit(1)
    background, cast = model.background(480, 640), 0
    render = model.render

    def counting(*arguments, **options):
        nonlocal cast
        cast += options["pixels"].numel()
        return render(*arguments, **options)

    model.render = counting
    adaptive_views(model, planes, cameras, background)
    assert cast < 0.2 * 480 * 640

    def stop() -> None:
        raise InterruptedError

    cast = 0
    with pytest.raises(InterruptedError):
        adaptive_views(model, planes, cameras, background, watch=stop)
    assert cast == 0


def test_colors_of_latents_are_those_of_rays_through_pixels(tiny, solids):
    model = Model(replace(tiny, codec=CodecConfig("guided", downsampling=2, channels=5, width=8)), solids.box)
    model.eval().requires_grad_(False)
    planes = model.compose(random_parameters(1, model.config.planes, torch.Generator().manual_seed(1)))
    cameras = orbit(2)
    shown = render_images(model, planes, cameras, (24, 32), decoded=False)
    rays = model.render(planes, cameras, model.background(48, 64)).image(24, 32)
    assert torch.equal(shown.latents, rays) and shown.images.shape == (2, 3, 24, 32)
    assert torch.allclose(
        shown.images, (rays[:, :3] + 1) / 2, atol=1e-6
    )  # the preset's normalizer changes nothing
    coarse = render_images(model, planes, cameras, (24, 32)).latents
    assert coarse.shape[2:] == (12, 16)
