"""Nothing is lost by kills, power cuts, damaged files, old copies or foreign files (docs/guarantees.md).

The runs, libraries and datasets are those of tests/formats, so nothing is learned here.
"""

import json
import os
import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from latentscenes.core import config_io, files
from latentscenes.core.cameras import Box
from latentscenes.core.errors import UserError
from latentscenes.core.files import locked, read_object, write_bytes, write_with_checksum
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages, verify
from latentscenes.data.writing import join
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage import maintenance, recovery, verifying
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.pretrained import export_model
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.storage.shards import Shards
from latentscenes.training.append import draw_thumbnails
from latentscenes.training.exploit import exploit

KEPT = sorted((Path(__file__).parent / "formats").iterdir())[-1]
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.open(shutil.copytree(KEPT / "run", tmp_path / "run"))


@pytest.fixture
def library(tmp_path) -> LibraryFolder:
    return LibraryFolder.open(shutil.copytree(KEPT / "library", tmp_path / "library"))


def copies(library: LibraryFolder, *names: str) -> list[NewScene]:
    """New scenes that hold what the library's first scene holds."""
    first = library.index.names()[0]
    entry = vars(library.index.info(first))
    return [
        NewScene(
            type(library.index.info(first))(**entry | {"name": name, "source": name}), library.payload(first)
        )
        for name in names
    ]


def index_of(library: LibraryFolder) -> bytes:
    """Closes a library and returns its index."""
    library.close()
    return (library.path / FILE).read_bytes()


def with_index(library: LibraryFolder, content: bytes) -> LibraryFolder:
    """Closes a library, puts an older copy of its index back, and opens it."""
    library.close()
    for file in library.path.glob(f"{FILE}*"):
        file.unlink()
    (library.path / FILE).write_bytes(content)
    return LibraryFolder.open(library.path)


def flip(file: Path, place: int = -1) -> None:
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def events_of(monkeypatch) -> list[str]:
    """Records what is brought to the disk, renamed and removed, in order."""
    events, fsync, replace, rmtree = [], os.fsync, Path.replace, shutil.rmtree

    def synced(handle):
        events.append(f"sync {os.readlink(f'/proc/self/fd/{handle}')}")
        fsync(handle)

    def replaced(path, target):
        events.append(f"rename {path} {target}")
        return replace(path, target)

    def removed(path, **options):
        events.append(f"remove {path}")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return events


# Writing


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = events_of(monkeypatch)
    write_bytes(tmp_path / "a", b"1")
    partial = files.partial_path(tmp_path / "a")
    assert events == [f"sync {partial}", f"rename {partial} {tmp_path / 'a'}", f"sync {tmp_path}"]


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(run, monkeypatch):
    model, rows = run.load()
    for total in (10, 20):
        run.save(model, rows, {}, Position(total=total))
    events = events_of(monkeypatch)
    run.save(model, rows, {}, Position(total=30))
    home = run.path / "checkpoints"
    named = events.index(f"rename {home / '30.partial'} {home / '30'}")
    for name in ("shared.safetensors", "rows.safetensors", "optimizer.safetensors", "state.json"):
        assert f"sync {home / '30.partial' / name}" in events[:named]
    assert f"sync {home / '30.partial'}" in events[:named]
    assert events[named + 1 :] == [f"sync {home}", f"remove {home / '10'}"]
    assert sorted(path.name for path in home.iterdir()) == ["20", "30"]


def test_files_are_exclusively_created_and_no_link_is_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for place in (tmp_path / "a", files.partial_path(tmp_path / "a")):
        place.symlink_to(victim)
        write_bytes(tmp_path / "a", b"new")
        assert victim.read_bytes() == b"precious"
        assert (tmp_path / "a").read_bytes() == b"new" and not (tmp_path / "a").is_symlink()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "victim"]


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask(run, library, mask, mode):
    before = os.umask(mask)
    try:
        run.save(*run.load(), {}, Position(total=9))
        (library.path / FILE).unlink()
        recovery.rebuild(library.path)
        library = LibraryFolder.open(library.path)
        library.append(copies(library, "new"))
    finally:
        os.umask(before)
    written = [*(run.path / "checkpoints" / "9").iterdir(), library.path / FILE, library.shards.file(5)]
    assert {stat.S_IMODE(file.stat().st_mode) for file in written} == {mode}


