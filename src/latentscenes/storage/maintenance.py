"""Care for a library: checked against its checksums, compacted, stored more coarsely, copied out.

Scenes move by whole shards: a new one is written, one transaction says that its scenes now lie there, the old one is
removed. Any of this may be stopped at any time, and the same again goes on.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, folder_bytes, locked, payload_checksum
from latentscenes.data.dataset import spread_evenly
from latentscenes.model.model import Model, render_images
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.library import SHARED, START, LibraryFolder, NewScene
from latentscenes.storage.quantize import (
    PRECISIONS,
    Payload,
    check_precision,
    pack,
    payload_bytes,
    payload_kind,
    unpack,
)

SHARD_BYTES = 64 << 20
"""Shards are merged to about this size."""
VIEWS = 4
"""Cameras around a scene that the loss of storing it more coarsely is measured from."""
SAMPLE = 8
"""Scenes that a dial is measured on."""


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written."""

    name: str
    """A scene's name, or the file."""
    what: str


@dataclass(frozen=True)
class Setting:
    """One setting of the rate-distortion dial: means over some scenes."""

    precision: StoragePrecision
    bytes: float
    """Per scene."""
    lost: float
    """dB of PSNR against the truth, beside what was lost before."""


@dataclass(frozen=True)
class Change:
    """How a scene will be stored."""

    payload: Payload
    precision: StoragePrecision
    psnr_lost: float | None


def verify(store: LibraryFolder) -> list[Damage]:
    """Compare the model and every scene with the checksums taken when they were written."""
    found = []
    for name, need in ((SHARED, "every scene needs it"), (START, "new scenes start from it")):
        file = store.path / "model" / name
        if not file.is_file():
            found.append(Damage(f"model/{name}", f"is absent; {need}"))
        elif name in store.checksums and file_checksum(file) != store.checksums[name]:
            found.append(Damage(f"model/{name}", f"its bytes have changed; {need}"))
    for name, place in sorted(store.index.places().items(), key=lambda item: (item[1].shard, item[1].row)):
        file = store.shard_file(place.shard).name
        try:
            if payload_checksum(store.read(place)) != place.checksum:
                found.append(Damage(name, f"its bytes in {file} have changed"))
        except FileNotFoundError:
            found.append(Damage(name, f"its shard {file} is absent"))
        except SafetensorError as error:
            found.append(Damage(name, f"its shard {file} cannot be read ({error})"))
    return found


def compact(store: LibraryFolder) -> int:
    """Merge small shards, drop what was removed and what crashes left; gives the bytes of shards that became free.
    Scenes keep every bit."""
    before = folder_bytes(store.path / "shards")
    with store.writing():
        shards = store.index.shards()
        worn = {
            shard for shard, (written, alive) in shards.items() if alive < written or _is_small(store, shard)
        }
        if len(worn) > 1 or any(alive < written for written, alive in shards.values()):
            _rewrite(
                store,
                [name for name, place in store.index.places().items() if place.shard in worn],
                lambda name, payload: None,
            )
        _drop_orphans(store)
        _drop_work(store)
        store.index.vacuum()
    return before - folder_bytes(store.path / "shards")


def _is_small(store: LibraryFolder, shard: int) -> bool:
    file = store.shard_file(shard)
    return file.exists() and file.stat().st_size < SHARD_BYTES // 2


def repack(store: LibraryFolder, precision: str, device: torch.device | str = "cpu") -> int:
    """Store all scenes that are stored more finely at a precision; gives how many these were. What that loses is
    measured (`loss`) and noted beside each."""
    chosen, model = check_precision(precision), store.model(device)
    finer = set(PRECISIONS[: PRECISIONS.index(chosen)])
    names = [info.name for info in store.index.infos() if info.precision in finer]

    def change(name: str, payload: Payload) -> Change:
        info = store.index.info(name)
        coarse = pack(unpack(payload, store.config.planes), chosen)
        lost = loss(store, model, payload, coarse, info.psnr) if info.psnr is not None else None
        return Change(coarse, chosen, lost if lost is None else round((info.psnr_lost or 0.0) + lost, 4))

    with store.writing():
        _rewrite(store, names, change)
    return len(names)


def dial(store: LibraryFolder, device: torch.device | str = "cpu") -> list[Setting]:
    """What each precision, from that of the finest scene on, would cost and lose; measured on up to SAMPLE of the
    scenes that are stored most finely."""
    infos = [info for info in store.index.infos() if info.psnr is not None]
    if not infos:
        raise UserError(f"{store.path}: holds no scenes to measure on.")
    finest = min(PRECISIONS.index(info.precision) for info in infos)
    places = [place for place, info in enumerate(infos) if info.precision == PRECISIONS[finest]]
    model, settings = store.model(device), []
    chosen = [(infos[place], store.payload(infos[place].name)) for place in spread_evenly(places, SAMPLE)]
    for precision in PRECISIONS[finest:]:
        coarse = [
            pack(unpack(payload, store.config.planes), precision) if precision != info.precision else payload
            for info, payload in chosen
        ]
        lost = [
            loss(store, model, payload, other, info.psnr)
            for (info, payload), other in zip(chosen, coarse, strict=True)
        ]
        settings.append(
            Setting(precision, sum(map(payload_bytes, coarse)) / len(chosen), sum(lost) / len(chosen))
        )
    return settings


