"""Runs that look finished without any training: random weights, made-up curves and scores."""

import dataclasses
from pathlib import Path

import torch

from latentscenes import config as configuration
from latentscenes.evaluate import evaluate
from latentscenes.model import Model
from latentscenes.planes import fresh_rows
from latentscenes.report import Comparison
from latentscenes.run import Position, Run, RunInfo
from latentscenes.views import Views


def made_run(path: Path, settings: configuration.Config, views: Views, split: str, parent: Run | None = None, count: int | None = None) -> Run:
    """A run folder of the split's first `count` scenes, learned by nobody."""
    scenes = views.select(split, limit=count)
    kind, stages = ("exploit", settings.exploit) if parent else ("train", settings.train)
    info = RunInfo(kind, str(views.path), split, [scene.name for scene in scenes], views.box, str(parent.path) if parent else None, parent.seconds if parent else 0.0)
    run = Run.create(path, settings, info)
    names = [stage.name for stage in stages]
    rows = fresh_rows(len(scenes), settings.planes, torch.Generator().manual_seed(1))
    run.save(Model(settings, views.box), rows, {}, Position(len(stages), 0, 30, {name: 4.5 for name in names}))
    for number, name in enumerate(names):
        for step in (10, 20, 30):
            run.log({"stage": name, "step": step, "total": 30 * number + step, "rate": 1.0, "latent": 0.1 / step, "rgb": 0.02 + 1 / step**2})
    return run


def made_comparison(folder: Path, settings: configuration.Config, views: Views) -> Comparison:
    """Stage 1, new scenes, and RGB tri-planes of the first new scene alone."""
    train = made_run(folder / "train", settings, views, "train")
    new = made_run(folder / "new", settings, views, "new", train)
    plain = dataclasses.replace(settings, codec=configuration.CodecConfig("identity"), planes=configuration.PlanesConfig(resolution=12, micro=4, macro=0))
    rgb = made_run(folder / "rgb", plain, views, "new", count=1)
    scores = [evaluate(*run.load(), views, views.select(run.info.split, run.info.scenes)) for run in (train, new, rgb)]
    return Comparison(train, new, scores[0], scores[1], views, rgb, scores[2], title="Solids <& friends>", shortcomings=("It is only a test.",))
