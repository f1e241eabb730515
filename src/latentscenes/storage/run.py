"""A run folder: configuration, learned parameters, and the state that continues learning after any crash.

    config.yaml        every setting
    run.json           data, scene names, box, versions, command; its checksum, and that of config.yaml
    metrics.jsonl      one line per logged step
    checkpoints/N/     state after N steps: shared, rows and optimizer.safetensors; state.json with checksums
    evaluation.json    scores, once evaluated; deleted when learning goes on

A checkpoint gets its name only when it is complete and on the disk. The two newest are kept, so a run goes
on if the newest is damaged. Random numbers are a function of (seed, stage, step), see core/runtime.py, so
tensors and counters suffice for an exact continuation.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.console import Spent, say
from latentscenes.core.errors import Damaged, UserError
from latentscenes.core.files import (
    PARTIAL,
    check_file,
    file_checksum,
    locked,
    make_folder,
    note_if_edited,
    publish,
    read_object,
    refuse_links,
    sync,
    write_bytes,
    write_with_checksum,
    writing_to,
)  # fmt: skip
from latentscenes.core.names import check_name
from latentscenes.core.runtime import seeded
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, mean_parameters, random_parameters, scene_shapes
from latentscenes.storage.records import (
    FIT_SCORES,
    METRICS,
    SCORES,
    Position,
    circumstances,
    command_text,
    log_of,
    read_metrics,
)  # fmt: skip
from latentscenes.storage.row_files import (
    SUMS,
    RowFiles,
    belong_on_disk,
    read_micro,
    rows_on_disk,
    stored_sums,
)  # fmt: skip
from latentscenes.storage.tensors import fill_model, holds_boxes, read_tensors, stored_model, write_tensors

KEPT = 2
"""Number of checkpoints that are kept."""
SETTINGS = "config.yaml"
Part = Callable[[str, Tensor], Tensor]


def whole(name: str, tensor: Tensor) -> Tensor:
    """The part of a tensor that is restored where one process holds all."""
    return tensor


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
        settings = config_io.dump(config).encode()
        if path.exists() and not _only_begun(path, settings):
            raise UserError(f"{path}: exists and holds no run. Name another folder.")
        with writing_to(path):
            make_folder(path)
        write_bytes(path / SETTINGS, settings)
        checksums = {"checksums": {SETTINGS: file_checksum(path / SETTINGS)}}
        write_with_checksum(path / "run.json", asdict(info) | circumstances() | checksums)
        return cls(path, config, info)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Opens a run. Raises a UserError if there is none, or its run.json is damaged."""
        path = Path(path)
        file = path / "run.json"
        if not file.is_file():
            raise UserError(f"{path}: no run here (run.json is absent). Start one with `latentscenes train`.")
        remedy = "Start the run again in a new folder, or restore the file from a copy."
        meta, known = read_object(file, remedy, sealed_with=SETTINGS), RunInfo.__dataclass_fields__
        info = config_io.build(RunInfo, {name: meta[name] for name in known if name in meta}, file)
        info.box.check(file)
        if not (path / SETTINGS).is_file():
            raise Damaged(f"{path / SETTINGS}: absent. {remedy}")
        note_if_edited(path / SETTINGS, meta.get("checksums", {}).get(SETTINGS))
        return cls(path, config_io.load(path / SETTINGS), info)

    def lock(self) -> None:
        """Takes the run's lock. Raises a UserError if another process holds it, or links lie in the run."""
        refuse_links(self.path)
        holder = f"{self.path}: another process is working on this run"
        self._lock.enter_context(locked(self.path / "lock", False, holder))

    def unlock(self) -> None:
        """Releases the lock."""
        self._lock.close()

    # Checkpoints

    def checkpoints(self) -> list[Path]:
        """Returns all checkpoints, newest first. `N.old` counts until `N` replaces it."""

        def age(path: Path) -> tuple[int, bool]:
            return int(path.name.removesuffix(".old")), path.suffix != ".old"

        home = self.path / "checkpoints"
        found = (path for path in home.glob("*") if path.name.removesuffix(".old").isdigit())
        return sorted(found, key=age, reverse=True)

    def newest(self) -> Path | None:
        """Returns the newest checkpoint, damaged or not."""
        return next(iter(self.checkpoints()), None)

    def save(self, model: Model, rows: SceneParameters, state: dict[str, Tensor], position: Position) -> None:
        """Writes a checkpoint. Once it is on the disk, removes all but the KEPT newest.

        Args:
            state: optimizer state and other tensors of the stage.
        """
        target = self.path / "checkpoints" / str(position.total)
        partial = target.with_name(f"{target.name}{PARTIAL}")
        parts = {"shared": model.state_dict(), "rows": rows.tables(), "optimizer": state}
        parts |= {SUMS: self.files.sums()} if self.files else {}
        with writing_to(target):
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(target.parent)
            partial.mkdir()
            for name, tensors in parts.items():
                write_tensors(partial / f"{name}.safetensors", self._without_files(tensors))
            checksums = {file.name: file_checksum(file) for file in sorted(partial.iterdir())}
            write_with_checksum(
                partial / "state.json", asdict(position) | {"checksums": checksums} | log_of(self.path)
            )
            if self.files:
                self.files.flush()
            if (self.path / METRICS).exists():
                sync(self.path / METRICS)
            if target.exists():
                target.rename(target.with_name(f"{target.name}.old"))
            publish(partial, target)
            for scores in (SCORES, FIT_SCORES):
                (self.path / scores).unlink(missing_ok=True)
            if self.files:
                self.files.begin(position.total)
            others = [path for path in self.checkpoints() if path.suffix != ".old" and path != target]
            kept = {target, *others[: 0 if self.files else KEPT - 1]}
            for other in set(target.parent.iterdir()) - kept:
                if other.name.partition(".")[0].isdigit():
                    shutil.rmtree(other)

    def _without_files(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
        """Progress at the newest checkpoint; zero if there is none. Raises a UserError if it is damaged."""
        newest = self.newest()
        if newest is None:
            return Position()
        return self.position_at(newest)

    def position_at(self, checkpoint: Path) -> Position:
        """Progress at a checkpoint. Raises a UserError if it is damaged."""
        state, known = self.state_at(checkpoint), Position.__dataclass_fields__
        values = {name: state[name] for name in known if name in state}
        return config_io.build(Position, values, checkpoint / "state.json")

    def state_at(self, checkpoint: Path) -> dict[str, Any]:
        """The content of a checkpoint's state.json. Raises a UserError if it is damaged."""
        return read_object(checkpoint / "state.json", self._remedy(), sealed_with="shared.safetensors")

    def check_at(self, checkpoint: Path) -> None:
        """Raises a UserError if a file of a checkpoint has another checksum than when it was written.
        Checkpoints of earlier versions have no checksums."""
        file = checkpoint / "state.json"
        listed = self.state_at(checkpoint).get("checksums", {})
        for name, checksum in config_io.build(dict[str, str], listed, f"{file}: checksums").items():
            check_file(checkpoint / Path(name).name, checksum, self._remedy())

    def _remedy(self) -> str:
        if len(self.checkpoints()) > 1 and not self.files:
            return "The command that made this run goes on from the checkpoint before; run it again."
        return f"Restore it from a copy, or remove {self.path} and run the command that made it again."

    def check(self) -> None:
        """Raises Damaged if the run has checkpoints, but none of them is intact."""
        problem = None
        for checkpoint in self.checkpoints():
            try:
                return self.check_at(checkpoint)
            except Damaged as error:
                problem = error
        if problem:
            raise problem

    def restore(self, model: Model, rows: SceneParameters, part: Part = whole) -> None:
        """Copies the newest intact checkpoint, if any, into the given model and parameters; `part` gives
        the part of a tensor that they hold. Says which newer ones are damaged, and puts them aside. Raises a
        UserError if all are damaged."""
        for checkpoint in self.checkpoints():
            try:
                self.check_at(checkpoint)
                position = self.position
                fill_model(model, checkpoint / "shared.safetensors", self._remedy())
                self._fill(rows.tables(), checkpoint / "rows.safetensors", part)
                break
            except Damaged as error:
                if self.files or checkpoint == self.checkpoints()[-1]:
                    raise
                say(str(error))
                checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))
        else:
            position = Position()
        if self.files:
            self.files.restore_to(position.total, stored_sums(self.newest(), self._remedy()))

    def restore_state(self, state: dict[str, Tensor], part: Part = whole) -> None:
        """Copies the state of a stage, such as the optimizers' moments, from the newest checkpoint."""
        self._fill(state, self.newest() / "optimizer.safetensors", part)

    def _fill(self, tensors: dict[str, Tensor], file: Path, part: Part) -> None:
        saved = {name: part(name, tensor) for name, tensor in read_tensors(file, self._remedy()).items()}
        for name, tensor in self._without_files(tensors).items():
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
        self.check_at(self._learned())
        model = stored_model(self.config, self.info.box, self.shared_file, self._remedy())
        tables = read_tensors(self.rows_file, self._remedy())
        if "micro" not in tables:
            place = self.path / "rows", len(self.info.scenes), self.config.planes
            tables["micro"] = read_micro(*place, stored_sums(self.newest(), self._remedy()))
        rows = self._scenes(tables)
        return model.to(device).eval().requires_grad_(False), rows.to(device)

    def starting(self, device: torch.device | str = "cpu") -> tuple[Model, SceneParameters]:
        """Returns the model of a finished run on a device, and the mean of its scenes, where new ones start
        (n = 1, on the CPU). Raises a UserError as `load` and `require_finished` do."""
        self.require_finished()
        model, rows = self.load(device)
        return model, mean_parameters(1, rows.to("cpu"))

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
        newest = self.newest()
        if newest is None:
            raise UserError(
                f"{self.path}: nothing has been learned yet. Run the command that started this run again."
            )
        return newest

    @property
    def has_boxes(self) -> bool:
        """Whether scenes have boxes of their own; false before the first checkpoint."""
        newest = self.newest()
        return newest is not None and holds_boxes(newest / "rows.safetensors", self._remedy())

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        stages = self.config.train if self.info.kind == "train" else self.config.exploit
        return self.position.stage >= len(stages)

    def require_finished(self) -> None:
        """Raises a UserError that names the command that continues this run if it is not finished."""
        if not self.finished:
            command = command_text(read_object(self.path / "run.json", self._remedy()).get("command", []))
            raise UserError(
                f"{self.path}: this run is not finished. The command that began it continues it: {command}"
            )

    # Metrics

    def log(self, entry: dict[str, Any]) -> None:
        """Appends a line to the metrics."""
        with writing_to(self.path / METRICS), open(self.path / METRICS, "a") as stream:
            stream.write(json.dumps(entry | {"time": round(time.time(), 3)}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns all logged steps."""
        return read_metrics(self.path)

    @property
    def spent(self) -> Spent:
        """Time spent on all stages so far."""
        position = self.position
        return sum(map(position.spent, position.seconds), Spent(0.0, 0.0))


def _only_begun(path: Path, settings: bytes) -> bool:
    """Whether `path` holds no more than the start of a run with these settings wrote before it was killed."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir() if PARTIAL not in entry.name} - {"lock"}
    return not names or names == {SETTINGS} and (path / SETTINGS).read_bytes() == settings