@torch.no_grad()
def loss(store: LibraryFolder, model: Model, fine: Payload, coarse: Payload, psnr: float) -> float:
    """dB of PSNR against the truth that a coarser payload loses, from renders of both: their mean squared difference
    is added to the squared error that `psnr` says, since rounding knows nothing of that error."""
    if payload_kind(fine) == payload_kind(coarse) and all(
        torch.equal(fine[name], coarse[name]) for name in fine
    ):
        return 0.0
    view, device = store.info.view, model.bases.device

    def images(payload: Payload) -> torch.Tensor:
        rows: SceneParameters = unpack(payload, store.config.planes).to(device)
        return render_images(model, model.compose(rows), view.orbit(VIEWS), view.size, geometry=False).images

    difference = (images(fine) - images(coarse)).square().mean().item()
    return 10 * math.log10(1 + difference / 10 ** (-psnr / 10))


def export(store: LibraryFolder, names: Sequence[str], out: str | Path) -> int:
    """Copy scenes, bit by bit and with all that is known of them, into a new library or into one of the same model;
    gives how many were not there yet.

    Raises:
        UserError: the other library has another model, or other scenes of these names.
    """
    if LibraryFolder.exists(out):
        target = LibraryFolder.open(out)
        if target.checksums[SHARED] != store.checksums[SHARED]:
            raise UserError(
                f"{out}: a library of another model, which cannot render scenes of {store.path}. Name a new folder."
            )
    else:
        target = LibraryFolder.create(out, store.config, store.info, store.model(), store.starting_scene())
    ours, theirs = store.index.places(), target.index.places()
    if clash := [name for name in names if name in theirs and theirs[name].checksum != ours[name].checksum]:
        raise UserError(f"{out}: holds another scene named {clash[0]!r}. Rename one of the two.")
    wanted = [name for name in names if name not in theirs]
    batch, size = [], 0
    for name in wanted:
        payload = checked_payload(store, name)
        batch.append(NewScene(store.index.info(name), payload, store.index.thumbnail(name)))
        size += payload_bytes(payload)
        if size > SHARD_BYTES:
            target.append(batch)
            batch, size = [], 0
    if batch:
        target.append(batch)
    target.close()
    return len(wanted)


def checked_payload(store: LibraryFolder, name: str) -> Payload:
    """A scene as it is stored, compared with its checksum."""
    payload, place = store.payload(name), store.index.place(name)
    if place is None or payload_checksum(payload) != place.checksum:
        raise UserError(
            f"{store.path}: scene {name!r} is damaged. Remove it, or restore its shard from a copy, and begin again."
        )
    return payload


# Moving scenes, for holders of the library's lock


def _rewrite(
    store: LibraryFolder, names: Iterable[str], change: Callable[[str, Payload], Change | None]
) -> None:
    """Move scenes to new shards, changed or (None) as they are."""
    batch: list[tuple[str, Payload, Change | None]] = []
    size = 0
    for name in names:
        old = checked_payload(store, name)
        changed = change(name, old)
        payload = changed.payload if changed else old
        if batch and (size > SHARD_BYTES or payload_kind(batch[0][1]) != payload_kind(payload)):
            _commit(store, batch)
            batch, size = [], 0
        batch.append((name, payload, changed))
        size += payload_bytes(payload)
    if batch:
        _commit(store, batch)


def _commit(store: LibraryFolder, batch: Sequence[tuple[str, Payload, Change | None]]) -> None:
    number, index = store.index.next_shard(), store.index
    store.write_shard(number, [payload for _, payload, _ in batch])
    with index.transaction():
        index.move(number, [name for name, _, _ in batch])
        for name, payload, changed in batch:
            if changed:
                index.restate(
                    name,
                    payload_checksum(payload),
                    changed.precision,
                    payload_bytes(payload),
                    changed.psnr_lost,
                )
    _drop_orphans(store)


def _drop_orphans(store: LibraryFolder) -> None:
    """Remove shards without scenes, and files that the index does not know."""
    shards = store.index.shards()
    with store.index.transaction():
        store.index.forget_shards(shard for shard, (_, alive) in shards.items() if not alive)
    kept = {store.shard_file(shard).name for shard, (_, alive) in shards.items() if alive}
    for file in (store.path / "shards").iterdir():
        if file.name not in kept:
            file.unlink()


def _drop_work(store: LibraryFolder) -> None:
    """Remove what learning left behind, unless somebody is at it."""
    work = store.path / "work"
    if not work.is_dir():
        return
    with ExitStack() as held:
        try:
            for lock in [work / "lock", *work.glob("*/lock")]:
                held.enter_context(locked(lock, False, str(lock)))
        except UserError:
            return
        shutil.rmtree(work)
