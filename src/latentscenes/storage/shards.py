"""Shards: files of scenes, stacked tensor by tensor. Each is written once and lists its scenes."""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from latentscenes.core.files import load_tensors, now, open_tensors, reading_from
from latentscenes.core.names import counted
from latentscenes.core.reading import reason
from latentscenes.storage.index import Place, SceneInfo
from latentscenes.storage.quantize import (
    STREAM,
    Payload,
    payload_at,
    payload_bytes,
    payload_checksum,
    payload_precision,
    stack_payloads,
    unstack_payloads,
)
from latentscenes.storage.tensors import write_tensors

T = TypeVar("T")

NAME = re.compile(r"(\d{6,18})\.safetensors")
MOST_SCENES = 2000
"""Most scenes of a shard: its list of them is read whenever it is opened."""
STATED, SEAL = "scenes", "seal"
"""Metadata of a shard: the list of its scenes, and the SHA-256 of this text. Earlier versions
did not write the latter."""
OPEN = 64
"""Shards kept open for reading."""


@dataclass(frozen=True)
class ShardScene:
    """A scene as its shard states it."""

    row: int
    info: SceneInfo
    checksum: str
    """SHA-256 of the payload as it was written, or as found if the shard states nothing."""
    intact: bool
    """Whether the payload has that checksum."""
    stated: bool
    """Whether the shard states its scenes. Those of earlier versions do not."""


class Shards:
    """The folder of a library's shards. Threads may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: OrderedDict[int, safe_open] = OrderedDict()
        self._lock = threading.Lock()
        self._stated: tuple[int, list[dict] | None] = (0, None)

    def file(self, shard: int) -> Path:
        """Returns the path of a shard."""
        return self.folder / f"{shard:06d}.safetensors"

    def numbers(self) -> list[int]:
        """Returns the numbers of all shards in the folder, whether the index lists them or not."""
        names = (NAME.fullmatch(file.name) for file in self.folder.glob("*"))
        return sorted(int(name[1]) for name in names if name)

    def close(self) -> None:
        """Closes all files."""
        self._opened.clear()

    def open(self, shard: int) -> safe_open:
        """Opens a shard.

        Raises:
            FileNotFoundError, SafetensorError: it is absent or damaged.
        """
        with self._lock:
            if shard not in self._opened:
                file = self.file(shard)
                try:
                    self._opened[shard] = open_tensors(file)
                except (OSError, SafetensorError) as error:
                    raise _unread(file, error) from None
                if len(self._opened) > OPEN:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            return self._opened[shard]

    def read(self, place: Place) -> Payload:
        """Reads the payload at a place. Raises as `open`."""
        return payload_at(self.open(place.shard), place.row)

    def stated(self, place: Place) -> dict | None:
        """Returns the shard's entry for the scene at a place (see `stated_entries`). Raises as `open`, and
        a SafetensorError if the statement is damaged."""
        if self._stated[0] != place.shard:
            self._stated = place.shard, stated_entries(self.open(place.shard))
        entries = self._stated[1]
        if entries and place.row >= len(entries):
            raise SafetensorError(
                f"{self.file(place.shard)}: it states {counted(len(entries), 'scene')} only"
            )
        return entries[place.row] if entries else None

    def rows(self, shard: int) -> int:
        """Returns how many scenes a shard holds. Raises as `open`."""
        return _rows(self.open(shard))

    def read_all(self, shard: int) -> list[Payload]:
        """Reads all payloads of a shard, row by row. Raises as `open`, and leaves no file open."""
        file = self.file(shard)
        try:
            return unstack_payloads(load_tensors(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise _unread(file, error) from None

    def write(
        self, shard: int, scenes: Sequence[tuple[SceneInfo, Payload]], checksums: Sequence[str] | None = None
    ) -> None:
        """Writes a new shard of scenes whose payloads are of one kind. `checksums` are the payloads', if they
        are known."""
        if self.file(shard).exists():
            raise FileExistsError(f"{self.file(shard)}: a shard is never replaced")
        payloads = [payload for _, payload in scenes]
        known = checksums or map(payload_checksum, payloads)
        infos = (info for info, _ in scenes)
        entries = [vars(info) | {"checksum": one} for info, one in zip(infos, known, strict=True)]
        text = json.dumps(entries)
        write_tensors(self.file(shard), stack_payloads(payloads), {STATED: text, SEAL: _checksum_of(text)})


def _unread(file: Path, error: Exception) -> Exception:
    """The error for a shard that cannot be read. safetensors opens a file twice, and torch raises a
    RuntimeError if it was removed in between."""
    if not file.exists():
        return FileNotFoundError(f"{file}: absent, though the index lists it")
    return SafetensorError(f"{file}: cannot be read ({reason(error)})")


def in_parts(scenes: list[T]) -> Iterator[list[T]]:
    """Yields the scenes of each shard that they fill."""
    for first in range(0, len(scenes), MOST_SCENES):
        yield scenes[first : first + MOST_SCENES]


def stated_entries(shard: safe_open) -> list[dict] | None:
    """Returns a shard's entries for its scenes, row by row: the fields of SceneInfo, and `checksum`. None if
    it is of an earlier version. Raises a SafetensorError if the statement is damaged."""
    facts = shard.metadata() or {}
    if set(facts) - {STATED, SEAL} and SEAL not in facts:
        raise SafetensorError("what it states of its scenes is damaged")
    if not facts:
        return None
    try:
        text = facts[STATED]
        entries = json.loads(text)
        checksum = _checksum_of(text)
        if facts.get(SEAL, checksum) == checksum and all(entry["checksum"] for entry in entries):
            return entries
    except (KeyError, TypeError, ValueError):
        pass
    raise SafetensorError("what it states of its scenes is damaged")


def _rows(shard: safe_open) -> int:
    table = next((name for name in shard.keys() if not name.endswith(STREAM)), None)  # noqa: SIM118
    if table is None:
        raise SafetensorError("it holds no scenes")
    return shard.get_slice(table).get_shape()[0]


def _checksum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shard_scenes(file: Path) -> list[ShardScene]:
    """Reads all scenes of a shard. Raises a UserError if it cannot be read."""
    found, remedy = [], "Restore it from a copy."
    with reading_from(file, remedy), open_tensors(file) as shard:
        entries = stated_entries(shard)
        for row in range(_rows(shard)):
            payload = payload_at(shard, row)
            checksum = payload_checksum(payload)
            if entries:
                info = SceneInfo(**{part.name: entries[row].get(part.name) for part in fields(SceneInfo)})
                stated = entries[row]["checksum"]
            else:
                name, size, precision = (
                    f"{file.stem}-{row}",
                    payload_bytes(payload),
                    payload_precision(payload),
                )
                nothing = dict.fromkeys(("dataset", "split", "seconds", "cpu_seconds", "psnr", "psnr_lost"))
                info = SceneInfo(
                    name=name, precision=precision, bytes=size, origin="exploit", source=name, added=now(),
                    **nothing,
                )  # fmt: skip
                stated = checksum
            found.append(ShardScene(row, info, stated, stated == checksum, bool(entries)))
    return found
