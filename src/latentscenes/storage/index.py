"""The index of a library's scenes, read without torch.

It is one SQLite file. A library holds the scenes of committed transactions. The journal is a
write-ahead log: a reader sees the state before or after a change and never waits for a writer. A killed
writer leaves the state before.
"""

import contextlib
import fnmatch
import json
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentscenes.core.errors import UserError
from latentscenes.core.files import sync, write_bytes, writing_to
from latentscenes.core.names import short, tagged, tags_text, unknown_scene
from latentscenes.core.options import StoragePrecision
from latentscenes.storage.entries import SceneInfo, scene_info
from latentscenes.storage.entry_checks import COLUMNS, check_of
from latentscenes.storage.index_totals import TABLE, IndexTotals
from latentscenes.storage.sqlite import address, guard

FILE = "index.sqlite"
MOST_SHARDS = 10**9
"""The last shard."""
REMEDY = "Restore it from a copy, or make it from the shards again: latentscenes library rebuild"
"""The remedy for a lost index, a sentence of error messages."""
VERSION = 1
"""Format of the index, stored as SQLite's user_version."""
ADDED = "cpu_seconds", "silhouettes"
"""Columns of a scene's metadata that indexes of earlier versions lack."""

TABLES = f"""
CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, scenes INTEGER NOT NULL);
CREATE TABLE scenes (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
  shard INTEGER NOT NULL, row INTEGER NOT NULL, checksum TEXT NOT NULL,
  precision TEXT NOT NULL, bytes INTEGER NOT NULL, origin TEXT NOT NULL,
  dataset TEXT, split TEXT, source TEXT NOT NULL, added TEXT NOT NULL,
  seconds REAL, cpu_seconds REAL, psnr REAL, psnr_lost REAL, silhouettes INTEGER, tags TEXT NOT NULL,
  name_check INTEGER, tags_check INTEGER
);
CREATE INDEX scenes_shard ON scenes (shard);
CREATE TABLE thumbnails (
  scene INTEGER PRIMARY KEY REFERENCES scenes (id) ON DELETE CASCADE, png BLOB NOT NULL,
  png_check INTEGER
);
{TABLE};
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Place:
    """The row of a shard where a scene is stored, and the checksum of its bytes."""

    shard: int
    row: int
    checksum: str


class Index(IndexTotals):
    """An opened index. Threads may share it."""

    def __init__(self, path: Path):
        """Opens the file `path`. In a read-only folder without a journal, the file counts as immutable.
        Raises a UserError if the file is absent, damaged, or of another version."""
        self.path = path
        self._lock = threading.RLock()
        self._abouts: tuple[tuple[int, int], dict[str, str]] | None = None
        if not path.is_file():
            raise UserError(f"{path}: absent; without it, the scenes in the shards cannot be found. {REMEDY}")
        with self._reading():
            self._connection = sqlite3.connect(
                address(path), uri=True, isolation_level=None, check_same_thread=False, timeout=60
            )
            weakref.finalize(self, self._connection.close)  # at the latest at exit: it takes in the journal
            self._begin = guard(self._connection, path)
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA synchronous = FULL")  # some builds of SQLite would do less
        if not found:
            raise UserError(f"{path}: is empty. {REMEDY}")
        if found != VERSION:
            raise UserError(
                f"{path}: an index of version {found}, but this version of latentscenes reads {VERSION}."
            )

    @classmethod
    def create(cls, path: Path, journal: Literal["WAL", "DELETE"] = "WAL") -> "Index":
        """Creates an empty index with a journal that stays (WAL) or not (DELETE), and opens it."""
        write_bytes(path, b"")  # SQLite ignores the umask
        with _writing(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA journal_mode = {journal}")
            connection.executescript(TABLES)
        with writing_to(path):
            sync(path)
        return cls(path)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: cannot be read ({error}). {REMEDY}") from None

    @contextmanager
    def any_text(self) -> Iterator[None]:
        """Within the block, text that is none, after a flipped bit, is read with replaced letters."""
        before, self._connection.text_factory = self._connection.text_factory, _replaced
        try:
            yield
        finally:
            self._connection.text_factory = before

    def _ask(self, question: str, *values: Any) -> list[tuple]:
        with self._lock, self._reading():
            self._begin()
            return self._connection.execute(question, values).fetchall()

    def _column(self, question: str, *values: Any) -> list[Any]:
        return [value for (value,) in self._ask(question, *values)]

    @property
    def version(self) -> tuple[int, int]:
        """A value that differs after every change, by any process."""
        return self._column("PRAGMA data_version")[0], self._connection.total_changes

    # Reading

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Within the block, the index reads as it was at the beginning, whatever other processes change. For
        an index that no other thread uses."""
        with self._reading():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    def __len__(self) -> int:
        return self._column("SELECT count(*) FROM scenes")[0]

    def names(self) -> list[str]:
        """Returns all names in the order of addition."""
        return self._column("SELECT name FROM scenes ORDER BY id")

    def first(self, count: int) -> list[SceneInfo]:
        """Returns the metadata of the first `count` scenes, in the order of addition."""
        question = f"SELECT {self._info_columns()} FROM scenes ORDER BY id LIMIT ?"
        return [self._info(row) for row in self._ask(question, count)]

    def infos(self, match: str = "*", where: Sequence[str] = ()) -> list[SceneInfo]:
        """Returns the metadata of scenes whose names match a pattern (* and ?), in the order of addition, and
        whose tags meet the conditions `where` (see `tagged`)."""
        found = self._ask(f"SELECT {self._info_columns()} FROM scenes ORDER BY id")
        infos = [self._info(row) for row in found if match == "*" or fnmatch.fnmatchcase(str(row[0]), match)]
        kept = set(tagged({info.name: info.tags for info in infos}, where)) if where else None
        return [info for info in infos if kept is None or info.name in kept]

    def descriptions(self) -> dict[str, str]:
        """Returns all names, in the order of addition, with the scenes' tags as lines of text; kept until the
        index changes."""
        if self._abouts is None or self._abouts[0] != self.version:
            texts = {info.name: tags_text(info.tags) if info.tags else "" for info in self.infos()}
            self._abouts = self.version, texts
        return self._abouts[1]

    def pages(self, size: int) -> Iterator[list[tuple[SceneInfo, Place]]]:
        """Yields metadata and places of all scenes in the order of addition, `size` at a time."""
        columns, last = self._info_columns(), 0
        question = f"SELECT {columns}, shard, row, checksum, id FROM scenes WHERE id > ? ORDER BY id LIMIT ?"
        while found := self._ask(question, last, size):
            if found[-1][-1] <= last:  # the same rows again and again
                raise UserError(f"{self.path}: is damaged (entries out of order). {REMEDY}")
            yield [(self._info(row[:-4]), _place(row[-4:-1])) for row in found]
            last = found[-1][-1]

    def checksums(self) -> list[str]:
        """Returns the checksums of all payloads in the order of addition."""
        return self._column("SELECT checksum FROM scenes ORDER BY id")

    def info(self, name: str) -> SceneInfo | None:
        """Returns the metadata of one scene; None if there is no such scene."""
        found = self._ask(f"SELECT {self._info_columns()} FROM scenes WHERE name = ?", name)
        return self._info(found[0]) if found else None

    def _info(self, row: tuple) -> SceneInfo:
        """Refuses what no version wrote."""
        info = scene_info(row)
        if info is None:
            raise UserError(
                f"{self.path}: the entry of scene {short(row[0])} is damaged. "
                "Restore it from a copy of the library."
            )
        return info

    def _info_columns(self) -> str:
        present = self._column("SELECT name FROM pragma_table_info('scenes')")
        absent = set(ADDED).difference(present)
        return ", ".join(
            f"NULL AS {name}" if name in absent else name for name in SceneInfo.__dataclass_fields__
        )

    def place(self, name: str) -> Place | None:
        """Returns the place of one scene; None if there is no such scene."""
        found = self._ask("SELECT shard, row, checksum FROM scenes WHERE name = ?", name)
        return _place(found[0]) if found else None

    def places(self) -> dict[str, Place]:
        """Returns the places of all scenes in the order of addition."""
        found = self._ask("SELECT name, shard, row, checksum FROM scenes ORDER BY id")
        return {name: _place(rest) for name, *rest in found}

    def known(self, names: Sequence[str]) -> set[str]:
        """Returns those names that scenes have."""
        question = "SELECT name FROM scenes WHERE name IN (SELECT value FROM json_each(?))"
        return set(self._column(question, json.dumps(list(names))))

    def require(self, names: Sequence[str]) -> None:
        """Refuses names that no scene has.

        Raises:
            UserError: states the first such name and the nearest known ones.
        """
        known = self.known(names)
        for name in names:
            if name not in known:
                raise unknown_scene(self.path.parent, str(name), self.names())

    def origins(self) -> set[tuple[str, str]]:
        """Returns the checksums of all payloads, each with its scene's name in the dataset."""
        return set(self._ask("SELECT checksum, source FROM scenes"))

    def sources(self, dataset: str, split: str) -> set[str]:
        """Returns the dataset's names of the scenes learned from one split of it."""
        return set(self._column("SELECT source FROM scenes WHERE dataset = ? AND split = ?", dataset, split))

    def thumbnail(self, name: str) -> bytes | None:
        """Returns a PNG file; None if the scene has none or does not exist."""
        question = "SELECT png FROM thumbnails JOIN scenes ON scenes.id = thumbnails.scene WHERE name = ?"
        return next(iter(self._column(question, name)), None)

    def thumbnails(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns the PNG files of those scenes that have one."""
        question = "SELECT name, png FROM thumbnails JOIN scenes ON scenes.id = thumbnails.scene "
        question += "WHERE name IN (SELECT value FROM json_each(?))"
        return dict(self._ask(question, json.dumps(list(names))))

    def without_thumbnail(self) -> list[str]:
        """Returns the names of scenes without a thumbnail."""
        return self._column(
            "SELECT name FROM scenes WHERE id NOT IN (SELECT scene FROM thumbnails) ORDER BY id"
        )

    def shards(self) -> dict[int, tuple[int, int]]:
        """Returns for each shard how many scenes were written and remain; damaged entries are left out."""
        rows = self._ask(
            "SELECT shards.id, shards.scenes, count(scenes.id) FROM shards "
            "LEFT JOIN scenes ON scenes.shard = shards.id GROUP BY shards.id"
        )
        whole = (row for row in rows if all(type(number) is int for number in row))
        return {shard: (written, remaining) for shard, written, remaining in whole}

    def unknown_shards(self) -> list[int]:
        """Returns the shards in which scenes lie although `shards` does not list them."""
        listed = "SELECT id FROM shards WHERE typeof(scenes) = 'integer'"
        return self._column(f"SELECT DISTINCT shard FROM scenes WHERE shard NOT IN ({listed})")

    def next_shard(self) -> int:
        """Returns the number of the next shard. Numbers are never reused."""
        return next(iter(self._column("SELECT seq FROM sqlite_sequence WHERE name = 'shards'")), 0) + 1

    # Writing: within `transaction`, by the process that holds the library's lock

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits all changes of the block, or none on an error. Raises a UserError if it cannot write."""
        with self._lock, _writing(self.path):
            self._begin()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for table, column in self._lacking():
                    kind = COLUMNS[table][column]
                    self._connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
                with self._keeping_totals():
                    yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # some errors have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def add(self, shard: int, scenes: Sequence[tuple[SceneInfo, str, bytes | None] | None]) -> None:
        """Adds a shard and its scenes, row by row: metadata, checksum, thumbnail. None: a row that is left
        out."""
        self._connection.execute("INSERT INTO shards (id, scenes) VALUES (?, ?)", (shard, len(scenes)))
        last = next(iter(self._column("SELECT seq FROM sqlite_sequence WHERE name = 'scenes'")), 0)
        rows, pictures = [], []
        for row, entry in enumerate(scenes):
            if entry is None:
                continue
            info, checksum, png = entry
            tags, number = json.dumps(info.tags) if info.tags else "{}", last + len(rows) + 1
            values = vars(info) | {"tags": tags}
            rows.append((number, shard, row, checksum, check_of(info.name), check_of(tags), *values.values()))
            if png is not None:
                pictures.append((number, png, check_of(png)))
        own = ("id", "shard", "row", "checksum", "name_check", "tags_check")
        columns = (*own, *SceneInfo.__dataclass_fields__)
        marks = ", ".join("?" * len(columns))
        many = self._connection.executemany
        many(f"INSERT INTO scenes ({', '.join(columns)}) VALUES ({marks})", rows)
        many("INSERT INTO thumbnails (scene, png, png_check) VALUES (?, ?, ?)", pictures)

    def remove(self, names: Iterable[str]) -> None:
        """Removes scenes."""
        self._recount = True
        self._connection.executemany("DELETE FROM scenes WHERE name = ?", [(name,) for name in names])

    def rename(self, old: str, new: str) -> None:
        """Renames a scene."""
        self._connection.execute(
            "UPDATE scenes SET name = ?, name_check = ? WHERE name = ?", (new, check_of(new), old)
        )

    def tag(self, name: str, tags: dict[str, Any]) -> None:
        """Replaces a scene's tags."""
        text = json.dumps(tags)
        self._connection.execute(
            "UPDATE scenes SET tags = ?, tags_check = ? WHERE name = ?", (text, check_of(text), name)
        )

    def move(self, shard: int, names: Sequence[str]) -> None:
        """Adds a shard and moves scenes to its rows, in this order."""
        self._connection.execute("INSERT INTO shards (id, scenes) VALUES (?, ?)", (shard, len(names)))
        self._connection.executemany(
            "UPDATE scenes SET shard = ?, row = ? WHERE name = ?",
            [(shard, row, name) for row, name in enumerate(names)],
        )

    def set_precision(
        self, name: str, checksum: str, precision: StoragePrecision, size: int, psnr_lost: float | None
    ) -> None:
        """Updates a scene that is stored at another precision: `size` in bytes, `psnr_lost` in dB."""
        self._recount = True
        self._connection.execute(
            "UPDATE scenes SET checksum = ?, precision = ?, bytes = ?, psnr_lost = ? WHERE name = ?",
            (checksum, precision, size, psnr_lost, name),
        )

    def forget_shards(self, shards: Iterable[int]) -> None:
        """Removes shards without scenes."""
        self._connection.executemany("DELETE FROM shards WHERE id = ?", [(shard,) for shard in shards])

    def keep_journal(self) -> None:
        """Keeps a journal that stays from now on, so that readers and a writer do not wait for each other."""
        with self._lock, _writing(self.path):
            self._connection.execute("PRAGMA journal_mode = WAL")

    def vacuum(self) -> None:
        """Frees the space of removed entries."""
        with self._lock, _writing(self.path):
            self._connection.execute("VACUUM")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns SQLite's errors in writing, such as a full disk, into a UserError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{path}: cannot be written ({error}). Free some disk space, or check the permissions of the "
            "folder and its files; then run the same command again."
        ) from None


def _replaced(text: bytes) -> str:
    return text.decode(errors="replace")


def _place(row: Sequence[Any]) -> Place:
    """Returns a place; one that cannot be is that of no shard."""
    shard, number, checksum = row
    fits = type(shard) is type(number) is int and 0 <= shard <= MOST_SHARDS and 0 <= number <= MOST_SHARDS
    return Place(shard, number, str(checksum)) if fits else Place(0, 0, "")
