"""Our own codec: a small convolutional autoencoder without attention or normalisation layers.

Notable:
- Nothing has a bias, and the networks see 1 − image. So white is 0 in every layer, plain zero padding is exact for
  it, its latent is 0 up to the last pixel, and 0 decodes to white: empty space needs no learning, whatever the
  weights. (With biases, zero padding gives edges and corners other latents than the middle, which no rendered
  background can match.)
- The encoder ends in tanh: latents are in (−1, 1) as they come, where the renderer's features live.
- Residual branches start at zero, so depth costs nothing at the start of training.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.codecs import Codec


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x))))"""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.silu(self.first(nn.functional.silu(x))))


class ConvolutionalCodec(Codec):
    """Downsampling 2, 4 or 8: a pixel shuffle by 2, then strided convolutions; `width` channels at latent resolution,
    half as many at each finer one (never under 32, or `width` if smaller)."""

    def __init__(self, downsampling: int, channels: int, width: int, bfloat16: bool = True):
        super().__init__()
        self.downsampling, self.channels = downsampling, channels
        self.bfloat16 = bfloat16
        levels = {2: 1, 4: 2, 8: 3}[downsampling]
        widths = [max(min(width, 32), width >> level) for level in range(levels)][::-1]  # finest first

        encoder: list[nn.Module] = [nn.PixelUnshuffle(2), _convolution(12, widths[0])]
        for finer, coarser in zip(widths, widths[1:], strict=False):
            encoder += [Residual(finer), _convolution(finer, coarser, stride=2)]
        encoder += [Residual(width), Residual(width), nn.SiLU(), _convolution(width, channels), nn.Tanh()]
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [_convolution(channels, width), Residual(width), Residual(width), Residual(width)]
        for coarser, finer in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [_convolution(coarser, 4 * finer), nn.PixelShuffle(2), Residual(finer)]
        decoder += [nn.SiLU(), _convolution(widths[0], 12), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*decoder)
        self.to(memory_format=torch.channels_last)

    def _autocast(self, x: Tensor) -> torch.autocast:
        fast = x.is_cuda or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16 and fast)

    def encode(self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None) -> Float[Tensor, "n c h w"]:
        with self._autocast(images):
            return self.encoder((1 - images).contiguous(memory_format=torch.channels_last)).float()

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        with self._autocast(latents):
            return 1 - self.decoder(latents.contiguous(memory_format=torch.channels_last)).float()

    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        rows, columns = self.latent_size(height, width)
        return torch.zeros(self.channels, rows, columns, device=self.encoder[1].weight.device)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())

    def decoder_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())
