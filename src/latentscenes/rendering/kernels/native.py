"""The CPU kernel (native.cpp, planes.cpp) as differentiable functions. `render` computes as `march_planes`.

Gradients reach planes, network, origins and directions of rays; not near, far or random numbers.
"""

import ctypes
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentscenes.rendering.field import DENSITY_SHIFT, FEATURE_MARGIN, PLANE_AXES
from latentscenes.rendering.kernels import build
from latentscenes.rendering.march import BLUR_PADDING

SKIP = 1e-4
"""Forward skips samples that less than this fraction of light reaches. Backward skips a sample if no gradient
of its raw outputs exceeds this fraction of the mean over its scene's rays of |d features|₁ + |d depth|·far +
|d opacity|. 0 skips none."""

INPUTS = ("planes", "hidden_w", "hidden_b", "out_w", "out_b")
INPUTS += ("origins", "directions", "near", "far", "u_coarse", "u_fine")


class _Problem(ctypes.Structure):
    """`Problem` in field.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("scenes", "rays", "coarse", "fine", "resolution", "features")),
        *(
            (name, ctypes.c_int64)
            for name in ("directed", "hidden", "channels", "product", "networks", "threads")
        ),
        *((name, ctypes.c_int64 * 3) for name in ("column_axis", "row_axis")),
        *(
            (name, ctypes.c_float)
            for name in ("density_shift", "feature_margin", "blur_padding", "skip", "opaque")
        ),
        *((name, ctypes.c_void_p) for name in INPUTS),
    ]


_warned = False


def available() -> bool:
    """Whether the kernel is compiled and loaded. Warns once per process if not."""
    global _warned
    loaded, why = build.load()
    if loaded is None and not _warned:
        _warned = True
        warnings.warn(
            f"The fast CPU kernel is off: {why}. Rendering uses slower torch code. "
            "Install a C++17 compiler or set CXX.",
            stacklevel=2,
        )
    return loaded is not None


def why_unavailable() -> str:
    return build.load()[1]


def _problem(inputs: Sequence[Tensor], axes: str, aggregation: str, skip: float) -> _Problem:
    planes, hidden_w, _, out_w, _, _, _, _, _, u_coarse, u_fine = inputs
    scenes, rays, coarse = u_coarse.shape
    columns, rows = zip(*PLANE_AXES[axes], strict=True)
    return _Problem(
        scenes, rays, coarse, u_fine.shape[-1], planes.shape[2], planes.shape[-1],
        hidden_w.shape[-1] > planes.shape[-1], hidden_w.shape[-2], out_w.shape[0] - 1,
        aggregation == "product", hidden_w.shape[0] if hidden_w.ndim == 3 else 1, torch.get_num_threads(),
        (ctypes.c_int64 * 3)(*columns), (ctypes.c_int64 * 3)(*rows),
        DENSITY_SHIFT, FEATURE_MARGIN, BLUR_PADDING, skip, -math.log(skip) if skip else math.inf,
        *(tensor.data_ptr() for tensor in inputs),
    )  # fmt: skip


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Returns the address of a contiguous tensor's data, null for None or an empty tensor."""
    return ctypes.c_void_p(None if tensor is None or not tensor.numel() else tensor.data_ptr())


def library() -> ctypes.CDLL:
    """Returns the compiled library. Raises RuntimeError if there is none (see `available`)."""
    loaded, why = build.load()
    if loaded is None:
        raise RuntimeError(f"the native kernel is not available: {why}")
    return loaded


def evaluated(backward: bool) -> int:
    """Returns how many samples the last pass of `render` in this process evaluated rather than skipped."""
    function = library().latentscenes_evaluated
    function.restype = ctypes.c_int64
    return function(int(backward))


def call(name: str, problem: ctypes.Structure, tensors: list[Tensor | None]) -> None:
    """Calls a function of the library that takes a structure of sizes, then arrays."""
    getattr(library(), name)(ctypes.byref(problem), *map(pointer, tensors))


