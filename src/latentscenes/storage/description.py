"""What library.json says of a library, and its folder `model`."""

from pathlib import Path
from typing import Any

from latentscenes.core.errors import UserError
from latentscenes.core.files import check_file, read_object
from latentscenes.core.names import short

FORMAT = "latentscenes-library-1"
REQUIRED = {"box", "view", "precision", "parent", "parent_seconds", "parent_scenes"}
"""Entries of every library.json."""
SHARED = "shared.safetensors"
"""File of the folder `model` with the weights of the shared parts."""


def read_description(library: Path) -> dict[str, Any]:
    """Returns the content of a library's library.json. Raises a UserError if there is no library, or the file
    is damaged or of another format."""
    file = library / "library.json"
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


def check_model_file(file: Path, use: str, checksum: str | None) -> None:
    """Refuses a file of the folder `model` that is absent or damaged; `use` says what needs it. `checksum` is
    its SHA-256; libraries of earlier versions may have none. Raises a UserError."""
    remedy = (
        f"{use[0].upper()}{use[1:]}. Restore it from a copy of this library, or from one of the same model."
    )
    check_file(file, checksum, remedy)
