"""What a scene is made of: its own micro planes and a weighted sum of base planes that all scenes share.

T_i = concat(T_i^mic, Σ_k w_i^k B_k) on the feature axis, or their sum (3Da-AE, arXiv 2403.11678, section 3.2). Ours may also
own a mixing of features, T_i (I + A_i): few numbers that let a frozen field serve a scene as one of its own nearly would.

Scenes are rows of plain tables, not parameters of a module: a step gathers the rows of its own scenes as leaves, and
only those rows are ever updated, whatever the number of scenes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.config import PlanesConfig
from latentscenes.rendering.field import mix
from latentscenes.rendering.kernels import native


@dataclass
class SceneParameters:
    """The learned state of n scenes (or of a batch of them)."""

    micro: Float[Tensor, "n 3 r r m"]
    weights: Float[Tensor, "n k"]
    bias: Float[Tensor, "n b"]
    """b = 1 if scenes have a bias, else 0."""
    mixing: Float[Tensor, "n q q"]
    """A, what is added to the identity; q = f, the fused features, if scenes mix theirs, else 0."""

    NAMES = ("micro", "weights", "bias", "mixing")

    def __len__(self) -> int:
        return self.weights.shape[0]

    def tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}

    def gather(self, index: Int[Tensor, "s"], device: torch.device | str | None = None) -> "SceneParameters":
        """Copies of the rows at `index`, as leaves that take gradients; on a device if tables lie elsewhere."""
        return SceneParameters(
            **{name: table[index].to(device).requires_grad_() for name, table in self.tables().items()}
        )

    def one_by_one(self) -> "Iterator[SceneParameters]":
        """Each scene by itself (n = 1)."""
        return (self.gather(torch.tensor([row])) for row in range(len(self)))

    def to(self, device: torch.device | str) -> "SceneParameters":
        return SceneParameters(**{name: table.to(device) for name, table in self.tables().items()})

    def bytes_per_scene(self) -> int:
        """Size of one scene as held in memory."""
        return sum(table[0].numel() * table.element_size() for table in self.tables().values())


def random_bases(config: PlanesConfig, generator: torch.Generator) -> Float[Tensor, "k 3 r r g"]:
    """Random base planes."""
    count = config.bases if config.macro else 0
    shape = (count, 3, config.resolution, config.resolution, config.macro)
    return torch.randn(shape, generator=generator).mul_(config.initial_std)


def random_parameters(count: int, config: PlanesConfig, generator: torch.Generator) -> SceneParameters:
    """Random rows for `count` scenes; weights are scaled so that macro planes start like micro ones."""
    shape = (count, 3, config.resolution, config.resolution, config.micro)
    bases = config.bases if config.macro else 0
    return SceneParameters(
        micro=torch.randn(shape, generator=generator).mul_(config.initial_std),
        weights=torch.randn(count, bases, generator=generator) / math.sqrt(max(bases, 1)),
        bias=torch.zeros(count, int(config.bias and bases > 0)),
        mixing=zero_mixing(count, config),
    )


def zero_mixing(count: int, config: PlanesConfig) -> Float[Tensor, "n q q"]:
    """Zeros: nothing is mixed yet."""
    side = config.features if config.mixing else 0
    return torch.zeros(count, side, side)


def mean_parameters(count: int, learned: SceneParameters) -> SceneParameters:
    """`count` rows that all equal the mean of learned ones."""
    return SceneParameters(
        **{
            name: table.mean(0, keepdim=True).expand(count, *table.shape[1:]).clone()
            for name, table in learned.tables().items()
        }
    )


def compose(
    rows: SceneParameters, bases: Float[Tensor, "k 3 r r g"], fusion: str
) -> Float[Tensor, "s 3 r r f"]:
    """Tri-planes of a batch of scenes as they are rendered: fused, then mixed."""
    planes = fuse(rows, bases, fusion)
    return mix(planes, rows.mixing) if rows.mixing.numel() else planes


def fuse(
    rows: SceneParameters,
    bases: Float[Tensor, "k 3 r r g"],
    fusion: str,
    macro: Float[Tensor, "s 3 r r g"] | None = None,
) -> Float[Tensor, "s 3 r r f"]:
    """Micro and macro planes of a batch of scenes fused, not mixed; by the native kernel where it can. `macro` is what
    `macro_planes` gave, where that is known already."""
    if not rows.weights.shape[1]:
        return rows.micro
    if macro is not None:
        return join(rows.micro, macro, fusion)
    if native.serves(rows.micro, rows.weights, rows.bias, bases):
        return native.compose(rows.micro, rows.weights, rows.bias, bases, fusion)
    return fuse_in_torch(rows.micro, rows.weights, rows.bias, bases, fusion)


def fuse_in_torch(
    micro: Float[Tensor, "s 3 r r m"],
    weights: Float[Tensor, "s k"],
    bias: Float[Tensor, "s b"],
    bases: Float[Tensor, "k 3 r r g"],
    fusion: str,
) -> Float[Tensor, "s 3 r r f"]:
    """Micro and macro planes fused for k > 0, readable, on any device."""
    return join(micro, macro_planes(weights, bias, bases), fusion)


def macro_planes(
    weights: Float[Tensor, "s k"], bias: Float[Tensor, "s b"], bases: Float[Tensor, "k 3 r r g"]
) -> Float[Tensor, "s 3 r r g"]:
    """Σ_k w^k B_k, with the scene's bias if it has one."""
    macro = (weights @ bases.flatten(1)).unflatten(1, bases.shape[1:])
    return macro + bias[:, :, None, None, None] if bias.shape[1] else macro


def join(
    micro: Float[Tensor, "s 3 r r m"], macro: Float[Tensor, "s 3 r r g"], fusion: str
) -> Float[Tensor, "s 3 r r f"]:
    """Beside each other, or their sum."""
    if not micro.shape[-1]:
        return macro
    return torch.cat([micro, macro], -1) if fusion == "concat" else micro + macro
