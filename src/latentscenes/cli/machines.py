"""Several machines: one rank's share of `exploit`, and libraries joined into one."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentscenes.cli.common import Machine, require_library, say, set_up
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.core.ranks import chosen_rank

if TYPE_CHECKING:
    from latentscenes.core.config import Config
    from latentscenes.training.sharing.ranks import RankCall


def learn_share(
    data: Path, out: Path, settings: "Config", run: Path | None, refused: dict[str, bool],
    chosen: tuple[ExploitOptions, RankOptions], machine: Machine,
) -> None:  # fmt: skip
    """Learns new scenes into a library together with other ranks, or has an engine start them, and says what
    became of them. `refused` are options that one process must carry out alone, and whether they are given.
    """
    from latentscenes.storage.published.addresses import address_of

    (options, ranks), address = chosen, address_of(out)
    if given := [name for name, is_given in refused.items() if is_given]:
        raise UserError(f"{given[0]}: one process does this alone. Leave out either this or --rank.")
    if ranks.engine is not None and address:
        raise UserError(
            f"--engine {ranks.engine}: needs a folder, not {address}. Start each process with --rank."
        )
    if ranks.engine is not None:
        from latentscenes.core.config_io import dump
        from latentscenes.training.sharing.ranks import RankCall

        parts = ranks.parts and ranks.parts.absolute()
        call = RankCall(
            out.absolute(), data.absolute(), dump(settings), _seen_elsewhere(run), options,
            replace(ranks, parts=parts), machine.threads, machine.device,
        )  # fmt: skip
        _start(call, ranks)
        return
    device = set_up(machine)
    rank = chosen_rank(ranks)
    say(f"Rank {rank.number} of {rank.count}, by {rank.source}.")
    from latentscenes.data.dataset import PosedImages

    if address:
        from latentscenes.storage.published.targets import open_target
        from latentscenes.training.sharing.bucket import exploit_in_bucket

        given = PosedImages.open(data), settings, run, options, device, (rank, ranks)
        share = exploit_in_bucket(open_target(address), *given)
        say(f"{address}: all scenes are learned. This process learned {share.groups} groups.")
        say(f"Join them into a library: latentscenes library join LIBRARY {address}")
        return
    from latentscenes.training.sharing.ranks import exploit_rank

    share = exploit_rank(out, PosedImages.open(data), settings, run, options, device, (rank, ranks))
    say(f"{out}: all scenes are in the library. This process learned {share.groups} groups.")
    if share.joined:
        say(f"{out}: {counted(share.joined.added, 'scene')} joined from all parts.")


def as_workers(options: ExploitOptions, ranks: RankOptions) -> ExploitOptions:
    """Returns the options with as many workers as `--engine local` is to start."""
    if options.workers not in (0, ranks.world_size):
        raise UserError(
            f"--workers {options.workers}: --world-size {ranks.world_size} says so already. Leave one out."
        )
    return replace(options, workers=ranks.world_size)


def _seen_elsewhere(run: Path | None) -> Path | None:
    """Returns a run's path for processes that work in other folders; packaged models keep their names."""
    from latentscenes.storage.description import find_model

    return run.absolute() if run is not None and find_model(run) == run else run


def _start(call: "RankCall", ranks: RankOptions) -> None:
    """Starts ranks by an engine. Waits for those of Ray; those of SLURM go on by themselves."""
    count, needs = ranks.world_size, ranks.parsed_options()
    if ranks.engine == "ray":
        from latentscenes.training.sharing import ray

        ray.learn(call, count, ranks.address, needs)
        say(f"{call.out}: all scenes are in the library.")
    else:
        from latentscenes.training.sharing import slurm

        jobs = slurm.submit(call, count, "slurm", needs)
        where = slurm.jobs_folder(call.out)
        say(f"{len(jobs)} jobs submitted ({jobs[0].job_id} …); what they print is in {where}.")
        say(f"They join what they learn into {call.out}. The same command goes on after any failure.")


def library_join(
    out: Annotated[Path, tyro.conf.Positional], parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
) -> None:
    """Join libraries of one model, such as parts that several machines learned, into one. The same command
    continues a stopped join.

    Args:
        out: The joined library; made if absent.
        parts: Libraries whose scenes are copied. Scenes that are there already are not copied again; two
            different scenes of one name are refused. Also buckets in which ranks have learned (s3://…,
    gs://…).
    """
    from latentscenes.storage.published.addresses import address_of

    for part in parts:
        if not (address_of(part) or "").startswith(("s3://", "gs://")):
            require_library(part)
    from latentscenes.storage.joining import join

    fetched, only, found = out.with_name(f"{out.name}.fetched"), {}, []
    for number, part in enumerate(parts):
        if address := address_of(part):
            only |= _fetched(address, fetched / str(number))
        else:
            found.append(part)
    done = join(out, [*found, *only], only)
    if only:
        shutil.rmtree(fetched, ignore_errors=True)
    known = f"; {done.known} were there already, or came twice" if done.known else ""
    say(f"{out}: {counted(done.added, 'scene')} of {counted(len(parts), 'part')} added{known}.")


def _fetched(address: str, folder: Path) -> dict[Path, list[str]]:
    """Fetches what ranks have learned in a bucket. Returns the scenes to take from each part."""
    from latentscenes.storage.published.targets import open_target
    from latentscenes.training.sharing.bucket import fetched_parts

    only, missing = fetched_parts(open_target(address), folder)
    if not only:
        raise UserError(f"{address}: no group is done yet. Wait for the processes that learn.")
    if missing:
        say(f"Note: {counted(missing, 'group')} of {address} not learned yet. Join again when they are.")
    return only
