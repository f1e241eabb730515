"""The user's cache folder, for what can be made or fetched again."""

import os
import stat
import tempfile
from pathlib import Path


def cache_folders() -> list[Path]:
    """Returns where the cache may lie: $XDG_CACHE_HOME (default ~/.cache) or, for those who cannot write
    there, a folder of the user in the temporary directory."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [Path(root) / "latentscenes", Path(tempfile.gettempdir()) / f"latentscenes-{user}"]


def is_trusted(path: Path) -> bool:
    """Returns whether only this user and root can have written a file or folder."""
    found = path.lstat()
    if not hasattr(os, "getuid"):
        return True
    return found.st_uid in (0, os.getuid()) and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o002


def cache_folder() -> Path | None:
    """Returns the first folder of `cache_folders` that can be written, made if needed; None if none can, or
    they belong to other users."""
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK) and is_trusted(folder):
            return folder
    return None
