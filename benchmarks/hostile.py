"""Mutated and hostile files against every command that reads: tracebacks, crashes, hangs, memory.

    python -m benchmarks.hostile --out DIR --mutations 400 --seed 0

Each case copies a whole set of good files, breaks one of them, and runs the commands that read it, each in a
process of its own that was forked after the imports. A case is good if every command ends by itself with a
result, or with one message (status 1 or 2), in at most LONGEST seconds of processor time and MOST_MEMORY.
"""

import contextlib
import dataclasses
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.hostile_files import Good, good_sets
from latentscenes.cli.common import run_program
from latentscenes.core.console import Table, show, tracked

LONGEST, MOST_MEMORY = 10.0, 1 << 30
"""Seconds of processor time, and bytes of resident memory above those of the waiting program."""
PATIENCE = 300
"""Seconds of the clock after which a command is ended and counted as hanging: other programs may be busy."""
ODD = (
    "null", "true", "-1", "0", "1e999", "NaN", "-Infinity", "1" + "0" * 400, "2147483648", "0.5", '""', "[]",
    "{}", '"\\u001b[31m"', '"../../x"', '"<script>"', "9" * 5000, "[[[[[[]]]]]]", '"\\ud800"', '"a\\u0000b"',
)  # fmt: skip
"""JSON values that are put in place of others."""


# Mutations


def mutated(name: str, content: bytes, draw: random.Random) -> bytes:
    """Returns the content with one to three random faults, in its structure if it is text or an index."""
    if name.endswith(".sqlite") and draw.random() < 0.6:
        return content  # by `change_index` instead
    text = (
        name.endswith((".json", ".jsonl", ".yaml", ".gltf", ".txt", ".obj", ".mtl"))
        or b"ascii" in content[:40]
    )
    for _ in range(draw.randint(1, 3)):
        change = draw.choice((_number, _value, _piece, _line) if text else (_bits, _cut, _block, _header))
        content = change(content, draw)
    return content


def _number(content: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", content))
    return _replaced(content, draw.choice(found).span(), draw) if found else content


def _value(content: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb'"(?:[^"\\]|\\.)*"|\[[^\[\]]*\]|\{[^{}]*\}|[\w./-]+', content))
    return _replaced(content, draw.choice(found).span(), draw) if found else content


def _replaced(content: bytes, span: tuple[int, int], draw: random.Random) -> bytes:
    return content[: span[0]] + draw.choice(ODD).encode() + content[span[1] :]


def _piece(content: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:] if draw.random() < 0.5 else content[:last] + content[first:]


def _line(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    lines[place : place + 1] = draw.choice(
        ([], [lines[place]] * 2, [b"\xff\xfe\x00" + lines[place]], [b""] * 9)
    )
    return b"\n".join(lines)


def _bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _block(content: bytes, draw: random.Random) -> bytes:
    place, size = draw.randrange(len(content) + 1), draw.choice((1, 4, 16, 512))
    block = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    return content[:place] + block + content[place + draw.choice((0, size)) :]


def _header(content: bytes, draw: random.Random) -> bytes:
    """Numbers of sizes stand in the first bytes of most formats."""
    changed = bytearray(content)
    place = draw.randrange(max(1, min(len(changed) - 8, 96)))
    changed[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 24)))
    return bytes(changed)


def change_index(path: Path, draw: random.Random) -> None:
    """Puts an odd value into a random column of the index of a library."""
    odd = draw.choice(
        (None, -1, 1 << 62, 1e308, "", "x", b"\xff\x00", "\x1b[31m", "<img src=x onerror=1>", "[[", "{}")
    )
    table = draw.choice(("scenes", "scenes", "shards", "thumbnails"))
    with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.Error):
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        where = draw.choice(("", f" WHERE rowid = (SELECT min(rowid) FROM {table})"))
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE {table} SET {draw.choice(columns)} = ?{where}", (odd,))
        connection.commit()


# Hostile files: each is put in place of a good one


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)


def _deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def _repeating(path: Path) -> None:
    """YAML whose aliases stand for 10^30 values; also no JSON."""
    lines = [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 30)]
    path.write_text("\n".join(["a0: &a0 [x]", *lines]))


def _large_picture(path: Path) -> None:
    path.write_bytes(_white(12_000))


@lru_cache(1)
def _white(side: int) -> bytes:
    """A PNG of white pixels, small as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), b"\0" + b"\xff" * (3 * side)
    rows = b"".join([packer.compress(row) for _ in range(side)] + [packer.flush()])
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _computing(path: Path) -> None:
    """An index whose table is a view without end."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE VIEW scenes AS WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
            "SELECT x AS id, 'n' || x AS name FROM c; PRAGMA user_version = 1;"
        )


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(1 << 20)),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(100_000)),
    "folder": lambda path: path.mkdir(),
    "FIFO": _fifo,
    "endless device": _endless,
    "link to itself": _circle,
    "1 TiB of nothing": _sparse,
    "deep nesting": _deep,
    "aliases": _repeating,
    "large picture": _large_picture,
    "computing index": _computing,
    "UTF-16": lambda path: path.write_text('{"a": 1}', "utf-16"),
    "a number": lambda path: path.write_text("17"),
    "long line": lambda path: path.write_text('{"' + "a" * 3_000_000 + '": 1}'),
}
"""What is put in place of a good file."""


# Running


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    what: str
    """accepted, refused, traceback, crash, hang or memory."""
    text: str
    """What it printed, and for a fault the command."""


