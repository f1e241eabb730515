"""Compiles the native kernel at first use with the machine's C++ compiler.

The library is cached under $XDG_CACHE_HOME (default ~/.cache), or in a folder of the user in the temporary
directory if nothing can be written there. Its name contains a hash of sources, flags,
compiler and CPU, so a change of any of them builds a new one. It is compiled under a temporary name and then
renamed, so other processes never see a partial file.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from latentscenes.core.files import publish

SOURCE = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wno-psabi",
)  # fmt: skip
"""Not -ffast-math: it reorders arithmetic, and flushes subnormals in the whole process."""
OPTIONAL_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    ("-march=native",),
    (),
)
"""Tried in this order; the first that compiles is used. Without OpenMP the kernel runs on one thread."""


class BuildError(Exception):
    """The native kernel could not be built. The message is one line."""


def compiler() -> list[str]:
    """Returns $CXX if set, else the first of c++, g++ and clang++ on the path."""
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
        if not shutil.which(command[0]):
            raise BuildError(f"CXX={asked} is not an executable")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (c++, g++, clang++)")


def cpu_model() -> str:
    """Describes the CPU, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            sorted(
                {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
            )
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def cache_folders() -> list[Path]:
    """Returns where the library may lie: the user's cache or, for those who cannot write there, a folder of
    the user in the temporary directory."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [Path(root) / "latentscenes", Path(tempfile.gettempdir()) / f"latentscenes-{user}"]


def is_trusted(path: Path) -> bool:
    """Returns whether only this user and root can have written a file or folder: code is loaded from it."""
    found = path.lstat()
    if not hasattr(os, "getuid"):
        return True
    return found.st_uid in (0, os.getuid()) and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o002


def cache_folder() -> Path:
    """Returns the first folder of `cache_folders` that can be written, made if needed. Raises BuildError."""
    for folder in cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK) and is_trusted(folder):
            return folder
    tried = " and ".join(map(str, cache_folders()))
    raise BuildError(f"{tried} cannot be written, or belong to other users. Set XDG_CACHE_HOME to a folder")


def build() -> Path:
    """Returns the path of the compiled library; compiles it if it is not in the cache. Raises BuildError."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if version.returncode:
        raise BuildError(f"{shlex.join(command)} --version failed: {version.stderr.strip()[:200]}")
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [path.name.encode() + path.read_bytes() for path in sources]
    parts += [repr((command, version.stdout, FLAGS, OPTIONAL_FLAGS, cpu_model())).encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    name = f"native-{digest}.so"
    for folder in cache_folders():
        if (folder / name).exists() and is_trusted(folder) and is_trusted(folder / name):
            return folder / name

    folder = cache_folder()
    library = folder / name
    handle, partial = tempfile.mkstemp(dir=folder, suffix=".so.partial")
    os.close(handle)
    try:
        units = [str(path) for path in sources if path.suffix == ".cpp"]
        for optional in OPTIONAL_FLAGS:
            line = [*command, *FLAGS, *optional, *units, "-o", partial]
            compiled = subprocess.run(line, capture_output=True, text=True, check=False)
            if compiled.returncode == 0:
                publish(Path(partial), library)
                return library
        raise BuildError(f"{shlex.join(command)} could not compile it: {compiled.stderr.strip()[:500]}")
    finally:
        Path(partial).unlink(missing_ok=True)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Loads the library. Returns it, or None and the reason. torch must be imported first: then both share
    one OpenMP runtime and its threads."""
    try:
        library = build()
        try:
            return ctypes.CDLL(str(library)), ""
        except OSError:  # the file is damaged
            library.unlink()
            return ctypes.CDLL(str(build())), ""
    except (BuildError, OSError) as error:
        return None, str(error)
