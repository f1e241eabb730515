"""How long the commands of a library take with many scenes, and how large its files are.

    python -m benchmarks.scale --out scale --scenes 100000

Ten libraries with a tenth of the scenes each are made and joined. Scenes are drawn, not learned: their
weights are random, their micro planes are some hundred random ones, their thumbnails some hundred pictures.
They are small (about 2 kB), so that times are those of the library's mechanisms, not of inflating large
planes. Readers run in processes of their own. Times are CPU seconds. Ten times as many scenes are not
measured, but extrapolated on a line through the two measured numbers.
"""

import io
import json
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import latentscenes.api
from latentscenes.cli.common import run_program
from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config
from latentscenes.core.console import Table, show
from latentscenes.core.errors import UserError
from latentscenes.core.files import folder_bytes
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import FILE
from latentscenes.storage.joining import empty_copy, join
from latentscenes.storage.library import LibraryFolder, LibraryInfo, NewScene
from latentscenes.storage.published.publishing import Published, publish
from latentscenes.storage.published.targets import FolderTarget
from latentscenes.storage.quantize import Payload, pack, payload_bytes
from latentscenes.storage.verifying import verify

PARTS, BATCH, KINDS, SHARDS = 10, 1000, 200, (4, 500)
"""Libraries that are joined; scenes appended together; different micro planes and thumbnails; with `like`,
scenes of a shard."""
SETTINGS = """
codec: {kind: identity}
planes: {resolution: 16, micro: 2, macro: 6, bases: 32}
field: {hidden: 16}
render: {coarse: 6, fine: 6}
train: []
exploit: []
"""
READS = 50
"""Single reads that a median is of."""


@dataclass(frozen=True)
class Row:
    """A figure of the table."""

    what: str
    value: float
    unit: str
    """`s`, `B` (bytes) or `/s` (scenes a second)."""
    target: str = ""

    def text(self, value: float) -> str:
        if self.unit == "B":
            return f"{value / 1e6:.3g} MB"
        if self.unit == "/s":
            return f"{value:,.0f} scenes/s".replace(",", " ")
        return f"{1000 * value:.2g} ms" if value < 0.1 else f"{value:.3g} s"

    def line(self, less: "Row | None") -> tuple[str, ...]:
        """The line of the table, beside the figure for a tenth of the scenes."""
        first = self.text(less.value) if less else ""
        return self.what, first, self.text(self.value), self.target, self.larger(less)

    def larger(self, less: "Row | None") -> str:
        """The figure for 10 times as many scenes, on the line through this one and that for a tenth."""
        if less is None or self.unit == "/s":
            return "" if less is None else self.text(self.value)
        return self.text(max(self.value, self.value + 10 * (self.value - less.value)))


class Drawn:
    """Scenes that are drawn, not learned."""

    def __init__(self, config: Config):
        self._generator, self._random = torch.Generator().manual_seed(0), np.random.default_rng(0)
        rows = random_parameters(KINDS, config.planes, self._generator).one_by_one()
        self._payloads = [pack(one, "int4") for one in rows]
        self._pictures = [self._picture() for _ in range(KINDS)]

    def _picture(self) -> bytes:
        """A picture of about the size of a real thumbnail: a disc with a smooth, slightly noisy color."""
        y, x = np.mgrid[-1:1:96j, -1:1:96j]
        waves = sum(np.sin(self._random.normal(0, 4, (4, 1, 1)) * axis) for axis in (x, y))
        pixels = 128 + 30 * waves.transpose(1, 2, 0)
        pixels[..., 3] = 255 * (x**2 + y**2 < self._random.uniform(0.4, 0.9))
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG", optimize=True)
        return stream.getvalue()

    def scenes(self, first: int, count: int) -> list[NewScene]:
        found = []
        for number in range(first, first + count):
            payload: Payload = dict(self._payloads[number % KINDS])
            payload["weights"] = torch.randn(payload["weights"].shape, generator=self._generator)
            info = SceneInfo(
                f"object_{number:07d}", "int4", payload_bytes(payload), "exploit", "/data/drawn", "new",
                f"object_{number:07d}", "2026-01-01T00:00:00+00:00", 2.0, 4.0, 30 + number % 7 / 10, 0.1,
                tags={"category": f"kind {number % 23}", "license": "CC0-1.0"},
            )  # fmt: skip
            found.append(NewScene(info, payload, self._pictures[number % KINDS]))
        return found


