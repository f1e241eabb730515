"""People's own photographs with COLMAP reconstructions → a dataset.

Every object is a folder: images/, the reconstruction in sparse/0, and masks/ unless the photographs are
transparent around the object. Notable:

- COLMAP's worlds have any origin, orientation and scale. Each object is brought into the dataset's: the
  middle of its box at the origin, the box's diagonal 1, z up, the photograph from the front on the side of
  +x.
- Every photograph is taken again as a pinhole camera at its place would, upright, turned toward the object's
  middle, with the focal length at which the object fills the picture. So pictures are square, whatever camera
  took them.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latentscenes.core.cameras import Cameras, look_at
from latentscenes.core.console import console
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import GRID, union_box
from latentscenes.data.dataset import DatasetWriter, spread
from latentscenes.data.images import read_image
from latentscenes.data.importing import Imported, choose_splits, natural_key, open_folder, subfolders
from latentscenes.data.photos.colmap import FEWEST, Photograph, read_photographs, retake
from latentscenes.data.photos.framing import object_bounds, rotation_to, up_direction

ROOM = 1.05
"""How much wider pictures are than the ball around the object's box."""
WIDE = 128
"""Pixels along each side at which whole masks are first looked at."""
COVERED = 25
"""A pixel counts as object from this alpha: a tenth covered, for thin parts must stay inside the box."""


@dataclass(frozen=True)
class Capture:
    """One object's photographs in the dataset's world."""

    images: UInt8[np.ndarray, "v size size 3"]
    """Over white."""
    alpha: UInt8[np.ndarray, "v size size"]
    cameras: Cameras
    half: Float[np.ndarray, "3"]
    """Half sides of the object's box around the origin; its diagonal is 1."""
    notes: tuple[str, ...]


def make_photos(
    folder: str | Path,
    out: str | Path,
    *,
    size: int = 128,
    held_out: int = 4,
    split: str | Path | None = None,
    new: int = 0,
    limit: int | None = None,
) -> Imported:
    """Pack photographs with COLMAP reconstructions into a dataset.

    Args:
        folder: a folder of objects, each a folder with images/, sparse/0 and, unless the photographs are
            transparent around the object, masks/; or one object's folder.
        out: the dataset to make; must not exist yet, or be an empty folder.
        size: pixels along each side of the stored pictures.
        held_out: views of each object kept for evaluation, evenly spread.
        split: JSON file {"train": [...], "new": [...]} with names of objects; the others are left out.
        new: without `split`, the last so many objects are new scenes.
        limit: take at most the first so many objects.
    """
    folder = open_folder(folder)
    single = (folder / "images").is_dir() or (folder / "sparse").is_dir()
    places = {place.name: place for place in ([folder.resolve()] if single else subfolders(folder))}
    if not places:
        raise UserError(
            f"{folder}: holds no folders. Each object is a folder with images/, sparse/0 and masks/."
        )
    if limit is not None and (limit < 1 or split is not None):
        raise UserError(
            f"limit={limit}: must be at least 1, and does not go with a split file; shorten its lists "
            "instead."
        )
    if size < 1 or held_out < 0:
        raise UserError(
            f"size={size}, held_out={held_out}: pictures have at least 1 pixel, and 0 or more views are "
            "held out."
        )
    splits = choose_splits(sorted(places, key=natural_key)[:limit], split, new)
    notes, halves, views = [], [], 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        DatasetWriter(out, (size, size), alpha=True, origin=f"photographs {folder}") as writer,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        for name, part in progress.track(splits.items(), description="reading photographs"):
            capture = read_capture(places[name], size)
            held = spread(len(capture.images), held_out)
            writer.add(name, capture.images, capture.cameras, part, held, capture.alpha)
            halves.append(capture.half)
            notes.extend(capture.notes)
            views += len(capture.images)
        box = union_box([(-half, half, 2 * half / GRID) for half in halves])
        writer.finish(box)
    if unturned := [name for name in splits if not (places[name] / "pose.json").is_file()]:
        notes.append(
            f"{len(unturned)} of {len(splits)} objects have no pose.json that names the photograph from the "
            "front; their first photograph is taken for it, and decides how they are turned about the "
            "vertical axis"
        )
    return Imported(
        Path(out), len(splits), views, (size, size), box, "fitted to the masks", "alpha", tuple(notes)
    )


