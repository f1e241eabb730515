"""The commands `library list` and `library show`, which load no torch."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line, plain_text
from latentscenes.core.options import StoragePrecision

if TYPE_CHECKING:
    from latentscenes.storage.entries import SceneInfo, Totals
    from latentscenes.storage.index import Index
    from latentscenes.storage.published.index import PublishedIndex

MANY = 1000
"""Longest list printed as a table; formatting 100,000 rows as a table would take minutes."""
WIDEST = 28
"""Characters of a tag in a table."""
Folder = Annotated[Path, tyro.conf.Positional]
Where = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAG=PATTERN …")]


def library_list(
    library: Folder, match: str = "*", where: Where = (), limit: int = 50, as_json: bool = False
) -> None:
    """List the scenes of a library.

    Args:
        library: Library folder, or the address of a published library.
        match: Only scenes whose names match this pattern (* and ?).
        where: Only scenes whose tags match, such as category=chair* license=CC0*.
        limit: Maximum number of scenes; 0: all.
        as_json: Print one JSON object per line with all metadata of a scene.
    """
    from latentscenes.core.console import Table, bytes_text, seconds_text, show
    from latentscenes.storage.published.addresses import address_of

    if limit < 0:
        raise UserError(f"--limit {limit}: must be at least 1, or 0 for all.")
    index = opened_index(library)
    shown, found = _found(index, match, where, limit)
    if as_json:
        for info in shown:
            print(json.dumps(asdict(info)))
        return
    columns = [key for key in ("name", "category") if any(key in info.tags for info in shown)]
    rows = [
        (info.name, *(plain_text(info.tags.get(key, "–"), WIDEST) for key in columns), info.origin,
         info.precision, bytes_text(info.bytes), _decibels(info.psnr), _lost(info.psnr_lost),
         seconds_text(info.cpu_seconds), seconds_text(info.seconds), info.added[:10])
        for info in shown
    ]  # fmt: skip
    note = f"{_thousands(found.count)} of {_thousands(len(index))} scenes, {bytes_text(found.bytes)}"
    if found.psnr is not None:
        note += f"; mean {found.psnr:.2f} dB"
    if len(shown) < found.count:
        note += f"; {_thousands(found.count - len(shown))} not shown, --limit 0 shows all"
    labels = [f"tag {key}" for key in columns]
    columns = ("scene", *labels, "from", "stored as", "bytes", "PSNR", "lost", "CPU", "wall", "added")
    if len(rows) <= MANY:
        show(Table(str(address_of(library) or library), columns, tuple(rows), (), note))
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (columns, *rows)
    )
    for line in itertools.chain(lines, [note]):
        print(one_line(line))


def _found(
    index: "Index | PublishedIndex", match: str, where: Sequence[str], limit: int
) -> "tuple[list[SceneInfo], Totals]":
    """Returns the scenes to show, and totals of all that were found. Reads no others where all are found."""
    from latentscenes.storage.entries import Totals

    if match == "*" and not where and limit:
        return index.first(limit), index.totals()
    infos = index.infos(match, where)
    known = [info.psnr for info in infos if info.psnr is not None]
    mean = sum(known) / len(known) if known else None
    totals = Totals(len(infos), sum(info.bytes for info in infos), mean)
    return infos[:limit] if limit else infos, totals


@dataclass(frozen=True)
class Facts:
    """The entries of library.json that `library show` prints."""

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
        library: Library folder, or the address of a published library.
        scene: Name of a scene.
    """
    from latentscenes.core import config_io
    from latentscenes.core.console import Spent, bytes_text

    if scene is not None:
        _show_scene(opened_index(library, [scene]).info(scene))
        return
    infos, (about, file, shared_bytes) = opened_index(library).infos(), _described(library)
    known = Facts.__dataclass_fields__
    facts = config_io.build(Facts, {key: about[key] for key in known if key in about}, file)
    height, width = config_io.build(tuple[int, int], facts.view.get("size"), f"{file}: view: size")
    counts = {
        origin: sum(info.origin == origin for info in infos) for origin in ("stage 1", "exploit", "add")
    }
    kinds = Counter(str(info.tags["category"]) for info in infos if "category" in info.tags)
    origins = ", ".join(f"{count} from {origin}" for origin, count in counts.items() if count)
    spent = Spent(facts.parent_seconds, facts.parent_cpu_seconds)
    lines = {
        "scenes": f"{len(infos)} ({origins})",
        "scenes' bytes": bytes_text(sum(info.bytes for info in infos)),
        "shared bytes": bytes_text(shared_bytes),
        "precision": facts.precision,
        "image size": f"{width}x{height}",
        "made from": f"{facts.parent}: {counted(facts.parent_scenes, 'scene')}, {spent}",
        "finetuned from": facts.finetuned_from,
        "datasets": ", ".join(sorted({info.dataset for info in infos if info.dataset})),
        "categories": ", ".join(f"{plain_text(kind)} {count}" for kind, count in kinds.most_common()),
    }
    for key, value in lines.items():
        if value:
            print(one_line(f"{key:14} {value}"))


def _show_scene(info: "SceneInfo") -> None:
    """Prints the metadata of a scene."""
    from latentscenes.core.console import bytes_text, capture_lines, lost_text

    lines = {
        "name": info.name,
        "stored as": info.precision,
        "bytes": bytes_text(info.bytes),
        "from": info.origin,
        "dataset": info.dataset,
        "split": info.split,
        "source": info.source,
        "added": info.added,
        "learned in": info.spent,
        "PSNR": None if info.psnr is None else f"{info.psnr:.2f} dB",
        "rounding": None if info.psnr_lost is None else lost_text(info.psnr_lost),
    }
    for key, value in lines.items():
        print(one_line(f"{key:11} {'–' if value is None else value}"))
    for key, value in info.tags.items():
        if isinstance(value, dict):  # what learning found out
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"tag {plain_text(key):11} {plain_text(text)}")
    for line in capture_lines(info.tags):
        print(one_line(line))


def _described(library: Path) -> tuple[dict[str, Any], str, int]:
    """Returns the description of a library, the place of that description, and the size of the shared parts
    in bytes."""
    from latentscenes.storage.description import SHARED, check_model_file, read_description
    from latentscenes.storage.published.index import PublishedIndex, is_published

    if is_published(library):
        index = PublishedIndex.open(library)
        return index.about["library"], f"{index.files.address}/published.json", index.about["model"].bytes
    about, shared = read_description(library), library / "model" / SHARED
    check_model_file(shared, "every scene needs it", about.get("checksums", {}).get(SHARED))
    return about, str(library / "library.json"), shared.stat().st_size


def opened_index(library: Path, scenes: Sequence[str] = ()) -> "Index | PublishedIndex":
    """Opens the index of a library without loading torch. Raises a UserError if a scene is unknown."""
    from latentscenes.storage.description import read_description
    from latentscenes.storage.index import FILE, Index
    from latentscenes.storage.published.index import PublishedIndex, is_published

    if is_published(library):
        index = PublishedIndex.open(library)
    else:
        read_description(library)
        index = Index(library / FILE)
    index.require(scenes)
    return index


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _lost(value: float | None) -> str:
    return "–" if value is None else f"{max(value, 0.0) + 0.0:.3f}"
