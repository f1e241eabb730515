"""What benchmarks/faults.py does harm to: commands with their right results, writers and readers at work."""

import hashlib
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.core.files import PARTIAL, file_checksum
from latentscenes.data.dataset import PosedImages, verify
from latentscenes.storage import maintenance, verifying
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.published.reader import PublishedLibrary
from latentscenes.storage.run import Run

SETTINGS = """
codec: {kind: identity}
planes: {resolution: 8, micro: 4, macro: 4, bases: 2}
field: {hidden: 16}
render: {coarse: 8, fine: 6}
train: [{name: scenes, epochs: 4, scenes: 2, views: 2, losses: {latent: 1},
         rates: {micro: 1e-2, weights: 1e-2, bases: 1e-2, field: 1e-2}}]
exploit: [{name: fit, epochs: 2, scenes: 1, views: 2, losses: {latent: 1},
           rates: {micro: 1e-2, weights: 1e-2}}]
"""


@dataclass(frozen=True)
class Case:
    """A command that writes to `{out}`."""

    name: str
    command: str
    start: str | None = None
    """Folder that is copied to `{out}` first."""


CASES = (
    Case("train", "train --config {home}/tiny.yaml --data {home}/cars --out {out} --threads 1"),
    Case(
        "train, rows in files",
        "train --config {home}/tiny.yaml --data {home}/cars --out {out} --threads 1 --set storage=disk",
    ),
    Case(
        "exploit", "exploit --run {home}/run --data {home}/cars --out {out} --threads 1 --workers 1 --group 1"
    ),
    Case("library compact", "library compact {out}", "many"),
    Case("library repack", "library repack {out} --precision int4 --threads 1", "many"),
    Case("library rebuild", "library rebuild {out} --threads 1", "old"),
    Case("library model", "library model {home}/library {out}"),
    Case("library join", "library join {out} {home}/library"),
    Case("library publish", "library publish {home}/library --out {out} --site"),
    Case(
        "exploit --rank",
        "exploit --run {home}/run --data {home}/cars --out {out} --threads 1 --group 1 --rank 0 "
        "--world-size 1 --lease 2",
    ),
    Case(
        "data meshes --catalog",
        "data meshes --folder {home}/meshes --catalog {home}/objects.csv --out {out} --views 3 --held-out 1 "
        "--size 16 --workers 1 --threads 1",
    ),
    Case("export images", "export images --run {home}/run --match * --out {out} --views 2 --threads 1"),
    Case("report", "report --run {home}/library --out {out}/a.html --threads 1"),
    Case("export page", "export page --run {home}/run --match * --out {out}/a.html --frames 2 --threads 1"),
    Case("data join", "data join --folders {home}/cars {home}/cars2 --out {out}"),
)


PYRAMID = """v -1 -1 0
v 1 -1 0
v 1 1 0
v -1 1 0
v 0 0 {height}
f 1 2 5
f 2 3 5
f 3 4 5
f 4 1 5
f 4 3 2 1
"""
"""An OBJ file."""


def make_meshes(home: Path) -> None:
    """Writes a folder of three meshes and a table with their tags."""
    (home / "meshes").mkdir()
    for height in (1, 2, 3):
        (home / "meshes" / f"pyramid{height}.obj").write_text(PYRAMID.format(height=height))
    lines = (f"pyramid{height}.obj,roof,{height}\n" for height in (1, 2, 3))
    (home / "objects.csv").write_text("file,category,height\n" + "".join(lines))


CLOCKS = ("time", "seconds", "cpu_seconds")
"""What differs in two logs of the same steps."""


def result_of(out: Path) -> dict:
    """Describes what a command made: a run, a library, a published one, a dataset, or other files."""
    if (out / "run.json").exists():
        run = Run.open(out)
        model, rows = run.load()
        tensors = {**model.state_dict(), **rows.tables()}
        sums = {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
        }
        lines = [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.metrics()]
        return {"tensors": sums, "metrics": lines, "finished": run.finished}
    if LibraryFolder.exists(out):
        library = LibraryFolder.open(out)
        scenes = {name: place.checksum for name, place in library.index.places().items()}
        damage = [str(damage) for damage in verifying.verify(library)]
        library.close()
        return {"scenes": scenes, "damage": damage, "model": library.checksums["shared.safetensors"]}
    if (out / "published.json").exists():
        library, made = PublishedLibrary.open(str(out)), ("made", "checksum")
        damage = [str(damage) for damage in library.verify()]
        stated = json.loads((out / "published.json").read_text())
        return {"damage": damage, "stated": {key: stated[key] for key in stated if key not in made}}
    if not (out / "views.json").exists():
        whole = (file for file in sorted(out.rglob("*")) if file.is_file() and PARTIAL not in str(file))
        return {"files": {str(file.relative_to(out)): file_checksum(file) for file in whole}}
    PosedImages.open(out)
    return {"damage": verify(out), "files": {file.name: file_checksum(file) for file in out.glob("*.npy")}}


def same(out: Path, right: dict) -> bool:
    """Returns whether a command's result is complete and the right one."""
    try:
        return result_of(out) == right
    except (UserError, OSError):
        return False


def write(path: Path, name: str, end: float) -> dict[str, int]:
    """Appends copies of a scene, one by one."""
    library, done = LibraryFolder.open(path), 0
    first = library.index.infos()[0]
    payload = library.payload(first.name)
    while time.monotonic() < end:
        new = f"{name}-{done}"
        library.append([NewScene(replace(first, name=new, source=new), payload)])
        done += 1
    return {"operations": done}


def compact(path: Path, end: float) -> dict[str, int]:
    """Merges shards again and again."""
    library, done = LibraryFolder.open(path), 0
    while time.monotonic() < end:
        maintenance.compact(library)
        done += 1
        time.sleep(0.2)
    return {"operations": done}


def read(path: Path, end: float) -> dict[str, int]:
    """Verifies and reads; what is found damaged is a false alarm."""
    library, done, alarms = LibraryFolder.open(path), 0, 0
    while time.monotonic() < end:
        alarms += len(verifying.verify(library))
        library.parameters(random.choice(library.index.names()))
        done += 1
    return {"operations": done, "differ": alarms}
