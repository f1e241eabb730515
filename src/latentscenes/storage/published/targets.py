"""Where libraries are published to: folders, and buckets of S3 and Google Cloud Storage."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.core.files import PARTIAL, locked, make_folder, refuse_links, write_bytes, writing_to
from latentscenes.core.reading import MOST_TEXT, read_bytes, reason
from latentscenes.storage.published.format import DESCRIPTION, NAME

LOCK = ".publish.lock"
"""File held by the process that publishes into a folder."""
FOREVER = "public, max-age=31536000, immutable"
"""How long servers and browsers may keep files that never change."""
TYPES = {
    ".json": "application/json", ".gz": "application/gzip", ".webp": "image/webp",
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}  # fmt: skip
"""Media types of files by ending; of others, bytes."""


class Target(ABC):
    """A place for the files of a published library."""

    address: str
    folder: Path | None = None
    """The folder, if it is one of this machine."""

    @abstractmethod
    @contextmanager
    def writing(self) -> Iterator[None]:
        """Prepares the place. Raises a UserError if something else lies there, or it cannot be written."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Returns sizes in bytes of the files of the format that lie there, by path below the place."""

    @abstractmethod
    def read(self, name: str, most: int = MOST_TEXT) -> bytes | None:
        """Returns a file's content; None if it is absent. Raises a UserError if it cannot be read or has more
        than `most` bytes."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file, complete or not at all. Raises a UserError if it cannot."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file."""


class FolderTarget(Target):
    """A folder. One process at a time publishes into it."""

    def __init__(self, path: Path):
        self.path = self.folder = path
        self.address = str(path)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._refuse_foreign()
        refuse_links(self.path)
        with writing_to(self.path):
            make_folder(self.path)
        with locked(self.path / LOCK, True, f"{self.path}: another process is publishing into this folder"):
            for name in self._files():
                if PARTIAL in name.rsplit("/", 1)[-1]:  # of a process that was killed
                    self.remove(name)
            yield

    def _refuse_foreign(self) -> None:
        """Refuses a folder that holds other files, unless a library was published there before; then they are
        left alone."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is no folder. Name another one.")
        if (self.path / DESCRIPTION).is_file():
            return
        for name in self._files():
            whole = name.partition(PARTIAL)[0]
            if not (NAME.fullmatch(whole) or whole in (DESCRIPTION, LOCK)):
                raise UserError(
                    f"{self.path}: exists and holds no published library, but {name!r}. Name another folder."
                )

    def _files(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            found += [(inside / file).as_posix() for file in files]
        return sorted(found)

    def sizes(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in self._files() if NAME.fullmatch(name)}

    def read(self, name: str, most: int = MOST_TEXT) -> bytes | None:
        try:
            return read_bytes(self.path / name, most)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be read ({reason(error)}).") from None

    def write(self, name: str, content: bytes) -> None:
        with writing_to(self.path / name):
            make_folder((self.path / name).parent)
        write_bytes(self.path / name, content)

    def remove(self, name: str) -> None:
        with writing_to(self.path / name):
            (self.path / name).unlink(missing_ok=True)


class BucketTarget(Target):
    """A bucket, or a folder of one, in an object store of the package `obstore`. Nothing keeps two processes
    from publishing there at a time; then the later description counts."""

    def __init__(self, address: str, store: object):
        self.address, self.store = address, store

    @contextmanager
    def writing(self) -> Iterator[None]:
        with asking(self.address):
            if not self._exists(DESCRIPTION):
                for batch in self._listing():
                    for entry in batch:
                        if not NAME.fullmatch(entry["path"]):
                            raise UserError(
                                f"{self.address}: holds no published library, but {entry['path']!r}. "
                                "Name another place."
                            )
        yield

    def _listing(self) -> Iterator[list[dict]]:
        import obstore

        return obstore.list(self.store, chunk_size=1000)

    def _exists(self, name: str) -> bool:
        import obstore

        try:
            obstore.head(self.store, name)
        except FileNotFoundError:
            return False
        return True

    def sizes(self) -> dict[str, int]:
        with asking(self.address):
            return {
                entry["path"]: entry["size"]
                for batch in self._listing()
                for entry in batch
                if NAME.fullmatch(entry["path"])
            }

    def read(self, name: str, most: int = MOST_TEXT) -> bytes | None:
        import obstore

        with asking(f"{self.address}/{name}"):
            try:
                found = obstore.get(self.store, name)
                if found.meta["size"] > most:
                    raise UserError(f"{self.address}/{name}: has more than {most >> 20} MiB.")
                return bytes(found.bytes())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        import obstore

        kind = TYPES.get(Path(name).suffix, "application/octet-stream")
        keep = FOREVER if NAME.fullmatch(name) else "no-cache"
        with asking(f"{self.address}/{name}"):
            attributes = {"Content-Type": kind, "Cache-Control": keep}
            try:
                obstore.put(self.store, name, content, attributes=attributes)
            except NotImplementedError:  # local stores keep no attributes
                obstore.put(self.store, name, content)

    def remove(self, name: str) -> None:
        import obstore

        with asking(f"{self.address}/{name}"):
            obstore.delete(self.store, name)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turns errors of an object store into a UserError that names the request."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        raise UserError(f"{what}: {store_reason(error)}") from None


def store_reason(error: Exception) -> str:
    """Returns the message of an object store, on one line."""
    text = " ".join(str(error).split("\n\nDebug source")[0].split())
    return f"cannot be reached or read ({text[:300]}). Check the address, the credentials and the network."


def open_target(address: str) -> Target:
    """Returns the target at an address: a folder, s3://BUCKET/PATH or gs://BUCKET/PATH. Raises a UserError if
    the package for buckets is absent, or it cannot use the address."""
    if "://" not in address:
        return FolderTarget(Path(address))
    kind = address.partition("://")[0]
    if kind not in ("s3", "gs"):
        raise UserError(f"{address}: cannot be written to. Give a folder, s3://… or gs://….")
    return BucketTarget(address.rstrip("/"), object_store(address))


def object_store(address: str) -> object:
    """Opens a bucket, or a folder of one. Credentials are those of the environment, as obstore finds them.
    Raises as `open_target`."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise UserError(f"{address}: needs obstore. Run: pip install latentscenes[cloud]") from None
    try:
        return from_url(address)
    except (BaseError, ValueError) as error:
        raise UserError(f"{address}: {store_reason(error)}") from None
