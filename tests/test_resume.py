"""A run that is stopped anywhere, by any signal, ends exactly like one that is not stopped."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from waiting import wait_for_checkpoint

from latentscenes.core import config_io
from latentscenes.core.cameras import Box
from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions
from latentscenes.storage import run as run_module
from latentscenes.storage.records import cut_metrics
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def windowed(tiny):
    """Returns a configuration of all stages, with a normalizer that has a state."""
    return config_io.parse(
        config_io.dump(tiny), "test", ["normalizer.kind=meanstd_tanh", "normalizer.window=5"]
    )


def learn_all(config, solids, folder):
    parent = train(config, solids, folder / "train", device=CPU)
    return parent, exploit(folder / "new", solids, config, parent, ExploitOptions(precision="float32"), CPU)


def without_times(lines):
    times = ("time", "seconds", "cpu_seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_same_library(a, b):
    assert a.index.names() == b.index.names() and a.checksums == b.checksums
    for name in a.index.names():
        assert a.index.place(name) == b.index.place(name)  # checksums among them
    assert without_times(a.metrics()) == without_times(b.metrics())


def assert_same_run(a, b):
    first, second = a.load(), b.load()
    for mine, other in (
        (first[0].state_dict(), second[0].state_dict()),
        (first[1].tables(), second[1].tables()),
    ):
        assert set(mine) == set(other)
        for name, value in mine.items():
            assert torch.equal(value, other[name]), name
    assert without_times(a.metrics()) == without_times(b.metrics()) != []
    spent = {"seconds": {}, "cpu_seconds": {}}
    assert dataclasses.replace(a.position, **spent) == dataclasses.replace(b.position, **spent)


class Crash(Exception):
    pass


@pytest.mark.parametrize("every_step_saved", [True, False])
def test_crashes_in_every_stage_leave_no_trace(solids, windowed, tmp_path, monkeypatch, every_step_saved):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    whole = learn_all(windowed, solids, tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0 if every_step_saved else 1e9)
    true_terms, left = loop.terms, [0]

    def fragile(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return true_terms(*arguments)

    monkeypatch.setattr(loop, "terms", fragile)
    crashed = set()
    for attempt in range(30):
        # Every third step; or, where only ends of stages are saved, each time one step further into the stage
        left[0] = 3 if every_step_saved else 2 + attempt
        try:
            broken = learn_all(windowed, solids, tmp_path / "broken")
            break
        except Crash:
            groups = list((tmp_path / "broken" / "new").glob("work/*/run.json"))
            crashed.add(
                ("new", Run.open(groups[0].parent).position.stage)
                if groups
                else ("train", Run.open(tmp_path / "broken" / "train").position.stage)
            )
    if every_step_saved:
        assert crashed == {("train", 0), ("train", 1), ("train", 2), ("new", 0), ("new", 1)}
    else:
        assert len(crashed) >= 3
    assert_same_run(whole[0], broken[0])
    assert_same_library(whole[1], broken[1])


def test_a_decoder_learned_beside_a_frozen_encoder_resumes_exactly(solids, windowed, tmp_path, monkeypatch):
    # latents are encoded anew at each step, and the normalizer must not drift meanwhile
    rates = "{decoder: 1e-3, micro: 1e-2, weights: 1e-2, field: 1e-2, bases: 1e-2}"
    config = config_io.parse(
        config_io.dump(windowed),
        "test",
        ["train.joint.losses={latent: 1, rgb: 1, autoencoder: 1}", f"train.joint.rates={rates}"],
    )
    whole = train(config, solids, tmp_path / "whole", device=CPU)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    save, calls = run_module.Run.save, []

    def crash_after(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 24:  # in the last stage: 18 steps, two ends of stages, and 4 steps
            raise Crash

    monkeypatch.setattr(run_module.Run, "save", crash_after)
    with pytest.raises(Crash):
        train(config, solids, tmp_path / "broken", device=CPU)
    assert Run.open(tmp_path / "broken").position.stage == 2
    assert_same_run(whole, train(config, solids, tmp_path / "broken", device=CPU))


def test_a_crash_while_saving_keeps_the_checkpoint_before(solids, tiny, tmp_path, monkeypatch):
    whole = train(tiny, solids, tmp_path / "whole", device=CPU)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    write, calls = run_module.write_with_checksum, []

    def crash_at_times(path, content):
        if path.name == "state.json":
            calls.append(path)
            if len(calls) in (3, 8, 9, 11):  # the tensors are written, the counters are not
                raise Crash
        write(path, content)

    monkeypatch.setattr(run_module, "write_with_checksum", crash_at_times)
    totals = []
    for _ in range(5):
        try:
            broken = train(tiny, solids, tmp_path / "broken", device=CPU)
            break
        except Crash:
            totals.append(Run.open(tmp_path / "broken").position.total)
    # At step 3, twice at the end of the first stage (its checkpoint replaces that of the last step), at 7
    assert totals == [2, 6, 6, 6]
    assert_same_run(whole, broken)
    assert {path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()} == {"24", "23"}


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentscenes.core import config, config_io
from latentscenes.training import loop as train
from latentscenes.data.dataset import PosedImages
train.SAVE_SECONDS = 0.02
settings, images = config_io.load(sys.argv[1]), PosedImages.open(sys.argv[2])
train.train(settings, images, Path(sys.argv[3]), device=torch.device("cpu"))
"""


