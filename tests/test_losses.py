"""Each term of the objective against numpy, on renders of a tiny model."""

import dataclasses

import numpy as np
import pytest
import torch

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, orbit
from latentscenes.core.config import LossWeights
from latentscenes.core.runtime import seeded
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.field import FusedPlanes
from latentscenes.training.losses import (
    Batch,
    at_pixels,
    edge_error,
    terms,
    total,
    total_variation,
    transform_alike,
)

SIZE = 16


@pytest.fixture
def model(tiny):
    config = config_io.parse(config_io.dump(tiny), "tiny", ["render.preview=true"])
    return Model(config, Box((0.0, 0.0, 0.0), (0.45, 0.45, 0.45)))


def made_batch(model, scenes=2, views=3, **changes):
    count = scenes * views
    images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    plain = Batch(torch.arange(scenes), orbit(count), model.background(SIZE, SIZE), images, None, None)
    return dataclasses.replace(plain, **changes)


def made_planes(model, scenes=2):
    return model.compose(random_parameters(scenes, model.config.planes, torch.Generator().manual_seed(2)))


def step(seed=3):
    return seeded("cpu", seed)


def square(a, b):
    return float(np.mean((a.detach().double().numpy() - b.detach().double().numpy()) ** 2))


def test_each_term_worked_out_with_numpy(model):
    batch, planes = made_batch(model), made_planes(model)
    weights = LossWeights(latent=1.0, rgb=1.0, autoencoder=1.0, preview=1.0, depth_tv=1.0, tv=1.0, edges=1.0)
    found = {
        name: float(value.detach()) for name, value in terms(model, planes, batch, weights, step())[0].items()
    }
    assert set(found) == {"latent", "rgb", "autoencoder", "preview", "depth_tv", "tv", "edges"}

    view = model.render(planes, batch.cameras, batch.background, step())  # the same randomness
    encoded = model.encode(batch.images)
    rendered = view.latents.reshape(6, 4, 4, 4).permute(0, 3, 1, 2)
    decoded, again = model.decode(rendered), model.decode(encoded)
    assert found["latent"] == pytest.approx(square(rendered, encoded), rel=1e-5)
    assert found["rgb"] == pytest.approx(square(decoded, batch.images), rel=1e-5)
    assert found["autoencoder"] == pytest.approx(square(again, batch.images), rel=1e-5)
    # Each latent pixel: the mean of 4 x 4 pixels
    small = 2 * batch.images.reshape(6, 3, 4, 4, 4, 4).mean((3, 5)) - 1
    assert found["preview"] == pytest.approx(
        square(view.preview.reshape(6, 4, 4, 3).permute(0, 3, 1, 2), small), rel=1e-5
    )
    depth = view.depth.detach().double().numpy().reshape(6, 4, 4)
    assert found["depth_tv"] == pytest.approx(
        np.mean(np.diff(depth, axis=1) ** 2) + np.mean(np.diff(depth, axis=2) ** 2), rel=1e-5
    )
    truth, edges = batch.images.double().numpy(), 0.0
    for image in (decoded, again):
        for axis in (2, 3):
            edges += np.mean(
                np.abs(np.diff(image.detach().double().numpy(), axis=axis) - np.diff(truth, axis=axis))
            )
    assert found["edges"] == pytest.approx(edges, rel=1e-5)
    assert found["tv"] == pytest.approx(float(total_variation(planes.texels).detach()), rel=1e-6)


@pytest.mark.parametrize(
    "name", [entry.name for entry in dataclasses.fields(LossWeights) if entry.name != "edges"]
)
def test_only_what_has_a_weight_is_computed(model, name):
    found, _ = terms(model, made_planes(model), made_batch(model), LossWeights(**{name: 0.5}), step())
    assert set(found) == {name}
    assert torch.isfinite(found[name]) and found[name] > 0


