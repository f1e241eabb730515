"""Scenes learned by several processes: each once, bit by bit as one process learns it, whatever dies."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import HALF, TINY, photograph
from results import made_run
from waiting import wait_for

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, orbit
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.core.ranks import Rank, chosen_rank
from latentscenes.data.dataset import PosedImages
from latentscenes.data.writing import DatasetWriter
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.quantize import payload_checksum
from latentscenes.storage.verifying import verify
from latentscenes.training import groups
from latentscenes.training.batches import BatchSource
from latentscenes.training.exploit import exploit
from latentscenes.training.groups import GroupLearner
from latentscenes.training.sharing import claims as leases
from latentscenes.training.sharing import ranks as module
from latentscenes.training.sharing.claims import Claims, own_name
from latentscenes.training.sharing.plan import PLAN, Plan, shared_plan
from latentscenes.training.sharing.ranks import exploit_rank

CPU = torch.device("cpu")
COUNT = 6
OPTIONS = ExploitOptions(group=1, precision="float32", stage_one=False)
LEASE = 1.0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Returns a dataset of some new boxes, each with a color and a size of its own."""
    cameras, folder = orbit(4), tmp_path_factory.mktemp("data") / "boxes"
    with DatasetWriter(folder, size=(16, 16), alpha=True, origin="boxes") as writer:
        for number in range(COUNT):
            share = number / COUNT
            images, alpha = photograph("box", (0.2 + share / 5, 0.3, 0.2), (share, 0.5, 0.3), cameras, 16)
            writer.add(f"box {number}", images, cameras, "new", held_out=(1,), alpha=alpha)
        writer.finish(Box((0.0, 0.0, 0.0), (HALF, HALF, HALF)))
    return folder


@pytest.fixture(scope="module")
def boxes(path):
    return PosedImages.open(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, solids):
    config = config_io.parse(TINY, "tiny", ["exploit.0.hull=true"])
    return made_run(tmp_path_factory.mktemp("runs") / "run", config, solids, "train")


@pytest.fixture(scope="module")
def alone(run, boxes, tmp_path_factory):
    """Returns the scenes that one process learns."""
    out = tmp_path_factory.mktemp("libraries") / "alone"
    return content(exploit(out, boxes, run.config, run, OPTIONS, CPU).path)


def content(path):
    """Returns the checksum of the bytes of each scene."""
    library = LibraryFolder.open(path)
    assert verify(library) == []
    return {name: payload_checksum(library.payload(name)) for name in library.index.names()}


def learn(out, boxes, run, number, count, options=OPTIONS, **more):
    ranks = RankOptions(rank=str(number), world_size=count, lease=more.pop("lease", 30.0), **more)
    shared = chosen_rank(ranks), ranks
    return exploit_rank(out, boxes, run.config, run.path, options, CPU, shared)


def side_by_side(*calls):
    """Runs calls in threads and returns what they return or raise, in order."""
    found = [None] * len(calls)

    def keep(place, call):
        try:
            found[place] = call()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=keep, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_ranks_learn_what_one_process_learns(run, boxes, alone, tmp_path):
    out = tmp_path / "out"
    shares = side_by_side(*(lambda k=k: learn(out, boxes, run, k, 3) for k in range(3)))
    assert content(out) == alone
    assert sum(share.groups for share in shares) == COUNT
    assert sum(share.joined.added for share in shares if share.joined) == COUNT
    assert not (out / "parts").exists() and LibraryFolder.open(out).index.thumbnail("box 0")
    again = learn(out, boxes, run, 0, 3)
    assert again.groups == 0 and again.joined.added == 0 and content(out) == alone


def test_one_rank_learns_all_if_no_other_comes(run, boxes, alone, tmp_path):
    parts = tmp_path / "elsewhere"
    for name in ("0123456789ab", "theirs"):  # remains of a killed join, and another folder
        (parts / name / "claims").mkdir(parents=True)
    share = learn(tmp_path / "out", boxes, run, 2, 9, parts=parts)
    assert share.groups == COUNT and content(tmp_path / "out") == alone
    assert [entry.name for entry in parts.iterdir()] == ["theirs"]


