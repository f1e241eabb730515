"""A scene's rows as bytes: exactly, in half precision, or as few levels per texel as its pictures need.

Integers: each micro plane and feature has its own step, its largest magnitude / (2^(bits − 1) − 1), and texels are
rounded to it (uniform mid-tread quantization). The codes are then deflated (RFC 1951, zlib): they gather around zero, so
fewer bits make smaller streams even below the byte that holds each. Weights and bias are tiny and stay float32; a scene's
mixing of features is held in half precision.
"""

import zlib
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.config import PlanesConfig, StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.model.planes import SceneParameters

PRECISIONS: tuple[StoragePrecision, ...] = get_args(StoragePrecision)
"""From exact to coarse."""
Payload = dict[str, Tensor]
"""What is stored of one scene: tensors by name. Those whose name ends in STREAM are bytes, of a length of their own."""
STREAM = "stream"


def check_precision(name: str) -> StoragePrecision:
    """The precision of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision: no {name!r}; choose one of {', '.join(PRECISIONS)}.")
    return name


def pack(rows: SceneParameters, precision: StoragePrecision) -> Payload:
    """What to store of one scene (n = 1). Empty tables are left out."""
    payload = {
        name: getattr(rows, name)[0].detach().cpu().float().contiguous() for name in SceneParameters.NAMES
    }
    micro = payload.pop("micro")
    if precision != "float32":
        payload["mixing"] = payload["mixing"].half()
    if precision == "float32" or not micro.numel():
        payload["micro"] = micro
    elif precision == "float16":
        if micro.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(
                "precision: float16 cannot hold this scene's planes, which reach beyond 65504. Use float32 or an int precision."
            )
        payload["micro"] = micro.half()
    else:
        scale, stream = _deflate(micro, int(precision.removeprefix("int")))
        payload |= {"micro.scale": scale, f"micro.{STREAM}": stream}
    return {name: tensor for name, tensor in payload.items() if tensor.numel()}


def unpack(payload: Payload, planes: PlanesConfig) -> SceneParameters:
    """The rows (n = 1, float32) that `pack` stored. By numpy, on one thread: torch's would wait for each other where the
    machine is busy, for ten times as long as the work takes."""
    side = planes.resolution
    if f"micro.{STREAM}" in payload:
        micro = _inflate(payload["micro.scale"], payload[f"micro.{STREAM}"], side)
    else:
        micro = torch.from_numpy(
            payload.get("micro", torch.zeros(3, side, side, 0)).numpy().astype(np.float32)
        )
    weights, bias = (payload.get(name, torch.zeros(0)) for name in ("weights", "bias"))
    mixing = payload.get("mixing", torch.zeros(0, 0)).float()
    return SceneParameters(micro[None], weights[None], bias[None], mixing[None])


def payload_bytes(payload: Payload) -> int:
    """Size of a stored scene."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def payload_kind(payload: Payload) -> tuple:
    """Payloads of one kind can lie in one shard."""
    return tuple((name, tensor.dtype) for name, tensor in sorted(payload.items()))


def _deflate(micro: Float[Tensor, "3 r r m"], bits: int) -> tuple[Tensor, Tensor]:
    """Steps (3, m) and the deflated codes, plane by plane and feature by feature."""
    top = 2 ** (bits - 1) - 1
    scale = (micro.abs().amax((1, 2)) / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (
        (micro / scale[:, None, None])
        .round()
        .clamp(-top, top)
        .to(torch.int8)
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    return scale, torch.from_numpy(np.frombuffer(zlib.compress(codes.numpy().tobytes(), 6), np.uint8).copy())


def _inflate(scale: Float[Tensor, "3 m"], stream: Tensor, side: int) -> Float[Tensor, "3 r r m"]:
    codes = np.frombuffer(zlib.decompress(stream.numpy().data), np.int8).reshape(*scale.shape, side, side)
    texels = codes.astype(np.float32)
    texels *= scale.numpy()[..., None, None]
    return torch.from_numpy(np.ascontiguousarray(texels.transpose(0, 2, 3, 1)))
