"""From files with posed images to a packed dataset: what every reader of such files shares.

A reader lists its scenes as `Source`s, opened one at a time; `import_scenes` checks cameras, reads images, fits the box
and writes. No more than one scene's images are held at once, and those on disk where they are many.
"""

import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import carving_views, fit_extent, parse_box, small_masks, union_box, visible_cube
from latentscenes.data.checks import Axes, check_cameras
from latentscenes.data.dataset import DatasetWriter, Split, spread
from latentscenes.data.images import border_is_white, image_size, read_image, white_background

Background = Literal["auto", "alpha", "white", "unknown"]
Progress = Callable[[int, int, str], None]
"""Called with (scenes done, scenes in all, name of the next) as an import goes on."""

IN_MEMORY = 512 << 20
"""A scene with more bytes of pixels than this is gathered in a temporary file instead."""


@dataclass(frozen=True)
class Source:
    """One scene's files: v images and their cameras, in the order they get in the dataset."""

    images: tuple[Path, ...]
    cameras: Cameras
    """OpenCV axes, camera-to-world."""
    camera_files: tuple[Path | str, ...]
    """Where each camera came from, for error messages."""
    held_out: tuple[int, ...] | None = None
    """Views that the source itself sets apart for evaluation; None if it says nothing."""


@dataclass(frozen=True)
class ImportOptions:
    """What every import may be told; see the readers for where scenes come from."""

    size: int | tuple[int, int] | None = None
    """Height and width of the stored images (one number for square images), reached by averaging; None: as they are."""
    reduce: int = 1
    """Divide height and width by this whole number, instead of naming a `size`."""
    box: Box | str | int | float | None = None
    """The scene box: half side of a cube around the origin, or "cx,cy,cz,hx,hy,hz". None: fitted to the silhouettes,
    or, where the background is unknown, the cube that the cameras see."""
    background: Background = "auto"
    """How silhouettes are known. `alpha`: the files' alpha channel; `white`: white pixels connected to the border;
    `unknown`: not at all (photographs). `auto`: decided by the first scene's images."""
    alpha_from_white: bool = False
    """Store the silhouettes seen against a white background as alpha, for images that have none."""
    held_out: int = 4
    """Views per scene kept for evaluation, evenly spread, where the source does not set any apart itself."""
    split: str | Path | None = None
    """JSON file {"train": [scene, …], "new": [scene, …]}; scenes it does not list are left out."""
    new: int = 0
    """Without a split file: the last so many scenes (natural order of names) are `new`, the others `train`."""
    limit: int | None = None
    """Take no more than the first so many scenes; not together with a split file."""


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    path: Path
    scenes: int
    views: int
    size: tuple[int, int]
    """Height and width."""
    box: Box
    box_from: str
    """How the box came about, for people."""
    background: Background
    """What the background was taken for."""
    notes: tuple[str, ...]
    """What a person should know: scenes left out by the split file, parts of the source that were not used."""


