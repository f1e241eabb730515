"""Our own codec: principal components of image patches, plus small networks that learn the rest.

Notable:
- Latents start as the principal components of f x f patches. This linear codec alone beats minutes of
  training from random weights. The networks start at zero and improve on it.
- Components are orthonormal and have one scale. So an error weighs the same in latents and in pixels, and
  latents of images in [0, 1] start inside (−1, 1).
- No layer has a bias, and the networks see 1 − image. So white is 0 in every layer and up to the image
  border, and 0 decodes to white: the background needs no learning. (With biases, zero padding would give
  edges other latents than the middle, and no rendered background could match them.)
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.model.codec import Codec


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    return layer


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x))))"""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = convolution(width, width), zeroed(convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.silu(self.first(nn.functional.silu(x))))


def _widths(downsampling: int, width: int) -> list[int]:
    """Returns the channels of a network's layers at 1/2, 1/4 and 1/8 of the image's resolution."""
    levels = {2: 1, 4: 2, 8: 3}[downsampling]
    return [max(min(width, 32), width >> level) for level in range(levels)][::-1]


def decoder_network(downsampling: int, width: int, channels: int) -> nn.Sequential:
    """Returns layers from latents to 1 − image. Zero maps to zero, and at the start all maps to zero."""
    widths = _widths(downsampling, width)
    layers: list[nn.Module] = [convolution(channels, width), *(Residual(width) for _ in range(3))]
    for coarser, finer in zip(widths[:0:-1], widths[-2::-1], strict=True):
        layers += [convolution(coarser, 4 * finer), nn.PixelShuffle(2), Residual(finer)]
    layers += [nn.SiLU(), zeroed(convolution(widths[0], 12)), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


def fast_autocast(x: Tensor, wanted: bool) -> torch.autocast:
    """Lets layers compute in bfloat16 if `wanted`, on hardware that is faster at it."""
    fast = x.is_cuda or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(x.device.type, torch.bfloat16, enabled=wanted and fast)


class ConvolutionalCodec(Codec):
    """Downsampling f is 2, 4 or 8. Both networks work at half the image resolution and coarser. They have
    `width` channels at latent resolution and half as many at each finer one, but at least min(32, width)."""

    def __init__(self, downsampling: int, channels: int, width: int, bfloat16: bool = True):
        super().__init__()
        self.downsampling, self.channels = downsampling, channels
        self.bfloat16 = bfloat16
        widths = _widths(downsampling, width)
        encoder: list[nn.Module] = [nn.PixelUnshuffle(2), convolution(12, widths[0])]
        for finer, coarser in zip(widths, widths[1:], strict=False):
            encoder += [Residual(finer), convolution(finer, coarser, stride=2)]
        encoder += [Residual(width), Residual(width), nn.SiLU(), zeroed(convolution(width, channels))]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = decoder_network(downsampling, width, channels)

        basis = torch.linalg.qr(torch.randn(3 * downsampling**2, channels))[0]
        self.analysis = nn.Parameter(basis.t().contiguous()[:, :, None, None])
        self.synthesis = nn.Parameter(basis.contiguous()[:, :, None, None])
        self.scale = 1 / math.sqrt(3 * downsampling**2)
        """Keeps latents in (−1, 1): components have unit length, patches of values in [0, 1] at most 1 /
        scale."""
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def fit_components(self, images: Float[Tensor, "n 3 H W"]) -> None:
        """Sets the linear part to the principal components of these images' patches. They are centered on
        white, not on their mean, so that white stays 0."""
        patches = (
            nn.functional.pixel_unshuffle(1 - images, self.downsampling).transpose(0, 1).flatten(1).double()
        )
        _, vectors = torch.linalg.eigh(patches @ patches.t() / patches.shape[1])
        largest = vectors[:, -self.channels :].flip(1)
        largest = largest * largest.sum(0).sign()  # fixes eigenvectors' arbitrary signs: darker is larger
        self.synthesis.copy_(largest.float()[:, :, None, None])
        self.analysis.copy_(largest.t().float()[:, :, None, None])

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        ink = (1 - images).contiguous(memory_format=torch.channels_last)
        linear = nn.functional.conv2d(
            nn.functional.pixel_unshuffle(ink, self.downsampling), self.analysis * self.scale
        )
        with fast_autocast(ink, self.bfloat16):
            return linear + self.encoder(ink).float() * self.scale

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        latents = latents.contiguous(memory_format=torch.channels_last)
        linear = nn.functional.pixel_shuffle(
            nn.functional.conv2d(latents, self.synthesis / self.scale), self.downsampling
        )
        with fast_autocast(latents, self.bfloat16):
            return 1 - linear - self.decoder(latents / (self.scale * self.downsampling)).float()

    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        rows, columns = self.latent_size(height, width)
        return torch.zeros(self.channels, rows, columns, device=self.analysis.device)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return [self.analysis, *self.encoder.parameters()]

    def decoder_parameters(self) -> list[nn.Parameter]:
        return [self.synthesis, *self.decoder.parameters()]
