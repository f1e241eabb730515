"""Objects rendered by several processes, each kept in a file until the dataset is written.

While a dataset OUT is made, finished objects lie in the folder OUT.work. A file's name is a checksum of all
that decides its content: the mesh file, the options, the version. So an import that was stopped goes on,
and one with other options begins anew. The folder is removed when the dataset is complete.
"""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from latentscenes.core.cameras import Cameras
from latentscenes.core.console import say, tracked
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.files import locked, write_bytes, writing_to
from latentscenes.core.names import counted
from latentscenes.core.processes import side_by_side
from latentscenes.core.runtime import StopFlag, set_up
from latentscenes.core.version import __version__
from latentscenes.data.options import MeshOptions, ViewOptions

LEAST = 4
"""Objects for each process: fewer are rendered sooner than a process starts."""


@dataclass(frozen=True)
class Rendered:
    """The views of one object."""

    rgb: UInt8[np.ndarray, "v H W 3"]
    alpha: UInt8[np.ndarray, "v H W"]
    cameras: Cameras
    bounds: Float32[np.ndarray, "2 3"]
    """Lowest and highest x, y, z of the object."""
    remarks: tuple[str, ...]
    """Parts that the reader left out or did not find."""

    def save(self, path: Path) -> None:
        """Writes a zip archive of arrays, packed quickly."""
        cam2world, intrinsics = self.cameras.cam2world.numpy(), self.cameras.intrinsics.numpy()
        arrays = {
            "rgb": self.rgb, "alpha": self.alpha, "cam2world": cam2world, "intrinsics": intrinsics,
            "bounds": self.bounds, "remarks": np.frombuffer(json.dumps(self.remarks).encode(), np.uint8),
        }  # fmt: skip
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
        write_bytes(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Rendered":
        """Reads what `save` wrote. Raises a UserError if the file is damaged, and removes it."""
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            cameras = Cameras(*(torch.from_numpy(arrays[key]) for key in ("cam2world", "intrinsics")))
            remarks = tuple(json.loads(arrays["remarks"].tobytes()))
            return cls(arrays["rgb"], arrays["alpha"], cameras, arrays["bounds"], remarks)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: damaged ({error}), and removed. Run the same command again; it renders this object "
                "anew."
            ) from None


@dataclass(frozen=True)
class Job:
    """One object to render."""

    name: str
    path: Path
    stamp: tuple[Any, ...]
    """A stamp of the content of the mesh file and of the files that it names."""
    rotation: tuple[float, ...] | None = None
    """Turns the mesh in its own axes, 3x3 row by row."""

    def file(self, folder: Path, views: ViewOptions, reading: MeshOptions) -> Path:
        """Where the rendered object is kept."""
        decisive = [__version__, self.name, self.stamp, self.rotation, asdict(views), asdict(reading)]
        return folder / f"{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]}.npz"


Work = Callable[[Job], str]
"""Renders a job into its file; returns the mesh's fault, or an empty text."""


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Holds the folder OUT.work. It is removed at the end, or kept with its finished objects after an error
    or a stop. Its subfolder `unpacked` is removed in any case.

    Raises:
        UserError: another process works there.
    """
    folder = out.with_name(f"{out.name}.work")
    if (out / "views.json").is_file():  # a process was killed between completing it and the removal
        shutil.rmtree(folder, ignore_errors=True)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", False, f"{folder}: another process makes this dataset"):
        shutil.rmtree(folder / "unpacked", ignore_errors=True)
        try:
            yield folder
        except BaseException as error:
            shutil.rmtree(folder / "unpacked", ignore_errors=True)
            kept = len(list(folder.glob("*.npz")))
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(error, Interrupted | KeyboardInterrupt):
                say(f"{folder}: keeps {counted(kept, 'finished object')} for the same command.")
            raise
        shutil.rmtree(folder, ignore_errors=True)


def render_jobs(
    jobs: Sequence[Job], files: Sequence[Path], prepare: Callable[[], Work], workers: int
) -> Iterator[tuple[Job, str]]:
    """Renders the jobs whose files are not there yet. Yields each of them with its fault, in any order.

    Args:
        prepare: a picklable function that returns the work of a process.
        workers: processes; 0: one per core.

    Raises:
        Interrupted: a signal asked to stop. Finished objects are kept.
    """
    waiting = [job for job, file in zip(jobs, files, strict=True) if not file.is_file()]
    cores = torch.get_num_threads()
    workers = min(workers or min(cores, len(waiting) // LEAST), len(waiting)) or 1
    if found := len(jobs) - len(waiting):
        say(f"{found} of {len(jobs)} objects {'is' if found == 1 else 'are'} there from a stopped command.")
    if waiting and (others := len(list(files[0].parent.glob("*.npz"))) - found):
        say(
            f"{counted(others, 'object')} of a stopped command had other options or files, and will not be "
            "used."
        )
    say(f"rendering {counted(len(waiting), 'object')} in {counted(workers, 'process', 'processes')} …")
    threads = max(1, cores // workers)
    if workers == 1:
        done = _in_turn(prepare(), waiting)
    else:
        done = side_by_side(partial(_prepared, prepare, threads), waiting, workers)
    yield from tracked(done, "rendering meshes", len(waiting))


def _in_turn(work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    with StopFlag() as stopped:
        for job in jobs:
            if stopped:
                raise Interrupted
            yield job, work(job)


def _prepared(prepare: Callable[[], Work], threads: int) -> Callable[[Job], tuple[Job, str]]:
    """Runs in a worker process."""
    set_up(threads, "cpu")
    work = prepare()
    return lambda job: (job, work(job))
