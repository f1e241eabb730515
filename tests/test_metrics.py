"""Metrics against closed forms, scikit-image, and the formulas of the papers."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from latentscenes.core.errors import UserError
from latentscenes.evaluation.evaluate import Evaluation, SceneScore
from latentscenes.evaluation.tables import scores_table
from latentscenes.model.metrics import FOLDER_VARIABLE, PSNR_CAP, Perceptual, psnr, ssim


def photos(count: int = 3) -> torch.Tensor:
    """Smooth random images with edges, (n, 3, 64, 80) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 10, generator=generator)
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1)
    images[:, :, 20:40, 30:60] = coarse[:, :, :1, :1]
    return images


def noisy(images: torch.Tensor, amount: float) -> torch.Tensor:
    return (images + amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )


def test_psnr_closed_forms():
    black = torch.zeros(3, 3, 16, 16)
    other = torch.stack([torch.full((3, 16, 16), v) for v in (0.1, 0.5, 1.0)])
    torch.testing.assert_close(psnr(black, other), torch.tensor([20.0, 20 * math.log10(2), 0.0]))
    assert torch.equal(psnr(other, other), torch.full((3,), PSNR_CAP))


def test_psnr_clamps_and_is_per_view():
    a = torch.stack([torch.full((3, 8, 8), 1.7), torch.full((3, 8, 8), 0.5)])
    b = torch.stack([torch.ones(3, 8, 8), torch.full((3, 8, 8), -0.3)])
    torch.testing.assert_close(psnr(a, b), torch.tensor([PSNR_CAP, 20 * math.log10(2)]))


@pytest.mark.parametrize("amount", [0.0, 0.02, 0.3])
def test_ssim_agrees_with_scikit_image(amount):
    skimage = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a = photos()
    b = noisy(a, amount)
    truth = [
        skimage.structural_similarity(
            x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy(), gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1, channel_axis=2,
        )
        for x, y in zip(a.double(), b.double(), strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(a, b).numpy(), truth, atol=1e-6)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    torch.testing.assert_close(ssim(a, b), torch.tensor([(2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)]))
    torch.testing.assert_close(ssim(a, a), torch.ones(1))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))


