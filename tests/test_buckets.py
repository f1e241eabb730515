"""Ranks that share only a bucket: claims on condition, parts as objects, joined from there."""

import time
from pathlib import Path

import pytest
from bucket_server import serving_bucket
from test_ranks import COUNT, CPU, OPTIONS, Crash, alone, boxes, content, path, run, side_by_side  # noqa: F401
from waiting import wait_for

from latentscenes.cli.machines import library_join
from latentscenes.core.errors import UserError
from latentscenes.core.options import RankOptions
from latentscenes.core.ranks import chosen_rank
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published.targets import BucketTarget, object_store, open_target
from latentscenes.training.sharing import bucket as module
from latentscenes.training.sharing import ranks as ranks_module
from latentscenes.training.sharing.boards import BucketBoard, FolderBoard
from latentscenes.training.sharing.bucket import exploit_in_bucket, fetched_parts
from latentscenes.training.sharing.claims import Claims

ADDRESS = "s3://bucket/boxes"


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed")
    with serving_bucket(monkeypatch) as found:
        yield found


@pytest.fixture(params=["folder", "memory", "server"])
def boards(request, tmp_path):
    """Returns what makes boards of one place."""
    if request.param == "folder":
        return lambda: FolderBoard(tmp_path)
    pytest.importorskip("obstore", reason="obstore is not installed")
    if request.param == "memory":
        from obstore.store import MemoryStore

        store = MemoryStore()
        return lambda: BucketBoard(ADDRESS, store, "claims")
    request.getfixturevalue("server")
    return lambda: BucketBoard(ADDRESS, object_store(ADDRESS), "claims")


def test_of_all_that_create_one_succeeds(boards):
    many = [boards() for _ in range(8)]
    for name in "abc":
        made = side_by_side(*(lambda one=one, name=name: one.create(name, f"by {id(one)}") for one in many))
        assert made.count(True) == 1 and many[0].read(name)[0] == f"by {id(many[made.index(True)])}"
    assert sorted(many[1].names()) == ["a", "b", "c"] and many[1].read("d") is None
    before = many[1].read("a")
    owner = next(one for one in many if before[0] == f"by {id(one)}")
    time.sleep(0.01)
    owner.renew("a")
    assert many[1].read("a")[0] == before[0] and many[1].read("a")[1] != before[1]
    owner.remove("a")
    owner.renew("a")  # gone: nothing comes back
    assert many[1].read("a") is None and sorted(many[2].names()) == ["b", "c"]


def test_claims_lapse_unless_they_are_renewed(boards, clock):
    ours, theirs = Claims(boards(), "we", 4.0), Claims(boards(), "they", 4.0)
    assert theirs.take("a") and not ours.take("a")
    for _ in range(4):
        clock.now += 3.9
        theirs.renew()
        assert not ours.take_over("a", 1)  # has seen another version
        time.sleep(0.01)  # so that the next has another time
    clock.now += 3.9
    assert not ours.take_over("a", 1)
    clock.now += 0.2
    assert ours.take_over("a", 1) and ours.state().newest == {"a": 2}
    assert not theirs.take_over("a", 1) and not theirs.take_over("a", 2)
    again = Claims(boards(), "we", 4.0)  # the same owner, started again
    assert again.take_over("a", 2) and not ours.take_over("a", 2) and not again.take_over("a", 3)
    ours.finish("a")
    ours.forget("a")
    assert theirs.state().done == {"a": "we"} and theirs.state().newest == {}


def test_claims_are_renewed_as_long_as_their_holder_works(boards):
    theirs, reader, seen = Claims(boards(), "they", 0.4), boards(), set()
    assert theirs.take("a")

    def seen_versions(count: int) -> bool:
        seen.add(reader.read("a.1.claim")[1])
        return len(seen) >= count

    with theirs.renewing():
        wait_for(lambda: seen_versions(4))
    assert seen_versions(4)
    last = reader.read("a.1.claim")
    time.sleep(0.3)
    assert reader.read("a.1.claim") == last


def test_a_write_that_the_store_repeats_is_still_ours(server, monkeypatch):
    """Its first answer was lost, so obstore writes again and hears that the file is there."""
    import obstore

    board, put = BucketBoard(ADDRESS, object_store(ADDRESS), "claims"), obstore.put
    with monkeypatch.context() as twice:
        twice.setattr(obstore, "put", lambda *given, **more: (put(*given, **more), put(*given, **more))[1])
        assert board.create("a", "we")
        board.renew("a")
    assert len(server.refused) == 2
    before = board.read("a")
    board.renew("a")
    assert board.read("a")[1] != before[1] and not board.create("a", "they")


