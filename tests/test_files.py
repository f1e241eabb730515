"""Files are complete or absent, and what cannot be written is told in one line."""

import errno
import os
from pathlib import Path

import pytest

from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, locked, write_bytes


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a: cannot be written \(No space left on device\)"):
        write_bytes(tmp_path / "a", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_places_are_looked_at_without_a_trace(tmp_path, monkeypatch):
    check_place(tmp_path / "some" / "where" / "a")
    monkeypatch.chdir(tmp_path)
    check_place(Path("a"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in ("file/a", "file/b/a"):
        with pytest.raises(UserError, match="file is a file, not a folder"):
            check_place(tmp_path / place)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="is not writable"):
        check_place(tmp_path / "some" / "a")


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file: cannot be written"),
        locked(tmp_path / "file" / "lock", True, "nobody"),
    ):
        pass
