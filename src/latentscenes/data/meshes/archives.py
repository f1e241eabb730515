"""Unpacks zip archives, also Sweet Home 3D's furniture libraries (.sh3f), into a folder.

Archives are not trusted. Entries that lead out of the folder, links and encrypted entries are refused, and so
are archives that unpack to more files or bytes than the limits below. Bytes are counted while they are read,
since the sizes that an archive states may be wrong.
"""

import io
import re
import shutil
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from latentscenes.core.console import bytes_text
from latentscenes.core.errors import UserError
from latentscenes.core.files import writing_to
from latentscenes.core.names import HIDDEN, short
from latentscenes.core.reading import reason, require_regular
from latentscenes.data.importing import is_leftover

ARCHIVES = {".zip", ".sh3f"}
"""Endings of archives."""
MOST_FILES = 100_000
"""Entries of an archive, with those of archives in it."""
MOST_BYTES = 64 << 30
"""Unpacked bytes of an archive."""
FREE_BYTES, RATIO = 1 << 30, 100
"""An archive may always unpack to FREE_BYTES, and beyond them to RATIO times its own size."""
DEEPEST = 2
"""Levels of archives inside archives that are unpacked."""
CHUNK = 1 << 20
BROKEN = (
    zipfile.BadZipFile, zlib.error, LZMAError, struct.error, EOFError, OSError, ValueError, OverflowError,
    NotImplementedError, RuntimeError,
)  # fmt: skip
"""Errors that reading a damaged archive may raise."""


@dataclass
class _UnpackLimit:
    """Bytes that an archive may still unpack to."""

    shown: str
    most: int
    """Bytes."""
    spent: int = 0
    files: int = 0

    def spend(self, count: int = 0, files: int = 0) -> None:
        self.spent, self.files = self.spent + count, self.files + files
        if self.spent > self.most or self.files > MOST_FILES:
            most = bytes_text(self.most) if self.spent > self.most else f"{MOST_FILES} files"
            raise UserError(
                f"{self.shown}: unpacks to more than {most}, as archives made to fill a disk do. If you "
                "trust it, unpack it yourself and import the folder."
            )


def unpack(archive: Path, folder: Path) -> list[str]:
    """Unpacks an archive, and archives inside it, into a new folder. An inner archive becomes a folder of its
    name. Leftovers of a Mac and hidden files are passed over.

    Returns:
        Why inner archives could not be unpacked; the rest is there.

    Raises:
        UserError: the archive is damaged, encrypted or too large, or holds a link or a path out of the
            folder.
    """
    try:
        require_regular(archive)
        size = archive.stat().st_size
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({reason(error)}).") from None
    allowance, problems = _UnpackLimit(str(archive), min(MOST_BYTES, FREE_BYTES + RATIO * size)), []
    _unpack(archive, str(archive), folder, allowance, problems)
    return problems


def _unpack(
    archive: Path, shown: str, folder: Path, allowance: _UnpackLimit, problems: list[str], level: int = 0
) -> None:
    inner = []
    try:
        with zipfile.ZipFile(archive) as opened:
            allowance.spend(files=len(opened.infolist()))
            for member in opened.infolist():
                if place := _place(member, shown):
                    _write(opened, member, folder / place, allowance, shown)
                    inner += [place] if place.suffix.lower() in ARCHIVES and level < DEEPEST else []
    except BROKEN as error:
        raise UserError(
            f"{shown}: is no zip archive that can be read ({reason(error)}). Copy or download it again, or "
            "unpack it yourself and import the folder."
        ) from None
    for place in inner:
        packed = (folder / place).rename(folder / place.parent / ".packed")
        try:
            _unpack(packed, f"{shown}/{place}", folder / place, allowance, problems, level + 1)
        except UserError as error:
            problems.append(str(error))
            shutil.rmtree(folder / place, ignore_errors=True)
        packed.unlink()


def _place(member: zipfile.ZipInfo, shown: str) -> PurePosixPath | None:
    """Where an entry belongs inside the folder; None if it is passed over."""
    name = member.filename.replace("\\", "/")
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", name) or HIDDEN.search(name):
        raise UserError(
            f"{shown}: holds an entry named {short(name)}, which would lead out of its folder or is no file "
            "name. It is not unpacked."
        )
    if member.is_dir() or name.endswith("/") or any(map(is_leftover, place.parts)):
        return None
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise UserError(f"{shown}: {name} is a link or a device, not a file. It is not unpacked.")
    if member.flag_bits & 1:
        raise UserError(f"{shown}: is encrypted. Unpack it yourself and import the folder.")
    return place


def _write(
    opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, allowance: _UnpackLimit, shown: str
) -> None:
    with opened.open(member) as source, writing_to(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = open(target, "xb")
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{shown}: holds {member.filename} twice. Pack it again.") from None
        with stream:
            while chunk := _read(source, shown):
                allowance.spend(len(chunk))
                stream.write(chunk)


def _read(source: io.BufferedIOBase, shown: str) -> bytes:
    try:
        return source.read(CHUNK)
    except OSError as error:  # not one of the disk that is written to
        raise UserError(f"{shown}: cannot be read ({reason(error)}). Copy or download it again.") from None
