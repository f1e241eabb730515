"""Finished runs and libraries without training: random weights, invented curves and scores."""

import dataclasses
import json
from pathlib import Path

import torch

from latentscenes.core import config as configuration
from latentscenes.core.console import Spent
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation.evaluate import evaluate
from latentscenes.evaluation.tables import Comparison
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.storage.scene_set import SceneSet
from latentscenes.training.append import Provenance, library_from_run, new_scene


def made_run(
    path: Path, settings: configuration.Config, views: PosedImages, split: str, count: int | None = None
) -> Run:
    """Returns a finished run of the split's first `count` scenes, with random parameters."""
    scenes, stages = views.select(split, limit=count), settings.train
    run = Run.create(
        path, settings, RunInfo("train", str(views.path), split, [scene.name for scene in scenes], views.box)
    )
    names = [stage.name for stage in stages]
    rows = random_parameters(len(scenes), settings.planes, torch.Generator().manual_seed(1))
    run.save(
        Model(settings, views.box),
        rows,
        {},
        Position(len(stages), 0, 30, dict.fromkeys(names, 4.5), dict.fromkeys(names, 2.5)),
    )
    for number, name in enumerate(names):
        for line in made_curve(name, 30 * number):
            run.log(line)
    return run


def made_curve(stage: str, before: int = 0) -> list[dict]:
    """Returns logged steps of a stage that starts after `before` steps."""
    return [
        {"stage": stage, "step": step, "total": before + step, "rate": 1.0,
         "latent": 0.1 / step, "rgb": 0.02 + 1 / step**2}
        for step in (10, 20, 30)
    ]  # fmt: skip


def made_library(path: Path, run: Run, settings: configuration.Config, views: PosedImages) -> LibraryFolder:
    """Returns a library of a run's scenes and the dataset's new ones, with random parameters."""
    library = library_from_run(path, run, views, settings, "int8", True, "cpu")
    scenes, model = views.select("new"), library.model()
    rows = random_parameters(len(scenes), settings.planes, torch.Generator().manual_seed(2))
    origin = Provenance("exploit", "new", Spent(4.5, 2.5))
    library.append([
        new_scene(model, one, library.info.view, views, scene, "int8", origin)
        for one, scene in zip(rows.one_by_one(), scenes, strict=True)
    ])  # fmt: skip
    lines = [line for stage in settings.exploit for line in made_curve(stage.name)]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return library


def made_comparison(folder: Path, settings: configuration.Config, views: PosedImages) -> Comparison:
    """Returns a comparison of stage 1, new scenes, and RGB tri-planes of the first new scene."""
    train = made_run(folder / "train", settings, views, "train")
    made_library(folder / "library", train, settings, views)
    plain = dataclasses.replace(
        settings,
        codec=configuration.CodecConfig("identity"),
        planes=configuration.PlanesConfig(resolution=12, micro=4, macro=0),
    )
    rgb = made_run(folder / "rgb", plain, views, "new", count=1)
    parts = SceneSet.of_run(train), SceneSet.open(folder / "library"), SceneSet.of_run(rgb)
    scores = [evaluate(learned, views, learned.scenes(views)) for learned in parts]
    return Comparison(
        parts[0],
        parts[1],
        scores[0],
        scores[1],
        views,
        parts[2],
        scores[2],
        title="Solids <& friends>",
        shortcomings=("It is only a test.",),
    )
