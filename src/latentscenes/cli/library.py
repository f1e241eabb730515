"""The `library` commands and `search`. `list`, `show` and wrong names are answered without loading torch."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from latentscenes.cli.common import MACHINE, Machine, MachineOptions, say, set_up
from latentscenes.cli.machines import library_join
from latentscenes.cli.publishing import PUBLISHING_COMMANDS
from latentscenes.core import config_io
from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.core.names import one_line, plain_text

if TYPE_CHECKING:
    from latentscenes.api import Library
    from latentscenes.core.console import Table
    from latentscenes.storage.index import Index
    from latentscenes.storage.maintenance import Setting

MANY = 1000
"""Longest list printed as a table; formatting 100,000 rows as a table would take minutes."""
Folder = Annotated[Path, tyro.conf.Positional]
Names = Annotated[tuple[str, ...], tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]
Where = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAG=PATTERN …")]
WIDEST = 28
"""Characters of a tag in a table."""


def library_list(
    library: Folder, match: str = "*", where: Where = (), limit: int = 50, as_json: bool = False
) -> None:
    """List the scenes of a library.

    Args:
        library: its folder.
        match: only scenes whose names match this pattern (* and ?).
        where: only scenes whose tags match, such as category=chair* license=CC0*.
        limit: maximum number of scenes; 0: all.
        as_json: print one JSON object per line with all metadata of a scene.
    """
    from latentscenes.core.console import Table, bytes_text, seconds_text, show

    if limit < 0:
        raise UserError(f"--limit {limit}: must be at least 1, or 0 for all.")
    index = _index(library)
    infos = index.infos(match, where)
    shown = infos[:limit] if limit else infos
    if as_json:
        for info in shown:
            print(json.dumps(asdict(info)))
        return
    told = [key for key in ("name", "category") if any(key in info.tags for info in shown)]
    rows = [
        (info.name, *(plain_text(info.tags.get(key, "–"), WIDEST) for key in told), info.origin,
         info.precision, bytes_text(info.bytes), _decibels(info.psnr), _decibels(info.psnr_lost, 3),
         seconds_text(info.cpu_seconds), seconds_text(info.seconds), info.added[:10])
        for info in shown
    ]  # fmt: skip
    known = [info.psnr for info in infos if info.psnr is not None]
    size = bytes_text(sum(info.bytes for info in infos))
    note = f"{_thousands(len(infos))} of {_thousands(len(index))} scenes, {size}"
    if known:
        note += f"; mean {sum(known) / len(known):.2f} dB"
    if len(shown) < len(infos):
        note += f"; {_thousands(len(infos) - len(shown))} not shown, --limit 0 shows all"
    labels = [f"tag {key}" for key in told]
    columns = ("scene", *labels, "from", "stored as", "bytes", "PSNR", "lost", "CPU", "wall", "added")
    if len(rows) <= MANY:
        show(Table(str(library), columns, tuple(rows), (), note))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (columns, *rows)
    )
    for line in itertools.chain(lines, [note]):
        print(one_line(line))


@dataclass(frozen=True)
class Facts:
    """What `library show` takes from library.json."""

    precision: StoragePrecision
    parent: str
    parent_seconds: float
    parent_scenes: int
    view: dict[str, Any]
    parent_cpu_seconds: float | None = None
    finetuned_from: str | None = None


def library_show(library: Folder, scene: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Show facts about a library, or the metadata of one scene.

    Args:
        library: its folder.
        scene: name of a scene.
    """
    from latentscenes.core.console import Spent, bytes_text, capture_lines
    from latentscenes.storage.description import SHARED, check_model_file, read_description

    if scene is not None:
        facts = asdict(_index(library, [scene]).info(scene))
        tags = facts.pop("tags")
        for key, value in facts.items():
            print(one_line(f"{key:11} {value}"))
        for key, value in tags.items():
            if isinstance(value, dict):  # what learning found out
                continue
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"tag {plain_text(key):11} {plain_text(text)}")
        for line in capture_lines(tags):
            print(one_line(line))
        return
    infos, about = _index(library).infos(), read_description(library)
    file, known = library / "library.json", Facts.__dataclass_fields__
    facts = config_io.build(Facts, {key: about[key] for key in known if key in about}, file)
    height, width = config_io.build(tuple[int, int], facts.view.get("size"), f"{file}: view: size")
    shared = library / "model" / SHARED
    check_model_file(shared, "every scene needs it", about.get("checksums", {}).get(SHARED))
    counts = {
        origin: sum(info.origin == origin for info in infos) for origin in ("stage 1", "exploit", "add")
    }
    kinds = Counter(str(info.tags["category"]) for info in infos if "category" in info.tags)
    origins = ", ".join(f"{count} from {origin}" for origin, count in counts.items() if count)
    spent = Spent(facts.parent_seconds, facts.parent_cpu_seconds)
    lines = {
        "scenes": f"{len(infos)} ({origins})",
        "scenes' bytes": bytes_text(sum(info.bytes for info in infos)),
        "shared bytes": bytes_text(shared.stat().st_size),
        "precision": facts.precision,
        "image size": f"{width}x{height}",
        "made from": f"{facts.parent}: {facts.parent_scenes} scenes, {spent}",
        "finetuned from": facts.finetuned_from,
        "datasets": ", ".join(sorted({info.dataset for info in infos if info.dataset})),
        "categories": ", ".join(f"{plain_text(kind)} {count}" for kind, count in kinds.most_common()),
    }
    for key, value in lines.items():
        if value:
            print(one_line(f"{key:14} {value}"))


