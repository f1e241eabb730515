"""nerfstudio's and Blender's transforms*.json (NeRF-synthetic and the like).

One file per scene (transforms.json), or one per part (transforms_train.json, _val, _test): then the test
frames become the scene's held-out views. Cameras are OpenGL's (x right, y up, looking along -z),
camera-to-world, world z up.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.checks import Axes, read_matrix
from latentscenes.data.images import image_size
from latentscenes.data.importing import (
    Imported,
    ImportOptions,
    Progress,
    Source,
    import_scenes,
    natural_key,
    open_folder,
    subfolders,
)

HeldOutFrom = Literal["test", "val", "none"]
EXTENSIONS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
"""Tried in this order where file_path has none."""
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
PINHOLES = {"", "OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE"}


def make_transforms(
    folder: str | Path,
    out: str | Path,
    *,
    held_out_from: HeldOutFrom | None = None,
    axes: Axes = "opengl",
    options: ImportOptions | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Pack one scene, or a folder of scenes, described by transforms*.json into a dataset.

    Args:
        folder: a folder with transforms*.json, or a folder of such folders (one scene each, named after
            them).
        out: the dataset to make; must not exist yet, or be an empty folder.
        held_out_from: whose frames become the held-out views, where a scene has a file for each part: `test`,
            `val`, or `none` (only the training frames are read, and `options.held_out` of them held out). By
            default `test` where there is such a file, else `val`, else none. Frames of the part not chosen
            are not read.
        axes: `opencv` if matrices look along +z with y down, against the layout's custom.
        options: size, box, background, splits, held-out views: see `ImportOptions`.
        progress: called after each scene.
    """
    folder = open_folder(folder)
    if _described(folder):
        scenes = {folder.resolve().name: folder}
    else:
        scenes = {entry.name: entry for entry in subfolders(folder) if _described(entry)}
        if not scenes:
            raise UserError(
                f"{folder}: no transforms.json or transforms_train.json here or in its subfolders."
            )
        if bare := [entry for entry in subfolders(folder) if entry.name not in scenes]:
            raise UserError(
                f"{bare[0]}: has no transforms.json or transforms_train.json, though {next(iter(scenes))} "
                "has. Move it away."
            )
    notes: list[str] = []
    for scene in scenes.values():
        used = [file.name for file, _ in _parts(scene, held_out_from)]
        if unused := sorted(file.name for file in scene.glob("transforms*.json") if file.name not in used):
            notes.append(f"{scene}: {', '.join(unused)} not used")
    return import_scenes(
        folder,
        list(scenes),
        lambda name: _read_scene(scenes[name], held_out_from, axes, notes),
        out,
        options or ImportOptions(),
        axes,
        progress,
        notes,
    )


def _described(folder: Path) -> bool:
    return (folder / "transforms.json").is_file() or (folder / "transforms_train.json").is_file()


def _parts(folder: Path, held_out_from: HeldOutFrom | None) -> list[tuple[Path, bool]]:
    """The files to read, and whether their frames are held out."""
    train = folder / "transforms_train.json"
    if not train.is_file():
        return [(folder / "transforms.json", False)]
    if held_out_from is None:
        held_out_from = next(
            (part for part in ("test", "val") if (folder / f"transforms_{part}.json").is_file()), "none"
        )
    if held_out_from == "none":
        return [(train, False)]
    held = folder / f"transforms_{held_out_from}.json"
    if not held.is_file():
        raise UserError(
            f"{held}: no such file, though held-out views were to come from it. Choose another held_out_from."
        )
    return [(train, False), (held, True)]


