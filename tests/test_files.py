"""Files are complete or absent, and what cannot be written is told in one line."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, locked, partial_path, sync, write_bytes, write_files


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a: cannot be written \(No space left on device\)"):
        write_bytes(tmp_path / "a", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("call, time", [("fsync", 2), ("fsync", 3), ("replace", 2), ("replace", 3)])
def test_of_files_that_belong_together_all_are_written_or_none(call, time, tmp_path, monkeypatch):
    (tmp_path / "c").write_bytes(b"old")
    contents = {tmp_path / name: name.encode() for name in "abc"}
    met, home = [], os if call == "fsync" else Path
    original = getattr(home, call)

    def fails_once(*arguments):
        met.append(arguments)
        if len(met) == time:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(home, call, fails_once)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        write_files(contents)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"c": b"old"}
    assert write_files(contents) == 3
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        name: name.encode() for name in "abc"
    }


def test_a_folder_that_cannot_be_brought_to_the_disk_is_no_fault_but_a_failing_disk_is(tmp_path, monkeypatch):
    def fails_with(number):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    for number in (errno.EINVAL, errno.ENOTSUP):
        fails_with(number)
        sync(tmp_path)
    fails_with(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync(tmp_path)


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


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for place in (tmp_path / "fifo", tmp_path / "link", Path("/dev/null")):
        for refuse in (check_place, lambda path: write_bytes(path, b"new")):
            with pytest.raises(UserError, match=f"{place}: no regular file"):
                refuse(place)
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "link").is_symlink()
    assert Path("/dev/null").is_char_device() and len(list(tmp_path.iterdir())) == 2


def test_a_lock_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file: cannot be written"),
        locked(tmp_path / "file" / "lock", True, "nobody"),
    ):
        pass


def test_what_killed_processes_left_is_removed(tmp_path, capfd):
    process = subprocess.Popen(["true"])
    process.wait()
    own = partial_path(tmp_path / "cars")
    begin = own.name.removesuffix(str(os.getpid()))
    dead, alive = tmp_path / f"{begin}{process.pid}", tmp_path / f"{begin}{os.getppid()}"
    others = [
        tmp_path / f"cars.partial-elsewhere-{process.pid}",
        tmp_path / f"{begin}notes",
        tmp_path / "cars2",
    ]
    for folder in (dead, own, alive, *others):
        folder.mkdir()
        (folder / "rgb.raw").write_bytes(b"1")
    film = partial_path(tmp_path / "cars.mp4")
    assert film.suffix == ".mp4" and dead.is_dir()
    film.write_bytes(b"1")
    assert partial_path(tmp_path / "cars") == own
    assert sorted(tmp_path.iterdir()) == sorted([alive, *others, film])
    assert capfd.readouterr().err.count("left by a process that was killed") == 2
    assert partial_path(tmp_path / "cars.mp4") == film and not film.exists()