def run(arguments: list[str], log: Path) -> Outcome:
    """Runs `latentscenes` with arguments in a forked process."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process = os.fork()
    if not process:
        _child(arguments, log)
    begun = time.monotonic()
    while not (found := os.wait4(process, os.WNOHANG))[0]:
        time.sleep(0.01)
        if time.monotonic() - begun > PATIENCE:
            os.kill(process, signal.SIGKILL)
    _, status, used = found
    text, code = log.read_text(errors="replace"), os.waitstatus_to_exitcode(status)
    seconds, memory = used.ru_utime + used.ru_stime, (used.ru_maxrss - base) * 1024
    what = "refused" if code in (1, 2) else "accepted" if not code else "crash"
    if "Traceback (most recent call last)" in text:
        what = "traceback"
    elif seconds > LONGEST or time.monotonic() - begun > PATIENCE or code == -signal.SIGXCPU:
        what = "hang"
    elif memory > MOST_MEMORY:
        what = "memory"
    return Outcome(what, f"{' '.join(arguments)}: status {code}, {seconds:.1f} s, {memory >> 20} MiB\n{text}")


def _warm() -> None:
    """Imports what commands import, so that each forked process begins at once."""
    for part in (
        "api",
        "data.meshes.importer",
        "data.photos.importer",
        "data.srn",
        "data.transforms",
        "evaluation.evaluate",
        "evaluation.tables",
        "export.pages",
        "export.video",
        "training.loop",
    ):
        importlib.import_module(f"latentscenes.{part}")  # fmt: skip
    torch.set_num_threads(1)  # threads do not survive a fork


def _child(arguments: list[str], log: Path) -> None:
    """Becomes the command; never returns."""
    from latentscenes.cli.main import main as run_command

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)
    resource.setrlimit(resource.RLIMIT_CPU, (30, 40))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 0
    try:
        sys.argv = ["latentscenes", *arguments]
        run_command()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def broken_sets(
    good: list[Good], mutations: int, most: int, seed: int
) -> Iterator[tuple[Good, str, Callable[[Path], object]]]:
    """Yields a set, the name of one of its files, and what breaks that file: all hostile files on a sample of
    the files, then random mutations."""
    draw = random.Random(seed)
    for one in good:
        yield one, "(as it is)", lambda folder: None
        files = one.files()
        for name in draw.sample(files, min(most, len(files))):
            for label, make in HOSTILE.items():
                yield one, f"{name} ({label})", _in_place(name, make)
    for number in range(mutations):
        one = good[number % len(good)]
        name = draw.choice(one.files())
        yield one, f"{name} (mutation {number})", _in_place(name, _mutation(name, draw.random()))


def _in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def put(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        if make.__name__ != "mutate":
            path.unlink()
            make(path)
        else:
            make(path, content)

    return put


def _mutation(name: str, seed: float) -> Callable:
    def mutate(path: Path, content: bytes) -> None:
        draw = random.Random(seed)
        changed = mutated(name, content, draw)
        path.write_bytes(changed)
        if name.endswith(".sqlite") and changed == content:
            change_index(path, draw)

    return mutate


def campaign(good: list[Good], work: Path, mutations: int, most: int, seed: int) -> tuple[Table, list[str]]:
    """Runs all cases; after Ctrl-C, those so far count. Returns the table and what went wrong. Kinds whose
    whole set is refused, since a package is absent, say, are left out: they would show nothing."""
    counts: dict[str, Counter] = {}
    faults: list[str] = []
    useless: set[str] = set()
    with contextlib.suppress(KeyboardInterrupt):
        for one, label, put in tracked(list(broken_sets(good, mutations, most, seed)), "breaking files"):
            if one.kind in useless:
                continue
            way = re.search(r"\((as it is|mutation)?", label)[1] or "hostile"
            group = counts.setdefault(f"{one.kind}, {way}", Counter())
            group["files"] += 1
            for outcome in _outcomes(one, put, work):
                group[outcome.what] += 1
                if outcome.what not in ("accepted", "refused" if way != "as it is" else ""):
                    if way == "as it is":
                        useless.add(one.kind)
                    faults.append(f"{one.kind}: {label}: {outcome.what}: {outcome.text}")
                    print(faults[-1][:1000], file=sys.stderr, flush=True)
    columns = ("files", "refused", "accepted", "traceback", "crash", "hang", "memory")
    counts["all"] = sum(counts.values(), Counter())
    rows = [(name, *(str(found[column]) for column in columns)) for name, found in counts.items()]
    return Table("Broken files and the commands that read them", ("", *columns), tuple(rows)), faults


def _outcomes(one: Good, put: Callable[[Path], object], work: Path) -> Iterator[Outcome]:
    """Copies a set, breaks a file of it and runs its commands."""
    case, out = work / "case", work / "out"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(one.folder, case)
    put(case)
    for command in one.commands:
        shutil.rmtree(out, ignore_errors=True)
        yield run([word.format(case, out=out) for word in command.split()], work / "log")


def main(out: Path, mutations: int = 400, files: int = 3, seed: int = 0, only: str = "") -> None:
    """Break files of every kind and run the commands that read them.

    Args:
        out: folder for the files and the list of faults.
        mutations: number of random mutations.
        files: in how many files of each set all hostile files are put.
        seed: seed of the mutations.
        only: kinds of files, separated by commas; unset: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    _warm()
    sets = [one for one in good_sets(out / "good") if not only or one.kind in only.split(",")]
    table, faults = campaign(sets, out, mutations, files, seed)
    (out / "faults.txt").write_text("\n\n".join(faults))
    show(table)


if __name__ == "__main__":
    run_program(main)
