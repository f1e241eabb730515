"""Finds meshes in folders and archives, names them as scenes, and gives them the tags of catalogs."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from latentscenes.core.console import bytes_text, say
from latentscenes.core.errors import UserError
from latentscenes.core.names import no_folder
from latentscenes.data.catalog import OWN, Row, assign, read_catalog, unmatched
from latentscenes.data.importing import is_leftover
from latentscenes.data.meshes.archives import ARCHIVES, unpack

FORMATS = {".glb": "y", ".gltf": "y", ".obj": "y", ".ply": "z"}
"""Readable formats, and the axis that points up if `up` is "auto"."""
TEXTS = {".csv", ".json", ".properties", ".txt", ".md", ".html"}
"""Endings of files that do not change how a mesh looks."""
Stamp = tuple[Any, ...]


@dataclass
class FoundMeshes:
    """Meshes by the names of their scenes."""

    files: dict[str, Path] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    """Stamps of the content of a mesh and of the files beside it: paths, sizes, times."""
    rows: dict[str, Row] = field(default_factory=dict)
    """Rows of catalogs."""
    archives: dict[Path, Path] = field(default_factory=dict)
    """Archives by the folders that they are unpacked in."""
    failed: list[str] = field(default_factory=list)
    """Archives that cannot be read, with the reasons."""
    remarks: list[str] = field(default_factory=list)
    """On catalogs."""

    def shown(self, path: Path) -> Path:
        """The path of a file as a user knows it: inside its archive."""
        for place, archive in self.archives.items():
            if path.is_relative_to(place):
                return archive / path.relative_to(place)
        return path

    def plain(self, text: str) -> str:
        """A message with paths as a user knows them."""
        for place, archive in self.archives.items():
            text = text.replace(f"{place}{os.sep}", f"{archive}{os.sep}")
        return text


def find_sources(folder: Path, catalog: Path | None, work: Path) -> FoundMeshes:
    """Finds all meshes of a folder with its subfolders and archives, of an archive, or one mesh.

    Args:
        catalog: a table of the objects; None: only those that furniture libraries hold.
        work: archives are unpacked in its subfolder `unpacked`; it is not searched.

    Raises:
        UserError: there is no mesh, the archive or the catalog cannot be read, or two meshes of the folder
            have one name.
    """
    rows = None if catalog is None else read_catalog(catalog)  # refused before archives are unpacked
    alone = folder.is_file() and folder.suffix.lower() in ARCHIVES
    if not folder.exists():
        raise no_folder(folder)
    paths = [folder] if folder.is_file() else sorted(walk(folder, work))
    found = FoundMeshes(find_meshes(folder, paths) if not alone else {})
    beside = [path for path in paths if path.suffix.lower() not in {*FORMATS, *ARCHIVES, *TEXTS}]
    company = hashlib.sha256(repr([_stamp(path, folder) for path in beside]).encode()).hexdigest()
    found.stamps = {name: (*_stamp(path, folder), company) for name, path in found.files.items()}
    packed = [path for path in paths if path.suffix.lower() in ARCHIVES and path.is_file()]
    unpacked = [path for archive in packed for path in _unpacked(archive, folder, found, work)]
    names = short_names({path: found.shown(path) for path in unpacked if _is_mesh(path)}, found.files)
    found.files |= names
    for name, path in names.items():
        archive = next(found.archives[place] for place in found.archives if path.is_relative_to(place))
        found.stamps[name] = (*_stamp(archive, folder), str(found.shown(path)))
    if not found.files:
        reasons = "".join(f"\n{reason}" for reason in found.failed)
        inside = "in it" if alone else "even in subfolders and archives (.zip, .sh3f)"
        raise UserError(f"{folder}: holds no mesh ({', '.join(FORMATS)}), {inside}.{reasons}")
    if catalog is not None:
        _assign(found, rows, catalog, (folder if folder.is_dir() else folder.parent).absolute())
    for path in [*paths, *unpacked]:
        if path.name == OWN:
            _assign(found, read_catalog(path), path, found.shown(path.parent).absolute())
    return found


def _unpacked(archive: Path, folder: Path, found: FoundMeshes, work: Path) -> list[Path]:
    """Unpacks an archive and returns the files in it. An unreadable one among others is only noted."""
    place = work / "unpacked" / str(len(found.archives))
    size = bytes_text(archive.stat().st_size)
    say(f"{archive}: unpacking {size} …")
    found.archives[place] = archive
    try:
        found.failed += map(found.plain, unpack(archive, place))
    except UserError as error:
        if archive == folder:
            raise
        found.failed.append(found.plain(str(error)))
        return []
    return sorted(walk(place))


def _stamp(path: Path, folder: Path) -> Stamp:
    status = path.stat()
    return os.path.relpath(path, folder), status.st_size, status.st_mtime_ns


def _is_mesh(path: Path) -> bool:
    return path.suffix.lower() in FORMATS and path.is_file()


def find_meshes(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, Path]:
    """Returns mesh files by name, sorted. A name is the path inside the folder, `/` as `__`, without the
    ending unless two files differ only in that: then `_glb` or `_obj` follows."""
    if folder.is_file():
        if folder.suffix.lower() not in FORMATS:
            known = ", ".join([*FORMATS, *sorted(ARCHIVES)])
            raise UserError(f"{folder}: not a readable mesh format; give {known}.")
        return {folder.stem: folder}
    if not folder.is_dir():
        raise no_folder(folder)
    files: dict[str, Path] = {}
    meshes = [path for path in (sorted(walk(folder)) if paths is None else paths) if _is_mesh(path)]
    alike = Counter(path.with_suffix("") for path in meshes)
    for path in meshes:
        ending = f"_{path.suffix[1:].lower()}" if alike[path.with_suffix("")] > 1 else ""
        name = "__".join(path.relative_to(folder).with_suffix("").parts) + ending
        if name in files:
            raise UserError(f"{path} and {files[name]} are both named {name!r}; rename or remove one.")
        files[name] = path
    return files


def walk(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Yields the files below a folder, without leftovers and the folder `without`; linked folders are
    followed, each once."""
    seen = {os.path.realpath(without)} if without else set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_leftover(name)]
        if (real := os.path.realpath(place)) in seen:
            folders[:] = []
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names if not is_leftover(name))


