"""Shards that the index does not list, and an index that is made again from the shards.

An index that was restored from an older copy, or copied without its journal (-wal), does not list the newest
shards. Each shard says which scenes it holds, so their entries can be made again. Names and tags are then
those of the time when the shard was written.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError

from latentscenes.core.errors import UserError
from latentscenes.core.files import locked, refuse_links
from latentscenes.storage.description import read_description
from latentscenes.storage.entries import scene_info
from latentscenes.storage.index import FILE, Index, Place, SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.shards import ShardScene, shard_scenes
from latentscenes.storage.sqlite import database_problem


@dataclass
class Rebuilt:
    """The results of `rebuild`."""

    scenes: list[str] = field(default_factory=list)
    """Names of the scenes that the index lists anew."""
    renamed: list[str] = field(default_factory=list)
    """Those among them whose own name was taken."""
    damaged: list[str] = field(default_factory=list)
    """Files that could not be read, for people."""
    mended: list[str] = field(default_factory=list)
    """Names of scenes whose entries are again what their shards state."""
    index_made: bool = False
    """Whether the index was absent or damaged, and made from nothing."""


def unlisted(library: LibraryFolder) -> dict[Path, list[ShardScene] | str]:
    """Returns the shards that the index does not list, each with the scenes that the index does not know, or
    with the reason why it cannot be read. Leaves out shards whose scenes are all known: these are left by
    kills."""
    known, checksums = _known(library.index)
    found: dict[Path, list[ShardScene] | str] = {}
    for file in _unlisted_files(library):
        try:
            scenes = [scene for scene in shard_scenes(file) if not _is_known(scene, known, checksums)]
        except UserError as error:
            found[file] = str(error)
            continue
        if scenes:
            found[file] = scenes
    return found


def abandoned_shards(library: LibraryFolder) -> dict[Path, list[ShardScene] | str]:
    """Returns `unlisted`, without the shards that another process is just about to list."""
    found = unlisted(library)
    if found and os.access(library.path, os.W_OK):
        with locked(library.path / "lock", True, f"{library.path}: another process is writing"):
            return unlisted(library)
    return found


def rebuild(path: Path) -> Rebuilt:
    """Lists the scenes of all shards in the index of a library, and puts entries that have changed since they
    were written back to what the shards state. Where the index is absent or damaged, puts it aside
    (index.sqlite.damaged) and makes a new one.

    A scene whose name is taken by another one gets a number: `NAME (2)`. Scenes that were removed since the
    last `compact` come back if the index is made from nothing.

    Raises:
        UserError: there is no library, or links lie in it.
    """
    read_description(path)
    refuse_links(path)
    result = Rebuilt()
    with locked(path / "lock", True, f"{path}: another process is writing to this library"):
        if database_problem(path / FILE) is not None:
            result.index_made = True
            for name in (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal"):
                if (path / name).exists():
                    (path / name).replace(path / f"{name}.damaged")
            Index.create(path / FILE).close()
    library = LibraryFolder.open(path)
    with library.writing(), library.index.any_text():
        _repair(library, result)
        _add_shard(library, result)
    library.close()
    return result


def _repair(library: LibraryFolder, result: Rebuilt) -> None:
    """Puts changed entries of the index back, and removes changed thumbnails, which are drawn again."""
    index, changed_values = library.index, defaultdict(set)
    for name, part in index.changed_values():
        changed_values[name].add(part)
    # Numbers of scenes that the shards hold
    counts, places = {}, index.places()
    for shard in index.shards().keys() | {place.shard for place in places.values()}:
        with suppress(FileNotFoundError, SafetensorError):
            counts[shard] = library.shards.rows(shard)
    with index.transaction():
        index.replace_shard_counts(counts)
        for name, place in sorted(places.items(), key=lambda item: (item[1].shard, item[1].row)):
            parts, right = changed_values[name], _stated(library, place)
            if "thumbnail" in parts:
                index.drop_thumbnail(name)
            try:
                info = index.info(name)
            except UserError:
                info = None
            # Without a statement of the shard, the entry can only be reported
            if right is None:
                if info is None or parts - {"thumbnail"}:
                    result.damaged.append(
                        f"{library.path}: the entry of {name!r} is damaged, and no shard states it"
                    )
                continue
            # Tags that changed on purpose stay
            tags = right.tags if info is None or "tags" in parts else info.tags
            wanted = replace(right, name=name, tags=tags)
            if info != wanted:
                index.correct(wanted)
            if "name" in parts and right.name not in places:
                index.rename(name, right.name)
                wanted = right
            if info != wanted or "thumbnail" in parts:
                result.mended.append(wanted.name)


def _stated(library: LibraryFolder, place: Place) -> SceneInfo | None:
    """Returns what a shard states of the scene at a place; None if it states none, or another one."""
    try:
        entry = library.shards.stated(place)
    except (FileNotFoundError, SafetensorError):
        return None
    if entry is None or entry["checksum"] != place.checksum:
        return None
    return scene_info([entry.get(name) for name in SceneInfo.__dataclass_fields__])


def _add_shard(library: LibraryFolder, result: Rebuilt) -> None:
    index, listed = library.index, {}
    places, (known, checksums) = index.places(), _known(index)
    lost = {name: place for name, place in places.items() if not library.shards.file(place.shard).exists()}
    for name, place in lost.items():
        known.discard((place.checksum, index.info(name).source))
        checksums.discard(place.checksum)
    taken, replaced = set(places) - set(lost), []
    for file in reversed(_unlisted_files(library)):  # the newest first: it keeps its name
        try:
            scenes = shard_scenes(file)
        except UserError as error:
            result.damaged.append(str(error))
            continue
        rows: list[tuple[SceneInfo, str, bytes | None] | None] = [None] * len(scenes)
        for scene in scenes:
            if not scene.intact:
                result.damaged.append(f"{file}: the bytes of {scene.info.name!r} have changed")
            if not scene.intact or _is_known(scene, known, checksums):
                continue
            info, picture = scene.info, None
            same = (name for name, place in lost.items() if place.checksum == scene.checksum)
            old = next(same, info.name if info.name in lost else None)
            if old is not None:
                del lost[old]
                replaced.append(old)
                info, picture = replace(info, name=old, tags=index.info(old).tags), index.thumbnail(old)
            elif info.name in taken:
                info = replace(info, name=next(name for name in _numbered(info.name) if name not in taken))
                result.renamed.append(info.name)
            rows[scene.row] = info, scene.checksum, picture
            taken.add(info.name)
            known.add((scene.checksum, info.source))
            result.scenes.append(info.name)
        listed[int(file.stem)] = rows
    with index.transaction():
        index.remove(replaced)
        for shard in sorted(listed):
            index.add(shard, listed[shard])


def _unlisted_files(library: LibraryFolder) -> list[Path]:
    listed = library.index.shards()
    return [library.shards.file(number) for number in library.shards.numbers() if number not in listed]


def _known(index: Index) -> tuple[set[tuple[str, str]], set[str]]:
    """Returns checksum and source of all scenes of an index, and their checksums alone."""
    pairs = index.origins()
    return pairs, {checksum for checksum, _ in pairs}


def _is_known(scene: ShardScene, known: set[tuple[str, str]], checksums: set[str]) -> bool:
    """The source tells scenes of equal bytes apart, and stays when a scene is renamed."""
    return (scene.checksum, scene.info.source) in known if scene.stated else scene.checksum in checksums


def _numbered(name: str) -> Iterator[str]:
    number = 2
    while True:
        yield f"{name} ({number})"
        number += 1