def read_capture(folder: Path, size: int) -> Capture:
    """One object's photographs, undistorted, cut out, and brought into the dataset's world."""
    photographs, unplaced = read_photographs(folder)
    masks = find_masks(folder, photographs)
    up, front = _read_pose(folder, photographs)
    seen = _together(lambda photograph: _silhouette(photograph, masks), photographs)
    kinds = [kind for kind, _ in seen]
    shots = [photograph for photograph, kind in zip(photographs, kinds) if kind == "all"]
    if len(shots) < FEWEST:
        raise UserError(
            f"{folder}: only {len(shots)} of {len(photographs)} photographs show the whole object, and "
            f"{FEWEST} are needed. In {kinds.count('part')} the mask is white at the photograph's border, "
            f"in {kinds.count('nothing')} it is black all over. Masks must be white on the object and black "
            "elsewhere (are they inverted?), and photographs show all of it."
        )
    # Where the object stands, roughly: in a world whose z is up and whose origin is the cameras' middle.
    center, world = (
        np.mean([shot.position for shot in shots], 0),
        rotation_to(up, np.eye(3)[np.abs(up).argmin()]),
    )
    wide = _cameras(
        shots, [shot.rotation for shot in shots], [0.5 / shot.lens.reach for shot in shots], world, center
    )
    low, high = object_bounds(np.stack([mask for kind, mask in seen if kind == "all"]), wide, str(folder))
    center = center + world.T @ (low + high) / 2
    # The photograph from the front on the side of +x; all are taken again, turned toward the object.
    world = rotation_to(up, _forward(front, center, up))
    eyes = np.stack([shot.position - center for shot in shots]) @ world.T
    focal = _focal_lengths(shots, np.linalg.norm(eyes, axis=1), ROOM * np.linalg.norm(high - low) / 2)
    _refuse_enlarging(folder, shots, focal, size)
    turned = [
        world.T @ matrix for matrix in look_at(torch.from_numpy(eyes).float())[:, :, :3].double().numpy()
    ]

    def take(place: int) -> UInt8[np.ndarray, "size size 4"]:
        picture, mask = read_cut_out(shots[place], masks)
        return retake(shots[place], [(picture, 255), (mask, 0)], turned[place], focal[place], size)

    pictures = np.stack(_together(take, range(len(shots))))
    images, alpha = np.ascontiguousarray(pictures[..., :3]), np.ascontiguousarray(pictures[..., 3])
    # The object's box, now closely: its middle becomes the origin, its diagonal 1.
    low, high = object_bounds(alpha >= COVERED, _cameras(shots, turned, focal, world, center), str(folder))
    center, diagonal = center + world.T @ (low + high) / 2, float(np.linalg.norm(high - low))
    cameras = _cameras(shots, turned, focal, world, center, diagonal)
    return Capture(images, alpha, cameras, (high - low) / 2 / diagonal, _notes(folder, unplaced, kinds))


def _silhouette(photograph: Photograph, masks: dict[str, Path]) -> tuple[str, np.ndarray]:
    """How much of the object a photograph shows, and its whole undistorted mask (booleans, WIDE x WIDE)."""
    mask = read_mask(photograph, masks)
    small = retake(photograph, [(mask, 0)], photograph.rotation, 0.5 / photograph.lens.reach, WIDE)
    return shows(mask), small[..., 0] >= COVERED


def _cameras(
    shots: list[Photograph],
    rotations: list[Float[np.ndarray, "3 3"]],
    focal: list[float],
    world: Float[np.ndarray, "3 3"],
    center: Float[np.ndarray, "3"],
    scale: float = 1.0,
) -> Cameras:
    """Pinhole cameras at the photographs' places, turned by `rotations` (camera-to-world in COLMAP's world),
    in the world that is COLMAP's after moving `center` to the origin, turning by `world` and dividing by
    `scale`."""
    positions = [world @ (shot.position - center) / scale for shot in shots]
    matrices = [
        np.column_stack([world @ rotation, position]) for rotation, position in zip(rotations, positions)
    ]
    intrinsics = [[length, length, 0.5, 0.5] for length in focal]
    return Cameras(torch.from_numpy(np.stack(matrices)).float(), torch.tensor(intrinsics))


def _focal_lengths(shots: list[Photograph], distances: Float[np.ndarray, "v"], radius: float) -> list[float]:
    """Focal lengths, as fractions of the picture's side, at which a ball just fits: ½ / tan(asin(radius /
    distance))."""
    nearest = int(distances.argmin())
    if distances[nearest] < 1.1 * radius:
        raise UserError(
            f"{shots[nearest].file}: was taken from within the ball around the object "
            f"({distances[nearest] / radius:.2f} of its radius from the middle). Photographs must be taken "
            "from farther away; or give it a mask that is black all over, to leave it out."
        )
    return (0.5 / np.tan(np.arcsin(radius / distances))).tolist()


def _refuse_enlarging(folder: Path, shots: list[Photograph], focal: list[float], size: int) -> None:
    """Pictures must not have more pixels than the photographs have on the object."""
    pixels = float(np.median([shot.pixel_focal / length for shot, length in zip(shots, focal)]))
    if pixels < size:
        raise UserError(
            f"{folder}: the object and the room around it are only about {pixels:.0f} pixels wide in the "
            f"photographs, fewer than the wanted {size}. Ask for a smaller size, or photograph the object "
            "larger."
        )


