"""Micro-macro tri-planes: each scene has its own micro planes and a weighted sum of shared base planes.

T_i = concat(T_i^mic, Σ_k w_i^k B_k) on the feature axis, or their sum (3Da-AE, arXiv 2403.11678, section
3.2). A scene may also have a matrix A_i that mixes its features, T_i (I + A_i): with few numbers it adapts a
scene to a frozen field.

Scenes are rows of plain tables, not module parameters. A step gathers the rows of its scenes as leaves and
updates only those, so its cost does not depend on the number of scenes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.core.config import PlanesConfig
from latentscenes.rendering.field import mix
from latentscenes.rendering.kernels import native

Metric = Literal["planes", "cosine"]
"""Distance between scenes' weights (`weight_distances`)."""


@dataclass
class SceneParameters:
    """The learned parameters of n scenes."""

    micro: Float[Tensor, "n 3 r r m"]
    weights: Float[Tensor, "n k"]
    bias: Float[Tensor, "n b"]
    """b = 1 if scenes have a bias, else 0."""
    mixing: Float[Tensor, "n q q"]
    """A, without the identity; q = f, the fused features, if scenes mix them, else 0."""
    box: Float[Tensor, "n c"] | None = None
    """Center and half sides of each scene's box, world units, not learned; c = 0 (the default) if scenes have
    the model's box."""

    NAMES = ("micro", "weights", "bias", "mixing", "box")
    LEARNED = NAMES[:-1]

    def __post_init__(self) -> None:
        if self.box is None:
            self.box = self.weights.new_zeros(len(self), 0)

    def __len__(self) -> int:
        return self.weights.shape[0]

    def tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}

    def gather(self, index: Int[Tensor, "s"], device: torch.device | str | None = None) -> "SceneParameters":
        """Copies the rows at `index`, to `device` if given. What is learned becomes leaves with gradients."""
        return SceneParameters(
            **{
                name: table[index].to(device).requires_grad_(name in self.LEARNED)
                for name, table in self.tables().items()
            }
        )

    def rows(self, index: Int[Tensor, "s"]) -> "SceneParameters":
        """Copies the rows at `index`."""
        return SceneParameters(**{name: table[index].clone() for name, table in self.tables().items()})

    def one_by_one(self) -> "Iterator[SceneParameters]":
        """Yields each scene alone (n = 1)."""
        return (self.gather(torch.tensor([row])) for row in range(len(self)))

    def to(self, device: torch.device | str) -> "SceneParameters":
        return SceneParameters(**{name: table.to(device) for name, table in self.tables().items()})

    @property
    def own_box(self) -> Box | None:
        """The box of one scene (n = 1); None if it has the model's."""
        return Box.of(self.box[0]) if self.box.numel() else None


def random_bases(config: PlanesConfig, generator: torch.Generator) -> Float[Tensor, "k 3 r r g"]:
    """Draws base planes."""
    count = config.bases if config.macro else 0
    shape = (count, 3, config.resolution, config.resolution, config.macro)
    return torch.randn(shape, generator=generator).mul_(config.initial_std)


def scene_shapes(config: PlanesConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one scene's tables, by the names of `SceneParameters.NAMES`."""
    side, bases = config.resolution, config.bases if config.macro else 0
    mixed = config.features if config.mixing else 0
    return {
        "micro": (3, side, side, config.micro),
        "weights": (bases,),
        "bias": (int(config.bias and bases > 0),),
        "mixing": (mixed, mixed),
    }


def random_parameters(count: int, config: PlanesConfig, generator: torch.Generator) -> SceneParameters:
    """Draws rows for `count` scenes. Weights are scaled so that macro planes vary like micro planes."""
    shapes = {name: (count, *shape) for name, shape in scene_shapes(config).items()}
    bases = shapes["weights"][1]
    return SceneParameters(
        micro=torch.randn(shapes["micro"], generator=generator).mul_(config.initial_std),
        weights=torch.randn(shapes["weights"], generator=generator) / math.sqrt(max(bases, 1)),
        bias=torch.zeros(shapes["bias"]),
        mixing=torch.zeros(shapes["mixing"]),
    )


def zero_mixing(count: int, config: PlanesConfig) -> Float[Tensor, "n q q"]:
    """Returns A = 0 for each scene."""
    return torch.zeros(count, *scene_shapes(config)["mixing"])


def mean_parameters(count: int, learned: SceneParameters) -> SceneParameters:
    """Returns `count` rows, each the mean of learned rows."""
    return SceneParameters(
        **{
            name: table.mean(0, keepdim=True).expand(count, *table.shape[1:]).clone()
            for name, table in learned.tables().items()
        }
    )


def compose(
    rows: SceneParameters, bases: Float[Tensor, "k 3 r r g"], fusion: str
) -> Float[Tensor, "s 3 r r f"]:
    """Returns the tri-planes of scenes as they are rendered: fused, then mixed."""
    planes = fuse(rows, bases, fusion)
    return mix(planes, rows.mixing) if rows.mixing.numel() else planes


def fuse(
    rows: SceneParameters,
    bases: Float[Tensor, "k 3 r r g"],
    fusion: str,
    macro: Float[Tensor, "s 3 r r g"] | None = None,
) -> Float[Tensor, "s 3 r r f"]:
    """Fuses micro and macro planes without mixing, by the native kernel where it can. `macro` is the result
    of `macro_planes`, if it is known already."""
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
    """Fuses micro and macro planes in plain torch, for k > 0."""
    return join(micro, macro_planes(weights, bias, bases), fusion)


def macro_planes(
    weights: Float[Tensor, "s k"], bias: Float[Tensor, "s b"], bases: Float[Tensor, "k 3 r r g"]
) -> Float[Tensor, "s 3 r r g"]:
    """Returns Σ_k w^k B_k, plus the scene's bias if it has one."""
    macro = (weights @ bases.flatten(1)).unflatten(1, bases.shape[1:])
    return macro + bias[:, :, None, None, None] if bias.shape[1] else macro


def base_products(bases: Float[Tensor, "k 3 r r g"]) -> Float[Tensor, "k k"]:
    """Returns the mean products of base planes."""
    flat = bases.flatten(1)
    return flat @ flat.T / flat.shape[1]


def weight_distances(
    table: Float[Tensor, "n k"], wanted: Float[Tensor, "k"], products: Float[Tensor, "k k"], metric: Metric
) -> Float[Tensor, "n"]:
    """Returns distances of scenes' weights from others: the root mean square difference of macro planes (with
    `products` of bases), or 1 minus the cosine between the weights."""
    if metric == "cosine":
        return 1 - torch.cosine_similarity(table, wanted[None])
    offset = table - wanted
    return ((offset @ products) * offset).sum(1).clamp_min(0).sqrt()


def join(
    micro: Float[Tensor, "s 3 r r m"], macro: Float[Tensor, "s 3 r r g"], fusion: str
) -> Float[Tensor, "s 3 r r f"]:
    """Concatenates micro and macro features ("concat"), or adds them ("sum")."""
    if not micro.shape[-1]:
        return macro
    return torch.cat([micro, macro], -1) if fusion == "concat" else micro + macro
