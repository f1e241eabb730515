"""Ranks of `exploit` are killed, stopped and moved while they learn; then the scenes are counted. Run:

    python -m benchmarks.ranks --folder ranks --data data/cars --run cars --set exploit.fit.epochs=20

Each fault is tried several times at random moments. One table says how many scenes were lost, differ from
those that one process learns, or were learned twice. Each rank runs in a fork of this process, as if typed.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import tyro

from latentscenes.cli import main as program
from latentscenes.cli.common import run_program, say
from latentscenes.core.console import Table, show
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.verifying import verify

Settings = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE …")]
RANKS = 3
LEASE = 2.0
"""Seconds."""
PATIENCE = 600
"""Seconds after which ranks count as hanging."""


class Fleet:
    """The ranks that learn into one library."""

    def __init__(self, command: list[str], out: Path):
        self.command, self.out, self.log = command, out, out.with_suffix(".log")
        self.running: dict[int, int] = {}
        self.starts = 0
        shutil.rmtree(out, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def start(self, rank: int) -> None:
        """Starts a rank in a fork; rank −1: a process that learns alone."""
        number = os.fork()
        if number:
            self.running[rank] = number
            self.starts += 1
            return
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        more = ["--out", str(self.out)]
        if rank >= 0:
            more += ["--rank", str(rank), "--world-size", str(RANKS), "--lease", str(LEASE)]
        sys.argv = ["latentscenes", *self.command, *more]
        status = 1
        try:
            program.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(status)

    def send(self, rank: int, number: int) -> None:
        """Sends a signal to a rank, if it still runs."""
        if rank in self.running:
            os.kill(self.running[rank], number)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Ends a rank and waits for its end."""
        self.send(rank, number)
        if rank in self.running:
            os.waitpid(self.running.pop(rank), 0)

    def finish(self) -> bool:
        """Waits until all ranks have ended. Returns whether they did without an error."""
        good, end = True, time.monotonic() + PATIENCE
        while self.running:
            for rank, process in list(self.running.items()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    good = good and status == 0
                    del self.running[rank]
            if time.monotonic() > end:
                for rank in list(self.running):
                    self.kill(rank)
                return False
            time.sleep(0.05)
        return good

    def learned(self) -> list[str]:
        """Returns the groups that were learned, one entry each time."""
        return re.findall(r"part-\S+, group (\d+) of", self.log.read_text())

    def content(self) -> tuple[dict[str, str], int]:
        """Returns the checksums of all scenes in the library, and how many are damaged."""
        library = LibraryFolder.open(self.out)
        found = {name: place.checksum for name, place in library.index.places().items()}
        damaged = len(verify(library))
        library.close()
        return found, damaged


def one_killed(fleet: Fleet) -> None:
    fleet.kill(0)
    fleet.start(0)


def all_killed(fleet: Fleet) -> None:
    for rank in range(RANKS):
        fleet.kill(rank)
    for rank in range(RANKS):
        fleet.start(rank)


def one_lost(fleet: Fleet) -> None:
    fleet.kill(0)


def one_preempted(fleet: Fleet) -> None:
    fleet.kill(0, signal.SIGTERM)
    fleet.start(0)


def one_moved(fleet: Fleet) -> None:
    """Killed, and started again on what looks like another machine."""
    fleet.kill(0)
    for file in fleet.out.glob("parts/*/owners/part-0000"):
        file.write_text("another machine")
    fleet.start(0)


def one_stalled(fleet: Fleet) -> None:
    """Stopped for longer than its lease, then going on."""
    fleet.send(0, signal.SIGSTOP)
    time.sleep(3 * LEASE)
    fleet.send(0, signal.SIGCONT)


FAULTS: dict[str, Callable[[Fleet], None]] = {
    "none": lambda fleet: None,
    "a rank killed, started again": one_killed,
    "all ranks killed, started again": all_killed,
    "a rank killed, not started again": one_lost,
    "a rank killed, started on another machine": one_moved,
    "a rank preempted (SIGTERM), started again": one_preempted,
    "a rank stalled for three leases": one_stalled,
}


def main(
    folder: Path, data: Path, run: Path, overrides: Settings = (), rounds: int = 5, seed: int = 0
) -> None:
    """Learn scenes with ranks to which something happens; count what is lost, differs or is learned twice.

    Args:
        folder: folder for the libraries.
        data: dataset with new scenes.
        run: shared parts.
        overrides: settings to change, for instance exploit.fit.epochs=20.
        rounds: how often each fault is tried.
        seed: of the moments.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    command = ["exploit", "--data", str(data), "--run", str(run), "--threads", "1", "--group", "1"]
    command += ["--set", *overrides] if overrides else []
    chance, rows, length = random.Random(seed), [], 0.0
    alone = Fleet([*command, "--workers", "1"], folder / "alone")
    alone.start(-1)
    alone.finish()
    right, _ = alone.content()
    for fault, harm in FAULTS.items():
        counts = dict.fromkeys(("rounds", "scenes", "lost", "differ", "twice", "starts", "failed"), 0)
        for _ in range(rounds if fault != "none" else 1):
            fleet, begun = Fleet(command, folder / "library"), time.monotonic()
            for rank in range(RANKS):
                fleet.start(rank)
            if fault != "none":
                time.sleep(chance.uniform(0.1, 0.9) * length)
                harm(fleet)
            counts["failed"] += not fleet.finish()
            length = length or time.monotonic() - begun
            found, damaged = fleet.content()
            learned = fleet.learned()
            counts["rounds"] += 1
            counts["scenes"] += len(right)
            counts["lost"] += len(right.keys() - found.keys())
            counts["differ"] += sum(found[name] != right[name] for name in found) + damaged
            counts["twice"] += len(learned) - len(set(learned))
            counts["starts"] += fleet.starts
        rows.append((fault, *map(str, counts.values())))
        say(f"{fault}: {counts}")
    columns = ("fault", *counts)
    show(
        Table(f"{RANKS} ranks, a lease of {LEASE:g} s, {length:.1f} s without a fault", columns, tuple(rows))
    )


if __name__ == "__main__":
    run_program(main)
