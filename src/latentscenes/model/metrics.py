"""Image metrics: PSNR, SSIM and a perceptual distance. Each returns one number per view.

Notable:
- Both images are clamped to [0, 1] first, because a screen shows them so.
- Callers average over the views of a scene first, then over scenes.
"""

import os
from collections.abc import Callable
from pathlib import Path

import flip_evaluator
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from latentscenes.core.errors import UserError
from latentscenes.model.codec import read_weights

PSNR_CAP = 100.0
"""PSNR of identical images in dB. Their true PSNR is infinite, but averages must stay finite. (Two 8-bit
images of 128 x 128 pixels that differ by one step in one value have 95 dB.)"""


def psnr(a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio in dB: −10 log10 of the mean squared error, at most PSNR_CAP."""
    error = (a.clamp(0, 1) - b.clamp(0, 1)).square().mean((1, 2, 3))
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def ssim(a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), mean over pixels and channels.

    Uses an 11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03 and biased moments. Like the
    authors' code and scikit-image, it counts only windows that lie wholly inside the image. It computes in
    float64 because the differences of moments cancel badly in flat regions.
    """
    if min(a.shape[-2:]) <= 2 * SSIM_RADIUS:
        raise ValueError(
            f"SSIM needs images of at least {2 * SSIM_RADIUS + 1} pixels per side, got {tuple(a.shape[-2:])}."
        )
    a, b = a.clamp(0, 1).double(), b.clamp(0, 1).double()
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=a.dtype, device=a.device)
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    window = window / window.sum()

    # Moments (5, n, 3, H, W), smoothed along rows, then columns
    moments = torch.stack([a, b, a * a, b * b, a * b])
    moments = functional.conv2d(moments.flatten(0, 2)[:, None], window.view(1, 1, 1, -1))
    moments = functional.conv2d(moments, window.view(1, 1, -1, 1))
    mean_a, mean_b, square_a, square_b, product = moments.view(5, *a.shape[:2], *moments.shape[-2:])
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    covariance = product - mean_a * mean_b

    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (luminance * structure).mean((1, 2, 3)).float()


FOLDER_VARIABLE = "LATENTSCENES_LPIPS"
"""Environment variable that names a folder with LPIPS weights."""

ALEXNET = {
    "features.0": ((64, 3, 11, 11), 4, 2),
    "features.3": ((192, 64, 5, 5), 1, 2),
    "features.6": ((384, 192, 3, 3), 1, 1),
    "features.8": ((256, 384, 3, 3), 1, 1),
    "features.10": ((256, 256, 3, 3), 1, 1),
}
"""Shape, stride and padding of AlexNet's convolutions (Krizhevsky 2014, one tower), as files name them."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS standardizes each channel of images in [−1, 1] by these."""


class Perceptual:
    """A perceptual distance: 0 for equal images, larger for more visible differences. Tables show its `name`,
    because the distances of different metrics cannot be compared."""

    def __init__(self, name: str, distance: Callable[[Tensor, Tensor], Tensor]):
        self.name, self.distance = name, distance

    @classmethod
    def find(cls, folder: str | Path | None = None) -> "Perceptual":
        """Returns LPIPS if a folder of weights is named (default: by the environment variable
        LATENTSCENES_LPIPS), else FLIP."""
        folder = folder or os.environ.get(FOLDER_VARIABLE)
        return cls("LPIPS", Lpips(Path(folder))) if folder else cls("FLIP", flip)

    @torch.no_grad()
    def __call__(self, a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
        """Distance of rendered images `a` from the true images `b`, both in [0, 1]."""
        return self.distance(a.clamp(0, 1), b.clamp(0, 1))


def flip(a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
    """Mean error of NVIDIA's FLIP (Andersson et al. 2020) in [0, 1], at 67 pixels per degree."""
    pairs = zip(*(images.float().permute(0, 2, 3, 1).cpu().numpy() for images in (a, b)), strict=True)
    errors = [
        flip_evaluator.evaluate(*map(np.ascontiguousarray, (truth, image)), "LDR", applyMagma=False)[1]
        for image, truth in pairs
    ]
    return torch.tensor(errors, device=a.device)


class Lpips:
    """LPIPS, version 0.1 (Zhang, Isola, Efros, Shechtman, Wang 2018), over the five stages of an AlexNet:

    d(a, b) = Σ_stage mean_pixels Σ_channel w_channel (â − b̂)²,   x̂ = features / their length over channels
    """

    def __init__(self, folder: Path):
        """Reads the .pth and .safetensors files in `folder`. Together they must hold AlexNet's weights
        (features.0.weight …) and the linear weights (lin0.model.1.weight …).

        Raises:
            UserError: weights are missing or have another shape.
        """
        state: dict[str, Tensor] = {}
        for path in sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")]):
            state |= read_weights(path)
        self.stages = []
        for k, (name, (shape, *_)) in enumerate(ALEXNET.items()):
            shapes = {
                f"{name}.weight": shape,
                f"{name}.bias": shape[:1],
                f"lin{k}.model.1.weight": (1, shape[0], 1, 1),
            }
            for key, wanted in shapes.items():
                found = tuple(state[key].shape) if key in state else None
                if found != wanted:
                    reason = f"{key} has shape {found}, not {wanted}" if found else f"no {key!r}"
                    raise UserError(
                        f"{folder}: not the weights of LPIPS ({reason}). The folder must hold AlexNet's "
                        "weights (features.0.weight …) and the linear weights (lin0.model.1.weight …) as "
                        f".pth or .safetensors files. Unset {FOLDER_VARIABLE} to use FLIP instead."
                    )
            self.stages.append([state[key] for key in shapes])

    def __call__(self, a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
        shift, scale = (torch.tensor(values, device=a.device).view(3, 1, 1) for values in (SHIFT, SCALE))
        x = (2 * torch.cat([a, b]) - 1 - shift) / scale
        distance = torch.zeros(len(a), device=a.device)
        for (name, (_, stride, padding)), stage in zip(ALEXNET.items(), self.stages, strict=True):
            weight, bias, linear = (tensor.to(a.device) for tensor in stage)
            if name in ("features.3", "features.6"):
                x = functional.max_pool2d(x, 3, 2)
            x = functional.conv2d(x, weight, bias, stride, padding).relu()
            first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            distance += ((first - second).square() * linear).sum(1).mean((1, 2))
        return distance
