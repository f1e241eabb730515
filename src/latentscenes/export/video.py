"""Films: frames from orbits and from nerfstudio camera paths, and the files they are saved to.

Depth and opacity are rendered at image resolution, although images are decoded from latents of lower
resolution. The density is a function of space, so it can be rendered at any resolution.
"""

import io
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from latentscenes.core.cameras import FARTHEST, LONGEST_SIDE, OPENGL_TO_OPENCV, Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, make_folder, partial_path, publish, writing_to
from latentscenes.core.names import short
from latentscenes.core.reading import read_json
from latentscenes.data.dataset import spread_evenly
from latentscenes.export.sheets import (
    Picture,
    Pictures,
    captioned,
    channel_tiles,
    color_depth,
    depth_range,
    gray,
    grid,
    in_row,
    save_image,
)
from latentscenes.model.model import CHUNK, RenderedImages, render_images, to_uint8
from latentscenes.model.pictures import Backdrop, over, with_alpha
from latentscenes.storage.scene_set import SceneSet

PictureMode = Literal["rgb", "colors", "depth", "opacity", "latent", "dashboard"]
PIXELS = 1 << 19
"""Pixels rendered at once at most, unless one picture has more."""
SAMPLES = 8
"""Number of frames that set the scale of depth and latent channels for the whole film."""


def camera_frames(
    loaded: SceneSet,
    scene: str,
    cameras: Cameras,
    size: tuple[int, int],
    mode: PictureMode = "rgb",
    background: Backdrop = "white",
) -> Iterator[Picture]:
    """Yields pictures of a scene from any cameras and holds only a few at a time.

    Args:
        size: height and width, multiples of the codec's downsampling.
        background: what lies behind the object, in mode `rgb`.
    """
    planes, geometry = (
        loaded.planes(scene),
        mode in ("depth", "opacity", "dashboard") or background != "white",
    )
    some = torch.tensor(spread_evenly(list(range(len(cameras))), SAMPLES))
    like = (
        None
        if mode in ("rgb", "colors", "opacity")
        else render_images(loaded.model, planes, cameras[some], size, geometry, adaptive=True)
    )
    for chunk in torch.arange(len(cameras)).split(max(1, min(CHUNK, PIXELS // (size[0] * size[1])))):
        shown = render_images(
            loaded.model, planes, cameras[chunk], size, geometry, adaptive=True, decoded=mode != "colors"
        )
        if mode in ("rgb", "colors") and background != "white":
            yield from over(with_alpha(shown, loaded.silhouettes(scene)), background)
            continue
        yield from _frames(shown, like or shown, mode, size[0])


def _frames(shown: RenderedImages, like: RenderedImages, mode: PictureMode, height: int) -> Pictures:
    """Makes pictures of `shown`, with depth and latent channels scaled as in `like`."""
    if mode in ("rgb", "colors"):
        return to_uint8(shown.images)
    if mode == "depth":
        return color_depth(shown.depth.numpy(), shown.opacity.numpy(), depth_range(like))
    if mode == "opacity":
        return gray(shown.opacity.numpy(), (1.0, 0.0))
    if mode == "latent":
        return channel_tiles(shown.latents, like.latents, height)
    labels = ("image", "latent channels", "depth", "opacity")
    panels = [_frames(shown, like, part, height) for part in ("rgb", "latent", "depth", "opacity")]
    return np.stack(
        [
            in_row([captioned(panel[k], label) for label, panel in zip(labels, panels, strict=True)])
            for k in range(len(panels[0]))
        ]
    )


def scaled(stored: tuple[int, int], size: int | None, step: int) -> tuple[int, int]:
    """Returns height and width of pictures with the aspect of `stored` and `size` pixels along the wider
    side, both multiples of `step`."""
    if size is None:
        return stored
    if size < step or size % step:
        raise UserError(
            f"--size {size}: must be a multiple of the codec's downsampling, {step}; "
            f"try {max(step, round(size / step) * step)}."
        )
    height, width = (max(step, round(side * size / max(stored) / step) * step) for side in stored)
    return height, width


def check_elevation(option: str, elevation: float) -> None:
    """Refuses an elevation outside [−90, 90] degrees; `option` is its name in the message."""
    if not -90 <= elevation <= 90:
        raise UserError(f"{option} {elevation:g}: degrees above the horizon, from -90 to 90.")


# Files


def check_film(path: str | Path, background: Backdrop = "white") -> None:
    """Refuses, before anything is rendered, a name that `save_frames` cannot write to. Transparent pictures
    go into a folder only."""
    path = Path(path)
    if background == "transparent" and path.suffix:
        raise UserError(
            f"{path}: transparent pictures are written into a folder (a name without an ending). "
            "Name one, or choose --background white or black."
        )
    if path.suffix.lower() not in (".mp4", ".gif", ".png", ""):
        raise UserError(
            f"{path}: frames are written as .mp4, .gif or .png, or into a folder (a name without an ending)."
        )
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path}: exists and is not an empty folder. Name another folder, or remove it first."
        )
    if path.suffix and path.is_dir():
        raise UserError(
            f"{path}: this is a folder. Name a file, or for a folder of pictures a name without an ending."
        )
    check_place(path)
    if path.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError(
                f"{path}: writing .mp4 needs PyAV. Run pip install latentscenes[export], or write a .gif."
            ) from None


def save_frames(path: str | Path, frames: Iterable[Picture], fps: int | float = 20) -> None:
    """Writes a film (.mp4, which needs the export extra, or .gif), all frames in one picture, in
    rows (.png), or numbered PNG files into a new folder (a name without an ending)."""
    path = Path(path)
    check_film(path)
    kind, partial = path.suffix.lower(), partial_path(path)
    with writing_to(path):
        make_folder(path.parent)
        try:
            if kind == ".mp4":
                _save_mp4(partial, frames, fps)
            elif kind == ".gif":
                partial.write_bytes(gif_bytes(list(frames), fps))
            elif kind == ".png":
                shown = list(frames)
                columns = math.ceil(math.sqrt(len(shown) * shown[0].shape[0] / shown[0].shape[1]))
                save_image(partial, grid(shown, len(shown) if len(shown) <= 6 else max(1, columns)))
            else:
                partial.mkdir()
                for place, frame in enumerate(frames):
                    Image.fromarray(frame).save(partial / f"{place:05d}.png")
            publish(partial, path)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)