module_join = module.join


class Crash(Exception):
    pass


def crash(*_, **__):
    raise Crash


@pytest.mark.parametrize("where", ["learning", "stored", "joined"])
def test_a_crash_costs_no_scene(run, boxes, alone, tmp_path, monkeypatch, where):
    out, learned = tmp_path / "out", []
    true_learn = GroupLearner.learn

    def counting(self, scenes, *rest, **more):
        if where == "learning" and len(learned) == 2:
            crash()
        learned.append(scenes[0].name)
        return true_learn(self, scenes, *rest, **more)

    with monkeypatch.context() as broken:
        broken.setattr(GroupLearner, "learn", counting)
        if where == "stored":
            broken.setattr(Claims, "finish", crash)
        if where == "joined":
            broken.setattr(module, "join", lambda *given: (module_join(*given), crash()))
        with pytest.raises(Crash):
            learn(out, boxes, run, 0, 2)
    indices = list(out.glob("parts/*/part-*/index.sqlite"))
    assert indices or where == "joined"
    for index in indices:  # a write-ahead log does not work in network file systems
        with closing(sqlite3.connect(index)) as opened:
            assert opened.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    if where == "joined":
        assert content(out) == alone and learn(out, boxes, run, 1, 2, lease=0.1).joined.added == 0
        return
    with monkeypatch.context() as watched:
        watched.setattr(
            GroupLearner,
            "learn",
            lambda self, scenes, *rest: learned.append(scenes[0].name) or true_learn(self, scenes, *rest),
        )
        assert learn(out, boxes, run, 0, 2).groups == COUNT - (2 if where == "learning" else 1)
    assert content(out) == alone and sorted(learned) == sorted(alone)  # none twice


SCRIPT = """
import sys
import time
from contextlib import closing
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentscenes.core.options import ExploitOptions
from latentscenes.core.ranks import chosen_rank
from latentscenes.core.options import RankOptions
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.sharing.ranks import exploit_rank
loop.SAVE_SECONDS = 0.0
save = Run.save
Run.save = lambda *given: (save(*given), time.sleep(float(sys.argv[5])))  # time to be killed in
run = Path(sys.argv[1])
ranks = RankOptions(rank=sys.argv[4], world_size=2, lease=1.0, patience=3.0)
options = ExploitOptions(group=1, precision="float32", stage_one=False)
images, config = PosedImages.open(sys.argv[2]), Run.open(run).config
shared = chosen_rank(ranks), ranks
share = exploit_rank(Path(sys.argv[3]), images, config, run, options, torch.device("cpu"), shared)
print(share.groups)
"""


def started(run, path, out, rank, pause):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-c", SCRIPT, *map(str, (run.path, path, out, rank, pause))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_killed_and_stopped_ranks(run, path, boxes, alone, tmp_path):
    out = tmp_path / "out"
    slow = started(run, path, out, 0, 0.4)
    try:
        # One is killed in the middle of its second group
        wait_for(lambda: list(out.glob("parts/*/claims/000000.done.*")), slow)
        wait_for(lambda: list(out.glob("parts/*/part-0000/work/*/checkpoints/[1-9]")), slow)
        slow.kill()
        slow.communicate()
        # Started again, it goes on at once, with the checkpoint; then it stops for longer than its lease
        slow = started(run, path, out, 0, 0.4)
        wait_for(lambda: list(out.glob("parts/*/claims/000001.done.part-0000")), slow)
        wait_for(lambda: list(out.glob("parts/*/claims/000002.1.claim")), slow)
        slow.send_signal(signal.SIGSTOP)
        share = learn(out, boxes, run, 1, 2, lease=LEASE)
        assert share.groups == COUNT - 2 and share.joined.added == COUNT
        slow.send_signal(signal.SIGCONT)
        told = slow.communicate(timeout=120)
        assert slow.returncode == 0, told
    finally:
        slow.kill()
    assert content(out) == alone and not (out / "parts").exists()


