"""Writes the gallery of a published library beside its files: index.html and the modules of `web`."""

from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.core.names import one_line
from latentscenes.core.version import __version__
from latentscenes.export.pages import TEMPLATES
from latentscenes.storage.targets import Target

MODULES = Path(__file__).parents[1] / "web"
INDEX = "index.html"
MARK = b'<meta name="generator" content="latentscenes'
"""What tells a gallery's index.html from another one."""


def check_site(target: Target) -> None:
    """Raises a UserError if the target holds an index.html that is no gallery, which would be lost."""
    present = target.read(INDEX)
    if present is not None and MARK not in present:
        raise UserError(
            f"{target.address}/{INDEX}: is no gallery of this package. Move it, or leave --site out."
        )


def write_site(target: Target, title: str) -> int:
    """Writes the files of the gallery that are absent or other ones, index.html last. Returns their number.

    Raises:
        UserError: the target cannot be written, or holds another index.html.
    """
    check_site(target)
    files = {f"web/{file.name}": file.read_bytes() for file in sorted(MODULES.glob("*.[jc]s*"))}
    page = TEMPLATES.get_template("site.html").render(
        title=one_line(title), generator=f"latentscenes {__version__}"
    )
    written = 0
    with target.writing():
        for name, content in (files | {INDEX: page.encode()}).items():
            if target.read(name) != content:
                target.write(name, content)
                written += 1
    return written
