"""Stage 2 by several processes, also of several machines: each learns groups into a part of its own, and the
last one joins the parts.

    PARTS/plan.json           the groups, and how they are learned; gone when all scenes are in the library
    PARTS/plan.N.claim        who makes the plan (claims.py)
    PARTS/ID/claims/          which group is learned by whom, and which are done
    PARTS/ID/owners/          which process writes which part
    PARTS/ID/part-0003/       a library with the scenes that rank 3 learned

A process takes a group that nobody holds, learns it, appends it to its own part, and notes that it is done.
When it dies, its claims lapse, and others learn its groups again; started again on the same machine, it goes
on at once. Groups depend on nothing but the frozen model, the dataset and the seed, so it does no harm if two
processes learn one: the scenes of one of them are joined.

No index is used by two machines at a time: each part has a single writer; the library is opened by the
process that makes the plan, and by the one that joins.
"""

import math
import shutil
import string
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentscenes.core import config_io
from latentscenes.core.config import Config, ExploitOptions
from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, read_object, write_sealed, writing_to
from latentscenes.core.ranks import Rank, RankOptions, chosen_rank
from latentscenes.core.runtime import set_up
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.storage.description import SHARED, read_description
from latentscenes.storage.joining import Joined, empty_copy, join
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.training.claims import MOST_CLAIMS, Claims, own_name
from latentscenes.training.exploit import PARTS, PLAN, groups_to_learn, library_for, remarks, settled, told
from latentscenes.training.groups import GroupLearner, sweep

FORMAT = "latentscenes plan 1"
ID_LETTERS = 12
"""Hexadecimal letters of a plan's name."""
LONGEST_PAUSE = 1.0
"""Seconds between two looks for work that others left."""
PLANNING, JOINING = "plan", "join"
"""Items that one process claims, beside the groups."""


@dataclass(frozen=True)
class Plan:
    """What all processes agree on before they learn."""

    id: str
    library: str
    dataset: str
    settings: str
    """The configuration, as YAML."""
    options: dict[str, Any]
    model: str | None
    """SHA-256 of the library's shared parts."""
    precision: str
    threads: int
    groups: list[list[str]]
    """Names of the scenes of each group."""
    format: str = FORMAT


@dataclass(frozen=True)
class Share:
    """What one process did."""

    groups: int
    """Groups that it learned."""
    joined: Joined | None
    """What it joined; None if another process did."""


