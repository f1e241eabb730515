"""Imports transforms*.json of nerfstudio and Blender (such as NeRF-synthetic).

A scene has one file (transforms.json), perhaps with lists of its parts (train_filenames, val_filenames,
test_filenames), or one file per part (transforms_train.json, …). The test frames then become held-out views.
Cameras are camera-to-world in OpenGL axes (x right, y up, looking along -z), world z up.
"""

from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line
from latentscenes.core.reading import read_any_json, read_bytes
from latentscenes.data.catalog import listed
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
from latentscenes.data.lenses import LENS_KEYS, Lens, read_intrinsics, read_lens
from latentscenes.data.options import Axes, HeldOutFrom, ImportOptions
from latentscenes.data.splits import natural_key

Frame = dict[str, Any]
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG")
"""Tried in this order if file_path has none."""
FRAME_KEYS = {
    "file_path", "mask_path", "transform_matrix", "transform_matrix_start", "transform_matrix_end",
}  # fmt: skip
LISTS = ("train", "val", "test")
FILE_KEYS = {"frames", *(f"{part}_filenames" for part in LISTS)}
HARMLESS = {"rotation", "sharpness", "colmap_im_id", "ply_file_path", "timestamp"}
"""Keys that Blender's script, instant-ngp's and nerfstudio write into every file for themselves."""
READ = FRAME_KEYS | FILE_KEYS | LENS_KEYS | HARMLESS
"""Keys that are read or mean nothing here. Others are named after the import, unless they are empty, zero or
false."""
MITSUBA = "normal_mts_args"
"""Says, in instant-ngp, that matrices have Mitsuba's axes."""
NGP_MASK = "dynamic_mask_"
"""Beginning of the names of instant-ngp's masks, which lie beside the images and are white where nothing is
learned."""
MOST_NAMED = 20
"""Keys that are named one by one."""
CONVERTED = (
    ("keyframes", b"", "Polycam", "polycam"),
    ("metadata*", b'"poses"', "Record3D", "record3d"),
    ("*.xml", b"<document", "Metashape", "metashape"),
    ("*.csv", b"#name,", "RealityCapture", "realitycapture"),
)
"""Leftovers of programs that wrote no transforms.json: a folder or a file, its content, the program, and the
command of nerfstudio's ns-process-data that converts it."""
STILL = 1e-4
"""Greatest difference of the matrices at the beginning and the end of an exposure, relative to their size."""


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
            raise UserError(
                f"{folder}: no transforms.json or transforms_train.json, even in subfolders.{_hint(folder)}"
            )
        if bare := [entry for entry in subfolders(folder) if entry.name not in scenes]:
            raise UserError(
                f"{bare[0]}: has no transforms.json or transforms_train.json, but {next(iter(scenes))} has. "
                "Move it away."
            )
    notes: list[str] = []
    unread: dict[str, set[str]] = {}
    for scene in scenes.values():
        used = [file.name for file, _ in _parts(scene, held_out_from)]
        if unused := sorted(file.name for file in scene.glob("transforms*.json") if file.name not in used):
            notes.append(f"{scene}: {', '.join(unused)} not used")

    def load(name: str) -> Source:
        source, keys = _read_scene(scenes[name], held_out_from, axes, notes)
        for key in keys:
            unread.setdefault(key, set()).add(name)
        return source

    made = import_scenes(folder, list(scenes), load, out, options or ImportOptions(), axes, notes)
    return replace(made, notes=(*made.notes, *_unread(unread)))


def _unread(keys: dict[str, set[str]]) -> list[str]:
    """One remark on the keys that were not read."""
    if not keys:
        return []
    names = [one_line(key) for key in sorted(keys)]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"keys that are not used: {', '.join(names[:MOST_NAMED])}{more}"]


def _described(folder: Path) -> bool:
    return any((folder / f"transforms{part}.json").is_file() for part in ("", "_train"))


def _hint(folder: Path) -> str:
    """What to do with a folder that another program left."""
    for place in (folder, *subfolders(folder)):
        if (place / "sparse").is_dir() or (place / "colmap").is_dir():
            return f" {place} holds a COLMAP model: latentscenes data photos reads it."
        for pattern, holds, program, command in CONVERTED:
            for found in place.glob(pattern):
                if _holds(found, holds):
                    return (
                        f" {found} seems to be of {program}: nerfstudio's ns-process-data {command} makes "
                        "transforms.json of it."
                    )
    return ""


def _holds(place: Path, content: bytes) -> bool:
    """Whether a file holds these bytes; for none, whether `place` is a folder."""
    try:
        return content in read_bytes(place) if content else place.is_dir()
    except OSError:
        return False


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


