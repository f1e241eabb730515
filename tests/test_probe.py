"""How many scenes a step learns: what a probe finds, and that it becomes a setting of the library or run."""

import dataclasses

import pytest
import torch
from conftest import TINY
from results import made_run
from test_cli import call

from latentscenes.core import config_io
from latentscenes.core.config import with_scenes
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.core.ranks import chosen_rank
from latentscenes.model.model import Model
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.quantize import payload_checksum
from latentscenes.storage.run import Run
from latentscenes.training import preparing, probe
from latentscenes.training.exploit import exploit
from latentscenes.training.probe import Trial, run_trials, smallest_sufficient
from latentscenes.training.sharing import ranks
from latentscenes.training.sharing.ranks import exploit_rank

CPU = torch.device("cpu")
AUTO = ExploitOptions(precision="float32", stage_one=False, scenes="auto")


@pytest.fixture(scope="module")
def config():
    return config_io.parse(TINY, "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory, solids, config):
    return made_run(tmp_path_factory.mktemp("runs") / "run", config, solids, "train")


def content(path):
    library = LibraryFolder.open(path)
    return {name: payload_checksum(library.payload(name)) for name in library.index.names()}


def steps(library_or_run, stages="exploit"):
    return [stage.scenes for stage in getattr(library_or_run.config, stages)]


def test_the_fewest_scenes_that_are_as_fast_are_chosen():
    assert smallest_sufficient([Trial(4, 1.0, None), Trial(8, 1.0, None), Trial(16, 1.95, None)]) == 8
    assert smallest_sufficient([Trial(4, 1.0, None), Trial(8, 1.0, None), Trial(16, 1.5, None)]) == 16
    assert smallest_sufficient([Trial(4, 1.0, None)]) == 4


@pytest.mark.parametrize(
    ("seconds", "memory", "last"),
    [
        (lambda count: 1.0, lambda count: None, 256),  # more scenes cost nothing
        (lambda count: 0.1 * max(count, 16), lambda count: None, 64),  # from 16 on, they gain nothing
        (lambda count: 1.0, lambda count: count, 64),  # twice as many would fill more than the spare share
        (lambda count: 1.0 if count < 100 else None, lambda count: None, 64),  # memory ends
    ],
)
def test_a_probe_ends(seconds, memory, last, config, solids, monkeypatch):
    def trial(model, stage, data, start):
        if (took := seconds(stage.scenes)) is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Trial(stage.scenes, took, memory(stage.scenes))

    monkeypatch.setattr(probe, "_trial", trial)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 150))
    stage, model = dataclasses.replace(config.exploit[0], scenes=4), Model(config, solids.box)
    found = [one.scenes for one in run_trials(model, stage, (solids, solids.scenes), None)]
    assert found == [count for count in (4, 8, 16, 32, 64, 128, 256) if count <= last]


def test_real_steps_of_all_stages_are_timed(config, solids, monkeypatch):
    monkeypatch.setattr(probe, "MOST", 8)  # more than there are scenes
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    data = solids, solids.select("new")
    for stage in (*config.train, *config.exploit):
        found = list(run_trials(Model(config, solids.box), stage, data, None))
        assert found and all(one.seconds > 0 and one.memory is None for one in found)
        assert [one.scenes for one in found] == [stage.scenes * 2**k for k in range(len(found))]


def test_the_number_is_a_setting_of_the_library(run, config, solids, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "smallest_sufficient", lambda trials: 2)
    monkeypatch.setattr(probe, "MOST", 1)
    first = exploit(tmp_path / "first", solids, config, run, dataclasses.replace(AUTO, limit=1), CPU)
    assert steps(first) == [2, 2] and steps(run) == [2, 1]  # the run itself is as it was
    monkeypatch.setattr(preparing, "for_exploit", None)  # no other probe
    more = exploit(first.path, solids, config, None, AUTO, CPU)
    told = exploit(tmp_path / "told", solids, config, run, dataclasses.replace(AUTO, scenes=2), CPU)
    other = exploit(tmp_path / "other", solids, config, run, dataclasses.replace(AUTO, scenes=None), CPU)
    assert steps(told) == [2, 2] and steps(other) == [2, 1]
    last = solids.select("new")[-1].name
    assert content(told.path).keys() == content(more.path).keys() == content(other.path).keys()
    assert content(told.path)[last] != content(other.path)[last]
    with pytest.raises(UserError, match="--scenes 0: must be at least 1"):
        ExploitOptions(scenes=0)


def test_ranks_take_the_number_from_the_plan(run, config, solids, tmp_path, monkeypatch):
    alone = exploit(tmp_path / "alone", solids, config, run, dataclasses.replace(AUTO, scenes=2), CPU)
    monkeypatch.setattr(probe, "smallest_sufficient", lambda trials: 2)
    monkeypatch.setattr(probe, "MOST", 1)

    def learn(number):
        options = RankOptions(rank=str(number), world_size=2, lease=0.1)
        return exploit_rank(
            tmp_path / "out", solids, config, run.path, AUTO, CPU, (chosen_rank(options), options)
        )

    with monkeypatch.context() as broken:
        broken.setattr(ranks.GroupLearner, "learn", None)
        with pytest.raises(TypeError):
            learn(0)  # makes the plan, and fails
    # Another machine, on which another number is best
    monkeypatch.setattr(probe, "smallest_sufficient", lambda trials: 1)
    assert learn(1).joined.added == 2
    assert content(tmp_path / "out") == content(alone.path)


def test_commands(run, config, solids_path, solids, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "smallest_sufficient", lambda trials: 3)
    monkeypatch.setattr(probe, "MOST", 1)
    settings = tmp_path / "tiny.yaml"
    settings.write_text(config_io.dump(config))
    words = ("train", "--data", solids_path, "--config", settings, "--scenes", "auto", "--device", "cpu")
    status, _, err = call(monkeypatch, capsys, *words, "--out", tmp_path / "run")
    assert status == 0, err
    assert "Stage joint: 3 scenes a step." in err and steps(Run.open(tmp_path / "run"), "train") == [3, 3, 3]
    monkeypatch.setattr(probe, "scenes_by_stage", None)
    assert call(monkeypatch, capsys, *words, "--out", tmp_path / "run")[0] == 0  # it goes on with its number
    words = ("exploit", "--data", solids_path, "--run", run.path, "--no-stage-one", "--device", "cpu")
    words += ("--workers", "1", "--limit", "1")
    assert call(monkeypatch, capsys, *words, "--out", tmp_path / "a", "--scenes", "5")[0] == 0
    assert steps(LibraryFolder.open(tmp_path / "a")) == [5, 5]
    status, _, err = call(monkeypatch, capsys, *words, "--out", tmp_path / "b", "--scenes", "5", "--finetune")
    assert status == 2 and "--scenes: not with --finetune" in err


def test_on_a_gpu_steps_are_filled_unless_settings_are_named():
    assert ExploitOptions().fills("cuda") and not ExploitOptions().fills("cpu")
    assert not ExploitOptions(scenes="settings").fills("cuda") and not ExploitOptions(scenes=4).fills("cuda")
    stages = with_scenes(config_io.load("latent"), "exploit", {"crops": 64}).exploit
    assert [stage.scenes for stage in stages] == [4, 64]
