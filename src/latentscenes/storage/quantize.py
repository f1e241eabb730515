"""Scenes as stored: exact, in half precision, or quantized to 3 to 8 bits; stacked to shards.

Integer precisions quantize each micro plane and feature uniformly (mid-tread): the step is the largest
magnitude divided by 2^(bits − 1) − 1. The codes are deflated (RFC 1951, zlib). Most codes lie near zero, so
fewer bits give a smaller stream although each code fills a byte. Weights, bias and box are small and stay
float32; mixing is stored as float16.
"""

import zlib
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from latentscenes.core.config import PlanesConfig, StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.model.planes import SceneParameters

PRECISIONS: tuple[StoragePrecision, ...] = get_args(StoragePrecision)
"""From exact to coarse."""
Payload = dict[str, Tensor]
"""A stored scene: tensors by name. A tensor whose name ends in STREAM holds bytes of any length."""
STREAM = "stream"


def check_precision(name: str) -> StoragePrecision:
    """Returns the precision of that name. Raises a UserError if there is none."""
    if name not in PRECISIONS:
        raise UserError(f"precision: no {name!r}; choose one of {', '.join(PRECISIONS)}.")
    return name


def pack(rows: SceneParameters, precision: StoragePrecision) -> Payload:
    """Returns the payload of one scene (n = 1), without empty tensors. Raises a UserError if float16 cannot
    represent the micro planes."""
    payload = {name: table[0].detach().cpu().float().contiguous() for name, table in rows.tables().items()}
    micro = payload.pop("micro")
    if precision != "float32":
        payload["mixing"] = payload["mixing"].half()
    if precision == "float32" or not micro.numel():
        payload["micro"] = micro
    elif precision == "float16":
        if micro.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(
                "precision: the micro planes of this scene exceed the range of float16, ±65504. "
                "Use float32 or an int precision."
            )
        payload["micro"] = micro.half()
    else:
        scale, stream = _deflate(micro, int(precision.removeprefix("int")))
        payload |= {"micro.scale": scale, f"micro.{STREAM}": stream}
    return {name: tensor for name, tensor in payload.items() if tensor.numel()}


def unpack(payload: Payload, planes: PlanesConfig) -> SceneParameters:
    """Returns the scene parameters (n = 1, float32) of a payload.

    Uses numpy on one thread: on a busy machine, torch's threads wait for each other ten times as long as the
    work takes.
    """
    side = planes.resolution
    if f"micro.{STREAM}" in payload:
        micro = _inflate(payload["micro.scale"], payload[f"micro.{STREAM}"], side)
    else:
        stored = payload.get("micro", torch.zeros(3, side, side, 0))
        micro = torch.from_numpy(stored.numpy().astype(np.float32))
    weights, bias = (payload.get(name, torch.zeros(0)) for name in ("weights", "bias"))
    mixing = payload.get("mixing", torch.zeros(0, 0)).float()
    box = payload.get("box", torch.zeros(0))
    return SceneParameters(micro[None], weights[None], bias[None], mixing[None], box[None])


def payload_bytes(payload: Payload) -> int:
    """Returns the size of a payload in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def payload_kind(payload: Payload) -> tuple:
    """Returns names and types of the tensors. Payloads of one kind fit into one shard."""
    return tuple((name, tensor.dtype) for name, tensor in sorted(payload.items()))


def stack_payloads(payloads: Sequence[Payload]) -> dict[str, Tensor]:
    """Returns the tensors of a shard of payloads of one kind. Streams are joined and their ends added."""
    tensors = {}
    for name in payloads[0]:
        values = [payload[name] for payload in payloads]
        if name.endswith(STREAM):
            tensors[f"{name}.ends"] = torch.tensor([len(value) for value in values]).cumsum(0)
            tensors[name] = torch.cat(values)
        else:
            tensors[name] = torch.stack(values)
    return tensors


def payload_at(shard: safe_open, row: int) -> Payload:
    """Reads one payload of a shard."""
    payload = {}
    for name in shard.keys():  # noqa: SIM118
        if name.endswith(STREAM):
            ends = shard.get_tensor(f"{name}.ends")
            payload[name] = shard.get_slice(name)[int(ends[row - 1]) if row else 0 : int(ends[row])]
        elif not name.endswith(".ends"):
            payload[name] = shard.get_slice(name)[row : row + 1][0]
    return payload


def _deflate(micro: Float[Tensor, "3 r r m"], bits: int) -> tuple[Tensor, Tensor]:
    """Returns steps (3, m) and the deflated codes, plane by plane and feature by feature."""
    top = 2 ** (bits - 1) - 1
    scale = (micro.abs().amax((1, 2)) / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (micro / scale[:, None, None]).round().clamp(-top, top).to(torch.int8)
    content = codes.permute(0, 3, 1, 2).contiguous().numpy().tobytes()
    return scale, torch.from_numpy(np.frombuffer(zlib.compress(content, 6), np.uint8).copy())


def _inflate(scale: Float[Tensor, "3 m"], stream: Tensor, side: int) -> Float[Tensor, "3 r r m"]:
    codes = np.frombuffer(zlib.decompress(stream.numpy().data), np.int8).reshape(*scale.shape, side, side)
    texels = codes.astype(np.float32)
    texels *= scale.numpy()[..., None, None]
    return torch.from_numpy(np.ascontiguousarray(texels.transpose(0, 2, 3, 1)))
