"""Files that are complete or absent, whatever happens; what cannot be written; locks; checksums."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from latentscenes.core.console import console
from latentscenes.core.errors import UserError


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Say in words that something could not be written there."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Make room, see to permissions, or name another place."
        ) from None


def check_place(path: str | Path) -> None:
    """Refuse, before any work is done, the name of a file or new folder that cannot be made.

    Raises:
        UserError: what is to hold it is no folder, or may not be written to.
    """
    path = Path(path)
    with writing_to(path):
        home = next(folder for folder in path.absolute().parents if folder.exists())
    if not home.is_dir():
        raise UserError(f"{path}: cannot be made, for {home} is a file, not a folder. Name another place.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be made, for {home} may not be written to. Name another place, or see to its permissions."
        )


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
            console.print(f"{holder}; waiting for it …", highlight=False, soft_wrap=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is complete on the disk before it bears its name."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def write_json(path: Path, content: object) -> None:
    """The same for JSON."""
    write_bytes(path, json.dumps(content, indent=1, default=str).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for any bytes."""
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
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)


def payload_checksum(payload: dict[str, Tensor]) -> str:
    """SHA-256 over names, kinds, shapes and bytes."""
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
    """Of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