def perceptual_weights(shapes, prefixes):
    """Returns random weights named as in files, from (out, in, side) per convolution."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for k, ((o, i, side), prefix) in enumerate(zip(shapes, prefixes, strict=True)):
        state[f"{prefix}.weight"] = torch.randn(o, i, side, side, generator=generator) / (side * i**0.5)
        state[f"{prefix}.bias"] = 0.1 * torch.randn(o, generator=generator)
        state[f"lin{k}.model.1.weight"] = torch.rand(1, o, 1, 1, generator=generator)
    return state


SHAPES = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
ALEXNET = [f"features.{place}" for place in (0, 3, 6, 8, 10)]


def test_lpips_equals_its_formula(tmp_path, monkeypatch):
    """A folder with backbone and linear weights in two files, against the formula in plain loops."""
    state = perceptual_weights(SHAPES, ALEXNET)
    torch.save(
        {name: value for name, value in state.items() if name.startswith("features")},
        tmp_path / "alexnet.pth",
    )
    torch.save({name: value for name, value in state.items() if name.startswith("lin")}, tmp_path / "lin.pth")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    metric = Perceptual.find()
    assert metric.name == "LPIPS"

    def features(image):
        x = (2 * image - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        for k, name in enumerate(ALEXNET):
            if k in (1, 2):
                x = functional.max_pool2d(x, 3, 2)
            stride, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[k]
            x = functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding).relu()
            yield x[0]

    a, b = photos(1), noisy(photos(1), 0.1)
    truth = 0.0
    for k, (p, q) in enumerate(zip(features(a), features(b), strict=True)):
        weight, pixels = state[f"lin{k}.model.1.weight"].flatten().double(), []
        for u, v in zip(p.double().flatten(1).T, q.double().flatten(1).T, strict=True):
            difference = u / u.norm().clamp_min(1e-10) - v / v.norm().clamp_min(1e-10)
            pixels.append((weight * difference**2).sum().item())
        truth += sum(pixels) / len(pixels)
    assert metric(a, b).item() == pytest.approx(truth, rel=1e-3)
    assert metric(a, a).item() == 0
    torch.testing.assert_close(metric(torch.cat([a, b]), torch.cat([b, a])), metric(a, b).expand(2))


def test_lpips_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match="no 'features.0.weight'.*The folder must hold"):
        Perceptual.find(tmp_path)
    torch.save(
        perceptual_weights(SHAPES, ALEXNET) | {"lin2.model.1.weight": torch.ones(1, 5, 1, 1)},
        tmp_path / "weights.pth",
    )
    with pytest.raises(UserError, match=r"lin2.model.1.weight has shape \(1, 5, 1, 1\), not"):
        Perceptual.find(tmp_path)


def flat_flip(a, b):
    """FLIP of two flat images of sRGB colors, after the paper: only the color term is left. It is the HyAB
    distance of Hunt-adjusted CIELAB colors to the power 0.7, mapped to [0, 1]."""

    def lab(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        ratio = to_xyz @ linear / to_xyz.sum(1)
        x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
        lightness = 116 * y - 16
        return lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)

    def power(a, b):
        (p, *q), (r, *s) = lab(a), lab(b)
        return (abs(p - r) + math.dist(q, s)) ** 0.7

    found, largest = power(a, b), power((0, 1, 0), (0, 0, 1))
    knee = 0.4 * largest
    return 0.95 * found / knee if found < knee else 0.95 + 0.05 * (found - knee) / (largest - knee)


@pytest.fixture
def metric(monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return Perceptual.find()


def test_flip_of_flat_images_follows_the_paper(metric):
    assert metric.name == "FLIP"
    pairs = [((0, 0, 0), (1, 1, 1)), ((0, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 0, 0)), ((0.9,) * 3, (1, 1, 1))]
    pairs += [((0.2, 0.4, 0.6), (0.3, 0.4, 0.5))]
    sides = (torch.tensor(side, dtype=torch.float32).view(-1, 3, 1, 1) for side in zip(*pairs, strict=True))
    found = metric(*(side.expand(-1, 3, 24, 32) for side in sides))
    assert found.tolist() == pytest.approx([flat_flip(*pair) for pair in pairs], abs=1e-3)
    assert found[0].item() == pytest.approx(0.9674, abs=1e-3)


def test_flip_orders_distortions(metric):
    truth = photos()
    distances = [metric(noisy(truth, amount), truth) for amount in (0.0, 0.01, 0.03, 0.1, 0.3)]
    for view in range(len(truth)):
        values = [distance[view].item() for distance in distances]
        assert values[0] == 0 and values == sorted(values) and 0.1 < values[-1] < 1
    torch.testing.assert_close(metric(truth, noisy(truth, 0.1)), distances[3], rtol=1e-3, atol=0)
    each = torch.cat([metric(a[None], b[None]) for a, b in zip(noisy(truth, 0.1), truth, strict=True)])
    assert torch.equal(each, distances[3])
    assert torch.equal(metric(truth + 2, torch.ones_like(truth)), torch.zeros(3))  # clamped


def test_scores_of_earlier_versions_open(tmp_path):
    """They may name a metric that this version no longer computes."""
    score = SceneScore("a", 30.0, 0.9, 0.05, 40.0, 0.99, 0.01, 0.001)
    old = Evaluation("views", "held_out", 4, "ST-LPIPS (reconstructed)", 0.01, [score], score)
    old.save(tmp_path / "evaluation.json")
    opened = Evaluation.read(tmp_path / "evaluation.json")
    assert opened == old and "ST-LPIPS (reconstructed)" in scores_table(opened).columns