def outputs(u_coarse: Tensor, u_fine: Tensor, out_w: Tensor, keep: bool) -> list[Tensor]:
    """Allocates features, depth, opacity, then t, density and features of samples (empty unless `keep`)."""
    (scenes, rays, coarse), channels = u_coarse.shape, out_w.shape[0] - 1
    samples = (scenes, rays, coarse + u_fine.shape[-1]) if keep else (0, 0, 0)
    shapes = [
        (scenes, rays, channels),
        (scenes, rays),
        (scenes, rays),
        samples,
        samples,
        (*samples, channels),
    ]
    return [u_coarse.new_empty(shape) for shape in shapes]


def _march(tensors: Sequence[Tensor], axes: str, aggregation: str, skip: float, keep: bool) -> list[Tensor]:
    """Returns `outputs`. The tensors are those of INPUTS, contiguous."""
    out_w, u_coarse, u_fine = (tensors[INPUTS.index(name)] for name in ("out_w", "u_coarse", "u_fine"))
    results = outputs(u_coarse, u_fine, out_w, keep)
    if u_coarse.numel():
        call("latentscenes_forward", _problem(tensors, axes, aggregation, skip), results)
    return results


def marched(ctx, march: Callable[..., list[Tensor]], given: Sequence) -> tuple[Tensor, ...]:
    """Returns features, depth and opacity by `march`, for INPUTS, options, and whether gradients are wanted.
    If so, saves the tensors and options for the backward pass."""
    inputs, options, keep = (
        [tensor.contiguous() for tensor in given[: len(INPUTS)]],
        given[len(INPUTS) : -1],
        given[-1],
    )
    results = march(inputs, *options, keep)
    if keep:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *results[3:])
        ctx.options = options
    return tuple(results[:3])


class _Render(torch.autograd.Function):
    """Takes INPUTS, then axes, aggregation, skip and whether gradients are wanted. Returns features, depth
    and opacity. Not an operator of torch's library: the first call of one loads torch's compiler, which
    takes a second."""

    @staticmethod
    def forward(ctx, *given):
        return marched(ctx, _march, given)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        needed = ctx.needs_input_grad
        inputs, saved = ctx.saved_tensors[: len(INPUTS)], ctx.saved_tensors[len(INPUTS) :]
        wanted = [needed[0], *4 * [any(needed[1:5])], *2 * [any(needed[5:7])]]
        gradients = _empty(inputs[:7], wanted)
        if inputs[INPUTS.index("near")].numel():
            ups = [inputs[0].new_empty(0) if up is None else up.contiguous() for up in upstream]
            call("latentscenes_backward", _problem(inputs, *ctx.options), [*ups, *saved, *gradients])
        else:
            gradients = [gradient.zero_() for gradient in gradients]
        return *only(gradients, wanted), *8 * [None]


def _empty(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Returns a tensor for each gradient; an empty one where it is not wanted."""
    return [
        tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(tensors, wanted, strict=True)
    ]


def only(gradients: list[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def render(
    planes: Float[Tensor, "s 3 r r f"],
    hidden_w: Float[Tensor, "*s h i"],
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
    skip: float | None = None,
) -> tuple[Float[Tensor, "s p c"], Float[Tensor, "s p"], Float[Tensor, "s p"]]:
    """Returns features Σ w f, depth Σ w t and opacity Σ w of rays (see `march.Composite`), c = o − 1. All
    tensors are float32 on the CPU. The network's inputs are the planes' features (i = f), or these and the
    ray's unit direction (i = f + 3). Each scene may have its own hidden weights. `skip` defaults to SKIP.

    Results and gradients are exactly reproducible for a fixed number of torch threads.
    """
    trained = (planes, hidden_w, hidden_b, out_w, out_b, origins, directions)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained)
    fixed = (tensor.detach() for tensor in (near, far, u_coarse, u_fine))
    return _Render.apply(*trained, *fixed, axes, aggregation, SKIP if skip is None else skip, keep)


def samples(*given: Tensor, axes: str = "xy,xz,yz", aggregation: str = "sum") -> Float[Tensor, "s p n"]:
    """Returns densities of stratified samples, none skipped. Takes the tensors of `render` except u_fine."""
    inputs = [tensor.contiguous() for tensor in (*given, given[-1][..., :0])]
    return _march(inputs, axes, aggregation, 0.0, True)[4]


# Planes: fusion, total variation, Adam by rows (planes.cpp)


class _Fusion(ctypes.Structure):
    """`Fusion` in planes.cpp."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("scenes", "texels", "micro", "macro", "bases", "sum", "threads")
    ]


