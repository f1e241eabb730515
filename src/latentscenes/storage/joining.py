"""Libraries of one model joined into one: parts that were learned side by side, or that grew apart.

Scenes are copied by shards: small ones are merged on the way, and index entries are added shard by shard. A
scene that is there already, with the same bytes, is taken once; another scene of a name that is taken is
refused before anything is written. After a kill, the same call goes on.
"""

import itertools
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, locked, make_folder, new_file, refuse_links, writing_to
from latentscenes.core.names import check_name, short
from latentscenes.core.reading import reason
from latentscenes.core.runtime import collection_paused
from latentscenes.storage.description import SHARED, check_model_file, read_description, refuse_inside
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import FILE, Index, Place
from latentscenes.storage.library import START, LibraryFolder, refuse_foreign
from latentscenes.storage.quantize import Payload, payload_checksum, payload_kind
from latentscenes.storage.run import SETTINGS
from latentscenes.storage.shards import MOST_SCENES

SHARD_BYTES = 64 << 20
"""Size from which on a joined shard is full."""
PAGE = 10_000
"""Scenes whose entries are read together."""


@dataclass(frozen=True)
class JoinResult:
    """What a join did."""

    added: int
    """Scenes that the library did not hold before."""
    known: int
    """Scenes of the parts that were there already, or came twice."""


@dataclass(frozen=True)
class _SceneToCopy:
    """A scene that is about to be copied."""

    info: SceneInfo
    place: Place


_Batch = list[tuple[_SceneToCopy, Payload]]
_Shard = tuple[int, LibraryFolder, _Batch]
"""A shard that is to be written: its number, the part that its scenes come from, the scenes."""


@collection_paused()
def join(
    out: Path, parts: Sequence[Path], only: Mapping[Path, Collection[str]] | None = None, wait: bool = True
) -> JoinResult:
    """Copies the scenes of all parts, bit for bit and with metadata, into the library `out`, which is made if
    it is absent. Parts are only read; no other process should write to them meanwhile.

    Args:
        only: names of the scenes to take from each part; None: all.
        wait: wait for a process that writes to `out`; otherwise raise a UserError.

    Raises:
        UserError: a part is no library, is of another model or damaged, is `out` itself, or two different
            scenes have one name. Then nothing is written, unless a shard turns out to be damaged.
    """
    if not parts:
        raise UserError(f"{out}: no parts named. Name the libraries to join after it.")
    opened = [LibraryFolder.open(part) for part in {part.resolve(): part for part in parts}.values()]
    if any(part.resolve() == out.resolve() for part in parts):
        raise UserError(f"{out}: named as a part of itself. Name it once, as the first.")
    home = LibraryFolder.open(out) if LibraryFolder.exists(out) else None
    _refuse_other_models([*opened] if home is None else [home, *opened])
    found = None
    if home is None:
        refuse_inside(out)
        found = _chosen(None, opened, only or {})
    target = home or _made(opened, out)
    target.wait = wait
    with target.writing():
        if found is None or len(target.index):
            found = _chosen(target, opened, only or {})
        chosen, known = found
        _copied(target, zip(opened, chosen, strict=True))
        target.index.keep_journal()  # also after a join that was killed
    for library in (*opened, target):
        library.close()
    return JoinResult(sum(map(len, chosen)), known)


def _made(parts: Sequence[LibraryFolder], out: Path) -> LibraryFolder:
    """Makes the library `out`, or opens it if another process was faster. Without a journal that stays, new
    pages of the index are written once rather than twice."""
    try:
        return empty_copy(parts[0].path, out, "DELETE")
    except UserError:
        if not LibraryFolder.exists(out):
            raise
    made = LibraryFolder.open(out)
    _refuse_other_models([made, *parts])
    return made


def empty_copy(source: Path, out: Path, journal: Literal["WAL", "DELETE"] = "WAL") -> LibraryFolder:
    """Creates a library with the model and the settings of the library `source`, without scenes. The index of
    `source` is not opened, so another process, also of another machine, may use it.

    Raises:
        UserError: `out` is a library already or holds other files, or a file of `source` is damaged.
    """
    known = read_description(source)
    if LibraryFolder.exists(out):
        raise UserError(f"{out}: holds a library already. Name another folder.")
    refuse_foreign(out)
    with writing_to(out):
        make_folder(out)
    refuse_links(out)
    with locked(out / "lock", True, f"{out}: another process is creating this library"):
        if LibraryFolder.exists(out):
            raise UserError(f"{out}: another process has just created this library. Run this again.")
        for leftover in (out / "shards", out / "model"):
            shutil.rmtree(leftover, ignore_errors=True)
            make_folder(leftover)
        for leftover in out.glob(f"{FILE}*"):
            leftover.unlink()
        for name in (SHARED, START):
            check_model_file(
                source / "model" / name, "new scenes need it", known.get("checksums", {}).get(name)
            )
            _copy(source / "model" / name, out / "model" / name)
        _copy(source / SETTINGS, out / SETTINGS)
        Index.create(out / FILE, journal).close()
        _copy(source / "library.json", out / "library.json")
    return LibraryFolder.open(out)


def _copy(source: Path, target: Path) -> None:
    with new_file(target) as partial:
        shutil.copyfile(source, partial)


