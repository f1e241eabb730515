"""Boards: small files by which several processes agree, in a folder that all see or in a bucket.

A board needs little: a file is created by one process only, and readers can tell whether its writer has
renewed it since they last looked. Claims (claims.py) need no more.
"""

import os
import uuid
from collections.abc import Hashable
from pathlib import Path
from typing import Protocol, runtime_checkable

from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, sync, writing_to
from latentscenes.storage.published.targets import asking


@runtime_checkable
class Board(Protocol):
    """A place of small files. Methods raise a UserError or an OSError if it cannot be reached."""

    address: str
    """Where it is, for people."""
    pause: float
    """Seconds between two looks for news."""

    def names(self) -> list[str]:
        """Returns the names of all files."""
        ...

    def create(self, name: str, content: str, keep: bool = False) -> bool:
        """Creates a file, unless there is one. Returns whether it did. Of several processes, one succeeds.
        With `keep`, the file outlives a power cut."""
        ...

    def read(self, name: str) -> tuple[str, Hashable] | None:
        """Returns a file's content and its version, which renewing changes; None if it is absent."""
        ...

    def renew(self, name: str) -> None:
        """Gives a file that this process has created another version. Does nothing if it is gone."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        ...


class FolderBoard:
    """A folder that all processes see. The version of a file is its time."""

    pause = 1.0

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder)
        with writing_to(folder):
            make_folder(folder)

    def names(self) -> list[str]:
        return os.listdir(self.folder)

    def create(self, name: str, content: str, keep: bool = False) -> bool:
        file = self.folder / name
        if not created(file, content):
            return False
        if keep:
            with writing_to(file):
                sync(file)
                sync(self.folder)
        return True

    def read(self, name: str) -> tuple[str, Hashable] | None:
        try:
            with open(self.folder / name) as stream:  # opening asks a file server for the newest time
                return stream.read(), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def renew(self, name: str) -> None:
        try:
            os.utime(self.folder / name)
        except FileNotFoundError:
            pass

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class BucketBoard:
    """A folder of a bucket, in an object store of the package `obstore`. The version of a file is its ETag.
    Files are written on condition: that there is none yet, or that it is still the one that was written last.

    A file's second line is random. It makes every version another one, and tells a process whether a file
    that "was there already" is its own: the store may repeat a write whose answer was lost.
    """

    pause = 10.0

    def __init__(self, address: str, store: object, folder: str):
        self.address, self._store, self._folder = f"{address}/{folder}", store, folder
        self._written: dict[str, tuple[str, str]] = {}
        """Content and ETag of the files of this process."""

    def names(self) -> list[str]:
        import obstore

        with asking(self.address):
            found = [entry["path"] for batch in obstore.list(self._store, self._folder) for entry in batch]
        return [path.rpartition("/")[2] for path in found if path.rpartition("/")[0] == self._folder]

    def create(self, name: str, content: str, keep: bool = False) -> bool:
        return self._put(name, content, "create")

    def read(self, name: str) -> tuple[str, Hashable] | None:
        import obstore

        with asking(f"{self.address}/{name}"):
            try:
                found = obstore.get(self._store, f"{self._folder}/{name}")
                text = bytes(found.bytes()).decode(errors="replace")
            except FileNotFoundError:
                return None
        return text.partition("\n")[0], found.meta["e_tag"]

    def renew(self, name: str) -> None:
        content, tag = self._written[name]
        self._put(name, content, {"e_tag": tag})

    def _put(self, name: str, content: str, condition: object) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        text, path = f"{content}\n{uuid.uuid4().hex}", f"{self._folder}/{name}"
        with asking(f"{self.address}/{name}"):
            try:
                tag = obstore.put(self._store, path, text.encode(), mode=condition)["e_tag"]
            except (AlreadyExistsError, PreconditionError):
                try:
                    found = obstore.get(self._store, path)
                    ours = bytes(found.bytes()) == text.encode()
                except FileNotFoundError:
                    ours = False
                if not ours:
                    return False
                tag = found.meta["e_tag"]
            except (NotSupportedError, NotImplementedError):
                raise UserError(
                    f"{self.address}: this store knows no conditional writes, by which processes share work. "
                    "Use a shared folder, or a store that does (S3, Google Cloud Storage, MinIO)."
                ) from None
        self._written[name] = content, tag
        return True

    def remove(self, name: str) -> None:
        import obstore

        with asking(f"{self.address}/{name}"):
            try:
                obstore.delete(self._store, f"{self._folder}/{name}")
            except FileNotFoundError:
                pass


def created(file: Path, content: str) -> bool:
    """Creates a file, unless there is one. Returns whether it did. Of several processes, one succeeds."""
    with writing_to(file):
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as stream:
            stream.write(content)
    return True
