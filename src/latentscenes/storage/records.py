"""What runs and libraries keep beside their results: logged steps, the command, versions."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.errors import UserError
from latentscenes.core.files import write_bytes
from latentscenes.core.reading import parse_json, read_text, reason
from latentscenes.core.version import __version__

METRICS = "metrics.jsonl"
SCORES, FIT_SCORES = "evaluation.json", "evaluation_fit.json"
"""Scores on held-out and on fitted views. The next change of the run or library deletes them."""
MOST_LOG = 512 << 20
"""Bytes of the largest log that is read."""


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
    return [entry for entry in found if isinstance(entry, dict)]


def cut_metrics(folder: Path, total: int) -> None:
    """Removes an incomplete last line and the lines of steps after `total`, which will be repeated."""
    path = folder / METRICS
    if path.exists():
        kept = [line for line in read_metrics(folder) if line.get("total", math.inf) <= total]
        write_bytes(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())


def command_text(arguments: Sequence[str]) -> str:
    """Formats a command noted in a run or library as it is typed; empty for none."""
    if not arguments:
        return ""
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *map(shlex.quote, arguments[1:])])


def circumstances() -> dict[str, Any]:
    """Returns versions, machine and command, to be stored beside a result."""
    versions = {"latentscenes": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "machine": platform.platform(), "command": sys.argv}