def test_latent_warm_up_needs_neither_images_nor_codec(model, monkeypatch):
    latents = torch.rand(6, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    batch = made_batch(model, images=None, latents=at_pixels(latents))

    def refuse(*_):
        raise AssertionError("the codec was asked")

    monkeypatch.setattr(model.codec, "encode", refuse)
    monkeypatch.setattr(model.codec, "decode", refuse)
    planes = made_planes(model)
    found, _ = terms(model, planes, batch, LossWeights(latent=1.0, tv=1e-4), step())
    view = model.render(planes, batch.cameras, batch.background, step())
    assert float(found["latent"].detach()) == pytest.approx(square(view.image(4, 4), latents), rel=1e-5)


def test_some_rays_are_compared_with_their_own_pixels(model):
    pixels = torch.randint(16, (6, 5), generator=torch.Generator().manual_seed(5))
    batch, planes = made_batch(model, pixels=pixels), made_planes(model)
    found, _ = terms(model, planes, batch, LossWeights(latent=1.0, preview=1.0), step())
    view = model.render(planes, batch.cameras, batch.background, step(), pixels)
    encoded, expected = model.encode(batch.images), 0.0
    for v in range(6):
        for k, pixel in enumerate(pixels[v].tolist()):
            row, column = divmod(pixel, 4)
            expected += float((view.latents[v, k] - encoded[v, :, row, column]).detach().square().sum())
    assert float(found["latent"].detach()) == pytest.approx(expected / (6 * 5 * 4), rel=1e-5)


def test_crops_are_compared_with_their_part_of_the_images(tiny):
    model = guided(tiny)
    pixels = torch.tensor([[0, 1, 4, 5]] * 6)  # 2 x 2 of 4 x 4 latents, at the upper left
    crops = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    batch, planes = made_batch(model, images=crops, pixels=pixels, grid=(2, 2)), made_planes(model)
    found, errors = terms(model, planes, batch, LossWeights(color=1.0, rgb=1.0), step())
    view = model.render(planes, batch.cameras, batch.background, step(), pixels).image(2, 2)
    squares = (model.decode(view) - crops).square().detach()
    assert float(found["rgb"].detach()) == pytest.approx(float(squares.mean()), rel=1e-5)
    torch.testing.assert_close(errors, squares.reshape(6, 3, 2, 4, 2, 4).mean((1, 3, 5)).flatten(1))
    small = 2 * crops.reshape(6, 3, 2, 4, 2, 4).mean((3, 5)) - 1
    assert float(found["color"].detach()) == pytest.approx(square(view[:, :3], small), rel=1e-5)


def test_scattered_colors_are_compared_with_pixels_of_the_image(tiny):
    model = guided(tiny)
    pixels = torch.randint(SIZE**2, (6, 5), generator=torch.Generator().manual_seed(5))
    colors = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(7))
    full = model.background(4 * SIZE, 4 * SIZE)  # as many latents as the image has pixels
    batch = made_batch(model, images=None, pixels=pixels, colors=colors, background=full)
    planes = made_planes(model)
    found, errors = terms(model, planes, batch, LossWeights(color=1.0), step())
    view = model.render(planes, batch.cameras, full, step(), pixels)
    torch.testing.assert_close(errors, (view.latents[..., :3] - colors).square().mean(-1).detach())
    assert float(found["color"].detach()) == pytest.approx(float(errors.mean()), rel=1e-6)


def guided(tiny):
    settings = ["codec.kind=guided", "codec.channels=5"]
    config = config_io.parse(config_io.dump(tiny), "tiny", settings)
    return Model(config, Box((0.0, 0.0, 0.0), (0.45, 0.45, 0.45)))


def test_total_is_the_weighted_sum(model):
    weights = LossWeights(latent=1.0, rgb=0.25, tv=1e-4)
    found, _ = terms(model, made_planes(model), made_batch(model), weights, step())
    expected = sum(
        {"latent": 1, "rgb": 0.25, "tv": 1e-4}[name] * float(value.detach()) for name, value in found.items()
    )
    assert float(total(found, weights).detach()) == pytest.approx(expected, rel=1e-6)


def test_gradients_reach_what_each_term_depends_on(model):
    planes = FusedPlanes(made_planes(model).texels.detach().requires_grad_())
    reached = {}
    for name in ("latent", "rgb", "autoencoder", "equivariance", "preview"):
        model.zero_grad()
        terms(model, planes, made_batch(model), LossWeights(**{name: 1.0}), step())[0][name].backward()
        reached[name] = {
            part
            for part, parameters in model.parts().items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in parameters)
        }
    assert reached == {
        "latent": {"encoder", "field"}, "rgb": {"decoder", "field"}, "autoencoder": {"encoder", "decoder"},
        "equivariance": {"encoder", "decoder"}, "preview": {"field"},
    }  # fmt: skip