def library_remove(library: Folder, scenes: Names) -> None:
    """Remove scenes. `library compact` frees their space.

    Args:
        library: its folder.
        scenes: their names.
    """
    if not scenes:
        raise UserError(
            f"{library}: no scenes named, so none is removed. "
            f"`latentscenes library list {library}` lists all scenes."
        )
    opened = _open(library, scenes)
    opened.remove(*scenes)
    say(
        f"{library}: {len(set(scenes))} scenes removed, {len(opened)} left. "
        f"`latentscenes library compact {library}` frees their space."
    )


def library_rename(library: Folder, scene: Name, new: Name) -> None:
    """Rename a scene.

    Args:
        library: its folder.
        scene: its name.
        new: its new name.
    """
    _open(library, [scene]).rename(scene, new)
    say(f"{library}: {scene!r} is now {new!r}.")


def library_export(
    library: Folder, scenes: Names = (), match: str | None = None, where: Where = (), *, out: Path
) -> None:
    """Copy scenes, bit for bit, to a new library or to one with the same model.

    Args:
        library: its folder.
        scenes: their names …
        match: … or a pattern for names (* and ?) …
        where: … or conditions on tags, such as category=chair*.
        out: folder of the other library.
    """
    matching = _index(library, scenes).infos(match or "*", where) if match or where else []
    names = [*scenes, *(info.name for info in matching if info.name not in scenes)]
    if not names:
        raise UserError(f"{library}: no scenes named. Name some, or give --match, for instance --match '*'.")
    say(f"{out}: {_open(library, names).export(names, out)} scenes copied.")


