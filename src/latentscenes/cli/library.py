"""The `library` commands and `search`. Wrong names are answered without loading torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentscenes.cli.common import (
    MACHINE,
    Machine,
    MachineOptions,
    require_dataset,
    require_library,
    say,
    set_up,
)
from latentscenes.cli.listing import Folder, Where, library_list, library_show, opened_index
from latentscenes.cli.machines import library_join
from latentscenes.cli.publishing import PUBLISHING_COMMANDS
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line, plain_text, tags_text
from latentscenes.core.options import StoragePrecision

if TYPE_CHECKING:
    from latentscenes.api import Library
    from latentscenes.core.console import Table
    from latentscenes.storage.maintenance import PrecisionCost

Names = Annotated[tuple[str, ...], tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]


def library_remove(library: Folder, scenes: Names) -> None:
    """Remove scenes. `library compact` frees their space.

    Args:
        library: Library folder.
        scenes: Names of the scenes.
    """
    if not scenes:
        raise UserError(
            f"{library}: no scenes named, so none is removed. "
            f"`latentscenes library list {library}` lists all scenes."
        )
    opened = _open(library, scenes)
    opened.remove(*scenes)
    say(
        f"{library}: {counted(len(set(scenes)), 'scene')} removed, {len(opened)} left. "
        f"`latentscenes library compact {library}` frees their space."
    )


def library_rename(library: Folder, scene: Name, new: Name) -> None:
    """Rename a scene.

    Args:
        library: Library folder.
        scene: Name of the scene.
        new: New name.
    """
    _open(library, [scene]).rename(scene, new)
    say(f"{library}: {scene!r} is now {new!r}.")


def library_export(
    library: Folder, scenes: Names = (), match: str | None = None, where: Where = (), *, out: Path
) -> None:
    """Copy scenes, bit for bit, to a new library or to one with the same model.

    Args:
        library: Library folder.
        scenes: Names of scenes …
        match: … or a pattern for names (* and ?) …
        where: … or conditions on tags, such as category=chair*.
        out: Folder of the other library.
    """
    matching = opened_index(library, scenes).infos(match or "*", where) if match or where else []
    names = [*scenes, *(info.name for info in matching if info.name not in scenes)]
    if not names:
        raise UserError(f"{library}: no scenes named. Name some, or give --match, for instance --match '*'.")
    say(f"{out}: {counted(_open(library, names).export(names, out), 'scene')} copied.")


def library_model(library: Folder, out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write the shared parts in half precision, without scenes: a pretrained model for `exploit --run`.

    Args:
        library: Library folder.
        out: Folder to write.
    """
    require_library(library)
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.pretrained import export_model

    size = bytes_text(export_model(LibraryFolder.open(library), out))
    say(f"{out}: {size}. Learn new scenes with it: latentscenes exploit --run {out} --data … --out …")


def library_verify(library: Folder) -> None:
    """Compare all scenes with their checksums. The exit status is 1 if any is damaged.

    Args:
        library: Library folder, or the address of a published library, which is read whole.
    """
    opened = _open(library)
    damaged = opened.verify()
    for damage in damaged:
        print(one_line(f"{damage.name}: {damage.what}"))
    if damaged:
        raise SystemExit(1)
    say(f"{opened.path}: {counted(len(opened), 'scene')}, all intact.")


def library_rebuild(library: Folder, machine: MachineOptions = MACHINE) -> None:
    """List scenes of the shards in the index again, after it was lost, damaged, or restored from an old copy.
    Entries that have changed since they were written become what the shards state.

    Args:
        library: Library folder.
    """
    require_library(library)
    from latentscenes.storage.recovery import rebuild

    device, done = set_up(machine), rebuild(library)
    for damage in done.damaged:
        say(str(damage))
    if done.index_made:
        say(
            "The index was made from the shards: names and tags are those of the time of storage, removed "
            "scenes that `library compact` had not yet freed are back."
        )
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.training.append import draw_thumbnails

    draw_thumbnails(LibraryFolder.open(library), device)
    say(f"{library}: {counted(len(done.scenes), 'scene')} listed anew.")
    if done.mended:
        say(f"What their shards state is in the index again: {', '.join(done.mended)}.")
    if done.renamed:
        say(f"Their names were taken, so they have new ones: {', '.join(done.renamed)}.")
    if done.damaged:
        raise SystemExit(1)


