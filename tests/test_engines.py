"""Ranks that this machine, submitit and Ray start: every scene once and bit by bit, whatever dies."""

import dataclasses
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_ranks import COUNT, CPU, OPTIONS, alone, boxes, content, path, run  # noqa: F401
from waiting import wait_for

from latentscenes.cli.machines import as_workers
from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.exploit import exploit
from latentscenes.training.sharing import local, ranks, slurm
from latentscenes.training.sharing.ranks import RankCall


class SlowCall(RankCall):
    """A rank that pauses at each checkpoint, and makes many: time to be killed in."""

    def __call__(self):
        save, loop.SAVE_SECONDS = Run.save, 0.0
        if not hasattr(Run, "is_slow"):
            Run.is_slow = True
            Run.save = lambda *given: (save(*given), time.sleep(0.2))
        return super().__call__()


@pytest.fixture
def call(run, path, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    settings, ranks = config_io.dump(run.config), RankOptions(rank="0", world_size=1, lease=2.0)
    return SlowCall(tmp_path / "out", path, settings, run.path, OPTIONS, ranks, 1, "cpu")


def send(job, number):
    """Sends a signal to the process of a job, not to the one that watches over it."""
    watcher = job._process.pid
    for child in Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split():
        os.kill(int(child), number)


def test_jobs_that_are_preempted_and_killed(call, alone):  # noqa: F811
    pytest.importorskip("submitit", reason="submitit is absent")
    first, second = slurm.submit(call, 2, "local", {"timeout_min": 60})
    claims = "parts/*/claims/*"
    wait_for(lambda: list(call.out.glob(f"{claims}.done.part-0000")))
    send(first, signal.SIGUSR2)  # queued again, it goes on
    wait_for(lambda: list(call.out.glob(f"{claims}.done.part-0001")))
    send(second, signal.SIGKILL)
    first.wait()
    second.wait()
    assert first.result() <= COUNT and second.exception()
    assert content(call.out) == alone and not (call.out / "parts").exists()
    told = first.stdout() + first.stderr()
    assert "this job is preempted" in told


def test_jobs_in_this_process(call, alone):  # noqa: F811
    pytest.importorskip("submitit", reason="submitit is absent")
    assert [job.result() for job in slurm.submit(RankCall(**vars(call)), 2, "debug", {})] == [COUNT, 0]
    assert content(call.out) == alone


def struck(strike, plan, folder, rank, device, pipe):
    """Runs in a process of exploit: learns, but calls `strike` at the second checkpoint of box 3."""
    saves, save, loop.SAVE_SECONDS, ranks.MOST_CLAIMS = [], Run.save, 0.0, 2
    local.SIGNS = 0.0

    def watched(work, *given):
        save(work, *given)
        saves.append(work.info.scenes)
        if saves.count(["box 3"]) == 2:
            strike(folder.parent / "struck")

    Run.save = watched
    learn_here(plan, folder, rank, device, pipe)


def die_once(file):
    if not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang_once(file):
    if not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGSTOP)


learn_here = local._learn


@pytest.mark.parametrize(
    ("strike", "patience", "told"),
    [(die_once, 600.0, "exit code -9"), (hang_once, 15.0, "has not moved for 15 s")],
)
def test_a_process_that_ends_or_hangs_starts_again(
    strike, patience, told, run, boxes, alone, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    """Here a group is given up after two turns, so it must be the same process that goes on with it."""
    monkeypatch.setattr(local, "_learn", partial(struck, strike))
    monkeypatch.setattr(local, "PATIENCE", patience)
    options, threads = dataclasses.replace(OPTIONS, workers=2), torch.get_num_threads()
    library = exploit(tmp_path / "out", boxes, run.config, run, options, CPU)
    assert content(library.path) == alone and torch.get_num_threads() == threads
    said = " ".join(capsys.readouterr().err.split())
    assert told in said and "It starts again" in said and f"{COUNT} of {COUNT}: " in said
    assert {file.name for file in (tmp_path / "out" / "work").iterdir()} == {"lock", "struck"}


def test_a_group_that_ends_every_process_of_a_machine(
    run, boxes, alone, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(local, "_learn", partial(struck, die))
    out, options = tmp_path / "out", dataclasses.replace(OPTIONS, workers=2)
    with pytest.raises(
        UserError, match="1 groups ended every process .* 2 each.* holds box 3.* To try again, run the"
    ):
        exploit(out, boxes, run.config, run, options, CPU)
    assert content(out) == {name: one for name, one in alone.items() if name != "box 3"}
    assert "Process" in capsys.readouterr().err
    exploit(out, boxes, run.config, run, OPTIONS, CPU)
    assert content(out) == alone and not list((out / "work").glob("*/"))


def test_what_submitit_refuses(call):
    pytest.importorskip("submitit", reason="submitit is absent")
    with pytest.raises(UserError, match="--engine local: Unknown .*color.* Correct --engine-options"):
        slurm.submit(call, 2, "local", {"local_color": "red"})
    with pytest.raises(UserError, match="--engine slurm: Could not detect .*srun.* where SLURM is"):
        slurm.submit(call, 2, "slurm", {})


def test_engines_that_cannot_be():
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            RankOptions(**options)

    refused("--engine slurm: also give --world-size", engine="slurm")
    refused("--rank 0: --engine ray numbers its processes itself", engine="ray", rank="0")
    refused("--address: only for --engine ray, not slurm", engine="slurm", world_size=2, address="auto")
    refused("--engine-options: only for processes that an engine starts", engine_options=("a=1",))
    refused("--engine-options num_cpus: must be KEY=VALUE", engine="ray", engine_options=("num_cpus",))
    refused("--world-size 0: must be at least 1", engine="ray", world_size=0)
    refused("--lease 5.0: not with --engine local", engine="local", world_size=2, lease=5.0)
    refused(
        "--engine-options: not with --engine local", engine="local", world_size=2, engine_options=("a=1",)
    )
    assert as_workers(ExploitOptions(workers=0), RankOptions(engine="local", world_size=3)).workers == 3
    with pytest.raises(UserError, match="--workers 2: --world-size 3 says so already"):
        as_workers(ExploitOptions(workers=2), RankOptions(engine="local", world_size=3))
    options = RankOptions(engine="ray", engine_options=("num_cpus=0.5", "partition=gpu"))
    assert options.parsed_options() == {"num_cpus": 0.5, "partition": "gpu"}


def learners():
    """Returns the processes of Ray's actors that learn."""
    import psutil  # comes with Ray

    return [
        one
        for one in psutil.process_iter(["cmdline"])
        if "ray::Learner" in " ".join(one.info["cmdline"] or ())
    ]


RAY = 'Ray is absent: `pip install "latentscenes[ray]"` lets this test run, as .ci/run does'


def test_actors_and_nodes_of_ray_that_die(call, alone, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray", reason=RAY)
    from ray.cluster_utils import Cluster

    from latentscenes.training.sharing import ray as engine

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster, learned = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), []
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    learning = threading.Thread(target=lambda: learned.append(engine.learn(call, None, None, {})))
    try:
        learning.start()
        wait_for(lambda: list(call.out.glob("parts/*/claims/*.done.*")))
        learners()[0].kill()  # the process of an actor
        wait_for(lambda: len(list(call.out.glob("parts/*/claims/*.done.*"))) > 1)
        cluster.remove_node(nodes[1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        learning.join(400)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert learned == [2] and content(call.out) == alone and len(alone) == COUNT
