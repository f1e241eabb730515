"""What commands have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3"]
"""Those of quantise.py, which is not imported before a command runs."""


@dataclass(frozen=True)
class Machine:
    """Where to compute."""

    threads: int | None = None
    """CPU threads; unset: all cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""


MACHINE = Machine()
MachineOptions = Annotated[Machine, tyro.conf.arg(name="")]


def start(machine: Machine) -> "torch.device":
    """Set threads and choose the device."""
    from latentscenes import runtime

    return runtime.start(machine.threads, machine.device)
