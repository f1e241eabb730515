"""What a process sets once at its start: threads, the allocator, the device; and the seeds of its random numbers."""

import ctypes
import hashlib
import os
import signal
import sys
from types import FrameType

import torch

from latentscenes.core.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def set_up(threads: int | None = None, device: str = "auto") -> torch.device:
    """Set threads and the allocator's thresholds, choose the device (`auto`: CUDA where there is one)."""
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        _keep_freed_pages()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA device here. Use --device cpu.")
    return torch.device(device)


def _keep_freed_pages() -> None:
    """Stop glibc from returning memory to the kernel at every step and asking it for zeroed pages at the next, which
    costs close to half of a CPU step. Another C library does not know mallopt; then nothing is lost but that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def seeded(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator that depends on `key` alone: the randomness of a step is a function of (seed, stage, step), so
    there is no generator state to save, and a resumed run draws what an unbroken one draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class StopFlag:
    """True once SIGINT or SIGTERM came in; a second one has its usual effect."""

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
        except ValueError:  # not in the main thread: signals are someone else's business
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
