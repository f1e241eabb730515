"""A library's folder: shards of learned scenes, the index that says where each lies, and the model that renders them.

    library.json                what it is: box, picture size, where the model came from, its checksum
    config.yaml                 every setting
    model/shared.safetensors    codec, normalizer, field, base planes; never changes
    model/start.safetensors     where new scenes start: the mean of those of stage 1
    index.sqlite                one line per scene (index.py)
    shards/000001.safetensors   scenes, stacked tensor by tensor (quantize.py); written once
    work/                       what is being learned
    lock                        held while somebody writes

A shard is written under another name, brought to the disk and renamed; then one transaction enters its scenes in the
index. What the index does not know does not exist: a kill between the two leaves an orphan that `compact` removes.
"""

import itertools
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config, StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.core.files import (
    file_checksum,
    locked,
    now,
    payload_checksum,
    write_json,
    write_tensors,
    writing_to,
)
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, zero_mixing
from latentscenes.storage.index import FILE, Index, Place, SceneInfo
from latentscenes.storage.quantize import STREAM, Payload, payload_kind, unpack
from latentscenes.storage.run import circumstances, fill_model

FORMAT = "latentscenes-library-1"
SHARED, START = "shared.safetensors", "start.safetensors"
"""Files of the folder `model`."""
OPEN_SHARDS = 64
"""Shards kept open for reading."""
TRIES = 5
"""Times that a reader asks anew where a scene lies, when it was moved between the question and the reading."""
SCORES, FIT_SCORES = "evaluation.json", "evaluation_fit.json"
"""Scores of held-out views and of those learned from. They end with the next change of the library."""
OURS = {
    "library.json",
    "config.yaml",
    "model",
    "shards",
    "work",
    "lock",
    "metrics.jsonl",
    SCORES,
    FIT_SCORES,
    FILE,
    f"{FILE}-wal",
    f"{FILE}-shm",
}


@dataclass(frozen=True)
class LibraryInfo:
    """What a library is; fixed when it is made."""

    box: Box
    view: Viewpoint
    """How the views that its model learned from look at their objects."""
    precision: StoragePrecision
    """Of new scenes, unless another is asked for."""
    parent: str
    """The run whose shared parts these are."""
    parent_seconds: float
    """Time that run took."""
    parent_scenes: int
    """Scenes it learned from."""
    finetuned_from: str | None = None
    """The run or library whose shared parts went on learning with this one's first scenes."""


@dataclass(frozen=True)
class NewScene:
    """A scene about to be stored."""

    info: SceneInfo
    payload: Payload
    thumbnail: bytes | None = None
    """A PNG file."""


