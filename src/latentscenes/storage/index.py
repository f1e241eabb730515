"""The index of a library: which scenes there are, where each lies, and what is known of it. One SQLite file.

What a committed transaction says is what the library holds. The journal is a write-ahead log, so a reader sees the state
before or after a change, never waits for a writer, and a killed writer leaves the state before.
"""

import fnmatch
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import Split

FILE = "index.sqlite"
VERSION = 1
"""Kept as SQLite's user_version."""
BATCH = 500
"""Names in one question to SQLite, which takes 999 at least."""

Origin = Literal["stage 1", "exploit", "add"]

TABLES = f"""
CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, scenes INTEGER NOT NULL);
CREATE TABLE scenes (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
  shard INTEGER NOT NULL, row INTEGER NOT NULL, checksum TEXT NOT NULL, precision TEXT NOT NULL, bytes INTEGER NOT NULL,
  origin TEXT NOT NULL, dataset TEXT, split TEXT, source TEXT NOT NULL, added TEXT NOT NULL, seconds REAL, psnr REAL, psnr_lost REAL,
  tags TEXT NOT NULL
);
CREATE INDEX scenes_shard ON scenes (shard);
CREATE TABLE thumbnails (scene INTEGER PRIMARY KEY REFERENCES scenes (id) ON DELETE CASCADE, png BLOB NOT NULL);
PRAGMA user_version = {VERSION};
"""
INFO_COLUMNS = "name, precision, bytes, origin, dataset, split, source, added, seconds, psnr, psnr_lost, tags"


@dataclass(frozen=True)
class SceneInfo:
    """What is known of a stored scene."""

    name: str
    precision: StoragePrecision
    bytes: int
    """Of its planes, weights and bias as stored; its line in the index and its thumbnail not counted."""
    origin: Origin
    """`stage 1`: learned together with what is shared. `exploit`: learned later by the command. `add`: from Python."""
    dataset: str | None
    """Folder of the views it was learned from, where they are kept."""
    split: Split | None
    """Its split in that dataset."""
    source: str
    """Its name there; `name` differs once it is renamed."""
    added: str
    """When it came into the library, ISO 8601."""
    seconds: float | None
    """Time it took to learn; None for scenes of stage 1, whose time cannot be told from that of what is shared."""
    psnr: float | None
    """dB of its renders as learned, on a few held-out views (on those learned from, if none was held out)."""
    psnr_lost: float | None
    """dB of these that storing it at `precision` cost."""
    tags: dict[str, Any] = field(default_factory=dict)
    """What the user noted."""


@dataclass(frozen=True)
class Place:
    """Where a scene's bytes lie: row of a shard; and what they must be."""

    shard: int
    row: int
    checksum: str


