"""Import of posed images into a packed dataset: the part shared by all layouts.

A reader of one layout lists its scenes and opens each as a `Source`. `import_scenes` then checks cameras,
reads images, fits the box and writes the dataset. It holds one scene's images at a time, in a temporary file
if they are large.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.core.names import no_folder
from latentscenes.data.boxes import (
    Extent,
    carving_views,
    fit_extent,
    parse_box,
    small_masks,
    union_box,
    visible_cube,
)  # fmt: skip
from latentscenes.data.catalog import listed, tags_of_folders
from latentscenes.data.checks import check_cameras, upright_axis
from latentscenes.data.dataset import Split, spread
from latentscenes.data.images import (
    border_is_white,
    image_size,
    in_parallel,
    read_image,
    require_upright,
    white_background,
)
from latentscenes.data.lenses import Lens
from latentscenes.data.options import Axes, Background, ImportOptions
from latentscenes.data.placing import fitting, rotation_of
from latentscenes.data.splits import choose_splits, natural_key
from latentscenes.data.writing import DatasetWriter

IN_MEMORY = 512 << 20
"""Scenes with more bytes of pixels than this are gathered in a temporary file."""


Pictures = list[tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]]
FOR_EACH = "around all objects; each has a box of its own inside"
"""What `Imported.box_from` adds where objects have boxes of their own."""


@dataclass(frozen=True)
class Source:
    """The files of one scene: v images and their cameras, in the order of the dataset."""

    images: tuple[Path, ...]
    cameras: Cameras
    camera_files: tuple[Path | str, ...]
    """Origin of each camera, for error messages."""
    held_out: tuple[int, ...] | None = None
    """Views that the source itself marks for evaluation; None if it marks none."""
    masks: tuple[Path | None, ...] = ()
    """Silhouettes of the images in files of their own, white on the object; () if there are none."""
    lenses: tuple[Lens | None, ...] = ()
    """Distortions to undo; () if there are none. `cameras` are those of the undistorted images."""

    def read(
        self, place: int, size: tuple[int, int] | None, masked: bool
    ) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
        """Reads one image: RGB over white, and its alpha or (if `masked`) mask; undistorted, of the wanted
        size."""
        mask = self.masks[place] if self.masks and masked else None
        return read_image(self.images[place], size, mask, self.lenses[place] if self.lenses else None)


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    path: Path
    scenes: int
    views: int
    size: tuple[int, int]
    """Height and width."""
    box: Box
    box_from: str
    """How the box was found, for people."""
    background: Background
    """Kind of background that was assumed."""
    notes: tuple[str, ...]
    """Remarks for people: scenes left out by the split file, unused parts of the source."""


def import_scenes(
    origin: Path,
    names: list[str],
    load: Callable[[str], Source],
    out: str | Path,
    options: ImportOptions,
    axes: Axes,
    notes: Sequence[str] = (),
) -> Imported:
    """Packs scenes into a dataset at `out`.

    Args:
        origin: the folder they come from.
        names: all scenes; `options` may select some.
        load: opens one scene; may append to `notes`.
        out: the dataset to make; must not exist or be an empty folder.
        options: size, box, background, splits and held-out views.
        axes: camera axes of the files, for error messages.
        notes: remarks to return in the result.
    """
    splits = _choose(origin, names, options)
    tags, remarks = tags_of_folders(options.catalog, origin, names)
    box = None if options.box is None else parse_box(options.box)
    first = load(next(iter(splits)))
    size = _target_size(first.images[0], options)
    background = _background(first, options, size)
    has_alpha = background == "alpha" or (background == "white" and options.alpha_from_white)
    resize = None if options.size is None and options.reduce == 1 else size
    extents, views, unused, tilted = [], 0, [], {}
    with DatasetWriter(out, size, has_alpha, f"{origin}") as writer:
        for place, (name, split) in enumerate(tracked(splits.items(), "importing scenes")):
            source = load(name) if place else first
            _check_source(name, source, None if options.fit else box, axes)
            if source.masks and background != "alpha":
                unused.append(name)
            if options.up == "auto" and (up := upright_axis(source.cameras)) not in (None, "z"):
                tilted.setdefault(up, []).append(name)
            # Images and alpha; cameras are moved, so that objects are turned and scaled
            cameras = source.cameras.placed(rotation_of(options), options.scale)
            images, alpha = _read(source, resize, size, background == "alpha", writer.partial)
            if has_alpha and alpha is None:
                alpha = np.where(white_background(images), np.uint8(0), np.uint8(255))
            if box is None or options.fit:
                extents.append(_extent(name, cameras, images, alpha, background))
            if options.fit:
                cameras = cameras.placed(None, *fitting(union_box(extents[-1:]), box))
            own = union_box(extents[-1:]) if options.boxes == "object" else None
            held_out = source.held_out
            if held_out is None:
                held_out = _spread(name, len(images), options.held_out)
            writer.add(name, images, cameras, split, held_out, alpha, own, tags.get(name))
            views += len(images)
        box = box or union_box(extents)
        writer.finish(box)
    remarks += _remarks(unused, tilted, background)
    if left_out := 0 if options.limit else len(names) - len(splits):
        omitted = f"{left_out} of {len(names)} scenes are not listed in {options.split} and were left out"
        remarks.append(omitted)
    found = _box_from(options, background)
    return Imported(Path(out), len(splits), views, size, box, found, background, (*notes, *remarks))


def _box_from(options: ImportOptions, background: Background) -> str:
    """How the box was found, for people."""
    if options.box is not None:
        return "given"
    if background == "unknown":
        found = "the space that the cameras see (unknown background; a box given by hand may be tighter)"
    else:
        found = "fitted to the silhouettes"
    return f"{found}, {FOR_EACH}" if options.boxes == "object" else found


def _remarks(unused: list[str], tilted: dict[str, list[str]], background: Background) -> list[str]:
    """Notes for people: scenes whose masks are not used, and whose cameras stand upright along another
    axis than z."""
    remarks = []
    if unused:
        remarks.append(
            f"masks are not used, as the background is taken as {background}: {listed(unused)}. Where they "
            "are white on the object alone, add --background alpha"
        )
    for up, names in tilted.items():
        remarks.append(
            f"the cameras stand upright along {up}, but the dataset's z is up: {listed(names)}. If objects "
            f"should stand upright, add --up {up}"
        )
    return remarks


def subfolders(folder: Path) -> list[Path]:
    """Returns the folders inside in natural order of names, without hidden ones and archive leftovers."""
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return [folder / name for name in sorted(names, key=natural_key) if not is_leftover(name)]


def is_leftover(name: str) -> bool:
    """Returns whether a file is hidden, or a leftover of a Mac's archives: `._NAME` or `__MACOSX`."""
    return name.startswith((".", "__MACOSX"))