def start(config_path, solids_path, out):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-c", SCRIPT, str(config_path), str(solids_path), str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_killed_processes(solids, solids_path, tiny, tmp_path):
    config = config_io.parse(config_io.dump(tiny), "test", ["train.scenes.epochs=40", "train.codec.epochs=4"])
    settings, out = tmp_path / "config.yaml", tmp_path / "run"
    settings.write_text(config_io.dump(config))

    process = start(settings, solids_path, out)  # kill -9
    wait_for_checkpoint(out, 10, process)
    process.kill()
    process.wait()
    killed_at = Run.open(out).position.total
    assert 10 < killed_at < 270

    process = start(settings, solids_path, out)  # SIGTERM saves first
    wait_for_checkpoint(out, killed_at + 5, process)
    seen = Run.open(out).position.total
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "Interrupted" in errors and process.returncode == 1
    stopped_at = Run.open(out).position.total
    assert killed_at < seen <= stopped_at < 270

    resumed = train(config, solids, out, device=CPU)
    assert_same_run(train(config, solids, tmp_path / "whole", device=CPU), resumed)
    assert resumed.position.total == 6 * (4 + 40 + 1)


def test_ctrl_c_saves_and_a_second_one_would_end(solids, tiny, tmp_path, monkeypatch):
    true_terms, calls = loop.terms, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return true_terms(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "terms", interrupted)
    with pytest.raises(loop.Interrupted):
        train(tiny, solids, tmp_path / "run", device=CPU)
    assert Run.open(tmp_path / "run").position.total == 9
    assert signal.getsignal(signal.SIGINT) is before
    (tmp_path / "run" / "evaluation.json").write_text("scores of the unfinished run")
    assert_same_run(
        train(tiny, solids, tmp_path / "whole", device=CPU), train(tiny, solids, tmp_path / "run", device=CPU)
    )
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_times_add_up_over_stops(solids, tiny, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny, train=tiny.train[:1])
    clock = itertools.count(0.0)
    monkeypatch.setattr(Spent, "so_far", lambda: Spent(tick := next(clock), 3.0 * tick))  # three busy threads
    true_terms, calls = loop.terms, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return true_terms(*arguments)

    monkeypatch.setattr(loop, "terms", interrupted)
    with pytest.raises(loop.Interrupted):
        train(config, solids, tmp_path / "run", device=CPU)
    assert Run.open(tmp_path / "run").spent == Spent(4.0, 12.0)  # a reading at the start, one after each step
    run = train(config, solids, tmp_path / "run", device=CPU)
    assert run.spent == Spent(4.0 + 3.0, 12.0 + 9.0)  # two steps, and the end of the stage
    last = run.metrics()[-1]
    assert (last["step"], last["seconds"], last["cpu_seconds"]) == (6, 6.0, 18.0)


