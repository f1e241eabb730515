"""Imports the ShapeNet-SRN layout, and EG3D's `dataset.json`.

    <object>/rgb/000000.png …     RGB on white, or RGBA
    <object>/pose/000000.txt …    16 numbers, camera-to-world, OpenCV axes, world z up
    <object>/intrinsics.txt       first line: focal cx cy 0; last line: height width, to which the first line
    refers

The size in intrinsics.txt may differ from the images': the published cars state 512 px for images of 128.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.reading import MOST_LABELS, MOST_TEXT, parse_json, read_text, reason
from latentscenes.data.checks import read_matrix
from latentscenes.data.images import image_size, require_upright
from latentscenes.data.importing import (
    Imported,
    Source,
    import_scenes,
    is_leftover,
    open_folder,
    require_file_name,
    subfolders,
)  # fmt: skip
from latentscenes.data.options import Axes, ImportOptions
from latentscenes.data.splits import natural_key

ABOVE = -0.5
"""Least camera height of the "Above" subset."""
IMAGES = {".png", ".jpg", ".jpeg"}


def make_srn(
    folder: str | Path,
    out: str | Path,
    *,
    above: bool = False,
    axes: Axes = "opencv",
    intrinsics_size: int | tuple[int, int] | None = None,
    options: ImportOptions | None = None,
) -> Imported:
    """Packs objects in the ShapeNet-SRN layout, or an EG3D export with `dataset.json`, into a dataset.

    Args:
        folder: a folder of objects, one object, or a folder with EG3D's dataset.json.
        out: the dataset to make; must not exist or be an empty folder.
        above: keep only views whose camera height (world z) is above -0.5.
        axes: camera axes of the files; `opengl` if poses look along -z with y up.
        intrinsics_size: the size (height, width; one number if square) that intrinsics.txt refers to, if its
            last line is wrong.
        options: size, box, background, splits and held-out views.
    """
    folder = open_folder(folder)
    stated = (intrinsics_size,) * 2 if isinstance(intrinsics_size, int) else intrinsics_size
    objects, labels = _objects(folder), {}
    if not objects and (folder / "dataset.json").is_file():
        labels = _read_labels(folder / "dataset.json")
    if not objects and not labels:
        nested = [entry for entry in subfolders(folder) if _objects(entry)]
        hint = f" It holds collections: import one of them, for instance {nested[0]}." if nested else ""
        raise UserError(
            f"{folder}: no objects in the ShapeNet-SRN layout (<object>/rgb, /pose, intrinsics.txt) and no "
            f"dataset.json.{hint}"
        )

    def load(name: str) -> Source:
        if objects:
            source = _read_object(objects[name], axes, stated)
        else:
            source = _labeled(folder, labels[name], axes)
        return _above(source, name) if above else source

    names = list(objects or labels)
    return import_scenes(folder, names, load, out, options or ImportOptions(), axes)


def _objects(folder: Path) -> dict[str, Path]:
    """Returns objects by name: `folder` itself or its subfolders; empty if there are none."""
    if (folder / "rgb").is_dir() or (folder / "pose").is_dir():
        return {folder.resolve().name: folder}
    inside = subfolders(folder)
    if not any((entry / "pose").is_dir() for entry in inside):
        return {}
    return {entry.name: entry for entry in inside}


def _read_object(folder: Path, axes: Axes, stated: tuple[int, int] | None) -> Source:
    for part in ("rgb", "pose"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder / part}: no such folder, but other objects have one. Complete or remove the object."
            )
    images = [p for p in _files(folder / "rgb") if p.suffix.lower() in IMAGES]
    images.sort(key=lambda p: natural_key(p.stem))
    poses = {p.stem: p for p in _files(folder / "pose") if p.suffix == ".txt"}
    if not images:
        raise UserError(f"{folder / 'rgb'}: holds no PNG or JPEG. Complete the object, or move it away.")
    if lone := [p for p in images if p.stem not in poses]:
        raise UserError(f"{lone[0]}: has no pose; {folder / 'pose' / (lone[0].stem + '.txt')} is absent.")
    if len(images) != len(poses):
        known = {p.stem for p in images}
        lone_pose = next(poses[stem] for stem in sorted(poses, key=natural_key) if stem not in known)
        raise UserError(f"{lone_pose}: has no image in {folder / 'rgb'}. Restore it, or remove the pose.")
    files = tuple(poses[p.stem] for p in images)
    matrices = torch.stack([read_matrix(_numbers(file), file, axes) for file in files])
    intrinsics = _read_intrinsics(folder / "intrinsics.txt", images[0], stated)
    return Source(tuple(images), Cameras(matrices, intrinsics.expand(len(images), 4).contiguous()), files)


def _files(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not is_leftover(entry.name)]


def _read_intrinsics(file: Path, image: Path, stated: tuple[int, int] | None) -> Tensor:
    """Returns fx, fy, cx, cy as fractions of the image."""
    lines = [line.split() for line in _text(file).splitlines() if line.strip()]
    try:
        focal, cx, cy = (float(part) for part in lines[0][:3])
        height, width = (float(part) for part in lines[-1]) if stated is None else stated
    except (ValueError, IndexError):
        raise UserError(
            f"{file}: the first line must hold focal, cx and cy, the last height and width."
        ) from None
    if min(height, width) <= 0:
        raise UserError(
            f"{file}: the last line states an image of {width:g}x{height:g}; height and width must be above "
            "0."
        )
    require_upright(image)
    real = image_size(image)
    if abs(width * real[0] / (height * real[1]) - 1) > 0.01:
        raise UserError(
            f"{file}: is stated for {width:g}x{height:g} (width x height), but {image.name} is "
            f"{real[1]}x{real[0]}, another shape. Correct the last line, or pass --intrinsics-size."
        )
    if not (0 <= cx <= width and 0 <= cy <= height):
        raise UserError(
            f"{file}: the principal point {cx:g}, {cy:g} lies outside the stated {width:g}x{height:g} image; "
            f"if the first line is for another size, pass --intrinsics-size (perhaps {round(2 * cx)})."
        )
    return torch.tensor([focal / width, focal / height, cx / width, cy / height])


def _read_labels(file: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """Reads EG3D's labels by object (the images' folder), each a list of (image, 25 numbers)."""
    try:
        labels = parse_json(_text(file, MOST_LABELS))["labels"]
        pairs = [(str(path), [float(number) for number in numbers]) for path, numbers in labels]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        fault = f"{type(error).__name__}: {reason(error)}"
        raise UserError(
            f'{file}: must hold {{"labels": [["image.png", [25 numbers]], …]}} ({fault}).'
        ) from None
    if not pairs:
        raise UserError(f"{file}: its list of labels is empty.")
    scenes: dict[str, list[tuple[str, list[float]]]] = {}
    for path, numbers in pairs:
        require_file_name(path, file)
        folder = Path(path).parent
        name = (folder.parent if folder.name == "rgb" else folder).as_posix()
        if name == ".":
            raise UserError(f"{file}: {path} must lie in the subfolder of an object.")
        if len(numbers) != 25:
            raise UserError(
                f"{file}: {path} has {len(numbers)} numbers; a label has 25 (16 camera-to-world, 9 "
                "intrinsics)."
            )
        scenes.setdefault(name, []).append((path, numbers))
    return scenes


def _labeled(folder: Path, labels: list[tuple[str, list[float]]], axes: Axes) -> Source:
    labels = sorted(labels, key=lambda label: natural_key(label[0]))
    files = tuple(f"{folder / 'dataset.json'} ({path})" for path, _ in labels)
    matrices, intrinsics = [], []
    for (_, numbers), file in zip(labels, files, strict=True):
        matrices.append(read_matrix(numbers[:16], file, axes))
        fx, skew, cx, lower, fy, cy, *last = numbers[16:]
        if abs(skew) > 1e-6 or abs(lower) > 1e-6 or last != [0, 0, 1]:
            raise UserError(f"{file}: intrinsics must be fx 0 cx 0 fy cy 0 0 1 (fractions, no skew).")
        if fx > 20 or fy > 20:
            raise UserError(
                f"{file}: intrinsics are fractions of the image in dataset.json, but {fx:g} looks like "
                "pixels. Divide by the size."
            )
        intrinsics.append([fx, fy, cx, cy])
    cameras = Cameras(torch.stack(matrices), torch.tensor(intrinsics))
    return Source(tuple(folder / path for path, _ in labels), cameras, files)


def _above(source: Source, name: str) -> Source:
    """Returns the source with only the views from above."""
    keep = (source.cameras.positions[:, 2] > ABOVE).nonzero().ravel()
    if not len(keep):
        raise UserError(f"scene {name!r}: no camera is above z = {ABOVE}. Check that z is up.")
    return replace(
        source,
        images=tuple(source.images[k] for k in keep),
        cameras=source.cameras[keep],
        camera_files=tuple(source.camera_files[k] for k in keep),
    )


def _numbers(file: Path) -> list[float]:
    try:
        return [float(part) for part in _text(file).split()]
    except ValueError as error:
        raise UserError(f"{file}: must hold 16 numbers ({error}).") from None


def _text(file: Path, most: int = MOST_TEXT) -> str:
    try:
        return read_text(file, most)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file. Complete the object, or move it away.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read as text ({reason(error)}).") from None
