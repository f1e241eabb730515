"""Metrics against closed forms, scikit-image, and what any perceptual distance must do."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from latentscenes.metrics import PSNR_CAP, psnr, ssim

SHARED = Path(__file__).resolve().parents[2] / "shared"


def photos(count: int = 3) -> torch.Tensor:
    """Smooth random images with edges, (n, 3, 64, 80) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 10, generator=generator)
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(0, 1)
    images[:, :, 20:40, 30:60] = coarse[:, :, :1, :1]
    return images


def noisy(images: torch.Tensor, amount: float) -> torch.Tensor:
    return (images + amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)


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