def require_file_name(path: str, source: Path | str) -> str:
    """Returns a file's path that `source` states. Raises a UserError if no file can have it, for a null
    character or half of a surrogate pair."""
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise UserError(f"{source}: no file can be named {path!r}. Correct the name.")


def open_folder(folder: str | Path) -> Path:
    """Returns the path if it is a folder that holds something."""
    folder = Path(folder)
    if not folder.is_dir():
        raise no_folder(folder)
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: is empty; nothing to import.")
    return folder


def _choose(origin: Path, names: list[str], options: ImportOptions) -> dict[str, Split]:
    """Returns the scenes to import with their splits."""
    if options.limit is not None:
        if options.split is not None:
            raise UserError("--limit cannot be combined with a split file; shorten the file's lists instead.")
        names = sorted(names, key=natural_key)[: options.limit]
    if not names:
        raise UserError(f"{origin}: no scene found.")
    if options.held_out < 0:
        raise UserError(f"--held-out {options.held_out}: give 0 or more views.")
    return choose_splits(names, options.split, options.new)


def _target_size(image: Path, options: ImportOptions) -> tuple[int, int]:
    """Returns height and width of the stored images, given the first image."""
    height, width = image_size(image)
    if options.size is None:
        if not 1 <= options.reduce <= min(height, width):
            raise UserError(
                f"--reduce {options.reduce}: give a whole number from 1 to {min(height, width)}, the image's "
                "smaller side."
            )
        return height // options.reduce, width // options.reduce
    if options.reduce != 1:
        raise UserError(
            f"--size {options.size} and --reduce {options.reduce} are both given; give one of them."
        )
    if isinstance(options.size, int) and height != width:
        raise UserError(f"{image}: is {width}x{height} (width x height), not square; give height and width.")
    size = (options.size, options.size) if isinstance(options.size, int) else tuple(options.size)
    if min(size) < 1:
        raise UserError(f"--size {options.size}: sides must be at least 1.")
    return size


