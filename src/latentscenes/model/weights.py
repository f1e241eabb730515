"""Weight files that somebody else trained, read safely: safetensors, or .pth holding tensors and nothing else."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentscenes.core.errors import UserError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name, floating-point ones as float32."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 — broken files raise half a dozen kinds; in each case the file is at fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as weights ({reason}). Give a .safetensors file, or a .pth that holds tensors only."
        ) from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds something else than named tensors. Save the network's state_dict alone.")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
