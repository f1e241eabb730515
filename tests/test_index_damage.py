"""Damage of what only the index of a library says, of logs and of scores: it is named, mended, and loses no
scene. Changes of names, tags and thumbnails are no damage."""

import itertools
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from latentscenes.core.errors import UserError
from latentscenes.evaluation.evaluate import Evaluation, SceneScore
from latentscenes.storage import maintenance, recovery
from latentscenes.storage.entries import Totals
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.joining import join
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.records import METRICS, SCORES, keep_log, log_problem, read_metrics
from latentscenes.storage.run import Run
from latentscenes.storage.verifying import verify, verify_run

KEPT = sorted((Path(__file__).parent / "formats").iterdir())[-1]
TAG, PICTURE, SECONDS = "a leather armchair", b"\x89PNG picture of it" * 8, 1234.5678


@pytest.fixture
def library(tmp_path) -> LibraryFolder:
    """A kept library of an earlier version with two more scenes, 'armchair' and 'other'."""
    library = LibraryFolder.open(shutil.copytree(KEPT / "library", tmp_path / "library"))
    first = library.index.infos()[0]
    found = replace(first, name="armchair", source="armchair", tags={"about": TAG}, seconds=SECONDS)
    other = replace(first, name="other", source="other")
    payload = library.payload(first.name)
    library.append([NewScene(found, payload, PICTURE), NewScene(other, payload, b"\x89PNG another")])
    assert verify(library) == []
    return library


def damage_of(path: Path) -> dict[str, str]:
    opened = LibraryFolder.open(path)
    found = {damage.name: damage.what for damage in verify(opened)}
    opened.close()
    return found


def changed(library: LibraryFolder, statement: str) -> LibraryFolder:
    """The library opened again after a change of its index that no command made."""
    library.close()
    with closing(sqlite3.connect(library.path / FILE)) as connection, connection:
        connection.execute(statement)
    return LibraryFolder.open(library.path)


