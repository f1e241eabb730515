"""Imports photographs with COLMAP reconstructions into a dataset.

Every object is a folder with images/, the reconstruction in sparse/0, and masks/ unless the photographs are
transparent around the object.

- COLMAP's worlds have any origin, orientation and scale. Each object is moved to a common world: its box
  centered at the origin with diagonal 1, z up, the photograph from the front on the side of +x. Up is the
  direction at right angles to all horizons, since people hold cameras level.
- Every photograph is resampled as a square pinhole image from its position: upright, turned toward the
  object's center, with the focal length at which the object fills the image.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from latentscenes.core.cameras import Cameras, look_at
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.core.reading import read_any_json
from latentscenes.data.boxes import GRID, standing_bounds, union_box
from latentscenes.data.catalog import tags_of_folders
from latentscenes.data.dataset import spread
from latentscenes.data.images import image_size, in_parallel, read_image, read_silhouette
from latentscenes.data.importing import FOR_EACH, Imported, open_folder, subfolders
from latentscenes.data.options import Boxes, SceneChoice
from latentscenes.data.photos.colmap import FEWEST, Photograph, read_photographs, resample
from latentscenes.data.splits import choose_splits, natural_key
from latentscenes.data.writing import DatasetWriter

ROOM = 1.05
"""Width of images, relative to the ball around the object's box."""
WIDE = 128
"""Pixels along each side at which whole masks are first examined."""
COVERED = 25
"""Least alpha that counts as object: a tenth, so that thin parts stay inside the box."""


@dataclass(frozen=True)
class Capture:
    """One object's photographs, resampled, in the dataset's world."""

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
    boxes: Boxes = "common",
    choice: SceneChoice | None = None,
) -> Imported:
    """Packs photographs with COLMAP reconstructions into a dataset.

    Args:
        folder: a folder of objects, each a folder with images/, sparse/0 and, unless the photographs are
            transparent around the object, masks/; or one object's folder.
        out: the dataset to make; must not exist or be an empty folder.
        size: pixels along each side of the stored images.
        held_out: views of each object kept for evaluation, evenly spread.
        boxes: one scene box for all objects (`common`), or one for each (`object`).
        choice: which objects, and what is known of them.
    """
    folder, choice = open_folder(folder), choice or SceneChoice()
    single = (folder / "images").is_dir() or (folder / "sparse").is_dir()
    places = {place.name: place for place in ([folder.resolve()] if single else subfolders(folder))}
    if not places:
        raise UserError(f"{folder}: holds no object folders (with images/, sparse/0 and masks/).")
    if size < 1 or held_out < 0:
        raise UserError(f"--size {size} must be at least 1, and --held-out {held_out} at least 0.")
    names = sorted(places, key=natural_key)[: choice.limit]
    splits = choose_splits(names, choice.split, choice.new)
    tags, notes = tags_of_folders(choice.catalog, folder, list(places))
    extents, views = [], 0
    with DatasetWriter(out, (size, size), alpha=True, origin=f"photographs {folder}") as writer:
        for name, part in tracked(splits.items(), "reading photographs"):
            capture = read_capture(places[name], size)
            held = spread(len(capture.images), held_out)
            half = capture.half
            extents.append((-half, half, 2 * half / GRID))
            own = union_box(extents[-1:]) if boxes == "object" else None
            writer.add(name, capture.images, capture.cameras, part, held, capture.alpha, own, tags.get(name))
            notes.extend(capture.notes)
            views += len(capture.images)
        box = union_box(extents)
        writer.finish(box)
    if unturned := [name for name in splits if not (places[name] / "pose.json").is_file()]:
        notes.append(
            f"{len(unturned)} of {len(splits)} objects have no pose.json that names the photograph from the "
            "front; their first photograph is used instead, and sets their rotation about the vertical axis"
        )
    found = "fitted to the masks" + (f", {FOR_EACH}" if boxes == "object" else "")
    return Imported(Path(out), len(splits), views, (size, size), box, found, "alpha", tuple(notes))