def test_a_rank_that_hangs_loses_its_group(run, path, boxes, alone, tmp_path):
    out = tmp_path / "out"
    hung = started(
        run, path, out, 0, 600
    )  # at its first checkpoint it hangs; its lease is renewed by a thread
    try:
        wait_for(lambda: list(out.glob("parts/*/part-0000/work/*/checkpoints/[1-9]")), hung)
        claim = next(out.glob("parts/*/claims/000000.1.claim"))
        before = claim.stat().st_mtime_ns
        wait_for(lambda: claim.stat().st_mtime_ns > before, hung)  # not hung yet, by its own clock
        share = learn(out, boxes, run, 1, 2, lease=LEASE)
        assert share.groups == share.joined.added == COUNT and hung.poll() is None
    finally:
        hung.kill()
    assert content(out) == alone


def test_all_long_parts_of_the_work_say_that_it_moves_on(run, boxes, tmp_path, monkeypatch):
    """So that a slow encoder, or scenes with many views, do not look like a process that hangs."""
    moves, true = [], {name: getattr(BatchSource, name) for name in ("_encoded", "batch")}
    for name, call in true.items():
        monkeypatch.setattr(
            BatchSource,
            name,
            lambda self, *given, name=name, call=call: moves.append(name) or call(self, *given),
        )
    true_diagnose = groups.diagnose
    monkeypatch.setattr(groups, "diagnose", lambda *given: moves.append("diagnose") or true_diagnose(*given))
    monkeypatch.setattr(Claims, "progress", lambda claims: moves.append("moved"))
    learn(tmp_path / "out", boxes, run, 0, 1, dataclasses.replace(OPTIONS, limit=1))
    assert {"_encoded", "batch", "diagnose"} < set(moves)
    for place, what in enumerate(moves):
        assert what == "moved" or "moved" in moves[place + 1 : place + 3], moves[place - 3 : place + 4]


