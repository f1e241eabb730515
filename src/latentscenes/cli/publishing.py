"""The `library` commands that write a library for others to read."""

from pathlib import Path
from typing import Annotated

import tyro

from latentscenes.cli.common import say
from latentscenes.core.errors import UserError

Folder = Annotated[Path, tyro.conf.Positional]


def library_publish(library: Folder, out: str) -> None:
    """Write a library as static files that any web server or bucket can serve; later calls add what is new.

    Args:
        library: its folder.
        out: folder, or s3://BUCKET/PATH or gs://BUCKET/PATH (need the cloud extra).
    """
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.addresses import address_of
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.publishing import publish
    from latentscenes.storage.targets import open_target

    if address := address_of(library):
        raise UserError(f"{address}: published already. Name the folder of a library.")
    done = publish(LibraryFolder.open(library), open_target(out))
    say(
        f"{out}: {done.scenes} scenes; {done.files} files written ({bytes_text(done.bytes)}), "
        f"{done.removed} outdated ones removed."
    )


PUBLISHING_COMMANDS = {"publish": library_publish}
