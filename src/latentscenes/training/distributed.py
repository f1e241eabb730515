"""Stage 1 by several processes, also of several machines. The only file that uses torch.distributed.

    torchrun --nproc-per-node 4 -m latentscenes train …

Process r of W owns the scenes r, r + W, r + 2W …: it alone holds their parameters and moments. At each step,
all see the same batch of scenes; each renders those that it owns, with the random numbers that one process
would draw for them. Gradients of the shared parts are summed over all processes, so all take the same step.
Rows of scenes never travel: at a checkpoint, each process writes its own into the run folder, which all must
see, and the first joins them. So a checkpoint is that of one process, and any number of processes goes on
from it.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, distributed, nn

from latentscenes.core.config import Config
from latentscenes.core.console import Spent, console
from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, writing_to
from latentscenes.core.names import counted
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.row_files import belong_on_disk
from latentscenes.storage.run import Position, Run
from latentscenes.storage.tensors import read_tensors, write_tensors

LONGEST_WAIT = timedelta(minutes=20)
"""Time after which a process that does not answer counts as lost. A process that ends is noticed at once."""
RANKS = "ranks"
"""Folder in a run where processes put their rows while a checkpoint is written."""
LARGE = 1 << 16
"""Numbers of a gradient that is summed where it lies; smaller ones are copied to be sent at once."""
ROWS, VIEWS = "rows", "views"


@dataclass(frozen=True)
class Team:
    """The processes that learn one run: by default, this one alone."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.number == 0

    def owned(self, scenes: int) -> Int[Tensor, "o"]:
        """Returns which of all scenes this process owns."""
        return torch.arange(self.number, scenes, self.count)

    def places(self, scenes: Sequence[int]) -> list[int]:
        """Returns the places in a batch of those of its scenes that this process owns."""
        return [place for place, scene in enumerate(scenes) if scene % self.count == self.number]

    def row(self, scene: int) -> int:
        """Returns the row, in the tables of its owner, of a scene."""
        return scene // self.count

    # Together: every process must make these calls, in the same order

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Returns the sums of all processes' values."""
        if self.count == 1:
            return list(values)
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        with _all_alive():
            distributed.all_reduce(sums)
        return sums.tolist()

    def agreed(self, stop: bool, save: bool, spent: Spent) -> tuple[bool, bool, Spent]:
        """Returns whether any process wishes to stop, whether the first wishes to save, and the time spent:
        the CPU time of all, the wall time of this one."""
        if self.count == 1:
            return stop, save, spent
        stops, saves, cpu = self.sum([stop, save and self.first, spent.cpu or 0.0])
        return stops > 0, saves > 0, Spent(spent.wall, cpu)

    def mean_terms(self, found: Mapping[str, Tensor], names: Sequence[str], share: float) -> dict[str, float]:
        """Returns the terms of the whole batch from those of each process's `share` of it."""
        if self.count == 1:
            return {name: value.item() for name, value in found.items()}
        mine = [found[name].item() * share if name in found else 0.0 for name in names]
        sums = self.sum([*mine, *(float(name in found) for name in names)])
        means, present = sums[: len(names)], sums[len(names) :]
        return {name: mean for name, mean, seen in zip(names, means, present, strict=True) if seen}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces the gradients of all parameters that learn by their sums over all processes."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if self.count == 1 or not learning:
            return
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        large = [one for one in learning if one.numel() >= LARGE and one.is_contiguous()]
        small = [one for one in learning if all(one is not other for other in large)]
        with _all_alive():
            for parameter in large:
                parameter.grad = parameter.grad.contiguous()
                distributed.all_reduce(parameter.grad)
            if not small:
                return
            flat = torch.cat([parameter.grad.flatten() for parameter in small])
            distributed.all_reduce(flat)
        for parameter, part in zip(small, flat.split([one.numel() for one in small]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))  # in its own order in memory, such as channels last

    def align(self, model: Model) -> None:
        """Gives all processes the first one's shared parts."""
        if self.count > 1:
            with torch.no_grad(), _all_alive():
                for tensor in model.state_dict().values():
                    distributed.broadcast(tensor, 0)


ALONE = Team()


class ProcessLost(UserError):
    """Another process of the run has ended."""