def test_total_variation_against_loops():
    planes = torch.randn(2, 3, 4, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    values, rows, columns = planes.tolist(), [], []
    for s in range(2):
        for p in range(3):
            for i in range(4):
                for j in range(4):
                    for f in range(2):
                        if i:
                            rows.append((values[s][p][i][j][f] - values[s][p][i - 1][j][f]) ** 2)
                        if j:
                            columns.append((values[s][p][i][j][f] - values[s][p][i][j - 1][f]) ** 2)
    assert float(total_variation(planes)) == pytest.approx(
        sum(rows) / len(rows) + sum(columns) / len(columns)
    )


def test_total_variation_does_not_depend_on_the_number_of_scenes():
    planes = torch.randn(1, 3, 5, 5, 2, generator=torch.Generator().manual_seed(7))
    assert float(total_variation(planes.expand(4, -1, -1, -1, -1))) == pytest.approx(
        float(total_variation(planes)), rel=1e-5
    )


def test_edges_see_blur_and_not_brightness():
    image = torch.zeros(1, 3, 4, 4)
    image[..., 2:] = 1.0  # one vertical edge
    assert float(edge_error(image + 0.3, image)) == pytest.approx(0, abs=1e-6)
    blurred = image.clone()
    blurred[..., 1], blurred[..., 2] = 0.25, 0.75
    # per row the neighbor differences are (0.25, 0.5, 0.25) where they were (0, 1, 0): 0.25, 0.5, 0.25 off
    assert float(edge_error(blurred, image)) == pytest.approx(1 / 3)


def test_latents_and_images_are_moved_alike():
    # "latents" that are the shrunken image itself: moving them must come to shrinking the moved image
    row, column = torch.meshgrid(torch.linspace(0, 3, 64), torch.linspace(0, 4, 64), indexing="ij")
    image = torch.stack([row.sin() + column.cos(), (row * column / 3).cos(), (row - 0.7 * column).sin()])
    images = image.expand(20, -1, -1, -1).contiguous()
    shrink = torch.nn.AvgPool2d(4)
    latents, moved = transform_alike(shrink(images), images, step())
    inner = slice(4, 12)  # away from the repeated borders
    difference = (latents - shrink(moved))[..., inner, inner]
    assert float(difference.abs().max()) < 0.08
    assert float((moved - images).abs().mean()) > 0.2  # it did move
    assert float((moved[0] - moved[1]).abs().mean()) > 0.2  # each image in its own way
    again, _ = transform_alike(shrink(images), images, step())
    assert torch.equal(latents, again)


def test_moves_mirror_half_of_the_images_and_zoom_within_bounds():
    # a grid of coordinates shows the map itself; its Jacobian's determinant is ± 1 / zoom²
    y, x = torch.meshgrid((torch.arange(32) + 0.5) / 16 - 1, (torch.arange(32) + 0.5) / 16 - 1, indexing="ij")
    coordinates = torch.stack([x, y, x]).expand(400, -1, -1, -1).contiguous()
    moved, _ = transform_alike(coordinates[:, :2].contiguous(), coordinates, step())
    middle = moved[:, :, 15:17, 15:17]
    along_x, along_y = (
        (middle[..., :, 1] - middle[..., :, 0]).mean(-1) * 16,
        (middle[..., 1, :] - middle[..., 0, :]).mean(-1) * 16,
    )
    determinant = along_x[:, 0] * along_y[:, 1] - along_x[:, 1] * along_y[:, 0]
    zoom = determinant.abs().rsqrt()
    assert 0.74 < float(zoom.min()) < 0.78 and 1.28 < float(zoom.max()) < 1.34
    assert 0.4 < float((determinant < 0).float().mean()) < 0.6
    # rotations and mirrors alone beside the zoom: both directions stretch equally, at a right angle
    assert torch.allclose(along_x.norm(dim=-1), along_y.norm(dim=-1), atol=1e-3)
    assert (along_x * along_y).sum(-1).abs().max() < 1e-3
