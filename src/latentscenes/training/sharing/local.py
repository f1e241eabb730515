"""Ranks as processes of this machine: the simplest engine, that of `--workers`.

They claim groups as all ranks do, but append them to the library itself: on one machine, several processes
may write to it, and scenes can be read at once. Their claims need no lease: this process sees when one of
them ends or hangs, and starts it again. It then goes on with what it has claimed, from its last checkpoint.

    work/ranks/    the claims, as long as the command runs
"""

import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import connection
from pathlib import Path

import torch

from latentscenes.core import config_io
from latentscenes.core.console import say
from latentscenes.core.errors import Interrupted
from latentscenes.core.processes import CHECK_SECONDS, ChildProcesses, Pipe, ProcessEnded, killed
from latentscenes.core.ranks import Rank
from latentscenes.core.runtime import StopFlag, set_up
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.training.sharing.claims import MOST_CLAIMS, Claims
from latentscenes.training.sharing.plan import Plan
from latentscenes.training.sharing.ranks import GroupFailed, Worker

PATIENCE = 600.0
"""Seconds without a step after which a process counts as hung."""
STARTING = 60.0
"""Further seconds that a process has until its first step."""
SIGNS = 10.0
"""Seconds between two signs of life of a process."""


def learned(plan: Plan, count: int, device: torch.device) -> Iterator[list[SceneInfo]]:
    """Learns the groups of a plan into its library by `count` processes. Yields the metadata of the scenes of
    each group that is stored. The caller holds the lock of the library's folder `work`.

    Raises:
        GroupFailed: a group ended every process that learned it. All others are learned.
        UserError: a process raised it, or ended again and again.
        Interrupted: a signal asked to stop. All processes have saved.
    """
    folder = Path(plan.library) / "work" / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with StopFlag() as stopped, ChildProcesses() as crew:
            team = _LocalRanks(crew, plan, folder, (count, device))
            while team.ranks:
                if stopped:
                    raise Interrupted
                yield from team.stored()
            if team.failed:
                raise team.failed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _LocalRanks:
    """The ranks, watched by this process."""

    def __init__(self, crew: ChildProcesses, plan: Plan, folder: Path, given: tuple[int, torch.device]):
        self._crew, self._plan, self._folder, (self._count, self._device) = crew, plan, folder, given
        self.ranks: dict[Pipe, int] = {}
        """The number of each rank that has not ended."""
        self.failed: GroupFailed | None = None
        self._silence: dict[int, float] = {}
        """Seconds since the last sign of life of each rank."""
        self._deaths = [0] * self._count
        """How often each rank died since it stored a group."""
        self._stored: set[str] = set()
        self._looked = time.monotonic()
        for number in range(self._count):
            self._start(number)

    def _start(self, number: int) -> None:
        rank = Rank(number, self._count, "--workers")
        self.ranks[self._crew.start(partial(_learn, self._plan, self._folder, rank, self._device))] = number
        self._silence[number] = -STARTING

    def stored(self) -> Iterator[list[SceneInfo]]:
        """Waits a moment. Yields the scenes of each group that was stored meanwhile."""
        for pipe in connection.wait(list(self.ranks), CHECK_SECONDS):
            number = self.ranks[pipe]
            try:
                message = self._crew.receive(pipe)
            except GroupFailed as error:
                self.failed = error
                continue
            except ProcessEnded as end:
                del self.ranks[pipe]
                if end.code:
                    self._restart(number, end)
                continue
            self._silence[number] = 0.0
            if message is not None:
                item, infos = message
                self._deaths[number] = 0
                if item not in self._stored:  # a process may have died after it said so
                    self._stored.add(item)
                    yield infos
        self._kill_hung()

    def _restart(self, number: int, end: ProcessEnded) -> None:
        self._deaths[number] += 1
        if self._deaths[number] > MOST_CLAIMS:
            raise killed(end, "What was finished is kept.")
        why = "most likely because memory ran out" if end.code == -9 else "for a reason unknown"
        say(
            f"Process {number + 1} of {self._count} was ended (exit code {end.code}), {why}. It starts again "
            "and goes on where it was."
        )
        self._start(number)

    def _kill_hung(self) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now  # more if this process was stopped itself
        for pipe, number in self.ranks.items():
            self._silence[number] += passed
            if self._silence[number] > PATIENCE:
                say(f"Process {number + 1} of {self._count} has not moved for {PATIENCE:.0f} s and is ended.")
                self._silence[number] = 0.0
                self._crew.kill(pipe)


def _learn(plan: Plan, folder: Path, rank: Rank, device: torch.device, pipe: Pipe) -> None:
    """Runs in a process of its own: learns groups until others hold or have learned the rest."""
    device, images = set_up(plan.threads, str(device)), PosedImages.open(plan.dataset)
    config = config_io.parse(plan.settings, "settings")
    claims = _Claims(folder, f"rank-{rank.number:04d}", pipe)
    Worker(
        plan, claims, lambda: LibraryFolder.open(plan.library),
        lambda item, infos, _: pipe.send((None, (item, infos))), lambda: True,
    ).learn(images, config, device, rank)  # fmt: skip


class _Claims(Claims):
    """Claims that lapse only when their owner is started again. The parent process hears of progress."""

    def __init__(self, folder: Path, owner: str, pipe: Pipe):
        super().__init__(folder, owner, math.inf)
        self._pipe, self._signed = pipe, -math.inf

    def progress(self) -> None:
        if time.monotonic() - self._signed > SIGNS:
            self._signed = time.monotonic()
            self._pipe.send((None, None))
