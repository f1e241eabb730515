"""Chosen scenes as one HTML file that turns them, offline: every scene's orbit is a sheet of small pictures (WebP with
alpha) inside the page, and dragging shows one or another."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from latentscenes.core.cameras import Box, Cameras, Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.core.files import write_bytes, writing_to
from latentscenes.export.images import with_alpha
from latentscenes.export.pictures import check_elevation, look, scaled
from latentscenes.storage.scene_set import Loaded

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
    loaded: Loaded,
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
    cameras = Cameras(torch.cat([turn.cam2world for turn in orbits]), torch.cat([turn.intrinsics for turn in orbits]))
    window = window_on(loaded.model.box, cameras, (height, width))
    height, width = (edge.stop - edge.start for edge in window)
    columns = math.ceil(math.sqrt(len(cameras)))
    if columns * max(height, width) > LONGEST:
        raise UserError(f"--size: sheets of {len(cameras)} pictures of {width}x{height} are too large for WebP; choose fewer or smaller ones.")
    entries = []
    for scene in scenes:
        parts = torch.arange(len(cameras)).split(TOGETHER)
        tiles = [with_alpha(look(loaded.model, loaded.planes(scene), cameras[part], size_shown))[:, *window] for part in parts]
        entries.append({"name": scene, "sheet": base64.b64encode(_webp(sheet(np.concatenate(tiles), columns))).decode()})
    data = {"frames": frames, "rows": len(orbits), "columns": columns, "lines": math.ceil(len(cameras) / columns), "scenes": entries}
    embedded = json.dumps(data).replace("</", "<\\/")
    many = "1 scene" if len(entries) == 1 else f"{len(entries)} scenes"
    summary = f"{many}, {len(cameras)} views of {width}×{height} pixels each; {len(embedded) / 2**20:.1f} MiB, all in this file."
    slots = {
        "title": html.escape(title), "summary": summary, "aspect": f"{width / height:.4g}", "least": str(max(150, min(260, round(1.6 * width)))),
        "data": embedded,
    }  # fmt: skip
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
    rows, columns = (slice(max(0, math.floor(low[k] * side) - 1), min(side, math.ceil(high[k] * side) + 1)) for k, side in ((1, size[0]), (0, size[1])))
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
