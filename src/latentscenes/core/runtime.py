"""Process-wide setup (threads, allocator, device), seeded generators and stop signals."""

import ctypes
import gc
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from latentscenes.core.errors import UserError

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


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pauses Python's search for cyclic garbage, which looks through all objects again each time that their
    number has grown by a quarter. Objects without cycles are freed as before."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


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
class SlicedGenerator:
    """A source of random numbers for some scenes of a batch: those that `generator` gives these scenes when
    it draws for the whole batch of `count` scenes."""

    generator: torch.Generator
    places: list[int]
    count: int


Numbers = torch.Generator | SlicedGenerator


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
