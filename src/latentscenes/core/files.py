"""Files that are complete or absent, also after a kill or a power cut; write checks, locks, checksums.

A file or folder is written under another name, brought to the disk (fsync), renamed, and the folder that
holds the name is brought to the disk, too. Only then may the caller remove what it replaces.
"""

import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from latentscenes.core.console import say
from latentscenes.core.errors import Damaged, UserError
from latentscenes.core.reading import MOST_TEXT, open_regular, parse_json, read_text, reason, require_regular

FILE_ENDINGS = {".mp4", ".gif", ".png"}
"""Endings that a partial file keeps, since they tell its format."""
PARTIAL = ".partial"
"""Part of the name of a file or folder that is not complete."""
HOST_LETTERS = 24
"""Letters of the machine's name in the name of a partial file, which must not exceed 255 bytes."""
CHECKSUM = "checksum"
"""Entry of a sealed JSON file: the SHA-256 of its other entries."""


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
        UserError: the nearest existing parent is a file, or is not writable; or a device lies there.
    """
    path = Path(path)
    with writing_to(path):
        refuse_special(path)
        home = next(folder for folder in path.absolute().parents if folder.exists())
    if not home.is_dir():
        raise UserError(f"{path}: cannot be created: {home} is a file, not a folder. Choose another path.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be created: {home} is not writable. Fix that, or choose another path."
        )


def refuse_special(path: Path) -> None:
    """Raises a UserError if something other than a file or a folder lies at `path`, such as a FIFO or
    /dev/null: a new file there would replace it for all programs."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no regular file (a FIFO, a device or a socket). Name a file or a folder.")


def partial_path(path: Path) -> Path:
    """Returns where to write `path` until it is complete: STEM.partial-HOST-PID with its ending, beside it.

    First removes files that killed processes of this machine left there. Other machines may share
    the folder, so their files are left alone.
    """
    stem, ending = (path.stem, path.suffix) if path.suffix.lower() in FILE_ENDINGS else (path.name, "")
    host = re.sub("[^A-Za-z0-9]", "", socket.gethostname())[-HOST_LETTERS:]
    begin = f"{stem}{PARTIAL}-{host}-"
    for entry in path.parent.glob(f"{glob.escape(begin)}*{ending}"):
        number = entry.name.removeprefix(begin).removesuffix(ending)
        if number.isdigit() and (int(number) == os.getpid() or not _runs(int(number))):
            said = f"{entry}: left by a process that was killed; removed."
            say(said)
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
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


def refuse_links(folder: Path) -> None:
    """Raises a UserError if a symbolic link lies anywhere in a folder that is about to be changed: what is
    written or removed through it could be another file."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(place, name)):
                raise UserError(
                    f"{os.path.join(place, name)}: a symbolic link. What it points to would be changed, so "
                    f"nothing in {folder} is changed. Put the file itself in its place, or remove it."
                )


# Writing


def sync(path: Path) -> None:
    """Brings the bytes of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do this for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it lies in, if they are absent. Their names are then on the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def publish(partial: Path, path: Path) -> None:
    """Gives a complete file or folder its final name, once everything in it is on the disk. `path` may be a
    file, or an empty folder, which is replaced."""
    for entry in (*partial.rglob("*"), partial):
        sync(entry)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields where to write a file. After the block it is on the disk under its final name `path`, where it
    replaces an older one; if the block fails, nothing has changed. Raises a UserError if it cannot write.
    """
    with writing_to(path):
        refuse_special(path)
        partial = partial_path(path)
        try:
            with open(partial, "xb"):  # a new file with the permissions of the umask
                pass
            yield partial
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file: see `new_file`."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_files(contents: Mapping[Path, bytes]) -> int:
    """Writes files that belong together, and the folders that they lie in: all, or none if one cannot be
    written. All are on the disk before the first gets its name. Returns their size in bytes."""
    with ExitStack() as stack:
        stack.push(functools.partial(_remove, [path for path in contents if not path.exists()]))
        for path, content in reversed(contents.items()):
            with writing_to(path):
                make_folder(path.parent)
            written = stack.enter_context(new_file(path))
            written.write_bytes(content)
            sync(written)
    return sum(map(len, contents.values()))


def _remove(new: list[Path], error: type[BaseException] | None, *_: object) -> None:
    for path in new if error else ():
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file: see `new_file`."""
    write_bytes(path, json.dumps(content, indent=1, default=str).encode())


