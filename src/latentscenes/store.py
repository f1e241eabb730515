"""A library's folder: shards of learned scenes, the index that says where each lies, and the model that renders them.

    library.json                what it is: box, picture size, where the model came from, its checksum
    config.yaml                 every setting
    model/shared.safetensors    codec, normaliser, field, base planes; never changes
    model/start.safetensors     where new scenes start: the mean of those of stage 1
    index.sqlite                one line per scene (index.py)
    shards/000001.safetensors   scenes, stacked tensor by tensor (quantise.py); written once
    work/                       what is being learned
    lock                        held while somebody writes

A shard is written under another name, brought to the disk and renamed; then one transaction enters its scenes in the
index. What the index does not know does not exist: a kill between the two leaves an orphan that `compact` removes.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

import latentscenes
from latentscenes import config as configuration
from latentscenes.cameras import Box
from latentscenes.config import Config
from latentscenes.errors import UserError
from latentscenes.index import FILE, Index, Place, SceneInfo
from latentscenes.model import Model
from latentscenes.planes import SceneRows
from latentscenes.progress import console
from latentscenes.quantise import STREAM, Payload, Precision, unpack
from latentscenes.run import fill_model

FORMAT = "latentscenes-library-1"
SHARD_BYTES = 64 << 20
"""`compact` makes shards of about this size."""
OPEN_SHARDS = 64
"""Shards kept open for reading."""
OURS = {"library.json", "config.yaml", "model", "shards", "work", "lock", "metrics.jsonl", FILE, f"{FILE}-wal", f"{FILE}-shm"}


@dataclass(frozen=True)
class LibraryInfo:
    """What a library is; fixed when it is made."""

    box: Box
    size: tuple[int, int]
    """Height and width of the pictures that its model learned from."""
    distance: float
    """Of their cameras from the box's centre (median), world units."""
    focal: tuple[float, float]
    """Their focal lengths (median), fractions of the width and of the height."""
    precision: Precision
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


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    name: str
    """A scene's name, or the file."""
    what: str


