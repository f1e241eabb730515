"""Renders meshes (GLB, glTF, OBJ, PLY) of a folder or archive into a dataset.

- Every file that cannot be read is reported with the reason.
- Each format has a reader of its own (gltf.py, obj.py, ply.py); parts that it leaves out are reported.
- Objects are moved and scaled: bounding box centered at the origin, with diagonal 1, z up.
- Several processes render; finished objects are kept until the dataset is complete (work.py).
"""

from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.core.reading import reason
from latentscenes.data.catalog import listed
from latentscenes.data.dataset import Split, spread
from latentscenes.data.meshes.gltf import read_gltf
from latentscenes.data.meshes.obj import read_obj
from latentscenes.data.meshes.ply import read_ply
from latentscenes.data.meshes.sources import FORMATS, FoundMeshes, find_sources
from latentscenes.data.meshes.surfaces import Remarks, to_soup
from latentscenes.data.meshes.work import Job, Rendered, Work, render_jobs, work_folder
from latentscenes.data.options import MeshChoice, MeshOptions, ViewOptions
from latentscenes.data.placing import rotation
from latentscenes.data.raycast import DEFAULT_VIEWS, TriangleSoup, own_box, render_views, scene_box
from latentscenes.data.shading import LIGHTS
from latentscenes.data.splits import choose_splits
from latentscenes.data.writing import DatasetWriter

MESHES = MeshOptions()
ALL = MeshChoice()


def make_meshes(
    folder: Path,
    out: Path,
    options: ViewOptions = DEFAULT_VIEWS,
    reading: MeshOptions = MESHES,
    choice: MeshChoice = ALL,
) -> None:
    """Renders meshes into a new dataset. A stopped call goes on when it is made again.

    Args:
        folder: a folder, searched with its subfolders and the archives in it; an archive; or one mesh.
        out: the dataset's folder; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        reading: how files are read: axes, turn, scale, light.
        choice: catalog, splits, limit, processes, and whether the first unreadable file ends the import.

    Raises:
        UserError: nothing can be read, or `choice.strict` and one file cannot.
        Interrupted: a signal asked to stop. Finished objects are kept.
    """
    out = Path(out)
    writer = DatasetWriter(out, (options.size, options.size), alpha=True, origin=f"meshes {folder}")
    with work_folder(out) as work:
        found = find_sources(Path(folder), choice.catalog, work)
        say(_summary(Path(folder), found))
        splits = choose_splits(list(found.files), choice.split, choice.new)
        unlisted = sorted(set(found.files) - set(splits))
        splits = _at_most(choice.limit, splits)
        jobs = [_job(name, found) for name in splits]
        for suffix in {job.path.suffix.lower() for job in jobs}:
            _matrix(suffix, reading)  # refuses a wrong axis before anything is rendered
        files = [job.file(work, options, reading) for job in jobs]
        failed = {}
        prepare = partial(_renderer, work, options, reading)
        for job, error in render_jobs(jobs, files, prepare, choice.workers):
            if error and choice.strict:
                raise UserError(found.plain(error))
            failed |= {job.name: found.plain(error)} if error else {}
        done = [(job, file) for job, file in zip(jobs, files) if job.name not in failed]
        if not done:
            reasons = "\n".join(failed.values())
            raise UserError(f"{folder}: none of {len(jobs)} meshes could be read.\n{reasons}")
        remarks = _write(writer, done, found, splits, options)
    lines = [f"{out}: {counted(len(done), 'scene')}", *map(found.plain, _grouped(remarks))]
    lines += [f"remark: {remark}" for remark in found.remarks]
    if unlisted:
        lines.append(f"{len(unlisted)} left out, as the split file does not name them: {listed(unlisted)}")
    if failed or found.failed:
        count = len(splits) + len(found.failed)
        lines.append(f"{len(failed) + len(found.failed)} of {count} could not be read:")
        lines += [
            f"  {reason}" for reason in [*found.failed, *(failed[name] for name in splits if name in failed)]
        ]
    say("\n".join(lines))


