"""Finds out how new objects must be turned so that a model knows them, and makes a dataset in which they are.

A few objects are learned for a few steps in each of the 24 ways in which a box lies on a side, scaled to the
model's box; the best ways for more steps. Only their mix of base planes learns: micro planes would learn any
way alike. The way with the smallest error is the one in which the objects look most like what the model was
learned from.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import Config
from latentscenes.core.console import console, say, tracked
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.data.options import Placement
from latentscenes.data.placing import UPRIGHT, fitting, object_box, place, rotation_of, turned_box
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run, RunInfo
from latentscenes.training.add import quick
from latentscenes.training.batches import TrainingScenes
from latentscenes.training.diagnosis import FittedScene, view_errors
from latentscenes.training.groups import starting_parameters
from latentscenes.training.loop import Trainer

TURNS = (0.0, 90.0, 180.0, 270.0)
PLACEMENTS = tuple(Placement(up=up, turn=turn) for up in UPRIGHT for turn in TURNS)
"""Which axis of the dataset becomes z, and the turn about it: the 24 rotations of a cube."""
AS_IT_IS = Placement(up="z")
TRIED = 3
"""Objects that are learned in each way."""
ROUGH_STEPS = 15
"""Steps in which all ways are compared first."""
FINALISTS = 4
"""Ways that are compared in more steps. The way as it is always is."""
CLEARLY = 0.95
"""Objects are turned about the vertical only if the error falls below this share of the error as they are."""
CLEARLY_LYING = 0.9
"""Another axis becomes z only if the error falls below this share of the least error with z up. Right ways of
cars that lay on a side had 0.4 to 0.83 of it."""


def fitted_dataset(
    images: PosedImages, learned: Run | LibraryFolder, config: Config, name: str, device: torch.device
) -> PosedImages:
    """Makes a dataset beside `images` whose objects are turned and scaled as the model learned its own. If it
    is there already, opens it.

    Args:
        name: of the model, for the command that is printed.

    Raises:
        UserError: the model has a box for each object, the configuration cannot learn weights from latents,
            or silhouettes do not bound an object.
    """
    if learned.has_boxes:
        raise UserError(
            f"--fit is for models with one box. {name} has a box for each object: objects of any size fit as "
            "they are, so leave out --fit. If all lie on a side or face another way than the model's, turn "
            "them: latentscenes data place --up … --turn …."
        )
    target = images.path.with_name(f"{images.path.name}_fitted")
    if not (target / "views.json").is_file():
        begun = time.process_time()
        errors = errors_by_placement(images, learned, config, device)
        way = best_placement(errors)
        listed = ", ".join(f"{_options(one)}: {errors[one]:.4f}" for one in sorted(errors, key=errors.get))
        say(f"Error after a few steps: {listed} ({time.process_time() - begun:.1f} CPU seconds).")
        say(f"latentscenes data place --folder {images.path} --out {target} {_options(way)} --fit-to {name}")
        place(images.path, target, way, learned.info.box)
    return PosedImages.open(target)


def best_placement(errors: dict[Placement, float]) -> Placement:
    """Returns the way with the smallest error, unless another that changes less is nearly as good."""
    upright = min((way for way in errors if way.up == "z"), key=errors.get)
    best = min(errors, key=errors.get)
    if errors[best] < CLEARLY_LYING * errors[upright]:
        return best
    return upright if errors[upright] < CLEARLY * errors[AS_IT_IS] else AS_IT_IS


def _options(way: Placement) -> str:
    """The options of `data place` for a way."""
    return f"--up {way.up} --turn {way.turn:.0f}"


def errors_by_placement(
    images: PosedImages, learned: Run | LibraryFolder, config: Config, device: torch.device
) -> dict[Placement, float]:
    """Returns the mean squared error of some new objects after a few steps of learning, for AS_IT_IS and
    for those PLACEMENTS that are best after fewer steps."""
    scenes = images.select("new", limit=TRIED)
    model, start = learned.starting(device)
    views = max(len(scene.views("fit")) for scene in scenes)
    boxes = [object_box(images, scene) for scene in scenes]
    settings = _without_micro(quick(config, views, ROUGH_STEPS))
    say(f"trying {len(PLACEMENTS)} ways to turn {counted(len(scenes), 'object')} …")
    rough = {}
    for way in (
        PLACEMENTS if console.is_terminal else tracked(PLACEMENTS, "trying ways to turn objects")
    ):  # has its own bar
        rough[way] = _error(*_placed(images, scenes, boxes, way, model), model, start, settings)
    settings = _without_micro(quick(config, views))
    best = sorted(rough, key=rough.get)[:FINALISTS]
    return {
        way: _error(*_placed(images, scenes, boxes, way, model), model, start, settings)
        for way in dict.fromkeys([*best, AS_IT_IS])
    }


def _placed(
    images: PosedImages, scenes: list[Scene], boxes: list[Box], way: Placement, model: Model
) -> tuple[PosedImages, list[Scene]]:
    """Returns the images with cameras moved so that some scenes are turned and fill the model's box."""
    cameras, placed, about = images.cameras.cam2world.clone(), [], rotation_of(way)
    for scene, box in zip(scenes, boxes, strict=True):
        views = slice(scene.first, scene.first + scene.count)
        moved = turned_box(box, about, 1.0)
        there = fitting(moved, model.box)
        cameras[views] = images.cameras[views].placed(about).placed(None, *there).cam2world
        placed.append(dataclasses.replace(scene, box=moved))
    return dataclasses.replace(images, cameras=Cameras(cameras, images.cameras.intrinsics)), placed


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
        Trainer(run, model, TrainingScenes(rows, images, scenes), label="Trying a way to turn").fit(
            config.exploit
        )
    model.eval().requires_grad_(False)
    fits = (
        FittedScene(scene, row, None, run.spent) for scene, row in zip(scenes, rows.one_by_one(), strict=True)
    )
    return float(np.mean([view_errors(model, images, fit)[0].mean().item() for fit in fits]))