@dataclass(frozen=True)
class RankCall:
    """All that a process needs to know to be a rank: what engines send to the processes that they start."""

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
    call, each with its own rank. Returns when all scenes are in the library, whoever learned them.

    Raises:
        UserError: as `exploit`; or the others have other settings, two parts hold different scenes of one
            name, or a group ended every process that worked on it.
        Interrupted: a signal asked to stop. Everything is saved.
    """
    if options.workers > 1:
        raise UserError(f"--workers {options.workers}: a rank is one process. Start more ranks instead.")
    if options.track != "none":
        raise UserError(f"--track {options.track}: not with --rank. Leave it out.")
    images.select("new", limit=options.limit)  # refuses datasets without new scenes before anything is made
    rank, ranks = shared
    parts = ranks.parts or out / PARTS
    plan = _agreed(parts, ranks.lease, lambda: _made(out, images, config, parent, options, device))
    config = settled(config, config_io.parse(plan.settings, str(parts / PLAN)), options, device)
    _refuse_other_plan(plan, parts, (out, images), config, options)
    home = parts / plan.id
    worker = None
    try:
        with own_name(home / "owners", f"part-{rank.number:04d}") as name:
            with Claims(home / "claims", name, ranks.lease, ranks.patience).renewing() as claims:
                worker = _Worker(out, plan, home, claims)
                worker.learn(images, config, options, device, rank)
                joined = worker.join_or_wait(parts / PLAN)
    except (OSError, UserError):
        if _read(parts) == plan:
            raise
        joined = None  # another process joined and removed all parts while this one learned
    _remove_parts(home)
    with suppress(OSError):  # unless other files lie there
        parts.rmdir()
    return Share(worker.learned if worker else 0, joined)


# The plan


def _agreed(parts: Path, lease: float, make: Callable[[], Plan]) -> Plan:
    """Returns the plan in a folder. If there is none, makes it, or waits for the process that does."""
    while True:
        if (plan := _read(parts)) is not None:
            return plan
        with Claims(parts, uuid.uuid4().hex, lease).renewing() as claims:
            try:
                return _found_or_made(parts, claims, make)
            except (OSError, UserError):
                if parts.is_dir():
                    raise
        # Others have joined all scenes and removed the folder meanwhile. What is left gets a new plan.


def _found_or_made(parts: Path, claims: Claims, make: Callable[[], Plan]) -> Plan:
    while True:
        newest = claims.state().newest.get(PLANNING, 0)
        if (plan := _read(parts)) is not None:
            return plan
        if claims.take_over(PLANNING, newest) if newest else claims.take(PLANNING):
            break
        time.sleep(min(LONGEST_PAUSE, claims.lease / 8))
    try:
        if (plan := _read(parts)) is None:  # it may have been written just before the claim
            for remains in parts.iterdir():  # of a plan that was carried out
                _remove_parts(remains)
            plan = make()
            write_sealed(parts / PLAN, asdict(plan))
    finally:
        claims.forget(PLANNING)
    return plan


def _read(parts: Path) -> Plan | None:
    file = parts / PLAN
    if not file.exists():
        return None
    remedy = f"Remove {parts}: what is not in the library yet is then learned again."
    try:
        content = read_object(file, remedy)
    except UserError:
        if not file.exists():  # removed just now, since all is joined
            return None
        raise
    if content.get("format") != FORMAT:
        raise UserError(f"{file}: a plan of another version. {remedy}")
    known = Plan.__dataclass_fields__
    return config_io.build(Plan, {name: content[name] for name in known if name in content}, file)


def _remove_parts(home: Path) -> None:
    """Removes the folder of a plan whose scenes are all in the library. Leaves other folders alone."""
    if len(home.name) == ID_LETTERS and not set(home.name) - set(string.hexdigits) and home.is_dir():
        shutil.rmtree(home, ignore_errors=True)


def _made(
    out: Path, images: PosedImages, config: Config, parent: Path | None, options: ExploitOptions,
    device: torch.device,
) -> Plan:  # fmt: skip
    say(f"{out}: this process makes the plan …")
    with writing_to(out):
        make_folder(out)
    library = library_for(out, images, config, open_parent(parent) if parent else None, options, device)
    config = settled(config, library.config, options, device)
    groups = groups_to_learn(library, images, config, options)
    names = [[scene.name for scene in group] for group in groups]
    library.close()
    return Plan(
        uuid.uuid4().hex[:ID_LETTERS], str(out.resolve()), str(images.path.resolve()),
        config_io.dump(config), _stated(options), library.checksums.get(SHARED),
        options.precision or library.info.precision, torch.get_num_threads(), names,
    )  # fmt: skip


def _stated(options: ExploitOptions) -> dict[str, Any]:
    """Returns the options on which the scenes depend."""
    return {name: getattr(options, name) for name in ("group", "limit", "precision", "drop_views")}


def _refuse_other_plan(
    plan: Plan, parts: Path, places: tuple[Path, PosedImages], config: Config, options: ExploitOptions
) -> None:
    out, images = str(places[0].resolve()), str(places[1].path.resolve())
    for what, mine, theirs in (
        ("library", out, plan.library),
        ("dataset", images, plan.dataset),
        ("settings", config_io.dump(config), plan.settings),
        ("options", _stated(options), plan.options),
    ):
        if mine != theirs:
            shown = f" ({theirs}, not {mine})" if what != "settings" else ""
            raise UserError(
                f"{parts / PLAN}: work with another {what} is not finished{shown}. Go on with the command "
                f"of its other processes, or remove {parts} with what they have learned."
            )
    if torch.get_num_threads() != plan.threads:
        say(
            f"Note: this process has {torch.get_num_threads()} threads, that of the plan {plan.threads}, so "
            "sums are rounded otherwise. With the same --threads for all, scenes are the same bit by bit."
        )


# Learning and joining


class _Worker:
    """One process that learns groups of a plan into its part."""

    def __init__(self, out: Path, plan: Plan, home: Path, claims: Claims):
        self.out, self.plan, self.home, self.claims = out, plan, home, claims
        self.part = home / claims.owner
        self.learned = 0
        """Groups that this process learned."""
        self.items = [f"{number:06d}" for number in range(len(plan.groups))]

    def learn(
        self, images: PosedImages, config: Config, options: ExploitOptions, device: torch.device, rank: Rank
    ) -> None:
        """Learns groups until all are done by someone."""
        learner = None
        known = {scene.name: scene for scene in images.select("new")}
        for item in self._taken(rank):
            learner = learner or self._learner(images, config, options, device)
            group = [known[name] for name in self.plan.groups[int(item)]]
            if not self._is_stored(learner.library, group):
                infos = [scene.info for scene in learner.learn(group, f"Rank {rank.number}, group {item}")]
                say(f"{self.claims.owner}, group {int(item) + 1} of {len(self.items)}: {told(infos)}")
                for line in remarks(infos):
                    say(line)
                self.learned += 1
            self.claims.finish(item)
        if learner:
            learner.library.close()

    def _learner(
        self, images: PosedImages, config: Config, options: ExploitOptions, device: torch.device
    ) -> GroupLearner:
        if not LibraryFolder.exists(self.part):
            if read_description(self.out).get("checksums", {}).get(SHARED) != self.plan.model:
                raise UserError(f"{self.out}: another library than that of the plan. Put it back.")
            empty_copy(self.out, self.part, "DELETE").close()
        library = LibraryFolder.open(self.part)
        make_folder(self.part / "work")
        sweep(self.part / "work", library.index)
        model = library.model(device)
        precision, moved = self.plan.precision, self.claims.progress
        return GroupLearner(library, model, config, images, precision, options.drop_views, moved)

    def _taken(self, rank: Rank) -> Iterator[str]:
        """Yields groups that this process holds, until all groups are done."""
        first = len(self.items) * rank.number // rank.count  # far from those of other ranks
        order = self.items[first:] + self.items[:first]
        while True:
            state, given_up, worked = self.claims.state(), [], False
            left = [item for item in order if item not in state.done]
            for item in left:
                if not (self.home.parent / PLAN).exists():
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
            if len(given_up) == len(left):
                break
            if not worked:
                time.sleep(min(LONGEST_PAUSE, self.claims.lease / 8))
        if given_up:
            names = self.plan.groups[int(given_up[0])]
            raise UserError(
                f"{self.home}: {len(given_up)} groups ended every process that learned them, {MOST_CLAIMS} "
                f"each; the first holds {', '.join(names)}. What the processes printed says why. To try "
                f"again, remove the files claims/{given_up[0]}.* there and run the command."
            )

    @staticmethod
    def _is_stored(library: LibraryFolder, group: list[Scene]) -> bool:
        """Whether a killed process has stored a group, but not noted that it is done."""
        return len(library.index.known([scene.name for scene in group])) == len(group)

    def join_or_wait(self, file: Path) -> Joined | None:
        """Joins all parts into the library and removes the plan, or waits for the process that does."""
        self.claims.patience = math.inf  # joining takes as long as the disk does, and only one should join
        while file.exists():
            newest = self.claims.state().newest.get(JOINING, 0)
            if self.claims.take_over(JOINING, newest) if newest else self.claims.take(JOINING):
                done, only = self.claims.state().done, {}
                for item in self.items:
                    only.setdefault(self.home / done[item], []).extend(self.plan.groups[int(item)])
                found = join(self.out, sorted(only), only) if only else Joined(0, 0)
                file.unlink()
                self.claims.drop(JOINING)
                return found
            time.sleep(min(LONGEST_PAUSE, self.claims.lease / 8))
        return None