def test_what_may_not_be_read_is_said_as_such(run):
    file = run.shared_file
    file.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"shared.safetensors: no permission to read it"):
            files.check_file(file, "0" * 64, "Remove it.")
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[1]", b"{", b"\xff", b"[" * 5000])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run.json: cannot be read \(.*\). Restore it."):
        read_object(tmp_path / "run.json", "Restore it.")


def test_a_seal_is_broken_by_any_change(tmp_path):
    file = tmp_path / "a.json"
    write_with_checksum(file, {"box": [0.1, 0.2], "name": "ü", "path": Path("a")})
    assert read_object(file, "")["path"] == "a"
    file.write_text(file.read_text().replace("0.2", "0.3"))
    with pytest.raises(UserError, match="its content has changed since it was written"):
        read_object(file, "")
    assert read_object(file, "", seal=False)["box"] == [0.1, 0.3]


# Runs


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, capfd):
    model, rows = run.load()
    run.save(model, rows, {}, Position(total=10))
    before = rows.micro.clone()
    rows.micro += 1
    run.save(model, rows, {}, Position(total=20))
    flip(run.rows_file)
    with pytest.raises(UserError, match="20/rows.safetensors.*goes on from the checkpoint before"):
        run.load()
    again = Model(run.config, run.info.box)
    found = SceneParameters(**{name: table.clone() for name, table in rows.tables().items()})
    run.restore(again, found)
    assert torch.equal(found.micro, before) and run.position.total == 10
    assert "20/rows.safetensors: cannot be read" in capfd.readouterr().err
    flip(run.rows_file)
    with pytest.raises(UserError, match="10/rows.safetensors.*or remove"):
        run.restore(again, found)


@pytest.mark.parametrize(
    "name", ["shared.safetensors", "rows.safetensors", "optimizer.safetensors", "state.json"]
)
@pytest.mark.parametrize(
    "spoil", [flip, lambda file: file.write_bytes(b""), Path.unlink], ids=["bit", "empty", "gone"]
)
def test_every_file_of_a_checkpoint_is_checked(run, name, spoil):
    run.save(*run.load(), {"m": torch.ones(3)}, Position(total=10))
    run.check()
    spoil(run.shared_file.parent / name)
    with pytest.raises(UserError, match=name):
        run.load()


