"""No codec: latents are the image itself, in (−1, 1). Tri-planes with it are the RGB baseline."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.model.codec import Codec


class IdentityCodec(Codec):
    """latents = 2 · image − 1; 3 channels, full resolution, nothing to learn."""

    channels = 3
    downsampling = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("where", torch.empty(0), persistent=False)  # remembers the device it was moved to

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n 3 H W"]:
        return 2 * images - 1

    def decode(self, latents: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
        return (latents + 1) / 2

    def encoder_parameters(self) -> list[nn.Parameter]:
        return []

    def decoder_parameters(self) -> list[nn.Parameter]:
        return []