def test_a_stage_that_an_earlier_version_began_has_no_cpu_time(solids, tiny, tmp_path, monkeypatch):
    true_terms, calls = loop.terms, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 9:  # in the second stage
            os.kill(os.getpid(), signal.SIGINT)
        return true_terms(*arguments)

    monkeypatch.setattr(loop, "terms", interrupted)
    with pytest.raises(loop.Interrupted):
        train(tiny, solids, tmp_path / "run", device=CPU)
    state = tmp_path / "run" / "checkpoints" / "9" / "state.json"
    known = json.loads(state.read_text())
    del known["checksum"], known["checksums"]
    assert set(known.pop("cpu_seconds")) == {"codec", "scenes"}
    state.write_text(json.dumps(known))  # as written by a version without CPU times
    run = train(tiny, solids, tmp_path / "run", device=CPU)
    times = {stage: run.position.spent(stage) for stage in run.position.seconds}
    assert times["codec"].cpu is None and times["scenes"].cpu is None and times["joint"].cpu > 0
    assert run.spent.cpu is None and run.spent.wall > 0 and str(run.spent).startswith("– CPU, ")


def test_a_folder_holds_one_run(solids, tiny, tmp_path):
    out = tmp_path / "run"
    short = dataclasses.replace(tiny, train=tiny.train[:1])
    train(short, solids, out, device=CPU)
    with pytest.raises(UserError, match="other settings"):
        train(dataclasses.replace(short, seed=1), solids, out, device=CPU)
    with pytest.raises(UserError, match="other scenes"):
        train(short, solids, out, limit=2, device=CPU)
    with pytest.raises(UserError, match="another box"):
        train(short, dataclasses.replace(solids, box=Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))), out, device=CPU)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no run"):
        train(short, solids, tmp_path / "full", device=CPU)
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_two_processes_on_one_run_are_refused(solids, tiny, tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(tiny, train=tiny.train[:1])
    holder = "import sys; from latentscenes.storage.run import Run; run = Run.open(sys.argv[1]); run.lock()"
    holder += "; print('held', flush=True); sys.stdin.read()"
    train(config, solids, out, device=CPU)
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is working on this run"):
            train(config, solids, out, device=CPU)
    finally:
        process.communicate("")
    train(config, solids, out, device=CPU)  # a lock ends with its process


def test_a_broken_checkpoint_is_named(solids, tiny, tmp_path):
    config = dataclasses.replace(tiny, train=tiny.train[:1])
    run = train(config, solids, tmp_path / "run", device=CPU)
    (run.path / "checkpoints" / "6" / "rows.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"rows\.safetensors: cannot be read \(.*header too small"):
        run.load()


@pytest.mark.parametrize("name", ["state.json", "shared.safetensors"])
def test_a_run_whose_newest_checkpoint_is_damaged_ends_the_same(solids, tiny, tmp_path, monkeypatch, name):
    config = dataclasses.replace(tiny, train=tiny.train[:2])
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = train(config, solids, tmp_path / "whole", device=CPU)
    broken = train(config, solids, tmp_path / "broken", device=CPU)
    file = broken.newest() / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{name}: cannot be read .* goes on from the checkpoint before"):
        broken.load(), broken.position
    assert_same_run(whole, train(config, solids, tmp_path / "broken", device=CPU))


def test_a_crash_between_the_two_renames_of_a_save_loses_nothing(solids, tiny, tmp_path):
    config = dataclasses.replace(tiny, train=tiny.train[:1])
    run = train(config, solids, tmp_path / "run", device=CPU)
    checkpoints = run.path / "checkpoints"
    (checkpoints / "6").rename(checkpoints / "6.old")  # the one before is aside, the new one not yet in place
    (checkpoints / "6.partial").mkdir()
    assert Run.open(run.path).position.total == 6 and len(run.load()[1]) == 4


def test_lines_of_steps_undone_by_a_crash_are_dropped(tmp_path, tiny):
    info = run_module.RunInfo("train", "data", "train", ["a"], Box((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    run = Run.create(tmp_path / "run", tiny, info)
    for total in (10, 20, 30):
        run.log({"total": total})
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"total": 40, "lat')  # torn in the middle of a line
    cut_metrics(run.path, 20)
    assert [line["total"] for line in run.metrics()] == [10, 20]
    assert json.loads((run.path / "run.json").read_text())["versions"]["torch"] == torch.__version__
    opened = Run.open(run.path)
    assert opened.info == info and opened.config == tiny and not opened.finished
    with pytest.raises(UserError, match="nothing has been learned yet"):
        opened.load()
