"""The CPU kernel (native.cpp, planes.cpp) as differentiable torch operators. `render` computes as
`march_planes`.

Gradients reach planes, network, origins and directions of rays; not near, far or random numbers.
"""

import ctypes
import math
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.rendering.field import DENSITY_SHIFT, FEATURE_MARGIN, PLANE_AXES
from latentscenes.rendering.kernels import build
from latentscenes.rendering.march import BLUR_PADDING

SKIP = 1e-4
"""Forward skips samples that less than this fraction of light reaches. Backward skips a sample if no gradient
of its raw outputs exceeds this fraction of the mean over rays of |d features|₁ + |d depth|·far + |d opacity|.
0 skips none."""

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


def _problem(inputs: list[Tensor], axes: str, aggregation: str, skip: float) -> _Problem:
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


def _needs_operator(*tensors: Tensor) -> bool:
    """Whether gradients of the tensors are wanted, or torch compiles. Otherwise the function that an operator
    is made of will do: the first call of any operator imports torch._dynamo, which takes seconds."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted or torch.compiler.is_compiling()


def _render_plainly(
    planes: Tensor, hidden_w: Tensor, hidden_b: Tensor, out_w: Tensor, out_b: Tensor, origins: Tensor,
    directions: Tensor, near: Tensor, far: Tensor, u_coarse: Tensor, u_fine: Tensor, axes: str,
    aggregation: str, skip: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, u_coarse, u_fine)
    inputs = [tensor.contiguous() for tensor in given]
    results = outputs(u_coarse, u_fine, out_w, keep)
    if near.numel():
        call("latentscenes_forward", _problem(inputs, axes, aggregation, skip), results)
    return tuple(results)


_render = torch.library.custom_op(
    "latentscenes::render", _render_plainly, mutates_args=(), device_types="cpu"
)


@_render.register_fake
def _(
    planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, u_coarse, u_fine, axes,
    aggregation, skip, keep,
):  # fmt: skip
    return tuple(outputs(u_coarse, u_fine, out_w, keep))


@torch.library.custom_op("latentscenes::render_backward", mutates_args=(), device_types="cpu")
def _render_backward(
    upstream: list[Tensor],
    saved: list[Tensor],
    given: list[Tensor],
    axes: str,
    aggregation: str,
    skip: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Returns gradients of the first seven INPUTS; empty ones where not wanted."""
    inputs = [tensor.contiguous() for tensor in given]
    gradients = [
        tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(inputs, wanted, strict=False)
    ]
    if inputs[INPUTS.index("near")].numel():
        arguments = [*(tensor.contiguous() for tensor in upstream), *saved, *gradients]
        call("latentscenes_backward", _problem(inputs, axes, aggregation, skip), arguments)
        return gradients
    return [gradient.zero_() for gradient in gradients]


@_render_backward.register_fake
def _(upstream, saved, given, axes, aggregation, skip, wanted):
    return [
        tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(given, wanted, strict=False)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.axes, ctx.aggregation, ctx.skip, ctx.keep = inputs
    # Otherwise saved outputs would get gradients of zeros, as large as all samples
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[3:])


def _backward(ctx, *upstream):
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
    given, saved = list(tensors[: len(INPUTS)]), list(tensors[len(INPUTS) :])
    results = [gradient if gradient is not None else given[0].new_empty(0) for gradient in upstream[:3]]
    wanted = [needed[0], *4 * [any(needed[1:5])], *2 * [any(needed[5:7])]]
    gradients = _render_backward(results, saved, given, ctx.axes, ctx.aggregation, ctx.skip, wanted)
    found = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return *found, *8 * [None]


_render.register_autograd(_backward, setup_context=_setup_context)


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
    run = _render if _needs_operator(*trained) else _render_plainly
    return run(*trained, *fixed, axes, aggregation, SKIP if skip is None else skip, keep)[:3]


def samples(*given: Tensor, axes: str = "xy,xz,yz", aggregation: str = "sum") -> Float[Tensor, "s p n"]:
    """Returns densities of stratified samples, none skipped. Takes the tensors of `render` except u_fine."""
    return _render_plainly(*given, given[-1][..., :0], axes, aggregation, 0.0, True)[4]


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


def _compose_plainly(micro: Tensor, weights: Tensor, bias: Tensor, bases: Tensor, add: bool) -> Tensor:
    given = [tensor.contiguous() for tensor in (micro, weights, bias, bases)]
    planes = _fused_like(micro, bases, len(weights), add)
    call("latentscenes_compose", _fusion(micro, weights, bases, add), [*given, planes])
    return planes