def _read_scene(folder: Path, held_out_from: HeldOutFrom | None, axes: Axes, notes: list[str]) -> Source:
    images: list[Path] = []
    files: list[str] = []
    matrices, intrinsics, held_out = [], [], []
    parts = _parts(folder, held_out_from)
    for file, held in parts:
        meta = _read_json(file)
        named_test = set(map(str, meta.get("test_filenames") or []))
        frames = _frames(meta, file)
        if any("mask_path" in frame for frame in frames):
            notes.append(f"{file}: its frames name masks (mask_path), which are not used")
        for place, frame in enumerate(frames):
            label = f"{file}: frame {place} ({frame['file_path']})"
            merged = {**meta, **frame}
            _refuse_distortion(merged, label)
            image = _image_path(folder, frame["file_path"])
            if held or frame["file_path"] in named_test:
                held_out.append(len(images))
            images.append(image)
            files.append(label)
            matrices.append(read_matrix(_flat(frame.get("transform_matrix"), label), label, axes))
            intrinsics.append(_intrinsics(merged, image, label))
    if held_out and len(held_out) == len(images):
        raise UserError(f"{parts[0][0]}: every frame is held out; none is left to learn from.")
    cameras = Cameras(torch.stack(matrices), torch.tensor(intrinsics, dtype=torch.float64).float())
    return Source(tuple(images), cameras, tuple(files), tuple(held_out) if held_out else None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a readable JSON file ({error}).") from None
    if not isinstance(meta, dict):
        raise UserError(f"{file}: must hold an object with a list of frames.")
    return meta


def _frames(meta: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """The frames in natural order of their images."""
    frames = meta.get("frames")
    if not isinstance(frames, list) or not frames:
        raise UserError(
            f'{file}: has no frames; expected {{"frames": [{{"file_path": …, "transform_matrix": …}}, …]}}.'
        )
    for place, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise UserError(f"{file}: frame {place} has no file_path.")
    return sorted(frames, key=lambda frame: natural_key(frame["file_path"]))


def _flat(matrix: Any, label: str) -> list[float]:
    try:
        rows = [[float(number) for number in row] for row in matrix]
    except (TypeError, ValueError):
        raise UserError(f"{label}: transform_matrix must be 4 rows of 4 numbers.") from None
    if len(rows) == 3 and all(len(row) == 4 for row in rows):
        rows.append([0.0, 0.0, 0.0, 1.0])
    if any(len(row) != 4 for row in rows):
        raise UserError(f"{label}: transform_matrix must be 4 rows of 4 numbers.")
    return [number for row in rows for number in row]


def _image_path(folder: Path, file_path: str) -> Path:
    """The image a frame names, with or without its extension."""
    path = folder / file_path
    if path.is_file():
        return path
    if path.suffix in EXTENSIONS:
        return path  # absent: reading it says so
    for extension in EXTENSIONS:
        if (found := path.with_name(path.name + extension)).is_file():
            return found
    raise UserError(
        f"{path}: no such image, with .png, .jpg or .jpeg added or without, though transforms name it. "
        "Restore it, or remove the frame."
    )


def _refuse_distortion(frame: dict[str, Any], label: str) -> None:
    model = str(frame.get("camera_model", "")).upper()
    if model not in PINHOLES:
        raise UserError(
            f"{label}: camera_model {model!r} is no pinhole camera. Undistort the images first (COLMAP's "
            "image_undistorter, say)."
        )
    bent = [key for key in DISTORTION if frame.get(key)]
    if bent:
        raise UserError(
            f"{label}: the lens is distorted ({bent[0]} = {frame[bent[0]]}), and only pinhole cameras are "
            "rendered here. Undistort the images (COLMAP's image_undistorter, or OpenCV's undistort), "
            f"write the new focal lengths, and set {', '.join(bent)} to 0."
        )


def _intrinsics(frame: dict[str, Any], image: Path, label: str) -> list[float]:
    """fx, fy, cx, cy as fractions of the image; pixels are those of the stated w and h, or else of the
    image."""
    try:
        given = {
            key: float(frame[key])
            for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
            if frame.get(key) is not None
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"{label}: intrinsics must be numbers ({error}).") from None
    height, width = real = image_size(image)
    if "w" in given and "h" in given:
        width, height = given["w"], given["h"]
    if min(width, height) <= 0 or abs(width * real[0] / (height * real[1]) - 1) > 0.02:
        raise UserError(
            f"{label}: states images of {width:g}x{height:g} (w x h), but this one is {real[1]}x{real[0]}: "
            "another shape. Correct w and h, to which fl_x, fl_y, cx and cy refer."
        )
    for axis in ("x", "y"):
        angle = given.get(f"camera_angle_{axis}")
        if f"fl_{axis}" not in given and angle is not None:
            if not 0 < angle < math.pi:
                raise UserError(
                    f"{label}: camera_angle_{axis} is {angle:g}; it must lie between 0 and pi (radians)."
                )
            given[f"fl_{axis}"] = 0.5 * (width if axis == "x" else height) / math.tan(angle / 2)
    fl_x = given.get("fl_x", given.get("fl_y"))
    if fl_x is None:
        raise UserError(
            f"{label}: no focal length; give fl_x (pixels) or camera_angle_x (radians), at the top or per "
            "frame."
        )
    fl_y = given.get("fl_y", fl_x)
    return [
        fl_x / width,
        fl_y / height,
        given.get("cx", width / 2) / width,
        given.get("cy", height / 2) / height,
    ]
