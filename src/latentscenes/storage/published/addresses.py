"""Files at an address: of a web server, a bucket, or a folder. Only addresses that a user gave are asked for
files."""

import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.names import one_line
from latentscenes.core.reading import open_regular, read_bytes, reason
from latentscenes.core.version import __version__
from latentscenes.storage.published.format import DESCRIPTION
from latentscenes.storage.published.targets import object_store, store_reason

T = TypeVar("T")
Answer = http.client.HTTPResponse
TRIES, PAUSE = 3, 0.5
"""Attempts to fetch a file from a server that fails or breaks off, and seconds between them."""
SECONDS = 30
"""Longest wait for a server to say something."""
PIECE, SLOWEST = 1 << 18, 1000
"""Bytes read at a time; bytes a second below which a server is given up, after SECONDS."""
KEPT = 4
"""Packs kept in memory for servers that send whole files only."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers of a server after which another attempt may succeed."""


class Address(str):
    """An address of a published library, such as https://example.org/cars."""

    @property
    def name(self) -> str:
        """Its last part."""
        return self.rstrip("/").rpartition("/")[2]


def address_of(path: str | Path) -> Address | None:
    """Returns the address that a text stands for; None for a path of this machine. As a path, an address has
    lost one of two slashes."""
    found = re.fullmatch(r"(https?|s3|gs):/{1,2}([^/].*)", str(path), re.DOTALL)
    return found and Address(f"{found[1]}://{found[2].removesuffix(DESCRIPTION).rstrip('/')}")


class Files(ABC):
    """Files at an address. Threads may share it."""

    remote = True
    """Whether files should be kept in the user's cache."""

    def __init__(self, address: str | Path):
        self.address = address

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """Returns a file's content.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be reached or read, or has more than `most` bytes.
        """

    @abstractmethod
    def part(self, name: str, begin: int, size: int, whole: int) -> bytes:
        """Returns `size` bytes of a file that has `whole` bytes. Raises as `read`."""

    def too_long(self, name: str, most: int) -> UserError:
        return UserError(f"{self.address}/{name}: has more than {most} bytes, so it is damaged.")


class FolderFiles(Files):
    """Files of a folder."""

    remote = False

    def read(self, name: str, most: int) -> bytes:
        return self._tried(name, lambda path: read_bytes(path, most))

    def part(self, name: str, begin: int, size: int, whole: int) -> bytes:
        def read(path: Path) -> bytes:
            with open_regular(path) as stream:
                stream.seek(begin)
                return stream.read(size)

        return self._tried(name, read)

    def _tried(self, name: str, read: Callable[[Path], bytes]) -> bytes:
        try:
            return read(Path(self.address) / name)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self.address}/{name}: cannot be read ({reason(error)}).") from None


class WebFiles(Files):
    """Files of a web server (HTTP). If it sends whole files only, the last KEPT of them stay in memory."""

    def __init__(self, address: str):
        super().__init__(address)
        if "?" in address or "#" in address:
            raise UserError(f"{address}: an address of files cannot hold ? or #. Give the folder's address.")
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
            urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler,
            urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
        ):  # fmt: skip
            self._opener.add_handler(handler())
        self._opener.addheaders = [("User-Agent", f"latentscenes/{__version__}")]
        self._sends_parts = True
        self._whole: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, most: int) -> bytes:
        return self._fetched(name, {}, lambda answer: self._all(answer, name, most))

    def part(self, name: str, begin: int, size: int, whole: int) -> bytes:
        if self._sends_parts:
            wanted = f"bytes={begin}-{begin + size - 1}"
            content = self._fetched(
                name, {"Range": wanted}, lambda answer: self._part(answer, name, begin, size)
            )
            if content is not None:
                return content
        with self._lock:
            if name not in self._whole:
                self._whole[name] = self.read(name, whole)
                if len(self._whole) > KEPT:
                    self._whole.popitem(last=False)
            self._whole.move_to_end(name)
            return self._whole[name][begin : begin + size]

    def _part(self, answer: Answer, name: str, begin: int, size: int) -> bytes | None:
        """Reads a part; None from a server that would send the whole file."""
        if answer.status != 206:
            if self._sends_parts:
                say(f"Note: {self.address} sends whole files only, up to 8 MiB for a scene.")
            self._sends_parts = False
            return None
        if not (answer.headers["Content-Range"] or "").replace("=", " ").startswith(f"bytes {begin}-"):
            raise UserError(f"{self.address}/{name}: the server sends other bytes than those asked for.")
        return self._all(answer, name, size)

    def _all(self, answer: Answer, name: str, most: int) -> bytes:
        content, begun = bytearray(), time.monotonic()
        while len(content) <= most and (piece := answer.read1(min(most + 1 - len(content), PIECE))):
            content += piece
            if (waited := time.monotonic() - begun) > SECONDS and len(content) < SLOWEST * waited:
                raise TimeoutError(f"only {len(content)} bytes in {waited:.0f} s")
        if len(content) > most:
            raise self.too_long(name, most)
        if answer.length:  # what the server announced and did not send
            raise http.client.IncompleteRead(bytes(content), answer.length)
        return bytes(content)

    def _fetched(
        self, name: str, headers: dict[str, str], read: Callable[[http.client.HTTPResponse], T]
    ) -> T:
        problem: Exception
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * attempt)
            try:
                request = urllib.request.Request(f"{self.address}/{name}", headers=headers)
                with self._opener.open(request, timeout=SECONDS) as answer:
                    return read(answer)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise FileNotFoundError(f"{self.address}/{name}: HTTP {error.code}") from None
                problem = error
                if error.code not in PASSING:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = error
                cause = getattr(error, "reason", error)
                if isinstance(cause, socket.gaierror | ConnectionRefusedError | ValueError):
                    break
        cause = getattr(problem, "reason", problem)
        said = one_line(reason(cause if isinstance(cause, Exception) else OSError(str(cause))))
        code = f"HTTP {problem.code}: " if isinstance(problem, urllib.error.HTTPError) else ""
        raise UserError(
            f"{self.address}/{name}: cannot be fetched ({code}{said}). Check the address and the network."
        )


class BucketFiles(Files):
    """Files of a bucket of S3 or Google Cloud Storage, through `obstore`."""

    def __init__(self, address: str, store: object | None = None):
        super().__init__(address)
        self._store = store or object_store(address)

    def read(self, name: str, most: int) -> bytes:
        import obstore

        def read() -> bytes:
            found = obstore.get(self._store, name)
            if found.meta["size"] > most:
                raise self.too_long(name, most)
            return bytes(found.bytes())

        return self._tried(name, read)

    def part(self, name: str, begin: int, size: int, whole: int) -> bytes:
        import obstore

        return self._tried(
            name, lambda: bytes(obstore.get_range(self._store, name, start=begin, length=size))
        )

    def _tried(self, name: str, read: Callable[[], bytes]) -> bytes:
        from obstore.exceptions import BaseError

        try:
            return read()
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as error:
            raise UserError(f"{self.address}/{name}: {store_reason(error)}") from None


def open_files(path: str | Path) -> Files:
    """Returns the files at an address, or of a folder. Raises a UserError for a bucket if the package
    `obstore` is absent."""
    address = address_of(path)
    if address is None:
        return FolderFiles(Path(path))
    return WebFiles(address) if address.startswith("http") else BucketFiles(address)
