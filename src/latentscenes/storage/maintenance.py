"""Maintenance of a library: compact, store at a coarser precision, copy to another library.

Scenes move by whole shards: a new shard is written, one transaction updates the index, then the old shard is
removed. Each operation may be killed at any time; run it again to continue. Shards that the index does not
list are kept if they hold scenes that it does not know (recovery.py).
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from latentscenes.core.errors import UserError
from latentscenes.core.files import PARTIAL, folder_bytes, locked, sync
from latentscenes.core.names import short
from latentscenes.core.options import StoragePrecision
from latentscenes.data.dataset import spread_evenly
from latentscenes.model.model import Model, render_images
from latentscenes.storage.description import refuse_inside
from latentscenes.storage.index import FILE, SceneInfo
from latentscenes.storage.library import SHARED, LibraryFolder, NewScene
from latentscenes.storage.quantize import (
    CODES,
    PRECISIONS,
    Payload,
    check_precision,
    pack,
    payload_bytes,
    payload_checksum,
    payload_kind,
)
from latentscenes.storage.recovery import unlisted
from latentscenes.storage.shards import MOST_SCENES, NAME, STATED
from latentscenes.storage.source import SceneSource

SHARD_BYTES = 64 << 20
"""Target size of merged shards."""
VIEWS = 4
"""Cameras around a scene for measuring the loss at a coarser precision."""
SAMPLE = 8
"""Scenes that `precision_costs` measures."""


@dataclass(frozen=True)
class PrecisionCost:
    """Size and loss at one precision: means over some scenes."""

    precision: StoragePrecision
    bytes: float
    """Per scene."""
    lost: float
    """Further loss of PSNR against the true images, dB."""


@dataclass(frozen=True)
class Change:
    """A scene's new payload and its entries in the index."""

    payload: Payload
    precision: StoragePrecision
    psnr_lost: float | None


def compact(library: LibraryFolder) -> int:
    """Merges small shards and removes what removed scenes, crashes and stopped work left. Scenes stay
    identical. Where nothing is to be gained, no shard is written. Returns the bytes freed in shards."""
    before = folder_bytes(library.path / "shards")
    with library.writing():
        _refuse_misplaced(library)
        library.index.add_checks()
        if worn := _shards_to_rewrite(library):
            places = library.index.places().items()
            names = [name for name, place in places if place.shard in worn]
            shard = {name: place.shard for name, place in places}
            names.sort(key=lambda name: worn[shard[name]])  # scenes of one kind fit into one shard
            _rewrite(library, names, lambda name, payload: None)
        _drop_orphans(library)
        _drop_work(library)
        library.index.vacuum()
    return before - folder_bytes(library.path / "shards")


def _shards_to_rewrite(library: LibraryFolder) -> dict[int, str]:
    """Returns the shards to rewrite, each with the kind of its payloads: those that scenes were removed from,
    those of earlier versions that do not state their scenes, and small ones, at least two of a kind."""
    worn, small = {}, {}
    for shard, (written, remaining) in library.index.shards().items():
        file = library.shards.file(shard)
        kind, states = _kind(library, shard)
        if remaining < written or not states:
            worn[shard] = kind
        elif written <= MOST_SCENES // 2 and file.exists() and file.stat().st_size < SHARD_BYTES // 2:
            small[shard] = kind
    count = Counter([*worn.values(), *small.values()])
    return worn | {shard: kind for shard, kind in small.items() if count[kind] > 1}


def _kind(library: LibraryFolder, shard: int) -> tuple[str, bool]:
    """Returns names and types of a shard's tensors, as text, and whether it states its scenes."""
    try:
        opened = library.shards.open(shard)
        kind = [(name, opened.get_slice(name).get_dtype()) for name in sorted(opened.keys())]
        return str(kind), STATED in (opened.metadata() or {})
    except (FileNotFoundError, SafetensorError):  # rewriting other shards does not need it
        return "", True