def _save_mp4(path: Path, frames: Iterable[Picture], fps: int | float) -> None:
    """Writes H.264 that browsers play. Odd sides are padded by a pixel."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), pix_fmt="yuv420p", options={"crf": "16"}
        )
        for place, frame in enumerate(frames):
            odd = [(0, side % 2) for side in frame.shape[:2]]
            even = np.pad(frame, (*odd, (0, 0)), mode="edge")
            if place == 0:
                stream.height, stream.width = even.shape[:2]
            film.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        film.mux(stream.encode())


def gif_bytes(frames: Sequence[Picture], fps: int | float) -> bytes:
    """Encodes an animated GIF. All frames share one palette, so the file is small and colors do not
    flicker."""
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames])
    colored = pixels[(pixels != 255).any(1)]
    sample = colored[:: max(1, len(colored) // 120_000)] if len(colored) else np.zeros((1, 3), np.uint8)
    chosen = Image.fromarray(sample[None]).quantize(255, Image.Quantize.MEDIANCUT).getpalette()[: 3 * 255]
    white = len(chosen) // 3
    images = []
    palette = Image.new("P", (1, 1))
    palette.putpalette(chosen)
    for frame in frames:
        index = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        index[(frame == 255).all(-1)] = white  # the background stays exactly white
        image = Image.fromarray(index)
        image.putpalette([*chosen, 255, 255, 255])
        images.append(image)
    stream = io.BytesIO()
    timing = {"duration": max(20, round(100 / fps) * 10), "loop": 0}  # milliseconds
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], optimize=False, **timing)
    return stream.getvalue()


# Camera paths

FPS = 24.0
"""Used if the file has neither `fps` nor `seconds`; nerfstudio's own default."""


@dataclass(frozen=True)
class CameraPath:
    """A camera for each frame of a film."""

    cameras: Cameras
    size: tuple[int, int]
    """Height and width that the path was made for, pixels."""
    fps: float
    """Frames per second."""

    def at(self, size: tuple[int, int]) -> Cameras:
        """Returns the cameras for another height and width. The vertical angle of view stays and pixels are
        square."""
        intrinsics = self.cameras.intrinsics.clone()
        intrinsics[:, 0] = intrinsics[:, 1] * size[0] / size[1]
        return Cameras(self.cameras.cam2world, intrinsics)


def read_camera_path(path: str | Path) -> CameraPath:
    """Reads a nerfstudio camera path (JSON).

    Raises:
        UserError: the file is absent or not a camera path, or its cameras are not pinhole cameras.
    """
    path = Path(path)
    content = read_json(path, "Save a camera path in nerfstudio's viewer.")
    frames = content.get("camera_path")
    if not isinstance(frames, list) or not frames:
        raise UserError(
            f'{path}: not a nerfstudio camera path: it needs a list "camera_path" with one entry per frame.'
        )
    if (kind := content.get("camera_type", "perspective")) != "perspective":
        raise UserError(f"{path}: camera_type is {short(kind)}, but only perspective cameras are supported.")
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
    if max(height, width) > LONGEST_SIDE:
        raise UserError(f"{path}: pictures of {width:g}x{height:g}; sides of {LONGEST_SIDE} are the most.")
    if content.get("fps"):
        fps = _number(content, "fps", path)
    else:
        fps = len(frames) / _number(content, "seconds", path) if content.get("seconds") else FPS
    return CameraPath(Cameras(cam2world, intrinsics), (round(height), round(width)), fps)


def _number(content: dict[str, Any], key: str, label: object) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= FARTHEST:
        raise UserError(f"{label}: {key} must be a number above 0, not {short(value)}.")
    return float(value)


def _matrix(numbers: Any, label: str) -> torch.Tensor:
    """Returns the upper three rows (3, 4) of 16 numbers."""
    try:
        matrix = torch.tensor(numbers, dtype=torch.float32).reshape(4, 4)[:3]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{label}: camera_to_world must be 16 numbers, row by row.") from None
    turned = matrix[:, :3] @ matrix[:, :3].T
    if not torch.isfinite(matrix).all() or not torch.allclose(turned, torch.eye(3), atol=1e-2):
        raise UserError(f"{label}: camera_to_world must be a rotation and a translation.")
    return matrix
