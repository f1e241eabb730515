"""Commands are killed, their writes torn or refused, the power cut, files damaged; then they run again. Run:

    python -m benchmarks.faults --folder faults --kills 60 --writes 20 --cuts 20 --mutations 8 --minutes 2

One table says how often a result was lost, stuck or wrong. The faults are injected by faults.c, which is
compiled with `cc` and preloaded. Power cuts need root and a loop device; elsewhere they are left out, with a
note. Each command runs in a fork of this process, as if typed.
"""

import contextlib
import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.fault_cases import CASES, SETTINGS, Case, compact, make_meshes, read, result_of, same, write
from latentscenes.cli import main as program
from latentscenes.cli.common import run_program, say
from latentscenes.core.console import Table
from latentscenes.storage import verifying
from latentscenes.storage.index import FILE
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.training import loop

PATIENCE = 300
"""Seconds after which a command counts as hanging."""
TRIES = 3
"""How often a command is run again after a fault."""
IMAGE_BYTES = 64 << 20
"""Size of the disk whose power is cut."""


class Campaign:
    """Runs the commands of CASES with faults, in a folder `home` with their inputs."""

    def __init__(self, home: Path, seed: int):
        self.home, self.random = home, random.Random(seed)
        self.shim, self.log = ctypes.CDLL(None), home / "log"
        self.rows: list[tuple[str, ...]] = []

    def command(self, case: Case, out: Path) -> list[str]:
        return [word.format(home=self.home, out=out) for word in case.command.split()]

    def prepare(self, case: Case, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if case.start:
            shutil.copytree(self.home / case.start, out)

    def run(self, arguments: list[str], arm: Callable[[], None] = lambda: None) -> str:
        """Runs a command in a fork. Returns "done", "told", "killed", "traceback" or "hang"."""
        child = os.fork()
        if not child:
            self._in_child(arguments, arm)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.005)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        code = os.waitstatus_to_exitcode(status)
        if "Traceback (most recent" in self.log.read_text(errors="replace"):
            return "traceback"
        return "killed" if code < 0 else "told" if code else "done"

    def _in_child(self, arguments: list[str], arm: Callable[[], None]) -> None:
        code = 1
        try:
            output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["latentscenes", *arguments]
            loop.SAVE_SECONDS = 0.0
            arm()
            try:
                program.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
            (self.home / "calls").write_text(str(self.shim.fault_calls()))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def armed(self, out: Path, at: int, harm: str) -> Callable[[], None]:
        return lambda: self.shim.fault_arm(str(out).encode(), ctypes.c_long(at), harm.encode())

    def again(self, case: Case, out: Path, right: dict, tally: Counter) -> None:
        """Runs a command until it is done, and compares its result with the right one."""
        for _ in range(TRIES):
            ended = self.run(self.command(case, out))
            tally["tracebacks"] += ended == "traceback"
            tally["hangs"] += ended == "hang"
            if ended == "done" or same(out, right):
                break
        else:
            tally["stuck"] += 1
            say(f"{case.name}: stuck: {self.log.read_text(errors='replace').strip()[-300:]}")
            return
        if not same(out, right):
            tally["differ"] += 1
            say(f"{case.name}: another result in {shutil.copytree(out, self.home / f'differ-{time.time()}')}")

    def calls(self, case: Case, harm: str, count: int) -> None:
        """Does harm at `count` of the system calls of a command, spread over all of them."""
        out = self.home / "out"
        self.prepare(case, out)
        if (ended := self.run(self.command(case, out), self.armed(out, 0, harm))) != "done":
            raise SystemExit(f"{case.name}: {ended}: {self.log.read_text()}")
        number, right, tally = int((self.home / "calls").read_text()), result_of(out), Counter()
        chosen = sorted({1 + int(number * (k + self.random.random()) / count) for k in range(count)})
        for at in chosen:
            self.prepare(case, out)
            ended = self.run(self.command(case, out), self.armed(out, at, harm))
            tally["tracebacks"] += ended == "traceback"
            tally["hangs"] += ended == "hang"
            if ended in ("traceback", "hang"):
                say(f"{case.name}: {harm} at {at}: {ended}: {self.log.read_text(errors='replace')[-600:]}")
            self.again(case, out, right, tally)
        self.row(f"{case.name}: {HARMS[harm]}", len(chosen), tally)

    def row(self, name: str, count: int, tally: Counter) -> None:
        self.rows.append((name, str(count), *(str(tally[column]) for column in COLUMNS)))
        say("  ".join(self.rows[-1]))

    # Power cuts

    def cuts(self, case: Case, count: int) -> None:
        """Kills a command at a random moment and goes on from what the disk holds then, without what only the
        page cache of the system holds."""
        tally, plain = Counter(), self.home / "out"
        self.prepare(case, plain)
        self.run(self.command(case, plain), self.armed(plain, 0, "kill"))
        number, right = int((self.home / "calls").read_text()), result_of(plain)
        for k in range(count):
            with self.disk(f"disk{k}") as disk:
                out = disk / "out"
                self.prepare(case, out)
                os.sync() if case.start else None
                self.run(self.command(case, out), self.armed(out, self.random.randint(1, number), "kill"))
                time.sleep(self.random.choice((0, 0, 6)))  # the system writes some of its cache by itself
                after = self.home / "after"
                shutil.rmtree(after, ignore_errors=True)
                with self.disk(f"disk{k}", "copy") as copy:
                    if (copy / "out").exists():
                        shutil.copytree(copy / "out", after)
            self.again(case, after, right, tally)
        self.row(f"{case.name}: power cut", count, tally)

    @contextlib.contextmanager
    def disk(self, name: str, copy: str = "") -> Iterator[Path]:
        """Mounts a new disk in a file; with `copy`, a copy of what such a file holds now."""
        image, place = self.home / f"{name}{copy}.img", self.home / f"mount{copy}"
        place.mkdir(exist_ok=True)
        if copy:
            subprocess.run(["cp", "--sparse=always", self.home / f"{name}.img", image], check=True)
        else:
            with open(image, "wb") as stream:
                stream.truncate(IMAGE_BYTES)
            subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True)
            image.unlink()

    # Damaged files

    def mutations(self, folder: str, check: str, count: int) -> None:
        """Damages every kind of file of a folder `count` times; `check` must then say so. Leaves out what no
        file keeps: the memory that processes share (-shm), and bytes of the index that hold no entry."""
        out, tally = self.home / "out", Counter()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.home / folder, out)
        kinds, held = {}, _entries(out)
        files = (file for file in out.rglob("*") if file.is_file() and not file.name.endswith("-shm"))
        for file in sorted(file for file in files if file.stat().st_size):
            kinds.setdefault(file.suffix + file.name[:2] * (file.suffix != ".safetensors"), []).append(file)
        total = 0
        for kind, _ in itertools.product(kinds.values(), range(count)):
            file = self.random.choice(kind)
            before = file.read_bytes()
            if not before:  # a journal that the index has taken in meanwhile
                continue
            total += 1
            file.write_bytes(self.mutated(before))
            ended = self.run(check.format(home=self.home, out=out).split())
            text = self.log.read_text(errors="replace")
            tally["tracebacks"] += ended == "traceback"
            tally["hangs"] += ended == "hang"
            if ended == "traceback":
                say(f"{file.name}: {text[-400:]}")
            elif ended == "done" and "edited" not in text and not (held and held == _entries(out)):
                tally["unnoticed"] += 1
                tally[file.name] += 1
            file.write_bytes(before)
        unnoticed = ", ".join(f"{name} {tally[name]}" for name in tally if "." in name)
        self.row(
            f"{folder}: damaged, then `{check.split(' {')[0]}`" + f" ({unnoticed})" * bool(unnoticed),
            total,
            tally,
        )

    def mutated(self, content: bytes) -> bytes:
        """Flips a bit, cuts, empties, or overwrites 512 bytes with zeros."""
        place, changed = self.random.randrange(len(content)), bytearray(content)
        kind = self.random.choice(("flip", "flip", "flip", "cut", "empty", "zeros"))
        if kind == "flip":
            changed[place] ^= 1 << self.random.randrange(8)
        elif kind == "zeros" and any(changed[place : place + 512]):
            changed[place : place + 512] = bytes(len(changed[place : place + 512]))
        else:
            changed = changed[: 0 if kind == "empty" else place]
        return bytes(changed)

    # Writers and readers

    def together(self, seconds: float) -> None:
        """Two writers, a compactor and two readers in one library."""
        path = self.home / "shared"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.home / "library", path)
        end = time.monotonic() + seconds
        roles = [lambda k=k: write(path, f"writer{k}", end) for k in range(2)]
        roles += [lambda: compact(path, end), lambda: read(path, end), lambda: read(path, end)]
        children = []
        for number, role in enumerate(roles):
            child = os.fork()
            if not child:
                report = self.home / f"report{number}"
                try:
                    report.write_text(json.dumps(role()))
                except BaseException:
                    report.write_text(json.dumps({"tracebacks": 1, "text": traceback.format_exc()}))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        found = [json.loads((self.home / f"report{number}").read_text()) for number in range(len(roles))]
        tally, library = Counter(), LibraryFolder.open(path)
        for report in found:
            tally.update({key: value for key, value in report.items() if isinstance(value, int)})
            if "text" in report:
                say(report["text"])
        expected = [
            f"writer{k}-{number}" for k in range(2) for number in range(found[k].get("operations", 0))
        ]
        tally["lost"] = len(set(expected) - set(library.index.names()))
        tally["differ"] = len(verifying.verify(library))
        self.row(f"two writers, a compactor, two readers, {seconds:.0f} s", tally["operations"], tally)