def repack(library: LibraryFolder, precision: str, device: torch.device | str = "cpu") -> int:
    """Stores all scenes of finer precision at `precision` and adds the measured loss to their metadata.
    Scenes that earlier versions stored at this precision keep their values and get smaller. Returns the
    number of scenes that are stored anew."""
    chosen, model = check_precision(precision), library.model(device)
    finer, places = set(PRECISIONS[: PRECISIONS.index(chosen)]), library.index.places()
    older = {shard for shard in library.index.shards() if f"'{CODES}'" in _kind(library, shard)[0]}
    names = [
        info.name
        for info in library.index.infos()
        if info.precision in finer or (info.precision == chosen and places[info.name].shard in older)
    ]

    def change(name: str, payload: Payload) -> Change:
        info = library.index.info(name)
        coarse = pack(library.unpacked(payload), chosen)
        if info.psnr is None or info.precision == chosen:
            return Change(coarse, chosen, info.psnr_lost)
        lost = (info.psnr_lost or 0.0) + loss(library, model, payload, coarse, info.psnr)
        return Change(coarse, chosen, round(lost, 4))

    with library.writing():
        _refuse_misplaced(library)
        _rewrite(library, names, change)
    return len(names)


def precision_costs(library: LibraryFolder, device: torch.device | str = "cpu") -> list[PrecisionCost]:
    """Measures size and loss at each precision from the finest stored one on, with up to SAMPLE of the finest
    scenes. Raises a UserError if the library holds no scenes with a known PSNR."""
    infos = [info for info in library.index.infos() if info.psnr is not None]
    if not infos:
        raise UserError(f"{library.path}: holds no scenes to measure.")
    finest = min(PRECISIONS.index(info.precision) for info in infos)
    fine = [place for place, info in enumerate(infos) if info.precision == PRECISIONS[finest]]
    sample = [infos[place] for place in spread_evenly(fine, SAMPLE)]
    model, settings = library.model(device), []
    chosen = [(info, library.payload(info.name)) for info in sample]
    for precision in PRECISIONS[finest:]:
        size = lost = 0.0
        for info, payload in chosen:
            coarse = payload
            if precision != info.precision:
                coarse = pack(library.unpacked(payload), precision)
            size += payload_bytes(coarse)
            lost += loss(library, model, payload, coarse, info.psnr)
        settings.append(PrecisionCost(precision, size / len(chosen), lost / len(chosen)))
    return settings


@torch.no_grad()
def loss(library: LibraryFolder, model: Model, fine: Payload, coarse: Payload, psnr: float) -> float:
    """Returns the PSNR (dB) against the true images that a coarser payload loses.

    Adds the mean squared difference between renders of both payloads to the squared error at `psnr`, the PSNR
    of the finer one: rounding is independent of that error.
    """
    if payload_kind(fine) == payload_kind(coarse) and all(
        torch.equal(fine[name], coarse[name]) for name in fine
    ):
        return 0.0
    view, device = library.info.view, model.bases.device

    def images(payload: Payload) -> torch.Tensor:
        planes = model.compose(library.unpacked(payload).to(device), bounded=True)
        return render_images(model, planes, view.orbit(VIEWS), view.size, geometry=False).images

    difference = (images(fine) - images(coarse)).square().mean().item()
    return 10 * math.log10(1 + difference / 10 ** (-psnr / 10))


def export(library: SceneSource, names: Sequence[str], out: str | Path) -> int:
    """Copies scenes, bit for bit and with metadata, to a new library or to one with the same model. Returns
    how many `out` did not hold yet. Raises a UserError if `out` has another model or another scene of that
    name."""
    if LibraryFolder.exists(out):
        target = LibraryFolder.open(out)
        if target.checksums[SHARED] != library.checksums[SHARED]:
            raise UserError(
                f"{out}: a library of another model, which cannot render scenes of {library.path}. "
                "Name a new folder."
            )
    else:
        refuse_inside(Path(out))
        start = library.starting_scene()
        target = LibraryFolder.create(out, library.config, library.info, library.model(), start)
    theirs = target.index.places()
    ours = library.index.places() if len(names) > SAMPLE else {one: library.index.place(one) for one in names}
    if clash := [name for name in names if name in theirs and theirs[name].checksum != ours[name].checksum]:
        raise UserError(f"{out}: holds another scene named {clash[0]!r}. Rename one of the two.")
    wanted = [name for name in names if name not in theirs]
    batch, size = [], 0
    for name in wanted:
        payload = checked_payload(library, name)
        batch.append(NewScene(library.index.info(name), payload, library.index.thumbnail(name)))
        size += payload_bytes(payload)
        if size > SHARD_BYTES:
            target.append(batch)
            batch, size = [], 0
    if batch:
        target.append(batch)
    target.close()
    return len(wanted)