class LibraryFolder:
    """An opened library folder. Threads may share it; writers take `writing` by themselves."""

    def __init__(self, path: Path, config: Config, info: LibraryInfo, checksums: dict[str, str]):
        """`checksums` are those of the files in `model`, by name."""
        self.path, self.config, self.info, self.checksums = path, config, info, checksums
        self.index = Index(path / FILE)
        self.wait = True
        """Whether to wait for other writers; else they are told of by a UserError."""
        self._shards: OrderedDict[int, safe_open] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a library lies there."""
        return (Path(path) / "library.json").is_file()

    @classmethod
    def open(cls, path: str | Path) -> "LibraryFolder":
        path = Path(path)
        if not cls.exists(path):
            raise UserError(
                f"{path}: no library here (library.json is absent). Make one with `latentscenes exploit`."
            )
        try:
            raw = json.loads((path / "library.json").read_text())
            if raw.get("format") != FORMAT:
                raise UserError(
                    f"{path}: a library of format {raw.get('format')!r}, but this version reads {FORMAT!r}."
                )
            values = {name: raw[name] for name in LibraryInfo.__dataclass_fields__ if name in raw}
            tuples = {
                part: {
                    name: tuple(value) if isinstance(value, list) else value
                    for name, value in raw[part].items()
                }
                for part in ("box", "view")
            }
            info = LibraryInfo(**values | {"box": Box(**tuples["box"]), "view": Viewpoint(**tuples["view"])})
            checksums = (
                raw["checksums"] if "checksums" in raw else {SHARED: raw["model_checksum"]}
            )  # of earlier versions
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path / 'library.json'}: cannot be read ({type(error).__name__}: {error}). Restore it from a copy."
            ) from None
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{path / 'config.yaml'}: absent, and nothing here can be read without it. Restore it from a copy of this library."
            )
        return cls(path, config_io.load(path / "config.yaml"), info, checksums)

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Config,
        info: LibraryInfo,
        model: Model,
        start: SceneParameters,
        scenes: Sequence[NewScene] = (),
    ) -> "LibraryFolder":
        """Make a library with some first scenes. It exists once everything is written.

        Raises:
            UserError: the folder holds something else, or a library already.
        """
        path = Path(path)
        if cls.exists(path):
            raise UserError(f"{path}: holds a library already. Name another folder.")
        refuse_foreign(path)
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
        with locked(path / "lock", True, f"{path}: another process is making it"):
            if cls.exists(path):  # it was, while this one waited
                raise UserError(
                    f"{path}: another process has just made a library there. The same command again goes on with it."
                )
            for leftover in (path / "shards", path / "model"):
                shutil.rmtree(leftover, ignore_errors=True)
                leftover.mkdir()
            for leftover in path.glob(f"{FILE}*"):
                leftover.unlink()
            write_tensors(path / "model" / SHARED, model.state_dict())
            write_tensors(path / "model" / START, start.tables())
            (path / "config.yaml").write_text(config_io.dump(config))
            Index.create(path / FILE).close()
            checksums = {name: file_checksum(path / "model" / name) for name in (SHARED, START)}
            store = cls(path, config, info, checksums)
            if scenes:
                store._append(scenes)
            write_json(
                path / "library.json",
                {"format": FORMAT, **asdict(info), "checksums": checksums, "made": now(), **circumstances()},
            )
        return store

    def close(self) -> None:
        """Let go of files."""
        self.index.close()
        self._shards.clear()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer."""
        with locked(
            self.path / "lock", self.wait, f"{self.path}: another process is writing to this library"
        ):
            yield
            for scores in (SCORES, FIT_SCORES):
                (self.path / scores).unlink(missing_ok=True)

    # The model

    @property
    def shared_file(self) -> Path:
        return self.path / "model" / SHARED

    def model(self, device: torch.device | str = "cpu") -> Model:
        """What all scenes share, frozen."""
        model = Model(self.config, self.info.box, pretrained=False)
        self.check_model()
        fill_model(model, self.shared_file)
        return model.to(device).eval().requires_grad_(False)

    def check_model(self) -> None:
        """Refuse a model that cannot be read.

        Raises:
            UserError: its file is absent or torn.
        """
        self._readable(self.shared_file, "every scene needs it")

    def _readable(self, file: Path, why: str) -> None:
        try:
            with safe_open(file, "pt"):
                return
        except (OSError, SafetensorError) as error:
            what = "absent" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise UserError(
                f"{file}: {what}, and {why}. Restore it from a copy of this library, or of another one of the same model."
            ) from None

    def starting_scene(self) -> SceneParameters:
        """Where new scenes start (n = 1): the mean of stage 1."""
        file = self.path / "model" / START
        self._readable(file, "new scenes start from it")
        tables = {name: table.float() for name, table in load_file(file).items()}
        mixing = zero_mixing(1, self.config.planes)  # what the file holds of it, only if scenes have any
        return SceneParameters(
            **tables | {"mixing": tables.get("mixing", mixing) if mixing.numel() else mixing}
        )

    # Scenes

    def parameters(self, name: str) -> SceneParameters:
        """A scene as it is rendered (n = 1), read without the others.

        Raises:
            UserError: there is no such scene, or its bytes cannot be read.
        """
        return unpack(self.payload(name), self.config.planes)

    def payload(self, name: str) -> Payload:
        """A scene as it is stored."""
        for _ in range(TRIES):  # the scene may move to another shard just now
            place = self.index.place(name)
            if place is None:
                break
            try:
                return self.read(place)
            except FileNotFoundError:
                continue
            except SafetensorError as error:
                raise UserError(
                    f"{self.shard_file(place.shard)}: cannot be read ({error}). `latentscenes library verify` tells which scenes are lost."
                ) from None
        if self.index.place(name) is None:
            raise UserError(f"{self.path}: no scene {name!r} here.")
        raise UserError(
            f"{self.shard_file(place.shard)}: absent, though the index lists it. `latentscenes library verify` tells which scenes are lost."
        )

    def all_weights(self) -> tuple[list[str], torch.Tensor]:
        """Names of all scenes, in the order in which they were added, and their weights over the base planes (n, M);
        nothing else is read."""
        for _ in range(TRIES):  # scenes may move to another shard just now
            places = self.index.places()
            try:
                return list(places), self._weights_at(list(places.values()))
            except FileNotFoundError:
                continue
            except SafetensorError as error:
                raise UserError(
                    f"{self.path}: a shard cannot be read ({error}). `latentscenes library verify` tells which scenes are lost."
                ) from None
        raise UserError(
            f"{self.path}: a shard is absent, though the index lists it. `latentscenes library verify` tells which scenes are lost."
        )

    def _weights_at(self, places: Sequence[Place]) -> torch.Tensor:
        planes = self.config.planes
        table = torch.zeros(len(places), planes.bases if planes.macro else 0)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for line, place in enumerate(places if table.shape[1] else ()):
            by_shard.setdefault(place.shard, []).append((line, place.row))
        for shard, found in by_shard.items():
            lines, rows = zip(*found, strict=True)
            table[list(lines)] = self._open(shard).get_tensor("weights")[list(rows)]
        return table

    def append(self, scenes: Sequence[NewScene]) -> None:
        """Store scenes, all of them or (if something fails) none.

        Raises:
            UserError: a name is taken or appears twice.
        """
        with self.writing():
            self._append(scenes)

    def _append(self, scenes: Sequence[NewScene]) -> None:
        names = [scene.info.name for scene in scenes]
        if taken := self.index.known(names) or {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"{self.path}: a scene {min(taken)!r} is there already. Rename or remove it first."
            )
        groups = [
            list(group) for _, group in itertools.groupby(scenes, lambda scene: payload_kind(scene.payload))
        ]
        first = self.index.next_shard()
        for number, group in enumerate(groups, first):
            self.write_shard(number, [scene.payload for scene in group])
        with self.index.transaction():
            for number, group in enumerate(groups, first):
                self.index.add(
                    number,
                    [(scene.info, payload_checksum(scene.payload), scene.thumbnail) for scene in group],
                )

    def remove(self, names: Sequence[str]) -> None:
        """Take scenes out; `compact` gives their room back."""
        with self.writing():
            self._check_names(names)
            with self.index.transaction():
                self.index.remove(names)

    def rename(self, old: str, new: str) -> None:
        with self.writing():
            self._check_names([old])
            if not new.strip():
                raise UserError(f"{self.path}: a scene's name must not be empty.")
            if self.index.known([new]):
                raise UserError(f"{self.path}: a scene {new!r} is there already. Rename or remove it first.")
            with self.index.transaction():
                self.index.rename(old, new)

    def tag(self, name: str, tags: dict[str, Any]) -> None:
        """Note something beside a scene; None takes a note away."""
        with self.writing():
            self._check_names([name])
            info = self.index.info(name)
            kept = {
                key: value for key, value in ((info.tags if info else {}) | tags).items() if value is not None
            }
            with self.index.transaction():
                self.index.tag(name, kept)

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.index.known(names)
        if missing := [name for name in names if name not in known]:
            raise UserError(f"{self.path}: no scene {missing[0]!r} here.")

    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps of the group of scenes that was learned last."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    # Shards

    def shard_file(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.path / "shards" / f"{shard:06d}.safetensors"

    def _open(self, shard: int) -> safe_open:
        with self._lock:
            if shard not in self._shards:
                self._shards[shard] = safe_open(self.shard_file(shard), "pt")
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            return self._shards[shard]

    def read(self, place: Place) -> Payload:
        """What lies at a place. Raises FileNotFoundError or SafetensorError where nothing readable does."""
        opened, row = self._open(place.shard), place.row
        payload = {}
        for name in opened.keys():  # noqa: SIM118 — not a dictionary
            if name.endswith(STREAM):
                ends = opened.get_tensor(f"{name}.ends")
                payload[name] = opened.get_slice(name)[int(ends[row - 1]) if row else 0 : int(ends[row])]
            elif not name.endswith(".ends"):
                payload[name] = opened.get_slice(name)[row : row + 1][0]
        return payload

    def write_shard(self, number: int, payloads: Sequence[Payload]) -> None:
        """Write a shard of payloads of one kind; nobody knows of it until the index does."""
        tensors = {}
        for name in payloads[0]:
            values = [payload[name] for payload in payloads]
            if name.endswith(STREAM):
                tensors[f"{name}.ends"] = torch.tensor([len(value) for value in values]).cumsum(0)
                tensors[name] = torch.cat(values)
            else:
                tensors[name] = torch.stack(values)
        write_tensors(self.shard_file(number), tensors)


def refuse_foreign(path: Path) -> None:
    """Refuse to make a library in a folder that holds something else."""
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - OURS):
        raise UserError(f"{path}: exists and holds no library. Name another folder.")
