"""The command line's `library` commands, and `search`."""

import itertools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from latentscenes.cli.common import MACHINE, Machine, MachineOptions, set_up
from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError

if TYPE_CHECKING:
    from latentscenes.api import Library
    from latentscenes.core.console import Table
    from latentscenes.storage.maintenance import Setting

MANY = 1000
"""Rows from which a list is printed without the care that a table takes, which would be minutes for 100,000."""
Folder = Annotated[Path, tyro.conf.Positional]
Names = Annotated[tuple[str, ...], tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]


def library_list(library: Folder, match: str = "*", limit: int = 50, as_json: bool = False) -> None:
    """List the scenes of a library.

    Args:
        library: its folder.
        match: only names like this; * and ? stand for any letters.
        limit: show at most so many; 0 for all.
        as_json: one JSON object per line, everything that is known of each.
    """
    from latentscenes.core.console import Table, bytes_text, seconds_text

    if limit < 0:
        raise UserError(f"--limit {limit}: at least 1, or 0 for all.")
    opened = _open(library)
    infos = opened.infos(match)
    shown = infos[:limit] if limit else infos
    if as_json:
        _print_lines(json.dumps(asdict(info)) for info in shown)
        return
    rows = [
        (
            info.name,
            info.origin,
            info.precision,
            bytes_text(info.bytes),
            _decibels(info.psnr),
            _decibels(info.psnr_lost, 3),
            seconds_text(info.seconds),
            info.added[:10],
        )
        for info in shown
    ]
    known = [info.psnr for info in infos if info.psnr is not None]
    note = f"{_thousands(len(infos))} of {_thousands(len(opened))} scenes, {bytes_text(sum(info.bytes for info in infos))}"
    note += f"; mean {sum(known) / len(known):.2f} dB" if known else ""
    note += (
        f"; {_thousands(len(infos) - len(shown))} not shown, --limit 0 shows all"
        if len(shown) < len(infos)
        else ""
    )
    columns = ("scene", "from", "stored as", "bytes", "PSNR", "lost", "learned in", "added")
    if len(rows) <= MANY:
        _print(Table(str(library), columns, tuple(rows), (), note))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (columns, *rows)
    )
    _print_lines(itertools.chain(lines, [note]))


def library_show(library: Folder, scene: Annotated[str | None, tyro.conf.Positional] = None) -> None:
    """Tell what is known of a library, or of one of its scenes.

    Args:
        library: its folder.
        scene: name of a scene.
    """
    from latentscenes.core.console import bytes_text, seconds_text

    opened = _open(library)
    if scene is not None:
        for key, value in asdict(opened[scene].metadata).items():
            print(f"{key:10} {value}")
        return
    opened.folder.check_model()
    info, infos = opened.folder.info, opened.infos()
    origins = {
        origin: sum(entry.origin == origin for entry in infos) for origin in ("stage 1", "exploit", "add")
    }
    facts = {
        "scenes": f"{len(infos)} ({', '.join(f'{count} from {origin}' for origin, count in origins.items() if count)})",
        "scenes' bytes": bytes_text(sum(entry.bytes for entry in infos)),
        "shared bytes": bytes_text(opened.folder.shared_file.stat().st_size),
        "new ones as": info.precision,
        "pictures": f"{info.view.size[1]}x{info.view.size[0]}",
        "made of": f"{info.parent}: {info.parent_scenes} scenes, {seconds_text(info.parent_seconds)}",
        "finetuned from": info.finetuned_from,
        "datasets": ", ".join(sorted({entry.dataset for entry in infos if entry.dataset})),
    }
    for key, value in facts.items():
        if value:
            print(f"{key:14} {value}")


def library_remove(library: Folder, scenes: Names) -> None:
    """Take scenes out. Their room comes back with `library compact`.

    Args:
        library: its folder.
        scenes: their names.
    """
    if not scenes:
        raise UserError(
            f"{library}: no scenes named, so none is removed. Name some; `latentscenes library list {library}` lists them."
        )
    opened = _open(library)
    opened.remove(*scenes)
    _say(
        f"{library}: {len(set(scenes))} scenes removed, {len(opened)} left. `latentscenes library compact {library}` gives their room back."
    )


def library_rename(library: Folder, scene: Name, new: Name) -> None:
    """Give a scene another name.

    Args:
        library: its folder.
        scene: its name.
        new: the name to be.
    """
    _open(library).rename(scene, new)
    _say(f"{library}: {scene!r} is {new!r} now.")


def library_export(library: Folder, scenes: Names = (), match: str | None = None, *, out: Path) -> None:
    """Copy scenes, bit by bit, into a new library, or into another one of the same model.

    Args:
        library: its folder.
        scenes: their names …
        match: … or all whose names are like this; * and ? stand for any letters.
        out: folder of the other library.
    """
    opened = _open(library)
    names = [
        *scenes,
        *(info.name for info in (opened.infos(match) if match else []) if info.name not in scenes),
    ]
    if not names:
        raise UserError(f"{library}: no scenes named. Name some, or give --match, for instance --match '*'.")
    _say(f"{out}: {opened.export(names, out)} scenes copied.")