def read_capture(folder: Path, size: int) -> Capture:
    """Undistorts one object's photographs, cuts it out and moves it to the dataset's world."""
    photographs, unplaced = read_photographs(folder)
    masks = find_masks(folder, photographs)
    up, front = _read_pose(folder, photographs)
    seen = in_parallel(lambda photograph: _silhouette(photograph, masks), photographs)
    kinds = [kind for kind, _ in seen]
    shots = [photograph for photograph, kind in zip(photographs, kinds) if kind == "all"]
    if len(shots) < FEWEST:
        raise UserError(
            f"{folder}: only {len(shots)} of {len(photographs)} photographs show the whole object, and "
            f"{FEWEST} are needed. In {kinds.count('part')} the mask is white at the photograph's border, "
            f"in {kinds.count('nothing')} it is entirely black. Masks must be white on the object and black "
            "elsewhere (are they inverted?), and photographs show all of it."
        )
    # Rough bounds, in a world with z up whose origin is the mean camera position
    center = np.mean([shot.position for shot in shots], 0)
    world = rotation_to(up, np.eye(3)[np.abs(up).argmin()])
    rotations, focal = [shot.rotation for shot in shots], [0.5 / shot.lens.reach for shot in shots]
    wide = _cameras(shots, rotations, focal, world, center)
    low, high = standing_bounds(np.stack([mask for kind, mask in seen if kind == "all"]), wide, str(folder))
    center = center + world.T @ (low + high) / 2
    # Resample all photographs toward the object, with the front one on the side of +x
    world = rotation_to(up, _forward(front, center, up))
    eyes = np.stack([shot.position - center for shot in shots]) @ world.T
    focal = _focal_lengths(shots, np.linalg.norm(eyes, axis=1), ROOM * np.linalg.norm(high - low) / 2)
    _refuse_enlarging(folder, shots, focal, size)
    rotations = look_at(torch.from_numpy(eyes).float())[:, :, :3].double().numpy()
    turned = [world.T @ rotation for rotation in rotations]

    def take(place: int) -> UInt8[np.ndarray, "size size 4"]:
        picture, mask = read_cut_out(shots[place], masks)
        return resample(shots[place], [(picture, 255), (mask, 0)], turned[place], focal[place], size)

    pictures = np.stack(in_parallel(take, range(len(shots))))
    images, alpha = np.ascontiguousarray(pictures[..., :3]), np.ascontiguousarray(pictures[..., 3])
    # Exact bounds: their center becomes the origin, their diagonal 1
    low, high = standing_bounds(alpha >= COVERED, _cameras(shots, turned, focal, world, center), str(folder))
    center, diagonal = center + world.T @ (low + high) / 2, float(np.linalg.norm(high - low))
    cameras = _cameras(shots, turned, focal, world, center, diagonal)
    return Capture(images, alpha, cameras, (high - low) / 2 / diagonal, _notes(folder, unplaced, kinds))


def _silhouette(photograph: Photograph, masks: dict[str, Path]) -> tuple[str, np.ndarray]:
    """Returns how much of the object a photograph shows, and its undistorted mask (booleans, WIDE x WIDE)."""
    mask = read_mask(photograph, masks)
    small = resample(photograph, [(mask, 0)], photograph.rotation, 0.5 / photograph.lens.reach, WIDE)
    return shows(mask), small[..., 0] >= COVERED


def _cameras(
    shots: list[Photograph],
    rotations: list[Float[np.ndarray, "3 3"]],
    focal: list[float],
    world: Float[np.ndarray, "3 3"],
    center: Float[np.ndarray, "3"],
    scale: float = 1.0,
) -> Cameras:
    """Returns pinhole cameras at the photographs' positions.

    `rotations` are camera-to-world in COLMAP's world. The result's world is COLMAP's after moving `center` to
    the origin, rotating by `world` and dividing by `scale`.
    """
    positions = [world @ (shot.position - center) / scale for shot in shots]
    poses = zip(rotations, positions)
    matrices = [np.column_stack([world @ rotation, position]) for rotation, position in poses]
    intrinsics = [[length, length, 0.5, 0.5] for length in focal]
    return Cameras(torch.from_numpy(np.stack(matrices)).float(), torch.tensor(intrinsics))


