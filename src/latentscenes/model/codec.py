"""The interface of all codecs (image autoencoders), and the identity codec.

Notable:
- Images are in [0, 1] on both sides. A codec converts to the range of its network.
- `decode` does not clamp, because losses need gradients beyond the range. Code that shows or scores
  images clamps.
- Each parameter belongs to the encoder or to the decoder, so that a stage can train or freeze either.

Other codecs: guided and convolutional (our own), tiny (TAESD weight files), diffusers (Stable Diffusion's
and others).
"""

from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError
from latentscenes.core.files import load_tensors
from latentscenes.core.reading import require_regular

COLORS = 3
"""Channels of a color."""


class Codec(nn.Module, ABC):
    """An image autoencoder with c latent channels at 1/f of the image's height and width."""

    channels: int
    """c, latent channels."""
    downsampling: int
    """f, image pixels per latent pixel along one side."""
    leading_colors: bool = False
    """Whether the first 3 latent channels are 2 · color − 1, so that they can be rendered at any
    resolution."""
    encodes_all: bool = True
    """Whether `encode` computes all channels, so that decoding its result is a ceiling for renders."""

    @abstractmethod
    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Encodes images in [0, 1] to latents of H/f x W/f pixels. A variational codec returns the
        posterior's mean, or with a generator a sample of it."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decodes latents to images in about [0, 1], not clamped."""

    @abstractmethod
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Returns all parameters that `encode` depends on."""

    @abstractmethod
    def decoder_parameters(self) -> list[nn.Parameter]:
        """Returns all parameters that `decode` depends on."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of the latents of an image.

        Raises:
            UserError: a side is not a multiple of the downsampling factor.
        """
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"images of {width}x{height} pixels: this codec needs sides that divide by "
                f"{self.downsampling}. "
                "Make the dataset at another size, or choose another codec.kind."
            )
        return height // self.downsampling, width // self.downsampling

    @torch.no_grad()
    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        """Returns the latents of a white image of height x width pixels, which rays that hit nothing should
        have. They carry no gradient and change with the encoder."""
        self.latent_size(height, width)
        like = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        return self.encode(torch.ones(1, 3, height, width, dtype=like.dtype, device=like.device))[0]


class IdentityCodec(Codec):
    """Latents are 2 · image − 1: 3 channels, full resolution, no parameters."""

    channels = 3
    downsampling = 1
    leading_colors = True

    def __init__(self):
        super().__init__()
        self.register_buffer("where", torch.empty(0), persistent=False)  # tells `background` the device

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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors, .pth or .pt file by name, floating-point ones as float32.

    Raises:
        UserError: the file cannot be read, or holds something other than named tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_tensors(path)
        else:
            require_regular(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise errors of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as weights ({reason}). "
            "Give a .safetensors file, or a .pth file that holds only tensors."
        ) from None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise UserError(
            f"{path}: holds something other than named tensors. Save only the network's state_dict."
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
