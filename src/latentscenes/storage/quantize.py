"""Scenes as stored: exact, in half precision, or quantized to 3 to 8 bits; stacked to shards.

Integer precisions quantize each micro plane and feature uniformly (mid-tread): the step is the largest
magnitude divided by 2^(bits − 1) − 1. Neighboring codes are alike, so their differences along both axes of
a plane are stored, one byte each, with Huffman codes and runs (RFC 1951, zlib). Small differences take few
bits, so fewer bits of precision give a smaller stream. Weights, bias and box are small and stay float32;
mixing is stored as float16. Files of earlier versions hold deflated codes, not differences (`CODES`).
"""

import hashlib
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentscenes.core.config import PlanesConfig
from latentscenes.core.errors import UserError
from latentscenes.core.options import StoragePrecision
from latentscenes.model.planes import SceneParameters, scene_shapes

PRECISIONS: tuple[StoragePrecision, ...] = get_args(StoragePrecision)
"""From exact to coarse."""
Payload = dict[str, Tensor]
"""A stored scene: tensors by name. A tensor whose name ends in STREAM holds bytes of any length."""
STREAM = "stream"
DIFFERENCES, CODES = f"micro.differences.{STREAM}", f"micro.{STREAM}"
"""Quantized micro planes, as stored now and by earlier versions."""
MOST_CODES = 1 << 28
"""Codes of a scene of unknown size."""
SMALL = 4096
"""Numbers of a tensor that is cheaper to copy than to write by itself."""


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
        payload |= {"micro.scale": scale, DIFFERENCES: stream}
    return {name: tensor for name, tensor in payload.items() if tensor.numel()}


def unpack(payload: Payload, planes: PlanesConfig) -> SceneParameters:
    """Returns the scene parameters (n = 1, float32) of a payload. Raises a ValueError if it is damaged or its
    sizes are not those of `planes`.

    Uses numpy on one thread: on a busy machine, torch's threads wait for each other ten times as long as the
    work takes.
    """
    shapes = scene_shapes(planes)
    if _is_quantized(payload):
        scale = _sized(payload, "micro.scale", (3, planes.micro))
        size = (3, planes.micro, planes.resolution, planes.resolution)
        texels = _codes(payload, _inflated(payload, math.prod(size)), size).astype(np.float32)
        texels *= scale.numpy()[..., None, None]
        payload = payload | {"micro": torch.from_numpy(np.ascontiguousarray(texels.transpose(0, 2, 3, 1)))}
    if payload.get("box", torch.zeros(0)).numel():
        shapes["box"] = (6,)
    tables = {name: _sized(payload, name, shape) for name, shape in shapes.items()}
    return SceneParameters(
        **{name: torch.from_numpy(table.numpy().astype(np.float32))[None] for name, table in tables.items()}
    )