def test_a_run_that_was_only_begun_is_taken_up(tmp_path, tiny):
    info = RunInfo("train", "data", "train", ["a"], Box((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    whole = Run.create(tmp_path / "run", tiny, info)
    for leave in (
        {"config.yaml"},
        {"config.yaml.partial-host-1"},
        {"config.yaml", "run.json.partial-host-1"},
    ):
        for file in whole.path.iterdir():
            if file.name not in leave:
                file.unlink()
        for name in leave - {"config.yaml"}:
            (whole.path / name).write_bytes(b"")
        assert Run.create(whole.path, tiny, info).info == info
    (whole.path / "run.json").unlink()
    (whole.path / "config.yaml").write_text("# my own settings\n")
    with pytest.raises(UserError, match="exists and holds no run"):
        Run.create(whole.path, tiny, info)
    assert (whole.path / "config.yaml").read_text() == "# my own settings\n"


def test_edited_settings_are_noted(tmp_path, tiny, capfd):
    info = RunInfo("train", "data", "train", ["a"], Box((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    settings = Run.create(tmp_path / "run", tiny, info).path / "config.yaml"
    assert "was edited" not in capfd.readouterr().err
    settings.write_text(settings.read_text() + "# a remark\n")
    assert Run.open(tmp_path / "run").config == tiny
    assert "config.yaml was edited, or damaged, after it was written" in capfd.readouterr().err


# Libraries


def test_an_older_index_loses_no_shard(library):
    old = index_of(library)
    library = LibraryFolder.open(library.path)
    library.append(copies(library, "a", "b"))
    content = library.shards.file(5).read_bytes()
    library = with_index(library, old)
    assert [(damage.name, "holds 'a', 'b'" in damage.what) for damage in verifying.verify(library)] == [
        ("shards/000005.safetensors", True)
    ]
    library.append(copies(library, "c"))
    maintenance.compact(library)
    assert library.shards.file(5).read_bytes() == content
    done = recovery.rebuild(library.path)
    assert done.scenes == ["a", "b"] and not done.index_made and not done.renamed
    library = LibraryFolder.open(library.path)
    assert library.index.names()[-3:] == ["c", "a", "b"] and verifying.verify(library) == []
    assert library.index.info("a").psnr == library.index.info("c").psnr


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"x" * 9000)]
)
def test_an_index_is_made_from_the_shards(library, spoil):
    library.append(copies(library, "a"))
    before = {info.name: info for info in library.index.infos()}
    maintenance.compact(library)  # writes shards that state what they hold
    library.remove(["a"])
    maintenance.compact(library)
    library.close()
    spoil(library.path / FILE)
    with pytest.raises(UserError, match="latentscenes library rebuild"):
        LibraryFolder.open(library.path).index.names()
    done = recovery.rebuild(library.path)
    again = LibraryFolder.open(library.path)
    del before["a"]
    assert done.index_made and {info.name: info for info in again.index.infos()} == before
    assert verifying.verify(again) == [] and again.index.without_thumbnail() == again.index.names()
    draw_thumbnails(again, CPU)
    assert again.index.without_thumbnail() == [] and again.index.thumbnail("car_0000")[:4] == b"\x89PNG"


def test_shards_of_earlier_versions_are_taken_in_without_names(library):
    before = {place.checksum: library.index.info(name) for name, place in library.index.places().items()}
    library.close()
    (library.path / FILE).unlink()
    assert len(recovery.rebuild(library.path).scenes) == 5
    again = LibraryFolder.open(library.path)
    assert again.index.names()[0] == "000001-0"
    for name, place in again.index.places().items():
        info, old = again.index.info(name), before[place.checksum]
        assert (info.precision, info.bytes) == (old.precision, old.bytes)


def test_a_lost_scene_is_found_in_an_unlisted_shard_and_keeps_its_name_and_tags(library):
    first = library.index.names()[0]
    library.rename(first, "mine")
    library.tag("mine", {"color": "red"})
    old = index_of(library)
    library = LibraryFolder.open(library.path)
    maintenance.compact(library)
    broken = with_index(library, old)  # which does not know where the scenes went
    assert {damage.what[:9] for damage in verifying.verify(broken)} >= {"its shard"}
    broken.close()
    recovery.rebuild(library.path)
    again = LibraryFolder.open(library.path)
    assert verifying.verify(again) == [] and len(again.index) == 5
    assert again.index.info("mine").tags == {"color": "red"} and again.index.thumbnail("mine")


def test_equal_names_both_stay(library):
    old = index_of(library)
    library = LibraryFolder.open(library.path)
    library.append(copies(library, "x"))
    library = with_index(library, old)
    library.rename(library.index.names()[-1], "x")
    assert recovery.rebuild(library.path).renamed == ["x (2)"]
    again = LibraryFolder.open(library.path)
    assert {"x", "x (2)"} <= set(again.index.names()) and verifying.verify(again) == []


def test_compact_frees_what_a_kill_left_but_no_unknown_file(library):
    place = library.index.place(library.index.names()[0])
    shutil.copy(library.shards.file(place.shard), library.shards.file(9))
    (library.path / "shards" / "000010.safetensors.partial-host-1").write_bytes(b"1")
    (library.path / "shards" / "notes.txt").write_text("mine")
    assert verifying.verify(library) == []
    maintenance.compact(library)
    names = {file.name for file in (library.path / "shards").iterdir()}
    assert "notes.txt" in names and not names & {"000009.safetensors", "000010.safetensors.partial-host-1"}
    library.append(copies(library, "new"))
    assert verifying.verify(library) == []


def test_verify_compares_the_index_with_the_shards(library):
    library.append(copies(library, "a"))
    library.rename("a", "b")
    library.tag("b", {"color": "red"})
    assert verifying.verify(library) == []
    library.close()
    with sqlite3.connect(library.path / FILE) as connection:
        connection.execute("UPDATE scenes SET psnr = psnr + 1 WHERE name = 'b'")
    connection.close()
    found, totals = verifying.verify(LibraryFolder.open(library.path))
    assert found.name == "b" and found.what.endswith("is not that of its shard 000005.safetensors: psnr")
    assert totals.name == FILE and "its totals are not those of its scenes" in totals.what


def test_a_shard_is_never_replaced(library):
    with pytest.raises(FileExistsError, match="never replaced"):
        library.shards.write(1, [(library.index.infos()[0], library.payload(library.index.names()[0]))])


def test_verify_asks_again_where_another_process_moved_a_scene(library, monkeypatch):
    read, moved = Shards.read, []

    def moving(shards, place):
        if not moved:
            moved.append(1)
            other = LibraryFolder.open(library.path)
            maintenance.compact(other)
            other.close()
        return read(shards, place)

    monkeypatch.setattr(Shards, "read", moving)
    assert verifying.verify(library) == [] and moved


def test_verify_waits_for_a_shard_that_is_just_being_listed(library, monkeypatch):
    add, written, listed = Index.add, threading.Event(), threading.Event()

    def slow(*given):
        written.set()
        listed.wait(120)
        add(*given)

    monkeypatch.setattr(Index, "add", slow)
    writer = threading.Thread(target=library.append, args=(copies(library, "a"),))
    writer.start()
    assert written.wait(120)
    reader = LibraryFolder.open(library.path)
    assert [file.name for file in recovery.unlisted(reader)] == ["000005.safetensors"]
    threading.Timer(0.2, listed.set).start()
    assert verifying.verify(reader) == []
    writer.join()


@pytest.mark.parametrize("name", ["shared.safetensors", "start.safetensors"])
def test_nothing_is_learned_on_a_damaged_model(library, name):
    fresh = LibraryFolder.create(
        library.path.parent / "fresh", library.config, library.info, library.model(), library.starting_scene()
    )
    flip(fresh.path / "model" / name, -100)
    images = PosedImages.open(KEPT / "cars")
    with pytest.raises(UserError, match=f"{name}: cannot be read .its bytes have changed"):
        exploit(fresh.path, images, fresh.config, None, ExploitOptions(), CPU)
    assert not fresh.index.names()


def test_a_damaged_description_is_refused(library):
    facts = json.loads((library.path / "library.json").read_text())
    write_with_checksum(library.path / "library.json", facts)
    assert LibraryFolder.open(library.path).info == library.info
    changed = (library.path / "library.json").read_text().replace('"int8"', '"int3"', 1)
    (library.path / "library.json").write_text(changed)
    with pytest.raises(UserError, match="its content has changed"):
        LibraryFolder.open(library.path)


def test_broken_work_is_swept_and_work_in_progress_is_not(library, run):
    work = library.path / "work"
    for name, spoil in {
        "empty": lambda file: (file / "run.json").write_bytes(b""),
        "gone": lambda file: (file / "run.json").unlink(),
        "torn": lambda file: (file / "checkpoints" / "3" / "shared.safetensors").write_bytes(b"torn"),
        "settings": lambda file: (file / "config.yaml").write_bytes(b""),
        "busy": lambda file: (file / "run.json").write_bytes(b""),
    }.items():
        spoil(Path(shutil.copytree(run.path, work / name)))
    Run.open(work / "torn").save(*run.load(), {}, Position(total=5))
    flip(work / "torn" / "checkpoints" / "5" / "rows.safetensors")
    flip(work / "torn" / "checkpoints" / "3" / "state.json", 0)
    with locked(work / "busy" / "lock", False, "busy"):
        exploit(library.path, PosedImages.open(KEPT / "cars"), library.config, None, ExploitOptions(), CPU)
    assert [folder.name for folder in work.iterdir() if folder.is_dir()] == ["busy"]


def test_a_half_made_library_is_taken_up(library):
    for leave in (
        "config.yaml",
        "model",
        "shards",
        "lock",
        "library.json.partial-host-1",
        "index.sqlite.partial-host-1",
    ):
        out = library.path.parent / leave
        out.mkdir()
        (out / leave).touch() if "." in leave or leave == "lock" else (out / leave).mkdir()
        made = LibraryFolder.create(
            out, library.config, library.info, library.model(), library.starting_scene()
        )
        assert verifying.verify(made) == []


def test_a_killed_export_of_a_model_is_no_obstacle(library, monkeypatch):
    out = library.path.parent / "model"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("latentscenes.storage.pretrained.write_with_checksum", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(library, out)
    assert not out.exists() and export_model(library, out) > 0
    assert verifying.verify(LibraryFolder.open(out)) == []


# Foreign files


LINKS = ("shards", "index.sqlite", "lock", "work", "shards/000001.safetensors", "index.sqlite-wal")


@pytest.mark.parametrize("name", LINKS)
def test_a_library_with_links_is_not_changed(library, name):
    outside, inside = library.path.parent / "outside", library.path / name
    library.close()
    if inside.exists():
        inside.rename(outside)
    elif name == "work":
        outside.mkdir()
        (outside / "precious").write_text("mine")
    else:
        outside.write_text("precious")
    inside.symlink_to(outside)
    before = {file: file.read_bytes() for file in (outside, *outside.rglob("*")) if file.is_file()}
    images = PosedImages.open(KEPT / "cars")
    for change in (
        lambda: LibraryFolder.open(library.path).rename("car_0000", "x"),
        lambda: maintenance.compact(LibraryFolder.open(library.path)),
        lambda: recovery.rebuild(library.path),
        lambda: exploit(library.path, images, library.config, None, ExploitOptions(), CPU),
    ):
        with pytest.raises(UserError, match=f"{name}: a symbolic link|unable to open database file"):
            change()
    assert {file: file.read_bytes() for file in (outside, *outside.rglob("*")) if file.is_file()} == before


def test_a_run_with_links_is_not_continued(run):
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").symlink_to(run.path.parent / "victim")
    with pytest.raises(UserError, match="metrics.jsonl: a symbolic link"):
        run.lock()


# Datasets


def test_a_dataset_is_verified(tmp_path):
    assert verify(KEPT / "cars") is None  # an earlier version made it
    parts = [Path(shutil.copytree(KEPT / "cars", tmp_path / name)) for name in ("a", "b")]
    index = parts[1] / "views.json"
    index.write_text(index.read_text().replace("car_", "other_"))
    joined = join(parts, tmp_path / "joined").path
    assert verify(joined) == []
    for name in ("rgb.npy", "alpha.npy", "cameras.npy"):
        whole = (joined / name).read_bytes()
        flip(joined / name)
        (found,) = verify(joined)
        assert f"{name}: cannot be read (its bytes have changed" in found
        (joined / name).write_bytes(whole)
    text = (joined / "views.json").read_text()
    (joined / "views.json").write_text(text.replace("other_0000", "renamed"))
    assert "renamed" in [scene.name for scene in PosedImages.open(joined).scenes]
    assert ["views.json: was edited" in found for found in verify(joined)] == [True]


@pytest.mark.parametrize("old, new", [("name", "nane"), ("checksum", "checkswm"), ("[{", "{{")])
def test_damage_of_what_a_shard_states_is_found(library, old, new):
    library.append(copies(library, "a", "b"))
    file = library.shards.file(library.shards.numbers()[-1])
    data = file.read_bytes()
    assert data.count(old.encode()) >= 1
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))
    library.close()
    found = verifying.verify(LibraryFolder.open(library.path))
    assert [damage.name for damage in found] == ["a", "b"]
    assert all("what it states of its scenes is damaged" in damage.what for damage in found)


def test_a_shard_removed_while_it_is_opened_counts_as_absent(library, monkeypatch):
    """safetensors opens a file twice; a compaction may remove it in between."""

    def opened(file, kind):
        file.unlink()
        raise RuntimeError(f"unable to open file <{file}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr("latentscenes.core.files.safe_open", opened)
    first = library.shards.numbers()[0]
    with pytest.raises(FileNotFoundError, match="absent, though the index lists it"):
        library.shards.open(first)


def test_each_commit_of_an_index_is_brought_to_the_disk(library):
    """With SQLite's log (WAL), full synchronization does that."""
    ask = library.index._connection.execute
    assert (ask("PRAGMA journal_mode").fetchone()[0], ask("PRAGMA synchronous").fetchone()[0]) == ("wal", 2)


class MakesFolder:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_yaml_and_npy_is_not_run(tmp_path):
    made, settings = tmp_path / "made", tmp_path / "code.yaml"
    settings.write_text(f"seed: !!python/object/apply:os.mkdir [{made}]\n")
    with pytest.raises(UserError, match="code.yaml: not valid YAML"):
        config_io.load(str(settings))
    data = Path(shutil.copytree(KEPT / "cars", tmp_path / "cars"))
    (file, *_) = sorted(data.glob("*.npy"))
    np.save(file, np.array([MakesFolder(made)]), allow_pickle=True)
    for read in (PosedImages.open, verify):
        with pytest.raises(UserError, match=file.name):
            read(data)
    assert not made.exists()
    np.load(file, allow_pickle=True)
    assert made.is_dir()  # what it would have done
