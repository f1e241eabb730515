"""Compile the native kernel at first use with the user's own C++ compiler, once per machine.

The library is cached under $XDG_CACHE_HOME (default ~/.cache), named by a hash of the sources, flags, compiler and
CPU, so a change of any builds anew. Compiling goes to a private name that is then moved into place, so processes
that start together never see half a file.
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

SOURCE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)
"""Nothing here reorders arithmetic or flushes subnormals for the whole process, as -ffast-math would."""
OPTIONAL_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    ("-march=native",),
    (),
)
"""The best that the compiler accepts: tried in this order. Without OpenMP the kernel runs on one thread."""


class BuildError(Exception):
    """Why there is no native kernel, in one line."""


def compiler() -> list[str]:
    """$CXX if set, else the first of c++, g++ and clang++ on the path."""
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
    """What -march=native depends on."""
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
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / "latentscenes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="latentscenes-"))


def build() -> Path:
    """The compiled library, from the cache or new. Raises BuildError."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if version.returncode:
        raise BuildError(f"{shlex.join(command)} --version failed: {version.stderr.strip()[:200]}")
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [path.name.encode() + path.read_bytes() for path in sources]
    parts += [repr((command, version.stdout, FLAGS, OPTIONAL_FLAGS, cpu_model())).encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    folder = cache_folder()
    library = folder / f"native-{digest}.so"
    if library.exists():
        return library

    handle, partial = tempfile.mkstemp(dir=folder, suffix=".so.partial")
    os.close(handle)
    try:
        units = [str(path) for path in sources if path.suffix == ".cpp"]
        for optional in OPTIONAL_FLAGS:
            line = [*command, *FLAGS, *optional, *units, "-o", partial]
            compiled = subprocess.run(line, capture_output=True, text=True, check=False)
            if compiled.returncode == 0:
                os.replace(partial, library)
                return library
        raise BuildError(f"{shlex.join(command)} could not compile it: {compiled.stderr.strip()[:500]}")
    finally:
        Path(partial).unlink(missing_ok=True)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and why. Import torch first: both then share one OpenMP runtime, and so one team
    of threads, as the loader gives the library the runtime that is already there."""
    try:
        return ctypes.CDLL(str(build())), ""
    except (BuildError, OSError) as error:
        return None, str(error)
