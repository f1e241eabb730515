"""Image ↔ latent: the protocol every codec keeps.

Notable:
- Images enter and leave in [0, 1]; whatever range the network wants is the adapter's business.
- `decode` does not clamp: a loss needs gradients beyond the range, and who shows or scores an image clamps it.
- Encoder and decoder parameters are told apart, all of them, so that a stage can train or freeze either.

One codec a file: identity, convolutional (our own), tiny (TAESD files), diffusers (Stable Diffusion's and others).
"""

from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
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


class IdentityCodec(Codec):
    """latents = 2 · image − 1; 3 channels, full resolution, nothing to learn."""

    channels = 3
    downsampling = 1

    def __init__(self):
        super().__init__()
        self.register_buffer(
            "where", torch.empty(0), persistent=False
        )  # remembers the device it was moved to

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
    """The tensors of a .safetensors, .pth or .pt file by name, floating-point ones as float32."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 — broken files raise half a dozen kinds; in each case the file is at fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as weights ({reason}). Give a .safetensors file, or a .pth that holds tensors only."
        ) from None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise UserError(
            f"{path}: holds something else than named tensors. Save the network's state_dict alone."
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