class Index:
    """An opened index. Threads may share it."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        if not path.is_file():
            raise UserError(
                f"{path}: absent, so nobody knows what the shards beside it hold. Restore it from a copy of the library."
            )
        if os.access(path.parent, os.W_OK):
            mode = "rw"
        else:  # without a journal nobody is writing, and none may be made here
            mode = "ro" if path.with_name(f"{FILE}-wal").exists() else "ro&immutable=1"
        try:
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=60,
            )
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            self._connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: cannot be read ({error}). Restore it from a copy of the library."
            ) from None
        if found != VERSION:
            raise UserError(
                f"{path}: an index of version {found}, but this version of latentscenes reads {VERSION}."
            )

    @classmethod
    def create(cls, path: Path) -> "Index":
        """An empty one."""
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(TABLES)
        connection.close()
        return cls(path)

    def close(self) -> None:
        self._connection.close()

    def _ask(self, question: str, values: Sequence[Any] = ()) -> list[tuple]:
        with self._lock:
            try:
                return self._connection.execute(question, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise UserError(
                    f"{self.path}: cannot be read ({error}). Restore it from a copy of the library."
                ) from None

    @property
    def version(self) -> tuple[int, int]:
        """Another one after every change, whoever made it."""
        with self._lock:
            return self._connection.execute("PRAGMA data_version").fetchone()[
                0
            ], self._connection.total_changes

    # Reading

    def __len__(self) -> int:
        return self._ask("SELECT count(*) FROM scenes")[0][0]

    def names(self) -> list[str]:
        """In the order in which they were added."""
        return [name for (name,) in self._ask("SELECT name FROM scenes ORDER BY id")]

    def infos(self, match: str = "*") -> list[SceneInfo]:
        """Of all scenes whose names match (* and ? stand for any letters), in the order in which they were added."""
        found = self._ask(f"SELECT {INFO_COLUMNS} FROM scenes ORDER BY id")
        return [_info(row) for row in found if match == "*" or fnmatch.fnmatchcase(row[0], match)]

    def info(self, name: str) -> SceneInfo | None:
        found = self._ask(f"SELECT {INFO_COLUMNS} FROM scenes WHERE name = ?", (name,))
        return _info(found[0]) if found else None

    def place(self, name: str) -> Place | None:
        found = self._ask("SELECT shard, row, checksum FROM scenes WHERE name = ?", (name,))
        return Place(*found[0]) if found else None

    def places(self) -> dict[str, Place]:
        """Of all scenes, in the order in which they were added."""
        return {
            name: Place(*rest)
            for name, *rest in self._ask("SELECT name, shard, row, checksum FROM scenes ORDER BY id")
        }

    def known(self, names: Sequence[str]) -> set[str]:
        """Which of these names are taken."""
        found: set[str] = set()
        for start in range(0, len(names), BATCH):
            some = names[start : start + BATCH]
            found |= {
                name
                for (name,) in self._ask(
                    f"SELECT name FROM scenes WHERE name IN ({','.join('?' * len(some))})", some
                )
            }
        return found

    def sources(self, dataset: str, split: Split) -> set[str]:
        """Names in a dataset of the scenes that were learned from that split of it."""
        return {
            name
            for (name,) in self._ask(
                "SELECT source FROM scenes WHERE dataset = ? AND split = ?", (dataset, split)
            )
        }

    def thumbnail(self, name: str) -> bytes | None:
        """A PNG file."""
        found = self._ask(
            "SELECT png FROM thumbnails JOIN scenes ON scenes.id = thumbnails.scene WHERE name = ?", (name,)
        )
        return found[0][0] if found else None

    def shards(self) -> dict[int, tuple[int, int]]:
        """Of every shard: how many scenes were written into it, and how many of them are still there."""
        rows = self._ask(
            "SELECT shards.id, shards.scenes, count(scenes.id) FROM shards LEFT JOIN scenes ON scenes.shard = shards.id GROUP BY shards.id"
        )
        return {shard: (written, alive) for shard, written, alive in rows}

    def next_shard(self) -> int:
        """The number of the next shard; numbers are never used twice."""
        found = self._ask("SELECT seq FROM sqlite_sequence WHERE name = 'shards'")
        return (found[0][0] if found else 0) + 1

    # Writing: within `transaction`, by the one process that holds the library's lock

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it, or nothing."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error}). Check that the folder and its files may be written to."
                ) from None
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def add(self, shard: int, scenes: Sequence[tuple[SceneInfo, str, bytes | None]]) -> None:
        """Enter a shard and its scenes, row by row: info, checksum, thumbnail."""
        run = self._connection.execute
        run("INSERT INTO shards (id, scenes) VALUES (?, ?)", (shard, len(scenes)))
        for row, (info, checksum, png) in enumerate(scenes):
            values = (
                info.name,
                shard,
                row,
                checksum,
                info.precision,
                info.bytes,
                info.origin,
                info.dataset,
                info.split,
                info.source,
                info.added,
                info.seconds,
                info.psnr,
                info.psnr_lost,
                json.dumps(info.tags),
            )
            columns = "name, shard, row, checksum, precision, bytes, origin, dataset, split, source, added, seconds, psnr, psnr_lost, tags"
            scene = run(
                f"INSERT INTO scenes ({columns}) VALUES ({','.join('?' * len(values))})", values
            ).lastrowid
            if png is not None:
                run("INSERT INTO thumbnails VALUES (?, ?)", (scene, png))

    def remove(self, names: Iterable[str]) -> None:
        self._connection.executemany("DELETE FROM scenes WHERE name = ?", [(name,) for name in names])

    def rename(self, old: str, new: str) -> None:
        self._connection.execute("UPDATE scenes SET name = ? WHERE name = ?", (new, old))

    def tag(self, name: str, tags: dict[str, Any]) -> None:
        self._connection.execute("UPDATE scenes SET tags = ? WHERE name = ?", (json.dumps(tags), name))

    def move(self, shard: int, names: Sequence[str]) -> None:
        """Scenes now lie in a new shard, in this order."""
        self._connection.execute("INSERT INTO shards (id, scenes) VALUES (?, ?)", (shard, len(names)))
        self._connection.executemany(
            "UPDATE scenes SET shard = ?, row = ? WHERE name = ?",
            [(shard, row, name) for row, name in enumerate(names)],
        )

    def restate(
        self, name: str, checksum: str, precision: StoragePrecision, size: int, psnr_lost: float | None
    ) -> None:
        """A scene is now stored otherwise."""
        self._connection.execute(
            "UPDATE scenes SET checksum = ?, precision = ?, bytes = ?, psnr_lost = ? WHERE name = ?",
            (checksum, precision, size, psnr_lost, name),
        )

    def forget_shards(self, shards: Iterable[int]) -> None:
        self._connection.executemany("DELETE FROM shards WHERE id = ?", [(shard,) for shard in shards])

    def vacuum(self) -> None:
        """Give back the room of what was removed."""
        self._connection.execute("VACUUM")


def _info(row: tuple) -> SceneInfo:
    return SceneInfo(
        *row[:-1], tags={} if row[-1] == "{}" else json.loads(row[-1])
    )  # 100,000 times where all are listed
