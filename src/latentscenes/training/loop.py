"""The loop. Stages are data (config.py); this file turns them into steps, and reads top to bottom.

One loop serves everything: warming up the codec, joint training, learning new scenes and the RGB baseline differ in
what learns, from which losses, on which scenes.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config, StageConfig
from latentscenes.core.console import StageProgress
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.runtime import StopFlag, machine_memory, seeded
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.convolutional import ConvolutionalCodec
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, macro_planes
from latentscenes.storage.row_files import RowFiles
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.training.batches import BatchSource
from latentscenes.training.losses import Batch, needs_render, terms, total
from latentscenes.training.optim import RowAdam, SharedAdam, rate_factor

SAVE_SECONDS = 60.0
"""Time between checkpoints; a crash loses at most this much work, and nothing of the result."""
LOG_EVERY = 10
COMPONENT_VIEWS = 256
"""Images that the own codec takes its principal components from."""


TrackerKind = Literal["none", "tensorboard", "wandb", "trackio"]


class Tracker:
    """Sends scalars to one tracker, or to none."""

    def __init__(self, kind: TrackerKind, run_path: Path, config: dict[str, Any]):
        self.kind, self.sink = kind, None
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.sink = SummaryWriter(str(run_path / "tensorboard"))
            elif kind == "wandb":
                import wandb

                same = hashlib.blake2b(str(run_path.resolve()).encode(), digest_size=8).hexdigest()  # goes on after a stop
                self.sink = wandb.init(project="latentscenes", name=run_path.name, config=config, resume="allow", id=same)
            elif kind == "trackio":
                import trackio

                self.sink = trackio.init(project="latentscenes", name=run_path.name, config=config, resume="allow")
        except ImportError as error:
            raise UserError(f"--track {kind}: not installed ({error}). Run: pip install 'latentscenes[track]'.") from None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.kind == "tensorboard":
            for name, value in values.items():
                self.sink.add_scalar(name, value, step)
        elif self.sink is not None:
            self.sink.log(values, step=step)

    def close(self) -> None:
        if self.kind == "tensorboard":
            self.sink.close()
        elif self.sink is not None:
            self.sink.finish()


def train(
    config: Config,
    views: PosedImages,
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


def _sample(views: PosedImages, scenes: Sequence[Scene]) -> Float[Tensor, "n 3 H W"]:
    """Up to COMPONENT_VIEWS fitted views, evenly over all scenes, in [0, 1]."""
    index = [view for scene in scenes for view in scene.views("fit")]
    chosen = index[:: -(-len(index) // COMPONENT_VIEWS)]
    return views.images(chosen).float() / 255


def learn(
    run: Run,
    model: Model,
    rows: SceneParameters,
    views: PosedImages,
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
    rows: SceneParameters,
    views: PosedImages,
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


class Learner:
    """A stage's grip on a model and its scenes: what learns, from which losses, with fresh optimisers."""

    def __init__(self, model: Model, rows: SceneParameters, stage: StageConfig, files: RowFiles | None = None):
        self.model, self.rows, self.stage = model, rows, stage
        rates = stage.rates
        self.shared = SharedAdam(model.parts(), rates, stage.beta2)
        own = {"micro": rates.micro, "weights": rates.weights, "bias": rates.weights, "mixing": rates.mixing}
        self.own = RowAdam(rows, own, files, stage.beta2)
        self._macro: Float[Tensor, "n 3 r r g"] | None = None  # once it no longer changes

    def state(self) -> dict[str, Tensor]:
        """The optimisers' tensors themselves, by name."""
        return self.shared.state() | self.own.state()

    def freeze_by(self, epoch: int) -> None:
        """Stop learning what the stage freezes at this epoch or before."""
        if self.stage.field_epochs is not None and epoch >= self.stage.field_epochs:
            self.shared.freeze("field")
        if self.stage.weights_epochs is not None and epoch >= self.stage.weights_epochs and "weights" in self.own.rates:
            self.own.freeze("weights", "bias")

    def step(self, batch: Batch, factor: float, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor | None]:
        """Take one step at `factor` times the stage's rates; gives the terms of the objective before it, unweighted, and the
        errors of rays (see `terms`)."""
        losses = self.stage.losses
        leaves = self.rows.gather(batch.scenes, self.model.bases.device) if needs_render(losses) or losses.tv else None
        planes, mixing, micro = self._planes(leaves, batch) if leaves is not None else (None, None, None)
        found, errors = terms(self.model, planes, batch, losses, generator, mixing, micro)
        total(found, losses).backward()
        if leaves is not None:
            self.own.step(batch.scenes, leaves, factor)
        self.shared.step(factor)
        return found, errors

    def _planes(self, leaves: SceneParameters, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Fused planes; how they are mixed, if they are; what of them learns, if that is not all."""
        mixing = leaves.mixing if leaves.mixing.numel() else None
        if self._macro is None and self._macro_stays():
            with torch.no_grad():
                bases = self.model.bases
                self._macro = macro_planes(self.rows.weights.to(bases.device), self.rows.bias.to(bases.device), bases)
        if self._macro is None:
            return self.model.fuse(leaves), mixing, None
        apart = leaves.micro.shape[-1] and self.model.config.planes.fusion == "concat"
        return self.model.fuse(leaves, self._macro[batch.scenes]), mixing, leaves.micro if apart else None

    def _macro_stays(self) -> bool:
        """Whether neither base planes nor weights learn, and all scenes' macro planes fit into memory."""
        bases = self.model.bases
        learns = self.stage.rates.bases or "weights" in self.own.rates
        return not learns and 0 < 4 * len(self.rows) * bases[:1].numel() <= machine_memory() // 8
