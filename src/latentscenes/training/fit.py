"""Finds out how new objects must be turned so that a model knows them, and makes a dataset in which they are.

A few objects are learned for a few steps in each turn about the vertical, scaled to the model's box. Only
their mix of base planes learns: micro planes would learn any turn alike. The turn with the smallest error is
the one in which the objects look most like what the model was learned from.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from latentscenes.core.cameras import Cameras
from latentscenes.core.config import Config
from latentscenes.core.console import say
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.data.options import Placement
from latentscenes.data.placing import fitting, object_box, place, turn_of, turned_box
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, mean_parameters
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run, RunInfo
from latentscenes.training.add import quick
from latentscenes.training.batches import TrainingScenes
from latentscenes.training.diagnosis import Fit, view_errors
from latentscenes.training.groups import starting_parameters
from latentscenes.training.loop import Trainer

TURNS = (0.0, 90.0, 180.0, 270.0)
TRIED = 3
"""Objects that are learned in each turn."""
CLEARLY = 0.95
"""Objects are turned only if the error falls below this share of the error without a turn."""


def fitted_dataset(
    images: PosedImages, learned: Run | LibraryFolder, config: Config, name: str, device: torch.device
) -> PosedImages:
    """Makes a dataset beside `images` whose objects are turned and scaled as the model learned its own. If it
    is there already, opens it.

    Args:
        name: of the model, for the command that is printed.

    Raises:
        UserError: the configuration cannot learn weights from latents, or silhouettes do not bound an object.
    """
    target = images.path.with_name(f"{images.path.name}_fitted")
    if not (target / "views.json").is_file():
        begun = time.process_time()
        errors = errors_by_turn(images, learned, config, device)
        best = min(errors, key=errors.get)
        turn = best if errors[best] < CLEARLY * errors[0.0] else 0.0
        listed = ", ".join(f"{degrees:.0f}°: {error:.4f}" for degrees, error in errors.items())
        say(f"Error after a few steps, by turn: {listed} ({time.process_time() - begun:.1f} CPU seconds).")
        say(
            f"latentscenes data place --folder {images.path} --out {target} --turn {turn:.0f} --fit-to {name}"
        )
        place(images.path, target, Placement(turn=turn), None if learned.has_boxes else learned.info.box)
    return PosedImages.open(target)


def errors_by_turn(
    images: PosedImages, learned: Run | LibraryFolder, config: Config, device: torch.device
) -> dict[float, float]:
    """Returns the mean squared error of some new objects after a few steps of learning, by turn (degrees)."""
    scenes = images.select("new", limit=TRIED)
    if isinstance(learned, LibraryFolder):
        model, start = learned.model(device), learned.starting_scene()
    else:
        model, rows = learned.load(device)
        start = mean_parameters(1, rows)
    settings = _without_micro(quick(config, max(len(scene.views("fit")) for scene in scenes)))
    boxes = [object_box(images, scene) for scene in scenes]
    found = {}
    for turn in TURNS:
        cameras, placed = images.cameras.cam2world.clone(), []
        for scene, box in zip(scenes, boxes, strict=True):
            views, about = slice(scene.first, scene.first + scene.count), turn_of(Placement(turn=turn))
            moved = turned_box(box, about, 1.0)
            there = (1.0, (0.0, 0.0, 0.0)) if start.box.numel() else fitting(moved, model.box)
            cameras[views] = images.cameras[views].placed(about).placed(None, *there).cam2world
            placed.append(dataclasses.replace(scene, box=moved))
        turned = dataclasses.replace(images, cameras=Cameras(cameras, images.cameras.intrinsics))
        found[turn] = _error(turned, placed, model, start, settings)
    return found


def _without_micro(config: Config) -> Config:
    stages = (
        dataclasses.replace(stage, rates=dataclasses.replace(stage.rates, micro=0.0))
        for stage in config.exploit
    )
    return dataclasses.replace(config, exploit=tuple(stages))


def _error(
    images: PosedImages, scenes: list[Scene], model: Model, start: SceneParameters, config: Config
) -> float:
    names = [scene.name for scene in scenes]
    rows = starting_parameters(config, start, images, scenes).to(model.device)
    with tempfile.TemporaryDirectory(prefix="latentscenes-") as work:
        run = Run.create(
            Path(work) / "run", config, RunInfo("exploit", str(images.path), "new", names, model.box)
        )
        Trainer(run, model, TrainingScenes(rows, images, scenes), label="Trying a turn").fit(config.exploit)
    model.eval().requires_grad_(False)
    fits = (Fit(scene, row, None, run.spent) for scene, row in zip(scenes, rows.one_by_one(), strict=True))
    return float(np.mean([view_errors(model, images, fit)[0].mean().item() for fit in fits]))
