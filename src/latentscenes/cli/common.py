"""What commands have in common."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from latentscenes.core.errors import Interrupted, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """Where to compute."""

    threads: int | None = None
    """CPU threads; unset: all cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""


MACHINE = Machine()
MachineOptions = Annotated[Machine, tyro.conf.arg(name="")]


def set_up(machine: Machine) -> "torch.device":
    """Set threads and choose the device."""
    from latentscenes.core import runtime

    return runtime.set_up(machine.threads, machine.device)


def run_program(command: Callable[..., None]) -> None:
    """Run a function as a program: its parameters are the options, and mistakes end in one line."""
    with errors_in_one_line():
        tyro.cli(command, description=command.__doc__)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process with one line on errors that the user can mend, and on a stop."""
    try:
        yield
    except UserError as error:
        print(f"latentscenes: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print("latentscenes: stopped; everything is saved. The same command goes on.", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # disk full, no permission, …
        if error.filename is None:
            raise
        print(f"latentscenes: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
