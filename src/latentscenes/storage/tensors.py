"""Files of tensors (safetensors) that are complete or absent."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.files import load_tensors, new_file, open_tensors, reading_from
from latentscenes.model.model import Model

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of types in safetensors files."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], facts: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with `facts` in its metadata: see `new_file`. A sequence of tensors is one
    tensor, cut along its first axis; it is not joined in memory. The package `safetensors` would copy all
    tensors in memory, and fix the permissions at 0600."""
    pieces = {name: [one] if isinstance(one, Tensor) else list(one) for name, one in tensors.items()}
    order = sorted(pieces, key=lambda name: (-pieces[name][0].element_size(), name))
    header: dict[str, Any] = {"__metadata__": facts} if facts else {}
    end = 0
    for name in order:
        first, rest = pieces[name][0], pieces[name][1:]
        shape = list(first.shape)
        if rest:
            shape[0] = sum(len(piece) for piece in pieces[name])
        begin, end = end, end + first.element_size() * math.prod(shape)
        header[name] = {"dtype": DTYPES[first.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as partial, open(partial, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in itertools.chain.from_iterable(pieces[name] for name in order):
            flat = piece.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises a UserError that names the file and `remedy` if it is damaged."""
    with reading_from(path, remedy):
        return load_tensors(path)


def holds_boxes(path: Path, remedy: str) -> bool:
    """Returns whether a file of scene parameters holds boxes of the scenes' own. Raises as `read_tensors`."""
    with reading_from(path, remedy), open_tensors(path, "np") as stored:
        return "box" in stored.keys() and stored.get_slice("box").get_shape()[1] > 0  # noqa: SIM118


def stored_model(config: Config, box: Box, path: Path, remedy: str) -> Model:
    """Builds a model and fills it from a file. Base planes can be of any size, so they are compared before
    they are allocated. Raises a UserError if the file is damaged or belongs to another configuration."""
    planes = config.planes
    shape = [planes.bases if planes.macro else 0, 3, planes.resolution, planes.resolution, planes.macro]
    with reading_from(path, remedy), open_tensors(path, "np") as stored:
        found = stored.get_slice("bases").get_shape()
    if found != shape:
        raise UserError(f"{path}: base planes are {found}, but the configuration needs {shape}.")
    model = Model(config, box, pretrained=False)
    fill_model(model, path, remedy)
    return model


def fill_model(model: Model, path: Path, remedy: str) -> None:
    """Copies the weights of a file into a model. Raises a UserError with `remedy` if the file is damaged, or
    one that says so if it belongs to another version or configuration."""
    try:
        model.load_state_dict(read_tensors(path, remedy))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: does not fit this version's model ({reason} …). Learn the run again in a new folder."
        ) from None