def short_names(paths: Mapping[Path, PurePath], taken: Iterable[str]) -> dict[str, Path]:
    """Names for files of archives: as much of the end of the path as only one of them has, `/` as `__`,
    without the ending unless two files differ only in that.

    Args:
        paths: each file's path as a user knows it.
        taken: names that are not given again.
    """
    taken = set(taken)
    named: dict[str, Path] = {}
    left = {path: shown.with_suffix("").parts for path, shown in paths.items()}
    for length in range(1, max(map(len, left.values()), default=0) + 1):
        ends = {path: "__".join(parts[-length:]) for path, parts in left.items()}
        count = Counter(ends.values())
        alone = {end: path for path, end in ends.items() if count[end] == 1 and end not in taken}
        named |= alone
        taken |= set(count)
        for path in alone.values():
            del left[path]
    for path in left:
        named["__".join(paths[path].parts[-2:]).replace(".", "_")] = path
    return dict(sorted(named.items()))


def _assign(found: FoundMeshes, rows: list[Row], catalog: Path, root: Path) -> None:
    """Gives scenes that have no row yet the rows of a catalog, and remarks on rows that do not fit."""
    meshes = {name: found.shown(path).absolute() for name, path in found.files.items()}
    own = catalog.name == OWN  # stands for its own folder or archive only
    meshes = {name: path for name, path in meshes.items() if not own or path.is_relative_to(root)}
    taken, lost, late = assign(rows, meshes, root)
    found.rows = taken | found.rows
    found.remarks += unmatched(found.shown(catalog), "mesh", meshes, taken, lost, late)