def _read_scene(
    folder: Path, held_out_from: HeldOutFrom | None, axes: Axes, notes: list[str]
) -> tuple[Source, set[str]]:
    """Returns a scene, and the keys of its files that are not read."""
    images: list[Path] = []
    files: list[str] = []
    matrices, intrinsics, held_out, masks, lenses = [], [], [], [], []
    parts, unread = _parts(folder, held_out_from), set()
    for file, held in parts:
        meta = read_any_json(file)
        if not isinstance(meta, dict):
            raise UserError(f"{file}: must hold an object with a list of frames.")
        if MITSUBA in meta:
            raise UserError(
                f"{file}: {MITSUBA} says that its matrices have Mitsuba's axes. Turn them to OpenGL's (x "
                f"right, y up, looking along -z) and remove {MITSUBA}."
            )
        frames, marked = _frames(meta, file), set()
        if len(parts) == 1:
            frames, marked = _listed(meta, frames, file, held_out_from, notes)
        for place, (frame, image) in enumerate(_present(folder, frames, file, notes)):
            label = f"{file}: frame {place} ({frame['file_path']})"
            require_upright(image)
            pinhole = read_intrinsics((frame, meta), image_size(image), label)
            lens = read_lens({**meta, **frame}, pinhole, label)
            if held or _plain(frame["file_path"]) in marked:
                held_out.append(len(images))
            images.append(image)
            files.append(label)
            masks.append(_mask_path(folder, {**meta, **frame}.get("mask_path"), label))
            lenses.append(lens)
            matrices.append(read_matrix(_flat(_matrix(frame, label), label), label, axes))
            intrinsics.append(pinhole if lens is None else lens.pinhole)
        unread.update(key for level in (meta, *frames) for key, value in level.items() if value)
    if len(held_out) == len(images):
        raise UserError(f"{parts[0][0]}: every frame is held out; none is left to learn from.")
    notes += _notes(folder, images, lenses)
    cameras = Cameras(torch.stack(matrices), torch.tensor(intrinsics, dtype=torch.float64).float())
    source = Source(
        tuple(images), cameras, tuple(files), tuple(held_out) if held_out else None,
        tuple(masks) if any(masks) else (), tuple(lenses) if any(lenses) else (),
    )  # fmt: skip
    return source, unread - READ


def _notes(folder: Path, images: list[Path], lenses: list[Lens | None]) -> list[str]:
    """Remarks on a scene's lenses, and on masks of instant-ngp beside its images."""
    notes = []
    if bent := [lens for lens in lenses if lens is not None]:
        zoom = max(lens.zoom for lens in bent)
        larger = (
            f", and enlarged by up to {100 * (zoom - 1):.1f} % so that no pixel is empty" if zoom > 1 else ""
        )
        notes.append(f"{folder}: {len(bent)} of {len(lenses)} images are undistorted{larger}")
    for place in sorted({image.parent for image in images}):
        if found := sum(1 for _ in place.glob(f"{NGP_MASK}*.png")):
            notes.append(
                f"{place}: not used: {counted(found, 'mask')} named {NGP_MASK}…; masks are named by mask_path"
            )
    return notes


def _matrix(frame: dict[str, Any], label: str) -> Any:
    """Returns a frame's matrix. Refuses a camera that moves during the exposure."""
    ends = [frame[key] for key in ("transform_matrix_start", "transform_matrix_end") if key in frame]
    if not ends:
        return frame.get("transform_matrix")
    first, *others = [np.array(_flat(end, label)) for end in ends]
    if any(np.abs(other - first).max() > STILL * max(1.0, np.abs(first).max()) for other in others):
        raise UserError(
            f"{label}: its camera moves during the exposure (transform_matrix_start and _end differ), and "
            "only cameras at rest are read. Replace both by one transform_matrix, or remove the frame."
        )
    return frame.get("transform_matrix", ends[0])


def _mask_path(folder: Path, name: Any, label: str) -> Path | None:
    """Returns the mask that a frame names; None if it names none."""
    if not name:
        return None
    if not isinstance(name, str):
        raise UserError(f"{label}: mask_path must be a file's path.")
    path = _found(folder, require_file_name(name, label))
    if not path.is_file():
        raise UserError(f"{path}: no such mask, which {label} names. Restore it, or remove mask_path.")
    return path


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
    given = {part: meta.get(f"{part}_filenames") or [] for part in LISTS}
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
        notes.append(
            f"{file}: left out, as no list that is used names them: "
            f"{counted(len(frames) - len(kept), 'frame')}"
        )
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


def _found(folder: Path, name: str) -> Path:
    """Returns the path that a file names, maybe in the style of Windows. Of an absolute path of another
    machine, the longest end counts that is in the folder."""
    if (path := folder / name).is_file():
        return path
    plain = PureWindowsPath(name)  # takes both kinds of slashes
    absolute = bool(plain.root or plain.drive)
    for first in range(1, len(plain.parts)) if absolute else ():
        if (end := folder.joinpath(*plain.parts[first:])).is_file():
            return end
    return path if absolute else folder / plain.as_posix()


def _image_path(folder: Path, file_path: str) -> Path | None:
    """Returns the image that a frame names, with or without its extension; None if it is not there."""
    for extension in ("", *EXTENSIONS):
        if (path := _found(folder, file_path + extension)).is_file():
            return path
    return None


def _present(folder: Path, frames: list[Frame], file: Path, notes: list[str]) -> list[tuple[Frame, Path]]:
    """Returns the frames whose images are there, with these. Some files, such as instant-ngp's fox, list
    pictures that were sorted out; where half or more are absent, a folder is."""
    found = [(frame, _image_path(folder, frame["file_path"])) for frame in frames]
    lost = [frame["file_path"] for frame, path in found if path is None]
    if 2 * len(lost) >= len(frames):
        raise UserError(
            f"{folder / lost[0]}: no such image, also not as .png, .jpg or .webp; {len(lost)} of "
            f"{len(frames)} that {file.name} lists are absent. Restore them, or remove their frames."
        )
    if lost:
        notes.append(f"{file}: left out, as their images are absent: {listed([*map(one_line, lost)])}")
    return [(frame, path) for frame, path in found if path is not None]