def _summary(folder: Path, found: FoundMeshes) -> str:
    """A count of the meshes found, for people."""
    kinds = [path.suffix.lower() for path in found.files.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind[1:].upper()}" for kind in sorted(set(kinds)))
    rows = f"; {len(found.rows)} with a row in a catalog" if found.rows else ""
    return f"{folder}: {counted(len(kinds), 'mesh', 'meshes')} ({counts}){rows}"


def _job(name: str, found: FoundMeshes) -> Job:
    row = found.rows.get(name)
    return Job(name, found.files[name], found.stamps[name], row.rotation if row else None)


def _renderer(work: Path, options: ViewOptions, reading: MeshOptions) -> Work:
    """Returns the function that reads and renders one mesh into its file."""

    def render(job: Job) -> str:
        try:
            soup, remarks = read_mesh(job.path, reading, job.rotation)
            pictures = render_views(job.name, soup, options, LIGHTS[reading.light])
        except UserError as error:
            return str(error) if str(job.path) in str(error) else f"{job.path}: {error}"
        Rendered(*pictures, soup.bounds, remarks).save(job.file(work, options, reading))
        return ""

    return render


def _write(
    writer: DatasetWriter,
    done: list[tuple[Job, Path]],
    found: FoundMeshes,
    splits: dict[str, Split],
    options: ViewOptions,
) -> dict[str, tuple[str, ...]]:
    """Writes the dataset from finished objects. Returns the remarks on each."""
    bounds, remarks = [], {}
    held_out = spread(options.views, options.held_out)
    with writer:
        for job, file in done:
            views, row = Rendered.load(file), found.rows.get(job.name)
            box, tags = own_box(views.bounds, options), row.tags if row else None
            split = splits[job.name]
            writer.add(job.name, views.rgb, views.cameras, split, held_out, views.alpha, box, tags)
            bounds.append(views.bounds)
            remarks[job.name] = views.remarks
        writer.finish(scene_box(bounds, options))
    return remarks


def _grouped(remarks: dict[str, tuple[str, ...]]) -> list[str]:
    """One line for each kind of remark, with the objects it holds for."""
    names: dict[str, list[str]] = {}
    for name, lines in remarks.items():
        for line in lines:
            names.setdefault(line, []).append(name)
    return [f"remark: {line}: {listed(group)}" for line, group in names.items()]


def _at_most(limit: int | None, splits: dict[str, Split]) -> dict[str, Split]:
    """Returns the first `limit` scenes of each split; None: all."""
    kept = {name for part in ("train", "new") for name in [n for n in splits if splits[n] == part][:limit]}
    return {name: part for name, part in splits.items() if name in kept}


def read_mesh(
    path: Path, reading: MeshOptions = MESHES, turn: tuple[float, ...] | None = None
) -> tuple[TriangleSoup, tuple[str, ...]]:
    """Reads a mesh file as a soup with z up, centered, of bounding-box diagonal `scale`. Also returns what
    the reader left out or did not find.

    Args:
        turn: turns the file's coordinates first: a 3x3 matrix, row by row.

    Raises:
        UserError: the file cannot be read, or holds no triangles.
    """
    suffix, remarks = path.suffix.lower(), Remarks()
    try:
        with np.errstate(all="ignore"):  # numbers that are none are looked for afterwards
            if suffix == ".obj":
                surfaces = read_obj(path, remarks, reading.multiply_kd)
            else:
                surfaces = (read_ply if suffix == ".ply" else read_gltf)(path, remarks)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from None
    matrix = _matrix(suffix, reading)
    if turn is not None:
        own = np.array(turn).reshape(3, 3)
        if np.abs(own @ own.T - np.eye(3)).max() < 0.01:
            matrix = matrix @ own
        else:
            remarks.add("the catalog's modelRotation is no rotation and is left out")
    return to_soup(path, surfaces, matrix), tuple(remarks)


def _matrix(suffix: str, reading: MeshOptions) -> Float[np.ndarray, "3 3"]:
    up = FORMATS[suffix] if reading.up == "auto" else reading.up
    return reading.scale * rotation(up, reading.front, reading.turn)