_compose = torch.library.custom_op(
    "latentscenes::compose", _compose_plainly, mutates_args=(), device_types="cpu"
)


def _fused_like(micro: Tensor, bases: Tensor, scenes: int, add: bool) -> Tensor:
    width = bases.shape[-1] if add else micro.shape[-1] + bases.shape[-1]
    return bases.new_empty(scenes, *bases.shape[1:-1], width)


@_compose.register_fake
def _(micro, weights, bias, bases, add):
    return _fused_like(micro, bases, len(weights), add)


@torch.library.custom_op("latentscenes::compose_backward", mutates_args=(), device_types="cpu")
def _compose_backward(
    upstream: Tensor,
    micro: Tensor,
    weights: Tensor,
    bias: Tensor,
    bases: Tensor,
    add: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Returns gradients of micro, weights, bias and bases; empty ones where not wanted."""
    given = (micro, weights, bias, bases)
    gradients = [
        tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(given, wanted, strict=True)
    ]
    inputs = [weights.contiguous(), bases.contiguous(), upstream.contiguous()]
    call("latentscenes_compose_backward", _fusion(micro, weights, bases, add), [*inputs, *gradients])
    return gradients


@_compose_backward.register_fake
def _(upstream, micro, weights, bias, bases, add, wanted):
    return [
        tensor.new_empty(tensor.shape if want else 0)
        for tensor, want in zip((micro, weights, bias, bases), wanted, strict=True)
    ]


def _setup_compose(ctx, inputs, output) -> None:
    *tensors, ctx.add = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_compose(ctx, upstream):
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _compose_backward(upstream, *ctx.saved_tensors, ctx.add, wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None


_compose.register_autograd(_differentiate_compose, setup_context=_setup_compose)


def compose(
    micro: Float[Tensor, "s 3 r r m"],
    weights: Float[Tensor, "s k"],
    bias: Float[Tensor, "s b"],
    bases: Float[Tensor, "k 3 r r g"],
    fusion: str,
) -> Float[Tensor, "s 3 r r f"]:
    """Computes `planes.fuse_in_torch`, for k > 0. b is 1 or 0; m may be 0."""
    given = (micro, weights, bias, bases)
    run = _compose if _needs_operator(*given) else _compose_plainly
    return run(*given, fusion == "sum" and micro.shape[-1] > 0)


@torch.library.custom_op("latentscenes::total_variation", mutates_args=(), device_types="cpu")
def _total_variation(planes: Tensor) -> tuple[Tensor, Tensor]:
    texels = planes.contiguous()
    value, gradient = texels.new_empty(()), torch.empty_like(texels)
    sizes = [
        ctypes.c_int64(size)
        for size in (texels.shape[0] * 3, texels.shape[2], texels.shape[-1], torch.get_num_threads())
    ]
    library().latentscenes_total_variation(*sizes, *map(pointer, (texels, value, gradient)))
    return value, gradient


@_total_variation.register_fake
def _(planes):
    return planes.new_empty(()), torch.empty_like(planes)


def _setup_variation(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _differentiate_variation(ctx, upstream, _):
    return None if upstream is None else upstream * ctx.saved_tensors[0]


_total_variation.register_autograd(_differentiate_variation, setup_context=_setup_variation)


def total_variation(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """Computes `losses.total_variation_in_torch` and its gradient in one pass. r must be at least 2."""
    return _total_variation(planes)[0]


def adam(
    table: Float[Tensor, "n *d"],
    moments: tuple[Float[Tensor, "n *d"], Float[Tensor, "n *d"]],
    index: Int[Tensor, "s"],
    gradients: Float[Tensor, "s *d"],
    steps: Int[Tensor, "s"],
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Computes `optim.adam_in_torch`. The rows at `index` must all be different."""
    counts = steps.double()
    rates, corrections = (rate / (1 - betas[0] ** counts)).float(), (1 - betas[1] ** counts).rsqrt().float()
    sizes = [ctypes.c_int64(size) for size in (len(index), gradients[0].numel(), torch.get_num_threads())]
    numbers = [*map(ctypes.c_double, betas), ctypes.c_float(epsilon)]
    arrays = (index, rates, corrections, gradients.contiguous(), table, *moments)
    library().latentscenes_adam(*sizes, *numbers, *map(pointer, arrays))
