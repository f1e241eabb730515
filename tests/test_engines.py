"""Ranks that SLURM's submitit and Ray start: every scene once and bit by bit, whatever dies."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_ranks import COUNT, OPTIONS, alone, boxes, content, path, run  # noqa: F401

from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.ranks import RankOptions
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.engines import slurm
from latentscenes.training.ranks import RankCall


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


def wait_for(holds):
    deadline = time.monotonic() + 400  # a busy machine starts processes slowly
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    slurm.wait([first, second])
    assert content(call.out) == alone and not (call.out / "parts").exists()
    told = first.stdout() + first.stderr()
    assert "this job is preempted" in told


def test_jobs_in_this_process(call, alone):  # noqa: F811
    pytest.importorskip("submitit", reason="submitit is absent")
    slurm.wait(slurm.submit(RankCall(**vars(call)), 2, "debug", {}))
    assert content(call.out) == alone


class HungCall(RankCall):
    """A rank whose first process hangs for ever."""

    def __call__(self):
        if self.ranks.rank == "0":
            time.sleep(3600)
        return super().__call__()


def test_a_job_that_hangs_is_stopped_when_the_others_are_done(call, alone, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("submitit", reason="submitit is absent")
    monkeypatch.setattr(slurm, "GRACE", 0.5)
    jobs = slurm.submit(HungCall(**vars(call)), 2, "local", {})
    slurm.wait(jobs)
    assert content(call.out) == alone and "1 of 2 processes hung and were stopped" in capsys.readouterr().err
    wait_for(lambda: jobs[0]._process.poll() is not None)


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

    from latentscenes.training.engines import ray as engine

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
