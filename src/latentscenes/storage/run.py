"""A run folder: configuration, learned parameters, and the state that continues learning after any crash.

    config.yaml        every setting
    run.json           data, scene names, box, versions, command
    metrics.jsonl      one line per logged step
    checkpoints/N/     state after N steps: shared, rows and optimizer.safetensors, state.json
    evaluation.json    scores, once evaluated; deleted when learning goes on

A checkpoint gets its name only when it is complete. Random numbers are a function of (seed, stage, step), see
core/runtime.py, so tensors and counters suffice for an exact continuation.
"""

import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.core.files import locked, write_bytes, write_json
from latentscenes.core.names import check_name
from latentscenes.core.reading import parse_json, read_json, read_text, reason, require_regular
from latentscenes.core.runtime import seeded
from latentscenes.core.version import __version__
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, random_parameters, scene_shapes
from latentscenes.storage.row_files import RowFiles, belong_on_disk, read_micro, rows_on_disk

SCORES, FIT_SCORES = "evaluation.json", "evaluation_fit.json"
"""Scores on held-out and on fitted views. The next change of the run or library deletes them."""
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


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run, fixed at its start."""

    kind: Literal["train", "exploit"]
    data: str
    """Folder of the dataset."""
    split: str
    scenes: list[str]
    box: Box
    parent: str | None = None
    """Folder of the run that provides the shared parts of an `exploit` run."""


class Run:
    """An opened run folder. Call `lock` before writing."""

    def __init__(self, path: Path, config: Config, info: RunInfo):
        self.path, self.config, self.info = path, config, info
        self.files: RowFiles | None = None
        """Files of the micro planes, if these are too large for checkpoints."""
        self._lock = ExitStack()

    @classmethod
    def create(cls, path: str | Path, config: Config, info: RunInfo) -> "Run":
        """Starts a run, or opens the run in `path` if it has the same settings, scenes and box. Raises a
        UserError if the folder holds a different run or other files."""
        path = Path(path)
        if (path / "run.json").is_file():
            run = cls.open(path)
            same = all(getattr(run.info, name) == getattr(info, name) for name in ("kind", "scenes", "box"))
            if run.config != config or not same:
                raise UserError(
                    f"{path}: holds a run with other settings, other scenes or another box. "
                    "Name another folder, or remove this one."
                )
            return run
        for name in info.scenes:
            check_name(name, info.data)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists and holds no run. Name another folder.")
        path.mkdir(parents=True, exist_ok=True)
        write_bytes(path / "config.yaml", config_io.dump(config).encode())
        write_json(path / "run.json", asdict(info) | circumstances())
        return cls(path, config, info)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Opens a run. Raises a UserError if there is none, or its run.json is damaged."""
        path = Path(path)
        file = path / "run.json"
        if not file.is_file():
            raise UserError(f"{path}: no run here (run.json is absent). Start one with `latentscenes train`.")
        meta = read_json(file, "Start the run again in a new folder.")
        known = RunInfo.__dataclass_fields__
        info = config_io.build(RunInfo, {name: meta[name] for name in known if name in meta}, file)
        info.box.check(file)
        return cls(path, config_io.load(path / "config.yaml"), info)

    def lock(self) -> None:
        """Takes the run's lock. Raises a UserError if another process holds it."""
        holder = f"{self.path}: another process is working on this run"
        self._lock.enter_context(locked(self.path / "lock", False, holder))

    def unlock(self) -> None:
        """Releases the lock."""
        self._lock.close()

    # Checkpoints

    def _newest(self) -> Path | None:
        """Returns the newest checkpoint. `N.old` counts until `N` replaces it."""

        def age(path: Path) -> tuple[int, bool]:
            return int(path.name.removesuffix(".old")), path.suffix != ".old"

        found = (self.path / "checkpoints").glob("*")
        return max(
            (path for path in found if path.name.removesuffix(".old").isdigit()), key=age, default=None
        )

    def save(self, model: Model, rows: SceneParameters, state: dict[str, Tensor], position: Position) -> None:
        """Writes a checkpoint and removes the previous one.

        Args:
            state: optimizer state and other tensors of the stage.
        """
        target = self.path / "checkpoints" / str(position.total)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in (("shared", model.state_dict()), ("rows", rows.tables()), ("optimizer", state)):
            kept = {key: value.detach().cpu().contiguous() for key, value in self._unfiled(tensors).items()}
            save_file(kept, partial / f"{name}.safetensors")
        if self.files:
            self.files.flush()
        write_json(partial / "state.json", asdict(position))
        if target.exists():
            target.rename(target.with_name(f"{target.name}.old"))
        partial.rename(target)
        for scores in (SCORES, FIT_SCORES):
            (self.path / scores).unlink(missing_ok=True)
        if self.files:
            self.files.begin(position.total)
        for other in target.parent.iterdir():
            if other != target:
                shutil.rmtree(other)

    def _unfiled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Removes micro planes and their moments if these are stored in files."""
        return {
            name: tensor for name, tensor in tensors.items() if not (self.files and name.endswith("micro"))
        }

    def begin_parameters(self, device: torch.device) -> SceneParameters:
        """Returns random parameters of the run's scenes, on a device or, if they are too large, in files."""
        count, generator = len(self.info.scenes), seeded("cpu", self.config.seed, "rows")
        if not belong_on_disk(count, self.config):
            return random_parameters(count, self.config.planes, generator).to(device)
        rows, self.files = rows_on_disk(self.path / "rows", count, self.config.planes, generator)
        return rows

    @property
    def position(self) -> Position:
        """Progress at the newest checkpoint; zero if there is none."""
        newest = self._newest()
        if newest is None:
            return Position()
        file = newest / "state.json"
        return config_io.build(Position, read_json(file, "Start the run again in a new folder."), file)

    def restore(self, model: Model, rows: SceneParameters) -> None:
        """Copies the newest checkpoint, if any, into the given model and parameters."""
        newest = self._newest()
        if self.files:
            self.files.go_back(self.position.total)
        if newest is not None:
            fill_model(model, newest / "shared.safetensors")
            self._fill(rows.tables(), newest / "rows.safetensors")

    def restore_state(self, state: dict[str, Tensor]) -> None:
        """Copies the state of a stage, such as the optimizers' moments, from the newest checkpoint."""
        self._fill(state, self._newest() / "optimizer.safetensors")

    def _fill(self, tensors: dict[str, Tensor], file: Path) -> None:
        saved = _load(file)
        for name, tensor in self._unfiled(tensors).items():
            if name not in saved and not tensor.numel():
                continue  # a table that earlier versions did not have, and that is unused
            if name not in saved or saved[name].shape != tensor.shape:
                raise UserError(
                    f"{file.parent}: {name} is absent or of another shape; "
                    "this checkpoint belongs to other settings."
                )
            tensor.copy_(saved[name])

    def load(self, device: torch.device | str = "cpu") -> tuple[Model, SceneParameters]:
        """Returns the learned model, frozen, and the scenes, on a device. Raises a UserError if nothing has
        been learned yet, or the checkpoint is damaged."""
        model = stored_model(self.config, self.info.box, self.shared_file)
        tables = _load(self.rows_file)
        if "micro" not in tables:
            tables["micro"] = read_micro(self.path / "rows", len(self.info.scenes), self.config.planes)
        rows = self._scenes(tables)
        return model.to(device).eval().requires_grad_(False), rows.to(device)

    def _scenes(self, tables: dict[str, Tensor]) -> SceneParameters:
        """Checks the sizes of learned tables. Raises a UserError if they are not the configuration's."""
        shapes, count = scene_shapes(self.config.planes), len(self.info.scenes)
        for name, shape in shapes.items():
            if name not in tables or tables[name].shape != (count, *shape):
                raise UserError(
                    f"{self.rows_file}: {name} is absent or of another shape; it belongs to other settings."
                )
        boxes = tables.get("box")
        if boxes is not None and boxes.shape not in ((count, 0), (count, 6)):
            raise UserError(f"{self.rows_file}: box is of another shape; it belongs to another version.")
        return SceneParameters(**{name: tables[name] for name in shapes}, box=boxes)

    @property
    def shared_file(self) -> Path:
        """The newest weights of the shared parts."""
        return self._learned() / "shared.safetensors"

    @property
    def rows_file(self) -> Path:
        """The newest parameters of the scenes."""
        return self._learned() / "rows.safetensors"

    def _learned(self) -> Path:
        newest = self._newest()
        if newest is None:
            raise UserError(
                f"{self.path}: nothing has been learned yet. Run the command that started this run again."
            )
        return newest

    @property
    def has_boxes(self) -> bool:
        """Whether scenes have boxes of their own; false before the first checkpoint."""
        newest = self._newest()
        return newest is not None and holds_boxes(newest / "rows.safetensors")

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        stages = self.config.train if self.info.kind == "train" else self.config.exploit
        return self.position.stage >= len(stages)

    def require_finished(self) -> None:
        """Raises a UserError that names the command that continues this run if it is not finished."""
        if not self.finished:
            command = command_text(json.loads((self.path / "run.json").read_text()).get("command", []))
            raise UserError(
                f"{self.path}: this run is not finished. The command that began it continues it: {command}"
            )

    # Metrics

    def cut_metrics(self, total: int) -> None:
        """Removes an incomplete last line and the lines of steps after `total`, which will be repeated."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            complete = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in complete if json.loads(line)["total"] <= total]
            write_bytes(path, "".join(f"{line}\n" for line in kept).encode())

    def log(self, entry: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with open(self.path / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps(entry | {"time": round(time.time(), 3)}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns all logged steps."""
        return read_metrics(self.path)

    @property
    def spent(self) -> Spent:
        """Time spent on all stages so far."""
        position = self.position
        return sum(map(position.spent, position.seconds), Spent(0.0, 0.0))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the logged steps in a run or library folder."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        lines = [parse_json(line) for line in read_text(path, MOST_LOG).splitlines()]
        if all(isinstance(line, dict) for line in lines):
            return lines
        raise ValueError("a line is no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}). Correct it, or move it away.") from None


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


