"""Times variants in interleaved rounds, and measures the peak speed of this machine.

Machines are shared and noisy, so variants of the same work run in turns within one process. Results are the
median time of each variant and the median over rounds of their ratios.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one variant over the rounds, in seconds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Time of `other` divided by the time of this variant: the median over rounds."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Runs all variants once unmeasured, then `rounds` times in turns. Each round starts with another
    variant."""
    for run in variants.values():
        run()
    names, seconds = list(variants), {name: [] for name in variants}
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            begun = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - begun)
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def peak_flops(
    rounds: int = 5, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """Operations per second of a large matrix product: the best of some rounds."""
    size = 1536 if torch.device(device).type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = min(interleave({"product": lambda: (a @ b, wait_for(device))}, rounds)["product"].seconds)
    return 2 * size**3 / best


def peak_bandwidth(rounds: int = 5, device: torch.device | str = "cpu") -> float:
    """Bytes per second, read plus written, of copying 256 MiB: the best of some rounds."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    copying = {"copy": lambda: (target.copy_(source), wait_for(device))}
    return 2 * source.numel() * source.element_size() / min(interleave(copying, rounds)["copy"].seconds)


def wait_for(device: torch.device | str) -> None:
    """Waits until a GPU has done what it was told to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, object]:
    """Description of the machine, to be stored with every figure."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
