"""Datasets joined into one: several classes for one training.

Notable:
- Scenes are copied one at a time from memory maps: memory is that of one scene's images, however large the parts.
- The world is taken to be the same in all parts: nothing is moved or scaled. The box is the smallest that holds theirs.
- Silhouettes are kept where all parts have them; one part without leaves the whole without.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentscenes.core.cameras import Box
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import Views, ViewsWriter


def join(folders: Sequence[Path], out: Path) -> Views:
    """A new dataset at `out` with the scenes of all `folders`, in their order, each with its split and held-out views.

    Raises:
        UserError: fewer than two datasets, images of different sizes, a scene's name in two of them, or `out` is taken.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} dataset to join: name two or more.")
    parts = [Views.open(folder) for folder in folders]
    _check(parts)
    alpha = all(part.alpha is not None for part in parts)
    with ViewsWriter(out, parts[0].size, alpha=alpha, origin="; ".join(part.origin for part in parts)) as writer:
        for part in parts:
            for scene in part.scenes:
                views = slice(scene.first, scene.first + scene.count)
                silhouettes = part.alpha[views] if alpha else None
                writer.add(scene.name, part.rgb[views], part.cameras[views], scene.split, scene.held_out, silhouettes)
        writer.finish(box_of([part.box for part in parts]))
    return Views.open(out)


def box_of(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of these."""
    low = np.min([np.subtract(box.center, box.half) for box in boxes], 0)
    high = np.max([np.add(box.center, box.half) for box in boxes], 0)
    return Box(tuple(((low + high) / 2).tolist()), tuple(((high - low) / 2).tolist()))


def _check(parts: list[Views]) -> None:
    first, owner = parts[0], {}
    for part in parts:
        if part.size != first.size:
            (height, width), (rows, columns) = part.size, first.size
            differ = f"{part.path}: images of {width}x{height}, but those of {first.path} are {columns}x{rows}"
            raise UserError(f"{differ}. Make both with the same --size.")
        for scene in part.scenes:
            if scene.name in owner:
                twice = f"{part.path}: scene {scene.name!r} is in {owner[scene.name]}, too"
                raise UserError(f"{twice}; names must differ. Rename it in views.json of one.")
            owner[scene.name] = part.path
