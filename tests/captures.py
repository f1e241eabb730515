"""Photographs of a known object through known lenses, as a capture: images/, masks/, sparse/0."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentscenes.core.cameras import Cameras, look_at
from latentscenes.data.raycast import RayCaster, TriangleSoup
from latentscenes.data.shading import Lights

LENSES = {
    "PINHOLE": (1.3, 1.25, 0.52, 0.47),
    "SIMPLE_RADIAL": (1.3, 0.5, 0.5, -0.12),
    "OPENCV": (1.3, 1.28, 0.51, 0.48, -0.2, 0.06, 0.003, -0.002),
    "OPENCV_FISHEYE": (1.1, 1.1, 0.5, 0.5, -0.03, 0.01, 0.0, 0.0),
}
"""Parameters with focal lengths in widths of the photograph, and principal points as fractions of it."""


@dataclass(frozen=True)
class World:
    """COLMAP's world: a point p of the true one lies at scale · rotation p + shift."""

    scale: float
    rotation: np.ndarray
    shift: np.ndarray

    def moved(self, points: np.ndarray) -> np.ndarray:
        return self.scale * points @ self.rotation.T + self.shift


def any_world(seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return World(
        float(rng.uniform(2, 7)), rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3) * 20
    )


def walk_around(count: int, seed: int = 0, roll: float = 0.05) -> Cameras:
    """Hand-held cameras around the origin: two heights, not quite level or aimed. Ignore focal lengths."""
    rng = np.random.default_rng(seed)
    azimuth = np.arange(count) * 2 * np.pi * 2 / count + rng.normal(size=count) * 0.05
    height = (
        np.where(np.arange(count) < count / 2, np.radians(18), np.radians(48)) + rng.normal(size=count) * 0.04
    )
    outward = np.stack(
        [np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)], -1
    )
    eyes = outward * rng.uniform(1.9, 2.4, (count, 1))
    aims = rng.normal(size=(count, 3)) * 0.08
    matrices = [look_at(torch.tensor(eye - aim)[None].float())[0] for eye, aim in zip(eyes, aims)]
    for matrix, eye, turn in zip(matrices, eyes, rng.normal(size=count) * roll):
        c, s = float(np.cos(turn)), float(np.sin(turn))
        matrix[:, :3] = matrix[:, :3] @ torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        matrix[:, 3] = torch.tensor(eye)
    return Cameras(torch.stack(matrices), torch.ones(count, 4))


def write_capture(
    folder: Path,
    soup: TriangleSoup,
    cameras: Cameras,
    world: World,
    lens: str = "OPENCV",
    size: tuple[int, int] = (120, 160),
    cut_out: bool = False,
    text: bool = False,
    lights: Lights | None = None,
    samples: int = 2,
) -> None:
    """Photographs of `size` (height, width) before a colored, noisy background, their masks (or, `cut_out`,
    transparent photographs and no masks), and the model."""
    import pycolmap

    height, width = size
    params = np.array(LENSES[lens], float)
    lengths = 1 if lens.startswith("SIMPLE") else 2
    params[:lengths] *= width
    params[lengths : lengths + 2] *= (width, height)
    camera = pycolmap.Camera(model=lens, width=width, height=height, params=params, camera_id=1)
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(camera)
    for part in ("images", "sparse/0") if cut_out else ("images", "masks", "sparse/0"):
        (folder / part).mkdir(parents=True)
    caster, rng = RayCaster(soup, lights), np.random.default_rng(1)
    for place, matrix in enumerate(cameras.cam2world.double().numpy()):
        rgb, alpha = _photograph(caster, camera, matrix, samples)
        rotation = world.rotation @ matrix[:, :3]
        position = world.moved(matrix[:, 3])
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation.T), -rotation.T @ position)
        name = f"IMG_{place}.png"
        image = pycolmap.Image(name=name, camera_id=1, image_id=place + 1)
        model.add_image_with_trivial_frame(image, pose)
        if cut_out:
            color = np.where(
                alpha[..., None] > 0, (rgb - 1 + alpha[..., None]) / np.maximum(alpha[..., None], 1e-6), 0
            )
            picture = np.concatenate([color, alpha[..., None]], -1)
        else:
            behind = np.array([0.3, 0.5, 0.4]) + 0.1 * rng.normal(size=(height, width, 3))
            picture = rgb + (behind - 1) * (1 - alpha[..., None])
            _save(alpha, folder / "masks" / name)
        _save(picture, folder / "images" / name)
    write = model.write_text if text else model.write_binary
    write(str(folder / "sparse" / "0"))


def _photograph(caster: RayCaster, camera, matrix: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Color over white (h w 3) and coverage (h w), fractions, through a pycolmap camera at `matrix`."""
    rows, columns = np.mgrid[: camera.height * samples, : camera.width * samples]
    pixels = (np.stack([columns, rows], -1).reshape(-1, 2) + 0.5) / samples
    toward = np.concatenate([camera.cam_from_img(pixels), np.ones((len(pixels), 1))], 1) @ matrix[:, :3].T
    toward /= np.linalg.norm(toward, axis=1, keepdims=True)
    origins = np.broadcast_to(matrix[:, 3], toward.shape)
    color, rest = caster.trace(origins.astype(np.float32), toward.astype(np.float32))
    fine = np.concatenate([color + rest[:, None], 1 - rest[:, None]], -1)
    values = fine.reshape(camera.height, samples, camera.width, samples, 4).mean((1, 3))
    return values[..., :3], values[..., 3]


def _save(values: np.ndarray, file: Path) -> None:
    Image.fromarray((255 * values.clip(0, 1) + 0.5).astype(np.uint8)).save(file)
