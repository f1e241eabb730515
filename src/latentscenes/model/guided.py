"""Our codec for scenes: latents that start with colors, and features that tell the decoder what is finer.

Notable:
- The first 3 channels are the mean color of each f x f patch, 2 · color − 1. They are nearly a function of
  points in space. So the rendered colors of a scene can be learned and shown at any resolution, without the
  decoder.
- The other channels are features that scenes learn through the decoder. No encoder computes them from
  images: one that was trained along gave worse scenes (docs/results/latent.md). Encoding sets them to 0.
- The decoder enlarges the colors bilinearly. A convolutional network adds what colors and features tell about
  edges and texture. It starts at zero, so it only ever improves on the enlargement.
- No layer has a bias, and the network sees 1 − color. So white with zero features stays white.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.model.codec import COLORS, Codec
from latentscenes.model.convolutional import decoder_network, fast_autocast


class GuidedCodec(Codec):
    """Downsampling f is 2, 4 or 8. Of the c channels, 3 are colors and the others features."""

    leading_colors = True
    encodes_all = False

    def __init__(self, downsampling: int, channels: int, width: int, bfloat16: bool = True):
        super().__init__()
        self.downsampling, self.channels, self.bfloat16 = downsampling, channels, bfloat16
        self.decoder = decoder_network(downsampling, width, channels)
        self.to(memory_format=torch.channels_last)

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        self.latent_size(*images.shape[2:])
        colors = 2 * nn.functional.avg_pool2d(images, self.downsampling) - 1
        return nn.functional.pad(colors, (0, 0, 0, 0, 0, self.channels - COLORS))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        ink = (1 - latents[:, :COLORS]) / 2
        enlarged = nn.functional.interpolate(ink, scale_factor=self.downsampling, mode="bilinear")
        seen = torch.cat([ink, latents[:, COLORS:]], 1).contiguous(memory_format=torch.channels_last)
        with fast_autocast(seen, self.bfloat16):
            return 1 - enlarged - self.decoder(seen).float()

    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        white = next(self.parameters()).new_zeros(self.channels, *self.latent_size(height, width))
        white[:COLORS] = 1
        return white

    def encoder_parameters(self) -> list[nn.Parameter]:
        return []

    def decoder_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())
