"""Checks imported cameras and recognizes mixed-up conventions."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.options import Axes

UPRIGHT = 0.4
"""Cameras stand upright along an axis if the mean of their up directions has this part along it, and at most
half as much along the others."""
OTHER: dict[str, Axes] = {"opencv": "opengl", "opengl": "opencv"}


def read_matrix(numbers: Sequence[float], file: Path | str, axes: Axes) -> Float[Tensor, "3 4"]:
    """Returns camera-to-world in OpenCV axes from 16 numbers, row by row."""
    if len(numbers) != 16:
        raise UserError(
            f"{file}: holds {len(numbers)} numbers; a camera-to-world matrix has 16 (4 rows of 4, row by "
            "row)."
        )
    matrix = torch.tensor(numbers, dtype=torch.float64).reshape(4, 4)
    if not torch.isfinite(matrix).all():
        raise UserError(f"{file}: the camera matrix holds NaN or infinity. Correct or remove it.")
    if not torch.allclose(matrix[3], torch.eye(4, dtype=torch.float64)[3], atol=1e-4):
        why = "is it another kind of matrix?"
        if (
            torch.allclose(matrix[:3, 3], torch.zeros_like(matrix[:3, 3]))
            and matrix[3, :3].abs().max() > 1e-4
        ):
            why = "it looks transposed: the position stands in the last row; write it row by row"
        raise UserError(
            f"{file}: the last row of the camera matrix is {matrix[3].tolist()} instead of 0 0 0 1; {why}"
        )
    if axes == "opengl":
        matrix[:3, :3] = matrix[:3, :3] @ OPENGL_TO_OPENCV.double()
    return matrix[:3].float()


def upright_axis(cameras: Cameras) -> str | None:
    """Returns the axis of the world along which cameras stand upright on average: x, y or z, or -x, -y or -z.
    None if they are held in all ways."""
    mean = -cameras.cam2world[:, :3, 1].double().mean(0)
    axis = int(mean.abs().argmax())
    _, second, most = mean.abs().sort().values.tolist()
    if most < UPRIGHT or second > most / 2:
        return None
    return ("-" if mean[axis] < 0 else "") + "xyz"[axis]


def check_cameras(
    cameras: Cameras, files: Sequence[Path | str], box: Box | None, axes: Axes = "opencv"
) -> None:
    """Raises a UserError for cameras that cannot be right.

    Numbers must be finite, rotations proper, focal lengths positive and principal points near the image. With
    a box, every camera must see some of it; without, the cameras must look toward a common point.

    Args:
        cameras: all cameras of a scene, in OpenCV axes.
        files: origin of each camera, for the error message.
        box: the scene box, if known.
        axes: axes the cameras were read in, for the hint in the error message.
    """
    for place in _suspects(cameras):
        _check_rotation(cameras.cam2world[place].double(), files[place])
        _check_intrinsics(cameras.intrinsics[place], files[place])
    if box is not None:
        blind = (~_sees(cameras, box)).nonzero().ravel().tolist()
        if not blind:
            return
        file = files[blind[0]]
        wrong = f"{len(blind)} of {len(files)} cameras, this one first, see nothing of the box"
        center, half = (", ".join(f"{number:.4g}" for number in side) for side in (box.center, box.half))
        advice = (
            f" (center {center}, half sides {half}). Check that box and cameras share one world, and that "
            "matrices are camera-to-world; or remove those views."
        )
    elif len(files) < 2 or _converge(cameras):
        return
    else:
        file = files[0]
        wrong = f"the {len(files)} cameras beginning with this one do not look toward a common point"
        advice = ", so the object's place is unknown. Check the matrices, or give the box by hand (--box)."
    cause = _axes_mistake(cameras, axes)
    raise UserError(f"{file}: {wrong}. {cause}" if cause else f"{file}: {wrong}{advice}")


def converging_point(cameras: Cameras) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the point nearest to all optical axes, its depths, and its RMS distance from the axes."""
    eyes = cameras.cam2world[:, :, 3].double().numpy()
    forward = cameras.cam2world[:, :, 2].double().numpy()
    across = np.eye(3) - forward[:, :, None] * forward[:, None]  # projects out the axis
    # For parallel axes, least squares picks the point nearest to the mean position
    middle = eyes.mean(0)
    normal, offset = across.sum(0), np.einsum("vij,vj->i", across, eyes - middle)
    point = middle + np.linalg.lstsq(normal, offset, rcond=1e-6)[0]
    toward = point - eyes
    off_axis = np.linalg.norm(np.einsum("vij,vj->vi", across, toward), axis=-1)
    return point, (toward * forward).sum(-1), float(np.sqrt((off_axis**2).mean()))


def _converge(cameras: Cameras) -> bool:
    """Returns whether the cameras stand apart and look toward one point in front of them."""
    _, depth, off_axis = converging_point(cameras)
    eyes = cameras.positions.double()
    apart = float((eyes - eyes.mean(0)).norm(dim=-1).mean())
    distance = float(np.abs(depth).mean())
    if distance < 1e-3 * float(eyes.norm(dim=-1).max()):
        return False  # all at one place, as for world-to-camera matrices of an orbit
    return bool((depth > 0).mean() >= 0.9 and off_axis < 0.4 * distance and apart > 0.02 * distance)