def library_model(library: Folder, out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write the shared parts in half precision, without scenes: a pretrained model for `exploit --run`.

    Args:
        library: its folder.
        out: folder to write.
    """
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.pretrained import export_model

    size = bytes_text(export_model(LibraryFolder.open(library), out))
    say(f"{out}: {size}. Learn new scenes with it: latentscenes exploit --run {out} --data … --out …")


def library_verify(library: Folder) -> None:
    """Compare all scenes with their checksums. The exit status is 1 if any is damaged.

    Args:
        library: its folder.
    """
    opened = _open(library)
    damaged = opened.verify()
    for damage in damaged:
        print(one_line(f"{damage.name}: {damage.what}"))
    if damaged:
        raise SystemExit(1)
    say(f"{library}: {len(opened)} scenes, all intact.")


def library_rebuild(library: Folder, machine: MachineOptions = MACHINE) -> None:
    """List scenes of the shards in the index again, after it was lost, damaged, or restored from an old copy.

    Args:
        library: its folder.
    """
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
    say(f"{library}: {len(done.scenes)} scenes listed anew.")
    if done.renamed:
        say(f"Their names were taken, so they have new ones: {', '.join(done.renamed)}.")
    if done.damaged:
        raise SystemExit(1)


def library_compact(library: Folder) -> None:
    """Merge small files and free the space of removed scenes and stopped work. Scenes stay identical.

    Args:
        library: its folder.
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
        library: its folder.
        precision: how to store scenes; scenes of this or a coarser precision stay as they are.
        lost: choose the smallest precision with at most this mean loss, dB.
    """
    from latentscenes.core.console import bytes_text, show

    if lost is not None and (precision is not None or not lost >= 0):
        reason = "cannot be combined with --precision" if precision else "dB, must be at least 0"
        raise UserError(f"--lost {lost:g}: {reason}.")
    opened = _open(library, machine=machine)
    if precision is None:
        settings = opened.dial()
        show(dial_table(settings))
        if lost is None:
            return
        fitting = [setting for setting in settings if setting.lost <= lost]
        precision = min(fitting, key=lambda setting: setting.bytes).precision
    count = opened.repack(precision)
    infos = opened.infos()
    mean = sum(info.psnr_lost or 0.0 for info in infos) / max(len(infos), 1)
    size = bytes_text(sum(info.bytes for info in infos) / max(len(infos), 1))
    say(f"{library}: {count} scenes stored as {precision}. Mean over all scenes: {size}, {mean:.3f} dB lost.")


def dial_table(settings: "list[Setting]") -> "Table":
    """Returns a table of size and loss at each precision."""
    from latentscenes.core.console import Table, bytes_text

    rows = tuple(
        (setting.precision, bytes_text(setting.bytes), f"{setting.lost:.3f} dB") for setting in settings
    )
    return Table("Size and loss at each precision", ("stored as", "bytes / scene", "PSNR lost"), rows)


LIBRARY_COMMANDS = {
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
        library: its folder.
        scene: a scene of the library; with `data`, a scene of that dataset, learned in a second or two.
        count: number of scenes to find.
        data: dataset that holds the scene.
        where: find only scenes whose tags match, such as category=chair*.
    """
    from latentscenes.core.console import Table, show

    if count < 1:
        raise UserError(f"--count {count}: must be at least 1.")
    kept = {info.name for info in _index(library).infos(where=where)} if where else None
    opened = _open(library, [] if data else [scene], machine)
    among = count if kept is None else len(opened)
    if data is None:
        found, note = opened.nearest(scene, among), "Root mean square difference of macro planes."
    else:
        from latentscenes.data.dataset import PosedImages

        found, note = opened.search(PosedImages.open(data), scene, among), "1 − cosine between weights."
    found = [near for near in found if kept is None or near.name in kept][:count]
    abouts = opened.folder.index.abouts()
    rows = [(near.name, plain_text(abouts.get(near.name, ""), 80), f"{near.distance:.4f}") for near in found]
    columns = ("scene", "tags", "distance")
    if not any(about for _, about, _ in rows):
        rows, columns = [(name, distance) for name, _, distance in rows], ("scene", "distance")
    show(Table(f"Most similar to {scene}", columns, tuple(rows), (), note))


def _index(library: Path, scenes: Sequence[str] = ()) -> "Index":
    """Opens the index of a library without loading torch. Raises a UserError if a scene is unknown."""
    from latentscenes.storage.description import read_description
    from latentscenes.storage.index import FILE, Index

    read_description(library)
    index = Index(library / FILE)
    index.require(scenes)
    return index


def _open(library: Path, scenes: Sequence[str] = (), machine: Machine | None = None) -> "Library":
    """Opens a library. Raises a UserError, before torch is loaded, if a scene is unknown."""
    _index(library, scenes).close()
    from latentscenes.api import Library
    from latentscenes.storage.library import LibraryFolder

    return Library(LibraryFolder.open(library), set_up(machine) if machine else "cpu")


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _decibels(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
