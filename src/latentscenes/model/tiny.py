"""TAESD-family autoencoders from their published weight files, as layers of diffusers' AutoencoderTiny.

A weight file names each layer by its place ("3.conv.0.weight"). Plain convolutions separate the stages, so
their places give the number of blocks per stage. diffusers lacks one variant's bottleneck before a block; it
is added here. Images are in [0, 1] and the codec is deterministic.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec, read_weights
from latentscenes.model.diffusers import diffusers_library

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
