"""Reading images as the dataset holds them: 8 bits, RGB over white, silhouettes apart."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from latentscenes.core.errors import UserError

WHITE = 250
"""A pixel whose channels all reach this counts as white background."""


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, from the file's header alone."""
    with _opened(path) as image:
        return image.height, image.width


def read_image(
    path: Path, size: tuple[int, int] | None = None
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
    """RGB over white, and alpha (0 … 255) if the file has any.

    PNG, JPEG and whatever else Pillow reads; gray, palette and 16-bit images become 8-bit RGB. `size` (height, width)
    averages the pixels that fall into each new one; enlarging is refused.
    """
    with _opened(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be decoded ({error}); it looks truncated or damaged. Get the file again."
            ) from None
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        if image.mode == "F":
            raise UserError(f"{path}: holds floating-point values; convert it to 8 or 16 bits first.")
        if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip it
            image = Image.fromarray(
                ((np.asarray(image).astype(np.int64).clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8)
            )
            has_alpha = False
        pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    rgb, alpha = (over_white(pixels), pixels[..., 3]) if has_alpha else (pixels, None)
    if size is not None and size != rgb.shape[:2]:
        if size[0] > rgb.shape[0] or size[1] > rgb.shape[1]:
            raise UserError(
                f"{path}: is {rgb.shape[1]}x{rgb.shape[0]} (width x height), smaller than the wanted {size[1]}x{size[0]}. "
                "Ask for a smaller size."
            )
        rgb = _shrink(rgb, size)
        alpha = None if alpha is None else _shrink(alpha, size)
    return rgb, alpha


def over_white(rgba: UInt8[np.ndarray, "*b 4"]) -> UInt8[np.ndarray, "*b 3"]:
    """Straight (not premultiplied) alpha composited over white, rounded to the nearest level."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def white_background(rgb: UInt8[np.ndarray, "v H W 3"]) -> Bool[np.ndarray, "v H W"]:
    """White pixels that connect to the image's border through white pixels; white parts inside an object stay object."""
    white = (rgb >= WHITE).all(-1)
    background = np.zeros_like(white)
    background[:, [0, -1]] = white[:, [0, -1]]
    background[:, :, [0, -1]] = white[:, :, [0, -1]]
    reached = -1
    while (count := int(background.sum())) != reached:
        reached = count
        for lines, open_lines in (
            (background, white),
            (background.transpose(0, 2, 1), white.transpose(0, 2, 1)),
        ):
            for here, before in [(k, k - 1) for k in range(1, lines.shape[1])] + [
                (k, k + 1) for k in range(lines.shape[1] - 2, -1, -1)
            ]:
                lines[:, here] |= lines[:, before] & open_lines[:, here]
    return background


def border_is_white(rgb: UInt8[np.ndarray, "v H W 3"]) -> bool:
    """Whether at least nine in ten border pixels are white: objects photographed on, or rendered over, white."""
    edges = [rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]]
    return bool(np.concatenate([(edge >= WHITE).all(-1).ravel() for edge in edges]).mean() >= 0.9)


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such image, though the dataset names it. Restore it, or remove its camera."
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: is not an image that can be read (damaged, empty, or of another kind). Get the file again."
        ) from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be opened ({error}).") from None


def _shrink(pixels: UInt8[np.ndarray, "*b"], size: tuple[int, int]) -> UInt8[np.ndarray, "*c"]:
    image = Image.fromarray(pixels)
    if image.width % size[1] == 0 and image.height % size[0] == 0:  # blocks of whole pixels: rounded once
        return np.asarray(image.reduce((image.width // size[1], image.height // size[0])))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX))
