"""A ray-traced ellipsoid and its cameras, written in every layout that can be imported."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Box, Cameras, upper_hemisphere
from latentscenes.data.dataset import PosedImages

SIDE = 48
CENTER, SEMI = np.array([0.05, -0.04, 0.08]), np.array([0.42, 0.2, 0.15])
"""The ellipsoid that is drawn."""


def around(count: int, lowest: float = 0.0, seed: int = 0) -> Cameras:
    return upper_hemisphere(count, torch.Generator().manual_seed(seed), lowest=lowest)


def silhouettes(cameras: Cameras, side: int = SIDE, center=CENTER, semi=SEMI) -> np.ndarray:
    """Where each camera sees the ellipsoid, by intersecting rays with it (v side side booleans)."""
    pixel = (np.arange(side) + 0.5) / side
    masks = []
    for matrix, (fx, fy, cx, cy) in zip(
        cameras.cam2world.double().numpy(), cameras.intrinsics.double().numpy(), strict=True
    ):
        x, y = np.meshgrid((pixel - cx) / fx, (pixel - cy) / fy)
        direction = np.stack([x, y, np.ones_like(x)], -1) @ matrix[:, :3].T / semi
        origin = (matrix[:, 3] - center) / semi
        along, squared = direction @ origin, (direction**2).sum(-1)
        masks.append(along**2 - squared * (origin @ origin - 1) > 0)
    return np.stack(masks)


def pictures(cameras: Cameras, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """The ellipsoid in random colors, on white (v side side 3)."""
    colors = np.random.default_rng(seed).integers(0, 240, (len(cameras), side, side, 3), dtype=np.uint8)
    return np.where(silhouettes(cameras, side)[..., None], colors, np.uint8(255))


def write_object(folder: Path, cameras: Cameras, images: np.ndarray, intrinsics: str | None = None) -> None:
    """One object in ShapeNet-SRN's layout."""
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / "rgb" / f"{place:06d}.png")
        numbers = [*cameras.cam2world[place].reshape(-1).tolist(), 0.0, 0.0, 0.0, 1.0]
        (folder / "pose" / f"{place:06d}.txt").write_text(" ".join(repr(number) for number in numbers))
    focal = 1.025 * SIDE
    (folder / "intrinsics.txt").write_text(
        intrinsics or f"{focal} {SIDE / 2} {SIDE / 2} 0.\n0. 0. 0.\n1.\n{SIDE} {SIDE}\n"
    )


def write_transforms(
    folder: Path,
    cameras: Cameras,
    images: np.ndarray,
    name: str = "transforms.json",
    part: str = "images",
    **top,
) -> None:
    """One scene, or one part of it, in nerfstudio's and Blender's layout."""
    (folder / part).mkdir(parents=True)
    frames = []
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / part / f"r_{place}.png")
        matrix = torch.eye(4)
        matrix[:3] = cameras.cam2world[place]
        matrix[:3, :3] = matrix[:3, :3] @ OPENGL_TO_OPENCV
        frames.append({"file_path": f"./{part}/r_{place}", "transform_matrix": matrix.tolist()})
    top = top or {"camera_angle_x": 2 * math.atan(0.5 / 1.025)}
    (folder / name).write_text(json.dumps({**top, "frames": frames}))


def same_cameras(views: PosedImages, index: list[int], cameras: Cameras) -> None:
    found = views.cameras[torch.tensor(index)]
    assert torch.equal(found.cam2world, cameras.cam2world)
    assert torch.allclose(found.intrinsics, cameras.intrinsics, atol=1e-6)


def holds_ellipsoid(box: Box, slack: float) -> None:
    """The box reaches as far as the ellipsoid, and at most `slack` farther."""
    low, high = np.subtract(box.center, box.half), np.add(box.center, box.half)
    assert (low <= CENTER - SEMI).all() and (high >= CENTER + SEMI).all(), box
    assert (low >= CENTER - SEMI - slack).all() and (high <= CENTER + SEMI + slack).all(), box


def converted(cameras: Cameras, what: str) -> Cameras:
    """Cameras stored by another convention than the one they will be read by."""
    rotation, position = cameras.cam2world[:, :, :3], cameras.cam2world[:, :, 3:]
    if "inverse" in what:
        rotation, position = rotation.mT, -rotation.mT @ position
    if "opengl" in what:
        rotation = rotation @ OPENGL_TO_OPENCV
    return Cameras(torch.cat([rotation, position], -1), cameras.intrinsics)
