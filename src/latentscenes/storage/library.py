"""A library folder: shards of learned scenes, an index that locates them, and the model that renders them.

    library.json                box, image size, origin of the model, checksums
    config.yaml                 every setting
    model/shared.safetensors    codec, normalizer, field, base planes; never changes
    model/start.safetensors     initial values of new scenes: the mean of the scenes of stage 1
    index.sqlite                one entry per scene (index.py)
    shards/000001.safetensors   scenes, stacked tensor by tensor (quantize.py); written once
    work/                       runs in progress
    parts/                      what several ranks learn, until it is joined
    lock                        held by the process that writes

A shard is written under a temporary name, flushed to disk, and renamed. One transaction then adds its scenes
to the index. Only scenes in the index exist. A shard also says which scenes it holds, so that an index can be
made again from the shards (recovery.py). No shard is ever replaced: a new one gets the next number.
"""

import itertools
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.files import (
    PARTIAL,
    file_checksum,
    locked,
    make_folder,
    note_if_edited,
    now,
    refuse_links,
    write_bytes,
    write_with_checksum,
    writing_to,
)
from latentscenes.core.names import check_name, unknown_scene
from latentscenes.core.reading import reason
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.description import FORMAT, SHARED, check_model_file, read_description
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import FILE, Index, Place
from latentscenes.storage.published.addresses import address_of
from latentscenes.storage.quantize import Payload, payload_checksum, payload_kind
from latentscenes.storage.records import FIT_SCORES, SCORES, circumstances, read_metrics
from latentscenes.storage.run import SETTINGS
from latentscenes.storage.shards import Shards, in_parts
from latentscenes.storage.source import LibraryInfo, SceneSource
from latentscenes.storage.tensors import write_tensors

T = TypeVar("T")

START = "start.safetensors"
"""File of the folder `model` with the initial values of new scenes."""
TRIES = 5
"""Attempts to read a scene that another process moves to a new shard meanwhile."""
OURS = {
    "library.json", "config.yaml", "model", "shards", "work", "parts", "lock", "metrics.jsonl",
    SCORES, FIT_SCORES, FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal",
}  # fmt: skip
"""Names of files and folders in a library."""


@dataclass(frozen=True)
class NewScene:
    """A scene to be stored."""

    info: SceneInfo
    payload: Payload
    thumbnail: bytes | None = None
    """A PNG file."""


