"""Renders a folder of meshes (GLB, glTF, OBJ, PLY) into a dataset.

- Every file that cannot be read is reported with the reason.
- Each format has a reader of its own (gltf.py, obj.py, ply.py); what it leaves out is reported.
- Objects are moved and scaled: bounding box centered at the origin, with diagonal 1, z up.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from latentscenes.core.console import say, tracked
from latentscenes.core.errors import UserError
from latentscenes.core.reading import reason
from latentscenes.data.dataset import DatasetWriter, Split
from latentscenes.data.importing import choose_splits, is_leftover
from latentscenes.data.meshes.gltf import read_gltf
from latentscenes.data.meshes.obj import read_obj
from latentscenes.data.meshes.ply import read_ply
from latentscenes.data.meshes.surfaces import Remarks, to_soup
from latentscenes.data.options import MeshOptions, ViewOptions
from latentscenes.data.placing import rotation
from latentscenes.data.raycast import DEFAULT_VIEWS, TriangleSoup, render_object, scene_box
from latentscenes.data.shading import LIGHTS

FORMATS = {".glb": "y", ".gltf": "y", ".obj": "y", ".ply": "z"}
"""Readable formats, and the axis that points up if `up` is "auto"."""
MESHES = MeshOptions()
NAMED = 8
"""Objects that a remark names; of more it gives the number."""


def make_meshes(
    folder: Path,
    out: Path,
    options: ViewOptions = DEFAULT_VIEWS,
    *,
    split: Path | None = None,
    new: int = 0,
    reading: MeshOptions = MESHES,
    limit: int | None = None,
    strict: bool = False,
) -> None:
    """Renders meshes into a new dataset.

    Args:
        folder: a folder, searched with its subfolders, or one file.
        out: the dataset's folder; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        split: JSON file {"train": [...], "new": [...]} with file names without their endings.
        new: without `split`: mark the last meshes by name, this many, as new; the others as train.
        reading: how files are read: axes, turn, scale, light.
        limit: read at most this many meshes of each split.
        strict: raise a UserError for the first file that cannot be read, instead of reporting it at the end.
    """
    files = find_meshes(Path(folder))
    listed = choose_splits(list(files), split, new)
    splits, unlisted = _at_most(limit, listed), sorted(set(files) - set(listed))
    for suffix in {path.suffix.lower() for path in files.values()}:
        _matrix(suffix, reading)  # refuses a wrong axis before anything is rendered
    bounds, failed, remarks = [], {}, {}
    size = options.size, options.size
    with DatasetWriter(out, size, alpha=True, origin=f"meshes {folder}") as writer:
        for name in tracked(splits, "rendering meshes"):
            try:
                soup, remarks[name] = read_mesh(files[name], reading)
                render_object(writer, name, soup, splits[name], options, LIGHTS[reading.light])
            except UserError as error:
                if strict:
                    raise
                failed[name] = str(error) if str(files[name]) in str(error) else f"{files[name]}: {error}"
                continue
            bounds.append(soup.bounds)
        if not bounds:
            reasons = "\n".join(failed.values())
            raise UserError(f"{folder}: none of {len(splits)} meshes could be read.\n{reasons}")
        writer.finish(scene_box(bounds, options))
    lines = [f"{out}: {len(bounds)} scenes"]
    lines += _grouped(remarks)
    if unlisted:
        some = ", ".join(unlisted[:3]) + (" …" if len(unlisted) > 3 else "")
        lines.append(f"{len(unlisted)} left out, as the split file does not name them: {some}")
    if failed:
        lines.append(f"{len(failed)} of {len(splits)} could not be read:")
        lines += [f"  {reason}" for reason in failed.values()]
    say("\n".join(lines))


def _grouped(remarks: dict[str, tuple[str, ...]]) -> list[str]:
    """One line for each kind of remark, with the objects it holds for."""
    names: dict[str, list[str]] = {}
    for name, lines in remarks.items():
        for line in lines:
            names.setdefault(line, []).append(name)
    shown = {
        line: ", ".join(group[:NAMED]) + (f" and {len(group) - NAMED} more" if len(group) > NAMED else "")
        for line, group in names.items()
    }
    return [f"remark: {line}: {group}" for line, group in shown.items()]


def find_meshes(folder: Path) -> dict[str, Path]:
    """Returns mesh files by name, sorted. A name is the path inside the folder, `/` as `__`, no ending."""
    if folder.is_file():
        if folder.suffix.lower() not in FORMATS:
            raise UserError(f"{folder}: not a readable mesh format; give {', '.join(FORMATS)}.")
        return {folder.stem: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    files: dict[str, Path] = {}
    for path in sorted(_walk(folder)):
        if path.suffix.lower() in FORMATS and path.is_file():
            name = "__".join(path.relative_to(folder).with_suffix("").parts)
            if name in files:
                raise UserError(f"{path} and {files[name]} are both named {name!r}; rename or remove one.")
            files[name] = path
    if not files:
        raise UserError(f"{folder}: holds no mesh ({', '.join(FORMATS)}), even in subfolders.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, without leftovers; linked folders are followed, each once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_leftover(name)]
        if (real := os.path.realpath(place)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names if not is_leftover(name))


def _at_most(limit: int | None, splits: dict[str, Split]) -> dict[str, Split]:
    """Returns the first `limit` scenes of each split; None: all."""
    kept = {name for part in ("train", "new") for name in [n for n in splits if splits[n] == part][:limit]}
    return {name: part for name, part in splits.items() if name in kept}


def read_mesh(path: Path, reading: MeshOptions = MESHES) -> tuple[TriangleSoup, tuple[str, ...]]:
    """Reads a mesh file as a soup with z up, centered, of bounding-box diagonal `scale`. Also returns what
    the reader left out or did not find.

    Raises:
        UserError: the file cannot be read, or holds no triangles.
    """
    suffix, remarks = path.suffix.lower(), Remarks()
    try:
        if suffix == ".obj":
            surfaces = read_obj(path, remarks, reading.multiply_kd)
        else:
            surfaces = (read_ply if suffix == ".ply" else read_gltf)(path, remarks)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from None
    return to_soup(path, surfaces, _matrix(suffix, reading)), tuple(remarks)


def _matrix(suffix: str, reading: MeshOptions) -> Float[np.ndarray, "3 3"]:
    up = FORMATS[suffix] if reading.up == "auto" else reading.up
    return reading.scale * rotation(up, reading.front, reading.turn)
