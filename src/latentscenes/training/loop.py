"""The loop. Stages are data (config.py); this file turns them into steps, and reads top to bottom.

One loop serves everything: warming up the codec, joint training, learning new scenes and the RGB baseline differ in
what learns, from which losses, on which scenes.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config, StageConfig
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.progress import StageProgress
from latentscenes.core.runtime import seeded
from latentscenes.core.signals import StopFlag
from latentscenes.data.dataset import Scene, Split, Views
from latentscenes.model.convolutional import ConvolutionalCodec
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneRows
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.training.batches import BatchSource
from latentscenes.training.learner import Learner
from latentscenes.training.optim import rate_factor
from latentscenes.training.track import Tracker, TrackerKind

SAVE_SECONDS = 60.0
"""Time between checkpoints; a crash loses at most this much work, and nothing of the result."""
LOG_EVERY = 10
COMPONENT_VIEWS = 256
"""Images that the own codec takes its principal components from."""


def train(
    config: Config,
    views: Views,
    out: Path,
    *,
    split: Split = "train",
    limit: int | None = None,
    device: torch.device,
    track: TrackerKind = "none",
) -> Run:
    """Learn the shared parts and the scenes of a split from scratch, into the run folder `out`; go on if it was begun."""
    if not config.train:
        raise UserError("configuration: `train` lists no stages, so there is nothing to learn.")
    scenes = views.select(split, limit=limit)
    half = config.render.half_side
    box = views.box if half is None else Box(views.box.center, (half, half, half))
    run = Run.create(out, config, RunInfo("train", str(views.path.resolve()), split, [scene.name for scene in scenes], box))
    model = Model(config, box).to(device)
    if isinstance(model.codec, ConvolutionalCodec) and not config.codec.path and not run.position.total:
        model.codec.fit_components(_sample(views, scenes).to(device))
    rows = run.begin_rows(device)
    run.restore(model, rows)
    tracker = Tracker(track, run.path, {"seed": config.seed})
    learn(run, model, rows, views, scenes, config.train, device, tracker)
    tracker.close()
    return run


def _sample(views: Views, scenes: Sequence[Scene]) -> Float[Tensor, "n 3 H W"]:
    """Up to COMPONENT_VIEWS fitted views, evenly over all scenes, in [0, 1]."""
    index = [view for scene in scenes for view in scene.views("fit")]
    chosen = index[:: -(-len(index) // COMPONENT_VIEWS)]
    return views.images(chosen).float() / 255


def learn(
    run: Run,
    model: Model,
    rows: SceneRows,
    views: Views,
    scenes: Sequence[Scene],
    stages: Sequence[StageConfig],
    device: torch.device,
    tracker: Tracker,
    label: str = "",
) -> None:
    """Run all stages that are not done yet, from where the run's newest checkpoint left them. With a label, this is one
    of many runs: its progress is shown under that label while it lasts, and leaves no trace.

    Raises:
        Interrupted: a signal asked to stop; everything is saved.
    """
    run.lock()
    try:
        position = run.position
        run.cut_metrics(position.total)
        with StopFlag() as stopped:
            while position.stage < len(stages):
                _learn_stage(run, model, rows, views, scenes, stages, device, tracker, label, position, stopped)
    finally:
        run.unlock()


def _learn_stage(
    run: Run,
    model: Model,
    rows: SceneRows,
    views: Views,
    scenes: Sequence[Scene],
    stages: Sequence[StageConfig],
    device: torch.device,
    tracker: Tracker,
    label: str,
    position: Position,
    stopped: StopFlag,
) -> None:
    stage, seed = stages[position.stage], run.config.seed
    begun = saved = time.monotonic()
    # What learns, and where it left off
    learner = Learner(model, rows, stage, run.files)
    run.restore(model, rows)
    source = BatchSource(model, views, scenes, stage, seed, device, run.path)
    memory = learner.state() | source.state()
    if position.step:
        run.recall(memory)

    model.train()
    with StageProgress(stage.name, position.stage, len(stages), source.steps, position.step, label) as bar:
        spent = position.seconds.get(stage.name, 0.0)
        while position.step < source.steps:
            batch = source.batch(position.step)
            generator = seeded(device, seed, stage.name, "step", position.step)
            learner.freeze_by(position.step // source.steps_per_epoch)
            factor = rate_factor(stage, position.step, source.steps_per_epoch)
            found, errors = learner.step(batch, factor, generator)
            source.learn(batch, errors)
            position.step += 1
            position.total += 1

            # Tell, and keep
            last, stop = position.step == source.steps, bool(stopped)
            save = stop or time.monotonic() - saved > SAVE_SECONDS
            values = {name: value.item() for name, value in found.items()} if position.step % LOG_EVERY == 0 or save or last else {}
            _refuse_nonfinite(values, stage, position)
            if position.step % LOG_EVERY == 0 or last:
                bar.show(position.step, values)
                run.log({"stage": stage.name, "step": position.step, "total": position.total, "rate": factor, **values})
                tracker.log(position.total, {f"{stage.name}/{name}": value for name, value in values.items()})
            now = time.monotonic()
            position.seconds[stage.name] = spent + now - begun
            if save:
                run.save(model, rows, memory, position)
                saved = now
            if stop:
                raise Interrupted
        position.seconds[stage.name] = spent + time.monotonic() - begun
    position.stage, position.step = position.stage + 1, 0
    run.save(model, rows, {}, position)


def _refuse_nonfinite(values: dict[str, float], stage: StageConfig, position: Position) -> None:
    if not all(map(math.isfinite, values.values())):
        raise UserError(
            f"stage {stage.name!r}, step {position.step}: a loss is no longer finite ({values}). "
            "The last checkpoint is good; lower this stage's rates with --set and start again in a new folder."
        )
