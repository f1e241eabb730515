"""Stage 1 by several processes: they learn what one process learns, and go on after any of them ends."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import wait_for_checkpoint

from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.storage.run import Run
from latentscenes.training.batches import BatchSource, TrainingScenes
from latentscenes.training.distributed import Team, refuse_alone
from latentscenes.training.loop import StageLearner, train

CPU = torch.device("cpu")


def gradients(config, stage, images, step, team, monkeypatch):
    """Returns the gradients of shared parts and scenes at a step from random parameters, of what one process
    of a team sees, and its terms times its share."""
    scenes = images.select("train")
    model = Model(config, images.box)
    rows = random_parameters(len(scenes), config.planes, torch.Generator().manual_seed(3))
    rows = rows.rows(team.owned(len(scenes)))
    source = BatchSource(model, TrainingScenes(rows, images, scenes, team), stage, config.seed, Path())
    batch, found = source.batch(step), {}
    learner = StageLearner(model, rows, stage, team=team)

    def keep_rows(index, leaves, factor, *_):
        for name, table in leaves.tables().items():
            for row, gradient in zip(index.tolist(), () if table.grad is None else table.grad, strict=False):
                found[f"{name} {team.number + row * team.count}"] = gradient.clone()

    def keep_shared(factor):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                found[name] = parameter.grad.clone()

    monkeypatch.setattr(learner.own, "step", keep_rows)
    monkeypatch.setattr(learner, "_step_shared", keep_shared)
    terms, _ = learner.step(batch, 1.0, source.numbers("step", step))
    share = batch.share if batch else 0.0
    return found, {name: share * value.item() for name, value in terms.items()}


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_shares_of_a_batch_sum_to_the_batch(solids, tiny, monkeypatch, stage, crop):
    chosen = tiny.train[stage]
    if chosen.name == "scenes":
        rays = {"crop": 3} if crop else {"rays": 5}
        chosen = dataclasses.replace(chosen, scenes=3, focus=0.5, hull=True, **rays)
    elif crop:
        chosen = dataclasses.replace(chosen, scenes=3)
    most = 1e-5
    apart = 0
    for step in range(3):
        whole, terms = gradients(tiny, chosen, solids, step, Team(), monkeypatch)
        parts = [gradients(tiny, chosen, solids, step, Team(k, 2), monkeypatch) for k in range(2)]
        apart += all(found for found, _ in parts)
        assert {name for found, _ in parts for name in found} == set(whole)
        for name, gradient in whole.items():
            found = sum(part[name] for part, _ in parts if name in part)
            alike = max(other.norm() for key, other in whole.items() if key.split()[0] == name.split()[0])
            assert (found - gradient).norm() <= most * alike, name
        for name, value in terms.items():
            assert sum(part.get(name, 0.0) for _, part in parts) == pytest.approx(value, rel=1e-4)
    assert apart  # both had a part


SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentscenes.cli.common import errors_in_one_line
from latentscenes.core import config_io
from latentscenes.data.dataset import PosedImages
from latentscenes.training import loop
from latentscenes.training.distributed import joined
config, images, out, pause = sys.argv[1:]
loop.SAVE_SECONDS = 0.0
terms = loop.terms
loop.terms = lambda *given: (time.sleep(float(pause)), terms(*given))[1]  # time to be stopped in
with errors_in_one_line(), joined(torch.device("cpu")) as (team, device):
    loop.train(config_io.load(config), PosedImages.open(images), Path(out), device=device, team=team)
"""


def started(count, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def test_processes_end_where_one_ends_whatever_dies(solids, tiny, tmp_path):
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    tiny = config_io.parse(config_io.dump(tiny), "test", ["train.scenes.hull=true"])
    config.write_text(config_io.dump(tiny))
    whole = train(tiny, solids, tmp_path / "whole", device=CPU)

    # Of three, one is killed: the others stop, and a checkpoint is left
    three = started(3, config, solids.path, out, 0.2)
    wait_for_checkpoint(out, 1, *three)
    three[1].kill()
    told = [process.communicate(timeout=300)[1] for process in three]
    assert [process.returncode for process in three] == [2, -signal.SIGKILL, 2]
    assert all("another process of this run has ended" in told[rank] for rank in (0, 2))
    before = Run.open(out).position.total
    assert 2 <= before

    # Of two that go on, one is told to stop: both save the same step
    two = started(2, config, solids.path, out, 0.2)
    wait_for_checkpoint(out, before + 1, *two)
    two[1].terminate()
    told = [process.communicate(timeout=300)[1] for process in two]
    assert [process.returncode for process in two] == [130, 130], told
    assert all("stopped; everything is saved" in text for text in told)
    assert before + 2 <= Run.open(out).position.total < whole.position.total
    assert not (out / "ranks").exists()

    # One process ends the run. Only sums were rounded otherwise
    run = train(tiny, solids, out, device=CPU)
    assert run.finished and run.position.total == whole.position.total
    first, second = whole.load(), run.load()
    for mine, other in (
        (first[0].state_dict(), second[0].state_dict()),
        (first[1].tables(), second[1].tables()),
    ):
        for name, value in mine.items():
            if value.numel():
                assert (value - other[name]).float().norm() <= 1e-3 * value.float().norm(), name
    losses = [
        [line for line in learned.metrics() if line["stage"] == "joint"][-1] for learned in (whole, run)
    ]
    for name in ("latent", "rgb", "autoencoder", "tv"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-3)


def test_what_one_process_does_alone_is_refused(tiny):
    def refused(message, *changes, scenes=9, count=2):
        with pytest.raises(UserError, match=message):
            refuse_alone(config_io.parse(config_io.dump(tiny), "test", changes), scenes, Team(0, count))

    refused("3 processes for 2 scenes", scenes=2, count=3)
    refused("micro planes in files are for one process", "storage=disk")
    refused("stage 'codec': with a normalizer meanstd", "normalizer.kind=meanstd")
    refused("stage 'scenes' learns corrections", "train.scenes.rates={micro: 0.1, cameras: 0.1}")
    refuse_alone(tiny, 1, Team())


RESTARTED = """
import os, signal, sys, time
import torch
from latentscenes.training.distributed import joined
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    time.sleep(2)  # the other comes first, and must not find the address of the killed attempt
with joined(torch.device("cpu")) as (team, _):
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if team.number == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    open(f"{sys.argv[1]}/{team.number}", "w").write(f"{total.item():g} of {team.count}")
"""


def test_torchrun_starts_killed_processes_again(tmp_path):
    (tmp_path / "script.py").write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path],
        env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 of 2"] * 2
