"""What is object in a photograph: masks in files of their own, or the photographs' transparency."""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from latentscenes.core.errors import UserError
from latentscenes.data.images import read_image
from latentscenes.data.photos.colmap import Photograph

CUT_OFF = 0.01
"""Share of the border's pixels on the object from which a photograph counts as cutting the object off."""


def find_masks(folder: Path, photographs: list[Photograph]) -> dict[str, Path]:
    """The mask of each photograph of a capture, by its name: masks/NAME.png, or masks/NAME.jpg.png as COLMAP itself wants
    them. Empty if there is no such folder: then photographs must be transparent around the object."""
    masks = folder / "masks"
    if not masks.is_dir():
        return {}
    found = {}
    for photograph in photographs:
        choices = [masks / f"{photograph.name}.png", (masks / photograph.name).with_suffix(".png")]
        if (mask := next((choice for choice in choices if choice.is_file()), None)) is not None:
            found[photograph.name] = mask
    if missing := [photograph.name for photograph in photographs if photograph.name not in found]:
        raise UserError(
            f"{masks / Path(missing[0]).with_suffix('.png')}: no such mask; {len(missing)} of {len(photographs)} photographs "
            "have none. To leave a photograph out, give it a mask that is black all over."
        )
    return found


def read_cut_out(photograph: Photograph, masks: dict[str, Path]) -> tuple[Image.Image, Image.Image]:
    """The photograph over white (RGB) and its mask (L, 255 on the object), of one shape."""
    rgb, alpha = read_image(photograph.file)
    picture = Image.fromarray(rgb)
    if masks:
        mask = read_mask(photograph, masks)
        return Image.composite(picture, Image.new("RGB", picture.size, "white"), mask), mask
    if alpha is None or alpha.min() == 255:
        raise UserError(
            f"{photograph.file}: nothing says what is object and what background, and a background cannot be learned. Either "
            f"give {Path('masks', photograph.name).with_suffix('.png')} beside images/, white on the object and black "
            "elsewhere, and so for all photographs (programs such as rembg or Segment Anything make them); or cut the object "
            "out of all photographs, so that they are transparent around it (PNG)."
        )
    return picture, Image.fromarray(alpha)


def read_mask(photograph: Photograph, masks: dict[str, Path]) -> Image.Image:
    """The mask alone (L, 255 on the object). A mask that is itself transparent somewhere speaks by its transparency."""
    if not masks:
        return read_cut_out(photograph, masks)[1]
    file = masks[photograph.name]
    rgb, alpha = read_image(file)
    mask = rgb.max(-1) if alpha is None or alpha.min() == 255 else alpha
    with Image.open(photograph.file) as image:
        width, height = image.size
    if mask.shape != (height, width):
        raise UserError(
            f"{file}: is {mask.shape[1]}x{mask.shape[0]} (width x height), its photograph {width}x{height}. Make masks of the "
            "photographs as they are, neither reduced nor turned (some programs turn them as EXIF says, COLMAP does not)."
        )
    if mask.max() == 1:
        raise UserError(f"{file}: holds only 0 and 1, which is all but black. Write 255 on the object.")
    return Image.fromarray(mask)


def shows(mask: Image.Image) -> Literal["all", "part", "nothing"]:
    """How much of the object its mask says the photograph shows; `part` if it goes on beyond the border."""
    on = np.asarray(mask) >= 128
    if not on.any():
        return "nothing"
    border = np.concatenate([on[0], on[-1], on[:, 0], on[:, -1]])
    return "part" if border.mean() >= CUT_OFF else "all"