@contextmanager
def _all_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises no class of its own with gloo
        if "memory" in str(error):
            raise
        raise ProcessLost(
            "another process of this run has ended or does not answer "
            f"({' '.join(str(error).split())[:100]}). Its message says why. The same command goes on from "
            "the last checkpoint."
        ) from None


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """Joins the processes that torchrun has started, until the end of the block. Yields this process's place
    among them, and its device: with GPUs, the one that torchrun numbers. Without torchrun, this process is
    alone. If another process ends, says so and ends this one with status 2."""
    count = os.environ.get("WORLD_SIZE", "1") if "MASTER_ADDR" in os.environ else "1"
    if count == "1":
        yield ALONE, device
        return
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with _all_alive():
        store, number, count = next(distributed.rendezvous("env://", timeout=LONGEST_WAIT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=distributed.PrefixStore(f"attempt {attempt}", store),  # torchrun keeps it over restarts
            rank=number,
            world_size=count,
            timeout=LONGEST_WAIT,
        )
    try:
        team = Team(distributed.get_rank(), distributed.get_world_size())
        console.quiet = not team.first
        yield team, device
    except ProcessLost as error:
        print(f"latentscenes: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # gloo can abort a process that still tidies up after others are gone
    finally:
        distributed.destroy_process_group()


def refuse_alone(config: Config, scenes: int, team: Team) -> None:
    """Raises a UserError if stage 1 of a configuration needs a process of its own, but there are several."""
    if team.count == 1:
        return
    if team.count > scenes:
        raise UserError(
            f"{team.count} processes for {counted(scenes, 'scene')}: start at most one for each scene."
        )
    if belong_on_disk(scenes, config):
        raise UserError(
            "storage: micro planes in files are for one process, but torchrun has started "
            f"{team.count}. Set storage=memory, with machines whose memory holds all scenes together."
        )
    for stage in config.train:
        if stage.rates.colors or stage.rates.cameras:
            raise UserError(
                f"stage {stage.name!r} learns corrections of views, which one process does alone."
            )
        if stage.rates.encoder and config.normalizer.kind not in ("none", "tanh"):
            raise UserError(
                f"stage {stage.name!r}: with a normalizer {config.normalizer.kind}, which measures whole "
                "batches, one process learns the encoder alone. Use normalizer.kind=tanh."
            )


# Checkpoints


@dataclass(frozen=True)
class RowOwners:
    """The rows of tables that each process owns."""

    team: Team
    scenes: Int[Tensor, "o"]
    views: Int[Tensor, "w"]
    """Places of the fitted views of its scenes among all fitted views."""
    counts: dict[str, int]
    """Numbers of all scenes and of all fitted views."""

    @classmethod
    def of_scenes(cls, team: Team, fitted: Sequence[int]) -> "RowOwners":
        """Returns the scenes and views that a process owns, for these numbers of fitted views."""
        ends = torch.tensor([0, *fitted]).cumsum(0).tolist()
        scenes = team.owned(len(fitted))
        views = torch.cat([torch.arange(ends[scene], ends[scene + 1]) for scene in scenes.tolist()])
        return cls(team, scenes, views, {ROWS: len(fitted), VIEWS: ends[-1]})

    def of(self, name: str, whole: Tensor) -> Tensor:
        """Returns this process's part of a tensor of a checkpoint."""
        kind = _kind(name)
        if kind is None or self.team.count == 1 or len(whole) != self.counts[kind]:
            return whole
        return whole[self.scenes if kind == ROWS else self.views]

    def save(
        self, run: Run, model: Model, rows: SceneParameters, state: dict[str, Tensor], position: Position
    ) -> None:
        """Writes a checkpoint together with all processes."""
        if self.team.count == 1:
            return run.save(model, rows, state, position)
        home, remedy = run.path / RANKS, "Run the same command again."
        own = rows.tables() | {name: tensor for name, tensor in state.items() if _kind(name)}
        if not self.team.first:
            with writing_to(home):
                make_folder(home)
            write_tensors(_file(home, self.team.number), own | {ROWS: self.scenes, VIEWS: self.views})
        self.team.wait()
        if self.team.first:
            whole = {
                name: tensor.new_empty((self.counts[_kind(name)], *tensor.shape[1:]), device="cpu")
                for name, tensor in own.items()
            }
            for number in range(self.team.count):
                part = read_tensors(_file(home, number), remedy) if number else own
                places = {ROWS: part[ROWS], VIEWS: part[VIEWS]} if number else self._places()
                for name, tensor in whole.items():
                    tensor[places[_kind(name)]] = part[name].cpu()
            tables = SceneParameters(**{name: whole[name] for name in SceneParameters.NAMES})
            replaced = {name: whole.get(name, tensor) for name, tensor in state.items()}
            run.save(model, tables, replaced, position)
            shutil.rmtree(home)
        self.team.wait()
        return None

    def _places(self) -> dict[str, Tensor]:
        return {ROWS: self.scenes, VIEWS: self.views}


def _kind(name: str) -> str | None:
    """Returns the kind of thing that a tensor of a checkpoint has one row for; None: it is shared."""
    if name in SceneParameters.NAMES or name.startswith("rows."):
        return ROWS
    return VIEWS if name.startswith("focus.") else None


def _file(home: Path, number: int) -> Path:
    return home / f"{number}.safetensors"
