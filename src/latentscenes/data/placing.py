"""Objects turned, scaled and fitted to a box: as a matrix for meshes, by moving cameras for pictures."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from latentscenes.core.cameras import Box
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import carving_views, fit_box
from latentscenes.data.dataset import PosedImages, Scene, box_of
from latentscenes.data.images import white_background
from latentscenes.data.options import Front, Placement, Up
from latentscenes.data.writing import DatasetWriter

SOLID = 26
"""Least alpha that counts as object: a tenth, so that thin parts stay inside the box."""

UPRIGHT: dict[Up, list[list[float]]] = {
    "x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]], "-x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    "y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]], "-y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
}  # fmt: skip
"""Rotations that turn an axis to z, about the level axis that this needs."""


def rotation(up: Up, front: Front | None, turn: float) -> Float[np.ndarray, "3 3"]:
    """Returns the matrix that turns `up` to z, then `front` to x, then all by `turn` degrees about z.

    Raises:
        UserError: `front` is the axis that points up.
    """
    matrix = np.array(UPRIGHT[up])
    angle = np.radians(turn)
    if front is not None:
        facing = matrix @ ((1.0 if front[0] == "+" else -1.0) * np.eye(3)["xyz".index(front[1])])
        if abs(facing[2]) > 0.5:
            raise UserError(f"front = {front}: this axis points up or down. Give one that lies level.")
        angle -= np.arctan2(facing[1], facing[0])
    about_z = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    return np.array(about_z) @ matrix


def rotation_of(placing: Placement) -> Float[torch.Tensor, "3 3"] | None:
    """Returns the rotation of a world, whose z is up unless stated otherwise; None if nothing turns."""
    up = "z" if placing.up == "auto" else placing.up
    if placing.front is None and not placing.turn and up == "z":
        return None
    return torch.from_numpy(rotation(up, placing.front, placing.turn)).float()


def fitting(part: Box, box: Box) -> tuple[float, tuple[float, ...]]:
    """Returns the scale and the shift after which `part` lies in the middle of `box` and just fits it."""
    scale = min(outer / inner for outer, inner in zip(box.half, part.half, strict=True))
    return scale, tuple(outer - scale * inner for outer, inner in zip(box.center, part.center, strict=True))


def turned_box(box: Box, turn: Float[torch.Tensor, "3 3"] | None, scale: float) -> Box:
    """Returns the smallest box around a box that has been turned about the origin and scaled."""
    matrix = scale * (np.eye(3) if turn is None else turn.double().numpy())
    return Box(tuple((matrix @ box.center).tolist()), tuple((np.abs(matrix) @ box.half).tolist()))


def place(folder: Path, out: Path, placing: Placement, fit: Box | None = None) -> PosedImages:
    """Makes a dataset at `out` whose objects are turned and scaled, by moving cameras. Pictures stay the
    same.

    Args:
        fit: a box that each object is moved and scaled to after turning, and that becomes the common box.

    Raises:
        UserError: `out` is not empty, or silhouettes do not bound an object.
    """
    images, turn, boxes = PosedImages.open(folder), rotation_of(placing), []
    with DatasetWriter(out, images.size, images.alpha is not None, images.origin) as writer:
        for scene in images.scenes:
            views = slice(scene.first, scene.first + scene.count)
            cameras = images.cameras[views].placed(turn, placing.scale)
            box = turned_box(scene.box or images.box, turn, placing.scale)
            if fit is not None:
                scale, shift = fitting(turned_box(object_box(images, scene), turn, placing.scale), fit)
                cameras = cameras.placed(None, scale, shift)
            boxes.append(box)
            own = box if scene.box and fit is None else None
            alpha = None if images.alpha is None else images.alpha[views]
            rgb, held_out = images.rgb[views], scene.held_out
            writer.add(scene.name, rgb, cameras, scene.split, held_out, alpha, own, scene.tags)
        writer.finish(fit or box_of(boxes))
    return PosedImages.open(out)


def object_box(images: PosedImages, scene: Scene) -> Box:
    """Returns the box of one object: its own, or fitted to its silhouettes."""
    if scene.box is not None:
        return scene.box
    chosen = [scene.first + view for view in carving_views(scene.count)]
    if images.alpha is None:
        masks = ~white_background(images.rgb[chosen])
    else:
        masks = images.alpha[chosen] >= SOLID
    return fit_box([(scene.name, masks, images.cameras[torch.tensor(chosen)])])
