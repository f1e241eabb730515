"""Packed datasets of posed images, the input of training.

A dataset is a folder of plain arrays that are memory-mapped:

    views.json    format, scenes (name, views, split, box, tags, …), box around all, origin, checksums
    rgb.npy       uint8   (v, H, W, 3)  over white
    alpha.npy     uint8   (v, H, W)     the object's silhouette; absent if unknown
    cameras.npy   float32 (v, 16)       camera-to-world 3x4 row by row, then fx fy cx cy as fractions of the
    image

The views of one scene are consecutive. Splits and held-out views are chosen when a dataset is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, check_file, object_checksum, read_object
from latentscenes.core.names import no_dataset, short
from latentscenes.core.reading import reason, require_regular

FORMAT = "latentscenes-views-1"
REMAKE = "Make the dataset again."
Split = Literal["train", "new"]


@dataclass(frozen=True)
class Scene:
    """One object, shown by views first … first + count − 1 of the dataset."""

    name: str
    first: int
    count: int
    split: Split
    """`train`: learned together with the codec (stage 1). `new`: unseen by stage 1, learned in stage 2."""
    held_out: tuple[int, ...]
    """Views (0 … count − 1) kept for evaluation; never trained on."""
    box: Box | None = None
    """Its own box, if the dataset has a box for each object."""
    tags: dict[str, Any] = field(default_factory=dict, hash=False)
    """The object's row of a catalog, such as `category`; a library keeps it."""

    def views(self, part: Literal["fit", "held_out", "all"]) -> list[int]:
        """Returns the dataset indices of the training views, of the held-out views, or of all views."""
        held = set(self.held_out)
        keep = {"fit": lambda k: k not in held, "held_out": lambda k: k in held, "all": lambda k: True}[part]
        return [self.first + k for k in range(self.count) if keep(k)]

    def without(self, views: Sequence[int]) -> "Scene":
        """Returns the scene with these views (0 … count − 1) held out, too."""
        return replace(self, held_out=tuple(sorted({*self.held_out, *views})))


@dataclass(frozen=True)
class PosedImages:
    """An opened dataset. Arrays are memory-mapped; `images` and `pixels` return copies."""

    path: Path
    scenes: tuple[Scene, ...]
    box: Box
    """A box around all objects."""
    cameras: Cameras
    rgb: np.ndarray
    alpha: np.ndarray | None
    origin: str
    """The command or folder the dataset came from, for people."""

    @classmethod
    def open(cls, path: str | Path) -> "PosedImages":
        """Opens a dataset folder. Raises a UserError if files are absent, damaged or of another format."""
        path = Path(path)
        index = path / "views.json"
        if not index.is_file():
            raise no_dataset(path)
        meta = read_object(index, REMAKE, seal=False)
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{index}: format {short(meta.get('format'))}, but this version reads {FORMAT!r}. Remake it."
            )
        try:
            header = config_io.build(_Header, {key: meta[key] for key in _Header.__dataclass_fields__}, index)
            scenes = _read_scenes(meta["scenes"], index)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{index}: incomplete ({type(error).__name__}: {error}). {REMAKE}") from None
        header.box.check(index)
        count, height, width = sum(scene.count for scene in scenes), header.height, header.width
        rgb = _open_array(path / "rgb.npy", (count, height, width, 3), np.uint8)
        alpha = _open_array(path / "alpha.npy", (count, height, width), np.uint8) if header.alpha else None
        packed = torch.from_numpy(np.array(_open_array(path / "cameras.npy", (count, 16), np.float32)))
        if not packed.isfinite().all() or (packed[:, 12:14] <= 0).any():
            raise UserError(f"{path / 'cameras.npy'}: holds a camera with invalid numbers. {REMAKE}")
        cameras = Cameras(packed[:, :12].reshape(-1, 3, 4).contiguous(), packed[:, 12:].contiguous())
        return cls(path, scenes, header.box, cameras, rgb, alpha, header.origin)

    @property
    def has_boxes(self) -> bool:
        """Whether objects have boxes of their own."""
        return any(scene.box for scene in self.scenes)

    def boxes(self, scenes: Sequence[Scene]) -> Float[Tensor, "n 6"]:
        """Returns center and half sides of each scene's own box, or of the common one where it has none."""
        return torch.stack([(scene.box or self.box).numbers for scene in scenes])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.rgb.shape[1], self.rgb.shape[2]

    def images(self, index: Int[Tensor, "n"] | list[int]) -> UInt8[Tensor, "n 3 H W"]:
        """Returns images by dataset index, over white."""
        return torch.from_numpy(self.rgb[np.asarray(index)]).permute(0, 3, 1, 2)

    def pixels(self, index: Int[Tensor, "n"], pixels: Int[Tensor, "n k"]) -> UInt8[Tensor, "n k 3"]:
        """Returns some pixels (row · W + column) of each of some images."""
        flat = self.rgb.reshape(len(self.rgb), -1, 3)
        return torch.from_numpy(flat[np.asarray(index)[:, None], np.asarray(pixels)])

    def pixel_alpha(self, index: Int[Tensor, "n"], pixels: Int[Tensor, "n k"]) -> UInt8[Tensor, "n k"]:
        """Returns the alpha of some pixels (row · W + column) of each of some images that have
        silhouettes."""
        flat = self.alpha.reshape(len(self.alpha), -1)
        return torch.from_numpy(flat[np.asarray(index)[:, None], np.asarray(pixels)])

    def select(self, split: Split, names: list[str] | None = None, limit: int | None = None) -> list[Scene]:
        """Returns the scenes of a split in stored order, or the named ones, at most `limit`. Refuses no
        scenes."""
        if limit is not None and limit < 1:
            raise UserError(f"--limit {limit}: must be at least 1.")
        chosen = [scene for scene in self.scenes if scene.split == split]
        if names:
            known = {scene.name: scene for scene in chosen}
            if missing := [name for name in names if name not in known]:
                raise UserError(
                    f"{self.path}: no scene {missing[0]!r} in split {split!r}. It has: "
                    f"{', '.join(list(known)[:8])} …"
                )
            chosen = [known[name] for name in names]
        if not chosen:
            raise UserError(
                f"{self.path}: no scene has split {split!r}. Make the dataset again with some (see "
                "`latentscenes data --help`)."
            )
        return chosen[:limit]


