"""What is on a disk after its power is cut, at any moment of a save: a checkpoint, or a scene in a library.

A cut is a copy of the file behind a mounted ext4: it lacks what only the page cache of the system holds.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from latentscenes.storage import verifying
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.run import Position, Run

KEPT = sorted((Path(__file__).parent / "formats").iterdir())[-1]
pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid")
    or os.geteuid() != 0
    or not Path("/dev/loop-control").exists()
    or not shutil.which("mkfs.ext4"),
    reason="cutting the power needs root, loop devices and mkfs.ext4",
)


class Disk:
    """An ext4 in a file, mounted at `path`."""

    def __init__(self, folder: Path):
        self.folder, self.image, self.path = folder, folder / "disk.img", folder / "disk"
        self.path.mkdir()
        with open(self.image, "wb") as stream:
            stream.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        if fault := self.mount(self.image, self.path):
            pytest.skip(f"no loop device can be mounted: {fault}")
        self.cuts = 0

    def mount(self, image: Path, place: Path) -> str:
        """Returns what is wrong, or an empty text."""
        done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
        return f"{done.stderr.strip()} ({done.returncode})" if done.returncode else ""

    def after_a_cut(self) -> Path:
        """Returns a copy of what the disk holds if the power is cut now."""
        self.cuts += 1
        image, place, copy = (self.folder / f"{name}{self.cuts}" for name in ("cut.img", "cut", "copy"))
        place.mkdir()
        shutil.copyfile(self.image, image)
        assert not (fault := self.mount(image, place)), fault
        try:
            shutil.copytree(place, copy, ignore=shutil.ignore_patterns("lost+found"))
        finally:
            subprocess.run(["umount", place], check=True)
            image.unlink()
        return copy


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path)
    yield disk
    subprocess.run(["umount", "-l", disk.path], check=True)


def cut_at_every_sync(disk, monkeypatch) -> list[Path]:
    """Cuts the power before and after each time that something is brought to the disk."""
    copies, fsync = [], os.fsync

    def synced(handle):
        copies.append(disk.after_a_cut())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    return copies


def test_a_checkpoint_is_there_after_a_cut_at_any_moment(disk, monkeypatch):
    run = Run.open(shutil.copytree(KEPT / "run", disk.path / "run"))
    os.sync()
    model, rows = run.load()
    with monkeypatch.context() as patched:
        copies = cut_at_every_sync(disk, patched)
        run.save(model, rows, {}, Position(total=10))
    copies.append(disk.after_a_cut())
    totals = []
    for copy in copies:
        found = Run.open(copy / "run")
        found.load()
        totals.append(found.position.total)
    assert totals[0] == 3 and totals[-1] == 10 and totals == sorted(totals) and len(totals) > 6


def test_a_scene_that_was_stored_is_there_after_a_cut(disk, monkeypatch):
    library = LibraryFolder.open(shutil.copytree(KEPT / "library", disk.path / "library"))
    os.sync()
    first = library.index.infos()[0]
    scene = NewScene(
        type(first)(**vars(first) | {"name": "new", "source": "new"}), library.payload(first.name)
    )
    with monkeypatch.context() as patched:
        copies = cut_at_every_sync(disk, patched)
        library.append([scene])
    copies.append(disk.after_a_cut())
    library.close()
    for copy in copies:
        after = LibraryFolder.open(copy / "library")
        assert verifying.verify(after) == [] and len(after.index) == 5 + (copy == copies[-1])
        after.append([scene] if copy != copies[-1] else [])
        assert "new" in after.index.names()
        after.close()