@pytest.mark.parametrize(
    "value, named",
    [
        (b"armchair", FILE), (TAG.encode(), "armchair"), (PICTURE, "armchair"),
        (struct.pack(">d", SECONDS), "armchair"),
    ],
    ids=["name", "tag", "thumbnail", "cost"],
)  # fmt: skip
def test_every_flipped_bit_of_an_entry_is_named(library, value, named):
    library.close()
    file = library.path / FILE
    content = file.read_bytes()
    place = content.rindex(value)
    for byte, bit in itertools.product(range(0, len(value), 1 + len(value) // 8), (0, 3, 7)):
        spoiled = bytearray(content)
        spoiled[place + byte] ^= 1 << bit
        file.write_bytes(spoiled)
        assert named in damage_of(library.path), (byte, bit)
    file.write_bytes(content)
    assert damage_of(library.path) == {}


@pytest.mark.parametrize(
    "statement, said",
    [
        ("UPDATE scenes SET name = 'armchain' WHERE name = 'armchair'", "its name in index.sqlite changed"),
        ("UPDATE scenes SET tags = '{\"about\": \"plastic\"}' WHERE name = 'armchair'", "its tags in"),
        ("UPDATE scenes SET tags = '{oops' WHERE name = 'armchair'", "is damaged"),
        ("UPDATE scenes SET seconds = 3 WHERE name = 'armchair'", "its shard 000005.safetensors: seconds"),
        ("UPDATE thumbnails SET png = png || 'x' WHERE png_check NOTNULL", "its thumbnail in"),
    ],
)  # fmt: skip
def test_changed_entries_are_named_and_mended(library, statement, said):
    before = {info.name: info for info in library.index.infos()}
    library = changed(library, statement)
    found = verify(library)
    assert found and {damage.name for damage in found} <= {"armchair", "armchain", "other"}
    assert any(said in damage.what for damage in found)
    library.close()
    done = recovery.rebuild(library.path)
    assert done.mended and not done.damaged and not done.scenes and not done.index_made
    again = LibraryFolder.open(library.path)
    assert verify(again) == [] and {info.name: info for info in again.index.infos()} == before
    assert ("armchair" in again.index.without_thumbnail()) == ("thumbnail" in said)


def test_changes_by_commands_are_no_damage(library, tmp_path):
    library.rename("armchair", "été 🚗")
    library.tag("été 🚗", {"about": 'é\n"', "odd": float("inf")})
    with library.writing(), library.index.transaction():
        library.index.drop_thumbnail("other")
        library.index.set_thumbnail("other", b"\x89PNG third")
    assert verify(library) == []
    for change in (maintenance.compact, lambda one: maintenance.repack(one, "int4")):
        change(library)
        assert verify(library) == []
    names = library.index.names()
    maintenance.export(library, names, tmp_path / "copy")
    join(tmp_path / "joined", [library.path])
    for path in (tmp_path / "copy", tmp_path / "joined"):
        made = LibraryFolder.open(path)
        assert verify(made) == [] and set(made.index.names()) == set(names)
        assert made.index.info("été 🚗").tags["about"] == 'é\n"'
        spoiled = changed(made, "UPDATE scenes SET tags = '{}' WHERE name = 'été 🚗'")
        assert [damage.name for damage in verify(spoiled)] == ["été 🚗"]
    library.remove(["été 🚗"])
    maintenance.compact(library)
    assert verify(library) == [] and recovery.rebuild(library.path).mended == []


def test_libraries_of_earlier_versions_get_checksums_by_compact(tmp_path):
    library = LibraryFolder.open(shutil.copytree(KEPT / "library", tmp_path / "library"))
    first = library.index.names()[0]
    assert verify(library) == [] and list(library.index.changed_values()) == []
    maintenance.compact(library)
    assert verify(library) == []
    spoiled = changed(library, f"UPDATE scenes SET tags = '{{\"a\": 1}}' WHERE name = '{first}'")
    assert [damage.name for damage in verify(spoiled)] == [first]
    spoiled.tag(first, {"a": 2})
    assert verify(spoiled) == []


def test_a_damaged_table_of_shards_loses_no_scene(library):
    """`compact` removes shards that hold no scene: it must not believe a damaged index."""
    names = library.index.names()
    for statement, said in (
        ("UPDATE shards SET id = 77 WHERE id = 5", "does not list shard 5"),
        ("UPDATE shards SET scenes = 'x' WHERE id = 5", "does not list shard 5,"),
        ("UPDATE shards SET scenes = 3 WHERE id = 5", "000005.safetensors holds 3 scenes, not 2"),
    ):
        spoiled = LibraryFolder.open(shutil.copytree(library.path, library.path.with_name(said[-9:])))
        spoiled = changed(spoiled, statement)
        found = [damage for damage in verify(spoiled) if damage.name == FILE]
        assert any(said in damage.what for damage in found)
        maintenance.compact(spoiled)
        assert spoiled.index.names() == names and not [one for one in verify(spoiled) if one.name != FILE]
        spoiled.close()
        recovery.rebuild(spoiled.path)
        assert damage_of(spoiled.path) == {}


@pytest.mark.parametrize("place", ["shard = 2, row = 0", "row = 9", "shard = 8"])
def test_a_scene_that_is_looked_for_elsewhere_stays(library, place):
    spoiled = changed(library, f"UPDATE scenes SET {place} WHERE name IN ('armchair', 'other')")
    files = {file.name for file in (library.path / "shards").iterdir()}
    assert {damage.name for damage in verify(spoiled)} >= {"armchair", "other"}
    for change in (maintenance.compact, lambda one: maintenance.repack(one, "int4")):
        with pytest.raises(UserError, match="does not lie where the index says"):
            change(spoiled)
    assert {file.name for file in (library.path / "shards").iterdir()} == files


# Totals


def totals_of(library: LibraryFolder) -> Totals:
    """The totals, which must be kept, and those of the rows."""
    infos = library.index.infos()
    known = [info.psnr for info in infos if info.psnr is not None]
    right = Totals(len(infos), sum(info.bytes for info in infos), sum(known) / len(known) if known else None)
    for found in (library.index.totals(), library.index._kept()):
        assert found[:2] == right[:2]
    assert library.index.totals().psnr == (right.psnr and pytest.approx(right.psnr, abs=1e-9))
    return right


def test_totals_are_kept_by_every_change(library):
    first, payload = library.index.infos()[0], library.payload("other")

    def append(name, psnr):
        info = replace(first, name=name, source=name, psnr=psnr)
        library.append([NewScene(info, payload, b"\x89PNG another")])

    before = totals_of(library)
    append("good", 40.0)
    append("unknown", None)
    assert totals_of(library).count == before.count + 2
    with pytest.raises(UserError, match="there already"):
        append("good", 20.0)
    with pytest.raises(ZeroDivisionError), library.writing(), library.index.transaction():
        library.index.remove(["good"])
        raise ZeroDivisionError
    assert totals_of(library).count == before.count + 2
    library.rename("good", "better")
    library.tag("better", {"a": 1})
    totals_of(library)
    library.remove(["armchair"])
    assert totals_of(library).count == before.count + 1
    maintenance.compact(library)
    size = totals_of(library).bytes
    assert maintenance.repack(library, "int3") and totals_of(library).bytes < size
    library.remove(library.index.names())
    assert totals_of(library) == (0, 0, None)
    append("new", 30.0)
    assert totals_of(library).psnr == 30


def test_totals_of_earlier_versions_are_counted(library, tmp_path):
    """An index without totals gets them by its first change; versions that know none leave them outdated."""
    old = LibraryFolder.open(shutil.copytree(KEPT / "library", tmp_path / "old"))
    assert old.index._kept() is None and old.index.totals().count == len(old.index.names())
    old.rename(old.index.names()[0], "another")
    totals_of(old)
    for statement in (
        "DELETE FROM scenes WHERE name = 'armchair'",
        "INSERT INTO scenes (name, shard, row, checksum, precision, bytes, origin, source, added, tags) "
        "SELECT 'new', shard, row, checksum, precision, 7, origin, source, added, tags FROM scenes LIMIT 1",
    ):
        count = library.index.totals().count
        library = changed(library, statement)
        assert library.index._kept() is None and not library.index.totals_are_damaged()
        assert abs(library.index.totals().count - count) == 1
    library.tag("other", {"a": 1})
    totals_of(library)


def test_damaged_totals_are_named_and_mended(library):
    right = totals_of(library)
    for statement in (
        "UPDATE totals SET bytes = bytes + 1", "UPDATE totals SET psnr = 'x'",
        "UPDATE totals SET row_check = row_check + 1", "UPDATE scenes SET bytes = 7 WHERE name = 'other'",
    ):  # fmt: skip
        library = changed(library, statement)
        assert any("its totals are not those" in damage.what for damage in verify(library))
        assert "scenes" in statement or library.index.totals() == right
        library.close()
        recovery.rebuild(library.path)
        library = LibraryFolder.open(library.path)
        assert verify(library) == [] and totals_of(library) == right


def test_entries_out_of_order_do_not_keep_verify_busy(library, monkeypatch):
    """A damaged page of SQLite's can give the same row for every question."""
    ask, names = Index._ask, library.index.names()

    def stuck(index, question, *values):
        found = ask(index, question, *values)
        return found or (ask(index, question, -1, *values[1:]) if " > ?" in question else found)

    monkeypatch.setattr(Index, "_ask", stuck)
    assert list(library.index.changed_values()) == []
    pages = library.index.pages(1000)
    assert [info.name for info, _ in next(pages)] == names
    with pytest.raises(UserError, match="entries out of order"):
        next(pages)


# Logs and scores


def test_every_changed_byte_of_a_log_is_noticed(library, tmp_path):
    run = Run.open(shutil.copytree(KEPT / "run", tmp_path / "run"))
    steps = run.metrics()
    assert log_problem(library.path) is None  # there is none
    keep_log(run.path, library.path)
    assert library.metrics() == steps and steps and not (run.path / METRICS).exists()
    file = library.path / METRICS
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        for spoiled in (
            content[:place],
            content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :],
        ):
            file.write_bytes(spoiled)
            assert "was edited, or damaged" in (log_problem(library.path) or ""), place
    assert damage_of(library.path).keys() == {METRICS}
    file.write_bytes(content.partition(b"\n")[2])  # as earlier versions wrote it
    assert damage_of(library.path) == {} and read_metrics(library.path) == steps


def test_changed_scores_are_noticed(library, tmp_path):
    score = SceneScore("a", 20.5, 0.5, None, None, None, None, None)
    scores = Evaluation("data", "held_out", 1, None, 0.5, [score], score)
    run = Run.open(shutil.copytree(KEPT / "run", tmp_path / "run"))
    for folder, found in (
        (library.path, lambda: [damage.what for damage in verify(library)]),
        (run.path, lambda: verify_run(run.path)),
    ):
        scores.save(folder / SCORES)
        assert Evaluation.read(folder / SCORES) == scores and found() == []
        (folder / SCORES).write_text((folder / SCORES).read_text().replace("20.5", "30.5", 1))
        (said,) = found()
        assert "its content has changed since it was written" in said and "latentscenes eval" in said
        with pytest.raises(UserError, match="evaluation.json.*has changed since"):
            Evaluation.read(folder / SCORES)
        (folder / SCORES).write_text(json.dumps(asdict(scores)))  # as earlier versions wrote them
        assert Evaluation.read(folder / SCORES) == scores and found() == []


def test_an_index_that_another_process_left_half_written_is_not_read(library, monkeypatch):
    """A killed process leaves a journal. In a folder that cannot be written, nobody can undo its changes."""
    script = "import os, sqlite3, sys; index = sqlite3.connect(sys.argv[1], isolation_level=None); "
    script += "index.execute('PRAGMA journal_mode = DELETE'); index.execute('PRAGMA cache_size = 1'); "
    script += "index.execute('BEGIN'); index.execute('UPDATE scenes SET tags = zeroblob(99999)'); os._exit(9)"
    names, file = library.index.names(), library.path / FILE
    library.close()
    assert subprocess.run([sys.executable, "-c", script, str(file)]).returncode == 9
    with monkeypatch.context() as fixed:
        fixed.setattr(os, "access", lambda *_: False)
        with pytest.raises(UserError, match="index.sqlite: cannot be read"):
            LibraryFolder.open(library.path).index.names()
    assert LibraryFolder.open(library.path).index.names() == names