def test_what_the_others_do_otherwise_is_refused(run, boxes, alone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(GroupLearner, "learn", crash)
        with pytest.raises(Crash):
            learn(out, boxes, run, 0, 2)
    with pytest.raises(UserError, match="plan.json: work with another options is not finished.*'group': 2"):
        learn(out, boxes, run, 1, 2, dataclasses.replace(OPTIONS, group=2))
    with pytest.raises(UserError, match="plan.json: work with another library is not finished"):
        learn(tmp_path / "else", boxes, run, 1, 2, parts=out / "parts")
    with pytest.raises(UserError, match="plan.json: several processes share .* Go on with their command"):
        exploit(out, boxes, run.config, None, OPTIONS, CPU)
    with pytest.raises(UserError, match="--workers 2: a rank is one process"):
        learn(out, boxes, run, 1, 2, ExploitOptions(workers=2))
    with pytest.raises(UserError, match="--track wandb: not with --rank"):
        learn(out, boxes, run, 1, 2, ExploitOptions(track="wandb"))
    assert learn(out, boxes, run, 1, 2, lease=0.1).groups == COUNT and content(out) == alone


def test_a_group_that_ends_all_processes_is_given_up(run, boxes, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_CLAIMS", 2)
    out, true_learn = tmp_path / "out", GroupLearner.learn

    def poisoned(self, scenes, *rest):
        if scenes[0].name == "box 3":
            crash()
        return true_learn(self, scenes, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(GroupLearner, "learn", poisoned)
        for _ in range(2):
            with pytest.raises(Crash):
                learn(out, boxes, run, 0, 1, lease=0.1)
        with pytest.raises(UserError, match="1 groups ended every process .* the first holds box 3.*000003"):
            learn(out, boxes, run, 0, 1, lease=0.1)
    for file in out.glob("parts/*/claims/000003.*"):
        file.unlink()
    assert learn(out, boxes, run, 0, 1).joined.added == COUNT and content(out) == alone


# Claims


def test_of_all_that_claim_one_succeeds(tmp_path):
    many = [Claims(tmp_path, f"owner {k}", 9.0) for k in range(8)]
    for item in "abc":
        assert side_by_side(*(lambda one=one, item=item: one.take(item) for one in many)).count(True) == 1
    assert many[0].state().newest == {"a": 1, "b": 1, "c": 1}
    many[3].finish("b")
    many[1].finish("b")  # two have learned it; all readers agree on one
    assert many[0].state().done == {"b": "owner 1"}


def test_claims_of_work_that_does_not_move_on_lapse(tmp_path, clock):
    ours, theirs = Claims(tmp_path, "we", 4.0), Claims(tmp_path, "they", 4.0, patience=8.0)
    assert theirs.take("a")

    def lasts(seconds: float) -> bool:
        time.sleep(0.01)  # so that a renewed claim has another time
        clock.now += seconds
        theirs.renew()
        return not ours.take_over("a", 1)

    for _ in range(4):
        theirs.progress()
        assert lasts(3.9)
    assert lasts(3.9)  # renewed for the last time, 7.8 s after the last progress
    assert lasts(3.9) and not lasts(0.2)


def test_a_folder_that_others_remove_gets_a_new_plan(tmp_path, monkeypatch):
    """They join the last scenes and remove the folder just when this process has found no plan in it."""
    state, parts, calls = Claims.state, tmp_path / "parts", []

    def removed_once(claims):
        calls.append(1)
        if len(calls) == 1:
            parts.rmdir()
        return state(claims)

    monkeypatch.setattr(Claims, "state", removed_once)
    plan = Plan("0" * 12, "library", "dataset", "", {}, None, "int8", 1, [])
    assert shared_plan(parts, 5.0, lambda: plan) == plan and len(calls) == 2

    def refused():
        raise UserError("no such dataset")

    (parts / PLAN).unlink()
    with pytest.raises(UserError, match="no such dataset"):
        shared_plan(parts, 5.0, refused)


def test_names_of_parts(tmp_path, monkeypatch):
    with own_name(tmp_path, "part") as first, own_name(tmp_path, "part") as second:
        assert (first, second) == ("part", "part-2")
    with pytest.raises(Crash), own_name(tmp_path, "part") as name:
        assert name == "part"
        crash()
    (tmp_path / "part").write_text(leases.this_boot())  # as a killed process of this machine leaves it
    with own_name(tmp_path, "part") as name:
        assert name == "part"
    (tmp_path / "part").write_text("another machine")
    with own_name(tmp_path, "part") as name:
        assert name == "part-2"


# Who is who


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "10"}, (4, 10)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
          "SLURM_ARRAY_TASK_STEP": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 3)),
        ({"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10",
          "SLURM_ARRAY_TASK_STEP": "10", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (7, 12)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"JOB_COMPLETION_INDEX": "5"}, (5, 6)),
    ],
)  # fmt: skip
def test_ranks_that_schedulers_tell(environment, expected):
    rank = chosen_rank(RankOptions(rank="auto", world_size=6), environment)
    assert (rank.number, rank.count) == expected
    assert all(
        name in environment or name == "--world-size"
        for name in rank.source.replace(",", " and").split(" and ")
        if name.strip()
    )


def test_ranks_that_cannot_be():
    def refused(message, environment=(), **options):
        with pytest.raises(UserError, match=message):
            chosen_rank(RankOptions(**options), dict(environment))

    refused("--rank 3: also give --world-size", rank="3")
    refused("rank 3 of 3. Ranks count from 0", rank="3", world_size=3)
    refused("--rank two: no whole number", rank="two", world_size=3)
    refused("none of RANK and WORLD_SIZE", rank="auto")
    refused("JOB_COMPLETION_INDEX is set, but .* --world-size", {"JOB_COMPLETION_INDEX": "1"}, rank="auto")
    refused("RANK x: no whole number", {"RANK": "x", "WORLD_SIZE": "1"}, rank="auto")
    refused("--parts: only for work that several", parts=Path("somewhere"))
    refused("--world-size: only for work that several", world_size=2)
    refused("--lease 0: must be more", rank="0", world_size=1, lease=0.0)
    refused("--patience -1: must be more", rank="0", world_size=1, patience=-1.0)
    assert Rank(0, 1, "x").count == 1
