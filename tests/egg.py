"""A scene with weights set by hand: its density is that of an ellipsoid, red where x is large and green where
x is small. Its surface and colors are known in closed form."""

from pathlib import Path

import numpy as np
import torch

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.data.dataset import PosedImages
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.storage.scene_set import SceneSet

BOX = Box((0.05, -0.1, 0.02), (0.5, 0.3, 0.25))
CENTER = np.array([0.07, -0.11, 0.03])
SEMI = np.array([0.3, 0.18, 0.1])
"""Semi-axes of the ellipsoid, world units."""
SHARP = 2e4
"""Slope of the density below the surface."""
VIEW = Viewpoint((64, 80), 1.6, (1.1, 1.375), BOX.center)
CONFIG = """
codec: {kind: identity}
planes: {resolution: 96, micro: 2, macro: 0}
field: {hidden: 2}
render: {coarse: 48, fine: 48}
"""


def egg_parts(
    box: Box = BOX, semi: np.ndarray = SEMI, center: np.ndarray = CENTER
) -> tuple[Model, SceneParameters]:
    """Returns model and parameters. Feature 0 is Σ ((x − c) / a)², feature 1 is x in box coordinates."""
    settings = config_io.parse(CONFIG, "egg")
    model = Model(settings, box)
    side = settings.planes.resolution
    texels = (torch.arange(side) * 2 + 1) / side - 1
    squares = [
        ((texels * half + middle - c) / a) ** 2
        for half, middle, c, a in zip(box.half, box.center, center.tolist(), semi.tolist(), strict=True)
    ]
    planes = torch.zeros(1, 3, side, side, 2)
    planes[0, 0, :, :, 0] = squares[0][None, :] + squares[1][:, None]  # plane xy: columns x, rows y
    planes[0, 1, :, :, 0] = squares[2][:, None].expand(side, side)  # plane xz
    planes[0, 0, :, :, 1] = texels[None, :].expand(side, side)
    field = model.field
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.hidden.weight[0, 0], field.hidden.bias[0] = -SHARP, SHARP  # above 0 inside
        field.hidden.weight[1, 1], field.hidden.bias[1] = 5.0, 20.0
        field.out.weight[0, 0], field.out.bias[0] = 1.0, -20.0
        field.out.weight[1, 1], field.out.bias[1] = 1.0, -20.0
        field.out.weight[2, 1], field.out.bias[2] = -1.0, 20.0
        field.out.bias[3] = -4.0
    return model.eval().requires_grad_(False), SceneParameters(
        planes, torch.zeros(1, 0), torch.zeros(1, 0), torch.zeros(1, 0, 0)
    )


def egg_colors(points: np.ndarray) -> np.ndarray:
    """Returns the field's colors (red, green, blue) in [0, 1] at points (n, 3)."""
    x = (points[:, 0] - BOX.center[0]) / BOX.half[0]
    return np.stack(
        [1 / (1 + np.exp(-5 * x)), 1 / (1 + np.exp(5 * x)), np.full(len(x), 1 / (1 + np.exp(4)))], 1
    )


def egg(**shape) -> SceneSet:
    model, rows = egg_parts(**shape)
    return SceneSet.of_table(model, rows, ["egg"])


def egg_points(count: int = 20_000) -> np.ndarray:
    """Returns random points all over the ellipsoid."""
    directions = np.random.default_rng(1).normal(size=(count, 3))
    return CENTER + SEMI * directions / np.linalg.norm(directions, axis=1, keepdims=True)


def egg_run(path: Path, views: PosedImages) -> Run:
    """Returns a finished run that holds the egg, for the dataset `views`."""
    model, rows = egg_parts()
    run = Run.create(path, model.config, RunInfo("train", str(views.path), "train", ["egg"], BOX))
    run.save(model, rows, {}, Position(len(model.config.train), 0, 1, {}))
    return run
