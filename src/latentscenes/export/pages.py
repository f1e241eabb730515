"""Writes scenes as one HTML file that turns them without a network, and as folders of posed pictures.

The page holds each scene's orbit as a sheet of small pictures (WebP with alpha). Dragging selects the picture
shown."""

import base64
import hashlib
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from latentscenes.core.cameras import OPENGL_TO_OPENCV, Box, Cameras, Viewpoint
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, make_folder, partial_path, publish, writing_to
from latentscenes.core.names import counted, file_names, one_line, tags_text
from latentscenes.data.dataset import box_of
from latentscenes.export.sheets import cut, save_file, short_names
from latentscenes.export.video import check_elevation, scaled
from latentscenes.model.model import render_images
from latentscenes.model.pictures import Backdrop, over, with_alpha
from latentscenes.storage.scene_set import SceneSet

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
"""Templates of pages."""
QUALITY = 80
"""WebP quality, out of 100."""
FIRST = 40.0
"""Azimuth of the first picture, in degrees; the page shows this picture first."""
CAPTION = 28
"""Longest caption, in characters."""
TOGETHER = 64
"""Number of pictures held in memory at full size."""
LONGEST = 16383
"""Largest side of a WebP picture, in pixels."""


def write_page(
    path: str | Path,
    loaded: SceneSet,
    view: Viewpoint,
    scenes: Sequence[str],
    *,
    title: str = "Learned scenes",
    frames: int = 36,
    size: int | None = None,
    elevations: Sequence[float] = (20.0,),
) -> int:
    """Writes the page and returns its size in bytes.

    Args:
        path: .html file.
        view: how the cameras of the scenes' dataset look at them.
        frames: number of pictures in one turn.
        size: pixels along the wider side of a picture, a multiple of the codec's downsampling; unset: as in
            the data.
        elevations: degrees above the horizon. With more than one, dragging up and down changes the elevation.

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
    # All pictures are cut to the window that shows every box
    boxes = [loaded.model.box_of(loaded.planes(scene)) for scene in scenes]
    window = window_on(box_of(boxes), cameras, (height, width))
    height, width = (edge.stop - edge.start for edge in window)
    columns = math.ceil(math.sqrt(len(cameras)))
    if columns * max(height, width) > LONGEST:
        raise UserError(
            f"--size: sheets of {len(cameras)} pictures of {width}x{height} are too large for WebP; "
            "choose fewer or smaller pictures."
        )
    entries, captions = [], short_names(loaded.names)
    for scene in tracked(scenes, "rendering"):
        pictures = sheet(_tiles(loaded, scene, cameras, size_shown, window), columns)
        packed = base64.b64encode(_webp(pictures)).decode()
        entries.append(described(loaded, scene, captions[scene]) | {"sheet": packed})
    grid = {"rows": len(orbits), "columns": columns, "lines": math.ceil(len(cameras) / columns)}
    total = sum(len(entry["sheet"]) for entry in entries)
    views = f"{counted(len(cameras), 'view')} of {width}×{height} pixels each"
    page = page_with(
        Path(__file__).with_name("page.js").read_text("utf-8"),
        {"frames": frames, **grid, "scenes": entries},
        title=one_line(title),
        summary=f"{how_many(len(entries), len(loaded.names))}, {views}; {total / 2**20:.1f} MiB in one file.",
        aspect=f"{width / height:.4g}",
        least=max(150, min(260, round(1.6 * width))),
    )
    return save_file(path, page.encode())


def page_with(script: str, data: dict[str, Any], **texts: str | int) -> str:
    """Returns a page with a script, the only one that may run there, and the data that it reads. `texts` are
    what the template shows."""
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return TEMPLATES.get_template("page.html").render(script=script, seal=seal, data=data, **texts)


def how_many(count: int, total: int) -> str:
    """Returns how many of the scenes a page shows, in words."""
    return f"{count} of {total} scenes" if count < total else counted(count, "scene")


def described(loaded: SceneSet, scene: str, caption: str) -> dict[str, str]:
    """A scene as the scripts of pages read it."""
    return {"name": scene, "caption": cut(caption, CAPTION), "about": tags_text(loaded.tags(scene))}


def window_on(box: Box, cameras: Cameras, size: tuple[int, int]) -> tuple[slice, slice]:
    """Returns the rows and columns, in pictures of `size` (height, width), that show the box to at least one
    camera."""
    places, depth = cameras.project(box.corners())
    if (depth <= 0).any():
        return slice(0, size[0]), slice(0, size[1])
    low, high = places.amin((0, 1)).tolist(), places.amax((0, 1)).tolist()
    rows, columns = (
        slice(max(0, math.floor(low[k] * side) - 1), min(side, math.ceil(high[k] * side) + 1))
        for k, side in ((1, size[0]), (0, size[1]))
    )
    return rows, columns


def _tiles(
    loaded: SceneSet, scene: str, cameras: Cameras, size: tuple[int, int], window: tuple[slice, slice]
) -> UInt8[np.ndarray, "v h w 4"]:
    """Pictures of a scene with alpha, cropped to a window."""
    planes, parts = loaded.planes(scene), torch.arange(len(cameras)).split(TOGETHER)
    shown = (render_images(loaded.model, planes, cameras[part], size, adaptive=True) for part in parts)
    known = loaded.silhouettes(scene)
    return np.concatenate([with_alpha(pictures, known)[:, *window] for pictures in shown])


def sheet(pictures: UInt8[np.ndarray, "v H W 4"], columns: int) -> UInt8[np.ndarray, "h w 4"]:
    """Puts pictures edge to edge in rows of `columns`. Places without a picture are transparent."""
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


def write_views(
    out: str | Path,
    loaded: SceneSet,
    scenes: Sequence[str],
    cameras: Cameras,
    size: tuple[int, int],
    background: Backdrop = "transparent",
) -> None:
    """Writes one folder per scene, with a picture from each camera and their transforms.json. Letters of a
    name that no folder can have become `_`.

    Args:
        out: folder for all scenes, absent or empty. It gets its name only when it is complete.
        size: height and width, pixels.
        background: what lies behind the object.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder. Name another folder, or remove it first.")
    check_place(out)
    partial, chosen = partial_path(out), list(scenes)
    folders = file_names(chosen)
    with writing_to(out):
        make_folder(out.parent)
        try:
            for scene in tracked(chosen, "exporting"):
                folder, known = partial / folders[scene], loaded.silhouettes(scene)
                (folder / "images").mkdir(parents=True)
                files = [f"images/{place:05d}.png" for place in range(len(cameras))]
                shown = render_images(loaded.model, loaded.planes(scene), cameras, size)
                for file, picture in zip(files, over(with_alpha(shown, known), background), strict=True):
                    Image.fromarray(picture).save(folder / file)
                described = json.dumps(transforms(cameras, files, size), indent=1)
                (folder / "transforms.json").write_text(described)
            publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def transforms(cameras: Cameras, files: list[str], size: tuple[int, int]) -> dict:
    """Describes pictures as nerfstudio does: OpenGL axes, focal lengths and centers in pixels of `size`
    (height, width)."""
    height, width = size
    frames = []
    for file, matrix, intrinsics in zip(files, cameras.cam2world, cameras.intrinsics.tolist(), strict=True):
        rotation = matrix[:, :3] @ OPENGL_TO_OPENCV
        rows = [*torch.cat([rotation, matrix[:, 3:]], 1).tolist(), [0.0, 0.0, 0.0, 1.0]]
        fx, fy, cx, cy = intrinsics
        lengths = {"fl_x": fx * width, "fl_y": fy * height, "cx": cx * width, "cy": cy * height}
        frames.append({"file_path": file, "transform_matrix": rows, **lengths})
    return {"camera_model": "OPENCV", "w": width, "h": height, "frames": frames}