def serves(*tensors: Tensor) -> bool:
    """Whether the native operators can compute with these tensors: float32, on the CPU."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and available()
    )


def _fusion(micro: Tensor, weights: Tensor, bases: Tensor, add: bool) -> _Fusion:
    texels = bases[0].numel() // bases.shape[-1]
    return _Fusion(
        len(weights), texels, micro.shape[-1], bases.shape[-1], len(bases), add, torch.get_num_threads()
    )


class _Compose(torch.autograd.Function):
    """Takes micro, weights, bias, bases and whether features are added."""

    @staticmethod
    def forward(ctx, *given):
        micro, weights, bias, bases, ctx.add = given
        inputs = [tensor.contiguous() for tensor in given[:4]]
        width = bases.shape[-1] if ctx.add else micro.shape[-1] + bases.shape[-1]
        planes = bases.new_empty(len(weights), *bases.shape[1:-1], width)
        call("latentscenes_compose", _fusion(micro, weights, bases, ctx.add), [*inputs, planes])
        ctx.save_for_backward(*inputs)
        return planes

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        wanted, (micro, weights, bias, bases) = ctx.needs_input_grad[:4], ctx.saved_tensors
        gradients = _empty((micro, weights, bias, bases), wanted)
        arguments = [weights, bases, upstream.contiguous(), *gradients]
        call("latentscenes_compose_backward", _fusion(micro, weights, bases, ctx.add), arguments)
        return *only(gradients, wanted), None


def compose(
    micro: Float[Tensor, "s 3 r r m"],
    weights: Float[Tensor, "s k"],
    bias: Float[Tensor, "s b"],
    bases: Float[Tensor, "k 3 r r g"],
    fusion: str,
) -> Float[Tensor, "s 3 r r f"]:
    """Computes `planes.fuse_in_torch`, for k > 0. b is 1 or 0; m may be 0."""
    return _Compose.apply(micro, weights, bias, bases, fusion == "sum" and micro.shape[-1] > 0)


class _TotalVariation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planes):
        texels = planes.contiguous()
        value, gradient = texels.new_empty(()), torch.empty_like(texels)
        sizes = [
            ctypes.c_int64(size)
            for size in (texels.shape[0] * 3, texels.shape[2], texels.shape[-1], torch.get_num_threads())
        ]
        library().latentscenes_total_variation(*sizes, *map(pointer, (texels, value, gradient)))
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0]


def total_variation(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """Computes `losses.total_variation_in_torch` and its gradient in one pass. r must be at least 2."""
    return _TotalVariation.apply(planes)


class AdamStep(NamedTuple):
    """A step of Adam for some rows of a table, which changes the table and the moments in place."""

    table: Float[Tensor, "n *d"]
    moments: tuple[Float[Tensor, "n *d"], Float[Tensor, "n *d"]]
    index: Int[Tensor, "s"]
    """The rows, all different."""
    gradients: Float[Tensor, "s *d"]
    steps: Int[Tensor, "s"]
    """Number of steps of each of these rows, this one included."""
    rate: float
    betas: tuple[float, float]
    epsilon: float


def adam(step: AdamStep) -> None:
    """Computes `optim.adam_in_torch`."""
    table, moments, index, gradients, steps, rate, betas, epsilon = step
    counts = steps.double()
    rates, corrections = (rate / (1 - betas[0] ** counts)).float(), (1 - betas[1] ** counts).rsqrt().float()
    sizes = [ctypes.c_int64(size) for size in (len(index), gradients[0].numel(), torch.get_num_threads())]
    numbers = [*map(ctypes.c_double, betas), ctypes.c_float(epsilon)]
    arrays = (index, rates, corrections, gradients.contiguous(), table, *moments)
    library().latentscenes_adam(*sizes, *numbers, *map(pointer, arrays))