class LibraryFolder(SceneSource):
    """An opened library folder. Threads may share it. Methods that write take the lock themselves."""

    def __init__(self, path: Path, config: Config, info: LibraryInfo, checksums: dict[str, str]):
        """`checksums` are the SHA-256 of the files in `model` and of config.yaml, by file name."""
        self.path, self.config, self.info, self.checksums = path, config, info, checksums
        self.index = Index(path / FILE)
        self.wait = True
        """Whether writers wait for another process that writes; otherwise they raise a UserError."""
        self.shards = Shards(path / "shards")

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Returns whether `path` is a library."""
        return (Path(path) / "library.json").is_file()

    @classmethod
    def open(cls, path: str | Path) -> "LibraryFolder":
        """Opens a library. Raises a UserError if there is none, or if it is damaged or of another version."""
        path, raw = Path(path), read_description(Path(path))
        file, known = path / "library.json", LibraryInfo.__dataclass_fields__
        info = config_io.build(LibraryInfo, {name: raw[name] for name in known if name in raw}, file)
        info.box.check(file)
        info.view.check(file)
        checksums = raw.get("checksums", {SHARED: raw.get("model_checksum")})
        checksums = config_io.build(dict[str, str], checksums, f"{file}: checksums")
        settings = path / SETTINGS
        if not settings.is_file():
            raise UserError(
                f"{settings}: absent, but needed to read the library. Restore it from a copy of this library."
            )
        note_if_edited(settings, checksums.get(SETTINGS))
        return cls(path, config_io.load(settings), info, checksums)

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
        """Creates a library with its first scenes. It exists once library.json is written, which is last.

        Args:
            start: initial values of new scenes (n = 1).

        Raises:
            UserError: the folder is a library already or holds other files.
        """
        path = Path(path)
        if cls.exists(path):
            raise UserError(f"{path}: holds a library already. Name another folder.")
        refuse_foreign(path)
        refuse_links(path)
        with writing_to(path):
            make_folder(path)
        with locked(path / "lock", True, f"{path}: another process is creating this library"):
            if cls.exists(path):
                raise UserError(
                    f"{path}: another process has just created this library. "
                    "Run the same command again to continue."
                )
            for leftover in (path / "shards", path / "model"):
                shutil.rmtree(leftover, ignore_errors=True)
                make_folder(leftover)
            for leftover in path.glob(f"{FILE}*"):
                leftover.unlink()
            write_tensors(path / "model" / SHARED, model.state_dict())
            write_tensors(path / "model" / START, start.tables())
            write_bytes(path / SETTINGS, config_io.dump(config).encode())
            Index.create(path / FILE).close()
            files = path / "model" / SHARED, path / "model" / START, path / SETTINGS
            checksums = {file.name: file_checksum(file) for file in files}
            library = cls(path, config, info, checksums)
            if scenes:
                library._append(scenes)
            facts = {"id": uuid.uuid4().hex, "checksums": checksums, "made": now(), **circumstances()}
            write_with_checksum(path / "library.json", {"format": FORMAT, **asdict(info), **facts})
        return library

    def close(self) -> None:
        """Closes all files."""
        self.index.close()
        self.shards.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the library's lock and deletes outdated scores at the end. Raises a UserError if another
        process writes and `wait` is false, the folder is read-only, or links lie in it."""
        refuse_links(self.path)
        holder = f"{self.path}: another process is writing to this library"
        with locked(self.path / "lock", self.wait, holder):
            yield
            for scores in (SCORES, FIT_SCORES):
                (self.path / scores).unlink(missing_ok=True)

    # The model

    @property
    def shared_file(self) -> Path:
        """The file with the weights of the shared parts."""
        return self.path / "model" / SHARED

    def check_model(self) -> None:
        """Raises a UserError if the file of the shared parts is absent or damaged."""
        check_model_file(self.shared_file, "every scene needs it", self.checksums.get(SHARED))

    def check_start(self) -> Path:
        """Returns the file of initial values. Raises a UserError if it is absent or damaged."""
        file = self.path / "model" / START
        check_model_file(file, "new scenes start from it", self.checksums.get(START))
        return file

    # Scenes

    def payload(self, name: str) -> Payload:
        """Reads one scene as stored. Raises as `parameters`."""

        def read() -> Payload:
            place = self.index.place(name)
            if place is None:
                raise unknown_scene(self.path, name, self.index.names())
            return self.shards.read(place)

        return self._retried(read)

    def all_weights(self) -> tuple[list[str], Float[Tensor, "n M"]]:
        """Reads the names of all scenes, in the order of addition, and their weights over the M base planes.
        Raises a UserError if a shard cannot be read."""

        def read() -> tuple[list[str], Tensor]:
            places = self.index.places()
            return list(places), self.weights_at(list(places.values()))

        return self._retried(read)

    def weights_at(self, places: Sequence[Place]) -> Float[Tensor, "n M"]:
        """Reads the weights of the scenes at some places. Raises as `Shards.open`."""
        planes = self.config.planes
        table = torch.zeros(len(places), planes.bases if planes.macro else 0)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for line, place in enumerate(places if table.shape[1] else ()):
            by_shard.setdefault(place.shard, []).append((line, place.row))
        for shard, found in by_shard.items():
            lines, rows = zip(*found, strict=True)
            table[list(lines)] = self._weights(shard, list(rows), table.shape[1])
        return table

    def _weights(self, shard: int, rows: list[int], bases: int) -> Float[Tensor, "n M"]:
        opened = self.shards.open(shard)
        if "weights" not in opened.keys():  # noqa: SIM118
            raise SafetensorError(f"{self.shards.file(shard)}: holds no weights")
        shape = opened.get_slice("weights").get_shape()
        if len(shape) != 2 or shape[1] != bases or max(rows) >= shape[0]:
            raise SafetensorError(f"{self.shards.file(shard)}: its weights are {shape}, not (n, {bases})")
        return opened.get_tensor("weights")[rows].float()

    def _retried(self, read: Callable[[], T]) -> T:
        """Repeats a read if a scene moves to another shard after its lookup, before that shard is opened."""
        problem = None
        for _ in range(TRIES):
            try:
                return read()
            except FileNotFoundError as error:
                problem = error
            except (SafetensorError, OSError) as error:
                problem = error
                break
        raise UserError(
            f"{self.path}: {reason(problem)}. `latentscenes library verify` lists the lost scenes."
        )

    def append(self, scenes: Sequence[NewScene]) -> None:
        """Stores all scenes, or none on an error. Raises a UserError if a name is taken or appears twice."""
        with self.writing():
            self._append(scenes)

    def _append(self, scenes: Sequence[NewScene]) -> None:
        names = [check_name(scene.info.name, self.path) for scene in scenes]
        if taken := self.index.known(names) or {name for name in names if names.count(name) > 1}:
            raise self._taken(min(taken))
        kinds = itertools.groupby(scenes, lambda scene: payload_kind(scene.payload))
        groups = list(
            enumerate((part for _, kind in kinds for part in in_parts(list(kind))), self.next_shard())
        )
        for number, group in groups:
            self.shards.write(number, [(scene.info, scene.payload) for scene in group])
        with self.index.transaction():
            for number, group in groups:
                self.index.add(
                    number,
                    [(scene.info, payload_checksum(scene.payload), scene.thumbnail) for scene in group],
                )

    def _taken(self, name: str) -> UserError:
        return UserError(f"{self.path}: a scene {name!r} is there already. Rename or remove it first.")

    def remove(self, names: Sequence[str]) -> None:
        """Removes all given scenes, or none and raises a UserError. `compact` frees their space."""
        with self.writing():
            self.index.require(names)
            with self.index.transaction():
                self.index.remove(names)

    def rename(self, old: str, new: str) -> None:
        """Renames a scene. Raises a UserError if it is unknown, or if the new name is empty or taken."""
        with self.writing():
            self.index.require([old])
            check_name(new, self.path)
            if self.index.known([new]):
                raise self._taken(new)
            with self.index.transaction():
                self.index.rename(old, new)

    def tag(self, name: str, tags: dict[str, Any]) -> None:
        """Sets tags of a scene; the value None removes a tag. Raises a UserError if the scene is unknown."""
        with self.writing():
            self.index.require([name])
            merged = self.index.info(name).tags | tags
            with self.index.transaction():
                self.index.tag(name, {key: value for key, value in merged.items() if value is not None})

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the logged steps of the last learned group of scenes."""
        return read_metrics(self.path)

    def next_shard(self) -> int:
        """Returns the number of the next shard, above those of the index and of all files."""
        return max(self.index.next_shard(), 1, *(number + 1 for number in self.shards.numbers()))


def refuse_foreign(path: Path) -> None:
    """Raises a UserError if `path` holds files that are no part of a library, or is an address."""
    if address := address_of(path):
        raise UserError(f"{address}: libraries are written to folders. Name one, and publish it afterwards.")
    if path.is_dir():
        names = {entry.name.partition(PARTIAL)[0] for entry in path.iterdir()}
    if path.exists() and (not path.is_dir() or names - OURS):
        raise UserError(f"{path}: exists and holds no library. Name another folder.")
