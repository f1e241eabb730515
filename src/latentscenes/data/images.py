"""Reads images as a dataset stores them: 8 bits, RGB over white, and a separate silhouette."""

import io
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

from latentscenes.core.errors import UserError
from latentscenes.core.reading import reason, require_regular
from latentscenes.data.lenses import Lens

MOST_PIXELS = 1 << 26
"""Pixels of the largest image that is decoded, and of all images that are decoded at one time."""
WHITE = 250
"""A pixel counts as white if all its channels reach this value."""
ORIENTATION = 274
"""EXIF tag that says how to turn the stored pixels."""


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Returns `call(item)` for every item, computed in as many threads as torch has, but at most 8. An error
    cancels calls not yet started."""
    with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        tasks = [pool.submit(call, item) for item in items]
        try:
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


def image_size(path: Path) -> tuple[int, int]:
    """Reads height and width from the file's header."""
    with open_image(path) as image:
        return image.height, image.width


def require_upright(path: Path) -> None:
    """Raises a UserError if the file's EXIF orientation turns or mirrors the picture.

    Programs disagree on such files: some turn the picture before they find its camera, others do not.
    """
    with open_image(path) as image:
        orientation = image_orientation(image)
    if orientation not in (0, 1):  # writers of 0 mean "unknown"
        raise UserError(
            f"{path}: its EXIF orientation ({orientation}) turns the picture, so it is unclear whether the "
            "camera is that of the picture as stored or as shown. Turn the pixels and remove the tag (such "
            "as by ImageMagick's mogrify -auto-orient) if the camera is that of the picture as shown; else "
            "remove the tag alone (exiftool -Orientation=)."
        )


def image_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if there is none that can be read."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode it to search on
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF may break its reader in any way; the picture itself may be whole
        return 1


class _PixelBudget:
    """Lets threads decode images at one time as long as they have MOST_PIXELS in all: a small file may hold a
    large picture."""

    def __init__(self):
        self._free, self._changed = MOST_PIXELS, threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for `pixels`, and holds it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = _PixelBudget()


def read_image(
    path: Path, size: tuple[int, int] | None = None, mask: Path | None = None, lens: Lens | None = None
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
    """Reads RGB over white, and alpha (0 … 255) if the file has it.

    Reads every format that Pillow reads; gray, palette and 16-bit images become 8-bit RGB, and colors of a
    profile (ICC) become sRGB.

    Args:
        size: height and width, to which the image is reduced by averaging; enlarging is refused.
        mask: an image that is white on the object; it is the alpha if the file has none, or all opaque.
        lens: distortion to undo.
    """
    with open_image(path) as image, _budget.of(image.width * image.height):
        pixels, has_alpha = _decoded(image, path)
        if mask is not None and not (has_alpha and pixels[..., 3].min() < 255):
            pixels, has_alpha = np.dstack([pixels[..., :3], read_silhouette(mask, pixels.shape[:2])]), True
        rgb, alpha = (over_white(pixels), pixels[..., 3]) if has_alpha else (pixels, None)
        if lens is not None:
            rgb = lens.undistorted(rgb)
            alpha = None if alpha is None else lens.undistorted(alpha[..., None])[..., 0]
    if size is not None and size != rgb.shape[:2]:
        if size[0] > rgb.shape[0] or size[1] > rgb.shape[1]:
            raise UserError(
                f"{path}: is {rgb.shape[1]}x{rgb.shape[0]} (width x height), smaller than the wanted "
                f"{size[1]}x{size[0]}. Choose a smaller size."
            )
        rgb = _shrink(rgb, size)
        alpha = None if alpha is None else _shrink(alpha, size)
    return rgb, alpha


def _decoded(image: Image.Image, path: Path) -> tuple[UInt8[np.ndarray, "H W c"], bool]:
    """Returns RGB or RGBA of an opened image, and whether there is alpha."""
    try:
        image.load()
    except Exception as error:  # a broken image may break its reader in any way
        raise UserError(
            f"{path}: cannot be decoded ({reason(error)}); it is damaged. Get it again."
        ) from None
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    profile = _profile(image, path)
    if image.mode == "F":
        raise UserError(f"{path}: holds floating-point values; convert it to 8 or 16 bits first.")
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip it
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image, has_alpha = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)), False
    if profile is not None:
        return _as_srgb(image, profile, has_alpha, path), has_alpha
    mode = "RGBA" if has_alpha else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode)), has_alpha


def _as_srgb(
    image: Image.Image, profile: ImageCms.ImageCmsProfile, has_alpha: bool, path: Path
) -> UInt8[np.ndarray, "H W c"]:
    """Returns RGB or RGBA in sRGB of a picture whose colors a profile describes, relative to its white."""
    space = profile.profile.xcolor_space.strip()
    plain = image if image.mode == space == "CMYK" else image.convert("L" if space == "GRAY" else "RGB")
    try:
        rgb = ImageCms.profileToProfile(
            plain, profile, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB",
            flags=ImageCms.Flags.NOCACHE,
        )  # fmt: skip
    except Exception as error:  # a profile for other colors, or a damaged one
        raise _unfit(path, error) from None
    alpha = [np.asarray(image.convert("RGBA").getchannel("A"))] if has_alpha else []
    return np.dstack([np.asarray(rgb), *alpha])


