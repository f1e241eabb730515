"""nerfstudio's camera paths: the JSON that its viewer saves and `ns-render camera-path` reads.

Notable:
- `fov` is the vertical angle of view in degrees, and pixels are square.
- Matrices are camera-to-world, 16 numbers row by row, with OpenGL axes (y up, looking along −z), world z up.
- They are taken to live in the world of the learned scenes: a nerfstudio model keeps that world only if it was trained
  without moving, turning or scaling its cameras (docs/export.md).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Cameras
from latentscenes.core.errors import UserError

FPS = 24.0
"""Where the file says neither `fps` nor `seconds`; nerfstudio's own default."""


@dataclass(frozen=True)
class CameraPath:
    """A camera for each frame of a film."""

    cameras: Cameras
    size: tuple[int, int]
    """Height and width that the film was made for, pixels."""
    fps: float
    """Frames per second."""

    def at(self, size: tuple[int, int]) -> Cameras:
        """The cameras for pictures of another height and width: the vertical angle of view stays, pixels are square."""
        intrinsics = self.cameras.intrinsics.clone()
        intrinsics[:, 0] = intrinsics[:, 1] * size[0] / size[1]
        return Cameras(self.cameras.cam2world, intrinsics)


def read_camera_path(path: str | Path) -> CameraPath:
    """A camera path of nerfstudio's.

    Raises:
        UserError: the file is absent, is no camera path, or its cameras are no pinhole cameras.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Save a camera path in nerfstudio's viewer.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    frames = content.get("camera_path") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path}: no camera path of nerfstudio's: it needs a list \"camera_path\" with one entry per frame.")
    if (kind := content.get("camera_type", "perspective")) != "perspective":
        raise UserError(f"{path}: camera_type is {kind!r}, but only perspective cameras are rendered here.")
    height, width = (_number(content, key, path) for key in ("render_height", "render_width"))
    matrices, focal = [], []
    for place, frame in enumerate(frames):
        label = f"{path}: camera_path[{place}]"
        if not isinstance(frame, dict):
            raise UserError(f"{label}: must hold camera_to_world and fov.")
        matrices.append(_matrix(frame.get("camera_to_world"), label))
        angle = _number(frame, "fov", label)
        if angle >= 180:
            raise UserError(f"{label}: fov is {angle:g}; it must lie between 0 and 180 degrees.")
        focal.append(0.5 / math.tan(math.radians(angle) / 2))
    cam2world = torch.stack(matrices)
    cam2world[:, :, :3] = cam2world[:, :, :3] @ OPENGL_TO_OPENCV
    intrinsics = torch.tensor([[fy * height / width, fy, 0.5, 0.5] for fy in focal])
    seconds = content.get("seconds")
    fps = content.get("fps") or (len(frames) / seconds if isinstance(seconds, int | float) and seconds > 0 else FPS)
    return CameraPath(Cameras(cam2world, intrinsics), (round(height), round(width)), float(fps))


def _number(content: dict[str, Any], key: str, label: object) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{label}: {key} must be a number above 0, not {value!r}.")
    return float(value)


def _matrix(numbers: Any, label: str) -> torch.Tensor:
    """The upper three rows (3, 4) of 16 numbers."""
    try:
        matrix = torch.tensor(numbers, dtype=torch.float32).reshape(4, 4)[:3]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{label}: camera_to_world must be 16 numbers, row by row.") from None
    turned = matrix[:, :3] @ matrix[:, :3].T
    if not torch.isfinite(matrix).all() or not torch.allclose(turned, torch.eye(3), atol=1e-2):
        raise UserError(f"{label}: camera_to_world is no rotation and translation.")
    return matrix