def _focal_lengths(shots: list[Photograph], distances: Float[np.ndarray, "v"], radius: float) -> list[float]:
    """Returns focal lengths (fractions) at which a ball just fits: ½ / tan(asin(radius / distance))."""
    nearest = int(distances.argmin())
    if distances[nearest] < 1.1 * radius:
        raise UserError(
            f"{shots[nearest].file}: was taken from within the ball around the object "
            f"({distances[nearest] / radius:.2f} of its radius from the center). Take it from farther away, "
            "or give it an entirely black mask to leave it out."
        )
    return (0.5 / np.tan(np.arcsin(radius / distances))).tolist()


def _refuse_enlarging(folder: Path, shots: list[Photograph], focal: list[float], size: int) -> None:
    """Raises a UserError if images would have more pixels than the photographs have on the object."""
    pixels = float(np.median([shot.pixel_focal / length for shot, length in zip(shots, focal)]))
    if pixels < size:
        raise UserError(
            f"{folder}: the object and its margin are only about {pixels:.0f} pixels wide in the "
            f"photographs, fewer than the wanted {size}. Choose a smaller size, or photograph it larger."
        )


def _read_pose(folder: Path, photographs: list[Photograph]) -> tuple[Float[np.ndarray, "3"], Photograph]:
    """Returns up in COLMAP's world, and the photograph from the front; from pose.json if it is there."""
    file = folder / "pose.json"
    pose: Any = read_any_json(file) if file.is_file() else {}
    known = isinstance(pose, dict) and set(pose) <= {"front", "up"}
    if not known or not isinstance(pose.get("front", ""), str):
        raise UserError(
            f'{file}: must look like {{"front": "{photographs[0].name}"}}, with or without "up": [x, y, z].'
        )
    names = {photograph.name: photograph for photograph in photographs}
    front = names.get(pose.get("front", photographs[0].name))
    if front is None:
        raise UserError(
            f"{file}: the photograph from the front, {pose['front']!r}, is not in the reconstruction."
        )
    if "up" in pose:
        return _direction(pose["up"], file), front
    if (up := up_direction(photographs)) is None:
        raise UserError(
            f"{folder}: the photographs do not show which way is up: they were not held level, or all taken "
            "from one side. "
            f'Write it into {file}: {{"up": [x, y, z]}}, a direction in COLMAP\'s world.'
        )
    return up, front


def up_direction(photographs: list[Photograph]) -> Float[np.ndarray, "3"] | None:
    """Returns up in COLMAP's world as a unit vector; None if it is ambiguous.

    Up is the least eigenvector of Σ x xᵀ over the photographs' horizontal directions x, on the side of their
    tops. It is ambiguous if the horizons lie in no common plane, or are all parallel (photographs from one
    side only).
    """
    tops = np.stack([photograph.rotation @ photograph.up for photograph in photographs])
    forward = np.stack([photograph.rotation[:, 2] for photograph in photographs])
    horizons = np.cross(forward, tops)
    moments, directions = np.linalg.eigh(horizons.T @ horizons / len(horizons))
    up = directions[:, 0] * np.sign(tops.mean(0) @ directions[:, 0])
    return up if moments[0] < moments[1] / 4 and tops.mean(0) @ up > 0.2 else None


