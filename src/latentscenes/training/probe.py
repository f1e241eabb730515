"""How many scenes a step learns: a short probe finds from how many on more gain nothing on a device.

A step of few scenes leaves a GPU idle for most of its time. The number is found once, where a library or a
run begins, and becomes part of its settings. So it is the same for all processes and after all stops, and
resuming on another machine changes nothing.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config, StageConfig, scenes_as_in, with_scenes
from latentscenes.core.console import bytes_text, say
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, mean_parameters, random_parameters
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run
from latentscenes.training.batches import BatchSource, TrainingScenes
from latentscenes.training.distributed import ALONE, Team
from latentscenes.training.loop import StageLearner

MOST = 256
"""Scenes of a step that are tried, at most."""
GAIN = 1.05
"""How many times as many scenes a second must be learned for more scenes to count as better."""
SPARE = 0.8
"""Share of a GPU's memory that a step may fill."""
WARM, STEPS, SECONDS = 2, 3, 0.3
"""Steps before timing; timed steps, at least, and for at least this time."""


@dataclass(frozen=True)
class Trial:
    """Steps of one size."""

    scenes: int
    seconds: float
    """Of a step, the median."""
    memory: int | None
    """Largest number of bytes on the GPU; None on a CPU."""

    @property
    def rate(self) -> float:
        """Scenes that take a step, in a second."""
        return self.scenes / self.seconds


def scenes_by_stage(
    config: Config,
    stages: str,
    model: Model,
    start: SceneParameters | None,
    data: tuple[PosedImages, Sequence[Scene]],
) -> dict[str, int]:
    """Returns for each stage how many scenes fill the device of a model, and prints the measurements.

    Args:
        stages: `train` or `exploit`.
        model: changes if the stages learn it.
        start: where scenes start (n = 1); None: at random.
        data: a dataset, and some of its scenes.
    """
    found = {}
    for stage in getattr(config, stages):
        trials = list(run_trials(model, stage, data, start))
        found[stage.name] = smallest_sufficient(trials) if trials else stage.scenes
        shown = ", ".join(f"{trial.scenes}: {trial.rate:.0f}" for trial in trials)
        most = max((trial.memory or 0 for trial in trials), default=0)
        memory = f", up to {bytes_text(most)} of memory" if most else ""
        say(f"Stage {stage.name}, scene steps a second by scenes a step: {shown}{memory}.")
        say(f"Stage {stage.name}: {found[stage.name]} scenes a step.")
    return found


def smallest_sufficient(trials: Sequence[Trial]) -> int:
    """Returns the smallest number of scenes from which on more gain nothing."""
    best = max(trial.rate for trial in trials)
    return min(trial.scenes for trial in trials if GAIN * trial.rate >= best)


def run_trials(
    model: Model, stage: StageConfig, data: tuple[PosedImages, Sequence[Scene]], start: SceneParameters | None
) -> Iterator[Trial]:
    """Yields trials of twice as many scenes each, until two in turn gain nothing or the GPU's memory ends."""
    count, best, idle = stage.scenes, 0.0, 0
    while count <= max(MOST, stage.scenes) and idle < 2:
        try:
            trial = _trial(model, dataclasses.replace(stage, scenes=count), data, start)
        except torch.OutOfMemoryError:
            say(f"Stage {stage.name}: {count} scenes a step need more memory than the device has.")
            return
        finally:
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        yield trial
        if trial.memory and 2 * trial.memory > SPARE * torch.cuda.mem_get_info(model.device)[1]:
            return
        idle = 0 if trial.rate > GAIN * best else idle + 1
        best, count = max(best, trial.rate), 2 * count


def _trial(
    model: Model, stage: StageConfig, data: tuple[PosedImages, Sequence[Scene]], start: SceneParameters | None
) -> Trial:
    (images, given), device, planes = data, model.device, model.config.planes
    seen = [_few_views(scene, stage.views) for scene in given[: stage.scenes]]
    scenes = [seen[place % len(seen)] for place in range(stage.scenes)]
    if start is None:
        rows = random_parameters(len(scenes), planes, torch.Generator().manual_seed(0))
        own_boxes = images.has_boxes and model.config.render.half_side is None
    else:
        rows, own_boxes = mean_parameters(len(scenes), start), start.box.numel() > 0
    rows = dataclasses.replace(rows, box=images.boxes(scenes) if own_boxes else None)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    rows = rows.to(device)
    learner = StageLearner(model, rows, stage)
    source = BatchSource(model, TrainingScenes(rows, images, scenes), stage, 0, Path(tempfile.gettempdir()))
    model.train()
    seconds = []
    while len(seconds) < WARM + STEPS or sum(seconds[WARM:]) < SECONDS:
        begun = time.perf_counter()
        batch = source.batch(len(seconds))
        learner.step(batch, 1.0, source.numbers("step", len(seconds), source.device))
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Trial(stage.scenes, statistics.median(seconds[WARM:]), memory)


def _few_views(scene: Scene, count: int) -> Scene:
    """Returns a scene with a few of its fitted views, since a step needs no more."""
    return scene.without([view - scene.first for view in scene.views("fit")[count:]])


def for_exploit(
    config: Config, images: PosedImages, parent: Run | LibraryFolder, limit: int | None, device: torch.device
) -> Config:
    """Returns the configuration of a new library, with as many scenes a step as fill the device."""
    model, start = parent.starting(device)
    scenes = images.select("new", limit=limit)
    return with_scenes(config, "exploit", scenes_by_stage(config, "exploit", model, start, (images, scenes)))


def for_train(
    config: Config, images: PosedImages, out: Path, chosen: tuple[Split, int | None], device: torch.device,
    team: Team = ALONE,
) -> Config:  # fmt: skip
    """Returns the configuration of a run, with as many scenes a step as fill the devices of a team; the
    numbers of a run that was begun already stay. `chosen` are split and largest number of its scenes."""
    if (out / "run.json").is_file():
        return scenes_as_in(config, Run.open(out).config, "train")
    split, limit = chosen
    scenes, found = (
        images.select(split, limit=limit),
        dict.fromkeys((stage.name for stage in config.train), 0),
    )
    if team.first:
        half = config.render.half_side
        box = images.box if half is None else Box(images.box.center, (half, half, half))
        found = scenes_by_stage(config, "train", Model(config, box).to(device), None, (images, scenes))
    numbers = team.sum([float(number * team.count) for number in found.values()])
    found = {name: min(int(number), len(scenes)) for name, number in zip(found, numbers, strict=True)}
    return with_scenes(config, "train", found)
