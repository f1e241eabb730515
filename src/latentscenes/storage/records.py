"""Records that runs and libraries keep beside their results: logged steps, the command, versions."""

import hashlib
import json
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, write_bytes
from latentscenes.core.reading import parse_json, read_bytes, read_text, reason
from latentscenes.core.version import __version__

METRICS = "metrics.jsonl"
SCORES, FIT_SCORES = "evaluation.json", "evaluation_fit.json"
"""Scores on held-out and on fitted views. The next change of the run or library deletes them."""
SEAL = "sha256"
"""Only entry of the first line of a library's log: the SHA-256 of the other lines."""
MOST_LOG = 512 << 20
"""Bytes of the largest log that is read."""


@dataclass
class Position:
    """The progress of a run."""

    stage: int = 0
    step: int = 0
    """Steps done in this stage."""
    total: int = 0
    """Steps done in all stages."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time spent, by stage name."""
    cpu_seconds: dict[str, float | None] = field(default_factory=dict)
    """CPU time spent, by stage name; None for a stage that an earlier version began."""

    def spent(self, stage: str) -> Spent:
        """Returns the time spent on a stage so far."""
        if stage not in self.seconds:
            return Spent(0.0, 0.0)
        return Spent(self.seconds[stage], self.cpu_seconds.get(stage))

    def spend(self, stage: str, spent: Spent) -> None:
        """Notes the time spent on a stage so far."""
        self.seconds[stage], self.cpu_seconds[stage] = spent.wall, spent.cpu


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the logged steps in a run or library folder, without lines that a crash left incomplete."""
    path, found = folder / METRICS, []
    try:
        lines = read_text(path, MOST_LOG).splitlines() if path.exists() else ()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}). Correct it, or move it away.") from None
    for line in lines:
        try:
            found.append(parse_json(line))
        except ValueError:
            continue
    return [entry for entry in found if isinstance(entry, dict) and entry.keys() != {SEAL}]


def keep_log(run: Path, library: Path) -> None:
    """Moves the logged steps of a run into the folder of a library, where nothing is added to them any more.
    Their first line is their checksum."""
    if (run / METRICS).exists():
        content = read_bytes(run / METRICS, MOST_LOG)
        write_bytes(library / METRICS, _log_checksum(content) + content)
        (run / METRICS).unlink()


def _log_checksum(content: bytes) -> bytes:
    return json.dumps({SEAL: hashlib.sha256(content).hexdigest()}).encode() + b"\n"


def log_problem(library: Path) -> str | None:
    """Returns a description of damage to the log that `keep_log` wrote; None if nothing, or if there is no
    log, or one of an earlier version, whose first line is a step."""
    try:
        content = read_bytes(library / METRICS, MOST_LOG)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({reason(error)})"
    first, _, rest = content.partition(b"\n")
    try:
        if first + b"\n" == _log_checksum(rest) or "step" in parse_json(first.decode()):
            return None
    except (TypeError, ValueError):
        pass
    return "was edited, or damaged, since it was written"


def cut_metrics(folder: Path, total: int) -> None:
    """Removes an incomplete last line and the lines of steps after `total`, which will be repeated."""
    path = folder / METRICS
    if path.exists():
        kept = [line for line in read_metrics(folder) if line.get("total", math.inf) <= total]
        write_bytes(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def log_of(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's entry `log`: its bytes so far and their SHA-256."""
    path = folder / METRICS
    if not path.exists():
        return {}
    return {"log": {"bytes": path.stat().st_size, "checksum": file_checksum(path)}}


def log_matches(folder: Path, log: Any) -> bool:
    """Returns whether the log begins with the bytes that a checkpoint states; see `log_of`."""
    try:
        size, checksum = int(log["bytes"]), log["checksum"]
        begin = read_bytes(folder / METRICS, MOST_LOG)[:size]
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return len(begin) == size and hashlib.sha256(begin).hexdigest() == checksum


def command_text(arguments: Sequence[str]) -> str:
    """Formats a command noted in a run or library as it is typed; empty for anything but a list of words."""
    if not arguments or not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
        return ""
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *map(shlex.quote, arguments[1:])])


def circumstances() -> dict[str, Any]:
    """Returns versions, machine and command, to be stored beside a result."""
    versions = {"latentscenes": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "machine": platform.platform(), "command": sys.argv}