def import_scenes(
    origin: Path,
    names: list[str],
    load: Callable[[str], Source],
    out: str | Path,
    options: ImportOptions,
    axes: Axes,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> Imported:
    """Pack the scenes `names` (each opened by `load`) from the folder `origin` into a dataset at `out`.

    `load` may go on adding to `notes`, which are handed back in the result.
    """
    splits, left_out = _choose(origin, names, options)
    box = None if options.box is None else parse_box(options.box)
    first = load(next(iter(splits)))
    size = _target_size(first.images[0], options)
    background = _background(first, options, size)
    has_alpha = background == "alpha" or (background == "white" and options.alpha_from_white)
    fitted = box is None and background != "unknown"
    as_stored = options.size is None and options.reduce == 1
    extents, cubes, views = [], [], 0
    with DatasetWriter(out, size, has_alpha, f"{origin}") as writer:
        for place, (name, split) in enumerate(splits.items()):
            if progress:
                progress(place, len(splits), name)
            source = first if place == 0 else load(name)
            _check_source(name, source, box, axes)
            held_out = (
                source.held_out
                if source.held_out is not None
                else _spread(name, len(source.images), options.held_out)
            )
            images, alpha = _read(
                source, None if as_stored else size, size, background == "alpha", writer.partial
            )
            if has_alpha and alpha is None:
                alpha = np.where(white_background(images), np.uint8(0), np.uint8(255))
            if fitted:
                chosen = carving_views(len(images))
                extents.append(
                    fit_extent(
                        _silhouettes(images, alpha, chosen), source.cameras[torch.tensor(chosen)], name
                    )
                )
            elif box is None:
                cubes.append(visible_cube(source.cameras))
            writer.add(name, images, source.cameras, split, held_out, alpha)
            views += len(images)
        if fitted:
            box, how = union_box(extents), "fitted to the silhouettes"
        elif box is None:
            box = union_box(
                [(np.subtract(c.center, c.half), np.add(c.center, c.half), np.zeros(3)) for c in cubes]
            )
            how = "what the cameras see around the point they look at (unknown background; a box given by hand may be tighter)"
        else:
            how = "given"
        writer.finish(box)
    if progress:
        progress(len(splits), len(splits), "")
    if left_out:
        notes = [
            *notes,
            f"{left_out} of {len(names)} scenes are not listed in {options.split} and were left out",
        ]
    return Imported(Path(out), len(splits), views, size, box, how, background, tuple(notes))


def subfolders(folder: Path) -> list[Path]:
    """The folders inside, in natural order of names, without hidden ones and archive debris."""
    found = [
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
    ]
    return sorted(found, key=lambda entry: natural_key(entry.name))


def open_folder(folder: str | Path) -> Path:
    """The folder, if it is one and holds anything."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: is empty; there is nothing to import.")
    return folder


def _choose(
    origin: Path, names: list[str], options: ImportOptions
) -> tuple[Mapping[str, Literal["train", "new"]], int]:
    """The scenes to take, with their splits, and how many a split file leaves out."""
    if options.limit is not None:
        if options.split is not None:
            raise UserError("limit and a split file were both given; shorten the split file's lists instead.")
        if options.limit < 1:
            raise UserError(f"limit={options.limit}: at least one scene must remain.")
        names = sorted(names, key=natural_key)[: options.limit]
    if not names:
        raise UserError(f"{origin}: no scene found.")
    if options.held_out < 0:
        raise UserError(f"held_out={options.held_out}: give 0 or more views.")
    splits = choose_splits(names, options.split, options.new)
    return splits, len(names) - len(splits)


def _target_size(image: Path, options: ImportOptions) -> tuple[int, int]:
    """Height and width of the stored images, judged by the first image."""
    height, width = image_size(image)
    if options.size is None:
        if options.reduce < 1 or options.reduce > min(height, width):
            raise UserError(
                f"reduce={options.reduce}: give a whole number from 1 to the image's smaller side ({min(height, width)})."
            )
        return height // options.reduce, width // options.reduce
    if options.reduce != 1:
        raise UserError(f"size={options.size} and reduce={options.reduce} were both given; give one of them.")
    if isinstance(options.size, int) and height != width:
        raise UserError(
            f"{image}: is {width}x{height} (width x height), not square; give size as (height, width)."
        )
    size = (options.size, options.size) if isinstance(options.size, int) else tuple(options.size)
    if min(size) < 1:
        raise UserError(f"size={options.size}: sides must be at least 1.")
    return size


def _background(first: Source, options: ImportOptions, size: tuple[int, int]) -> Background:
    """What the background is, judged by (up to eight of) the first scene's images if nobody said."""
    if options.background != "auto":
        return options.background
    some = [first.images[k] for k in np.unique(np.linspace(0, len(first.images) - 1, 8).round().astype(int))]
    read = [read_image(path, _reduced(path, size)) for path in some]
    if any(alpha is not None and (alpha < 128).any() for _, alpha in read):
        return "alpha"
    return "white" if all(border_is_white(rgb[None]) for rgb, _ in read) else "unknown"


def _check_source(name: str, source: Source, box: Box | None, axes: Axes) -> None:
    if not source.images:
        raise UserError(f"scene {name!r}: has no views.")
    check_cameras(source.cameras, source.camera_files, box, axes)
    if box is None and len(source.images) < 2:
        raise UserError(
            f"{source.images[0]}: is the only view of scene {name!r}; no box can be fitted to one view. Give box=…."
        )


def _spread(name: str, count: int, held_out: int) -> tuple[int, ...]:
    try:
        return spread(count, held_out)
    except UserError as error:
        raise UserError(f"scene {name!r}: {error}") from None


def _reduced(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """The size to read an image at: as stored, unless it is smaller (which reading it in earnest will refuse)."""
    height, width = image_size(path)
    return min(size[0], height), min(size[1], width)


def _read(
    source: Source, resize: tuple[int, int] | None, size: tuple[int, int], with_alpha: bool, scratch: Path
) -> tuple[UInt8[np.ndarray, "v H W 3"], UInt8[np.ndarray, "v H W"] | None]:
    """All images of a scene, resized or else required to be of `size`, and their alpha if it is wanted."""
    images = _space((len(source.images), *size, 3), scratch)
    alpha = _space((len(source.images), *size), scratch) if with_alpha else None

    def read(place: int) -> None:
        path = source.images[place]
        rgb, opacity = read_image(path, resize)
        if rgb.shape[:2] != size:
            raise UserError(
                f"{path}: is {rgb.shape[1]}x{rgb.shape[0]} (width x height), the images before it {size[1]}x{size[0]}. "
                "Give a size, to which all are reduced, or sort out which is right."
            )
        if alpha is not None and opacity is None:
            raise UserError(
                f"{path}: has no alpha channel, though silhouettes are taken from alpha. Add it, or pass background=…."
            )
        images[place] = rgb
        if alpha is not None:
            alpha[place] = opacity

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(read, place) for place in range(len(source.images))]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
    return images, alpha


def _silhouettes(
    images: UInt8[np.ndarray, "v H W 3"], alpha: UInt8[np.ndarray, "v H W"] | None, chosen: list[int]
) -> Bool[np.ndarray, "c h w"]:
    """Small silhouettes of the `chosen` views, from alpha or else from the white background."""
    if alpha is None:
        return small_masks(~white_background(images[chosen]))
    return small_masks(alpha[chosen] > 25)  # a tenth covered: thin parts must stay inside the box


def _space(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """Room for uint8 pixels: memory, or an unnamed file in the folder `scratch` if they are many."""
    if int(np.prod(shape)) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


# Splits


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `car_9` comes before `car_10`."""
    return [
        (0, int(part), "") if part[0] in "0123456789" else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
        if part
    ]


def read_split(path: str | Path, names: Sequence[str]) -> dict[str, Split]:
    """Splits from a JSON file {"train": [name, …], "new": [name, …]}, in the order of `names`.

    Every name in the file must be among `names`. Names that the file does not list are left out of the result, so a
    file may choose a part of a large collection.
    """
    path = Path(path)
    try:
        lists = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such split file.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from None
    well_formed = isinstance(lists, dict) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in lists.values()
    )
    if not well_formed or not lists or not set(lists) <= {"train", "new"}:
        raise UserError(f'{path}: a split file looks like {{"train": ["name", …], "new": ["name", …]}}.')
    chosen: dict[str, Split] = {}
    known = set(names)
    for split in ("train", "new"):
        for name in lists.get(split, []):
            if name not in known:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(list(names)[:5])} …"
                raise UserError(
                    f"{path}: lists scene {name!r}, which is not among the {len(names)} found; {hint}"
                )
            if name in chosen:
                raise UserError(f"{path}: lists scene {name!r} twice; a scene is either `train` or `new`.")
            chosen[name] = split
    if not chosen:
        raise UserError(f"{path}: lists no scene at all.")
    return {name: chosen[name] for name in names if name in chosen}


def choose_splits(names: Sequence[str], split: str | Path | None = None, new: int = 0) -> dict[str, Split]:
    """The split of every scene, scenes in natural order of their names.

    `split` names a file for `read_split`; without one the last `new` scenes are `new`, all others `train`.
    """
    ordered = sorted(names, key=natural_key)
    if split is not None:
        if new:
            raise UserError(f"Both a split file ({split}) and new={new} were given; give one of them.")
        return read_split(split, ordered)
    if not 0 <= new <= len(ordered):
        raise UserError(
            f"new={new}, but there are {len(ordered)} scenes; give a number from 0 to {len(ordered)}."
        )
    first_new = len(ordered) - new
    return {name: "train" if place < first_new else "new" for place, name in enumerate(ordered)}
