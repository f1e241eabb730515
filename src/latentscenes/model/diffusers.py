"""Pretrained autoencoders as codecs: those of the diffusers library, and TAESD weight files.

Notable:
- diffusers is optional (`pip install latentscenes[diffusers]`) and imported on first use. It needs no
  torchvision.
- diffusers has images in [−1, 1]; this class converts them from and to [0, 1].
- Latents are the network's own, without scaling_factor and shift_factor (Stable Diffusion 1.5: about ±30).
  The published method's tanh(0.02 z) expects these.
- Encoding includes the KL autoencoder's quant_conv, and decoding its post_quant_conv. Stages train them too.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec, read_weights

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
        """Loads an autoencoder in float32. `name` is a folder with config.json and .safetensors weights, a
        pipeline's folder with such a folder `vae`, or a name on the Hugging Face hub. The hub's local cache
        is read; the hub itself only if `allow_download`.

        Raises:
            UserError: diffusers is not installed, or nothing there can be loaded.
        """
        library = diffusers_library()
        folder = Path(name).expanduser()
        local = folder.is_dir()
        source = str(folder) if local else str(name)
        if subfolder is None and not (folder / "config.json").is_file():
            subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
        options: dict[str, Any] = {"local_files_only": local or not allow_download}
        if subfolder is not None:
            options["subfolder"] = subfolder
        try:
            config = library.AutoencoderKL.load_config(source, **options)
            kind = _class(library, config, source)
            autoencoder = kind.from_pretrained(
                source, use_safetensors=True, torch_dtype=torch.float32, **options
            )
        # Diffusers raises these for absent, unreachable or unfit files
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            advice = (
                "Give the folder that save_pretrained wrote: config.json beside .safetensors weights."
                if local or allow_download
                else "It is neither a folder nor in the local cache. Give a folder, or allow the download."
            )
            raise UserError(f"{name}: no autoencoder could be loaded ({reason}). {advice}") from None
        return cls(autoencoder)

    @property
    def config(self) -> dict[str, Any]:
        """The architecture as plain JSON, for `from_config`."""
        plain = {key: value for key, value in self.autoencoder.config.items() if not key.startswith("_")}
        return {"_class_name": type(self.autoencoder).__name__, **plain}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DiffusersCodec":
        """Builds the architecture with random weights, for a state_dict to be loaded into."""
        return cls(_class(diffusers_library(), config, "codec config").from_config(config))

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


def diffusers_library() -> ModuleType:
    """Imports diffusers. Raises UserError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"this codec needs the diffusers library, which cannot be imported ({error}). "
            "Run `pip install latentscenes[diffusers]`, or choose another codec.kind."
        ) from None
    return diffusers


def _class(library: ModuleType, config: dict[str, Any], source: str) -> type[nn.Module]:
    name = config.get("_class_name")
    if name not in CLASSES:
        raise UserError(
            f"{source}: its config.json is of class {name!r}, but only {' and '.join(CLASSES)} can be loaded."
        )
    return getattr(library, name)


# TAESD weight files


State = dict[str, Tensor]


class TinyCodec(Codec):
    """A TAESD encoder and decoder. Parameters have the same names as in the weight files."""

    def __init__(self, encoder: State, decoder: State):
        super().__init__()
        self.channels, width = decoder["1.weight"].shape[1], len(decoder["1.weight"])
        down, up = _blocks(encoder), _blocks(decoder, decodes=True)
        self.downsampling = 2 ** (len(down) - 1)
        if len(down) != len(up):
            raise ValueError(f"the encoder has {len(down)} stages, the decoder {len(up)}")
        network = diffusers_library().AutoencoderTiny(
            encoder_block_out_channels=[width] * len(down), num_encoder_blocks=down,
            decoder_block_out_channels=[width] * len(up), num_decoder_blocks=up,
            latent_channels=self.channels,
        )  # fmt: skip
        self.encoder = network.encoder.layers
        # Files count the clamp as layer 0
        self.decoder = nn.Sequential(nn.Identity(), *network.decoder.layers)
        for layers, state in ((self.encoder, encoder), (self.decoder, decoder)):
            for name, weight in state.items():
                if name.endswith(".pool.0.weight"):
                    _add_bottleneck(layers[int(name.split(".")[0])], *weight.shape[:2])
            layers.load_state_dict(state)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TinyCodec":
        """Loads from a folder with one file named *encoder* and one named *decoder*, .pth or .safetensors."""
        folder = Path(folder).expanduser()
        pair = []
        for part in ("encoder", "decoder"):
            found = [path for path in folder.glob(f"*{part}*") if path.suffix in (".pth", ".safetensors")]
            if len(found) != 1:
                raise UserError(
                    f"{folder}: found {len(found)} files *{part}*.pth or .safetensors, but needs exactly one."
                )
            pair += found
        try:
            return cls(*map(read_weights, pair))
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{pair[0]}, {pair[1]}: not the two weight files of one RGB autoencoder in the TAESD layout "
                f"({reason}). For weights in diffusers' layout, set codec.kind to diffusers."
            ) from None

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        self.latent_size(*images.shape[-2:])
        return self.encoder(images)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        return self.decoder(3 * (latents / 3).tanh())

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())

    def decoder_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())


def _blocks(state: State, decodes: bool = False) -> list[int]:
    """Returns the number of blocks of each stage: the layers between plain convolutions, without a decoder's
    ReLU in its first stage and its upsampling at the end of all stages but the last."""
    places = sorted(int(name.split(".")[0]) for name in state if name.count(".") == 1 and "weight" in name)
    counts = [after - before - 1 for before, after in zip(places, places[1:])]
    last = len(counts) - 1
    return [count - decodes * ((stage == 0) + (stage < last)) for stage, count in enumerate(counts)]


def _add_bottleneck(block: nn.Module, hidden: int, width: int) -> None:
    """Makes a block add pool(x), a normalized 1x1 bottleneck, to its input x first."""
    block.pool = nn.Sequential(
        nn.Conv2d(width, hidden, 1, bias=False), nn.GroupNorm(4, hidden), nn.ReLU(),
        nn.Conv2d(hidden, width, 1, bias=False),
    )  # fmt: skip
    block.register_forward_pre_hook(lambda block, inputs: inputs[0] + block.pool(inputs[0]))
