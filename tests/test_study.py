"""Studies: rows share common parts, continue after a stop, and agree with `eval` and `cost`."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import TINY

from benchmarks import study as module
from benchmarks.study import read_study, run_study, table
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation.cost import learned_costs
from latentscenes.evaluation.evaluate import evaluate
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.scene_set import SceneSet

ALONE = """
codec: {kind: identity}
planes: {resolution: 12, micro: 2, macro: 0}
field: {hidden: 16}
render: {coarse: 6, fine: 6}
train:
  - {name: fit, epochs: 1, scenes: 1, views: 2, losses: {latent: 1}, rates: {micro: 0.1, field: 1e-2}}
"""
STUDY = """
title: Solids
seeds: [0, 1]
train_limit: 2
old_scenes: true
chart: {x: stored_bytes, label: bytes of a scene}
rows:
  - {label: alone, config: alone.yaml, alone: true}
  - {label: ours, config: tiny.yaml, precisions: [float32, int4]}
  - {label: learning on, config: tiny.yaml, finetune: true}
  - {label: more, config: tiny.yaml, train_limit: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study")
    for name, text in {"alone.yaml": ALONE, "tiny.yaml": TINY, "study.yaml": STUDY}.items():
        (path / name).write_text(
            text.replace("alone.yaml", str(path / "alone.yaml")).replace("tiny.yaml", str(path / "tiny.yaml"))
        )
    return path


@pytest.fixture(scope="module")
def found(folder, solids):
    return run_study(
        read_study(folder / "study.yaml"), {"data": solids.path}, folder / "out", torch.device("cpu")
    )


def test_every_row_with_every_seed(found):
    labels = ["alone", "ours, float32", "ours, int4", "learning on", "more"]
    assert [(figures.label, figures.seed) for figures in found] == [
        (label, seed) for seed in (0, 1) for label in labels
    ]
    assert len({figures.psnr for figures in found}) > 6


def test_rows_share_stage_one(folder, found):
    assert len(list((folder / "out").glob("stage-one-*"))) == 4  # two seeds, of 2 and of 4 scenes
    assert len(list((folder / "out").glob("alone-*"))) == 2


def test_figures_are_those_of_eval_and_cost(folder, found, solids):
    ours = next(figures for figures in found if figures.label == "ours, float32")
    scores = []
    for path in (folder / "out").glob("library-*"):
        learned = SceneSet.open(path)
        if LibraryFolder.open(path).info.finetuned_from or learned.stored != "float32, 0.000 dB lost":
            continue
        mean, account = evaluate(learned, solids, learned.scenes(solids)).mean, learned_costs(learned)
        scores.append(
            (mean.psnr, mean.ssim, account.memory.scene, account.memory.shared, account.time.stage_one.cpu)
        )
    assert (ours.psnr, ours.ssim, ours.scene_bytes, ours.shared_bytes, ours.stage_one_cpu_seconds) in scores


def test_old_scenes_are_scored_with_the_new_shared_parts(folder, found):
    first = {figures.label: figures for figures in found if figures.seed == 0}
    run = next(
        path
        for path in (folder / "out").glob("stage-one-*")
        if len(SceneSet.open(path).names) == 2 and SceneSet.open(path).config.seed == 0
    )
    learned = SceneSet.open(run)
    views = PosedImages.open(learned.data)
    before = evaluate(learned, views, learned.scenes(views)).mean.psnr
    assert first["ours, float32"].old_psnr == pytest.approx(before, abs=1e-4)
    assert first["learning on"].old_psnr != pytest.approx(before, abs=1e-4)
    assert first["alone"].old_psnr is None


def test_coarser_is_smaller(found):
    fine, coarse = (
        next(figures for figures in found if figures.label == f"ours, {precision}")
        for precision in ("float32", "int4")
    )
    assert (
        coarse.stored_bytes < fine.stored_bytes
        and coarse.psnr != fine.psnr
        and coarse.scene_bytes == fine.scene_bytes
    )


def test_files(folder, found):
    raw = json.loads((folder / "out" / "study.json").read_text())
    assert [row["psnr"] for row in raw["rows"]] == [figures.psnr for figures in found]
    text = (folder / "out" / "study.md").read_text()
    mean = sum(figures.psnr for figures in found if figures.label == "alone") / 2
    assert f"| alone | {mean:.2f} ± " in text and text.count("\n") == 7
    assert ElementTree.parse(folder / "out" / "study.svg").getroot().tag.endswith("svg")


def test_a_second_call_learns_nothing(folder, found, solids, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("learned again")

    monkeypatch.setattr("latentscenes.training.loop.Trainer._fit_stage", refuse)
    again = run_study(
        read_study(folder / "study.yaml"), {"data": solids.path}, folder / "out", torch.device("cpu")
    )
    assert [(figures.label, figures.psnr, figures.seconds) for figures in again] == [
        (figures.label, figures.psnr, figures.seconds) for figures in found
    ]
    assert len(table(read_study(folder / "study.yaml"), again).rows) == 5


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "docs/results/claims").glob("*.yaml")),
    ids=lambda path: path.stem,
)
def test_studies_of_the_results_can_be_read(path):
    wanted = read_study(path)
    for row in wanted.rows:
        module._settings(row, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: t\nrows: [{label: a}, {label: a}]", "labels must differ"),
        ("title: t\nrows: [{label: a, learns: 3}]", "the nearest known is 'learn_from'"),
        ("title: t\nrows: [{label: a, precisions: [int9]}]", "no 'int9'"),
        ("title: t\nrows: [{label: a, alone: true, finetune: true}]", "learns alone"),
        ("title: t\nchart: {x: scene_size, label: b}\nrows: [{label: a}]", "no figure 'scene_size'"),
        ("rows: []", "'title' is missing"),
        ("title: [", "not valid YAML"),
    ],
)
def test_mistakes(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "s.yaml")


def test_mistakes_show_before_anything_is_learned(folder, solids, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", None)
    for row, message in (
        ("data: chairs", "--data chairs=FOLDER"),
        ("config: nothing.yaml", "no such configuration"),
        ("set: [planes.size=3]", "unknown setting"),
    ):
        (tmp_path / "s.yaml").write_text(f"title: t\nrows: [{{label: a, {row}}}]")
        with pytest.raises(UserError, match=message):
            run_study(read_study(tmp_path / "s.yaml"), {"data": solids.path}, tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match="no such file"):
        read_study(tmp_path / "absent.yaml")