HARMS = {"kill": "killed", "tear": "torn write", "full": "disk full", "error": "error once"}
CHECKS = {
    "library": "library verify {out}", "run": "verify {out}", "filed": "verify {out}",
    "cars": "data verify {out}",
}  # fmt: skip
"""Folders whose files are damaged, and the commands that must say so."""
COLUMNS = ("lost", "stuck", "differ", "unnoticed", "tracebacks", "hangs")


def _entries(library: Path) -> list[str] | None:
    """Returns all that the index of a library holds, as text; None if it cannot be read, or there is none."""
    if not (library / FILE).exists():
        return None
    with contextlib.closing(sqlite3.connect(library / FILE)) as connection:
        with contextlib.suppress(sqlite3.DatabaseError):
            return list(connection.iterdump())
    return None


def make_inputs(home: Path, campaign: Campaign) -> None:
    """Makes a dataset, a run, and libraries: one, one of many shards, and one with an older index.

    The commands run in this process: what they import and compile is then there in all forks."""
    (home / "tiny.yaml").write_text(SETTINGS)
    make_meshes(home)
    cars = "data cars --train 2 --new 3 --size 16 --views 4 --held-out 1 --out {home}/cars"
    for command in (cars, CASES[0].command, CASES[2].command):
        case = Case("input", command)
        out = {CASES[0].command: home / "run", CASES[2].command: home / "library"}.get(command, home / "cars")
        sys.argv = ["latentscenes", *campaign.command(case, out)]
        program.main()
    filed = replace(CASES[1], start=None)
    sys.argv = ["latentscenes", *campaign.command(filed, home / "filed")]
    program.main()
    shutil.copytree(home / "cars", home / "cars2")
    index = home / "cars2" / "views.json"
    index.write_text(index.read_text().replace('"car_', '"other_'))
    shutil.copytree(home / "library", home / "many")
    shutil.copytree(home / "library", home / "old")
    library = LibraryFolder.open(home / "old")
    first = library.index.infos()[0]
    library.append(
        [NewScene(replace(first, name="unlisted", source="unlisted"), library.payload(first.name))]
    )
    library.close()
    shutil.copy(home / "library" / "index.sqlite", home / "old" / "index.sqlite")


