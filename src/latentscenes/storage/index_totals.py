"""Totals of an index, kept beside its rows, so that listing a page reads no other rows.

Every change writes them in its own transaction. They count only while the index is as it was then: versions
that know no totals change rows without them. Where they do not count, they are computed from all rows.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from latentscenes.core.errors import UserError
from latentscenes.storage.entries import Totals
from latentscenes.storage.entry_checks import EntryChecks, check_of

TABLE = """CREATE TABLE IF NOT EXISTS totals (
  id INTEGER PRIMARY KEY, scenes INTEGER, bytes INTEGER, psnrs INTEGER, psnr REAL, last INTEGER,
  shard INTEGER, row_check INTEGER
)"""
SUMS = "SELECT count(*), total(bytes), count(psnr), total(psnr) FROM scenes"
LAST = ", ".join(
    f"(SELECT seq FROM sqlite_sequence WHERE name = '{table}')" for table in ("scenes", "shards")
)


class _KeptTotals(NamedTuple):
    """Totals, and of which state of the index."""

    scenes: int
    bytes: int
    psnrs: int
    """Scenes with a known PSNR."""
    psnr: float | None
    """The sum of these, dB; None if it is no number."""
    last: int | None
    """The largest number that a scene ever had; None if none had one."""
    shard: int | None
    """The same of shards."""


class IndexTotals(EntryChecks):
    """The part of an index that keeps totals."""

    path: Path

    def totals(self) -> Totals:
        """Returns the number of scenes, their size and mean PSNR."""
        found = self._kept() or self._counted()
        mean = None if found.psnr is None or not found.psnrs else found.psnr / found.psnrs
        return Totals(found.scenes, found.bytes, mean)

    def totals_are_damaged(self) -> bool:
        """Returns whether the kept totals have changed since they were written, or are not those of the
        rows although the index is as it was then."""
        for row in self._rows(f", sums.* FROM totals, ({SUMS}) AS sums"):
            kept, state, sums = _KeptTotals(*row[:6]), row[7:10], row[10:]
            if not _intact(row):
                return True
            near = math.isclose(kept.psnr or 0, sums[3] or 0, rel_tol=1e-9, abs_tol=1e-6)
            return _is_of(kept, state) and (kept[:3] != sums[:3] or not near)
        return False

    def _rows(self, rest: str = " FROM totals") -> list[tuple]:
        """Returns the kept totals with their checksum and the state of the index: none or one row."""
        if not self._ask("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'totals'"):
            return []
        kept = ", ".join(f"totals.{name}" for name in (*_KeptTotals._fields, "row_check"))
        return self._ask(f"SELECT {kept}, (SELECT count(*) FROM scenes), {LAST}{rest} WHERE id = 0")

    def _kept(self) -> _KeptTotals | None:
        """Returns the kept totals; None if they do not count."""
        kept = [
            _KeptTotals(*row[:6])
            for row in self._rows()
            if _intact(row) and _is_of(_KeptTotals(*row[:6]), row[7:])
        ]
        return kept[0] if kept else None

    def _counted(self, before: _KeptTotals | None = None) -> _KeptTotals:
        """Returns the totals of all rows: those that were there `before`, and the newer ones."""
        where = "" if before is None else f" WHERE id > {before.last or 0}"
        ((scenes, size, psnrs, psnr, *state),) = self._ask(f"SELECT *, {LAST} FROM ({SUMS}{where})")
        if not math.isfinite(size):
            raise UserError(f"{self.path}: is damaged (sizes of scenes). Restore it from a copy.")
        if before is not None:
            scenes, size, psnrs = before.scenes + scenes, before.bytes + size, before.psnrs + psnrs
            psnr = math.nan if None in (before.psnr, psnr) else before.psnr + psnr
        known = psnr is not None and not math.isnan(psnr)
        return _KeptTotals(scenes, int(size), psnrs, psnr if known else None, *state)

    @contextmanager
    def _keeping_totals(self) -> Iterator[None]:
        """Writes the totals at the end of the block, which is within a transaction."""
        self._ask(TABLE)
        before, self._recount = self._kept(), False
        yield
        after = self._counted(None if self._recount else before)
        if after != before:
            values = *after, check_of(repr(tuple(after)))
            marks = ", ".join("?" * len(values))
            self._ask(f"INSERT OR REPLACE INTO totals VALUES (0, {marks})", *values)


def _intact(row: tuple[Any, ...]) -> bool:
    return check_of(repr(row[:6])) == row[6]


def _is_of(sums: _KeptTotals, state: tuple[Any, ...]) -> bool:
    """Returns whether the index is as it was when the totals were written: number of scenes, last numbers."""
    return (sums.scenes, sums.last, sums.shard) == state