class Store:
    """An opened library folder. Threads may share it; writers take `writing` by themselves."""

    def __init__(self, path: Path, config: Config, info: LibraryInfo, model_checksum: str):
        self.path, self.config, self.info, self.model_checksum = path, config, info, model_checksum
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
    def open(cls, path: str | Path) -> "Store":
        path = Path(path)
        if not cls.exists(path):
            raise UserError(f"{path}: no library here (library.json is absent). Make one with `latentscenes exploit`.")
        try:
            raw = json.loads((path / "library.json").read_text())
            if raw.get("format") != FORMAT:
                raise UserError(f"{path}: a library of format {raw.get('format')!r}, but this version reads {FORMAT!r}.")
            values = {name: raw[name] for name in LibraryInfo.__dataclass_fields__ if name in raw}
            values |= {"box": Box(*(tuple(raw["box"][part]) for part in ("center", "half"))), "size": tuple(raw["size"]), "focal": tuple(raw["focal"])}
            info, checksum = LibraryInfo(**values), raw["model_checksum"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'library.json'}: cannot be read ({type(error).__name__}: {error}). Restore it from a copy.") from None
        return cls(path, configuration.load(path / "config.yaml"), info, checksum)

    @classmethod
    def create(cls, path: str | Path, config: Config, info: LibraryInfo, model: Model, start: SceneRows, scenes: Sequence[NewScene] = ()) -> "Store":
        """Make a library with some first scenes. It exists once everything is written.

        Raises:
            UserError: the folder holds something else, or a library already.
        """
        path = Path(path)
        if cls.exists(path):
            raise UserError(f"{path}: holds a library already. Name another folder.")
        if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - OURS):
            raise UserError(f"{path}: exists and holds no library. Name another folder.")
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / "lock", True, f"{path}: another process is making it"):
            for leftover in (path / "shards", path / "model"):
                shutil.rmtree(leftover, ignore_errors=True)
                leftover.mkdir()
            for leftover in path.glob(f"{FILE}*"):
                leftover.unlink()
            write_tensors(path / "model" / "shared.safetensors", model.state_dict())
            write_tensors(path / "model" / "start.safetensors", start.tables())
            (path / "config.yaml").write_text(configuration.dump(config))
            Index.create(path / FILE).close()
            checksum = file_checksum(path / "model" / "shared.safetensors")
            store = cls(path, config, info, checksum)
            if scenes:
                store._append(scenes)
            versions = {"latentscenes": latentscenes.__version__, "torch": torch.__version__, "python": platform.python_version()}
            made = {"format": FORMAT, **asdict(info), "model_checksum": checksum, "made": now(), "versions": versions}
            write_json(path / "library.json", made)
        return store

    def close(self) -> None:
        """Let go of files."""
        self.index.close()
        self._shards.clear()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer."""
        with locked(self.path / "lock", self.wait, f"{self.path}: another process is writing to this library"):
            yield

    # The model

    def model(self, device: torch.device | str = "cpu") -> Model:
        """What all scenes share, frozen."""
        model = Model(self.config, self.info.box, pretrained=False)
        fill_model(model, self.path / "model" / "shared.safetensors")
        return model.to(device).eval().requires_grad_(False)

    def start(self) -> SceneRows:
        """Where new scenes start (n = 1)."""
        return SceneRows(**load_file(self.path / "model" / "start.safetensors"))

    # Scenes

    def rows(self, name: str) -> SceneRows:
        """A scene as it is rendered (n = 1), read without the others.

        Raises:
            UserError: there is no such scene, or its bytes cannot be read.
        """
        return unpack(self.payload(name), self.config.planes)

    def payload(self, name: str) -> Payload:
        """A scene as it is stored."""
        for _ in range(3):  # the scene may move to another shard just now
            place = self.index.place(name)
            if place is None:
                break
            try:
                return self._read(place)
            except FileNotFoundError:
                continue
            except SafetensorError as error:
                raise UserError(f"{self._file(place.shard)}: cannot be read ({error}). `latentscenes library verify` tells which scenes are lost.") from None
        if self.index.place(name) is None:
            raise UserError(f"{self.path}: no scene {name!r} here.")
        raise UserError(f"{self._file(place.shard)}: absent, though the index lists it. `latentscenes library verify` tells which scenes are lost.")

    def weights(self, names: Sequence[str] | None = None) -> torch.Tensor:
        """Weights over the base planes (n, M) of these scenes, of all by default; nothing else is read."""
        places = self.index.places()
        chosen = list(places) if names is None else list(names)
        planes = self.config.planes
        table = torch.zeros(len(chosen), planes.bases if planes.macro else 0)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for line, name in enumerate(chosen):
            by_shard.setdefault(places[name].shard, []).append((line, places[name].row))
        for shard, found in by_shard.items() if table.shape[1] else ():
            lines, rows = zip(*found, strict=True)
            table[list(lines)] = self._open(shard).get_tensor("weights")[list(rows)]
        return table

    def append(self, scenes: Sequence[NewScene]) -> None:
        """Store scenes of one precision, all of them or (if something fails) none.

        Raises:
            UserError: a name is taken or appears twice.
        """
        with self.writing():
            self._append(scenes)

    def _append(self, scenes: Sequence[NewScene]) -> None:
        names = [scene.info.name for scene in scenes]
        if taken := self.index.known(names) or {name for name in names if names.count(name) > 1}:
            raise UserError(f"{self.path}: a scene {min(taken)!r} is there already. Rename or remove it first.")
        number = self.index.next_shard()
        self._write_shard(number, [scene.payload for scene in scenes])
        with self.index.transaction():
            self.index.add(number, [(scene.info, payload_checksum(scene.payload), scene.thumbnail) for scene in scenes])

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

    def _check_names(self, names: Sequence[str]) -> None:
        known = self.index.known(names)
        if missing := [name for name in names if name not in known]:
            raise UserError(f"{self.path}: no scene {missing[0]!r} here.")

    # Shards

    def _file(self, shard: int) -> Path:
        return self.path / "shards" / f"{shard:06d}.safetensors"

    def _open(self, shard: int) -> safe_open:
        with self._lock:
            if shard not in self._shards:
                self._shards[shard] = safe_open(self._file(shard), "pt")
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(shard)
            return self._shards[shard]

    def _read(self, place: Place) -> Payload:
        opened, row = self._open(place.shard), place.row
        payload = {}
        for name in opened.keys():  # noqa: SIM118 — not a dictionary
            if name.endswith(STREAM):
                ends = opened.get_tensor(f"{name}.ends")
                payload[name] = opened.get_slice(name)[int(ends[row - 1]) if row else 0 : int(ends[row])]
            elif not name.endswith(".ends"):
                payload[name] = opened.get_slice(name)[row : row + 1][0]
        return payload

    def _write_shard(self, number: int, payloads: Sequence[Payload]) -> None:
        tensors = {}
        for name in payloads[0]:
            values = [payload[name] for payload in payloads]
            if name.endswith(STREAM):
                tensors[f"{name}.ends"] = torch.tensor([len(value) for value in values]).cumsum(0)
                tensors[name] = torch.cat(values)
            else:
                tensors[name] = torch.stack(values)
        write_tensors(self._file(number), tensors)

    # Care

    def verify(self) -> list[Damage]:
        """Compare every scene, and the model, with the checksums taken when they were written."""
        found = []
        if file_checksum(self.path / "model" / "shared.safetensors") != self.model_checksum:
            found.append(Damage("model/shared.safetensors", "its bytes have changed; every scene needs it"))
        for name, place in sorted(self.index.places().items(), key=lambda item: (item[1].shard, item[1].row)):
            try:
                good = payload_checksum(self._read(place)) == place.checksum
            except FileNotFoundError:
                found.append(Damage(name, f"its shard {self._file(place.shard).name} is absent"))
            except SafetensorError as error:
                found.append(Damage(name, f"its shard {self._file(place.shard).name} cannot be read ({error})"))
            else:
                if not good:
                    found.append(Damage(name, f"its bytes in {self._file(place.shard).name} have changed"))
        return found

    def compact(self) -> int:
        """Merge small shards, drop what was removed and what a crash left; gives the bytes that became free. Scenes keep
        every bit. May be stopped at any time."""
        before = folder_bytes(self.path / "shards")
        with self.writing():
            worn = [shard for shard, (written, alive) in self.index.shards().items() if alive < written or self._is_small(shard)]
            if len(worn) > 1 or any(alive < written for written, alive in self.index.shards().values()):
                self.rewrite([name for name, place in self.index.places().items() if place.shard in set(worn)])
            self._drop_orphans()
            self.index.vacuum()
        return before - folder_bytes(self.path / "shards")

    def _is_small(self, shard: int) -> bool:
        file = self._file(shard)
        return file.exists() and file.stat().st_size < SHARD_BYTES // 2

    def rewrite(self, names: Iterable[str], change: Callable[[str, Payload], tuple[Payload, Precision, float | None]] | None = None) -> None:
        """Move scenes to new shards, shard by shard, each committed when done; `change` gives the new payload, its
        precision and the dB it lost. For holders of `writing`."""
        places, batch, size = self.index.places(), [], 0
        for name in names:
            payload = self._read(places[name])
            if payload_checksum(payload) != places[name].checksum:
                raise UserError(f"{self.path}: scene {name!r} is damaged; remove it, or restore its shard from a copy, and begin again.")
            restated = change(name, payload) if change else (payload, None, None)
            if batch and (batch[0][1].keys() != restated[0].keys() or size > SHARD_BYTES):
                self._commit_rewritten(batch)
                batch, size = [], 0
            batch.append((name, *restated))
            size += sum(tensor.nbytes for tensor in restated[0].values())
        if batch:
            self._commit_rewritten(batch)

    def _commit_rewritten(self, batch: list[tuple[str, Payload, Precision | None, float | None]]) -> None:
        number = self.index.next_shard()
        self._write_shard(number, [payload for _, payload, _, _ in batch])
        with self.index.transaction():
            self.index.move(number, [name for name, *_ in batch])
            for name, payload, precision, lost in batch:
                if precision is not None:
                    self.index.restate(name, payload_checksum(payload), precision, sum(tensor.nbytes for tensor in payload.values()), lost)
        self._drop_orphans()

    def _drop_orphans(self) -> None:
        """Remove shards without scenes, and files that the index does not know."""
        shards = self.index.shards()
        with self.index.transaction():
            self.index.forget_shards(shard for shard, (_, alive) in shards.items() if not alive)
        kept = {self._file(shard).name for shard, (_, alive) in shards.items() if alive}
        for file in (self.path / "shards").iterdir():
            if file.name not in kept:
                file.unlink()


@contextmanager
def locked(path: Path, wait: bool, holder: str) -> Iterator[None]:
    """Hold a lock file. Where another holds it: wait, saying so, or refuse."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"{holder}. Wait for it and try again.") from None
            console.print(f"{holder}; waiting for it …", highlight=False, soft_wrap=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that is complete on the disk before it bears its name."""
    _write_settled(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def write_json(path: Path, content: object) -> None:
    """The same for JSON."""
    _write_settled(path, json.dumps(content, indent=1, default=str).encode())


def _write_settled(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


def payload_checksum(payload: Payload) -> str:
    """SHA-256 over names, kinds, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(payload):
        tensor = payload[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
