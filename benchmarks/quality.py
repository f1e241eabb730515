"""python -m benchmarks.quality --run cars --data data/cars

What a user waits for: seconds per new scene until quality is near where it ends, ours and RGB tri-planes'; and the time
that many new scenes take in one process and in several.

Each point is a whole training of its own length, rates and all, of the same new scenes, scored on their held-out views.
`converged` is the best of the lengths tried; what counts is the shortest that comes within 0.3 dB of it.
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
from latentscenes.core.config import Config, ExploitOptions
from latentscenes.core.console import console
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation.evaluate import evaluate_stored
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet, StoredScenes
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

NEAR = 0.3
"""dB."""


@dataclass(frozen=True)
class Point:
    """A training of some length."""

    epochs: int
    seconds: float
    """Per scene."""
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
    """Learn the first `limit` new scenes for each of the numbers of epochs, on top of `parent` and as RGB tri-planes."""
    result = Result(f"time to quality, {limit} new scenes", torch.get_num_threads())
    curves = {"ours": [], "RGB": []}
    with tempfile.TemporaryDirectory() as folder:
        for epochs in ours:
            out = Path(folder) / f"ours-{epochs}"
            config = lengthened(parent.config, "exploit", epochs)
            exploit(
                out,
                views,
                config,
                parent,
                ExploitOptions(stage_one=False, precision="float32", limit=limit),
                device,
            )
            curves["ours"].append(_point(SceneSet.open(out, device=device), views, epochs))
        for epochs in rgb:
            config = lengthened(config_io.load("rgb"), "train", epochs)
            run = train(
                config, views, Path(folder) / f"rgb-{epochs}", split="new", limit=limit, device=device
            )
            curves["RGB"].append(_point(SceneSet.of_run(run, device=device), views, epochs))
    for name, points in curves.items():
        for point in points:
            result.add(
                f"{name}, {point.epochs} epochs",
                f"{point.seconds:.2f} s",
                f"{point.psnr:.2f} dB, SSIM {point.ssim:.4f}",
            )
            result.figures |= {
                f"{name}.{point.epochs}.{key}": value for key, value in dataclasses.asdict(point).items()
            }
    _conclude(result, curves)
    return result


def many_scenes(parent: Run | LibraryFolder, views: PosedImages, rounds: int, device: torch.device) -> Result:
    """Learn as many new scenes as fill two groups for each thread, with all threads in one process and with one process
    per thread; the start of processes counts."""
    threads = torch.get_num_threads()
    limit = min(2 * threads * parent.config.exploit[0].scenes, len(views.select("new")))
    result = Result(f"{limit} new scenes", threads)

    def learn(workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            exploit(
                Path(folder) / "library",
                views,
                parent.config,
                parent,
                ExploitOptions(stage_one=False, limit=limit, workers=workers),
                device,
            )
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
    """The first stage of `train` or `exploit` for so many epochs, with its schedule stretched to them."""
    first, *others = getattr(config, part)
    return dataclasses.replace(config, **{part: (dataclasses.replace(first, epochs=epochs), *others)})


def _point(learned: StoredScenes, views: PosedImages, epochs: int) -> Point:
    score = evaluate_stored(learned, views).mean
    point = Point(epochs, learned.seconds / len(learned.names), score.psnr, score.ssim)
    console.print(f"{epochs} epochs: {point.seconds:.2f} s a scene, {point.psnr:.2f} dB", highlight=False)
    return point


def nearly(points: list[Point], level: float) -> Point | None:
    """The quickest of some trainings that comes within NEAR of a level; none if none does."""
    return min(
        (point for point in points if point.psnr >= level - NEAR),
        key=lambda point: point.seconds,
        default=None,
    )


def _conclude(result: Result, curves: dict[str, list[Point]]) -> None:
    best = {name: max(point.psnr for point in points) for name, points in curves.items()}
    near = {name: nearly(points, best[name]) for name, points in curves.items()}
    for name, point in near.items():
        result.add(
            f"{name}: within {NEAR} dB of its converged {best[name]:.2f} dB",
            f"{point.seconds:.2f} s",
            f"{point.epochs} epochs",
        )
    result.figures["speedup to own convergence"] = near["RGB"].seconds / near["ours"].seconds
    result.add("RGB's time over ours, each to its own", f"{near['RGB'].seconds / near['ours'].seconds:.1f}x")
    same = nearly(curves["ours"], best["RGB"])
    if same:
        result.figures["speedup at RGB's quality"] = near["RGB"].seconds / same.seconds
        result.add(
            "RGB's time over ours, both to RGB's level",
            f"{near['RGB'].seconds / same.seconds:.1f}x",
            f"ours takes {same.seconds:.2f} s",
        )
    else:
        result.add(
            "ours does not come near RGB's level", "", f"{best['ours']:.2f} against {best['RGB']:.2f} dB"
        )


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
    """Measure the time to quality of new scenes at several lengths of training, beside RGB tri-planes; or many scenes at once.

    Args:
        run: finished run of `latentscenes train`, library or `cars`, to learn new scenes with.
        data: dataset whose new scenes are learned.
        only: quality, processes, or both.
        threads: CPU threads; unset: all cores.
        rounds: turns of each variant of `processes`.
        limit: learn only the first so many new scenes for `quality`.
        ours: epochs of the first exploit stage to try.
        rgb: epochs of RGB tri-planes to try.
        out: JSON file for all figures and the machine's description; the tables go beside it as Markdown.
    """
    device, parent, views = set_up(Machine(threads=threads)), open_parent(run), PosedImages.open(data)
    cases = {
        "quality": lambda: time_to_quality(parent, views, limit, ours, rgb, device),
        "processes": lambda: many_scenes(parent, views, rounds, device),
    }
    save([cases[name]() for name in only], out)


if __name__ == "__main__":
    run_program(main)
