"""Fusion of tri-planes and their total variation as differentiable torch operators, and Adam by rows; `planes.cpp` does the
work.

The same meaning as `planes.compose`, `losses.total_variation` and `optim.adam_in_torch`, which say it in torch and serve where
this cannot.
"""

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.rendering.kernels import native


class _Fusion(ctypes.Structure):
    """`Fusion` in planes.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("scenes", "texels", "micro", "macro", "bases", "sum", "threads")]


def serves(*tensors: Tensor) -> bool:
    """Whether the native operators can work on these."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors) and native.available()


def _fusion(micro: Tensor, weights: Tensor, bases: Tensor, add: bool) -> _Fusion:
    texels = bases[0].numel() // bases.shape[-1]
    return _Fusion(len(weights), texels, micro.shape[-1], bases.shape[-1], len(bases), add, torch.get_num_threads())


@torch.library.custom_op("latentscenes::compose", mutates_args=(), device_types="cpu")
def _compose(micro: Tensor, weights: Tensor, bias: Tensor, bases: Tensor, add: bool) -> Tensor:
    given = [tensor.contiguous() for tensor in (micro, weights, bias, bases)]
    planes = _fused_like(micro, bases, len(weights), add)
    native.call("latentscenes_compose", _fusion(micro, weights, bases, add), [*given, planes])
    return planes


def _fused_like(micro: Tensor, bases: Tensor, scenes: int, add: bool) -> Tensor:
    width = bases.shape[-1] if add else micro.shape[-1] + bases.shape[-1]
    return bases.new_empty(scenes, *bases.shape[1:-1], width)


@_compose.register_fake
def _(micro, weights, bias, bases, add):
    return _fused_like(micro, bases, len(weights), add)


@torch.library.custom_op("latentscenes::compose_backward", mutates_args=(), device_types="cpu")
def _compose_backward(
    upstream: Tensor, micro: Tensor, weights: Tensor, bias: Tensor, bases: Tensor, add: bool, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of micro, weights, bias and bases; empty where not wanted."""
    given = (micro, weights, bias, bases)
    gradients = [tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(given, wanted, strict=True)]
    inputs = [weights.contiguous(), bases.contiguous(), upstream.contiguous()]
    native.call("latentscenes_compose_backward", _fusion(micro, weights, bases, add), [*inputs, *gradients])
    return gradients


@_compose_backward.register_fake
def _(upstream, micro, weights, bias, bases, add, wanted):
    return [tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip((micro, weights, bias, bases), wanted, strict=True)]


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
    """`planes.compose` for k > 0: micro and macro features beside each other, or their sum; b is 1 or 0, m may be 0."""
    return _compose(micro, weights, bias, bases, fusion == "sum" and micro.shape[-1] > 0)


@torch.library.custom_op("latentscenes::total_variation", mutates_args=(), device_types="cpu")
def _total_variation(planes: Tensor) -> tuple[Tensor, Tensor]:
    texels = planes.contiguous()
    value, gradient = texels.new_empty(()), torch.empty_like(texels)
    sizes = [ctypes.c_int64(size) for size in (texels.shape[0] * 3, texels.shape[2], texels.shape[-1], torch.get_num_threads())]
    native.library().latentscenes_total_variation(*sizes, *map(native.pointer, (texels, value, gradient)))
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
    """`losses.total_variation`, r at least 2; its gradient is found in the same pass."""
    return _total_variation(planes)[0]


def adam(
    table: Float[Tensor, "n *d"], first: Float[Tensor, "n *d"], second: Float[Tensor, "n *d"], index: Int[Tensor, "s"],
    gradients: Float[Tensor, "s *d"], steps: Int[Tensor, "s"], rate: float, betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """`optim.adam_in_torch`: the rows of `table` at `index` (all different) and their moments, in place."""
    counts = steps.double()
    rates, corrections = (rate / (1 - betas[0] ** counts)).float(), (1 - betas[1] ** counts).rsqrt().float()
    sizes = [ctypes.c_int64(size) for size in (len(index), gradients[0].numel(), torch.get_num_threads())]
    numbers = [*map(ctypes.c_double, betas), ctypes.c_float(epsilon)]
    arrays = (index, rates, corrections, gradients.contiguous(), table, first, second)
    native.library().latentscenes_adam(*sizes, *numbers, *map(native.pointer, arrays))
