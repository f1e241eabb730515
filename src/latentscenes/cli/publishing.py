"""The `library` commands that publish a library for others to read."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from latentscenes.cli.common import given_path, require_library, say
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted

Folder = Annotated[Path, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]


def library_publish(
    library: Folder, out: str, site: bool = False, title: str | None = None, replace: bool = False
) -> None:
    """Write a library as static files that any web server or bucket can serve; later calls add what is new.

    Args:
        library: Library folder.
        out: Folder, or s3://BUCKET/PATH or gs://BUCKET/PATH (need the cloud extra).
        site: Also write a gallery, index.html, which shows and searches the library in browsers.
        title: Title of the gallery; unset: the library's name.
        replace: Take the place of another library that is published there.
    """
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.published.addresses import address_of
    from latentscenes.storage.published.targets import open_target

    if address := address_of(library):
        raise UserError(f"{address}: published already. Name the folder of a library.")
    if title is not None and not site:
        raise UserError("--title: only with --site.")
    given_path(out)
    require_library(library)
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.published.publishing import publish

    target = open_target(out)
    if site:
        from latentscenes.export.live import check_site, write_site

        check_site(target)
    done = publish(LibraryFolder.open(library), target, replace)
    say(
        f"{out}: {counted(done.scenes, 'scene')}; {counted(done.files, 'file')} written "
        f"({bytes_text(done.bytes)}), {done.removed} outdated ones removed."
    )
    if site:
        written = write_site(target, title or library.resolve().name)
        say(f"{out}/index.html: the gallery; {counted(written, 'file')} of it written.")


def library_push(
    library: Folder, repository: Name, kind: Literal["dataset", "model"] = "dataset", private: bool = False,
    replace: bool = False,
) -> None:  # fmt: skip
    """Publish a library in a repository of the Hugging Face hub (hub extra); later calls add what is new.

    Args:
        library: Library folder.
        repository: USER/NAME; made if absent.
        kind: Kind of the repository.
        private: Whether a new repository is private.
        replace: Take the place of another library that is published there.
    """
    require_library(library)
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.published.hub import push

    done = push(LibraryFolder.open(library), repository, kind, private, replace)
    say(
        f"{repository}: {counted(done.scenes, 'scene')}; {counted(done.files, 'file')} uploaded "
        f"({bytes_text(done.bytes)}), {done.removed} outdated ones removed."
    )


def library_pull(
    repository: Name,
    out: Annotated[Path, tyro.conf.Positional],
    kind: Literal["dataset", "model"] = "dataset",
) -> None:
    """Copy a library from a repository of the Hugging Face hub into a library folder (hub extra).

    Args:
        repository: USER/NAME.
        out: Library folder, made if absent; another library of the same model gets the scenes that it lacks.
        kind: Kind of the repository.
    """
    from latentscenes.storage.published.hub import pull

    say(f"{out}: {counted(pull(repository, kind, out), 'scene')} copied from {repository}.")


PUBLISHING_COMMANDS = {"publish": library_publish, "push": library_push, "pull": library_pull}
