"""A point in space to density and features: three planes read bilinearly, then a tiny network.

Planes are stored channels last, (scene, plane, row, column, feature), so that the four texels around a point are
four contiguous runs of memory. Texel k of r has its center at (2k + 1) / r − 1; outside the planes all is zero.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentscenes.core.config import Aggregation, Axes

PLANE_AXES: dict[str, tuple[tuple[int, int], ...]] = {
    "xy,xz,yz": ((0, 1), (0, 2), (1, 2)),
    "eg3d": (
        (0, 1),
        (0, 2),
        (2, 0),
    ),  # the third plane repeats the second: y and z never meet (kept for comparison)
}
"""For each plane, which coordinate runs along its columns and which along its rows."""

FEATURE_MARGIN = 0.001
"""Mip-NeRF's widening of the sigmoid, so that the ends of the range can be reached."""
DENSITY_SHIFT = -1.0
"""Density = softplus(raw + shift): a fresh field starts nearly empty."""


def sample_planes(
    planes: Float[Tensor, "s 3 r r f"],
    points: Float[Tensor, "s p 3"],
    axes: Axes = "xy,xz,yz",
    aggregation: Aggregation = "sum",
) -> Float[Tensor, "s p f"]:
    """Features at points of [-1, 1]³: bilinear in each plane, zero outside, then summed or multiplied."""
    images = planes.permute(0, 1, 4, 2, 3)
    read = []
    for k, (column, row) in enumerate(PLANE_AXES[axes]):
        grid = points[:, :, None, (column, row)]
        sampled = nn.functional.grid_sample(
            images[:, k], grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        read.append(sampled[..., 0].transpose(1, 2))
    if aggregation == "sum":
        return read[0] + read[1] + read[2]
    return read[0] * read[1] * read[2]


class FusedPlanes(NamedTuple):
    """Tri-planes of s scenes, micro and macro planes fused, as the renderer takes them."""

    texels: Float[Tensor, "s 3 r r f"]
    mixing: Float[Tensor, "s f f"] | None = None
    """The scenes' mixing of features where it is not applied yet: the renderer applies it (see `mix`)."""
    own: Float[Tensor, "s 3 r r m"] | None = None
    """The micro planes among the texels, where the macro planes are constant: only these have a total variation."""


def mix(planes: Float[Tensor, "s 3 r r f"], mixing: Float[Tensor, "s f f"]) -> Float[Tensor, "s 3 r r f"]:
    """T (I + A): every texel's features mixed by each scene's own A."""
    texels = planes.flatten(1, 3)
    return torch.baddbmm(texels, texels, mixing).view_as(planes)


class Field(nn.Module):
    """Plane features → density ≥ 0 and c features in (−1, 1): one hidden layer with softplus.

    Optional inputs beside the plane features: `frequencies` octaves of positional encoding of the point, and the
    view direction. Both are off by default, as published; the native kernel serves all but the encoding.
    """

    def __init__(
        self,
        plane_features: int,
        channels: int,
        hidden: int = 64,
        frequencies: int = 0,
        view_direction: bool = False,
    ):
        super().__init__()
        self.frequencies, self.view_direction = frequencies, view_direction
        inputs = plane_features + 6 * frequencies + 3 * view_direction
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, 1 + channels)

    def hidden_weight(self, mixing: Float[Tensor, "s f f"]) -> Float[Tensor, "s h i"]:
        """For each scene, the weights of a hidden layer that does to features f what this one does to f (I + A): where
        planes are summed, reading them is linear, so `mix` can wait until texels are read."""
        weight, features = self.hidden.weight, mixing.shape[-1]
        own = torch.matmul(weight[:, :features], mixing.transpose(1, 2))
        return weight + nn.functional.pad(own, (0, weight.shape[1] - features))

    def forward(
        self,
        features: Float[Tensor, "*b f"],
        points: Float[Tensor, "*b 3"],
        directions: Float[Tensor, "*b 3"],
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b c"]]:
        inputs = [features]
        if self.frequencies:
            octaves = math.pi * 2.0 ** torch.arange(
                self.frequencies, dtype=points.dtype, device=points.device
            )
            angles = (points[..., None] * octaves).flatten(-2)
            inputs += [angles.sin(), angles.cos()]
        if self.view_direction:
            inputs.append(directions)
        raw = self.out(nn.functional.softplus(self.hidden(torch.cat(inputs, -1))))
        density = nn.functional.softplus(raw[..., 0] + DENSITY_SHIFT)
        widened = torch.sigmoid(raw[..., 1:]) * (1 + 2 * FEATURE_MARGIN) - FEATURE_MARGIN
        return density, 2 * widened - 1
