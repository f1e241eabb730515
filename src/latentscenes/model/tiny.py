"""TAESD-family autoencoders from their published weight files: no diffusers needed.

TAESD (Ollin Boer Bohan, MIT license) distils large image autoencoders into a few convolutions:

    encoder   convolution; per halving: a stride-2 convolution, then blocks; convolution to c channels
    decoder   soft clamp 3 tanh(z / 3); convolution, relu; per doubling: blocks, nearest upsampling, convolution;
              block, convolution to RGB
    block     relu(x + conv relu conv relu conv (x)), before which some variants add a 1x1 bottleneck to x

Notable: weight files name layers by their place in the sequence ("3.conv.0.weight"), so the architecture follows from
names and shapes: a convolution without bias halves (encoder) or follows a doubling (decoder), and the numbers missing
in the decoder are its layers without weights. Images are in [0, 1] and the codec is deterministic.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.errors import UserError
from latentscenes.model.codec import Codec, read_weights

State = dict[str, Tensor]


class TinyCodec(Codec):
    """An encoder and a decoder built from their weights, under the names the weights had."""

    def __init__(self, encoder: State, decoder: State):
        super().__init__()
        self.encoder, self.decoder = _build(encoder, "encoder"), _build(decoder, "decoder")
        first, last = self.encoder[0].weight, self.encoder[-1].weight
        entrance, leaving = self.decoder[1].weight.shape[1], self.decoder[-1].weight.shape[0]
        self.channels, colors = last.shape[0], first.shape[1]
        halvings = sum(getattr(layer, "stride", None) == (2, 2) for layer in self.encoder)
        doublings = sum(isinstance(layer, nn.Upsample) for layer in self.decoder)
        self.downsampling = 2**halvings
        if (colors, self.channels, halvings) != (leaving, entrance, doublings) or colors != 3:
            raise UserError(
                f"tiny codec: the encoder turns {colors} channels into {self.channels} at 1/{2**halvings} size, the decoder "
                f"{entrance} into {leaving} at {2**doublings} times the size. Give the two files of one autoencoder for RGB images."
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TinyCodec":
        """From a folder with one file named *encoder* and one named *decoder*, .pth or .safetensors."""
        folder = Path(folder).expanduser()
        pair = []
        for part in ("encoder", "decoder"):
            found = [path for path in folder.glob(f"*{part}*") if path.suffix in (".pth", ".safetensors")]
            if len(found) != 1:
                raise UserError(
                    f"{folder}: found {len(found)} files *{part}*.pth or .safetensors, need exactly one."
                )
            pair += found
        return cls.load(*pair)

    @classmethod
    def load(cls, encoder: str | Path, decoder: str | Path) -> "TinyCodec":
        """From a pair of .pth or .safetensors files."""
        states = [read_weights(encoder), read_weights(decoder)]
        for path, state, entrance in zip((encoder, decoder), states, ("0.weight", "1.weight"), strict=True):
            if entrance not in state or not all(name.split(".")[0].isdigit() for name in state):
                raise UserError(
                    f"{path}: not in the TAESD layout (layers by number, the first {entrance!r}); it begins with "
                    f"{next(iter(state))!r}. Weights in diffusers' layout load as a diffusers codec, from their folder."
                )
        try:
            return cls(*states)
        except UserError as error:
            raise UserError(f"{encoder}, {decoder}: {error}") from None

    def encode(
        self, images: Float[Tensor, "n 3 H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n c h w"]:
        self.latent_size(*images.shape[-2:])
        return self.encoder(images)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        return self.decoder(latents)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())

    def decoder_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())


class SoftClamp(nn.Module):
    """3 tanh(x / 3): latents stay within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


class Block(nn.Module):
    """Three 3x3 convolutions with a skip; with `hidden`, a normalized 1x1 bottleneck is added to the input first."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 0):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)
        if hidden:
            self.pool = nn.Sequential(
                nn.Conv2d(inputs, hidden, 1, bias=False), nn.GroupNorm(4, hidden), nn.ReLU(),
                nn.Conv2d(hidden, inputs, 1, bias=False),
            )  # fmt: skip

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o h w"]:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return (self.conv(x) + self.skip(x)).relu()


def _last(state: State) -> int:
    """The number of the last layer."""
    return max(int(name.split(".")[0]) for name in state)


def _build(state: State, half: str) -> nn.Sequential:
    """The network a state belongs to, holding it. `half` is "encoder" or "decoder"."""
    try:
        layers = nn.Sequential(*[_layer(state, place, half) for place in range(_last(state) + 1)])
        layers.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{half}: its layers are not those of the TAESD family ({reason}). Use another kind of codec for these weights."
        ) from None
    return layers


def _layer(state: State, place: int, half: str) -> nn.Module:
    """The layer at a place: read off its weights or, where it has none, off the place."""
    if (weight := state.get(f"{place}.weight")) is not None:
        biased = f"{place}.bias" in state
        stride = 2 if half == "encoder" and not biased else 1
        return nn.Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[-1], stride, weight.shape[-1] // 2, bias=biased
        )
    if (weight := state.get(f"{place}.conv.0.weight")) is not None:
        bottleneck = state.get(f"{place}.pool.0.weight")
        return Block(weight.shape[1], weight.shape[0], 0 if bottleneck is None else bottleneck.shape[0])
    if half == "decoder" and place == 0:
        return SoftClamp()
    if half == "decoder" and place == 2:
        return nn.ReLU()
    if half == "decoder" and f"{place + 1}.weight" in state:
        return nn.Upsample(scale_factor=2)
    raise ValueError(f"nothing at place {place}")
