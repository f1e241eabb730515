"""Pictures made of pictures: tiles side by side with captions, greys, and a colour map for depth. numpy and PIL only."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "_H _W 3"]
Pictures = UInt8[np.ndarray, "_v _H _W 3"]
"""Underscores: sizes of one picture say nothing about those of another in the same signature."""

GAP = 4
"""Pixels between tiles."""
CAPTION = 15
"""Height of a line of small text, in pixels."""
INK, FAINT = (38, 42, 51), (112, 118, 130)

DEPTH_COLOURS = np.array(
    [(252, 206, 92), (247, 156, 70), (233, 100, 82), (194, 64, 112), (140, 56, 136), (86, 60, 146), (46, 66, 132), (22, 48, 88)], np.float64
)
"""Near to far: gold, red, violet, night blue. All of it stands out from a white ground."""


def colour_depth(depth: Float[np.ndarray, "v H W"], opacity: Float[np.ndarray, "v H W"], ends: tuple[float, float]) -> Pictures:
    """Depth between `ends` (near, far) by DEPTH_COLOURS, fading to white with opacity (in [0, 1])."""
    place = np.clip((depth - ends[0]) / (ends[1] - ends[0]), 0, 1) * (len(DEPTH_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(DEPTH_COLOURS) - 2)
    share = (place - low)[..., None]
    colours = DEPTH_COLOURS[low] * (1 - share) + DEPTH_COLOURS[low + 1] * share
    solid = np.clip(opacity, 0, 1)[..., None]
    return np.round(colours * solid + 255 * (1 - solid)).astype(np.uint8)


def grey(values: Float[np.ndarray, "v H W"], ends: tuple[float, float]) -> Pictures:
    """Values from ends[0] (black) to ends[1] (white)."""
    span = ends[1] - ends[0]
    shade = np.clip((values - ends[0]) / (span if abs(span) > 1e-9 else 1e-9), 0, 1)
    return np.repeat(np.round(255 * shade).astype(np.uint8)[..., None], 3, -1)


def enlarge(pictures: Pictures, size: tuple[int, int]) -> Pictures:
    """To (height, width), pixels staying squares."""
    rows = (np.arange(size[0]) + 0.5) * pictures.shape[1] / size[0]
    columns = (np.arange(size[1]) + 0.5) * pictures.shape[2] / size[1]
    return np.ascontiguousarray(pictures[:, rows.astype(int)][:, :, columns.astype(int)])


def beside(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """In a row on white, tops aligned."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return canvas


def stacked(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """One below the other on white, left edges aligned."""
    turned = beside([picture.transpose(1, 0, 2) for picture in pictures], gap)
    return np.ascontiguousarray(turned.transpose(1, 0, 2))


def grid(pictures: Sequence[Picture], across: int) -> Picture:
    """Row by row, `across` in each, with some air between and around."""
    across = min(across, len(pictures))
    lines = [beside(pictures[k * across : (k + 1) * across], 4 * GAP) for k in range(math.ceil(len(pictures) / across))]
    return np.pad(stacked(lines, 2 * GAP), ((2 * GAP, 2 * GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=255)


def captioned(picture: Picture, text: str) -> Picture:
    """With a line of small text below."""
    return stacked([picture, _line(text, picture.shape[1], FAINT)], gap=0)


def headed(picture: Picture, text: str) -> Picture:
    """With a line of text above."""
    return stacked([_line(text, picture.shape[1], INK), picture], gap=1)


def _line(text: str, width: int, colour: tuple[int, int, int]) -> Picture:
    """One line of text on white, cut with an ellipsis to `width` pixels."""
    font = _font()
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    image = Image.new("RGB", (width, CAPTION), (255, 255, 255))
    ImageDraw.Draw(image).text((0, 0), text, fill=colour, font=font)
    return np.array(image)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)