def library_model(library: Folder, out: Annotated[Path, tyro.conf.Positional]) -> None:
    """Write what the scenes share, without any scene, in half precision: a model to hand on, for `exploit --run`.

    Args:
        library: its folder.
        out: folder to write.
    """
    from latentscenes.core.console import bytes_text
    from latentscenes.storage.library import LibraryFolder
    from latentscenes.storage.pretrained import export_model

    _say(
        f"{out}: {bytes_text(export_model(LibraryFolder.open(library), out))}. Learn new scenes with it: latentscenes exploit --run {out} --data … --out …"
    )


def library_verify(library: Folder) -> None:
    """Compare every scene with the checksum taken when it was written. Exit status 1 if something is damaged.

    Args:
        library: its folder.
    """
    opened = _open(library)
    damaged = opened.verify()
    for damage in damaged:
        print(f"{damage.name}: {damage.what}")
    if damaged:
        raise SystemExit(1)
    _say(f"{library}: {len(opened)} scenes, all as they were written.")


def library_compact(library: Folder) -> None:
    """Merge small files and give back the room of removed scenes and of stopped work. Scenes keep every bit.

    Args:
        library: its folder.
    """
    from latentscenes.core.console import bytes_text

    _say(f"{library}: {bytes_text(max(0, _open(library).compact()))} freed.")


def library_repack(
    library: Folder,
    precision: StoragePrecision | None = None,
    lost: float | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Store scenes more coarsely. Without a choice: tell what each precision would cost and lose.

    Args:
        library: its folder.
        precision: how to store them; scenes that are stored so, or more coarsely, stay as they are.
        lost: choose the smallest that loses at most so many dB in the mean.
    """
    from latentscenes.core.console import bytes_text

    if lost is not None and (precision is not None or not lost >= 0):
        raise UserError(f"--lost {lost:g}: {'goes without --precision' if precision else 'dB, 0 at least'}.")
    opened = _open(library, machine)
    if precision is None:
        settings = opened.dial()
        _print(dial_table(settings))
        if lost is None:
            return
        fitting = [setting for setting in settings if setting.lost <= lost]
        precision = min(fitting, key=lambda setting: setting.bytes).precision
    count = opened.repack(precision)
    infos = opened.infos()
    mean = sum(info.psnr_lost or 0.0 for info in infos) / max(len(infos), 1)
    size = sum(info.bytes for info in infos) / max(len(infos), 1)
    _say(
        f"{library}: {count} scenes stored as {precision}; now {bytes_text(size)} and {mean:.3f} dB lost a scene, in the mean over all."
    )


def dial_table(settings: "list[Setting]") -> "Table":
    """Bytes against quality."""
    from latentscenes.core.console import Table, bytes_text

    rows = tuple(
        (setting.precision, bytes_text(setting.bytes), f"{setting.lost:.3f} dB") for setting in settings
    )
    return Table("What precision costs and loses", ("stored as", "bytes / scene", "PSNR lost"), rows)


LIBRARY_COMMANDS = {
    "list": library_list,
    "show": library_show,
    "remove": library_remove,
    "rename": library_rename,
    "export": library_export,
    "model": library_model,
    "verify": library_verify,
    "compact": library_compact,
    "repack": library_repack,
}


def search(
    library: Folder, scene: Name, count: int = 5, data: Path | None = None, machine: MachineOptions = MACHINE
) -> None:
    """Find the scenes of a library that are most like another.

    Args:
        library: its folder.
        scene: a scene of the library, or with `data` one of that dataset, which is learned for a second or two for this.
        count: how many.
        data: dataset that holds the scene.
    """
    from latentscenes.core.console import Table

    if count < 1:
        raise UserError(f"--count {count}: at least 1.")
    opened = _open(library, machine)
    if data is None:
        found = opened.nearest(scene, count)
    else:
        from latentscenes.data.dataset import PosedImages

        found = opened.search(PosedImages.open(data), scene, count)
    rows = tuple((neighbor.name, f"{neighbor.distance:.4f}") for neighbor in found)
    note = "Root mean square difference of macro planes." if data is None else "1 − cosine between weights."
    _print(Table(f"Most like {scene}", ("scene", "distance"), rows, (), note))


def _open(path: Path, machine: Machine | None = None) -> "Library":
    from latentscenes.api import Library
    from latentscenes.storage.library import LibraryFolder

    return Library(LibraryFolder.open(path), set_up(machine) if machine else "cpu")


def _print_lines(lines: Iterable[str]) -> None:
    """As many as somebody reads: `head`, say, goes after some."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself still flushes


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _decibels(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _say(text: str) -> None:
    from latentscenes.core.console import console

    console.print(text, highlight=False, soft_wrap=True)


def _print(table: "Table") -> None:
    from latentscenes.evaluation.tables import print_things

    print_things(table)