def library_compact(library: Folder) -> None:
    """Merge small files and free the space of removed scenes and stopped work. Scenes stay identical.

    Args:
        library: Library folder.
    """
    from latentscenes.core.console import bytes_text

    say(f"{library}: {bytes_text(max(0, _open(library).compact()))} freed.")


def library_repack(
    library: Folder,
    precision: StoragePrecision | None = None,
    lost: float | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Store scenes at a coarser precision. Without options, print size and loss at each precision.

    Args:
        library: Library folder.
        precision: How to store scenes; scenes of this or a coarser precision stay as they are.
        lost: Choose the smallest precision with at most this mean loss, dB.
    """
    from latentscenes.core.console import bytes_text, lost_text, show

    if lost is not None and (precision is not None or not lost >= 0):
        reason = "cannot be combined with --precision" if precision else "dB, must be at least 0"
        raise UserError(f"--lost {lost:g}: {reason}.")
    opened = _open(library, machine=machine)
    if precision is None:
        settings = opened.precision_costs()
        show(precision_table(settings))
        if lost is None:
            return
        fitting = [setting for setting in settings if setting.lost <= lost]
        precision = min(fitting, key=lambda setting: setting.bytes).precision
    count = opened.repack(precision)
    infos = opened.infos()
    mean = sum(info.psnr_lost or 0.0 for info in infos) / max(len(infos), 1)
    size = bytes_text(sum(info.bytes for info in infos) / max(len(infos), 1))
    stored = f"{counted(count, 'scene')} stored as {precision}"
    say(f"{library}: {stored}. Mean over all scenes: {size}, {lost_text(mean)}.")


def precision_table(settings: "list[PrecisionCost]") -> "Table":
    """Returns a table of size and loss at each precision."""
    from latentscenes.core.console import Table, bytes_text

    rows = tuple(
        (setting.precision, bytes_text(setting.bytes), f"{setting.lost:.3f} dB") for setting in settings
    )
    return Table("Size and loss at each precision", ("stored as", "bytes / scene", "PSNR lost"), rows)


COMMANDS = {
    "list": library_list,
    "show": library_show,
    "remove": library_remove,
    "rename": library_rename,
    "export": library_export,
    "join": library_join,
    "model": library_model,
    "verify": library_verify,
    "rebuild": library_rebuild,
    "compact": library_compact,
    "repack": library_repack,
    **PUBLISHING_COMMANDS,
}


def search(
    library: Folder,
    scene: Name,
    count: int = 5,
    data: Path | None = None,
    where: Where = (),
    machine: MachineOptions = MACHINE,
) -> None:
    """Find the scenes of a library that are most similar to a scene.

    Args:
        library: Library folder.
        scene: A scene of the library; with `data`, a scene of that dataset, learned in a second or two.
        count: Number of scenes to find.
        data: Dataset that holds the scene.
        where: Find only scenes whose tags match, such as category=chair*.
    """
    from latentscenes.core.console import Table, show

    if count < 1:
        raise UserError(f"--count {count}: must be at least 1.")
    if data is not None:
        require_dataset(data)
    kept = {info.name for info in opened_index(library).infos(where=where)} if where else None
    opened = _open(library, [] if data else [scene], machine)
    among = count if kept is None else len(opened)
    if data is None:
        found, note = opened.nearest(scene, among), "Root mean square difference of macro planes."
    else:
        from latentscenes.data.dataset import PosedImages

        found, note = opened.search(PosedImages.open(data), scene, among), "1 − cosine between weights."
    found = [near for near in found if kept is None or near.name in kept][:count]
    infos = [opened.folder.index.info(near.name) for near in found]
    tags = [plain_text(tags_text(info.tags), 80) if info else "" for info in infos]
    rows = [(near.name, about, f"{near.distance:.4f}") for near, about in zip(found, tags, strict=True)]
    columns = ("scene", "tags", "distance")
    if not any(about for _, about, _ in rows):
        rows, columns = [(name, distance) for name, _, distance in rows], ("scene", "distance")
    show(Table(f"Most similar to {scene}", columns, tuple(rows), (), note))


def _open(library: Path, scenes: Sequence[str] = (), machine: Machine | None = None) -> "Library":
    """Opens a library. Raises a UserError, before torch is loaded, if a scene is unknown."""
    opened_index(library, scenes).close()
    from latentscenes.api import Library
    from latentscenes.storage.published.reader import open_source

    return Library(open_source(library), set_up(machine) if machine else "cpu")
