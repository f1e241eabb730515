"""Micro planes in files learn the same as those in memory, and the last checkpoint survives any crash."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from latentscenes.core import config_io
from latentscenes.core.config import PlanesConfig
from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, write_with_checksum
from latentscenes.core.runtime import machine_memory, seeded
from latentscenes.storage.row_files import CHUNK, belong_on_disk, read_micro, rows_on_disk
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.loop import train

CPU = torch.device("cpu")
PLANES = PlanesConfig(resolution=3, micro=2, macro=1, bases=2)


def files_of(folder, count=5):
    return rows_on_disk(folder, count, PLANES, seeded("cpu", "rows"))


def flip(file, row: int, numbers: int = PLANES.micro * PLANES.resolution**2 * 3) -> None:
    """Flips a bit of a number in a row of `numbers` numbers."""
    with open(file, "r+b") as stream:
        stream.seek(4 * numbers * row + 5)
        (byte,) = stream.read(1)
        stream.seek(4 * numbers * row + 5)
        stream.write(bytes([byte ^ 16]))


def test_rows_come_back_after_changes_without_a_checkpoint(tmp_path):
    rows, files = files_of(tmp_path / "rows")
    files.restore_to(0)
    before = rows.micro.clone()
    files.keep([1, 3])
    rows.micro[1] += 1
    files.moments[0][3] = 7
    files.keep([3, 4])  # 3 is kept already, as it was before
    rows.micro[4] -= 1
    again, reopened = files_of(tmp_path / "rows")
    assert not torch.equal(again.micro, before)
    reopened.restore_to(0)
    assert torch.equal(again.micro, before) and not reopened.moments[0].any()
    assert not list((tmp_path / "rows").glob("journal*"))


def test_a_checkpoint_makes_changes_stay(tmp_path):
    rows, files = files_of(tmp_path / "rows")
    files.keep([2])
    rows.micro[2] = 5
    files.flush()
    files.begin(10)
    files.keep([2])
    rows.micro[2] = 6
    again, reopened = files_of(tmp_path / "rows")
    reopened.restore_to(10)
    assert (again.micro[2] == 5).all()


def test_a_crash_between_a_checkpoint_and_its_journal_undoes_nothing(tmp_path):
    rows, files = files_of(tmp_path / "rows")
    files.keep([0])
    rows.micro[0] = 4
    files.flush()  # the checkpoint of step 7 has its name now, but the journal of step 0 still lies there
    again, reopened = files_of(tmp_path / "rows")
    reopened.restore_to(7)
    assert (again.micro[0] == 4).all() and not list((tmp_path / "rows").glob("journal*"))


def test_a_torn_record_is_left_out(tmp_path):
    rows, files = files_of(tmp_path / "rows")
    before = rows.micro.clone()
    files.keep([0, 1])
    rows.micro[0] = 9
    journal = tmp_path / "rows" / "journal-0.bin"
    os.truncate(journal, journal.stat().st_size - 5)
    _, reopened = files_of(tmp_path / "rows")
    reopened.restore_to(0)
    assert torch.equal(reopened.micro, before)


def test_fresh_rows_are_random_throughout_and_moments_take_no_space(tmp_path):
    rows, files = files_of(tmp_path / "rows", CHUNK + 3)
    assert float(rows.micro[-1].std()) == pytest.approx(PLANES.initial_std, rel=0.5)
    assert not torch.equal(rows.micro[0], rows.micro[CHUNK])
    files.moments[1][:] = 1
    files.clear_moments()
    assert not files.moments[1].any() and (tmp_path / "rows" / "second.bin").stat().st_blocks == 0


def test_a_damaged_row_is_named_before_it_changes(tmp_path):
    rows, files = files_of(tmp_path / "rows")
    files.keep([1, 2])
    rows.micro[1] = 5
    sums = files.sums()
    files.flush()
    files.begin(10)
    flip(tmp_path / "rows" / "second.bin", row=3)
    again, reopened = files_of(tmp_path / "rows")
    reopened.restore_to(10, sums)
    reopened.keep([0, 1])
    with pytest.raises(UserError, match="second.bin: the scene in row 3 is damaged"):
        reopened.keep([2, 3])


@pytest.mark.parametrize("table", ["micro", "first", "second"])
def test_a_finished_run_with_a_damaged_row_is_refused(unbroken, table):
    config, run = unbroken
    flip(
        run.path / "rows" / f"{table}.bin",
        row=2,
        numbers=config.planes.micro * config.planes.resolution**2 * 3,
    )
    if table == "micro":
        with pytest.raises(UserError, match="micro.bin: the scene in row 2 is damaged"):
            Run.open(run.path).load()
    else:  # a finished run needs no moments
        Run.open(run.path).load()


def test_checkpoints_without_checksums_of_rows_are_read(unbroken):
    _, run = unbroken
    (checkpoint,) = (run.path / "checkpoints").iterdir()  # the files hold one state of the rows only
    content = json.loads((checkpoint / "state.json").read_text())
    del content["checksums"]["sums.safetensors"]
    (checkpoint / "sums.safetensors").unlink()
    write_with_checksum(checkpoint / "state.json", {k: v for k, v in content.items() if k != CHECKSUM})
    assert len(Run.open(run.path).load()[1]) == len(run.info.scenes)


def test_when_rows_belong_on_disk(tiny):
    assert not belong_on_disk(10, tiny)
    assert belong_on_disk(10, dataclasses.replace(tiny, storage="disk"))
    scene = 3 * 4 * 3 * tiny.planes.resolution**2 * tiny.planes.micro
    assert belong_on_disk(machine_memory() // scene, tiny)
    assert not belong_on_disk(machine_memory() // scene, dataclasses.replace(tiny, storage="memory"))


def state(run):
    model, rows = run.load()
    return [*model.state_dict().values(), *rows.tables().values()]


@pytest.fixture
def unbroken(solids, tiny, tmp_path):
    config = dataclasses.replace(tiny, storage="disk")
    return config, train(config, solids, tmp_path / "unbroken", device=CPU)


def test_the_same_is_learned_wherever_rows_lie(solids, tiny, unbroken, tmp_path, monkeypatch):
    config, on_disk = unbroken
    fresh, _ = rows_on_disk(
        tmp_path / "fresh", len(on_disk.info.scenes), tiny.planes, seeded("cpu", tiny.seed, "rows")
    )
    # The order of random numbers differs
    monkeypatch.setattr("latentscenes.storage.run.random_parameters", lambda *_: fresh)
    in_memory = train(dataclasses.replace(tiny, storage="memory"), solids, tmp_path / "run", device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(state(on_disk), state(in_memory), strict=True))


@pytest.mark.parametrize("every_step_saved", [True, False])
def test_crashes_leave_no_trace(solids, unbroken, tmp_path, monkeypatch, every_step_saved):

    config, expected = unbroken
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0 if every_step_saved else 1e9)
    calls, true_terms = [], loop.terms

    def fragile(*arguments):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise OSError("crash")
        return true_terms(*arguments)

    monkeypatch.setattr(loop, "terms", fragile)
    run = None
    for _ in range(60 if every_step_saved else 1):
        try:
            run = train(config, solids, tmp_path / "run", device=CPU)
            break
        except OSError:
            pass
    monkeypatch.setattr(loop, "terms", true_terms)
    run = run or train(config, solids, tmp_path / "run", device=CPU)
    assert len(calls) > 5 or not every_step_saved
    assert all(torch.equal(a, b) for a, b in zip(state(run), state(expected), strict=True))


SCRIPT = """
import sys, torch
from pathlib import Path
from latentscenes.core import config, config_io
from latentscenes.training import loop as train
from latentscenes.data.dataset import PosedImages
torch.set_num_threads(1)
train.SAVE_SECONDS = 0.05
settings, images = config_io.load(sys.argv[1]), PosedImages.open(sys.argv[2])
train.train(settings, images, Path(sys.argv[3]), device=torch.device("cpu"))
"""


def test_killed_at_any_moment(solids, tiny, tmp_path):
    config = config_io.parse(config_io.dump(tiny), "test", ["train.scenes.epochs=60", "storage=disk"])
    (tmp_path / "config.yaml").write_text(config_io.dump(config))
    expected = train(config, solids, tmp_path / "unbroken", device=CPU)
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(tmp_path / "config.yaml"),
        str(solids.path),
        str(tmp_path / "run"),
    ]
    kills = 0
    for wait in (0.2, 0.1, 0.3, 0.05):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = tmp_path / "run" / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
            time.sleep(0.01)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills > 0
    subprocess.run(command, check=True, capture_output=True)
    assert all(
        torch.equal(a, b) for a, b in zip(state(Run.open(tmp_path / "run")), state(expected), strict=True)
    )


def test_a_run_that_was_interrupted_is_not_read(tmp_path):
    _, files = files_of(tmp_path / "rows")
    files.keep([0])
    with pytest.raises(UserError, match="interrupted"):
        read_micro(tmp_path / "rows", 5, PLANES)
