"""Libraries joined into one: every scene once and bit by bit, clashes refused, kills without a trace."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import TINY
from results import made_run

from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.model.planes import random_parameters
from latentscenes.storage import joining, maintenance
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import Index
from latentscenes.storage.joining import JoinResult, empty_copy, join
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.maintenance import compact
from latentscenes.storage.quantize import (
    pack,
    payload_bytes,
    payload_checksum,
    stack_payloads,
    unstack_payloads,
)
from latentscenes.storage.shards import Shards
from latentscenes.storage.verifying import verify
from latentscenes.training.append import library_from_run

PLANES = config_io.parse(TINY, "tiny").planes


@pytest.fixture(scope="module")
def whole(tmp_path_factory, solids):
    """Returns a library with the scenes of stage 1."""
    config = config_io.parse(TINY, "tiny")
    run = made_run(tmp_path_factory.mktemp("runs") / "run", config, solids, "train")
    path = tmp_path_factory.mktemp("libraries") / "whole"
    return library_from_run(path, run, solids, config, "int8", True, "cpu")


def scene(name, seed, precision="int8", dataset="/data", source=None):
    rows = random_parameters(1, PLANES, torch.Generator().manual_seed(seed))
    payload = pack(rows, precision)
    info = SceneInfo(
        name, precision, payload_bytes(payload), "exploit", dataset, "new", source or name,
        "2026-01-01T00:00:00+00:00", 2.0, 1.5, 30.0 + seed, 0.01, tags={"seed": seed},
    )  # fmt: skip
    return NewScene(info, payload, f"picture of {name}".encode())


@pytest.fixture
def part(whole, tmp_path):
    """Returns a function that makes a part of groups of scenes."""

    def made(name, *groups):
        library = empty_copy(whole.path, tmp_path / name, "DELETE")
        for group in groups:
            library.append(group)
        library.close()
        return library.path

    return made


def content(path, sound=True):
    """Returns all that a library holds of each scene, which must be sound, or have shards of no scene."""
    library = LibraryFolder.open(path)
    found = {
        info.name: (
            info,
            library.index.place(info.name).checksum,
            payload_checksum(library.payload(info.name)),
            library.index.thumbnail(info.name),
        )
        for info in library.index.infos()
    }
    assert verify(library) == [] or not sound
    return found


def test_parts_become_one_library(part, tmp_path):
    a, b = [scene("a", 1)], [scene("b", 2, "float32"), scene("c", 3)]
    first, second = part("first", a, b), part("second", [scene("d", 4)], [scene("c", 3)])
    out = tmp_path / "out"
    assert join(out, [first, second]) == JoinResult(added=4, known=1)
    assert content(out) == content(second) | content(first)
    library = LibraryFolder.open(out)
    assert library.index.names() == ["a", "b", "c", "d"]
    # Shards were merged as far as their scenes are stored alike
    assert [written for written, _ in library.index.shards().values()] == [1, 1, 1, 1]
    assert join(out, [second, first, first]) == JoinResult(added=0, known=5)
    with closing(sqlite3.connect(out / "index.sqlite")) as index:  # readers need not wait for writers
        assert index.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert join(out, [part("third", [scene("e", 5)])]) == JoinResult(added=1, known=0)
    assert len(content(out)) == 5


def test_small_shards_are_merged_and_big_ones_cut(part, tmp_path, monkeypatch):
    groups = [[scene(f"s{k}", k), scene(f"t{k}", 50 + k)] for k in range(6)]
    many = part("many", *groups)
    assert join(tmp_path / "out", [many]).added == 12
    assert list(LibraryFolder.open(tmp_path / "out").index.shards().values()) == [(12, 12)]
    assert content(tmp_path / "out") == content(many)
    monkeypatch.setattr(joining, "MOST_SCENES", 5)
    join(tmp_path / "cut", [many])
    assert [size for size, _ in LibraryFolder.open(tmp_path / "cut").index.shards().values()] == [5, 5, 2]
    assert content(tmp_path / "cut") == content(many)


def test_two_different_scenes_of_one_name_are_refused(part, tmp_path):
    first, other = part("first", [scene("a", 1), scene("b", 2)]), part("other", [scene("b", 3)])
    with pytest.raises(UserError, match="other: the scene 'b' is another one than that of .*first"):
        join(tmp_path / "out", [first, other])
    assert not (tmp_path / "out").exists()
    join(tmp_path / "out", [first])
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="'b' is another one than that of .*out. Rename or remove one"):
        join(tmp_path / "out", [part("more", [scene("c", 4)]), other])
    assert content(tmp_path / "out") == before
    assert join(tmp_path / "out", [other], {other: []}) == JoinResult(0, 0)


def test_a_scene_that_was_renamed_is_taken_once(part, tmp_path):
    first = part("first", [scene("a", 1)])
    join(tmp_path / "out", [first])
    LibraryFolder.open(tmp_path / "out").rename("a", "my a")
    assert join(tmp_path / "out", [first]) == JoinResult(added=0, known=1)
    made = part("made", [scene("x", 7, dataset=None)])  # of no dataset, so its name alone tells it
    join(tmp_path / "out", [made])
    LibraryFolder.open(tmp_path / "out").rename("x", "my x")
    assert join(tmp_path / "out", [made]) == JoinResult(added=1, known=0)


def test_removed_and_moved_scenes_of_a_part(part, tmp_path):
    path = part("first", [scene("a", 1), scene("b", 2), scene("c", 3)], [scene("d", 4)])
    library = LibraryFolder.open(path)
    library.remove(["b"])
    library.rename("c", "see")
    assert join(tmp_path / "out", [path]).added == 3
    assert content(tmp_path / "out").keys() == {"a", "see", "d"}
    compact(library)
    assert join(tmp_path / "out", [path]) == JoinResult(added=0, known=3)


def test_compact_writes_only_where_something_is_gained(part, monkeypatch):
    monkeypatch.setattr(maintenance, "MOST_SCENES", 4)
    kinds = ["int8", "float32"] * 2
    path = part(
        "many",
        [scene(f"full {k}", k) for k in range(4)],
        *([scene(f"small {k}", 10 + k, kind)] for k, kind in enumerate(kinds)),
    )
    before, library = content(path), LibraryFolder.open(path)
    compact(library)
    assert content(path) == before
    assert library.index.shards() == {1: (4, 4), 6: (2, 2), 7: (2, 2)}  # full, float32, int8
    files = {file: file.stat().st_ino for file in (path / "shards").iterdir()}
    with monkeypatch.context() as refusing:
        refusing.setattr(maintenance, "_rewrite", None)
        assert compact(library) == 0
    assert {file: file.stat().st_ino for file in (path / "shards").iterdir()} == files
    library.remove(["full 2"])
    assert compact(library) > 0
    # One of the kind int8 is rewritten anyway, so the small one of this kind is merged with it
    assert sorted(library.index.shards().values()) == [(1, 1), (2, 2), (4, 4)]
    assert content(path) == {name: entry for name, entry in before.items() if name != "full 2"}


def test_a_killed_join_goes_on(part, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash(*_):
        raise Crash

    first = part("first", [scene("a", 1), scene("b", 2)])
    second = part("second", [scene("c", 3, "int4"), scene("d", 4)])
    whole, out = tmp_path / "whole", tmp_path / "out"
    join(whole, [first, second])
    for step in (0, 1):
        for owner, name in ((Shards, "write"), (Index, "add")):  # a shard is not written, or not listed
            with monkeypatch.context() as broken:
                calls, call = [], getattr(owner, name)

                def fragile(self, *rest, step=step, calls=calls, call=call):
                    calls.append(1)
                    return crash() if len(calls) == step + 1 else call(self, *rest)

                broken.setattr(owner, name, fragile)
                joined = out.with_name(f"out {step} {name}")
                with pytest.raises(Crash):
                    join(joined, [first, second])
            assert join(joined, [first, second]).added == 4 - 2 * step
            assert content(joined, sound=name == "write") == content(whole)
            compact(LibraryFolder.open(joined))
            assert content(joined) == content(whole)


def test_an_error_in_a_part_keeps_what_was_read_before(part, tmp_path):
    first, second = part("first", [scene("a", 1)], [scene("b", 2)]), part("second", [scene("c", 3)])
    (second / "shards" / "000001.safetensors").unlink()
    with pytest.raises(UserError, match="second: .*000001.safetensors: absent"):
        join(tmp_path / "out", [first, second])
    assert content(tmp_path / "out") == content(first)


def test_what_cannot_be_joined_is_refused(part, whole, tmp_path, solids):
    first = part("first", [scene("a", 1)], [scene("b", 2)])
    with pytest.raises(UserError, match="no parts named"):
        join(tmp_path / "out", [])
    with pytest.raises(UserError, match="named as a part of itself"):
        join(first, [first])
    with pytest.raises(UserError, match="no library here"):
        join(tmp_path / "out", [first, tmp_path / "nothing"])
    config = config_io.parse(TINY, "tiny", ["seed=6"])
    run = made_run(tmp_path / "run", config, solids, "train")  # with other random weights
    other = library_from_run(tmp_path / "other", run, solids, config, "int8", True, "cpu")
    with pytest.raises(UserError, match="other: a library of another model than .*first"):
        join(tmp_path / "out", [first, other.path])
    shard = sorted((first / "shards").iterdir())[1]
    whole_bytes = bytearray(shard.read_bytes())
    whole_bytes[-3] ^= 1
    shard.write_bytes(whole_bytes)
    with pytest.raises(UserError, match="scene 'b' is damaged.*000002.safetensors"):
        join(tmp_path / "out", [first])
    shard.unlink()
    with pytest.raises(UserError, match="000002.safetensors: absent.*join again"):
        join(tmp_path / "out", [first])


def test_payloads_are_unstacked():
    payloads = [
        pack(random_parameters(1, PLANES, torch.Generator().manual_seed(k)), "int6") for k in range(3)
    ]
    tensors = {name: torch.cat(pieces) for name, pieces in stack_payloads(payloads).items()}
    assert [payload_checksum(one) for one in unstack_payloads(tensors)] == list(
        map(payload_checksum, payloads)
    )
    with pytest.raises(ValueError, match="different numbers of scenes"):
        unstack_payloads(tensors | {"weights": tensors["weights"][:2]})
    ends = tensors["micro.differences.stream.ends"]
    for wrong in (ends + 1, ends.flip(0), ends - ends[0] - 1):
        with pytest.raises(ValueError, match="does not end where"):
            unstack_payloads(tensors | {"micro.differences.stream.ends": wrong})


@pytest.mark.parametrize("address", ["s3://bucket/all", "gs://bucket/all", "https://example.org/all"])
def test_addresses_are_no_folders_for_new_libraries(whole, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{address}: libraries are written to folders"):
        join(Path(address), [whole.path])
    assert not list(tmp_path.iterdir())


def test_a_library_that_another_join_makes_meanwhile_keeps_its_scenes(part, tmp_path, monkeypatch):
    first, second, out = part("a", [scene("x", 1)]), part("b", [scene("y", 2)]), tmp_path / "out"
    real = joining.locked

    def later(path, wait, holder):  # the other process held the lock, and has finished
        monkeypatch.setattr(joining, "locked", real)
        assert join(out, [first]).added == 1
        return real(path, wait, holder)

    monkeypatch.setattr(joining, "locked", later)
    assert join(out, [second]).added == 1
    joined = LibraryFolder.open(out)
    assert joined.index.names() == ["x", "y"] and verify(joined) == []
