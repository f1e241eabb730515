"""How close a rendered image is to the true one: pure functions, one number per view.

Notable:
- Both images are clamped to [0, 1] first: what a screen shows is what is scored.
- One number per view. Averaging is the caller's: views of a scene first, then scenes (never the MSE of a batch).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PSNR_CAP = 100.0
"""dB given to identical images, whose true PSNR is infinite (an 8-bit image that differs anywhere at all in a
1000 x 1000 picture stays below 118; averages must stay finite)."""


def psnr(a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio in dB: −10 log10 of the mean squared error of [0, 1] values, at most PSNR_CAP."""
    error = (a.clamp(0, 1) - b.clamp(0, 1)).square().mean((1, 2, 3))
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def ssim(a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), mean over pixels and channels, in [−1, 1].

    11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03, data range 1, biased moments. Only windows that
    lie wholly inside the image count (a border of 5 pixels has none), as in the authors' code and in scikit-image.
    Computed in float64: the moments' differences cancel badly in flat regions.
    """
    if min(a.shape[-2:]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"SSIM needs images of at least {2 * SSIM_RADIUS + 1} pixels a side, got {tuple(a.shape[-2:])}.")
    a, b = a.clamp(0, 1).double(), b.clamp(0, 1).double()
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=a.dtype, device=a.device)
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    window = window / window.sum()

    moments = torch.stack([a, b, a * a, b * b, a * b])  # (5, n, 3, H, W), each smoothed along rows, then columns
    moments = functional.conv2d(moments.flatten(0, 2)[:, None], window.view(1, 1, 1, -1))
    moments = functional.conv2d(moments, window.view(1, 1, -1, 1))
    mean_a, mean_b, square_a, square_b, product = moments.view(5, *a.shape[:2], *moments.shape[-2:])
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    covariance = product - mean_a * mean_b

    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (luminance * structure).mean((1, 2, 3)).float()