def stored_model(config: Config, box: Box, path: Path) -> Model:
    """Builds a model and fills it from a file. Raises a UserError if that is damaged or belongs to another
    configuration; base planes, which can be of any size, are compared before they are allocated."""
    planes = config.planes
    shape = [planes.bases if planes.macro else 0, 3, planes.resolution, planes.resolution, planes.macro]
    try:
        require_regular(path)
        with safe_open(path, "np") as stored:
            found = stored.get_slice("bases").get_shape()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}). Restore it from a copy.") from None
    if found != shape:
        raise UserError(f"{path}: base planes are {found}, but the configuration needs {shape}.")
    model = Model(config, box, pretrained=False)
    fill_model(model, path)
    return model


def fill_model(model: Model, path: Path) -> None:
    """Copies the weights of a file into a model. Raises a UserError if the file is damaged, or belongs to
    another version or configuration."""
    try:
        model.load_state_dict(_load(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: does not fit this version's model ({reason} …). Learn the run again in a new folder."
        ) from None


def holds_boxes(tables: Path) -> bool:
    """Returns whether a file of scene parameters holds boxes of the scenes' own."""
    with _readable(tables), safe_open(tables, "pt") as stored:
        return "box" in stored.keys() and stored.get_slice("box").get_shape()[1] > 0  # noqa: SIM118


def _load(path: Path) -> dict[str, Tensor]:
    with _readable(path):
        require_regular(path)
        return load_file(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns errors of reading a checkpoint into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read ({reason(error)}). "
            "Only the newest checkpoint is kept: remove the run folder and start again."
        ) from None
