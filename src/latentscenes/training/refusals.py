"""Checks before new scenes are learned. Each raises UserError with advice."""

from pathlib import Path

import torch
from safetensors import safe_open

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run

BOX_TOLERANCE = 1.02
"""Factor by which new objects may exceed the learned box. Beyond it they would be cut off."""


def refuse_no_stages(config: Config) -> None:
    """Refuses a configuration without exploit stages."""
    if not config.exploit:
        raise UserError("configuration: `exploit` lists no stages, so there is nothing to learn.")


def refuse_other_settings(theirs: Config, config: Config, where: Path) -> None:
    """Refuses model settings other than those of the run or library `where`."""
    for part in ("codec", "normalizer", "planes", "field", "render"):
        if getattr(theirs, part) != getattr(config, part):
            raise UserError(
                f"configuration: {part} differs from {where}. New scenes need that model's settings."
            )


def refuse_other_model(library: LibraryFolder, parent: Run | LibraryFolder) -> None:
    """Refuses a parent other than the one that the library was made from."""
    with safe_open(library.shared_file, "pt") as ours, safe_open(parent.shared_file, "pt") as theirs:
        names = set(ours.keys())
        same = names == set(theirs.keys()) and all(
            torch.equal(ours.get_tensor(name), theirs.get_tensor(name).to(torch.float32)) for name in names
        )
    if not same:
        raise UserError(
            f"{library.path}: this library was made from {library.info.parent}, not from {parent.path}. "
            "Leave --run out, or name another folder with --out."
        )


def refuse_larger(images: PosedImages, box: Box, parent: Path) -> None:
    """Refuses objects that exceed the learned box by more than BOX_TOLERANCE."""
    for axis, name in enumerate("xyz"):
        reach = abs(images.box.center[axis] - box.center[axis]) + images.box.half[axis]
        if reach > BOX_TOLERANCE * box.half[axis]:
            learned = ",".join(f"{number:g}" for number in (*box.center, *box.half))
            raise UserError(
                f"{images.path}: objects reach {reach:.3f} from the center along {name}, but the box of "
                f"{parent} ends at {box.half[axis]:.3f}, so they would be cut off. Make the dataset again at "
                "the same scale, or train with render.half_side set. If only the box fitted to the "
                "silhouettes is larger than the objects, give `data srn` or `data transforms` the learned "
                f"box: --box {learned}"
            )
