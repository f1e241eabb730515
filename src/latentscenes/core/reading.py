"""Files read from outside: regular ones only, no larger than stated, JSON without surprises. Loads neither
torch nor numpy."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from latentscenes.core.errors import UserError
from latentscenes.core.names import short

MOST_TEXT = 64 << 20
"""Bytes of the largest description that is read: JSON, YAML, logs, cameras."""
MOST_LABELS = 512 << 20
"""Bytes of the largest file of labels (EG3D's dataset.json)."""
MOST_MODEL = 1 << 30
"""Bytes of the largest file of a COLMAP model."""
MOST_MESH = 2 << 30
"""Bytes of the largest mesh file."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a file of Git LFS that was not fetched."""


def open_regular(path: str | Path, most: int | None = None) -> BinaryIO:
    """Opens a file for reading. A FIFO, device or folder raises an OSError at once, instead of waiting for
    another process or reading without end; so does a file of more than `most` bytes, or one that stands for
    another in Git LFS."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    found = os.fstat(number)
    regular = stat.S_ISREG(found.st_mode)
    if not regular or most is not None and found.st_size > most:
        os.close(number)
        fault = f"has more than {(most or 0) >> 20} MiB" if regular else "is no regular file"
        raise OSError(None, fault, str(path))
    stream = os.fdopen(number, "rb")
    if stream.peek(len(POINTER)).startswith(POINTER):
        stream.close()
        raise OSError(None, "is a pointer of Git LFS; `git lfs pull` brings the file itself", str(path))
    return stream


def require_regular(path: str | Path, most: int | None = None) -> None:
    """Raises an OSError as `open_regular`: before a library that would wait, or read it all, opens a file."""
    open_regular(path, most).close()


def read_bytes(path: str | Path, most: int = MOST_TEXT) -> bytes:
    """Reads a file. Raises an OSError if it is none, or has more than `most` bytes."""
    with open_regular(path, most) as stream:
        return stream.read(most)


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """Reads UTF-8 text, with or without a byte order mark. Raises an OSError if it cannot be read."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(None, f"is no UTF-8 text (byte {error.start})", str(path)) from None


def read_any_json(path: Path) -> Any:
    """Reads a JSON file of any content. Raises a UserError that names the file if it cannot be read."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({reason(error)}).") from None


def read_json(path: str | Path, remedy: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """Reads a file that holds one JSON object. Raises a UserError, which ends with `remedy`, if it cannot."""
    try:
        content = parse_json(read_text(path, most))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}). {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not {short(content)}. {remedy}")
    return content


def parse_json(text: str) -> Any:
    """Parses JSON. Raises a ValueError also for a key that comes twice, and for nesting too deep."""
    try:
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} comes twice")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_once)


def reason(error: Exception) -> str:
    """Returns the error's text, on one line and without the file's name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]
