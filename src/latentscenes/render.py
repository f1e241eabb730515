"""Tri-planes and rays to features, depth and opacity: the one entry to the torch path and the fast kernels.

`march_planes` is the readable path. `render_rays` picks a kernel: all have the same signature and meaning, and
receive rays already moved to the box [-1, 1]³, so that none knows about cameras or boxes.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes import march
from latentscenes.cameras import Box, Cameras
from latentscenes.field import Aggregation, Axes, Field, sample_planes

Kernel = Literal["auto", "native", "torch"]


class Rays(NamedTuple):
    """p rays for each of s scenes, in box coordinates; t measures world distance."""

    origins: Float[Tensor, "s p 3"]
    directions: Float[Tensor, "s p 3"]
    near: Float[Tensor, "s p"]
    far: Float[Tensor, "s p"]


class Rendered(NamedTuple):
    """Σ w f, expected depth (world units; rays that pass end at far) and opacity, before any background."""

    features: Float[Tensor, "s p c"]
    depth: Float[Tensor, "s p"]
    opacity: Float[Tensor, "s p"]


def camera_rays(
    cameras: Cameras, scenes: int, height: int, width: int, box: Box, bounds: tuple[float, float] | None = None
) -> Rays:
    """Rays of s·k cameras, k after k for each scene, over an h x w grid. Near and far come from where each ray
    meets the box, or are the same `bounds` for all."""
    origins, directions = cameras.rays(height, width)
    origins, directions = box.normalize(origins, directions)
    if bounds is None:
        near, far = march.intersect_cube(origins, directions)
    else:
        near, far = (torch.full_like(origins[..., 0], bound) for bound in bounds)
    return Rays(
        origins.reshape(scenes, -1, 3), directions.reshape(scenes, -1, 3), near.reshape(scenes, -1), far.reshape(scenes, -1)
    )


def march_planes(
    planes: Float[Tensor, "s 3 r r f"],
    field: Field,
    rays: Rays,
    u_coarse: Float[Tensor, "s p n"],
    u_fine: Float[Tensor, "s p m"],
    axes: Axes = "xy,xz,yz",
    aggregation: Aggregation = "sum",
) -> march.Composite:
    """n stratified samples per ray, then m where those found matter (no gradient through their places), composited
    together in depth order. m = 0 leaves the stratified ones alone."""

    def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
        points = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
        flat = points.flatten(1, 2)
        features = sample_planes(planes, flat, axes, aggregation).unflatten(1, t.shape[1:])
        directions = torch.nn.functional.normalize(rays.directions, dim=-1)[:, :, None].expand_as(points)
        return field(features, points, directions)

    t = march.stratified(rays.near, rays.far, u_coarse)
    density, features = evaluate(t)
    if u_fine.shape[-1]:
        with torch.no_grad():
            weights = march.composite(t, density, features).weights
            t_fine = march.importance(t, weights, u_fine)
        density_fine, features_fine = evaluate(t_fine)
        t, order = torch.cat([t, t_fine], -1).sort(dim=-1, stable=True)
        density = torch.cat([density, density_fine], -1).gather(-1, order)
        features = torch.cat([features, features_fine], -2)
        features = features.gather(-2, order[..., None].expand_as(features))
    return march.composite(t, density, features)
