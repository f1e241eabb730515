"""How close a rendered image is to the true one: one number per view.

Notable:
- Both images are clamped to [0, 1] first: what a screen shows is what is scored.
- One number per view. Averaging is the caller's: views of a scene first, then scenes (never the MSE of a batch).
"""

import os
from importlib import metadata
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from latentscenes.core.errors import UserError
from latentscenes.model.codec import read_weights

PSNR_CAP = 100.0
"""dB given to identical images, whose true PSNR is infinite: averages must stay finite. (8-bit pictures of 128 x 128
that differ by one step in one value have 95 dB.)"""


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
        raise ValueError(
            f"SSIM needs images of at least {2 * SSIM_RADIUS + 1} pixels a side, got {tuple(a.shape[-2:])}."
        )
    a, b = a.clamp(0, 1).double(), b.clamp(0, 1).double()
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=a.dtype, device=a.device)
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    window = window / window.sum()

    moments = torch.stack(
        [a, b, a * a, b * b, a * b]
    )  # (5, n, 3, H, W), each smoothed along rows, then columns
    moments = functional.conv2d(moments.flatten(0, 2)[:, None], window.view(1, 1, 1, -1))
    moments = functional.conv2d(moments, window.view(1, 1, -1, 1))
    mean_a, mean_b, square_a, square_b, product = moments.view(5, *a.shape[:2], *moments.shape[-2:])
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    covariance = product - mean_a * mean_b

    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (luminance * structure).mean((1, 2, 3)).float()


FOLDER_VARIABLE = "LATENTSCENES_LPIPS"
"""Environment variable that names a folder with true LPIPS weights, for those who have them."""
SHIFT_TOLERANT = ("stlpips-pytorch", "alex_shift_tolerant.pth")
"""The distribution whose installed files hold ST-LPIPS weights, and the file."""

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Per-channel standardization of images in [−1, 1], from the published weight files."""


class Perceptual(nn.Module):
    """A learned perceptual distance (Zhang, Isola, Efros, Shechtman, Wang 2018; LPIPS), smaller is closer:

        d(a, b) = Σ_stage mean_pixels Σ_channel w_channel (â − b̂)²,   x̂ = features / their length over channels

    over the five stages of an AlexNet. `find` picks what is on disk and says which by `name`, to be printed with the
    numbers, for the two are not comparable:

    "LPIPS"     AlexNet of ImageNet and the v0.1 linear weights, from a folder the user names.
    "ST-LPIPS (reconstructed)"
                The shift-tolerant relative of Ghildyal and Liu (ECCV 2022): an AlexNet with blurred pooling, trained
                from scratch. `_shift_tolerant_stages` says how far its architecture is known.
    """

    def __init__(self, name: str, stages: list[nn.Sequential], weights: list[Float[Tensor, "1 c 1 1"]]):
        super().__init__()
        self.name = name
        self.stages = nn.ModuleList(stages)
        for k, weight in enumerate(weights):
            self.register_buffer(f"weight{k}", weight)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def find(cls, folder: str | Path | None = None) -> "Perceptual | None":
        """True LPIPS from `folder` (default: environment variable LATENTSCENES_LPIPS), else ST-LPIPS where the
        distribution stlpips-pytorch is installed (its weight file is read, its code never imported), else None."""
        folder = folder or os.environ.get(FOLDER_VARIABLE)
        if folder:
            return cls._true(Path(folder))
        path = _installed_file(*SHIFT_TOLERANT)
        return None if path is None else cls._shift_tolerant(path)

    @classmethod
    def _true(cls, folder: Path) -> "Perceptual":
        """From a folder of two .pth or .safetensors files: AlexNet's (features.0.weight …) and the linear weights'."""
        state: dict[str, Tensor] = {}
        for path in sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")]):
            state |= read_weights(path)
        names = [f"features.{place}" for place in (0, 3, 6, 8, 10)]
        advice = (
            f"For LPIPS a folder must hold an AlexNet's weights (features.0.weight …) and the linear weights "
            f"(lin0.model.1.weight …) as .pth or .safetensors; or unset {FOLDER_VARIABLE}."
        )
        return cls("LPIPS", *_assemble(state, names, _alexnet_stages(), str(folder), advice))

    @classmethod
    def _shift_tolerant(cls, path: Path) -> "Perceptual":
        names = [f"net.slice{place}" for place in ("1.0", "2.5", "3.9", "4.11", "5.13")]
        advice = "Install stlpips-pytorch 0.0.2, whose layout is known, or uninstall it to do without."
        return cls(
            "ST-LPIPS (reconstructed)",
            *_assemble(read_weights(path), names, _shift_tolerant_stages(), str(path), advice),
        )

    @torch.no_grad()
    def forward(self, a: Float[Tensor, "n 3 H W"], b: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n"]:
        """Distance per view of images in [0, 1]."""
        x = (2 * torch.cat([a, b]).clamp(0, 1) - 1 - self.shift) / self.scale
        distance = torch.zeros(len(a), device=a.device)
        for k, stage in enumerate(self.stages):
            x = stage(x)
            first, second = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            distance += ((first - second).square() * self.get_buffer(f"weight{k}")).sum(1).mean((1, 2))
        return distance


class Blur(nn.Module):
    """Binomial 3 x 3 low-pass filter before subsampling by 2, edges by reflection (Zhang 2019, "BlurPool")."""

    def forward(self, x: Float[Tensor, "n c H W"]) -> Float[Tensor, "n c h w"]:
        line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
        kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
        return functional.conv2d(
            functional.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1]
        )


def _alexnet_stages() -> list[nn.Sequential]:
    """AlexNet (Krizhevsky 2014, one tower) up to its fifth convolution, cut after each relu."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _shift_tolerant_stages() -> list[nn.Sequential]:
    """An AlexNet that fits the ST-LPIPS weight file; its exact original could not be established.

    Read off the file: kernel sizes and channels, and that 3 x 3 binomial blurs follow the first convolution and
    precede the second and third. Inferred: relu and max-pooling of 3 at stride 1 where the file's numbering leaves
    gaps (the arrangement of Zhang 2019), each blur halving with reflected edges, zero padding elsewhere, and stride 1
    in the first convolution. On the example pair of the authors' page (ex_p0, ex_ref) this gives 0.8225 where the
    page says 0.7778; stride 2 gives 0.3215. Other edges and poolings come near the page's value only by chance, none
    exactly. Distances order distortions as they should, but compare within this package only, never with published
    ST-LPIPS figures: hence "reconstructed" in the name.
    """
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=1, padding=2), Blur(), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), Blur(), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1), Blur(), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _assemble(
    state: dict[str, Tensor], names: list[str], stages: list[nn.Sequential], source: str, advice: str
) -> tuple[list[nn.Sequential], list[Tensor]]:
    """Put each named convolution into its stage; return the stages and the linear weights."""
    try:
        for name, stage in zip(names, stages, strict=True):
            convolution = next(layer for layer in stage if isinstance(layer, nn.Conv2d))
            convolution.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})
        weights = [state[f"lin{k}.model.1.weight"] for k in range(len(stages))]
        for weight, name in zip(weights, names, strict=True):
            if weight.shape != (1, len(state[f"{name}.bias"]), 1, 1):
                raise ValueError(f"linear weights of shape {tuple(weight.shape)} for {name}")
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise UserError(f"{source}: not the weights of this perceptual metric ({reason}). {advice}") from None
    return stages, weights


def _installed_file(distribution: str, name: str) -> Path | None:
    """A data file of an installed distribution, found without importing it."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in found if path.is_file()), None)
