"""Parents of new libraries: models that come with the package, and the checks that a parent fits.

A model is the shared parts of a library without scenes:

pretrained/NAME/library.json, config.yaml, index.sqlite    as in a library
pretrained/NAME/model/*.safetensors                        in half precision
pretrained/NAME/CARD.md                                    training data, method, scores
"""

import dataclasses
import math
from pathlib import Path

import torch

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.files import (
    file_checksum,
    make_folder,
    now,
    open_tensors,
    partial_path,
    publish,
    write_bytes,
    write_with_checksum,
    writing_to,
)
from latentscenes.core.options import StoragePrecision
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.description import find_model, read_description, refuse_inside
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.library import SHARED, START, LibraryFolder
from latentscenes.storage.run import Run
from latentscenes.storage.tensors import read_tensors, write_tensors

KEPT = (
    "format", "box", "view", "precision", "parent_seconds", "parent_cpu_seconds", "parent_scenes",
    "finetuned_from", "versions",
)  # fmt: skip
"""Entries of library.json that `export_model` copies."""


def open_parent(path: Path) -> Run | LibraryFolder:
    """Opens a run, a library, or a packaged model by its name. Raises a UserError if it is none of these."""
    found = find_model(path)
    return LibraryFolder.open(found) if LibraryFolder.exists(found) else Run.open(found)


def export_model(source: LibraryFolder, out: Path) -> int:
    """Writes the shared parts of a library, in half precision and without scenes, to a new folder. Returns
    the size of the model files in bytes. Raises a UserError if `out` exists or cannot be written.

    The index is written without a journal, so that reading it leaves no files beside it.
    """
    if out.exists():
        raise UserError(f"{out}: exists already. Name another folder.")
    refuse_inside(out)
    with writing_to(out):
        make_folder(out.parent)
        partial = partial_path(out)
        (partial / "model").mkdir(parents=True)
    files = [partial / "model" / name for name in (SHARED, START)]
    for file in files:
        tensors = read_tensors(source.path / "model" / file.name, source.remedy)
        write_tensors(file, {key: tensor.half() for key, tensor in tensors.items()})
    Index.create(partial / FILE, "DELETE").close()
    write_bytes(partial / "config.yaml", (source.path / "config.yaml").read_bytes())
    known = read_description(source.path)
    checksums = {file.name: file_checksum(file) for file in files}
    facts = {key: known[key] for key in KEPT if key in known}
    write_with_checksum(
        partial / "library.json", facts | {"parent": out.name, "checksums": checksums, "made": now()}
    )
    with writing_to(out):
        publish(partial, out)
    return sum((out / "model" / file.name).stat().st_size for file in files)


def library_from_model(
    out: Path, source: LibraryFolder, config: Config, precision: StoragePrecision | None
) -> LibraryFolder:
    """Creates an empty library with the shared parts of another library or of a packaged model.

    Args:
        precision: default for new scenes; None: the default of `source`.

    Raises:
        UserError: `out` is a library already or holds other files.
    """
    info = dataclasses.replace(source.info, precision=precision or source.info.precision)
    return LibraryFolder.create(out, config, info, source.model(), source.starting_scene())


# Checks that a parent fits


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
    with open_tensors(library.shared_file) as ours, open_tensors(parent.shared_file) as theirs:
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
    """Refuses objects that exceed the learned box by more than BOX_TOLERANCE, and says what would fit."""
    scale = _largest_scale(images.box, box)
    if scale >= 1:
        return
    reaches = _reaches(images.box, box)
    axis = max(range(3), key=lambda one: reaches[one] / box.half[one])
    learned = ",".join(f"{number:g}" for number in (*box.center, *box.half))
    turned = _largest_scale(_quarter_turned(images.box), box)
    smaller = math.floor(100 * max(scale, turned)) / 100
    if turned >= 1:
        remedy = "--turn 90 (a quarter turn; or -90 if that turns their front to -x)"
    elif turned > scale:
        remedy = f"--turn 90 --scale {smaller:g} (a quarter turn, and smaller)"
    else:
        remedy = f"--scale {smaller:g} (smaller)"
    model = parent.name if parent.parent.name == "pretrained" else parent
    raise UserError(
        f"{images.path}: objects reach {reaches[axis]:.3f} from the center along {'xyz'[axis]}, but the box "
        f"of {model} ends at {box.half[axis]:.3f}, so they would be cut off. Add --fit to this command: it "
        "finds out how the objects must be turned, and scales them. Or do it yourself: latentscenes data "
        f"place --folder {images.path} --out {images.path}_placed {remedy}. If only the box fitted to the "
        "silhouettes is larger than the objects, give `data srn` or `data transforms` the learned box: "
        f"--box {learned}. Or train a model of these objects."
    )


def enlargement(images: PosedImages, box: Box) -> float:
    """Returns how much larger the objects could be in a model's box; below 1 if they exceed it."""
    return _largest_scale(images.box, box)


def _reaches(part: Box, box: Box) -> list[float]:
    """Returns how far `part` reaches from the center of `box` along each axis."""
    return [
        abs(inner - center) + half
        for inner, center, half in zip(part.center, box.center, part.half, strict=True)
    ]


def _largest_scale(part: Box, box: Box) -> float:
    """Returns the largest scale about the center of `box` at which `part` fits, BOX_TOLERANCE included."""
    reaches = _reaches(part, box)
    return min(BOX_TOLERANCE * half / reach for half, reach in zip(box.half, reaches, strict=True))


def _quarter_turned(box: Box) -> Box:
    """Returns the box after a quarter turn about the vertical axis through the origin."""
    (x, y, z), (a, b, c) = box.center, box.half
    return Box((-y, x, z), (b, a, c))