def _sized(payload: Payload, name: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor of the payload if it has that shape; tensors without numbers are not stored."""
    found = torch.zeros(shape) if name not in payload and 0 in shape else payload.get(name)
    if found is None or found.shape != shape:
        held = "absent" if found is None else tuple(found.shape)
        raise ValueError(f"{name} is {held}, but the configuration needs {shape}")
    return found


def payload_bytes(payload: Payload) -> int:
    """Returns the size of a payload in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def payload_checksum(payload: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(payload):
        tensor = payload[name].contiguous()
        digest.update(_heading(name, tensor.dtype, tensor.shape))
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@lru_cache(4096)
def _heading(name: str, dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{name} {dtype} {tuple(shape)} ".encode()


def payload_precision(payload: Payload) -> StoragePrecision:
    """Returns at which precision a payload is stored. Raises a ValueError if its quantized planes are
    damaged."""
    if not _is_quantized(payload):
        half = payload.get("micro", torch.zeros(0)).dtype == torch.float16
        return "float16" if half else "float32"
    content, planes = _inflated(payload, MOST_CODES), payload.get("micro.scale", torch.zeros(0)).shape
    side = math.isqrt(len(content) // max(math.prod(planes), 1))
    codes = _codes(payload, content, (*planes, side, side))
    return f"int{int(np.abs(codes).max(initial=3)).bit_length() + 1}"


def payload_kind(payload: Payload) -> tuple:
    """Returns names and types of the tensors. Payloads of one kind fit into one shard."""
    return tuple((name, tensor.dtype) for name, tensor in sorted(payload.items()))


def stack_payloads(payloads: Sequence[Payload]) -> dict[str, list[Tensor]]:
    """Returns the tensors of a shard of payloads of one kind, each in pieces to be joined along their first
    axis. Streams are joined and their ends added. Large tensors are not copied."""
    tensors: dict[str, list[Tensor]] = {}
    for name in payloads[0]:
        values = [payload[name] for payload in payloads]
        if name.endswith(STREAM):
            tensors[f"{name}.ends"] = [torch.tensor([len(value) for value in values]).cumsum(0)]
            tensors[name] = values
        elif values[0].numel() < SMALL:
            tensors[name] = [torch.stack(values)]
        else:
            tensors[name] = [value[None] for value in values]
    return tensors


def unstack_payloads(tensors: dict[str, Tensor]) -> list[Payload]:
    """Returns the payloads of a shard's tensors, row by row: the inverse of `stack_payloads`, without copies.
    Raises a ValueError if the tensors are not those of a shard."""
    columns, counts = {}, set()
    for name, tensor in tensors.items():
        if name.endswith(".ends"):
            continue
        if name.endswith(STREAM):
            ends = tensors.get(f"{name}.ends", torch.zeros(0)).tolist()
            if ends != sorted(ends) or ends and not 0 <= ends[0] <= ends[-1] == len(tensor):
                raise ValueError(f"{name} does not end where its ends say")
            columns[name] = tensor.split([end - begin for begin, end in zip([0, *ends], ends)])  # noqa: B905
        else:
            columns[name] = tensor.unbind(0) if tensor.dim() else ()
        counts.add(len(columns[name]))
    if len(counts) != 1:
        raise ValueError("its tensors hold different numbers of scenes")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def payload_at(shard: safe_open, row: int) -> Payload:
    """Reads one payload of a shard. Raises a SafetensorError if the shard does not hold that row."""
    try:
        return _payload_at(shard, row)
    except (IndexError, ValueError, TypeError, RuntimeError) as error:
        raise SafetensorError(f"row {row}: {error}") from None


def _payload_at(shard: safe_open, row: int) -> Payload:
    payload = {}
    for name in shard.keys():  # noqa: SIM118
        if name.endswith(STREAM):
            ends = shard.get_tensor(f"{name}.ends")
            begin, end = (int(ends[row - 1]) if row else 0), int(ends[row])
            if not 0 <= begin <= end <= shard.get_slice(name).get_shape()[0]:
                raise ValueError(f"{name} has no bytes {begin} to {end}")
            payload[name] = shard.get_slice(name)[begin:end]
        elif not name.endswith(".ends"):
            payload[name] = shard.get_slice(name)[row : row + 1][0]
    return payload


def _is_quantized(payload: Payload) -> bool:
    return DIFFERENCES in payload or CODES in payload


def _deflate(micro: Float[Tensor, "3 r r m"], bits: int) -> tuple[Tensor, Tensor]:
    """Returns steps (3, m) and the stream of differences, plane by plane and feature by feature."""
    top = 2 ** (bits - 1) - 1
    scale = (micro.abs().amax((1, 2)) / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (micro / scale[:, None, None]).round().clamp(-top, top).to(torch.int8).permute(0, 3, 1, 2).numpy()
    for axis in (2, 3):  # differences of bytes wrap around, and so do their sums
        codes = np.diff(codes, axis=axis, prepend=np.int8(0))
    compressor = zlib.compressobj(strategy=zlib.Z_RLE, memLevel=9)  # matches of another kind cost more
    content = compressor.compress(codes.tobytes()) + compressor.flush()
    return scale, torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _inflated(payload: Payload, most: int) -> bytes:
    """Returns the codes, or their differences, of quantized micro planes, and at most a byte more than
    `most`. Raises a ValueError if they are damaged."""
    stream = payload[DIFFERENCES if DIFFERENCES in payload else CODES]
    try:
        return zlib.decompressobj().decompress(stream.numpy().data, most + 1)
    except zlib.error as error:
        raise ValueError(f"the deflated micro planes are damaged ({error})") from None


def _codes(payload: Payload, content: bytes, shape: tuple[int, ...]) -> Int8[np.ndarray, "3 m r r"]:
    """Returns the codes of quantized micro planes. Raises a ValueError if they have another shape."""
    if len(content) != math.prod(shape):
        raise ValueError(f"the deflated micro planes hold other than {math.prod(shape)} bytes")
    codes = np.frombuffer(content, np.int8).reshape(shape)
    for axis in (3, 2) if DIFFERENCES in payload else ():
        codes = codes.cumsum(axis, dtype=np.int8)
    return codes