def main(
    folder: Path, kills: int = 60, writes: int = 20, cuts: int = 20, mutations: int = 8, minutes: float = 2.0,
    seed: int = 0, only: str = "",
) -> None:  # fmt: skip
    """Injects faults into commands and prints one table.

    Args:
        folder: a new folder for everything.
        kills: kills of each command.
        writes: torn writes, full disks and errors of each command, as many of each.
        cuts: power cuts of `train`, `exploit` and `library compact`, as many of each.
        mutations: damages of each kind of file.
        minutes: how long two writers, a compactor and two readers work.
        seed: of all choices.
        only: only the rows that contain this, such as `train`, `train: power cut`, `library: damaged`.
    """
    if "FAULTS" not in os.environ:  # once more, with faults.c preloaded
        shim, source = Path(tempfile.mkdtemp()) / "faults.so", Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
        arguments = [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"LD_PRELOAD": str(shim), "FAULTS": "1"})
    folder.mkdir(parents=True)
    home = folder.resolve()
    torch.set_num_threads(1)
    campaign = Campaign(home, seed)
    make_inputs(home, campaign)
    for case in CASES:
        if only not in case.name:
            continue
        campaign.calls(case, "kill", kills)
        for harm in ("tear", "full", "error"):
            campaign.calls(case, harm, writes)
    for case in CASES[:4]:
        if only not in (name := f"{case.name}: power cut"):
            continue
        if os.geteuid() == 0 and Path("/dev/loop-control").exists():
            campaign.cuts(case, cuts)
        else:
            say(f"{name}: left out, since it needs root and a loop device.")
    for folder, check in CHECKS.items():
        if only in f"{folder}: damaged":
            campaign.mutations(folder, check, mutations)
    if only in "two writers, a compactor, two readers":
        campaign.together(60 * minutes)
    print(Table("Faults", ("fault", "cases", *COLUMNS), tuple(campaign.rows)).markdown())


if __name__ == "__main__":
    run_program(main)
