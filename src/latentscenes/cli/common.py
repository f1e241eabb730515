"""Parts that commands share."""

import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import tyro

from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.names import no_dataset, no_folder, nothing_learned, printable

if TYPE_CHECKING:
    import torch


ADDRESSES = ("http", "https", "s3", "gs")
"""Beginnings of addresses of published libraries."""
PATHS = tyro.constructors.ConstructorRegistry()
"""How words of the command line become paths: an empty one is refused; as a path, it would mean the current
folder."""


@PATHS.primitive_rule
def _path_rule(
    asked: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if asked.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=lambda words: given_path(words[0]),
        is_instance=lambda value: isinstance(value, Path), str_from_instance=lambda path: [str(path)],
    )  # fmt: skip


def given_path(word: str) -> Path:
    """Returns a path as typed. Raises a UserError if it is empty, for instance an unset variable of a script,
    or an address that nothing reads."""
    if not word.strip():
        raise UserError(f"{word!r}: an empty path. Name a file or a folder; the current folder is `.`.")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", word)
    if scheme and scheme[1].lower() == "file":
        raise UserError(f"{word}: give the path without file://.")
    if scheme and scheme[1] not in ADDRESSES:
        raise UserError(
            f"{word}: {scheme[1]} addresses cannot be used; {', '.join(ADDRESSES)} can, and folders of this "
            "machine."
        )
    return Path(word)


FLAT = tyro.conf.arg(name="")
"""Makes the fields of a dataclass options of the command, without a prefix."""


@dataclass(frozen=True)
class Cores:
    """How many cores compute."""

    threads: int | None = None
    """Number of CPU threads; unset: all cores."""


@dataclass(frozen=True)
class Machine(Cores):
    """Where to compute."""

    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto: a GPU if there is one."""


CORES, MACHINE = Cores(), Machine()
NO_MEMORY = "(not enough|out of|can('t|not) allocate) memory"
"""Messages of torch if memory runs out: of the operating system, allocators and GPUs."""
CoreOptions, MachineOptions = Annotated[Cores, FLAT], Annotated[Machine, FLAT]


def set_up(machine: Cores) -> "torch.device":
    """Sets the number of threads and chooses the device: the CPU for commands that compute nowhere else."""
    from latentscenes.core import runtime

    return runtime.set_up(machine.threads, machine.device if isinstance(machine, Machine) else "cpu")


def require_library(library: Path) -> None:
    """Raises a UserError, before torch is loaded, where the folder of a library was mistyped."""
    from latentscenes.storage.description import read_description

    read_description(library)


def require_source(library: Path) -> None:
    """Raises a UserError, before torch is loaded, where a library was mistyped. Addresses are not asked."""
    from latentscenes.storage.published.index import is_published

    if not is_published(library):
        require_library(library)


def require_parent(run: Path) -> None:
    """Raises a UserError, before torch is loaded, where a run, library or packaged model was mistyped."""
    from latentscenes.storage.description import find_model

    find_model(run)


def require_dataset(data: Path) -> None:
    """Raises a UserError, before torch is loaded, where a dataset was mistyped."""
    if not (data / "views.json").is_file():
        raise no_dataset(data)


def require_there(folder: Path) -> None:
    """Raises a UserError, before torch is loaded, where a folder to import was mistyped."""
    if not folder.exists():
        raise no_folder(folder)


def require_folder(run: Path) -> None:
    """Raises a UserError at once, before torch is loaded, where a run or a library was mistyped."""
    if not run.exists() and not re.match("(https?|s3|gs):/", str(run)):
        raise nothing_learned(run)


def say(text: str) -> None:
    """Prints a line to the terminal."""
    from latentscenes.core import console

    console.say(text)


def refuse_repeated(arguments: list[str]) -> None:
    """Raises a UserError if an option is given twice: only its last values would count."""
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        if options.count(option) > 1:
            raise UserError(
                f"{option}: given {options.count(option)} times. Write it once, with all its values."
            )


def run_program(command: Callable[..., None]) -> None:
    """Runs a function as a program. Its parameters are the options, and errors of the user print one line."""
    with errors_in_one_line():
        refuse_repeated(sys.argv[1:])
        with PATHS:
            tyro.cli(command, description=command.__doc__)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """On an error that the user can fix, or on a stop by Ctrl-C or SIGTERM, prints one line and ends the
    process. Characters that the terminal's encoding lacks are printed as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stops = _Stops()
    try:
        with stops:
            yield
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:  # a reader such as `head` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Interrupted:
        print("latentscenes: stopped; everything is saved. The same command continues.", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        stops.end()
    except OSError as error:  # disk full, no permission, …
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _fail(f"{where}{error.strerror or error}.")
    except Exception as error:
        if stops.number:  # a package made this error of the stop
            stops.end()
        said = isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error), re.IGNORECASE)
        if not said and not isinstance(error, MemoryError):
            raise
        _fail("out of memory. Close other programs, or choose smaller sizes or fewer scenes (--scenes).")


LOOK_SECONDS, LONGEST_IMPORT = 0.05, 2.0
"""Time between two looks whether an import goes on; seconds of it after which it is broken off anywhere."""


class _Stops:
    """Ends a block at Ctrl-C and at SIGTERM, so that temporary files and other processes go, too.

    An import ends where it looks for its next module: elsewhere, packages turn the stop into errors of their
    own. Those that keep it and go on are stopped again.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0: none."""

    def __enter__(self) -> "_Stops":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other can set signals
            self._before = {one: signal.signal(one, self._stop) for one in (signal.SIGINT, signal.SIGTERM)}
            if hasattr(signal, "setitimer"):  # not on Windows
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in self._before.items():
            signal.signal(one, handler)
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first, self.number, self._come = not self.number, number, time.monotonic()
        if not first or not hasattr(signal, "setitimer") or not _is_importing(frame):
            raise KeyboardInterrupt
        sys.meta_path.insert(0, self)
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS)

    def find_spec(self, *_: object) -> None:
        """Called where an import looks for a module."""
        if threading.current_thread() is threading.main_thread() and not _is_ending():
            raise KeyboardInterrupt

    def _again(self, _: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS)
        late = time.monotonic() > self._come + LONGEST_IMPORT
        if not _is_ending() and (late or not _is_importing(frame)):
            raise KeyboardInterrupt

    def end(self) -> NoReturn:
        print("latentscenes: stopped. What is complete stays; run the same command again.", file=sys.stderr)
        sys.exit(128 + (self.number or signal.SIGINT))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_ending() -> bool:
    """Returns whether this code tidies up after a stop: it must not be stopped, too."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _fail(message: str) -> None:
    print(f"latentscenes: {printable(message)}", file=sys.stderr)
    sys.exit(2)
