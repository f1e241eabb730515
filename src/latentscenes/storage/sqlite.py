"""Untrusted SQLite files: none may make SQLite run code, compute without end, or fill the memory."""

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.core.names import short

MOST_STEPS = 100_000_000
"""Steps of SQLite's machine that a statement may take, plus one for each byte of the file: some seconds."""
STEPS = 100_000
"""Steps between two checks."""
LONGEST_VALUE = 64 << 20
"""Bytes of the longest text or picture in a file."""
COMPUTING = """SELECT type, name FROM sqlite_master AS part
  WHERE rootpage = 0 OR type NOT IN ('table', 'index')
  OR type = 'table' AND EXISTS (SELECT 1 FROM pragma_table_xinfo(part.name) WHERE hidden)
  OR type = 'index' AND EXISTS (SELECT 1 FROM pragma_index_xinfo(part.name) WHERE cid = -2)"""
"""Views, triggers, virtual tables, computed columns, and indices of expressions."""


def guard(connection: sqlite3.Connection, path: Path) -> Callable[[], None]:
    """Limits what an opened file can make SQLite do. Returns a function to call before each statement, which
    then may take MOST_STEPS; beyond, SQLite stops it with an OperationalError.

    Raises:
        UserError: the file holds more than tables and plain indices.
    """
    steps, most = 0, MOST_STEPS + os.path.getsize(path)

    def begin() -> None:
        nonlocal steps
        steps = 0

    def too_many() -> bool:
        nonlocal steps
        steps += STEPS
        return steps > most

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    connection.set_progress_handler(too_many, STEPS)
    connection.execute("PRAGMA trusted_schema = OFF")
    for kind, name in connection.execute(COMPUTING):
        raise UserError(
            f"{path}: holds {short(name)} ({kind}), which runs code; the index of a library has none. "
            "Restore it from a copy of the library."
        )
    return begin


def address(path: Path) -> str:
    """Returns the URI by which SQLite opens a file. In a read-only folder, SQLite cannot lock it, so the file
    counts as immutable, unless it has a journal: then the file alone may be half-written."""
    if os.access(path.parent, os.W_OK):
        mode = "rw"
    else:
        journals = (path.with_name(f"{path.name}-{end}") for end in ("wal", "journal"))
        mode = "ro" if any(journal.exists() for journal in journals) else "ro&immutable=1"
    return f"{path.resolve().as_uri()}?mode={mode}"


def database_problem(path: Path) -> str | None:
    """Returns the fault of a file of SQLite: absent, empty, or the finding of SQLite's own check. None
    if nothing."""
    if not path.is_file():
        return "it is absent"
    try:
        with contextlib.closing(sqlite3.connect(address(path), uri=True, timeout=60)) as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                return "it is empty"
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == "ok" else " ".join(found.split())
