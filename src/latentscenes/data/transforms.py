"""Imports transforms*.json of nerfstudio and Blender (such as NeRF-synthetic).

A scene has one file (transforms.json), perhaps with lists of its parts (train_filenames, val_filenames,
test_filenames), or one file per part (transforms_train.json, …). The test frames then become held-out views.
Cameras are camera-to-world in OpenGL axes (x right, y up, looking along -z), world z up.
"""

import math
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.reading import read_any_json
from latentscenes.data.checks import read_matrix
from latentscenes.data.images import image_size, require_upright
from latentscenes.data.importing import (
    Imported,
    Source,
    import_scenes,
    open_folder,
    require_file_name,
    subfolders,
)  # fmt: skip
from latentscenes.data.options import Axes, HeldOutFrom, ImportOptions
from latentscenes.data.splits import natural_key

EXTENSIONS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
"""Tried in this order if file_path has none."""
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
OTHER_LENSES = (
    "is_fisheye", "fisheye_crop_radius", "ftheta_p0", "ftheta_p1", "ftheta_p2", "ftheta_p3", "ftheta_p4",
    "latlong", "equirectangular", "orthographic", "distortion_params",
)  # fmt: skip
"""Keys of instant-ngp and nerfstudio that, unless false or zero, describe lenses without pinhole cameras."""
PINHOLES = {"", "OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE"}


def make_transforms(
    folder: str | Path,
    out: str | Path,
    *,
    held_out_from: HeldOutFrom | None = None,
    axes: Axes = "opengl",
    options: ImportOptions | None = None,
) -> Imported:
    """Packs one scene, or a folder of scenes, described by transforms*.json into a dataset.

    Args:
        folder: a folder with transforms*.json, or a folder of such folders (one scene each, named after
            them).
        out: the dataset to make; must not exist or be an empty folder.
        held_out_from: for scenes with parts, the part whose frames become held-out views: `test`, `val`, or
            `none` (then `options.held_out` training frames are held out). Unset: `test` if there is such a
            part, else `val`, else `none`. Other parts are not read.
        axes: camera axes of the files; `opencv` if matrices look along +z with y down.
        options: size, box, background, splits, held-out views.
    """
    folder = open_folder(folder)
    if _described(folder):
        scenes = {folder.resolve().name: folder}
    else:
        scenes = {entry.name: entry for entry in subfolders(folder) if _described(entry)}
        if not scenes:
            raise UserError(f"{folder}: no transforms.json or transforms_train.json, even in subfolders.")
        if bare := [entry for entry in subfolders(folder) if entry.name not in scenes]:
            raise UserError(
                f"{bare[0]}: has no transforms.json or transforms_train.json, but {next(iter(scenes))} has. "
                "Move it away."
            )
    notes: list[str] = []
    for scene in scenes.values():
        used = [file.name for file, _ in _parts(scene, held_out_from)]
        if unused := sorted(file.name for file in scene.glob("transforms*.json") if file.name not in used):
            notes.append(f"{scene}: {', '.join(unused)} not used")

    def load(name: str) -> Source:
        return _read_scene(scenes[name], held_out_from, axes, notes)

    return import_scenes(folder, list(scenes), load, out, options or ImportOptions(), axes, notes)


def _described(folder: Path) -> bool:
    return any((folder / f"transforms{part}.json").is_file() for part in ("", "_train"))


def _parts(folder: Path, held_out_from: HeldOutFrom | None) -> list[tuple[Path, bool]]:
    """Returns the files to read, and whether their frames are held out."""
    train = folder / "transforms_train.json"
    if not train.is_file():
        return [(folder / "transforms.json", False)]
    if held_out_from is None:
        present = (part for part in ("test", "val") if (folder / f"transforms_{part}.json").is_file())
        held_out_from = next(present, "none")
    if held_out_from == "none":
        return [(train, False)]
    held = folder / f"transforms_{held_out_from}.json"
    if not held.is_file():
        raise UserError(f"{held}: no such file. Add it, or choose another --held-out-from.")
    return [(train, False), (held, True)]


