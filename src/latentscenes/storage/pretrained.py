"""Models that come with the package: shared parts of a library without scenes, to learn new objects with.

pretrained/NAME/library.json, config.yaml, index.sqlite    as in a library
pretrained/NAME/model/*.safetensors                        in half precision
pretrained/NAME/CARD.md                                    training data, method, scores
"""

import dataclasses
import sqlite3
from importlib import resources
from pathlib import Path

from safetensors.torch import load_file

from latentscenes.core.config import Config, StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, now, write_bytes, write_json, write_tensors, writing_to
from latentscenes.storage.index import FILE, Index, read_description
from latentscenes.storage.library import SHARED, START, LibraryFolder
from latentscenes.storage.run import Run

MODELS = Path(str(resources.files("latentscenes"))) / "pretrained"
KEPT = (
    "format", "box", "view", "precision", "parent_seconds", "parent_scenes", "finetuned_from", "versions",
)  # fmt: skip
"""Entries of library.json that `export_model` copies."""


def pretrained_models() -> list[str]:
    """Returns the names of all models that come with the package."""
    return sorted(path.parent.name for path in MODELS.glob("*/library.json"))


def find_model(name: Path) -> Path:
    """Returns the folder of the packaged model `name`; `name` if that is a run or library, or no model."""
    inside, taken = MODELS / name, LibraryFolder.exists(name) or (name / "run.json").is_file()
    return inside if not taken and len(name.parts) == 1 and LibraryFolder.exists(inside) else name


def open_parent(path: Path) -> Run | LibraryFolder:
    """Opens a run, a library, or a packaged model by its name. Raises a UserError if it is none of these."""
    found = find_model(path)
    if LibraryFolder.exists(found):
        return LibraryFolder.open(found)
    if not (found / "run.json").is_file():
        names = ", ".join(pretrained_models())
        raise UserError(
            f"{path}: neither a run, nor a library, nor a model that comes with the package ({names}): "
            "no run.json and no library.json there. Name a folder made by `latentscenes train` or `exploit`."
        )
    return Run.open(found)


def export_model(source: LibraryFolder, out: Path) -> int:
    """Writes the shared parts of a library, in half precision and without scenes, to a new folder. Returns
    the size of the model files in bytes. Raises a UserError if `out` exists or cannot be written.

    The index is written without a journal, so that reading it leaves no files beside it.
    """
    if out.exists():
        raise UserError(f"{out}: exists already. Name another folder.")
    with writing_to(out):
        (out / "model").mkdir(parents=True)
    files = [out / "model" / name for name in (SHARED, START)]
    for file in files:
        tensors = load_file(source.path / "model" / file.name)
        write_tensors(file, {key: tensor.half() for key, tensor in tensors.items()})
    Index.create(out / FILE).close()
    connection = sqlite3.connect(out / FILE)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    write_bytes(out / "config.yaml", (source.path / "config.yaml").read_bytes())
    known = read_description(source.path)
    checksums = {file.name: file_checksum(file) for file in files}
    facts = {key: known[key] for key in KEPT}
    write_json(out / "library.json", facts | {"parent": out.name, "checksums": checksums, "made": now()})
    return sum(file.stat().st_size for file in files)


def library_from_model(
    out: Path, source: LibraryFolder, config: Config, precision: StoragePrecision | None
) -> LibraryFolder:
    """Creates an empty library with the shared parts of another library or of a packaged model.

    Args:
        precision: default for new scenes; None: the default of `source`.

    Raises:
        UserError: `out` is a library already or holds other files.
    """
    info = dataclasses.replace(source.info, precision=precision or source.info.precision)
    return LibraryFolder.create(out, config, info, source.model(), source.starting_scene())