def checked_payload(library: SceneSource, name: str) -> Payload:
    """Returns a scene's payload. Raises a UserError if its checksum is wrong."""
    payload, place = library.payload(name), library.index.place(name)
    if place is None or payload_checksum(payload) != place.checksum:
        raise UserError(
            f"{library.path}: scene {name!r} is damaged. "
            "Remove it, or restore its shard from a copy, and run the command again."
        )
    return payload


# Moving scenes; the caller holds the library's lock


def _refuse_misplaced(library: LibraryFolder) -> None:
    """Raises a UserError if the index says that a scene lies where another one, or none, lies: the shard that
    holds it might then be taken for one without scenes, and be removed."""
    places = sorted(library.index.places().items(), key=lambda item: (item[1].shard, item[1].row))
    for name, place in places:
        try:
            inside = place.row < library.shards.rows(place.shard)
            stated = library.shards.stated(place) if inside else {"checksum": None}
            if stated is None:  # a shard of an earlier version
                stated = {"checksum": payload_checksum(library.shards.read(place))}
        except FileNotFoundError:
            stated = {"checksum": None}
        except SafetensorError:  # its scenes are refused when they are moved
            continue
        if stated["checksum"] != place.checksum:
            raise UserError(
                f"{library.path / FILE}: scene {short(name)} does not lie where the index says. No file is "
                "changed. `latentscenes library verify` lists the damage. Restore the index or the shard "
                "from a copy, or remove the scene."
            )


def _rewrite(
    library: LibraryFolder, names: Iterable[str], change: Callable[[str, Payload], Change | None]
) -> None:
    """Moves scenes to new shards; `change` returns the changes of a scene, or None."""
    batch: list[tuple[str, Payload, Change | None]] = []
    size = 0
    for name in names:
        old = checked_payload(library, name)
        changed = change(name, old)
        payload = changed.payload if changed else old
        full = size > SHARD_BYTES or len(batch) == MOST_SCENES
        if batch and (full or payload_kind(batch[0][1]) != payload_kind(payload)):
            _commit(library, batch)
            batch, size = [], 0
        batch.append((name, payload, changed))
        size += payload_bytes(payload)
    if batch:
        _commit(library, batch)


def _commit(library: LibraryFolder, batch: Sequence[tuple[str, Payload, Change | None]]) -> None:
    number, index = library.next_shard(), library.index
    scenes = [
        (_changed_info(index.info(name), payload, changed), payload) for name, payload, changed in batch
    ]
    library.shards.write(number, scenes)
    with index.transaction():
        index.move(number, [name for name, _, _ in batch])
        for info, payload in scenes:
            index.set_precision(
                info.name, payload_checksum(payload), info.precision, info.bytes, info.psnr_lost
            )
    _drop_orphans(library)


def _changed_info(info: SceneInfo, payload: Payload, changed: Change | None) -> SceneInfo:
    if changed is None:
        return info
    size = payload_bytes(payload)
    return replace(info, precision=changed.precision, bytes=size, psnr_lost=changed.psnr_lost)


def _drop_orphans(library: LibraryFolder) -> None:
    """Removes shards without scenes, and files of kills: unlisted shards whose scenes the index knows, and
    incomplete ones. A shard is removed before the index forgets it, so that removed scenes do not come back.
    """
    folder, shards = library.path / "shards", library.index.shards()
    empty = {shard for shard, (_, remaining) in shards.items() if not remaining}
    used = {place.shard for place in library.index.places().values()} | shards.keys() - empty
    kept = {library.shards.file(shard) for shard in used} | unlisted(library).keys()
    for file in folder.iterdir():
        if file not in kept and (NAME.fullmatch(file.name) or PARTIAL in file.name):
            file.unlink()
    sync(folder)
    with library.index.transaction():
        library.index.forget_shards(empty)


def _drop_work(library: LibraryFolder) -> None:
    """Removes the remains of stopped work, unless a process is at work."""
    work = library.path / "work"
    if not work.is_dir():
        return
    with ExitStack() as held:
        try:
            for lock in [work / "lock", *work.glob("*/lock")]:
                held.enter_context(locked(lock, False, str(lock)))
        except UserError:
            return
        shutil.rmtree(work)