# Sealed files


def write_with_checksum(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that holds its own checksum, which `read_object` compares: see `new_file`."""
    plain = json.loads(json.dumps(content, default=str))
    write_json(path, plain | {CHECKSUM: object_checksum(plain)})


def object_checksum(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object without its entry CHECKSUM."""
    plain = {name: value for name, value in content.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_object(path: Path, remedy: str, seal: bool = True, sealed_with: str = "") -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        remedy: what to do if the file is damaged.
        seal: whether the object must agree with its checksum, if it has one.
        sealed_with: a file; if the object holds its checksum, it was written with one of its own.

    Raises:
        UserError: the file is empty, no JSON, or damaged.
    """
    with reading_from(path, remedy):
        text = read_text(path)
        if not text.strip("\0 \n"):
            raise ValueError("it is empty")
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        listed = content.get("checksums")
        if seal and isinstance(listed, dict) and sealed_with in listed and CHECKSUM not in content:
            raise ValueError("its checksum is absent")
        if seal and content.get(CHECKSUM, object_checksum(content)) != object_checksum(content):
            raise ValueError("its content has changed since it was written")
    return content


@contextmanager
def reading_from(path: Path, remedy: str) -> Iterator[None]:
    """Turns errors in reading a file into Damaged, which names it, the error and `remedy`. A user who may not
    read the file gets a UserError that says so."""
    try:
        yield
    except PermissionError:
        raise UserError(f"{path}: no permission to read it. Ask its owner for that.") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(f"{path}: cannot be read ({reason(error)}). {remedy}") from None


def check_file(path: Path, checksum: str | None, remedy: str) -> None:
    """Raises a UserError that names a file and `remedy` if the file is absent, cannot be read, or has another
    SHA-256. Files of earlier versions have none (None)."""
    with reading_from(path, remedy):
        if path.suffix == ".safetensors":
            with open_tensors(path, "np"):  # a file of another size than its header says is not read whole
                pass
        if checksum is not None and file_checksum(path) != checksum:
            raise ValueError("its bytes have changed since it was written")


def open_tensors(path: str | Path, framework: str = "pt") -> safe_open:
    """Opens a file of tensors; its header is compared with its size. The tensors are torch's ("pt") or
    numpy's ("np").

    Raises:
        OSError: it is absent, or no regular file, such as a FIFO, which would make the program wait.
        SafetensorError: it is damaged.
    """
    require_regular(path)
    try:
        return safe_open(path, framework)
    except RuntimeError as error:  # torch maps the file once more, by its name
        raise SafetensorError(f"cannot be mapped ({reason(error)})") from None


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Reads all tensors of a file, by name, as torch's. Raises as `open_tensors`."""
    with open_tensors(path) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def note_if_edited(path: Path, checksum: str | None) -> None:
    """Prints a note if settings that people may edit have another SHA-256 than when they were written. Raises
    Damaged if the file is empty."""
    if not path.stat().st_size:
        raise Damaged(f"{path}: is empty. Restore it from a copy.")
    if checksum is not None and file_checksum(path, MOST_TEXT) != checksum:
        say(f"Note: {path} was edited, or damaged, after it was written.")


def file_checksum(path: Path, most: int | None = None) -> str:
    """Returns the SHA-256 of a regular file. Raises an OSError if it is none, or too large."""
    with open_regular(path, most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_bytes(path: Path) -> int:
    """Returns the total size of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def now() -> str:
    """Returns the current time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
