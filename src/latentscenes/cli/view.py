"""The command line's `view`."""

from pathlib import Path
from typing import Annotated

import tyro

from latentscenes.cli.common import MACHINE, MachineOptions, start


def view(
    library: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8080,
    data: Path | None = None,
    moving: int = 128,
    still: int = 384,
    machine: MachineOptions = MACHINE,
) -> None:
    """Look at a library in a browser: gallery, orbits, depth and latents, blends of two scenes, photographs and their cameras.

    Args:
        library: its folder.
        host: address to serve at; as it is, only this machine can look. 0.0.0.0: everybody who can reach this machine.
        port: to serve at; 0 for any free one.
        data: dataset that the scenes were learned from, if it has moved.
        moving: pixels along the shorter side of pictures while the camera moves …
        still: … and when it has stopped.
    """
    device = start(machine)
    from latentscenes.api import Library
    from latentscenes.storage.library import Store
    from latentscenes.viewer.server import view as serve

    serve(Library(Store.open(library), device), host, port, data, moving, still)
