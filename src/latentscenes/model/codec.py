"""Image ↔ latent: the protocol every codec keeps.

Notable:
- Images enter and leave in [0, 1]; whatever range the network wants is the adapter's business.
- `decode` does not clamp: a loss needs gradients beyond the range, and who shows or scores an image clamps it.
- Encoder and decoder parameters are told apart, all of them, so that a stage can train or freeze either.

One codec a file: identity, convolutional (our own), tiny (TAESD files), diffusers (Stable Diffusion's and others).
"""

from abc import ABC, abstractmethod
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError


class Codec(nn.Module, ABC):
    """An image autoencoder with c latent channels at 1/f of the image's height and width."""

    channels: int
    """c, latent channels."""
    downsampling: int
    """f, image pixels per latent pixel along one side."""

    @abstractmethod
    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Images in [0, 1] → latents of H/f x W/f pixels: the posterior's mean, or a sample of it when a generator
        is given and the codec is variational."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents → images, about [0, 1] but not clamped."""

    @abstractmethod
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Everything `encode` depends on."""

    @abstractmethod
    def decoder_parameters(self) -> list[nn.Parameter]:
        """Everything `decode` depends on."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image; a size that does not divide is refused."""
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"images of {width}x{height} pixels: this codec needs sides that divide by {self.downsampling}. "
                "Make the dataset at another size, or choose another codec."
            )
        return height // self.downsampling, width // self.downsampling

    @torch.no_grad()
    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        """The latents of a white image of height x width pixels: what rays that hit nothing should carry.
        No gradient; ask again after the encoder has changed."""
        self.latent_size(height, width)
        like = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        return self.encode(torch.ones(1, 3, height, width, dtype=like.dtype, device=like.device))[0]
