"""Measures the time per new scene until quality is near its limit, for ours and for RGB tri-planes. Run:

    python -m benchmarks.quality --run cars --data data/cars

With `--only processes`, measures the time of many new scenes in one process and in several.

Each point is a full training of the same new scenes with its own number of epochs, scored on held-out views.
`converged` is the best score of the lengths tried. The result is the shortest training within 0.3 dB of it.
"""

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.speed import Result, save
from latentscenes.cli.common import Machine, run_program, set_up
from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.console import console
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation.evaluate import evaluate_stored
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet, StoredScenes
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

NEAR = 0.3
"""A training counts as converged within this many dB of the best."""


@dataclass(frozen=True)
class Point:
    """A training with some number of epochs."""

    epochs: int
    cpu_seconds: float
    """Per scene."""
    seconds: float
    """Per scene, by the clock."""
    psnr: float
    ssim: float


def time_to_quality(
    parent: Run | LibraryFolder,
    views: PosedImages,
    limit: int,
    ours: tuple[int, ...],
    rgb: tuple[int, ...],
    device: torch.device,
) -> Result:
    """Learns the first `limit` new scenes with each number of epochs, on top of `parent` and as RGB
    tri-planes."""
    result = Result(f"time to quality, {limit} new scenes", torch.get_num_threads())
    curves = {"ours": [], "RGB": []}
    with tempfile.TemporaryDirectory() as folder:
        for epochs in ours:
            out = Path(folder) / f"ours-{epochs}"
            config = lengthened(parent.config, "exploit", epochs)
            options = ExploitOptions(stage_one=False, precision="float32", limit=limit)
            exploit(out, views, config, parent, options, device)
            curves["ours"].append(_point(SceneSet.open(out, device=device), views, epochs))
        for epochs in rgb:
            config = lengthened(config_io.load("rgb"), "train", epochs)
            out = Path(folder) / f"rgb-{epochs}"
            run = train(config, views, out, split="new", limit=limit, device=device)
            curves["RGB"].append(_point(SceneSet.of_run(run, device=device), views, epochs))
    for name, points in curves.items():
        for point in points:
            score = f"{point.psnr:.2f} dB, SSIM {point.ssim:.4f}"
            result.add(f"{name}, {point.epochs} epochs", f"{point.cpu_seconds:.2f} CPU s", score)
            result.figures |= {
                f"{name}.{point.epochs}.{key}": value for key, value in dataclasses.asdict(point).items()
            }
    _conclude(result, curves)
    return result


def many_scenes(parent: Run | LibraryFolder, views: PosedImages, rounds: int, device: torch.device) -> Result:
    """Learns new scenes that fill two groups for each thread, with all threads in one process and with one
    process per thread. Includes the time to start the processes."""
    threads = torch.get_num_threads()
    limit = min(2 * threads * parent.config.exploit[0].scenes, len(views.select("new")))
    result = Result(f"{limit} new scenes", threads)

    def learn(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            options = ExploitOptions(stage_one=False, limit=limit, workers=workers)
            exploit(Path(folder) / "library", views, parent.config, parent, options, device)
            return time.monotonic() - begun

    turns = [[learn(workers) for workers in (1, 0)] for _ in range(rounds)]
    alone, together = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    ratio = statistics.median(one / several for one, several in turns)
    result.add("one process", f"{alone / limit:.2f} s a scene")
    result.add("a process per thread", f"{together / limit:.2f} s a scene", f"{ratio:.2f}x as fast")
    result.figures |= {
        "one.seconds": alone / limit,
        "several.seconds": together / limit,
        "several.speedup": ratio,
    }
    return result


def lengthened(config: Config, part: str, epochs: int) -> Config:
    """Sets the number of epochs of the first stage of `train` or `exploit`; the schedule scales with it."""
    first, *others = getattr(config, part)
    return dataclasses.replace(config, **{part: (dataclasses.replace(first, epochs=epochs), *others)})


def _point(learned: StoredScenes, views: PosedImages, epochs: int) -> Point:
    score = evaluate_stored(learned, views).mean
    spent = learned.spent.times(1 / len(learned.names))
    point = Point(epochs, spent.cpu, spent.wall, score.psnr, score.ssim)
    console.print(f"{epochs} epochs: {spent} a scene, {point.psnr:.2f} dB", highlight=False)
    return point


def nearly(points: list[Point], level: float) -> Point | None:
    """The fastest training within NEAR of a PSNR level; None if there is none."""
    return min(
        (point for point in points if point.psnr >= level - NEAR),
        key=lambda point: point.cpu_seconds,
        default=None,
    )


def _conclude(result: Result, curves: dict[str, list[Point]]) -> None:
    best = {name: max(point.psnr for point in points) for name, points in curves.items() if points}
    near = {name: nearly(curves[name], level) for name, level in best.items()}
    for name, point in near.items():
        result.add(
            f"{name}: within {NEAR} dB of its converged {best[name]:.2f} dB",
            f"{point.cpu_seconds:.2f} CPU s",
            f"{point.epochs} epochs",
        )
    if len(best) < 2:
        return
    result.figures["speedup to own convergence"] = near["RGB"].cpu_seconds / near["ours"].cpu_seconds
    result.add(
        "RGB's time over ours, each to its own", f"{near['RGB'].cpu_seconds / near['ours'].cpu_seconds:.1f}x"
    )
    same = nearly(curves["ours"], best["RGB"])
    if same:
        result.figures["speedup at RGB's quality"] = near["RGB"].cpu_seconds / same.cpu_seconds
        result.add(
            "RGB's time over ours, both to RGB's level",
            f"{near['RGB'].cpu_seconds / same.cpu_seconds:.1f}x",
            f"ours takes {same.cpu_seconds:.2f} CPU s",
        )
    else:
        result.add("ours does not reach RGB's level", "", f"{best['ours']:.2f} against {best['RGB']:.2f} dB")


def main(
    run: Path,
    data: Path,
    only: tuple[Literal["quality", "processes"], ...] = ("quality",),
    threads: int | None = None,
    rounds: int = 7,
    limit: int = 6,
    ours: tuple[int, ...] = (10, 20, 40, 80, 160),
    rgb: tuple[int, ...] = (20, 40, 80, 160, 320),
    out: Path | None = None,
) -> None:
    """Measure the time to quality of new scenes against RGB tri-planes, or the time of many scenes at once.

    Args:
        run: shared parts to learn with: a finished run of `latentscenes train`, a library, or `cars`.
        data: dataset whose new scenes are learned.
        only: quality, processes, or both.
        threads: number of CPU threads; unset: all cores.
        rounds: number of rounds of `processes`.
        limit: number of new scenes that `quality` learns.
        ours: epochs of the first exploit stage to try.
        rgb: epochs of RGB tri-planes to try; none to leave them out.
        out: JSON file for all figures and the machine's description; tables are written beside it as
            Markdown.
    """
    device, parent, views = set_up(Machine(threads=threads)), open_parent(run), PosedImages.open(data)
    cases = {
        "quality": lambda: time_to_quality(parent, views, limit, ours, rgb, device),
        "processes": lambda: many_scenes(parent, views, rounds, device),
    }
    save([cases[name]() for name in only], out)


if __name__ == "__main__":
    run_program(main)