def _read_pose(folder: Path, photographs: list[Photograph]) -> tuple[Float[np.ndarray, "3"], Photograph]:
    """What is up in COLMAP's world, and the photograph from the front; as pose.json says, if it is there."""
    file = folder / "pose.json"
    pose: dict[str, Any] = {}
    if file.is_file():
        try:
            pose = json.loads(file.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: not a readable JSON file ({error}).") from None
        if (
            not isinstance(pose, dict)
            or not set(pose) <= {"front", "up"}
            or not isinstance(pose.get("front", ""), str)
        ):
            raise UserError(
                f'{file}: must look like {{"front": "{photographs[0].name}"}}, with or without "up": [x, y, z].'
            )
    names = {photograph.name: photograph for photograph in photographs}
    front = names.get(pose.get("front", photographs[0].name))
    if front is None:
        raise UserError(
            f"{file}: the photograph from the front, {pose['front']!r}, is not in the reconstruction. Name "
            "another."
        )
    if "up" in pose:
        return _direction(pose["up"], file), front
    if (up := up_direction(photographs)) is None:
        raise UserError(
            f"{folder}: the photographs do not tell which way is up: they were not held level, or all taken "
            "from one side. Say "
            f'it in {file}: {{"up": [x, y, z]}}, a direction in COLMAP\'s world.'
        )
    return up, front


def _direction(numbers: Any, file: Path) -> Float[np.ndarray, "3"]:
    if (
        isinstance(numbers, list)
        and len(numbers) == 3
        and all(isinstance(number, int | float) for number in numbers)
    ):
        vector = np.array(numbers, float)
        if np.isfinite(vector).all() and (length := np.linalg.norm(vector)) > 0:
            return vector / length
    raise UserError(f"{file}: up must be three numbers that are not all 0, a direction in COLMAP's world.")


def _forward(
    front: Photograph, center: Float[np.ndarray, "3"], up: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3"]:
    """From the object toward the photograph from the front."""
    toward = front.position - center
    if np.linalg.norm(np.cross(up, toward)) < 0.1 * np.linalg.norm(toward):
        raise UserError(
            f"{front.file}: is taken for the photograph from the front, but was taken from straight above. "
            "Name another in "
            'pose.json beside images/: {"front": "…"}.'
        )
    return toward


def _notes(folder: Path, unplaced: int, kinds: list[str]) -> tuple[str, ...]:
    told = {
        "COLMAP did not place": unplaced,
        "show only part of the object and were left out": kinds.count("part"),
        "have a black mask and were left out": kinds.count("nothing"),
    }
    return tuple(f"{folder}: {count} photographs {what}" for what, count in told.items() if count)


def _together(call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`call` of every item, some at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(call, item) for item in items]
        try:
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


# Masks


CUT_OFF = 0.01
"""Share of the border's pixels on the object from which a photograph counts as cutting the object off."""


def find_masks(folder: Path, photographs: list[Photograph]) -> dict[str, Path]:
    """The mask of each photograph of a capture, by its name: masks/NAME.png, or masks/NAME.jpg.png as COLMAP
    itself wants them. Empty if there is no such folder: then photographs must be transparent around the
    object."""
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
            f"{masks / Path(missing[0]).with_suffix('.png')}: no such mask; {len(missing)} of "
            f"{len(photographs)} photographs have none. To leave a photograph out, give it a mask that is "
            "black all over."
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
            f"{photograph.file}: nothing says what is object and what background, and a background cannot "
            f"be learned. Either give {Path('masks', photograph.name).with_suffix('.png')} beside images/, "
            "white on the object and black elsewhere, and so for all photographs (programs such as rembg "
            "or Segment Anything make them); or cut the object out of all photographs, so that they are "
            "transparent around it (PNG)."
        )
    return picture, Image.fromarray(alpha)


def read_mask(photograph: Photograph, masks: dict[str, Path]) -> Image.Image:
    """The mask alone (L, 255 on the object). A mask that is itself transparent somewhere speaks by its
    transparency."""
    if not masks:
        return read_cut_out(photograph, masks)[1]
    file = masks[photograph.name]
    rgb, alpha = read_image(file)
    mask = rgb.max(-1) if alpha is None or alpha.min() == 255 else alpha
    with Image.open(photograph.file) as image:
        width, height = image.size
    if mask.shape != (height, width):
        raise UserError(
            f"{file}: is {mask.shape[1]}x{mask.shape[0]} (width x height), its photograph {width}x{height}. "
            "Make masks of the photographs as they are, neither reduced nor turned (some programs turn "
            "them as EXIF says, COLMAP does not)."
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
