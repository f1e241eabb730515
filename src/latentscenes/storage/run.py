"""A run folder: what was asked, what was learned so far, and how to go on after any crash.

    config.yaml        every setting
    run.json           data, scene names, box, versions, command
    metrics.jsonl      one line per logged step
    checkpoints/N/     after N steps in all: shared.safetensors, rows.safetensors, optimizer.safetensors, state.json
    evaluation.json    scores, once evaluated

A checkpoint appears under its name only when complete. Randomness is a function of (seed, stage, step), see
runtime.py, so a checkpoint of tensors and counters is all that an exact continuation needs.
"""

import fcntl
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.runtime import seeded
from latentscenes.core.version import __version__
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, random_parameters
from latentscenes.storage.row_files import RowFiles, belong_on_disk, read_micro, rows_on_disk


@dataclass
class Position:
    """How far a run has come."""

    stage: int = 0
    step: int = 0
    """Steps done in that stage."""
    total: int = 0
    """Steps done in all stages."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent, by stage name."""


@dataclass(frozen=True)
class RunInfo:
    """What a run is about; fixed when it starts."""

    kind: Literal["train", "exploit"]
    data: str
    split: str
    scenes: list[str]
    box: Box
    parent: str | None = None
    """The run whose shared parts an `exploit` run starts from."""
    parent_seconds: float = 0.0
    """Time spent on that run, for the cost ledger."""


class Run:
    """An opened run folder. `lock` before writing to it."""

    def __init__(self, path: Path, config: Config, info: RunInfo):
        self.path, self.config, self.info = path, config, info
        self.files: RowFiles | None = None
        """Where micro planes lie that are not part of checkpoints."""
        self._lock = None

    @classmethod
    def create(cls, path: str | Path, config: Config, info: RunInfo) -> "Run":
        """Start a run, or go on with the one that lies there if it asks for the same."""
        path = Path(path)
        if (path / "run.json").is_file():
            run = cls.open(path)
            if run.config != config or any(
                getattr(run.info, name) != getattr(info, name) for name in ("kind", "scenes", "box")
            ):
                raise UserError(
                    f"{path}: holds a run with other settings, other scenes or another box. Name another folder, or remove this one."
                )
            return run
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists and holds no run. Name another folder.")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(config_io.dump(config))
        _write_json(path / "run.json", asdict(info) | circumstances())
        return cls(path, config, info)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        path = Path(path)
        if not (path / "run.json").is_file():
            raise UserError(f"{path}: no run here (run.json is absent). Start one with `latentscenes train`.")
        try:
            meta = json.loads((path / "run.json").read_text())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path / 'run.json'}: not valid JSON ({error}). Start the run again in a new folder."
            ) from None
        box = Box(tuple(meta["box"]["center"]), tuple(meta["box"]["half"]))
        info = RunInfo(
            **{name: meta[name] for name in ("kind", "data", "split", "scenes", "parent", "parent_seconds")},
            box=box,
        )
        return cls(path, config_io.load(path / "config.yaml"), info)

    def lock(self) -> None:
        """Refuse to write beside another process."""
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process is working on this run. Wait for it, or name another folder."
            ) from None

    def unlock(self) -> None:
        """Let others write."""
        self._lock.close()

    # Checkpoints

    def _newest(self) -> Path | None:
        found = [
            path for path in (self.path / "checkpoints").glob("*") if path.name.removesuffix(".old").isdigit()
        ]
        return max(
            found, key=lambda path: (int(path.name.removesuffix(".old")), path.suffix != ".old"), default=None
        )

    def save(self, model: Model, rows: SceneParameters, state: dict[str, Tensor], position: Position) -> None:
        """Write a checkpoint and drop the one before."""
        target = self.path / "checkpoints" / str(position.total)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), partial / "shared.safetensors")
        save_file(_contiguous(self._unfiled(rows.tables())), partial / "rows.safetensors")
        save_file(_contiguous(self._unfiled(state)), partial / "optimizer.safetensors")
        if self.files:
            self.files.flush()
        _write_json(partial / "state.json", asdict(position))
        if (
            target.exists()
        ):  # the end of a stage after a step that was saved already; `.old` counts until it is replaced
            target.rename(target.with_name(f"{target.name}.old"))
        partial.rename(target)
        if self.files:
            self.files.begin(position.total)
        for other in target.parent.iterdir():
            if other != target:
                shutil.rmtree(other)

    def _unfiled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of a checkpoint: all, or all but the micro planes and moments that lie in files."""
        return {
            name: tensor for name, tensor in tensors.items() if not (self.files and name.endswith("micro"))
        }

    def begin_parameters(self, device: torch.device) -> SceneParameters:
        """Fresh random rows for the run's scenes: in memory, or in files where they belong there."""
        count, generator = len(self.info.scenes), seeded("cpu", self.config.seed, "rows")
        if not belong_on_disk(count, self.config):
            return random_parameters(count, self.config.planes, generator).to(device)
        rows, self.files = rows_on_disk(self.path / "rows", count, self.config.planes, generator)
        return rows

    @property
    def position(self) -> Position:
        """How far the newest checkpoint is; the start if there is none."""
        newest = self._newest()
        return Position(**json.loads((newest / "state.json").read_text())) if newest else Position()

    def restore(self, model: Model, rows: SceneParameters) -> None:
        """Copy the newest checkpoint into the given model and scenes, if there is one."""
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
            if name not in saved or saved[name].shape != tensor.shape:
                raise UserError(
                    f"{file.parent}: {name} is absent or of another shape; this checkpoint belongs to other settings."
                )
            tensor.copy_(saved[name])

    def load(self, device: torch.device | str = "cpu") -> tuple[Model, SceneParameters]:
        """The learned model and scenes, for use."""
        model = Model(self.config, self.info.box, pretrained=False)
        fill_model(model, self.shared_file)
        tables = _load(self.rows_file)
        if "micro" not in tables:
            tables["micro"] = read_micro(self.path / "rows", len(self.info.scenes), self.config.planes)
        rows = SceneParameters(**tables)
        return model.to(device).eval().requires_grad_(False), rows.to(device)

    @property
    def shared_file(self) -> Path:
        """The newest weights of what all scenes share."""
        return self._learned() / "shared.safetensors"

    @property
    def rows_file(self) -> Path:
        """The newest state of the scenes themselves."""
        return self._learned() / "rows.safetensors"

    def _learned(self) -> Path:
        newest = self._newest()
        if newest is None:
            raise UserError(
                f"{self.path}: nothing has been learned yet. Run the command that started it again."
            )
        return newest

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return self.position.stage >= len(
            self.config.train if self.info.kind == "train" else self.config.exploit
        )

    # Metrics

    def cut_metrics(self, total: int) -> None:
        """Drop lines of steps that a crash undid."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = [
                line
                for line in path.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["total"] <= total
            ]
            _write_text(path, "".join(f"{line}\n" for line in lines))

    def log(self, entry: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps(entry | {"time": round(time.time(), 3)}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def seconds(self) -> float:
        """Time spent on all stages so far."""
        return sum(self.position.seconds.values())


def circumstances() -> dict[str, Any]:
    """What a result was made with: versions, machine, command."""
    versions = {"latentscenes": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "machine": platform.platform(), "command": sys.argv}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def fill_model(model: Model, path: Path) -> None:
    try:
        model.load_state_dict(_load(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: does not fit this version's model ({reason} …). Learn the run again in a new folder."
        ) from None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own kinds
        raise UserError(
            f"{path}: cannot be read ({error}). It is the only checkpoint kept: remove the run folder and start again."
        ) from None


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content, indent=1, default=str))