def _profile(image: Image.Image, path: Path) -> ImageCms.ImageCmsProfile | None:
    """Returns the color profile (ICC) in a picture, such as Display P3; None without one, and for sRGB."""
    if not (content := image.info.get("icc_profile")):
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        return None if "sRGB" in ImageCms.getProfileDescription(profile) else profile
    except Exception as error:
        raise _unfit(path, error) from None


def _unfit(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: its color profile (ICC) cannot be used ({reason(error)}). Save the picture with sRGB "
        "colors, or remove the profile (exiftool -icc_profile:all=) if they are sRGB already."
    )


def read_silhouette(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """Reads a mask, 255 on the object and 0 elsewhere. The alpha of a partly transparent file counts.

    Args:
        size: height and width of its photograph.

    Raises:
        UserError: the mask has another size, or holds only 0 and 1.
    """
    with open_image(path) as image:
        pixels, has_alpha = _decoded(image, path)
    cut_out = has_alpha and pixels[..., 3].min() < 255
    mask = pixels[..., 3] if cut_out else pixels[..., :3].max(-1)
    if mask.shape != tuple(size):
        raise UserError(
            f"{path}: is {mask.shape[1]}x{mask.shape[0]} (width x height), its photograph "
            f"{size[1]}x{size[0]}. Make masks of the photographs as stored, neither reduced nor rotated "
            "(some programs apply the EXIF rotation, COLMAP does not)."
        )
    if mask.max() == 1:
        raise UserError(f"{path}: holds only 0 and 1, which is nearly black. Write 255 on the object.")
    return mask


def over_white(rgba: UInt8[np.ndarray, "*b 4"]) -> UInt8[np.ndarray, "*b 3"]:
    """Composites straight (not premultiplied) alpha over white, rounded to the nearest level."""
    over = np.empty((*rgba.shape[:-1], 3), np.uint8)
    for row, target in zip(rgba, over):  # a whole image of 16-bit numbers would be large
        alpha = row[..., 3:].astype(np.uint16)
        target[...] = (row[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return over


def white_background(rgb: UInt8[np.ndarray, "v H W 3"]) -> Bool[np.ndarray, "v H W"]:
    """Finds white pixels that are connected to the image's border through white pixels."""
    white = (rgb >= WHITE).all(-1)
    background = np.zeros_like(white)
    background[:, [0, -1]] = white[:, [0, -1]]
    background[:, :, [0, -1]] = white[:, :, [0, -1]]
    reached = -1
    while (count := int(background.sum())) != reached:
        reached = count
        # Sweep over rows and columns, there and back
        for axes in ((0, 1, 2), (0, 2, 1)):
            lines, passable = background.transpose(axes), white.transpose(axes)
            for k in range(1, lines.shape[1]):
                lines[:, k] |= lines[:, k - 1] & passable[:, k]
            for k in range(lines.shape[1] - 2, -1, -1):
                lines[:, k] |= lines[:, k + 1] & passable[:, k]
    return background


def border_is_white(rgb: UInt8[np.ndarray, "v H W 3"]) -> bool:
    """Returns whether at least nine in ten border pixels are white."""
    edges = [rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]]
    return bool(np.concatenate([(edge >= WHITE).all(-1).ravel() for edge in edges]).mean() >= 0.9)


def open_image(path: Path) -> Image.Image:
    """Opens an image file without decoding it. Raises a UserError if there is none, or it has more than
    MOST_PIXELS."""
    try:
        require_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            image = Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image. Restore it, or remove its camera.") from None
    except UnidentifiedImageError:
        if path.suffix.lower() in (".exr", ".hdr"):
            raise UserError(
                f"{path}: pictures of linear light (OpenEXR, Radiance) are not read. Write them as PNG or "
                "JPEG with sRGB colors, all with one exposure (such as by ImageMagick: magick a.exr a.png), "
                "and change their names in the file that lists them."
            ) from None
        raise UserError(f"{path}: is not an image, or damaged. Get the file again.") from None
    except Exception as error:  # a broken header may break its reader in any way
        raise UserError(f"{path}: cannot be opened ({reason(error)}).") from None
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise UserError(
            f"{path}: has {image.width}x{image.height} pixels; {MOST_PIXELS >> 20} million are the most. "
            "Reduce it first."
        )
    return image


def _shrink(pixels: UInt8[np.ndarray, "*b"], size: tuple[int, int]) -> UInt8[np.ndarray, "*c"]:
    image = Image.fromarray(pixels)
    if image.width % size[1] == 0 and image.height % size[0] == 0:  # blocks of whole pixels: rounded once
        return np.asarray(image.reduce((image.width // size[1], image.height // size[0])))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX))
