"""Writing of datasets (see dataset.py), and joining of several."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.files import (
    check_place,
    file_checksum,
    make_folder,
    partial_path,
    publish,
    write_with_checksum,
    writing_to,
)
from latentscenes.core.names import check_name
from latentscenes.data.dataset import FORMAT, PosedImages, Scene, Split, box_of


class DatasetWriter:
    """Writes a dataset scene by scene. The folder gets its final name only in `finish`.

    with DatasetWriter("cars", size=(128, 128), alpha=True, origin="…") as writer:
        writer.add("car_0001", images, cameras, "train", held_out=spread(40, 4), alpha=alphas)
        writer.finish(box)
    """

    def __init__(self, path: str | Path, size: tuple[int, int], alpha: bool, origin: str):
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: exists and is not an empty folder. Remove it or choose another.")
        check_place(self.path)
        self.partial = partial_path(self.path)
        self.size, self.has_alpha, self.origin = size, alpha, origin
        self.scenes: list[Scene] = []
        self.cameras: list[np.ndarray] = []

    def __enter__(self) -> "DatasetWriter":
        with writing_to(self.path):
            make_folder(self.partial.parent)
            self.partial.mkdir()
        self._rgb = open(self.partial / "rgb.raw", "wb")
        self._alpha = open(self.partial / "alpha.raw", "wb") if self.has_alpha else None
        return self

    def add(
        self,
        name: str,
        images: UInt8[np.ndarray, "v H W 3"],
        cameras: Cameras,
        split: Split,
        held_out: tuple[int, ...],
        alpha: UInt8[np.ndarray, "v H W"] | None = None,
        box: Box | None = None,
        tags: dict[str, Any] | None = None,
    ) -> None:
        """Appends one scene, with its own `box` if the dataset has one for each, and the `tags` of a catalog.
        Raises a UserError if sizes, counts or the name do not fit the dataset."""
        check_name(name, self.path)
        if images.shape[1:] != (*self.size, 3) or len(cameras) != len(images):
            raise UserError(
                f"scene {name!r}: {images.shape[0]} images of {images.shape[2]}x{images.shape[1]} with "
                f"{len(cameras)} cameras; the dataset holds images of {self.size[1]}x{self.size[0]}."
            )
        if self.has_alpha and (alpha is None or alpha.shape != images.shape[:3]):
            raise UserError(f"scene {name!r}: silhouettes are absent, or unlike its images in shape.")
        if any(scene.name == name for scene in self.scenes):
            raise UserError(f"scene {name!r} appears twice; names must differ.")
        first = sum(scene.count for scene in self.scenes)
        self.scenes.append(Scene(name, first, len(images), split, tuple(held_out), box, tags or {}))
        with writing_to(self.path):
            self._rgb.write(np.ascontiguousarray(images).data)  # no copy: scenes can be large
            if self._alpha is not None:
                self._alpha.write(np.ascontiguousarray(alpha).data)
        packed = torch.cat([cameras.cam2world.reshape(-1, 12), cameras.intrinsics], 1)
        self.cameras.append(packed.float().numpy())

    def finish(self, box: Box) -> None:
        """Writes the index and gives the folder its final name. `box` holds all objects."""
        if not self.scenes:
            raise UserError(f"{self.path}: no scene was added; nothing to write.")
        count, (height, width) = sum(scene.count for scene in self.scenes), self.size
        meta = {
            "format": FORMAT, "height": height, "width": width, "alpha": self.has_alpha,
            "origin": self.origin, "box": asdict(box), "scenes": list(map(_scene_entry, self.scenes)),
        }  # fmt: skip
        with writing_to(self.path):
            self._close()
            _raw_to_npy(self.partial / "rgb.raw", self.partial / "rgb.npy", (count, height, width, 3))
            if self.has_alpha:
                _raw_to_npy(self.partial / "alpha.raw", self.partial / "alpha.npy", (count, height, width))
            np.save(self.partial / "cameras.npy", np.concatenate(self.cameras))
            checksums = {file.name: file_checksum(file) for file in sorted(self.partial.iterdir())}
            write_with_checksum(self.partial / "views.json", meta | {"checksums": checksums})
            publish(self.partial, self.path)

    def _close(self) -> None:
        for stream in (self._rgb, self._alpha):
            if stream is not None:
                stream.close()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk refused is removed now
            self._close()
        shutil.rmtree(self.partial, ignore_errors=True)


def _scene_entry(scene: Scene) -> dict[str, Any]:
    """A scene's entry in views.json. Without a box of its own and tags, earlier versions can read it."""
    entry = asdict(scene)
    for key in ("box", "tags"):
        if not entry[key]:
            del entry[key]
    return entry


def _raw_to_npy(raw: Path, target: Path, shape: tuple[int, ...]) -> None:
    """Turns a raw dump of uint8 into an npy file."""
    with open(raw, "rb") as source, open(target, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        shutil.copyfileobj(source, out, 16 << 20)
    raw.unlink()


def join(folders: Sequence[Path], out: Path) -> PosedImages:
    """Makes a dataset at `out` from all scenes of `folders`, with their splits and held-out views. If one
    dataset has a box for each object, so has the joined one; scenes of the others keep their common box.

    Raises:
        UserError: fewer than two datasets, different image sizes, a repeated name, or `out` is not empty.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} dataset to join: name two or more.")
    parts = [PosedImages.open(folder) for folder in folders]
    _check_parts(parts)
    alpha = all(part.alpha is not None for part in parts)
    own = any(scene.box for part in parts for scene in part.scenes)
    with DatasetWriter(out, parts[0].size, alpha, "; ".join(part.origin for part in parts)) as writer:
        for part in parts:
            for scene in part.scenes:
                views = slice(scene.first, scene.first + scene.count)
                rgb, masks = part.rgb[views], part.alpha[views] if alpha else None
                box, cameras = (scene.box or part.box) if own else None, part.cameras[views]
                held_out, tags = scene.held_out, scene.tags
                writer.add(scene.name, rgb, cameras, scene.split, held_out, masks, box, tags)
        writer.finish(box_of([part.box for part in parts]))
    return PosedImages.open(out)


def _check_parts(parts: list[PosedImages]) -> None:
    first, owner = parts[0], {}
    for part in parts:
        if part.size != first.size:
            (height, width), (rows, columns) = part.size, first.size
            raise UserError(
                f"{part.path}: images of {width}x{height}, but those of {first.path} are {columns}x{rows}. "
                "Make both with the same --size."
            )
        for scene in part.scenes:
            if scene.name in owner:
                raise UserError(
                    f"{part.path}: scene {scene.name!r} is also in {owner[scene.name]}. Rename it in one "
                    "views.json."
                )
            owner[scene.name] = part.path