def rotation_to(up: Float[np.ndarray, "3"], front: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Returns the rotation that takes `up` to z and the horizontal part of `front` to x."""
    z = up / np.linalg.norm(up)
    y = np.cross(z, front)
    y /= np.linalg.norm(y)
    return np.stack([np.cross(y, z), y, z])


def _direction(numbers: Any, file: Path) -> Float[np.ndarray, "3"]:
    three = isinstance(numbers, list) and len(numbers) == 3
    if three and all(isinstance(number, int | float) for number in numbers):
        vector = np.array(numbers, float)
        if np.isfinite(vector).all() and (length := np.linalg.norm(vector)) > 0:
            return vector / length
    raise UserError(f"{file}: up must be three numbers that are not all 0, a direction in COLMAP's world.")


def _forward(
    front: Photograph, center: Float[np.ndarray, "3"], up: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3"]:
    """Returns the direction from the object to the photograph from the front."""
    toward = front.position - center
    if np.linalg.norm(np.cross(up, toward)) < 0.1 * np.linalg.norm(toward):
        raise UserError(
            f"{front.file}: serves as the photograph from the front, but was taken from straight above. "
            "Name another in "
            'pose.json beside images/: {"front": "…"}.'
        )
    return toward


def _notes(folder: Path, unplaced: int, kinds: list[str]) -> tuple[str, ...]:
    counts = {
        "COLMAP did not place": unplaced,
        "show only part of the object and were left out": kinds.count("part"),
        "have a black mask and were left out": kinds.count("nothing"),
    }
    return tuple(f"{folder}: {count} photographs {fate}" for fate, count in counts.items() if count)


# Masks


MASKS = (".png", "_mask.png", ".mask.png")
"""What follows a photograph's name, with or without its own ending, in the name of its mask."""
CUT_OFF = 0.01
"""Least share of border pixels on the object at which a photograph counts as cutting the object off."""


def find_masks(folder: Path, photographs: list[Photograph]) -> dict[str, Path]:
    """Returns the mask of each photograph by its name, such as masks/NAME.png, masks/NAME.jpg.png (COLMAP),
    masks/NAME_mask.png (Metashape) or masks/NAME.jpg.mask.png (RealityCapture). Empty if there is no folder
    masks/; the photographs must then be transparent around the object."""
    masks = folder / "masks"
    if not masks.is_dir():
        return {}
    found = {}
    for photograph in photographs:
        names = (photograph.name, str(Path(photograph.name).with_suffix("")))
        choices = [masks / f"{name}{ending}" for ending in MASKS for name in names]
        if (mask := next((choice for choice in choices if choice.is_file()), None)) is not None:
            found[photograph.name] = mask
    if missing := [photograph.name for photograph in photographs if photograph.name not in found]:
        raise UserError(
            f"{masks / Path(missing[0]).with_suffix('.png')}: no such mask; {len(missing)} of "
            f"{len(photographs)} photographs have none. Give it a black mask to leave it out."
        )
    return found


def read_cut_out(photograph: Photograph, masks: dict[str, Path]) -> tuple[Image.Image, Image.Image]:
    """Returns the photograph over white (RGB) and its mask (L, 255 on the object), of one shape."""
    rgb, alpha = read_image(photograph.file)
    picture = Image.fromarray(rgb)
    if masks:
        mask = read_mask(photograph, masks)
        return Image.composite(picture, Image.new("RGB", picture.size, "white"), mask), mask
    if alpha is None or alpha.min() == 255:
        raise UserError(
            f"{photograph.file}: object and background are not separated. Either give all photographs "
            f"masks, here {Path('masks', photograph.name).with_suffix('.png')} beside images/, white on the "
            "object and black elsewhere (made by programs such as rembg or Segment Anything); or cut the "
            "object out of all photographs, so that they are transparent around it (PNG)."
        )
    return picture, Image.fromarray(alpha)


def read_mask(photograph: Photograph, masks: dict[str, Path]) -> Image.Image:
    """Returns the mask (L, 255 on the object). The alpha of a partly transparent mask file counts."""
    if not masks:
        return read_cut_out(photograph, masks)[1]
    return Image.fromarray(read_silhouette(masks[photograph.name], image_size(photograph.file)))


def shows(mask: Image.Image) -> Literal["all", "part", "nothing"]:
    """Returns how much of the object a mask shows; `part` if it extends beyond the border."""
    on = np.asarray(mask) >= 128
    if not on.any():
        return "nothing"
    border = np.concatenate([on[0], on[-1], on[:, 0], on[:, -1]])
    return "part" if border.mean() >= CUT_OFF else "all"