def _axes_mistake(cameras: Cameras, axes: Axes) -> str | None:
    """Describes the mix-up whose reversal makes the cameras converge; None if there is none."""
    if _converge(cameras):
        return None
    flip = OPENGL_TO_OPENCV
    rotation, position = cameras.cam2world[:, :, :3], cameras.cam2world[:, :, 3:]
    turned = Cameras(torch.cat([rotation @ flip, position], -1), cameras.intrinsics)
    if _converge(turned):
        return (
            f"They look away from the object: they were read as {axes} cameras, but seem to be "
            f"{OTHER[axes]} ones (y and z flipped). Pass --axes {OTHER[axes]}; from Python, negate the "
            "second and third column of each rotation."
        )
    given = rotation @ flip if axes == "opengl" else rotation  # as in the file
    inverse, eye = given.mT, -given.mT @ position
    for kind in (axes, OTHER[axes]):
        inverted = torch.cat([inverse @ flip if kind == "opengl" else inverse, eye], -1)
        if _converge(Cameras(inverted, cameras.intrinsics)):
            return (
                f"They seem to be world-to-camera matrices (with {kind} axes). Invert every matrix, so that "
                "its last column is the camera's position"
                + (f", and pass --axes {kind}." if kind != axes else ".")
            )
    return None


def _suspects(cameras: Cameras) -> list[int]:
    """Returns the views that need a closer look, by one test that is fast for thousands of scenes."""
    rotation, intrinsics = cameras.cam2world[:, :, :3], cameras.intrinsics
    skew = (rotation.mT @ rotation - torch.eye(3)).abs().amax((1, 2))
    fine = (skew < 1e-3) & (torch.linalg.det(rotation) > 0) & cameras.cam2world.isfinite().all(-1).all(-1)
    fine &= ((intrinsics > 0) & intrinsics.isfinite()).all(-1) & (intrinsics[:, 2:] < 1.5).all(-1)
    return (~fine).nonzero().ravel().tolist()


def _check_rotation(cam2world: Float[Tensor, "3 4"], file: Path | str) -> None:
    if not torch.isfinite(cam2world).all():
        raise UserError(f"{file}: the camera matrix holds NaN or infinity. Correct or remove it.")
    rotation = cam2world[:, :3]
    gram = rotation.mT @ rotation
    scale = float(gram.diagonal().mean().sqrt())
    identity = torch.eye(3, dtype=torch.float64)
    if not torch.allclose(gram, identity, atol=2e-3):
        if scale > 1e-6 and torch.allclose(gram / scale**2, identity, atol=2e-3):
            raise UserError(
                f"{file}: the camera's rotation is scaled by {scale:.4g}; divide its nine numbers by that "
                "(keep the position)."
            )
        raise UserError(
            f"{file}: the upper left 3x3 of the camera matrix is not a rotation (columns of length 1 at "
            "right angles). It must be camera-to-world [R | t; 0 0 0 1] without intrinsics multiplied in."
        )
    if torch.linalg.det(rotation) < 0:
        raise UserError(
            f"{file}: the camera's rotation mirrors (determinant -1): only one axis was flipped. Between "
            "OpenGL and OpenCV both the y and the z column change sign; between y-up and z-up worlds one "
            "axis is swapped and another negated."
        )


def _check_intrinsics(intrinsics: Float[Tensor, "4"], file: Path | str) -> None:
    fx, fy, cx, cy = intrinsics.tolist()
    if not (0 < fx < math.inf and 0 < fy < math.inf):
        raise UserError(f"{file}: focal lengths {fx:.4g}, {fy:.4g} (fractions) must be finite and above 0.")
    if not (-0.5 <= cx <= 1.5 and -0.5 <= cy <= 1.5):
        raise UserError(
            f"{file}: the principal point (cx, cy) lies at {cx:.4g}, {cy:.4g} of the image's width and "
            "height, not in the image or near it. Correct it; or, if the intrinsics belong to another image "
            "size than the stated one, state that size."
        )


def _sees(cameras: Cameras, box: Box) -> Tensor:
    """Returns for every camera whether some of the box lies in its image (v booleans)."""
    side = torch.linspace(-1, 1, 7)
    grid = torch.cartesian_prod(side, side, side) * torch.tensor(box.half) + torch.tensor(box.center)
    places, depth = cameras.project(grid)
    shown = ((places >= 0) & (places <= 1)).all(-1) & (depth > 0)
    origins, directions = box.normalize(*cameras.rays(5, 5))
    reach = torch.stack([(-1 - origins) / directions, (1 - origins) / directions])
    near, far = reach.amin(0).amax(-1), reach.amax(0).amin(-1)
    return shown.any(-1) | ((far >= near) & (far > 0)).any(-1)
