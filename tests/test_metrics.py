"""Metrics against closed forms, scikit-image, and what any perceptual distance must do."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image, ImageFilter
from torch.nn import functional

from latentscenes.core.errors import UserError
from latentscenes.model import metrics
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
    """Random weights named as a file names them, from (out, in, side) per convolution."""
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
    """A folder with backbone and linear weights in two files, against the formula written out with plain loops."""
    state = perceptual_weights(SHAPES, ALEXNET)
    torch.save(
        {name: value for name, value in state.items() if name.startswith("features")},
        tmp_path / "alexnet.pth",
    )
    torch.save({name: value for name, value in state.items() if name.startswith("lin")}, tmp_path / "lin.pth")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    metric = Perceptual.find()
    assert metric is not None and metric.name == "LPIPS"

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
    with pytest.raises(UserError, match="no 'features.0.weight'.*folder must hold"):
        Perceptual.find(tmp_path)
    torch.save(
        perceptual_weights(SHAPES, ALEXNET) | {"lin2.model.1.weight": torch.ones(1, 5, 1, 1)},
        tmp_path / "weights.pth",
    )
    with pytest.raises(UserError, match="linear weights of shape"):
        Perceptual.find(tmp_path)


def test_no_perceptual_weights_is_none(monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(metrics, "SHIFT_TOLERANT", ("a-distribution-nobody-has", "x.pth"))
    assert Perceptual.find() is None


def test_shift_tolerant_metric_orders_distortions(monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    metric = Perceptual.find()
    if metric is None:
        pytest.skip("stlpips-pytorch is not installed")
    cars = SHARED / "data" / "srn_sample"
    if not cars.is_dir():
        pytest.skip("car pictures are absent")
    assert metric.name == "ST-LPIPS (reconstructed)"
    pictures = [
        Image.open(min((car / "rgb").glob("*.png"))).convert("RGB") for car in sorted(cars.iterdir())[:4]
    ]

    def jpeg(picture, quality):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream).convert("RGB")

    def stack(images):
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255

    truth = stack(pictures)
    blurred = [
        metric(truth, stack([p.filter(ImageFilter.GaussianBlur(r)) for p in pictures])).mean()
        for r in (0, 0.5, 1, 2, 4)
    ]
    compressed = [
        metric(truth, stack([jpeg(p, quality) for p in pictures])).mean() for quality in (90, 50, 20, 5)
    ]
    noised = [metric(truth, noisy(truth, amount)).mean() for amount in (0.01, 0.03, 0.1, 0.3)]
    for distances in (blurred, compressed, noised):
        assert sorted(distances) == distances and distances[-1] > 2 * distances[0]
    assert blurred[0] == 0
    assert metric(truth, truth.roll(1, -1)).mean() < 0.1 * blurred[2]