def _background(first: Source, options: ImportOptions, size: tuple[int, int]) -> Background:
    """Returns the kind of background; with `auto`, judged by up to eight images of the first scene."""
    if options.background != "auto":
        return options.background
    read = {True: [], False: []}
    for place in np.unique(np.linspace(0, len(first.images) - 1, 8).round().astype(int)).tolist():
        whole = image_size(first.images[place])  # enlarging is refused later, when all images are read
        for masked in read:
            read[masked].append(first.read(place, tuple(np.minimum(size, whole).tolist()), masked))
    if _any_empty(read[False]) or (_any_empty(read[True]) and _border_is_empty(read[True])):
        return "alpha"
    return "white" if all(border_is_white(rgb[None]) for rgb, _ in read[False]) else "unknown"


def _any_empty(read: Pictures) -> bool:
    return any(alpha is not None and (alpha < 128).any() for _, alpha in read)


def _border_is_empty(read: Pictures) -> bool:
    """Returns whether masks show objects. Masks of what moves through a scene keep most of the border."""
    masks = [np.repeat(255 - alpha[None, ..., None], 3, 3) for _, alpha in read if alpha is not None]
    return float(np.mean([border_is_white(mask) for mask in masks])) >= 0.5


def _check_source(name: str, source: Source, box: Box | None, axes: Axes) -> None:
    if not source.images:
        raise UserError(f"scene {name!r}: has no views.")
    check_cameras(source.cameras, source.camera_files, box, axes)
    if box is None and len(source.images) < 2:
        raise UserError(
            f"{source.images[0]}: is the only view of scene {name!r}; a box cannot be fitted to one view. "
            "Give --box."
        )


def _spread(name: str, count: int, held_out: int) -> tuple[int, ...]:
    try:
        return spread(count, held_out)
    except UserError as error:
        raise UserError(f"scene {name!r}: {error}") from None


def _read(
    source: Source, resize: tuple[int, int] | None, size: tuple[int, int], with_alpha: bool, scratch: Path
) -> tuple[UInt8[np.ndarray, "v H W 3"], UInt8[np.ndarray, "v H W"] | None]:
    """Reads all images of a scene, and their alpha if wanted. Without `resize`, all must have `size`."""
    images = _space((len(source.images), *size, 3), scratch)
    alpha = _space((len(source.images), *size), scratch) if with_alpha else None

    def read(place: int) -> None:
        path = source.images[place]
        require_upright(path)
        rgb, opacity = source.read(place, resize, with_alpha)
        if rgb.shape[:2] != size:
            raise UserError(
                f"{path}: is {rgb.shape[1]}x{rgb.shape[0]} (width x height), but earlier images are "
                f"{size[1]}x{size[0]}. Give a --size, to which all are reduced, or remove the wrong ones."
            )
        images[place] = rgb
        if alpha is not None:
            if opacity is None:
                raise UserError(
                    f"{path}: has no alpha channel{' and no mask' if source.masks else ''}, but "
                    "silhouettes are read from alpha. Add it, or pass --background."
                )
            alpha[place] = opacity

    in_parallel(read, range(len(source.images)))
    return images, alpha


def _extent(
    name: str,
    cameras: Cameras,
    images: UInt8[np.ndarray, "v H W 3"],
    alpha: UInt8[np.ndarray, "v H W"] | None,
    background: Background,
) -> Extent:
    """Returns the extent of the visual hull, or of the cube the cameras see if silhouettes are unknown."""
    if background == "unknown":
        cube = visible_cube(cameras)
        return np.subtract(cube.center, cube.half), np.add(cube.center, cube.half), np.zeros(3)
    chosen = carving_views(len(images))
    # Alpha above a tenth counts as object, so that thin parts stay inside the box.
    masks = ~white_background(images[chosen]) if alpha is None else alpha[chosen] > 25
    return fit_extent(small_masks(masks), cameras[torch.tensor(chosen)], name)


def _space(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """Returns an array for uint8 pixels: in memory, or in an unnamed file in `scratch` if it is large."""
    if int(np.prod(shape)) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
