"""Renders tri-planes along rays: features, depth and opacity.

`march_planes` is the reference in plain torch. `render_rays` picks a kernel; all compute the same. Rays are
in coordinates of the scene box, [-1, 1]³.

Distances along rays and densities are in the scene's unit of length. It is 1 for scenes in the model's box.
For a scene with a box of its own, it grows with the box, so that one field serves small and large objects
alike. It is the same in all directions, even where a box is stretched, so matter is equally dense from all
sides.
"""

import functools
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Cameras
from latentscenes.core.config import Aggregation, Axes, Kernel, MatmulPrecision
from latentscenes.core.errors import UserError
from latentscenes.rendering import march
from latentscenes.rendering.field import Field, FusedPlanes, mix, sample_planes
from latentscenes.rendering.kernels import native


class Rays(NamedTuple):
    """p rays for each of s scenes in box coordinates. Distances t along them are in the scene's unit."""

    origins: Float[Tensor, "s p 3"]
    directions: Float[Tensor, "s p 3"]
    near: Float[Tensor, "s p"]
    far: Float[Tensor, "s p"]


class Rendered(NamedTuple):
    """Σ w f, expected depth (far for light that passes) and opacity, without background."""

    features: Float[Tensor, "s p c"]
    depth: Float[Tensor, "s p"]
    opacity: Float[Tensor, "s p"]


def camera_rays(
    cameras: Cameras,
    boxes: Float[Tensor, "s 6"],
    height: int,
    width: int,
    bounds: tuple[float, float] | None = None,
    pixels: Int[Tensor, "v k"] | None = None,
    units: Float[Tensor, "s"] | None = None,
) -> Rays:
    """Returns the rays of s·k cameras, k for each scene in turn, through all h x w pixels or only `pixels`
    (row · w + column) of each view. Near and far are constants for gradients of cameras.

    Args:
        boxes: center and half sides of each scene's box, world units.
        bounds: near and far, world units; None: the intersections with the box.
        units: each scene's unit of length, world units; None: 1.
    """
    origins, directions = (part.reshape(len(boxes), -1, 3) for part in cameras.rays(height, width, pixels))
    center, half = boxes[:, None, :3], boxes[:, None, 3:]
    origins, directions = (origins - center) / half, directions / half
    unit = torch.ones_like(boxes[:, :1]) if units is None else units[:, None]
    directions = directions * unit[..., None]
    if bounds is None:
        near, far = march.intersect_cube(origins.detach(), directions.detach())
    else:
        near, far = (torch.full_like(origins[..., 0], bound) / unit for bound in bounds)
    return Rays(origins, directions, near, far)


def march_planes(
    planes: Float[Tensor, "s 3 r r f"],
    field: Field,
    rays: Rays,
    u_coarse: Float[Tensor, "s p n"],
    u_fine: Float[Tensor, "s p m"],
    axes: Axes = "xy,xz,yz",
    aggregation: Aggregation = "sum",
) -> march.Composite:
    """Composites n stratified samples per ray, and m more that are placed by their weights. No gradient goes
    through the places of samples."""

    def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
        points = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
        flat = points.flatten(1, 2)
        features = sample_planes(planes, flat, axes, aggregation).unflatten(1, t.shape[1:])
        directions = torch.nn.functional.normalize(rays.directions, dim=-1)[:, :, None].expand_as(points)
        return field(features, points, directions)

    # Stratified samples
    t = march.stratified(rays.near, rays.far, u_coarse)
    density, features = evaluate(t)

    # Samples by importance, merged in order of depth
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
    """Returns why the native kernel cannot render this, or an empty text if it can."""
    tensors = (planes, field.hidden.weight, rays.origins, u_coarse)
    if other := [tensor.device for tensor in tensors if tensor.device.type != "cpu"]:
        return f"it needs tensors on the CPU, got {other[0]}"
    return _why_no_kernel(tensors, field) or ("" if native.available() else native.why_unavailable())


def _why_no_kernel(tensors: tuple[Tensor, ...], field: Field) -> str:
    """Returns why neither fast kernel can render this. The last tensor is u_coarse."""
    if other := [tensor.dtype for tensor in tensors if tensor.dtype != torch.float32]:
        return f"it needs float32, got {other[0]}"
    if field.frequencies:
        return "it has no positional encoding"
    return "it needs at least two samples per ray" if tensors[-1].shape[-1] < 2 else ""


@functools.cache
def triton_kernel() -> ModuleType | None:
    """Imports `kernels.triton_ops`. Warns and returns None where Triton is not installed."""
    try:
        from latentscenes.rendering.kernels import triton_ops

        return triton_ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        warnings.warn(
            "The fast GPU kernel is off because Triton is not installed; rendering uses slower torch code. "
            "Run `pip install triton`. (torch's CUDA builds for Linux include it.)",
            stacklevel=2,
        )
        return None


def why_not_triton(planes: Tensor, field: Field, rays: Rays, u_coarse: Tensor) -> str:
    """Returns why the GPU kernel cannot render this, or an empty text if it can."""
    tensors = (planes, field.hidden.weight, rays.origins, u_coarse)
    other = [tensor.device for tensor in tensors if tensor.device.type != "cuda"]
    if other and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs tensors on a CUDA device, got {other[0]}"
    if planes.is_cuda and torch.cuda.get_device_capability(planes.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if reason := _why_no_kernel(tensors, field):
        return reason
    if field.hidden.in_features > 64 or field.hidden.out_features > 128 or field.out.out_features > 64:
        return "its shared memory holds networks of up to 64 inputs, 128 hidden units and 64 outputs"
    if torch.is_grad_enabled() and (rays.origins.requires_grad or rays.directions.requires_grad):
        return "it gives no gradients to rays"
    if torch.are_deterministic_algorithms_enabled():
        return "torch is set to deterministic algorithms, but it adds gradients of planes in no fixed order"
    return "" if triton_kernel() else "Triton is not installed (pip install triton)"


def choose(kernel: Kernel, planes: Tensor, field: Field, rays: Rays, u_coarse: Tensor) -> Kernel:
    """Returns the kernel asked for, or for "auto" the fastest that can render this.

    Raises:
        UserError: the kernel asked for cannot render this.
    """
    if kernel == "torch":
        return kernel
    fastest = ("triton" if planes.is_cuda else "native") if kernel == "auto" else kernel
    obstacle = (why_not_triton if fastest == "triton" else why_not_native)(planes, field, rays, u_coarse)
    if obstacle and kernel != "auto":
        raise UserError(f"kernel: {kernel} cannot be used: {obstacle}. Fix this, or use kernel: auto.")
    return "torch" if obstacle else fastest


def render_rays(
    planes: FusedPlanes,
    field: Field,
    rays: Rays,
    u_coarse: Float[Tensor, "s p n"],
    u_fine: Float[Tensor, "s p m"],
    kernel: Kernel = "auto",
    precision: MatmulPrecision = "float32",
) -> Rendered:
    """Renders like `march_planes`, by the kernel asked for or the fastest one ("auto"). `precision` applies
    only to matrix products of the GPU kernel; all else is float32.

    For planes that are still to be mixed, the native kernel mixes the few weights of the hidden layer
    instead.
    """
    texels, hidden, axes, aggregation = planes.texels, field.hidden.weight, planes.axes, planes.aggregation
    chosen = choose(kernel, texels, field, rays, u_coarse)
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
