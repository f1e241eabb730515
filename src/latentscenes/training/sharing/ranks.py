"""Stage 2 by several processes, also of several machines: each learns groups into a part of its own, and the
last one joins the parts.

    PARTS/plan.json           the groups, and how they are learned (plan.py); gone when all are in the library
    PARTS/plan.N.claim        who makes the plan (claims.py)
    PARTS/ID/claims/          which group is learned by whom, and which are done
    PARTS/ID/owners/          which process writes which part
    PARTS/ID/part-0003/       a library with the scenes that rank 3 learned

A process takes a group that nobody holds, learns it, appends it to its own part, and notes that it is done.
When it dies, its claims lapse, and others learn its groups again; started again on the same machine, it goes
on at once. Groups depend on nothing but the frozen model, the dataset and the seed, so it does no harm if two
processes learn one: the scenes of one of them are joined.

No index is used by two machines at a time: each part has a single writer; the library is opened by the
process that makes the plan, and by the one that joins. Processes of one machine need no parts: they append to
the library itself (local.py).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.core.ranks import Rank, chosen_rank
from latentscenes.core.runtime import set_up
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.description import SHARED, read_description
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.joining import JoinResult, empty_copy, join
from latentscenes.storage.library import LibraryFolder
from latentscenes.training.groups import GroupLearner, group_line, remarks, remove_stale_runs
from latentscenes.training.preparing import with_chosen_scenes
from latentscenes.training.sharing.claims import MOST_CLAIMS, Claims, own_name
from latentscenes.training.sharing.plan import (
    PARTS,
    PLAN,
    Plan,
    new_plan,
    read_plan,
    refuse_other,
    remove_parts,
    shared_plan,
)

JOINING = "join"
"""Item that the process claims that joins, beside the groups."""
StoredCallback = Callable[[str, list[SceneInfo], bool], None]
"""Called when a group is stored and not yet noted as done, with its item, its scenes, and whether they were
learned just now, not before this process was started."""


class GroupFailed(UserError):
    """A group ended every process that learned it. All others are learned."""


@dataclass(frozen=True)
class Share:
    """The work that one process did."""

    groups: int
    """Groups that it learned."""
    joined: JoinResult | None
    """The result of joining; None if another process joined."""


@dataclass(frozen=True)
class RankCall:
    """All that a process needs to be a rank. Engines send it to the processes that they start."""

    out: Path
    data: Path
    settings: str
    """The configuration, as YAML."""
    parent: Path | None
    options: ExploitOptions
    ranks: RankOptions
    threads: int | None
    device: str

    def of(self, number: int, count: int) -> "RankCall":
        """Returns the call of one rank."""
        ranks = RankOptions(str(number), count, self.ranks.parts, self.ranks.lease, self.ranks.patience)
        return replace(self, ranks=ranks)

    def __call__(self) -> int:
        """Learns groups until all scenes are in the library. Returns how many groups. See `exploit_rank`."""
        device, config = set_up(self.threads, self.device), config_io.parse(self.settings, "settings")
        images, shared = PosedImages.open(self.data), (chosen_rank(self.ranks), self.ranks)
        return exploit_rank(self.out, images, config, self.parent, self.options, device, shared).groups


def exploit_rank(
    out: Path, images: PosedImages, config: Config, parent: Path | None, options: ExploitOptions,
    device: torch.device, shared: tuple[Rank, RankOptions],
) -> Share:  # fmt: skip
    """Learns new scenes of a dataset into the library `out` together with other processes that make the same
    call, each with its own rank. Returns when all scenes are in the library.

    Raises:
        UserError: as `exploit`; or the others have other settings, two parts hold different scenes of one
            name, or a group ended every process that worked on it.
        Interrupted: a signal asked to stop. Everything is saved.
    """
    refuse_alone(images, options)
    rank, ranks = shared
    parts = ranks.parts or out / PARTS
    plan = shared_plan(parts, ranks.lease, lambda: new_plan(out, images, config, parent, options, device))
    config = with_chosen_scenes(config, config_io.parse(plan.settings, str(parts / PLAN)), options, device)
    refuse_other(plan, str(parts), (str(out.resolve()), images), config, options)
    home, worker = parts / plan.id, None
    try:
        with own_name(home / "owners", f"part-{rank.number:04d}") as name:
            with Claims(home / "claims", name, ranks.lease, ranks.patience).renewing() as claims:
                worker = Worker(
                    plan, claims, lambda: opened(home / name, out, plan), reporter(plan, name),
                    (parts / PLAN).exists,
                )  # fmt: skip
                worker.learn(images, config, device, rank)
                joined = _join_or_wait(out, plan, home, claims)
    except (OSError, UserError):
        if read_plan(parts) == plan:
            raise
        joined = None  # another process joined and removed all parts while this one learned
    remove_parts(home)
    with suppress(OSError):  # unless other files lie there
        parts.rmdir()
    return Share(worker.learned if worker else 0, joined)


def refuse_alone(images: PosedImages, options: ExploitOptions) -> None:
    """Raises a UserError for options that a rank cannot carry out, and for a dataset without new scenes."""
    if options.workers > 1:
        raise UserError(f"--workers {options.workers}: a rank is one process. Start more ranks instead.")
    if options.track != "none":
        raise UserError(f"--track {options.track}: not with --rank. Leave it out.")
    images.select("new", limit=options.limit)


def reporter(plan: Plan, name: str) -> StoredCallback:
    """Returns a function that prints that a group was learned."""

    def report(item: str, infos: list[SceneInfo], now: bool) -> None:
        if now:
            say(f"{name}, group {int(item) + 1} of {len(plan.groups)}: {group_line(infos)}")
            for line in remarks(infos):
                say(line)

    return report


def opened(part: Path, out: Path, plan: Plan) -> LibraryFolder:
    """Opens the part of a process, or makes it."""
    if not LibraryFolder.exists(part):
        if read_description(out).get("checksums", {}).get(SHARED) != plan.model:
            raise UserError(f"{out}: another library than that of the plan. Put it back.")
        empty_copy(out, part, "DELETE").close()
    library = LibraryFolder.open(part)
    make_folder(part / "work")
    remove_stale_runs(part / "work", library.index)
    return library


class Worker:
    """One process that learns groups of a plan."""

    def __init__(
        self, plan: Plan, claims: Claims, part: Callable[[], LibraryFolder], stored: StoredCallback,
        goes_on: Callable[[], bool],
    ):  # fmt: skip
        """`part` opens the library that this process appends to; `goes_on` says whether the plan is still to
        be carried out. If the lease of `claims` is infinite, groups that other processes hold are theirs for
        good, and are not waited for."""
        self.plan, self.claims, self._part, self._stored, self._goes_on = plan, claims, part, stored, goes_on
        self.learned = 0
        """Groups that this process learned."""
        self.items = items(plan)

    def learn(self, images: PosedImages, config: Config, device: torch.device, rank: Rank) -> None:
        """Learns groups until all are done by someone."""
        learner, plan = None, self.plan
        known = {scene.name: scene for scene in images.select("new")}
        for item in self._taken(rank):
            if learner is None:
                library = self._part()
                drop, moved = plan.options["drop_views"], self.claims.progress
                model = library.model(device)
                learner = GroupLearner(library, model, config, images, plan.precision, drop, moved)
            names = plan.groups[int(item)]
            # A process that was killed may have stored a group, but not noted that it is done
            stored = len(library.index.known(names)) == len(names)
            if stored:
                infos = [library.index.info(name) for name in names]
            else:
                label = f"Rank {rank.number}, group {item}"
                infos = [one.info for one in learner.learn([known[name] for name in names], label)]
                self.learned += 1
            self._stored(item, infos, not stored)
            self.claims.finish(item)
        if learner:
            library.close()

    def _taken(self, rank: Rank) -> Iterator[str]:
        """Yields groups that this process holds, until all groups are done."""
        endless = math.isinf(self.claims.lease)  # then in order; otherwise far from those of other ranks
        first = 0 if endless else len(self.items) * rank.number // rank.count
        order = self.items[first:] + self.items[:first]
        while True:
            state, given_up, worked = self.claims.state(), [], False
            left = [item for item in order if item not in state.done]
            for item in left:
                if not self._goes_on():
                    return  # others have joined all scenes meanwhile
                newest = state.newest.get(item, 0)
                if newest >= MOST_CLAIMS and self.claims.has_lapsed(item, newest):
                    given_up.append(item)
                elif self.claims.take_over(item, newest) if newest else self.claims.take(item):
                    if newest and item in self.claims.state().done:
                        self.claims.drop(item)
                        continue
                    worked = True
                    yield item
            if len(given_up) == len(left) or not worked and endless:
                break
            if not worked:
                time.sleep(self.claims.pause)
        if given_up:
            names = self.plan.groups[int(given_up[0])]
            again = "" if endless else f"remove the files {given_up[0]}.* in {self.claims.board.address} and "
            raise GroupFailed(
                f"{self.plan.library}: {len(given_up)} groups ended every process that learned them, "
                f"{MOST_CLAIMS} each; the first holds {', '.join(names)}. What the processes printed says "
                f"why. To try again, {again}run the command."
            )


def items(plan: Plan) -> list[str]:
    """Returns the names of the groups of a plan, for claims."""
    return [f"{number:06d}" for number in range(len(plan.groups))]


def _join_or_wait(out: Path, plan: Plan, home: Path, claims: Claims) -> JoinResult | None:
    """Joins all parts into the library and removes the plan, or waits for the process that does."""
    claims.patience, file = math.inf, home.parent / PLAN  # joining takes as long as the disk does
    while file.exists():
        newest = claims.state().newest.get(JOINING, 0)
        if claims.take_over(JOINING, newest) if newest else claims.take(JOINING):
            done, only = claims.state().done, {}
            for item, names in zip(items(plan), plan.groups, strict=True):
                only.setdefault(home / done[item], []).extend(names)
            found = join(out, sorted(only), only) if only else JoinResult(0, 0)
            file.unlink()
            claims.drop(JOINING)
            return found
        time.sleep(claims.pause)
    return None