@dataclass(frozen=True)
class _Header:
    """Entries of views.json besides format and scenes."""

    height: int
    width: int
    alpha: bool
    origin: str
    box: Box


def _read_scenes(entries: list[dict], where: Path) -> tuple[Scene, ...]:
    """Returns the scenes of views.json. Raises a ValueError, KeyError or TypeError if they fit no dataset."""
    scenes, first = [], 0
    for entry in entries:
        scene = Scene(**entry | {"held_out": tuple(entry["held_out"]), "box": _own_box(entry, where)})
        numbers = (scene.first, scene.count, *scene.held_out)
        if not isinstance(scene.name, str) or any(type(number) is not int for number in numbers):
            raise ValueError(f"scene {short(scene.name)} is not described by a name and whole numbers")
        if scene.first != first or scene.count < 1 or scene.split not in get_args(Split):
            raise ValueError(f"scene {short(scene.name)} must begin at view {first} and have a known split")
        if not all(0 <= view < scene.count for view in scene.held_out):
            raise ValueError(f"scene {short(scene.name)} holds out views that it does not have")
        if not _are_tags(scene.tags):
            raise ValueError(f"tags of scene {short(scene.name)} are no texts and lists of texts by name")
        first += scene.count
        scenes.append(scene)
    if not scenes or len({scene.name for scene in scenes}) < len(scenes):
        raise ValueError("a name comes twice" if scenes else "no scenes")
    return tuple(scenes)


def _are_tags(tags: object) -> bool:
    return isinstance(tags, dict) and all(
        isinstance(text, str)
        for value in tags.values()
        for text in (value if isinstance(value, list) else [value])
    )


def _own_box(entry: dict[str, Any], where: Path) -> Box | None:
    if entry.get("box") is None:
        return None
    box = config_io.build(Box, entry["box"], where)
    box.check(where)
    return box


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        require_regular(path)
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: absent, though views.json lists it. {REMAKE}") from None
    except Exception as error:  # numpy raises many kinds for damaged headers
        raise UserError(f"{path}: unreadable ({reason(error)}); it may be truncated. {REMAKE}") from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, but views.json says {np.dtype(dtype)} {shape}. "
            f"{REMAKE}"
        )
    return array


def spread(count: int, held_out: int) -> tuple[int, ...]:
    """Returns the indices of `held_out` of `count` views, evenly spread."""
    if held_out >= count:
        raise UserError(f"{held_out} of {count} views held out leaves none to learn from; hold out fewer.")
    return tuple(sorted({int((k + 0.5) * count / held_out) for k in range(held_out)}))


def spread_evenly(index: list[int], count: int) -> list[int]:
    """Returns at most `count` of the indices, evenly spread."""
    count = min(count, len(index))
    return [index[int((k + 0.5) * len(index) / count)] for k in range(count)]


# Checking


def verify(path: str | Path) -> list[str] | None:
    """Compares a dataset with the checksums from when it was made. Returns the differences, one sentence a
    file; None if it has no checksums, because an earlier version made it. Raises as `PosedImages.open`."""
    folder = PosedImages.open(path).path
    meta = read_object(folder / "views.json", "Make the dataset again.", seal=False)
    listed = meta.get("checksums")
    if listed is None and CHECKSUM not in meta:
        return None
    found = []
    if meta.get(CHECKSUM) != object_checksum(meta):
        found.append(f"{folder / 'views.json'}: was edited, or damaged, after the dataset was made.")
    checksums = config_io.build(dict[str, str], listed or {}, f"{folder / 'views.json'}: checksums")
    for name, checksum in checksums.items():
        try:
            check_file(
                folder / Path(name).name, checksum, "Make the dataset again, or restore the file from a copy."
            )
        except UserError as error:
            found.append(str(error))
    return found


# Joining


def box_of(boxes: Sequence[Box]) -> Box:
    """Returns the smallest box that holds all boxes."""
    low = np.min([np.subtract(box.center, box.half) for box in boxes], 0)
    high = np.max([np.add(box.center, box.half) for box in boxes], 0)
    return Box(tuple(((low + high) / 2).tolist()), tuple(((high - low) / 2).tolist()))