def _refuse_other_models(libraries: Sequence[LibraryFolder]) -> None:
    first, model = libraries[0], _model(libraries[0])
    for other in libraries[1:]:
        if _model(other) != model or other.has_boxes != first.has_boxes:
            raise UserError(
                f"{other.path}: a library of another model than {first.path}, which cannot render its "
                "scenes. Join only libraries of one model."
            )


def _model(library: LibraryFolder) -> str:
    library.check_model()
    return library.checksums.get(SHARED) or file_checksum(library.shared_file)


def _chosen(
    target: LibraryFolder | None, parts: Sequence[LibraryFolder], only: Mapping[Path, Collection[str]]
) -> tuple[list[list[_SceneToCopy]], int]:
    """Returns the scenes to copy from each part, in the order of their shards, and how many need no copy.
    Raises a UserError if two different scenes have one name. `target` is None before it is made."""
    owners, sources = {}, set()
    if target is not None:
        owners = {name: (place.checksum, target.path) for name, place in target.index.places().items()}
        sources = {_origin(info, owners[info.name][0]) for info in target.index.infos()} - {()}
    chosen, known = [], 0
    for part in parts:
        names, taken = set(only[part.path]) if part.path in only else None, []
        if names is not None and (missing := names - part.index.known(list(names))):
            raise UserError(f"{part.path}: holds no scene {short(min(missing))}.")
        for info, place in itertools.chain.from_iterable(part.index.pages(PAGE)):
            if names is not None and info.name not in names:
                continue
            checksum, owner = owners.setdefault(check_name(info.name, part.path), (place.checksum, part.path))
            if checksum != place.checksum:
                raise UserError(
                    f"{part.path}: the scene {short(info.name)} is another one than that of {owner}. Rename "
                    "or remove one of the two (`latentscenes library rename`), then join again."
                )
            if owner != part.path or _origin(info, checksum) in sources:
                known += 1
                continue
            taken.append(_SceneToCopy(info, place))
        chosen.append(sorted(taken, key=lambda scene: (scene.place.shard, scene.place.row)))
    return chosen, known


def _origin(info: SceneInfo, checksum: str) -> tuple[str | None, ...]:
    """What a scene that was renamed in one of two libraries has in common; nothing without a dataset."""
    return (info.dataset, info.split, info.source, checksum) if info.dataset else ()


def _batches(part: LibraryFolder, taken: Sequence[_SceneToCopy]) -> Iterator[_Batch]:
    """Yields the scenes of each shard that is to be written, with their payloads, compared with their
    checksums."""
    batch: _Batch = []
    size, shard, kind, one = 0, None, (), ()
    rows: list[Payload] = []
    for scene in taken:
        if scene.place.shard != shard:
            shard, rows = scene.place.shard, _rows(part, scene.place.shard)
            one = payload_kind(rows[0]) if rows else ()  # that of all
        payload = rows[scene.place.row] if scene.place.row < len(rows) else {}
        if payload_checksum(payload) != scene.place.checksum:
            raise UserError(
                f"{part.path}: scene {short(scene.info.name)} is damaged. Remove it, or restore its shard "
                f"{part.shards.file(shard).name} from a copy, and join again."
            )
        full = size > SHARD_BYTES or len(batch) == MOST_SCENES
        if batch and (full or one != kind):
            yield batch
            batch, size = [], 0
        kind = one
        batch.append((scene, payload))
        size += scene.info.bytes
    if batch:
        yield batch


def _rows(part: LibraryFolder, shard: int) -> list[Payload]:
    try:
        return part.shards.read_all(shard)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(
            f"{part.path}: {reason(error)}. Restore the shard from a copy, or remove its scenes, and join "
            "again."
        ) from None


def _copied(target: LibraryFolder, chosen: Iterable[tuple[LibraryFolder, Sequence[_SceneToCopy]]]) -> None:
    """Copies scenes of each part. The caller holds the lock of the target."""
    batches = ((part, batch) for part, taken in chosen for batch in _batches(part, taken))
    shards = ((number, *one) for number, one in enumerate(batches, target.next_shard()))
    for number, part, batch in _written(target, shards):
        pictures = part.index.thumbnails([scene.info.name for scene, _ in batch])
        entries = [(scene.info, scene.place.checksum, pictures.get(scene.info.name)) for scene, _ in batch]
        with target.index.transaction():
            target.index.add(number, entries)


def _written(target: LibraryFolder, shards: Iterator[_Shard]) -> Iterator[_Shard]:
    """Yields shards that are on the disk. A thread writes a shard while the scenes of the next one are read.
    If there is an error instead of a next one, the shard before is yielded first."""

    def write(number: int, _: LibraryFolder, batch: _Batch) -> None:
        checksums = [scene.place.checksum for scene, _ in batch]
        target.shards.write(number, [(scene.info, payload) for scene, payload in batch], checksums)

    before: tuple[_Shard, Future[None]] | None = None
    problem = None
    with ThreadPoolExecutor(1) as disk:
        while problem is None:
            try:
                shard = next(shards)
            except Exception as error:
                problem = error
            if before:
                before[1].result()
                yield before[0]
            before = None if problem else (shard, disk.submit(write, *shard))
    if not isinstance(problem, StopIteration):
        raise problem
