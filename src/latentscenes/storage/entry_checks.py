"""Checksums of values that only the index of a library holds: names, tags and thumbnails.

Everything else that it says of a scene, its shard states too. Each checksum changes with its own value only,
so a change of one value never covers damage of another. Entries of earlier versions have none until they
change or `compact` adds them.
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from latentscenes.storage.entries import SceneInfo

COLUMNS = {
    "scenes": {
        "cpu_seconds": "REAL",
        "silhouettes": "INTEGER",
        "name_check": "INTEGER",
        "tags_check": "INTEGER",
    },
    "thumbnails": {"png_check": "INTEGER"},
}
"""Columns that indexes of earlier versions lack, by table. The first change of such an index adds them,
empty; versions without them still read and write the index."""
PAGE = 1000
"""Entries that are read at once."""


class ChangedValue(NamedTuple):
    """A value that has changed since it was written."""

    name: str
    """The scene's name as it is now; bytes that are no text are replaced."""
    part: str
    """`name`, `tags` or `thumbnail`."""


def check_of(value: str | bytes) -> int:
    """Returns the checksum of a name, of tags as stored, or of a picture: its CRC-32, which finds every
    flipped bit and costs a microsecond for a picture."""
    return zlib.crc32(value.encode() if isinstance(value, str) else value)


class EntryChecks:
    """The part of an index that deals with these checksums."""

    _recount = False
    """Whether the transaction changes or removes rows that were there before."""

    def _ask(self, question: str, *values: Any) -> list[tuple]:
        raise NotImplementedError

    def transaction(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _lacking(self) -> list[tuple[str, str]]:
        """Returns tables and columns that an index of an earlier version lacks."""
        asked = (f"SELECT '{table}', name FROM pragma_table_info('{table}')" for table in COLUMNS)
        present = set(self._ask(" UNION ALL ".join(asked)))
        return [(table, one) for table in COLUMNS for one in COLUMNS[table] if (table, one) not in present]

    def changed_values(self) -> Iterator[ChangedValue]:
        """Yields names, tags and thumbnails that have changed since they were written, in the order of
        addition, thumbnails last. Raises a UserError if the index cannot be read."""
        if self._lacking():
            return
        # Bytes, since what a flipped bit made is often no text, which SQLite would refuse
        columns = "id, CAST(name AS BLOB), CAST(tags AS BLOB), name_check, tags_check"
        for _, name, tags, name_check, tags_check in self._paged(f"SELECT {columns} FROM scenes", "id"):
            shown = (name or b"").decode(errors="replace")
            for part, value, check in (("name", name, name_check), ("tags", tags, tags_check)):
                if check is not None and check != check_of(value or b""):
                    yield ChangedValue(shown, part)
        pictures = (
            "SELECT scene, CAST(name AS BLOB), CAST(png AS BLOB), png_check FROM thumbnails "
            "LEFT JOIN scenes ON scenes.id = thumbnails.scene"
        )
        for scene, name, png, check in self._paged(pictures, "scene"):
            if name is None or check not in (None, check_of(png or b"")):
                yield ChangedValue(
                    f"number {scene}" if name is None else name.decode(errors="replace"), "thumbnail"
                )

    def _paged(self, question: str, key: str, where: str = "") -> Iterator[tuple]:
        """Yields rows, whose first column is `key`, an integer, in its order. Ends where a damaged index
        gives the same rows again."""
        last, before = -(2**63), None
        while (before is None or last > before) and (
            found := self._ask(f"{question} WHERE {key} > ? {where} ORDER BY {key} LIMIT {PAGE}", last)
        ):
            yield from found
            last, before = found[-1][0], last

    def add_checks(self) -> None:
        """Adds the checksums that entries of earlier versions lack, of their present values."""
        with self.transaction():
            for table, key, value, check in (
                ("scenes", "id", "name", "name_check"),
                ("scenes", "id", "tags", "tags_check"),
                ("thumbnails", "scene", "png", "png_check"),
            ):
                asked = f"SELECT {key}, CAST({value} AS BLOB) FROM {table}"
                for number, content in self._paged(asked, key, f"AND {check} IS NULL"):
                    assigned = check_of(content), number
                    self._ask(f"UPDATE {table} SET {check} = ? WHERE {key} = ?", *assigned)

    # Mending: within a transaction

    def correct(self, info: SceneInfo) -> None:
        """Writes all metadata of the scene of this name anew."""
        self._recount, text = True, json.dumps(info.tags)
        values = {key: value for key, value in vars(info).items() if key != "name"}
        values |= {"tags": text, "tags_check": check_of(text)}
        assigned = ", ".join(f"{key} = ?" for key in values)
        self._ask(f"UPDATE scenes SET {assigned} WHERE name = ?", *values.values(), info.name)

    def drop_thumbnail(self, name: str) -> None:
        """Removes the thumbnail of a scene."""
        self._ask("DELETE FROM thumbnails WHERE scene = (SELECT id FROM scenes WHERE name = ?)", name)

    def set_thumbnail(self, name: str, png: bytes) -> None:
        """Stores the thumbnail of a scene that has none."""
        question = "INSERT INTO thumbnails (scene, png, png_check) SELECT id, ?, ? FROM scenes WHERE name = ?"
        self._ask(question, png, check_of(png), name)

    def replace_shard_counts(self, shards: dict[int, int]) -> None:
        """States anew how many scenes were written into shards. Removes thumbnails of no scene."""
        self._recount = True
        for shard, count in shards.items():
            self._ask("INSERT OR REPLACE INTO shards (id, scenes) VALUES (?, ?)", shard, count)
        self._ask("DELETE FROM thumbnails WHERE scene NOT IN (SELECT id FROM scenes)")