def _read_scene(folder: Path, held_out_from: HeldOutFrom | None, axes: Axes, notes: list[str]) -> Source:
    images: list[Path] = []
    files: list[str] = []
    matrices, intrinsics, held_out = [], [], []
    parts = _parts(folder, held_out_from)
    for file, held in parts:
        meta = read_any_json(file)
        if not isinstance(meta, dict):
            raise UserError(f"{file}: must hold an object with a list of frames.")
        frames, marked = _frames(meta, file), set()
        if len(parts) == 1:
            frames, marked = _listed(meta, frames, file, held_out_from, notes)
        if any("mask_path" in frame for frame in frames):
            notes.append(f"{file}: masks named by its frames (mask_path) are not used")
        for place, frame in enumerate(frames):
            label = f"{file}: frame {place} ({frame['file_path']})"
            merged = {**meta, **frame}
            _refuse_distortion(merged, label)
            image = _image_path(folder, frame["file_path"])
            require_upright(image)
            if held or _plain(frame["file_path"]) in marked:
                held_out.append(len(images))
            images.append(image)
            files.append(label)
            matrices.append(read_matrix(_flat(frame.get("transform_matrix"), label), label, axes))
            intrinsics.append(_intrinsics(merged, image, label))
    if len(held_out) == len(images):
        raise UserError(f"{parts[0][0]}: every frame is held out; none is left to learn from.")
    cameras = Cameras(torch.stack(matrices), torch.tensor(intrinsics, dtype=torch.float64).float())
    return Source(tuple(images), cameras, tuple(files), tuple(held_out) if held_out else None)


