"""Chosen scenes as one HTML file that turns them, offline: every scene's orbit is a sheet of small pictures (WebP with
alpha) inside the page, and dragging shows one or another."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Box, Cameras, Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, write_bytes, writing_to
from latentscenes.data.images import white_background
from latentscenes.export.video import check_elevation, scaled
from latentscenes.model.model import RenderedImages, render_images, to_uint8
from latentscenes.storage.scene_set import SceneSet

TEMPLATE = Path(__file__).with_name("page.html")
QUALITY = 80
"""Of WebP, of 100."""
FIRST = 40.0
"""Azimuth of the first picture, degrees: where thumbnails are taken from."""
TOGETHER = 64
"""Pictures held at full size."""
LONGEST = 16383
"""Pixels along a side of a WebP picture at most."""


def write_page(
    path: str | Path,
    loaded: SceneSet,
    view: Viewpoint,
    scenes: Iterable[str],
    *,
    title: str = "Learned scenes",
    frames: int = 36,
    size: int | None = None,
    elevations: Sequence[float] = (20.0,),
) -> int:
    """Write the page; its size in bytes.

    Args:
        path: .html file.
        view: how the scenes' dataset looks at them.
        frames: pictures of one turn.
        size: pixels along the wider side of a picture, a multiple of the codec's downsampling; unset: as in the data.
        elevations: degrees above the horizon, ascending; with more than one, dragging up and down looks from higher or lower.

    Raises:
        UserError: `size` does not suit the codec, numbers are out of range, or a sheet would be too large.
    """
    if frames < 1 or not elevations:
        raise UserError(f"--frames {frames}, {len(elevations)} elevations: at least 1 of each.")
    for elevation in elevations:
        check_elevation("--elevations", elevation)
    height, width = size_shown = scaled(view.size, size, loaded.model.codec.downsampling)
    orbits = [view.orbit(frames, elevation, FIRST) for elevation in sorted(elevations)]
    cameras = Cameras(
        torch.cat([turn.cam2world for turn in orbits]), torch.cat([turn.intrinsics for turn in orbits])
    )
    window = window_on(loaded.model.box, cameras, (height, width))
    height, width = (edge.stop - edge.start for edge in window)
    columns = math.ceil(math.sqrt(len(cameras)))
    if columns * max(height, width) > LONGEST:
        raise UserError(
            f"--size: sheets of {len(cameras)} pictures of {width}x{height} are too large for WebP; choose fewer or smaller ones."
        )
    entries = []
    for scene in scenes:
        parts = torch.arange(len(cameras)).split(TOGETHER)
        tiles = [
            with_alpha(render_images(loaded.model, loaded.planes(scene), cameras[part], size_shown))[
                :, *window
            ]
            for part in parts
        ]
        entries.append(
            {"name": scene, "sheet": base64.b64encode(_webp(sheet(np.concatenate(tiles), columns))).decode()}
        )
    data = {
        "frames": frames,
        "rows": len(orbits),
        "columns": columns,
        "lines": math.ceil(len(cameras) / columns),
        "scenes": entries,
    }
    embedded = json.dumps(data).replace("</", "<\\/")
    many = "1 scene" if len(entries) == 1 else f"{len(entries)} scenes"
    summary = f"{many}, {len(cameras)} views of {width}×{height} pixels each; {len(embedded) / 2**20:.1f} MiB, all in this file."
    slots = {
        "title": html.escape(title),
        "summary": summary,
        "aspect": f"{width / height:.4g}",
        "least": str(max(150, min(260, round(1.6 * width)))),
        "data": embedded,
    }
    content = re.sub(r"{{(\w+)}}", lambda slot: slots[slot[1]], TEMPLATE.read_text("utf-8")).encode()
    with writing_to(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), content)
    return len(content)


def window_on(box: Box, cameras: Cameras, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of pictures of that height and width within which the box appears to any of the cameras."""
    places, depth = cameras.project(box.corners())
    if (depth <= 0).any():
        return slice(0, size[0]), slice(0, size[1])
    low, high = places.amin((0, 1)).tolist(), places.amax((0, 1)).tolist()
    rows, columns = (
        slice(max(0, math.floor(low[k] * side) - 1), min(side, math.ceil(high[k] * side) + 1))
        for k, side in ((1, size[0]), (0, size[1]))
    )
    return rows, columns


def sheet(pictures: UInt8[np.ndarray, "v H W 4"], columns: int) -> UInt8[np.ndarray, "h w 4"]:
    """Pictures row by row, edge to edge, `columns` in each row; transparent where none is left."""
    count, height, width, _ = pictures.shape
    lines = math.ceil(count / columns)
    tiles = np.zeros((lines * columns, height, width, 4), np.uint8)
    tiles[:count] = pictures
    rows = tiles.reshape(lines, columns, height, width, 4).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(rows.reshape(lines * height, columns * width, 4))


def _webp(picture: UInt8[np.ndarray, "h w 4"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", quality=QUALITY, method=4)
    return stream.getvalue()


# Posed pictures


def with_alpha(shown: RenderedImages) -> UInt8[np.ndarray, "v H W 4"]:
    """Pictures with straight alpha that, put over white, are the rendered ones.

    White that reaches to the border is transparent: the field may well hold white matter there, which pictures over
    white cannot tell from nothing. Elsewhere a pixel is as opaque as rendered, beside that white as little as its color
    allows, and never less than that.
    """
    over_white = shown.images.movedim(1, -1).numpy()
    ground = white_background(to_uint8(shown.images))
    near_ground = (
        torch.nn.functional.max_pool2d(torch.from_numpy(ground).float()[:, None], 3, 1, 1)[:, 0].numpy() > 0
    )
    least = 1 - over_white.min(-1)
    alpha = np.where(near_ground, least, np.maximum(least, shown.opacity.numpy()))
    alpha = np.where(ground, 0, np.ceil(255 * alpha - 1e-3) / 255)[..., None]
    color = np.where(alpha > 0, (over_white - (1 - alpha)) / np.maximum(alpha, 1 / 255), 1.0)
    return np.round(255 * np.concatenate([color, alpha], -1).clip(0, 1)).astype(np.uint8)


def write_views(
    out: str | Path, loaded: SceneSet, scenes: Iterable[str], cameras: Cameras, size: tuple[int, int]
) -> None:
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
                for file, picture in zip(
                    files,
                    with_alpha(render_images(loaded.model, loaded.planes(scene), cameras, size)),
                    strict=True,
                ):
                    Image.fromarray(picture).save(folder / file)
                (folder / "transforms.json").write_text(
                    json.dumps(transforms(cameras, files, size), indent=1)
                )
            if out.exists():
                out.rmdir()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def transforms(cameras: Cameras, files: list[str], size: tuple[int, int]) -> dict:
    """nerfstudio's description of pictures: OpenGL axes, focal lengths and centers in pixels of `size` (height, width)."""
    height, width = size
    frames = []
    for file, matrix, intrinsics in zip(files, cameras.cam2world, cameras.intrinsics.tolist(), strict=True):
        rotation = matrix[:, :3] @ OPENGL_TO_OPENCV
        rows = [*torch.cat([rotation, matrix[:, 3:]], 1).tolist(), [0.0, 0.0, 0.0, 1.0]]
        fx, fy, cx, cy = intrinsics
        frames.append(
            {
                "file_path": file,
                "transform_matrix": rows,
                "fl_x": fx * width,
                "fl_y": fy * height,
                "cx": cx * width,
                "cy": cy * height,
            }
        )
    return {"camera_model": "OPENCV", "w": width, "h": height, "frames": frames}
