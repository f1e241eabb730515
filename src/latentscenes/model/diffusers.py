"""Autoencoders of the diffusers library (Stable Diffusion's KL autoencoder, TAESD) as codecs.

Notable:
- diffusers is imported only when one is asked for: `pip install latentscenes[diffusers]`. torchvision is not needed.
- Both classes take and give images in [−1, 1]; here they are in [0, 1] like everywhere else.
- Latents are the network's own: neither scaling_factor nor shift_factor is applied (for Stable Diffusion 1.5 they span
  about ±30), as the published method's tanh(0.02 z) expects.
- The KL autoencoder's quant_conv is part of encoding and post_quant_conv of decoding, so stages train them with it.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


class DiffusersCodec(Codec):
    """An AutoencoderKL or AutoencoderTiny behind the codec protocol."""

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.variational = type(autoencoder).__name__ == "AutoencoderKL"
        self.channels = config.latent_channels
        stages = config.block_out_channels if self.variational else config.encoder_block_out_channels
        self.downsampling = 2 ** (len(stages) - 1)

    @classmethod
    def load(
        cls, name: str | Path, subfolder: str | None = None, allow_download: bool = False
    ) -> "DiffusersCodec":
        """From a folder that holds config.json and .safetensors weights (or a pipeline's folder with such a `vae`
        folder inside), or from a name on the Hugging Face hub: from its local cache, or the hub itself if
        `allow_download`. In float32."""
        library = _diffusers()
        folder = Path(name).expanduser()
        local = folder.is_dir()
        if (
            local
            and subfolder is None
            and not (folder / "config.json").is_file()
            and (folder / "vae" / "config.json").is_file()
        ):
            subfolder = "vae"
        options: dict[str, Any] = {"local_files_only": local or not allow_download}
        if subfolder is not None:
            options["subfolder"] = subfolder
        source = str(folder) if local else str(name)
        try:
            config = library.AutoencoderKL.load_config(source, **options)
            kind = _class(library, config, source)
            autoencoder = kind.from_pretrained(
                source, use_safetensors=True, torch_dtype=torch.float32, **options
            )
        except (OSError, ValueError) as error:  # what diffusers raises for absent, unreachable or unfit files
            reason = " ".join(str(error).split())[:300]
            advice = (
                "Give the folder that save_pretrained wrote: config.json beside .safetensors weights."
                if local or allow_download
                else "It is neither a folder nor in the local cache; give a folder, or allow the download."
            )
            raise UserError(f"{name}: no autoencoder could be loaded ({reason}). {advice}") from None
        return cls(autoencoder)

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture; plain JSON."""
        plain = {key: value for key, value in self.autoencoder.config.items() if not key.startswith("_")}
        return {"_class_name": type(self.autoencoder).__name__, **plain}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DiffusersCodec":
        """The architecture with fresh weights, to load a state_dict into: no folder or hub is needed."""
        return cls(_class(_diffusers(), config, "codec config").from_config(config))

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        self.latent_size(*images.shape[-2:])
        encoded = self.autoencoder.encode(2 * images - 1)
        if not self.variational:
            return encoded.latents
        return encoded.latent_dist.mean if generator is None else encoded.latent_dist.sample(generator)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        return (self.autoencoder.decode(latents).sample + 1) / 2

    def encoder_parameters(self) -> list[nn.Parameter]:
        return self._parameters_of("encoder", "quant_conv")

    def decoder_parameters(self) -> list[nn.Parameter]:
        return self._parameters_of("decoder", "post_quant_conv")

    def _parameters_of(self, *names: str) -> list[nn.Parameter]:
        parts = [part for name in names if (part := getattr(self.autoencoder, name, None)) is not None]
        return [parameter for part in parts for parameter in part.parameters()]


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"this codec needs the diffusers library, which cannot be imported ({error}). "
            "Run `pip install latentscenes[diffusers]`, or choose another codec."
        ) from None
    return diffusers


def _class(library: ModuleType, config: dict[str, Any], source: str) -> type[nn.Module]:
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(
            f"{source}: its config.json is of class {name!r}; only {' and '.join(CLASSES)} are known."
        )
    return getattr(library, name)