def _frames(meta: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Returns the frames in natural order of their images."""
    frames = meta.get("frames")
    if not isinstance(frames, list) or not frames:
        raise UserError(f'{file}: needs {{"frames": [{{"file_path": …, "transform_matrix": …}}, …]}}.')
    for place, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise UserError(f"{file}: frame {place} has no file_path.")
        require_file_name(frame["file_path"], f"{file}: frame {place}")
    return sorted(frames, key=lambda frame: natural_key(frame["file_path"]))


def _listed(
    meta: dict[str, Any],
    frames: list[dict[str, Any]],
    file: Path,
    held_out_from: HeldOutFrom | None,
    notes: list[str],
) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns the frames to use, and the images of those held out, by nerfstudio's lists train_filenames,
    val_filenames and test_filenames. Without any list, all frames and none."""
    parts = ("train", "val", "test")
    given = {part: meta.get(f"{part}_filenames") or [] for part in parts}
    for part, names in given.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: {part}_filenames must be a list of the frames' file_path.")
    lists = {part: set(map(_plain, names)) for part, names in given.items()}
    if not any(lists.values()):
        return frames, set()
    images = {_plain(frame["file_path"]) for frame in frames}
    for part, names in lists.items():
        if unknown := sorted(names - images):
            raise UserError(
                f"{file}: {part}_filenames lists {unknown[0]}, which is no frame's file_path. Correct it."
            )
    if held_out_from is None:
        held = lists["test"] or lists["val"]
    else:
        held = set() if held_out_from == "none" else lists[held_out_from]
        if not held and held_out_from != "none":
            raise UserError(f"{file}: has no {held_out_from}_filenames. Choose another --held-out-from.")
    used = (lists["train"] or images - lists["val"] - lists["test"]) | held
    kept = [frame for frame in frames if _plain(frame["file_path"]) in used]
    if len(kept) < len(frames):
        notes.append(f"{file}: {len(frames) - len(kept)} frames are in no list that is used: left out")
    return kept, held


def _plain(path: str) -> str:
    """Returns a path in one spelling, without a leading ./ and with / between folders."""
    return Path(path.replace("\\", "/")).as_posix()


def _flat(matrix: Any, label: str) -> list[float]:
    try:
        rows = [[float(number) for number in row] for row in matrix if isinstance(row, list)]
    except (TypeError, ValueError, OverflowError):
        rows = []
    if len(rows) not in (3, 4) or len(rows) != len(matrix) or any(len(row) != 4 for row in rows):
        raise UserError(f"{label}: transform_matrix must be 4 rows of 4 numbers.")
    return sum(rows, []) + ([0.0, 0.0, 0.0, 1.0] if len(rows) == 3 else [])


def _image_path(folder: Path, file_path: str) -> Path:
    """Returns the image that a frame names, with or without its extension, maybe in the style of Windows."""
    path = folder / file_path
    if "\\" in file_path and not path.is_file():
        path = folder / file_path.replace("\\", "/")
    if path.is_file() or path.suffix in EXTENSIONS:
        return path
    for extension in EXTENSIONS if path.name else ():
        if (found := path.with_name(path.name + extension)).is_file():
            return found
    raise UserError(f"{path}: no such image, also not as .png or .jpg. Restore it, or remove the frame.")


def _refuse_distortion(frame: dict[str, Any], label: str) -> None:
    if other := [key for key in OTHER_LENSES if _is_set(frame.get(key))]:
        raise UserError(
            f"{label}: {other[0]} = {frame[other[0]]} says that the camera is no pinhole camera. Undistort "
            f"the images first (such as by OpenCV's fisheye module), and remove {', '.join(other)}."
        )
    model = str(frame.get("camera_model", "")).upper()
    if model not in PINHOLES:
        raise UserError(
            f"{label}: camera_model {model!r} is no pinhole camera. Undistort the images first (for "
            "instance with COLMAP's image_undistorter)."
        )
    if bent := [key for key in DISTORTION if _is_set(frame.get(key))]:
        raise UserError(
            f"{label}: the lens is distorted ({bent[0]} = {frame[bent[0]]}), but cameras must be pinhole "
            "cameras. Undistort the images (COLMAP's image_undistorter, or OpenCV's undistort), write the "
            f"new focal lengths, and set {', '.join(bent)} to 0."
        )


def _is_set(value: Any) -> bool:
    """Tells whether the value of a lens key is not false or zero, as a number, a text, or a list of them."""
    if isinstance(value, dict | list):
        return any(map(_is_set, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        try:
            return float(value) != 0
        except ValueError:
            return value.lower() not in ("", "false", "none")
    return bool(value)


def _intrinsics(frame: dict[str, Any], image: Path, label: str) -> list[float]:
    """Returns fx, fy, cx, cy as fractions. Pixels refer to the stated w and h, or else to the image."""
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
    try:
        given = {key: float(frame[key]) for key in keys if frame.get(key) is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{label}: intrinsics must be numbers ({error}).") from None
    height, width = real = image_size(image)
    if "w" in given and "h" in given:
        width, height = given["w"], given["h"]
    if min(width, height) <= 0 or abs(width * real[0] / (height * real[1]) - 1) > 0.02:
        raise UserError(
            f"{label}: states images of {width:g}x{height:g} (w x h), but this one is {real[1]}x{real[0]}, "
            "another shape. Correct w and h, to which fl_x, fl_y, cx and cy refer."
        )
    for axis, side in (("x", width), ("y", height)):
        angle = given.get(f"camera_angle_{axis}")
        if f"fl_{axis}" not in given and angle is not None:
            if not 0 < angle < math.pi:
                raise UserError(f"{label}: camera_angle_{axis} = {angle:g} must lie between 0 and pi.")
            given[f"fl_{axis}"] = 0.5 * side / math.tan(angle / 2)
    fl_x = given.get("fl_x", given.get("fl_y"))
    if fl_x is None:
        raise UserError(f"{label}: no focal length; give fl_x (pixels) or camera_angle_x (radians).")
    cx, cy = given.get("cx", width / 2), given.get("cy", height / 2)
    return [fl_x / width, given.get("fl_y", fl_x) / height, cx / width, cy / height]
