"""Process-wide setup (threads, allocator, device), seeded generators, stop signals and worker processes."""

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor

from latentscenes.core.console import console
from latentscenes.core.errors import Interrupted, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def set_up(threads: int | None = None, device: str = "auto") -> torch.device:
    """Sets threads and allocator thresholds and returns the device (`auto`: CUDA if available)."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads}: at least 1.")
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        _keep_freed_pages()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no CUDA device. Use --device cpu.")
    return torch.device(device)


def _keep_freed_pages() -> None:
    """Stops glibc from returning memory to the kernel at each step and requesting zeroed pages at the next,
    which costs almost half of a CPU step. C libraries without mallopt are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def machine_memory() -> int:
    """Returns this machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def seeded(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Returns a generator seeded by `key` alone.

    With (seed, stage, step) as the key, there is no generator state to save: a resumed run draws the same
    numbers as an uninterrupted one.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class PartOfNumbers:
    """A source of random numbers for some scenes of a batch: those that `generator` gives these scenes when
    it draws for the whole batch of `count` scenes."""

    generator: torch.Generator
    places: list[int]
    count: int


Numbers = torch.Generator | PartOfNumbers


def uniform(numbers: Numbers, *shape: int, axis: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Draws from [0, 1). `axis` is the one along which scenes lie, equally many entries for each."""
    if isinstance(numbers, torch.Generator):
        return torch.rand(*shape, generator=numbers, device=device)
    each = shape[axis] // len(numbers.places)
    whole = (*shape[:axis], each * numbers.count, *shape[axis + 1 :])
    drawn = torch.rand(*whole, generator=numbers.generator, device=device)
    chosen = torch.tensor(numbers.places, device=drawn.device)
    return drawn.unflatten(axis, (numbers.count, each)).index_select(axis, chosen).flatten(axis, axis + 1)


class StopFlag:
    """Becomes true at the first SIGINT or SIGTERM; a second signal has its usual effect."""

    def __init__(self) -> None:
        self.raised = False

    def __bool__(self) -> bool:
        return self.raised

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> "StopFlag":
        try:
            self._before = {
                number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # only the main thread may handle signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# Several processes side by side


Item = TypeVar("Item")
Result = TypeVar("Result")
Prepare = Callable[[], Callable[[Item], Result]]
Workers = dict[connection.Connection, BaseProcess]
CHECK_SECONDS = 0.2
"""Time between two checks for a stop signal."""
SAVE_SECONDS = 120.0
"""Time that workers get to save before they are killed."""


def side_by_side(prepare: Prepare, items: Sequence[Item], count: int) -> Iterator[Result]:
    """Yields results of items as they come, from `count` processes. Each process calls `prepare` once and the
    function that it returns for every item. `prepare` must be picklable: a function of a module, or a
    functools.partial of one. The work must save its progress, and return or raise `Interrupted` soon after
    SIGTERM.

    Raises:
        UserError: a worker raised it, or was killed.
        Interrupted: a signal asked to stop. All workers have saved.
    """
    waiting, busy = list(items), set()
    with StopFlag() as stopped:
        workers = _start(prepare, min(count, len(waiting)))
        try:
            while waiting or busy:
                for pipe in [pipe for pipe in workers if pipe not in busy][: len(waiting)]:
                    with _alive(workers[pipe]):
                        pipe.send(waiting.pop(0))
                    busy.add(pipe)
                if stopped:
                    raise Interrupted
                for pipe in connection.wait(busy, CHECK_SECONDS):
                    with _alive(workers[pipe]):
                        error, result = pipe.recv()
                    if error is not None:
                        raise error
                    busy.remove(pipe)
                    yield result
        finally:
            _stop(workers)


def _start(prepare: Prepare, count: int) -> Workers:
    context, workers = multiprocessing.get_context("spawn"), {}
    with _ignoring_interrupts():
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(prepare, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of the worker closes the pipe
            workers[ours] = process
    return workers


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Makes processes started here ignore Ctrl-C, which a terminal sends to all; the parent forwards it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _alive(worker: BaseProcess) -> Iterator[None]:
    """Turns errors of a closed pipe into the reason why the worker ended."""
    try:
        yield
    except (EOFError, OSError):
        worker.join()
        if worker.exitcode == -signal.SIGTERM:
            raise Interrupted from None
        raise UserError(
            f"a worker process was killed (exit code {worker.exitcode}), most likely because memory ran out. "
            "What was finished is kept. Run the same command with fewer --workers to continue."
        ) from None


def _stop(workers: Workers) -> None:
    """Asks all workers to stop and waits until they have."""
    for pipe, worker in workers.items():
        pipe.close()  # ends a worker that waits for work
        if worker.is_alive():
            worker.terminate()  # a worker at work saves and ends
    for worker in workers.values():
        worker.join(SAVE_SECONDS)
        if worker.is_alive():
            worker.kill()


# In the worker


def _work(prepare: Prepare, pipe: connection.Connection) -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    console.quiet = True  # only the parent prints
    try:
        work = prepare()
        while True:
            pipe.send((None, work(pipe.recv())))
    except EOFError:  # no more work
        return
    except (Interrupted, UserError) as error:
        found = error
    except Exception:
        found = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
    with suppress(OSError):  # the parent may be gone
        pipe.send((found, None))


def _stop_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
