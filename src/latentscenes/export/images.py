"""Sets of posed pictures of learned scenes, as `data transforms`, nerfstudio and others read them.

    OUT/SCENE/transforms.json
    OUT/SCENE/images/00000.png …     RGBA, straight alpha
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, writing_to
from latentscenes.data.images import white_background
from latentscenes.export.pictures import Shown, look, to_pictures
from latentscenes.storage.scene_set import Loaded


def with_alpha(shown: Shown) -> UInt8[np.ndarray, "v H W 4"]:
    """Pictures with straight alpha that, put over white, are the rendered ones.

    White that reaches to the border is transparent: the field may well hold white matter there, which pictures over
    white cannot tell from nothing. Elsewhere a pixel is as opaque as rendered, beside that white as little as its colour
    allows, and never less than that.
    """
    over_white = shown.images.movedim(1, -1).numpy()
    ground = white_background(to_pictures(shown.images))
    near_ground = torch.nn.functional.max_pool2d(torch.from_numpy(ground).float()[:, None], 3, 1, 1)[:, 0].numpy() > 0
    least = 1 - over_white.min(-1)
    alpha = np.where(near_ground, least, np.maximum(least, shown.opacity.numpy()))
    alpha = np.where(ground, 0, np.ceil(255 * alpha - 1e-3) / 255)[..., None]
    color = np.where(alpha > 0, (over_white - (1 - alpha)) / np.maximum(alpha, 1 / 255), 1.0)
    return np.round(255 * np.concatenate([color, alpha], -1).clip(0, 1)).astype(np.uint8)


def write_views(out: str | Path, loaded: Loaded, scenes: Iterable[str], cameras: Cameras, size: tuple[int, int]) -> None:
    """One folder per scene, with a picture from each camera and their transforms.json.

    Args:
        out: folder for all scenes, absent or empty; it appears under its name only when complete.
        size: height and width, pixels.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder. Name another, or remove it first.")
    check_place(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    with writing_to(out):
        try:
            for scene in scenes:
                folder = partial / scene.replace("/", "_")
                (folder / "images").mkdir(parents=True)
                files = [f"images/{place:05d}.png" for place in range(len(cameras))]
                for file, picture in zip(files, with_alpha(look(loaded.model, loaded.planes(scene), cameras, size)), strict=True):
                    Image.fromarray(picture).save(folder / file)
                (folder / "transforms.json").write_text(json.dumps(transforms(cameras, files, size), indent=1))
            if out.exists():
                out.rmdir()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def transforms(cameras: Cameras, files: list[str], size: tuple[int, int]) -> dict:
    """nerfstudio's description of pictures: OpenGL axes, focal lengths and centres in pixels of `size` (height, width)."""
    height, width = size
    frames = []
    for file, matrix, intrinsics in zip(files, cameras.cam2world, cameras.intrinsics.tolist(), strict=True):
        rotation = matrix[:, :3] @ OPENGL_TO_OPENCV
        rows = [*torch.cat([rotation, matrix[:, 3:]], 1).tolist(), [0.0, 0.0, 0.0, 1.0]]
        fx, fy, cx, cy = intrinsics
        frames.append({"file_path": file, "transform_matrix": rows, "fl_x": fx * width, "fl_y": fy * height, "cx": cx * width, "cy": cy * height})
    return {"camera_model": "OPENCV", "w": width, "h": height, "frames": frames}
