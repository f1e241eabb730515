"""The files of a published library: fetched, compared with their checksums, kept in the user's cache."""

import hashlib
import os
import tempfile
import threading
from pathlib import Path

from latentscenes.core.caches import cache_folder, cache_folders
from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, object_checksum, write_bytes
from latentscenes.core.reading import MOST_MODEL, MOST_TEXT, parse_json, read_bytes, reason
from latentscenes.storage.published.addresses import Files
from latentscenes.storage.published.format import DESCRIPTION, PublishedFile, check_description

MOST_PACK = 512 << 20
"""Bytes of the largest scene, and of the largest pack."""
LIMITS = {"model": MOST_MODEL, "packs": MOST_PACK}
"""Bytes of the largest files by folder; others: MOST_TEXT."""
CACHE_BYTES = 2 << 30
"""Size to which the cache is cut: files that were not used for the longest time are deleted."""
TRIM_BYTES = 256 << 20
"""Bytes that a process adds to the cache before it cuts it again."""
AGAIN = (
    "If the library was published again meanwhile, open it again; else it is incomplete: publish it again."
)


class PublishedFiles:
    """Files of a published library. Threads may share it."""

    def __init__(self, files: Files):
        self.files, self.address = files, files.address
        self._cache = _Cache() if files.remote else None

    def description(self) -> dict:
        """Returns the content of DESCRIPTION, checked. Raises a UserError if there is none."""
        where = f"{self.address}/{DESCRIPTION}"
        try:
            content = self.files.read(DESCRIPTION, MOST_TEXT)
        except FileNotFoundError:
            raise UserError(
                f"{self.address}: no published library here ({DESCRIPTION} is absent). Check the address; "
                "`latentscenes library publish` writes one."
            ) from None
        try:
            parsed = parse_json(content.decode())
            if isinstance(parsed, dict) and parsed.get(CHECKSUM) not in (None, object_checksum(parsed)):
                raise ValueError("its content has changed since it was written")
        except ValueError as error:
            raise UserError(f"{where}: cannot be read ({reason(error)}). Is it the right address?") from None
        return check_description(parsed, where)

    def content(self, file: PublishedFile) -> bytes:
        """Returns a file's content, from the cache if it is there. Raises a UserError if the file is absent
        or damaged, or larger than files of its kind are."""
        most = LIMITS.get(file.file.split("/")[0], MOST_TEXT)
        if file.bytes > most:
            raise UserError(f"{self.address}/{file.file}: has more than {most >> 20} MiB, the limit.")
        if self._cache and (kept := self._cache.read(file)) is not None:
            return kept
        try:
            content = self.files.read(file.file, file.bytes)
        except FileNotFoundError:
            raise UserError(f"{self.address}/{file.file}: absent. {AGAIN}") from None
        self._compare(file.file, content, file.sha256)
        if self._cache and not file.file.startswith("packs/"):
            self._cache.write(file, content)
        return content

    def local(self, file: PublishedFile) -> Path:
        """Returns a path of this machine with a file's content. Raises as `content`."""
        content = self.content(file)
        if not self._cache:
            return Path(self.address) / file.file
        path = self._cache.path(file)
        if not path.is_file():
            self._cache.write(file, content)
        return path

    def part(self, file: PublishedFile, begin: int, size: int, sha256: str) -> bytes:
        """Returns a part of a file. Raises a UserError if it is absent or damaged."""
        if file.bytes > MOST_PACK:
            raise UserError(f"{self.address}/{file.file}: has {file.bytes} bytes; the limit is {MOST_PACK}.")
        try:
            content = self.files.part(file.file, begin, size, file.bytes)
        except FileNotFoundError:
            raise UserError(f"{self.address}/{file.file}: absent. {AGAIN}") from None
        self._compare(f"{file.file}, bytes {begin} to {begin + size}", content, sha256)
        return content

    def _compare(self, what: str, content: bytes, sha256: str) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(
                f"{self.address}/{what}: damaged, its SHA-256 is not the one that was published. Try again; "
                "if it stays so, delete the file and publish the library again."
            )


class _Cache:
    """Files in the user's cache folder, named by their SHA-256."""

    def __init__(self):
        folder = cache_folder()
        if folder is None:  # nothing stays then
            self._temporary = tempfile.TemporaryDirectory(prefix="latentscenes-")
            folder = Path(self._temporary.name)
        self._folder, self._added = folder / "published", TRIM_BYTES
        self._lock = threading.Lock()

    def path(self, file: PublishedFile) -> Path:
        return self._folder / file.sha256

    def read(self, file: PublishedFile) -> bytes | None:
        """Returns a file's content; None if it is not there. One that was damaged is deleted."""
        path = self.path(file)
        try:
            content = read_bytes(path, file.bytes)
            if hashlib.sha256(content).hexdigest() == file.sha256:
                os.utime(path)  # used just now
                return content
            path.unlink(missing_ok=True)
        except OSError:
            pass
        return None

    def write(self, file: PublishedFile, content: bytes) -> None:
        """Keeps a file. Raises a UserError if it cannot be written."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            places = " and ".join(map(str, cache_folders()))
            raise UserError(
                f"{places}: no cache can be kept ({reason(error)}). Set XDG_CACHE_HOME."
            ) from None
        with self._lock:
            write_bytes(self.path(file), content)
            self._added += len(content)
            if self._added > TRIM_BYTES:
                self._trim()

    def _trim(self) -> None:
        """Deletes the files that were not used for the longest time until CACHE_BYTES are left."""
        self._added = 0
        found = [(entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self._folder.iterdir()]
        total = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda one: one[0]):
            if total <= CACHE_BYTES:
                break
            entry.unlink(missing_ok=True)
            total -= size
