"""The GPU kernels as differentiable functions. `render` computes as `march_planes`.

A pass has a few launches: evaluate the field at coarse samples, place fine samples, evaluate the field there,
sort and composite all. Between launches, memory holds only places, densities and features of samples;
backward needs the same. Gradients reach planes and network, not rays or random numbers.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentscenes.rendering import march
from latentscenes.rendering.kernels import triton_field, triton_march
from latentscenes.rendering.kernels.native import INPUTS, SKIP, marched, only, outputs

FORWARD_BLOCK, BACKWARD_BLOCK, WARPS = 64, 32, 8
"""Points and warps of a program of the field's kernels. With more points or fewer warps, the compiler runs
out of registers at usual sizes (32 features, 64 hidden units)."""
LANES = 512
"""Samples of a program of the kernels along rays, in whole rays."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs that sum the network's gradients, per multiprocessor of the GPU."""


class _Sizes(NamedTuple):
    """Sizes of the arrays. `rays` counts those of all scenes, `per_scene` those of one."""

    rays: int
    per_scene: int
    coarse: int
    fine: int
    resolution: int
    features: int
    inputs: int
    hidden: int
    channels: int

    @property
    def samples(self) -> int:
        return self.coarse + self.fine

    def kernel(self) -> tuple[int, ...]:
        """Returns the sizes that all field kernels take, in their order."""
        return (
            self.per_scene, self.samples, self.resolution, self.features, self.inputs, self.hidden,
            self.channels,
        )  # fmt: skip

    def options(self, axes: str, aggregation: str, precision: str) -> dict[str, bool | int | str]:
        """Returns the compile-time options of the field's kernels."""
        widths = {"INPUTS": self.inputs, "HIDDEN": self.hidden, "OUTPUTS": 1 + self.channels}
        padded = {name: max(16, triton.next_power_of_2(width)) for name, width in widths.items()}
        kind = {
            "EG3D": axes == "eg3d",
            "PRODUCT": aggregation == "product",
            "DIRECTED": self.inputs > self.features,
        }
        return {**kind, **padded, "PRECISION": precision, "num_warps": WARPS, "num_stages": 1}

    def rows(self, columns: int, name: str) -> dict[str, int]:
        """Returns padded columns and rays per program of a kernel along rays."""
        padded = triton.next_power_of_2(columns)
        return {"R": max(1, LANES // padded), name: padded}


def _sizes(given: Sequence[Tensor]) -> _Sizes:
    planes, hidden_w, _, out_w, _, _, _, _, _, u_coarse, u_fine = given
    scenes, per_scene, coarse = u_coarse.shape
    if scenes * per_scene * (coarse + u_fine.shape[-1]) >= 2**31:
        raise ValueError("the GPU kernels number samples with 32 bits. Render fewer rays at once.")
    return _Sizes(
        scenes * per_scene, per_scene, coarse, u_fine.shape[-1], planes.shape[2], planes.shape[-1],
        hidden_w.shape[1], hidden_w.shape[0], out_w.shape[0] - 1,
    )  # fmt: skip


def _on(tensor: Tensor):
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _readable(planes: Tensor, precision: str) -> Tensor:
    return planes.to(torch.bfloat16) if precision == "bfloat16" else planes


def _results(u_coarse: Tensor, u_fine: Tensor, out_w: Tensor, keep: bool) -> list[Tensor]:
    """Allocates `native.outputs` and the order of samples (empty unless `keep`)."""
    found = outputs(u_coarse, u_fine, out_w, keep)
    return [*found, torch.empty_like(found[3], dtype=torch.int32)]


def _march(
    given: Sequence[Tensor], axes: str, aggregation: str, precision: str, skip: float, keep: bool
) -> list[Tensor]:
    """Returns `_results`. The tensors are those of INPUTS, contiguous."""
    planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, u_coarse, u_fine = given
    size = _sizes(given)
    results = _results(u_coarse, u_fine, out_w, keep)
    if not size.rays:
        return results
    out_features, depth, opacity = results[:3]
    _, _, _, t, density, features, order = results if keep else _results(u_coarse, u_fine, out_w, True)
    t[..., : size.coarse] = march.stratified(near, far, u_coarse)
    density.zero_(), features.zero_()  # rays that miss keep these
    planes = _readable(planes, precision)
    options = size.options(axes, aggregation, precision)

    def evaluate(first: int, count: int) -> None:
        points = size.rays * count
        triton_field.field_forward[(triton.cdiv(points, FORWARD_BLOCK),)](
            planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, t, density, features,
            points, first, count, *size.kernel(), BLOCK=FORWARD_BLOCK, **options,
        )  # fmt: skip

    with _on(planes):
        evaluate(0, size.coarse)
        if size.fine:
            block = size.rows(size.fine, "M")
            grid = (triton.cdiv(size.rays, block["R"]),)
            triton_march.place_fine[grid](t, density, u_fine, size.rays, size.coarse, size.fine, **block)
            evaluate(size.coarse, size.fine)
        block = size.rows(size.samples, "N")
        grid = (triton.cdiv(size.rays, block["R"]),)
        triton_march.sort_samples[grid](t, order, size.rays, size.samples, **block)
        triton_march.composite[grid](
            t, density, features, order, out_features, depth, opacity, size.rays, size.samples, size.channels,
            **block,
        )  # fmt: skip
    return results


def _gradients(
    upstream: Sequence[Tensor],
    saved: Sequence[Tensor],
    given: Sequence[Tensor],
    axes: str,
    aggregation: str,
    precision: str,
    skip: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Returns gradients of planes, hidden_w, hidden_b, out_w and out_b, the last four together; empty ones
    where not wanted."""
    planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, _, _ = given
    size = _sizes(given)
    gradients = [
        torch.zeros_like(x) if want else x.new_empty(0) for x, want in zip(given[:5], wanted, strict=True)
    ]
    if not size.rays:
        return gradients
    up_features, up_depth, up_opacity = upstream
    t, density, features, order = saved
    magnitudes = up_features.abs().sum(-1) + up_depth.abs() * far + up_opacity.abs()
    thresholds = (skip * magnitudes.mean(-1, keepdim=True)).expand_as(magnitudes).contiguous()
    d_raw = t.new_empty((*t.shape, 1 + size.channels))
    keep = torch.empty_like(t, dtype=torch.int8)
    with _on(planes):
        block = size.rows(size.samples, "N")
        triton_march.composite_backward[(triton.cdiv(size.rays, block["R"]),)](
            t, density, features, order, up_features, up_depth, up_opacity, thresholds, d_raw, keep,
            size.rays, size.samples, size.channels, **block,
        )  # fmt: skip
        kept = keep.flatten().nonzero().flatten()
        if not len(kept):
            return gradients
        read = (_readable(planes, precision), hidden_w, hidden_b, out_w, origins, directions, t, d_raw, kept)
        options = {"BLOCK": BACKWARD_BLOCK, **size.options(axes, aggregation, precision)}
        blocks = triton.cdiv(len(kept), BACKWARD_BLOCK)
        if wanted[0]:
            triton_field.field_backward_planes[(blocks,)](
                *read, gradients[0], len(kept), *size.kernel(), **options
            )
        if wanted[1]:
            programs = min(blocks, _programs(planes.device))
            shares = [x.new_empty((programs, *x.shape)) for x in given[1:5]]
            triton_field.field_backward_network[(programs,)](
                *read, *shares, len(kept), *size.kernel(), **options
            )
            gradients[1:] = [share.sum(0) for share in shares]
    return gradients


def _programs(device: torch.device) -> int:
    """Returns the largest number of programs that sum the network's gradients (interpreted: two)."""
    if device.type != "cuda":
        return 2
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class _Render(torch.autograd.Function):
    """As `native._Render`, with the precision after the aggregation."""

    @staticmethod
    def forward(ctx, *given):
        return marched(ctx, _march, given)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        needed = ctx.needs_input_grad
        inputs, saved = ctx.saved_tensors[: len(INPUTS)], ctx.saved_tensors[len(INPUTS) :]
        near = inputs[INPUTS.index("near")]
        shapes = [(*near.shape, saved[2].shape[-1]), near.shape, near.shape]
        ups = [
            near.new_zeros(shape) if up is None else up.contiguous()
            for up, shape in zip(upstream, shapes, strict=True)
        ]
        wanted = [needed[0], *4 * [any(needed[1:5])]]
        gradients = _gradients(ups, saved, inputs, *ctx.options, wanted)
        return *only(gradients, wanted), *11 * [None]


def render(
    planes: Float[Tensor, "s 3 r r f"],
    hidden_w: Float[Tensor, "h i"],
    hidden_b: Float[Tensor, " h"],
    out_w: Float[Tensor, "o h"],
    out_b: Float[Tensor, " o"],
    origins: Float[Tensor, "s p 3"],
    directions: Float[Tensor, "s p 3"],
    near: Float[Tensor, "s p"],
    far: Float[Tensor, "s p"],
    u_coarse: Float[Tensor, "s p n"],
    u_fine: Float[Tensor, "s p m"],
    axes: str = "xy,xz,yz",
    aggregation: str = "sum",
    precision: str = "float32",
    skip: float | None = None,
) -> tuple[Float[Tensor, "s p c"], Float[Tensor, "s p"], Float[Tensor, "s p"]]:
    """Returns features Σ w f, depth Σ w t and opacity Σ w of rays (see `march.Composite`), c = o − 1. All
    tensors are float32 on one CUDA device. The network's inputs are the planes' features (i = f), or these
    and the ray's unit direction (i = f + 3).

    `precision` of the factors in the network's products is "float32", "tf32" or "bfloat16"; the last applies
    to texels too. All sums, compositing and gradients are float32. Gradients of planes are summed in no fixed
    order, so their last bits may differ from run to run. Backward skips samples with small gradients (see
    SKIP, the default of `skip`).
    """
    trained = (planes, hidden_w, hidden_b, out_w, out_b)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    fixed = (tensor.detach() for tensor in (origins, directions, near, far, u_coarse, u_fine))
    options = axes, aggregation, precision, SKIP if skip is None else skip, keep
    return _Render.apply(*trained, *fixed, *options)
