"""Several machines: one rank's share of `exploit`, and libraries joined into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentscenes.cli.common import say
from latentscenes.core.config import ExploitOptions
from latentscenes.core.errors import UserError
from latentscenes.core.ranks import RankOptions, chosen_rank

if TYPE_CHECKING:
    import torch

    from latentscenes.core.config import Config


def learn_share(
    data: Path, out: Path, settings: "Config", run: Path | None, refused: dict[str, bool],
    chosen: tuple[ExploitOptions, RankOptions], device: "torch.device",
) -> None:  # fmt: skip
    """Learns new scenes into a library together with other ranks, and says what became of them. `refused` are
    options that one process must carry out alone, and whether they are given."""
    options, ranks = chosen
    if given := [name for name, is_given in refused.items() if is_given]:
        raise UserError(f"{given[0]}: one process does this alone. Leave out either this or --rank.")
    rank = chosen_rank(ranks)
    say(f"Rank {rank.number} of {rank.count}, by {rank.source}.")
    from latentscenes.data.dataset import PosedImages
    from latentscenes.training.ranks import exploit_rank

    share = exploit_rank(out, PosedImages.open(data), settings, run, options, device, (rank, ranks))
    say(f"{out}: all scenes are in the library. This process learned {share.groups} groups.")
    if share.joined:
        say(f"{out}: {share.joined.added} scenes joined from all parts.")


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
