"""The field: reads three planes bilinearly at a point, then computes density and features by a tiny network.

Planes are stored channels last, (scene, plane, row, column, feature), so each texel around a point is one
contiguous run of memory. Texel k of r has its center at (2k + 1) / r − 1. Outside the planes all features are
zero.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from latentscenes.core.config import Aggregation, Axes

PLANE_AXES: dict[str, tuple[tuple[int, int], ...]] = {
    "xy,xz,yz": ((0, 1), (0, 2), (1, 2)),
    "eg3d": ((0, 1), (0, 2), (2, 0)),  # the third plane repeats the second; no plane has y and z
}
"""For each plane, the coordinates along its columns and along its rows."""

FEATURE_MARGIN = 0.001
"""Widens the sigmoid as in Mip-NeRF, so that it can reach the ends of the range."""
DENSITY_SHIFT = -1.0
"""Density = softplus(raw + shift), so a new field starts nearly empty."""


def sample_planes(
    planes: Float[Tensor, "s 3 r r f"],
    points: Float[Tensor, "s p 3"],
    axes: Axes = "xy,xz,yz",
    aggregation: Aggregation = "sum",
) -> Float[Tensor, "s p f"]:
    """Reads features at points of [-1, 1]³ bilinearly from each plane and sums or multiplies them."""
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
    """Fused micro and macro planes of s scenes, and how to read them."""

    texels: Float[Tensor, "s 3 r r f"]
    mixing: Float[Tensor, "s f f"] | None = None
    """Mixing of features that the renderer has yet to apply (see `mix`)."""
    own: Float[Tensor, "s 3 r r m"] | None = None
    """The micro planes alone, if the macro planes are constant and need no total variation loss."""
    axes: Axes = "xy,xz,yz"
    aggregation: Aggregation = "sum"
    boxes: Float[Tensor, "s 6"] | None = None
    """Center and half sides of each scene's own box. None: all have the model's box."""
    occupied: UInt8[Tensor, "s n n n"] | None = None
    """Cells of each scene's box, indexed x, y, z. Rays sample between the first and the last cell above 0
    that they meet (see `occupancy`). None: in the whole box."""


def mix(planes: Float[Tensor, "s 3 r r f"], mixing: Float[Tensor, "s f f"]) -> Float[Tensor, "s 3 r r f"]:
    """Returns T (I + A): mixes the features of each texel by the scene's matrix A."""
    texels = planes.flatten(1, 3)
    return torch.baddbmm(texels, texels, mixing).view_as(planes)


class Field(nn.Module):
    """Network with one hidden layer (softplus) from plane features to density ≥ 0 and c features in (−1, 1).

    Optional inputs, both off as published: `frequencies` octaves of positional encoding of the point, and the
    view direction. The fast kernels support the direction only.
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
        """Returns hidden weights for each scene that have the same effect on f as this layer's on f (I + A).
        Where planes are summed, reading is linear, so these weights replace `mix`."""
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