def learn(bucket, boxes, run, number, folder, lease=30.0, options=OPTIONS):  # noqa: F811
    ranks = RankOptions(rank=str(number), world_size=2, lease=lease, parts=folder)
    shared = chosen_rank(ranks), ranks
    return exploit_in_bucket(bucket, boxes, run.config, run.path, options, CPU, shared)


def test_two_machines_that_share_only_a_bucket(server, run, boxes, alone, tmp_path, capsys):  # noqa: F811
    shares = side_by_side(
        *(lambda k=k: learn(open_target(ADDRESS), boxes, run, k, tmp_path / f"machine {k}") for k in (0, 1))
    )
    assert sum(share.groups for share in shares) == COUNT, shares
    library_join(tmp_path / "joined", (Path(ADDRESS),))
    assert content(tmp_path / "joined") == alone and f"{COUNT} scenes of " in capsys.readouterr().err
    assert LibraryFolder.open(tmp_path / "joined").index.without_thumbnail() == []
    assert [entry.name for entry in tmp_path.iterdir() if "fetched" in entry.name] == []
    assert learn(open_target(ADDRESS), boxes, run, 0, tmp_path / "machine 2").groups == 0
    library_join(tmp_path / "joined", (Path(ADDRESS),))
    assert content(tmp_path / "joined") == alone
    with pytest.raises(UserError, match="s3://bucket/boxes/plan.json: work with another options"):
        learn(open_target(ADDRESS), boxes, run, 0, tmp_path / "one", options=ranks_options(group=2))


def ranks_options(**changes):
    import dataclasses

    return dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_machine_that_dies_costs_no_scene(run, boxes, alone, tmp_path, monkeypatch, where):  # noqa: F811
    store = pytest.importorskip("obstore", reason="obstore is not installed").store.MemoryStore()
    bucket, put, count = BucketTarget(ADDRESS, store), module._put, []

    def dying(*given):
        count.append(1)
        if len(count) == 3:
            if where == "after":
                put(*given)
            raise Crash
        put(*given)

    with monkeypatch.context() as broken:
        broken.setattr(module, "_put", dying)
        with pytest.raises(Crash):
            learn(bucket, boxes, run, 0, tmp_path / "gone")
    only, missing = fetched_parts(bucket, tmp_path / "early")
    assert missing == COUNT - 2 and sum(map(len, only.values())) == 2
    if where == "before":  # another machine learns the rest, after a lease
        assert learn(bucket, boxes, run, 1, tmp_path / "other", lease=0.2).groups == COUNT - 2
    else:  # the same machine goes on at once: its third group is stored and only noted
        assert learn(bucket, boxes, run, 0, tmp_path / "gone").groups == COUNT - 3
    only, missing = fetched_parts(bucket, tmp_path / "early")
    ranks_module.join(tmp_path / "joined", sorted(only), only)
    assert missing == 0 and content(tmp_path / "joined") == alone


def test_what_is_damaged_or_absent_in_a_bucket_is_told(run, boxes, tmp_path):  # noqa: F811
    store = pytest.importorskip("obstore", reason="obstore is not installed").store.MemoryStore()
    bucket = BucketTarget(ADDRESS, store)
    with pytest.raises(UserError, match="s3://bucket/boxes: no processes have learned here"):
        fetched_parts(bucket, tmp_path / "none")
    learn(bucket, boxes, run, 0, tmp_path / "machine", options=ranks_options(limit=1))
    names = [entry["path"] for batch in __import__("obstore").list(store) for entry in batch]
    shard, pictures = (next(n for n in names if n.endswith(e)) for e in (".safetensors", ".pictures"))
    shard = next(name for name in names if "/parts/" in name and name.endswith(".safetensors"))
    good = bucket.read(pictures), bucket.read(shard)
    bucket.write(pictures, b"no pictures")
    with pytest.raises(UserError, match="its thumbnails are damaged"):
        fetched_parts(bucket, tmp_path / "one")
    bucket.write(pictures, good[0])
    bucket.write(shard, good[1][:-4] + b"\xff\xff\xff\x00")
    with pytest.raises(UserError, match=r"parts/part-0000-\w{6}/000001.safetensors: damaged"):
        fetched_parts(bucket, tmp_path / "two")
    bucket.remove(shard)
    bucket.write(shard, good[1])
    assert fetched_parts(bucket, tmp_path / "two")[1] == 0
    with pytest.raises(UserError, match="--workers 2: a rank is one process"):
        learn(bucket, boxes, run, 0, tmp_path / "machine", options=ranks_options(workers=2))
