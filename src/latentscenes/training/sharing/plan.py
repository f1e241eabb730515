"""The plan of several processes: which groups there are, and how they are learned."""

import shutil
import string
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, read_object, write_with_checksum, writing_to
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.storage.description import SHARED
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.training.preparing import groups_to_learn, library_for, with_chosen_scenes
from latentscenes.training.sharing.claims import Claims

PARTS, PLAN = "parts", "plan.json"
"""Folder of a library where several ranks keep what they learn, and its file that says how they share it."""
FORMAT = "latentscenes plan 1"
ID_LETTERS = 12
"""Hexadecimal letters of a plan's name."""
PLANNING = "plan"
"""Item that the process claims that makes the plan."""


@dataclass(frozen=True)
class Plan:
    """The plan on which all processes agree before they learn."""

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


def shared_plan(parts: Path, lease: float, make: Callable[[], Plan]) -> Plan:
    """Returns the plan in a folder. If there is none, makes it, or waits for the process that does."""
    while True:
        if (plan := read_plan(parts)) is not None:
            return plan
        with Claims(parts, uuid.uuid4().hex, lease).renewing() as claims:
            try:
                return read_or_make(claims, lambda: read_plan(parts), lambda: _written(parts, make))
            except (OSError, UserError):
                if parts.is_dir():
                    raise
        # Others have joined all scenes and removed the folder meanwhile. What is left gets a new plan.


def _written(parts: Path, make: Callable[[], Plan]) -> Plan:
    for remains in parts.iterdir():  # of a plan that was carried out
        remove_parts(remains)
    plan = make()
    write_with_checksum(parts / PLAN, asdict(plan))
    return plan


def read_or_make(claims: Claims, read: Callable[[], Plan | None], make: Callable[[], Plan]) -> Plan:
    """Returns the plan that `read` finds. If there is none, one process makes it, and keeps it where `read`
    looks; the others wait."""
    while True:
        newest = claims.state().newest.get(PLANNING, 0)
        if (plan := read()) is not None:
            return plan
        if claims.take_over(PLANNING, newest) if newest else claims.take(PLANNING):
            break
        time.sleep(claims.pause)
    try:
        if (plan := read()) is None:  # it may have been written just before the claim
            plan = make()
    finally:
        claims.forget(PLANNING)
    return plan


def read_plan(parts: Path) -> Plan | None:
    """Reads the plan in a folder; None if there is none. Raises a UserError if it is damaged or of another
    version."""
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


def remove_parts(home: Path) -> None:
    """Removes the folder of a plan whose scenes are all in the library. Leaves other folders alone."""
    if len(home.name) == ID_LETTERS and not set(home.name) - set(string.hexdigits) and home.is_dir():
        shutil.rmtree(home, ignore_errors=True)


def new_plan(
    out: Path, images: PosedImages, config: Config, parent: Path | None, options: ExploitOptions,
    device: torch.device,
) -> Plan:  # fmt: skip
    """Makes the plan of all new scenes that the library `out` does not hold. Makes the library, if it is
    absent."""
    say(f"{out}: this process makes the plan …")
    with writing_to(out):
        make_folder(out)
    library = library_for(out, images, config, open_parent(parent) if parent else None, options, device)
    config = with_chosen_scenes(config, library.config, options, device)
    groups = groups_to_learn(library, images, config, options)
    library.close()
    return plan_of(library, images, config, options, groups)


def plan_of(
    library: LibraryFolder, images: PosedImages, config: Config, options: ExploitOptions,
    groups: Sequence[Sequence[Scene]],
) -> Plan:  # fmt: skip
    """Returns the plan of some groups, for processes with as many threads as this one."""
    return Plan(
        uuid.uuid4().hex[:ID_LETTERS], str(library.path.resolve()), str(images.path.resolve()),
        config_io.dump(config), _stated(options), library.checksums.get(SHARED),
        options.precision or library.info.precision, torch.get_num_threads(),
        [[scene.name for scene in group] for group in groups],
    )  # fmt: skip


def _stated(options: ExploitOptions) -> dict[str, Any]:
    """Returns the options on which the scenes depend."""
    return {name: getattr(options, name) for name in ("group", "limit", "precision", "drop_views")}


def refuse_other(
    plan: Plan, parts: str, places: tuple[str, PosedImages], config: Config, options: ExploitOptions
) -> None:
    """Raises a UserError if a process was asked to do something else than the plan in the folder or bucket
    `parts`. `places`: its library and its dataset."""
    out, images = places[0], str(places[1].path.resolve())
    for what, mine, theirs in (
        ("library", out, plan.library),
        ("dataset", images, plan.dataset),
        ("settings", config_io.dump(config), plan.settings),
        ("options", _stated(options), plan.options),
    ):
        if mine != theirs:
            shown = f" ({theirs}, not {mine})" if what != "settings" else ""
            raise UserError(
                f"{parts}/{PLAN}: work with another {what} is not finished{shown}. Go on with the command of "
                f"its other processes, or remove {parts} with what they have learned."
            )
    if torch.get_num_threads() != plan.threads:
        say(
            f"Note: this process has {torch.get_num_threads()} threads, that of the plan {plan.threads}, so "
            "sums are rounded differently. With the same --threads for all, scenes are the same bit by bit."
        )
