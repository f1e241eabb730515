"""Several machines: libraries joined into one."""

from pathlib import Path
from typing import Annotated

import tyro

from latentscenes.cli.common import say


def library_join(
    out: Annotated[Path, tyro.conf.Positional], parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
) -> None:
    """Join libraries of one model, such as parts that several machines learned, into one. The same command
    continues a stopped join.

    Args:
        out: the joined library; made if absent.
        parts: libraries whose scenes are copied. Scenes that are there already are not copied again; two
            different scenes of one name are refused.
    """
    from latentscenes.storage.joining import join

    done = join(out, parts)
    known = f"; {done.known} were there already, or came twice" if done.known else ""
    say(f"{out}: {done.added} scenes of {len(parts)} parts added{known}.")
