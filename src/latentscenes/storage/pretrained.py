"""Models that come with the package: a library's shared parts without its scenes, ready for new objects of the kind.

models/NAME/library.json, config.yaml, index.sqlite    as in a library
models/NAME/model/*.safetensors                        in half precision
models/NAME/CARD.md                                    what it learned from, how, how well it does
"""

import dataclasses
import json
import sqlite3
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file

from latentscenes.core.config import Config, StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, now, write_json, write_tensors, writing_to
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.library import SHARED, START, LibraryFolder
from latentscenes.storage.run import Run

MODELS = Path(str(resources.files("latentscenes"))) / "pretrained"


def pretrained_models() -> list[str]:
    """Their names."""
    return sorted(path.parent.name for path in MODELS.glob("*/library.json"))


def find_model(name: Path) -> Path:
    """The folder of a shipped model, if `name` is one and no run or library of that name lies here; else `name` itself."""
    inside, taken = MODELS / name, LibraryFolder.exists(name) or (name / "run.json").is_file()
    return inside if not taken and len(name.parts) == 1 and LibraryFolder.exists(inside) else name


def open_parent(path: Path) -> Run | LibraryFolder:
    """A run, a library, or a model that comes with the package, by its name.

    Raises:
        UserError: it is none of these.
    """
    found = find_model(path)
    if LibraryFolder.exists(found):
        return LibraryFolder.open(found)
    if not (found / "run.json").is_file():
        names = ", ".join(pretrained_models())
        raise UserError(
            f"{path}: neither a run, nor a library, nor a model that comes with the package ({names}): no run.json and no library.json there. "
            "Name a folder that `latentscenes train` or `exploit` made."
        )
    return Run.open(found)


def export_model(source: LibraryFolder, out: Path) -> int:
    """Write a library's shared parts alone, in half precision, into the folder `out`. Gives the bytes of both files."""
    if out.exists():
        raise UserError(f"{out}: exists already. Name another folder.")
    with writing_to(out):
        (out / "model").mkdir(parents=True)
    for name in (SHARED, START):
        halves = {key: tensor.half() for key, tensor in load_file(source.path / "model" / name).items()}
        write_tensors(out / "model" / name, halves)
    Index.create(out / FILE).close()
    plain = sqlite3.connect(out / FILE)
    plain.execute(
        "PRAGMA journal_mode = DELETE"
    )  # nothing will be written to it, so reading need leave nothing beside it
    plain.close()
    (out / "config.yaml").write_text((source.path / "config.yaml").read_text())
    known = json.loads((source.path / "library.json").read_text())
    kept = {
        key: known[key]
        for key in (
            "format",
            "box",
            "view",
            "precision",
            "parent_seconds",
            "parent_scenes",
            "finetuned_from",
            "versions",
        )
    }
    checksums = {name: file_checksum(out / "model" / name) for name in (SHARED, START)}
    write_json(out / "library.json", kept | {"parent": out.name, "checksums": checksums, "made": now()})
    return sum((out / "model" / name).stat().st_size for name in (SHARED, START))


def library_from_model(
    out: Path, source: LibraryFolder, config: Config, precision: StoragePrecision | None
) -> LibraryFolder:
    """Make an empty library with the shared parts of another one, or of a shipped model."""
    info = dataclasses.replace(source.info, precision=precision or source.info.precision)
    return LibraryFolder.create(out, config, info, source.model(), source.starting_scene())
