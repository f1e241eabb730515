"""The description of a library, library.json, and its folder `model`."""

from importlib import resources
from pathlib import Path
from typing import Any

from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, check_file, read_object
from latentscenes.core.names import address_text, short

FORMAT = "latentscenes-library-1"
FILE = "library.json"
MODELS = Path(str(resources.files("latentscenes"))) / "pretrained"
REQUIRED = {"box", "view", "precision", "parent", "parent_seconds", "parent_scenes"}
"""Entries of every library.json."""
SHARED = "shared.safetensors"
"""File of the folder `model` with the weights of the shared parts."""


def pretrained_models() -> list[str]:
    """Returns the names of all models that come with the package."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{FILE}"))


def find_model(name: Path) -> Path:
    """Returns the folder of a run or library, or of the packaged model `name`.

    Raises:
        UserError: `name` is none of these.
    """
    if (name / FILE).is_file() or (name / "run.json").is_file():
        return name
    if len(name.parts) == 1 and (MODELS / name / FILE).is_file():
        return MODELS / name
    raise UserError(
        f"{address_text(name)}: neither a run, nor a library, nor a model that comes with the package "
        f"({', '.join(pretrained_models())}): no run.json and no library.json there. Name a folder made by "
        "`latentscenes train` or `exploit`."
    )


def read_description(library: Path) -> dict[str, Any]:
    """Returns the content of a library's library.json. Raises a UserError if there is no library, or the file
    is damaged or of another format."""
    file = library / FILE
    if (address := address_text(library)) != str(library):
        raise UserError(f"{address}: a published library cannot be used here. Name the folder of a library.")
    if not file.is_file():
        raise UserError(
            f"{library}: no library here (library.json is absent). Make one with `latentscenes exploit`."
        )
    content = read_object(file, "Restore it from a copy.", sealed_with="config.yaml")
    if content.get("format") == FORMAT and (missing := REQUIRED - content.keys()):
        raise UserError(f"{file}: lacks {', '.join(sorted(missing))}. Restore it from a copy.")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{library}: a library of format {short(content.get('format'))}, "
            f"but this version reads {FORMAT!r}."
        )
    return content


def identity_of(library: Path) -> str | None:
    """Returns an identity that no other library has, also of the same model: the checksum of its description,
    which copies share and which never changes. None for libraries of earlier versions, which have none."""
    return read_description(library).get(CHECKSUM)


def refuse_inside(out: Path) -> None:
    """Raises a UserError if a new library, model or publication `out` would lie within a library."""
    home = next((folder for folder in out.resolve().parents if (folder / FILE).is_file()), None)
    if home is not None:
        raise UserError(f"{out}: lies in the library {home}, whose folder holds nothing else. Name another.")


def check_model_file(file: Path, use: str, checksum: str | None) -> None:
    """Refuses a file of the folder `model` that is absent or damaged; `use` names the user of the file.
    `checksum` is its SHA-256; libraries of earlier versions may have none. Raises a UserError."""
    remedy = (
        f"{use[0].upper()}{use[1:]}. Restore it from a copy of this library, or from one of the same model."
    )
    check_file(file, checksum, remedy)
