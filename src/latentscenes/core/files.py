"""Atomic file writes, write checks with clear errors, file locks and checksums."""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from latentscenes.core.console import say
from latentscenes.core.errors import UserError

FILE_ENDINGS = {".mp4", ".gif", ".png"}
"""Endings that a partial file keeps, since its format is told by them."""


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Turns an OSError into a UserError that says `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Free some disk space, fix the "
            "permissions, or choose another path."
        ) from None


def check_place(path: str | Path) -> None:
    """Checks, before any work is done, that a file or folder can be created at `path`. Creates nothing.

    Raises:
        UserError: the nearest existing parent is a file, or is not writable.
    """
    path = Path(path)
    with writing_to(path):
        home = next(folder for folder in path.absolute().parents if folder.exists())
    if not home.is_dir():
        raise UserError(f"{path}: cannot be created: {home} is a file, not a folder. Choose another path.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be created: {home} is not writable. Fix that, or choose another path."
        )


def partial_path(path: Path) -> Path:
    """Returns where to write `path` until it is complete: STEM.partial-HOST-PID with its ending, beside it.

    First removes what processes of this machine left there when they were killed. Other machines may share
    the folder, so what they write is left alone.
    """
    stem, ending = (path.stem, path.suffix) if path.suffix.lower() in FILE_ENDINGS else (path.name, "")
    begin = f"{stem}.partial-{re.sub('[^A-Za-z0-9]', '', socket.gethostname())}-"
    for entry in path.parent.glob(f"{glob.escape(begin)}*{ending}"):
        number = entry.name.removeprefix(begin).removesuffix(ending)
        if number.isdigit() and (int(number) == os.getpid() or not _runs(int(number))):
            said = f"{entry}: left by a process that was killed; removed."
            say(said)
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return path.with_name(f"{begin}{os.getpid()}{ending}")


def _runs(process: int) -> bool:
    if os.name == "nt":  # where a signal 0 is not a mere question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def locked(path: Path, wait: bool, holder: str) -> Iterator[None]:
    """Holds a lock file. If another process holds it, waits with a message, or refuses without `wait`.

    Raises:
        UserError: another process holds it, as `holder` says, or the file cannot be written.
    """
    lock = FileLock(path, thread_local=False)
    with writing_to(path.parent):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise UserError(f"{holder}. Wait for it and try again.") from None
            say(f"{holder}; waiting for it …")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file atomically."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file atomically."""
    write_bytes(path, json.dumps(content, indent=1, default=str).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: under its final name it is either complete on disk or absent."""
    partial = path.with_name(f"{path.name}.partial")
    with writing_to(path):
        try:
            with open(partial, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename durable
        finally:
            os.close(folder)


def payload_checksum(payload: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(payload):
        tensor = payload[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Returns the total size of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def now() -> str:
    """Returns the current time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
