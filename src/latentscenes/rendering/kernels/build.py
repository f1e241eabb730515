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
import subprocess
import tempfile
from pathlib import Path

from latentscenes.core import caches
from latentscenes.core.caches import cache_folders, is_trusted
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


def cache_folder() -> Path:
    """Returns the user's cache folder, made if needed. Code is loaded from it, so only the user and root may
    be able to write it. Raises BuildError."""
    if folder := caches.cache_folder():
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