def empty_library(path: Path, config: Config) -> LibraryFolder:
    """Creates a library with a random model."""
    box = Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    info = LibraryInfo(box, Viewpoint((64, 64), 1.3, (1.0, 1.0), box.center), "int4", "drawn", 0.0, 0)
    torch.manual_seed(0)
    model, start = Model(config, box), random_parameters(1, config.planes, torch.Generator().manual_seed(0))
    return LibraryFolder.create(path, config, info, model, start)


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Returns the CPU seconds of a call, the median of some: machines are shared."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def forget(folder: Path) -> None:
    """Asks the system to drop the files of a folder from its cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def reader(path: str, scenes: int) -> dict[str, float]:
    """Times what a reader does, in this process."""
    torch.set_num_threads(1)
    random = np.random.default_rng(1)
    names = [f"object_{number:07d}" for number in random.integers(0, scenes, READS + 1)]
    found, before = {}, resident()
    begun, clock = time.process_time(), time.perf_counter()
    library = latentscenes.open_library(path, device="cpu")
    found["open"], found["open by the clock"] = time.process_time() - begun, time.perf_counter() - clock
    index, rest, clock = library.folder.index, iter(names), time.perf_counter()
    found["cold"] = library[names[0]].rows and time.perf_counter() - clock
    found["list"] = seconds(lambda: (index.first(50), index.totals()), 5)
    found["name"] = seconds(lambda: library[next(rest)].metadata, READS)
    found["scene"] = statistics.median(seconds(lambda name=name: library[name].rows) for name in names)
    found["first nearest"] = seconds(lambda: library.nearest(names[0], 10))
    found["nearest"] = seconds(lambda: library.nearest(names[1], 10), 10)
    found["names"] = seconds(lambda: library.names)
    found["memory"], found["idle"] = peak() - before, before
    found["infos"] = seconds(lambda: library.infos())
    return found


def resident() -> float:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> float:
    """Largest number of bytes of memory that this program had. (ru_maxrss counts its parent, too.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def publisher(path: str, scenes: int, folder: Path) -> dict[str, float]:
    """Times publishing into a folder, in this process."""
    torch.set_num_threads(1)
    library, found, before = LibraryFolder.open(path), {}, resident()
    found["first"] = seconds(lambda: publish(library, FolderTarget(folder)))
    found["memory"] = peak() - before
    found["again"] = seconds(lambda: publish(library, FolderTarget(folder)))
    one = Drawn(library.config).scenes(scenes, 1)[0]
    library.append([replace(one, info=replace(one.info, name="one more"))])
    added: list[Published] = []
    found["more"] = seconds(lambda: added.append(publish(library, FolderTarget(folder))))
    return found | {"bytes": added[0].bytes}


def elsewhere(path: Path, scenes: int, into: Path | None = None) -> dict[str, float]:
    """Runs `reader`, or with a folder to publish into `publisher`, in another process."""
    words = [sys.executable, "-m", "benchmarks.scale", "--measure", str(path), "--scenes", str(scenes)]
    words += ["--into", str(into)] if into else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{path}: a measurement failed. {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def command_seconds(*words: str) -> float:
    """CPU seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "latentscenes", *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def index_bytes(path: Path, out: Path) -> tuple[int, int]:
    """Returns the size of an index without thumbnails, and that of the thumbnails."""
    copied = out / "index_without_thumbnails.sqlite"
    with closing(sqlite3.connect(path / FILE)) as source, closing(sqlite3.connect(copied)) as target:
        source.backup(target)
        target.isolation_level = None
        target.execute("PRAGMA journal_mode = DELETE")
        pictures = target.execute("SELECT total(length(png)) FROM thumbnails").fetchone()[0]
        target.execute("DELETE FROM thumbnails")
        target.execute("VACUUM")
    size = copied.stat().st_size
    copied.unlink()
    return size, int(pictures)


def made(out: Path, scenes: int, config: Config) -> list[Row]:
    """Makes the parts and joins them to the library `out/library`. The first part stays."""
    drawn, parts, spent = Drawn(config), [], []
    for part in range(PARTS):
        parts.append(out / "parts" / f"{part}")
        library, end = empty_library(parts[-1], config), (part + 1) * scenes // PARTS
        for first in range(part * scenes // PARTS, end, BATCH):
            new = drawn.scenes(first, min(BATCH, end - first))
            spent.append(seconds(lambda library=library, new=new: library.append(new)) / len(new))
        library.close()
    joining = seconds(lambda: join(out / "library", parts))
    for part in parts[1:]:
        shutil.rmtree(part)
    library, late = LibraryFolder.open(out / "library"), []
    for first in range(scenes, scenes + 3 * BATCH, BATCH):
        new = drawn.scenes(first, BATCH)
        late.append(seconds(lambda new=new: library.append(new)))
        library.remove([scene.info.name for scene in new])
    library.close()
    return [
        Row("append, 1000 at a time", 1 / statistics.median(spent), "/s"),
        Row("append to the whole library", BATCH / statistics.median(late), "/s"),
        Row("join of 10 parts", scenes / joining, "/s", "5000 scenes/s"),
    ]


def joined(like: Path, out: Path, scenes: int) -> Table:
    """Times joining parts whose scenes are those of a library with other weights, in shards of some sizes."""
    source, lines = LibraryFolder.open(like), []
    known = [
        (one, source.payload(one.name), source.index.thumbnail(one.name)) for one in source.index.infos()
    ]
    parts, each = [out / f"part {number}" for number in range(PARTS)], scenes // PARTS
    for count in SHARDS:
        for part in parts:
            library = empty_copy(like, part, "DELETE")
            for first in range(0, each, count):
                new = []
                for number in range(first, min(first + count, each)):
                    info, payload, picture = known[number % len(known)]
                    name, weights = f"{part.name} {number}", torch.randn(payload["weights"].shape)
                    info = replace(info, name=name, source=name)
                    new.append(NewScene(info, payload | {"weights": weights}, picture))
                library.append(new)
            library.close()
        clock, cpu = [], []
        for _ in range(5):
            os.sync()
            begun = time.perf_counter()
            cpu.append(seconds(lambda: join(out / "whole", parts)))
            clock.append(time.perf_counter() - begun)
            shutil.rmtree(out / "whole")
        rates = [f"{scenes / statistics.median(found):,.0f}" for found in (cpu, clock)]
        size = f"{statistics.mean(info.bytes for info, _, _ in known) / 1000:.0f} kB"
        lines.append((str(count), f"{scenes:,}", size, *rates))
        for part in parts:
            shutil.rmtree(part)
    return Table(
        "Join", ("scenes of a shard", "scenes", "each", "per CPU second", "per second"), tuple(lines)
    )


def read(path: Path, out: Path, scenes: int) -> list[Row]:
    """Times reading and verifying a library."""
    forget(path)
    cold, warm = elsewhere(path, scenes), elsewhere(path, scenes)
    size, pictures = index_bytes(path, out)
    library = LibraryFolder.open(path)
    verifying, stored = seconds(lambda: verify(library)), library.index.totals().bytes
    library.close()
    return [
        Row("open", warm["open"], "s", "0.2 s"),
        Row("… by the clock, with nothing in the system's cache", cold["open by the clock"], "s"),
        Row("list a page of 50, with totals", warm["list"], "s", "20 ms"),
        Row("find a scene by name", warm["name"], "s", "5 ms"),
        Row("read a scene", warm["scene"], "s"),
        Row("… the first by the clock, with nothing in the system's cache", cold["cold"], "s"),
        Row("nearest 10", warm["nearest"], "s", "50 ms"),
        Row("… the first time, which reads all weights", warm["first nearest"], "s"),
        Row("names of all scenes", warm["names"], "s"),
        Row("metadata of all scenes", warm["infos"], "s"),
        Row("memory of a reader, above a program that imported the package", warm["memory"], "B", "300 MB"),
        Row("… of such a program", warm["idle"], "B"),
        Row("`library list`", command_seconds("library", "list", str(path)), "s"),
        Row("`library show`", command_seconds("library", "show", str(path)), "s"),
        Row("verify", scenes / verifying, "/s"),
        Row("index without thumbnails", size, "B", "30 MB"),
        Row("thumbnails", pictures, "B"),
        Row("scenes as stored", stored, "B"),
    ]


def published(path: Path, out: Path, scenes: int) -> list[Row]:
    """Times publishing a library, and reading what was published."""
    folder = out / "published"
    done = elsewhere(path, scenes, folder)
    read, size = elsewhere(folder, scenes), folder_bytes(folder)
    shutil.rmtree(folder)
    return [
        Row("publish", scenes / done["first"], "/s"),
        Row("… further memory, at most", done["memory"], "B"),
        Row("publish again, nothing new", done["again"], "s"),
        Row("publish again, one new scene", done["more"], "s"),
        Row("… bytes written then", done["bytes"], "B"),
        Row("published files", size, "B"),
        Row("published folder: open", read["open"], "s", "0.2 s"),
        Row("published folder: list a page of 50, with totals", read["list"], "s", "20 ms"),
        Row("published folder: find a scene by name", read["name"], "s", "5 ms"),
        Row("published folder: read a scene", read["scene"], "s"),
        Row("published folder: nearest 10", read["nearest"], "s", "50 ms"),
        Row("… the first time", read["first nearest"], "s"),
        Row("published folder: memory of a reader", read["memory"], "B", "300 MB"),
    ]


def main(
    out: Path = Path("scale"),
    scenes: int = 100_000,
    measure: Path | None = None,
    into: Path | None = None,
    keep: bool = False,
    like: Path | None = None,
) -> None:
    """Makes a library of many drawn scenes and prints what it costs to use.

    Args:
        out: new folder for all files, about 15 kB a scene.
        scenes: number of scenes.
        measure: only read this library, and print the times as JSON …
        into: … or publish it into this folder.
        keep: keep the library.
        like: only join parts, whose scenes are those of this library with random weights.
    """
    if measure:
        found = publisher(str(measure), scenes, into) if into else reader(str(measure), scenes)
        print(json.dumps(found))
        return
    if out.exists():
        raise UserError(f"{out}: exists. Name a new folder.")
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    if like:
        table = joined(like, out, scenes)
        show(table)
        (out / "join.md").write_text(table.markdown())
        return
    config = config_io.parse(SETTINGS, "scale")
    making = made(out, scenes, config)
    paths = {scenes // PARTS: out / "parts" / "0", scenes: out / "library"}
    few, many = ([*read(path, out, count), *published(path, out, count)] for count, path in paths.items())
    rows = [(row, None) for row in making] + list(zip(many, few, strict=True))
    counts = (scenes // PARTS, scenes, PARTS * scenes)
    few, many, more = (f"{count:,} scenes".replace(",", " ") for count in counts)
    heads = ("", few, many, "target", f"{more}, extrapolated")
    table = Table("Libraries of many scenes", heads, tuple(row.line(less) for row, less in rows))
    show(table)
    (out / "scale.md").write_text(table.markdown())
    if not keep:
        for part in ("library", "parts"):
            shutil.rmtree(out / part)


if __name__ == "__main__":
    run_program(main)
