"""Tri-planes and rays to features, depth and opacity: the one entry to the torch path and the fast kernels.

`march_planes` is the readable path. `render_rays` picks a kernel: all have the same signature and meaning, and
receive rays already moved to the box [-1, 1]³, so that none knows about cameras or boxes.
"""

import functools
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import Aggregation, Axes, Kernel, MatmulPrecision
from latentscenes.core.errors import UserError
from latentscenes.rendering import march
from latentscenes.rendering.field import Field, FusedPlanes, mix, sample_planes
from latentscenes.rendering.kernels import native


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
    cameras: Cameras,
    scenes: int,
    height: int,
    width: int,
    box: Box,
    bounds: tuple[float, float] | None = None,
    pixels: Int[Tensor, "v k"] | None = None,
) -> Rays:
    """Rays of s·k cameras, k after k for each scene, over an h x w grid, or through the `pixels` (row · w + column)
    of each view alone. Near and far come from where each ray meets the box, or are the same `bounds` for all."""
    origins, directions = box.normalize(*cameras.rays(height, width, pixels))
    if bounds is None:
        near, far = march.intersect_cube(origins, directions)
    else:
        near, far = (torch.full_like(origins[..., 0], bound) for bound in bounds)
    return Rays(
        origins.reshape(scenes, -1, 3),
        directions.reshape(scenes, -1, 3),
        near.reshape(scenes, -1),
        far.reshape(scenes, -1),
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


def why_not_native(planes: Tensor, field: Field, rays: Rays, u_coarse: Tensor) -> str:
    """What keeps the native kernel from rendering this, in words; empty if nothing does."""
    for tensor in (planes, field.hidden.weight, rays.origins, u_coarse):
        if tensor.device.type != "cpu":
            return f"it needs tensors on the CPU, got {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"it needs float32, got {tensor.dtype}"
    if field.frequencies:
        return "it serves fields without positional encoding"
    if u_coarse.shape[-1] < 2:
        return "it needs two samples per ray at least"
    return "" if native.available() else native.why_unavailable()


@functools.cache
def triton_kernel() -> ModuleType | None:
    """`kernels.triton_ops`, imported only where it is used; None, with a warning, where Triton is not installed."""
    try:
        from latentscenes.rendering.kernels import triton_ops

        return triton_ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        warnings.warn(
            "The fast GPU kernel is off: Triton is not installed. Rendering goes the slower torch way; pip install triton, "
            "which torch's own builds for CUDA on Linux bring along.",
            stacklevel=2,
        )
        return None


def why_not_triton(planes: Tensor, field: Field, rays: Rays, u_coarse: Tensor) -> str:
    """What keeps the GPU kernel from rendering this, in words; empty if nothing does."""
    for tensor in (planes, field.hidden.weight, rays.origins, u_coarse):
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs tensors on a CUDA device, got {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"it needs float32, got {tensor.dtype}"
    if planes.is_cuda and torch.cuda.get_device_capability(planes.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if field.frequencies:
        return "it serves fields without positional encoding"
    if u_coarse.shape[-1] < 2:
        return "it needs two samples per ray at least"
    if field.hidden.in_features > 64 or field.hidden.out_features > 128 or field.out.out_features > 64:
        return "it serves networks of up to 64 inputs, 128 hidden units and 64 outputs"  # more fill shared memory
    if torch.are_deterministic_algorithms_enabled():
        return "it adds gradients of planes in no fixed order, and deterministic algorithms are asked for"
    return "" if triton_kernel() else "Triton is not installed (pip install triton)"


def choose(kernel: Kernel, planes: Tensor, field: Field, rays: Rays, u_coarse: Tensor) -> Kernel:
    """The kernel demanded, or the fastest that can render this ("auto")."""
    if kernel == "torch":
        return kernel
    fastest = ("triton" if planes.is_cuda else "native") if kernel == "auto" else kernel
    obstacle = (why_not_triton if fastest == "triton" else why_not_native)(planes, field, rays, u_coarse)
    if obstacle and kernel != "auto":
        raise UserError(f"kernel: {kernel} cannot be used: {obstacle}. Use kernel: auto, or mend that.")
    return "torch" if obstacle else fastest


def render_rays(
    planes: FusedPlanes,
    field: Field,
    rays: Rays,
    u_coarse: Float[Tensor, "s p n"],
    u_fine: Float[Tensor, "s p m"],
    axes: Axes = "xy,xz,yz",
    aggregation: Aggregation = "sum",
    kernel: Kernel = "auto",
    precision: MatmulPrecision = "float32",
) -> Rendered:
    """`march_planes` by the fastest kernel that can ("auto"), or by the one demanded. The depth of light that nothing
    stops is far. `precision` applies to the GPU kernel's matrix products; the others compute in float32.

    Where planes are still to be mixed, the native kernel applies the mixing to the few weights of the hidden layer.
    """
    chosen = choose(kernel, planes.texels, field, rays, u_coarse)
    texels, hidden = planes.texels, field.hidden.weight
    if planes.mixing is not None and chosen == "native" and aggregation == "sum":
        hidden = field.hidden_weight(planes.mixing)
    elif planes.mixing is not None:
        texels = mix(texels, planes.mixing)
    network = (hidden, field.hidden.bias, field.out.weight, field.out.bias)
    if chosen == "native":
        features, depth, opacity = native.render(texels, *network, *rays, u_coarse, u_fine, axes, aggregation)
    elif chosen == "triton":
        render = triton_kernel().render
        features, depth, opacity = render(
            texels, *network, *rays, u_coarse, u_fine, axes, aggregation, precision
        )
    else:
        features, depth, opacity, _ = march_planes(texels, field, rays, u_coarse, u_fine, axes, aggregation)
    return Rendered(features, depth + (1 - opacity) * rays.far, opacity)
