"""The training loop: turns the stages of a configuration into steps.

One loop serves codec warm-up, joint training, new scenes and the RGB baseline. They differ only in the parts
that learn, the losses and the scenes.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.core.config import Config, LossWeights, StageConfig
from latentscenes.core.console import Spent, StageProgress
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.options import TrackerKind
from latentscenes.core.runtime import Numbers, StopFlag, machine_memory
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.convolutional import ConvolutionalCodec
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, macro_planes
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage.records import cut_metrics
from latentscenes.storage.row_files import RowFiles
from latentscenes.storage.run import Position, Run, RunInfo
from latentscenes.training.batches import BatchSource, TrainingScenes
from latentscenes.training.corrections import Corrected, ViewCorrections, corrects, view_ranges
from latentscenes.training.distributed import ALONE, RowOwners, Team, refuse_alone
from latentscenes.training.losses import Batch, needs_render, terms, total
from latentscenes.training.optim import RowAdam, SharedAdam, rate_factor

SAVE_SECONDS = 60.0
"""Time between checkpoints. A crash loses at most this much work and nothing of the result."""
LOG_EVERY = 10
LOSSES = [entry.name for entry in fields(LossWeights)]
COMPONENT_VIEWS = 256
"""Images from which our own codec computes its principal components."""


def train(
    config: Config,
    images: PosedImages,
    out: Path,
    *,
    split: Split = "train",
    limit: int | None = None,
    device: torch.device,
    track: TrackerKind = "none",
    team: Team = ALONE,
) -> Run:
    """Learns the shared parts and the scenes of a split from scratch, in the run folder `out`. Continues a
    run that was begun there. All processes of a team make the same call.

    Raises:
        UserError: the configuration has no stages, or `out` holds another run.
        Interrupted: a signal asked to stop. Everything is saved.
    """
    if not config.train:
        raise UserError("configuration: `train` lists no stages, so there is nothing to learn.")
    scenes = images.select(split, limit=limit)
    half = config.render.half_side
    box = images.box if half is None else Box(images.box.center, (half, half, half))
    info = RunInfo("train", str(images.path.resolve()), split, [scene.name for scene in scenes], box)
    refuse_alone(config, len(scenes), team)
    if not team.first:
        team.wait()  # until the first has made the folder
    run = Run.create(out, config, info)
    if team.first:
        team.wait()
    model = Model(config, box).to(device)
    if isinstance(model.codec, ConvolutionalCodec) and not config.codec.path and run.newest() is None:
        model.codec.fit_components(_sample(images, scenes).to(device))
    tracker = Tracker(track if team.first else "none", run.path, {"seed": config.seed})
    rows = run.begin_parameters(device)
    if images.has_boxes and half is None:
        rows.box = images.boxes(scenes).to(rows.weights.device)
    if team.count > 1:
        rows = rows.rows(team.owned(len(scenes)))
    Trainer(run, model, TrainingScenes(rows, images, scenes, team), tracker).fit(config.train)
    tracker.close()
    return run


def _sample(images: PosedImages, scenes: Sequence[Scene]) -> Float[Tensor, "n 3 H W"]:
    """Reads up to COMPONENT_VIEWS fitted views, evenly over all scenes, in [0, 1]."""
    index = [view for scene in scenes for view in scene.views("fit")]
    chosen = index[:: -(-len(index) // COMPONENT_VIEWS)]
    return images.images(chosen).float() / 255


class Trainer:
    """Learns scenes stage by stage in a run folder. After a stop, it continues exactly where it was."""

    def __init__(
        self,
        run: Run,
        model: Model,
        scenes: TrainingScenes,
        tracker: "Tracker | None" = None,
        label: str = "",
        on_progress: Callable[[], None] | None = None,
    ):
        """With a `label`, the progress bar shows it and disappears at the end, for one of many runs.
        `on_progress` is called after each step and each chunk of images that is encoded."""
        self.run, self.model, self.scenes, self.team = run, model, scenes, scenes.team
        self.shares = RowOwners.of_scenes(scenes.team, [len(scene.views("fit")) for scene in scenes.entries])
        self.tracker = tracker or Tracker("none", run.path, {})
        self.label, self.on_progress = label, on_progress or (lambda: None)
        self.corrections: ViewCorrections | None = None
        """Those of all fitted views, after `fit` with stages that learn them."""

    def fit(self, stages: Sequence[StageConfig]) -> None:
        """Runs all stages that are not done yet, from the newest checkpoint of the run.

        Raises:
            UserError: another process works on the run, or a loss is no longer finite.
            Interrupted: a signal asked to stop. Everything is saved.
        """
        if self.team.first:
            self.run.lock()
        try:
            self._restore()
            position = self.run.position
            if corrects(stages):
                views = view_ranges(self.scenes.entries)
                self.corrections = ViewCorrections.none(views, self._boxes(), stages)
                if position.total:
                    self.run.restore_state(self.corrections.state())
            if self.team.first:
                cut_metrics(self.run.path, position.total)
            with StopFlag() as stopped:
                while position.stage < len(stages):
                    self._fit_stage(stages, position, stopped)
        finally:
            self.run.unlock()

    def _restore(self) -> None:
        if not self.team.first:
            self.team.wait()  # until the first has put damaged checkpoints aside
        self.run.restore(self.model, self.scenes.parameters, self.shares.of)
        if self.team.first:
            self.team.wait()
        self.team.align(self.model)

    def _boxes(self) -> Float[Tensor, "n 6"]:
        """Returns center and half sides of each scene's box."""
        own = self.scenes.parameters.box
        boxes = own if own.numel() else self.model.box.numbers.expand(len(own), 6)
        return boxes.to(self.model.device)

    def _fit_stage(self, stages: Sequence[StageConfig], position: Position, stopped: StopFlag) -> None:
        run, model, stage, seed = self.run, self.model, stages[position.stage], self.run.config.seed
        begun, saved = Spent.so_far(), time.monotonic()

        # Optimizers and batches, restored
        learner = StageLearner(
            model, self.scenes.parameters, stage, run.files, self.corrections, team=self.team
        )
        source = BatchSource(model, self.scenes, stage, seed, run.path, self.on_progress)
        kept = self.corrections.state() if self.corrections else {}
        state = learner.state() | source.state() | kept
        if position.step:
            run.restore_state(state, self.shares.of)
        elif run.files:
            run.files.clear_moments()

        model.train()
        with StageProgress(
            stage.name, position.stage, len(stages), source.steps, position.step, self.label
        ) as bar:
            before = position.spent(stage.name)
            while position.step < source.steps:
                # One step
                batch = source.batch(position.step)
                numbers = source.numbers("step", position.step, source.device)
                learner.freeze_by(position.step // source.steps_per_epoch)
                factor = rate_factor(stage, position.step, source.steps_per_epoch)
                found, errors = learner.step(batch, factor, numbers, position.step / source.steps)
                if errors is not None:
                    source.learn(batch, errors)
                position.step += 1
                position.total += 1
                self.on_progress()

                # Log
                due = time.monotonic() - saved > SAVE_SECONDS
                stop, due, spent = self.team.agreed(bool(stopped), due, Spent.so_far() - begun)
                spent, save = before + spent, stop or due
                logged = position.step % LOG_EVERY == 0 or position.step == source.steps
                share = batch.share if batch else 0.0
                values = self.team.mean_terms(found, LOSSES, share) if logged or save else {}
                _refuse_nonfinite(values, stage, position)
                if logged and self.team.first:
                    bar.show(position.step, values)
                    where = {"stage": stage.name, "step": position.step, "total": position.total}
                    took = {"seconds": round(spent.wall, 3), "cpu_seconds": spent.cpu and round(spent.cpu, 3)}
                    run.log({**where, "rate": factor, **values, **took})
                    self.tracker.log(position.total, {f"{stage.name}/{k}": v for k, v in values.items()})

                # Save
                if save:
                    position.spend(stage.name, spent)
                    self.shares.save(run, model, self.scenes.parameters, state, position)
                    saved = time.monotonic()
                if stop:
                    raise Interrupted
            *_, spent = self.team.agreed(False, False, Spent.so_far() - begun)
            position.spend(stage.name, before + spent)
        position.stage, position.step = position.stage + 1, 0
        self.shares.save(run, model, self.scenes.parameters, kept, position)


def _refuse_nonfinite(values: dict[str, float], stage: StageConfig, position: Position) -> None:
    if not all(map(math.isfinite, values.values())):
        raise UserError(
            f"stage {stage.name!r}, step {position.step}: a loss is no longer finite ({values}). The last "
            "checkpoint is good. Lower the stage's learning rates with --set and start again in a new folder."
        )


class StageLearner:
    """Takes the steps of one stage: renders, computes losses, updates parameters."""

    def __init__(
        self, model: Model, parameters: SceneParameters, stage: StageConfig, files: RowFiles | None = None,
        corrections: ViewCorrections | None = None, shortcuts: bool = True, team: Team = ALONE,
    ):  # fmt: skip
        """With `shortcuts`, the renderer mixes features, and macro planes that no longer change are computed
        once. Without, planes are composed in full at every step. Results differ only by rounding."""
        self.model, self.parameters, self.stage, self.shortcuts = model, parameters, stage, shortcuts
        self.team = team
        rates = stage.rates
        self.shared = SharedAdam(model.parts(), rates, stage.beta2)
        own = {"micro": rates.micro, "weights": rates.weights, "bias": rates.weights, "mixing": rates.mixing}
        self.own = RowAdam(parameters, own, files, stage.beta2)
        self.corrections = corrections
        self._macro: Float[Tensor, "n 3 r r g"] | None = None  # set when it no longer changes

    def state(self) -> dict[str, Tensor]:
        """Returns the optimizers' tensors by name, not copies."""
        return self.shared.state() | self.own.state()

    def freeze_by(self, epoch: int) -> None:
        """Freezes the parts that the stage freezes at this epoch or before."""
        field_epochs, weights_epochs = self.stage.field_epochs, self.stage.weights_epochs
        if field_epochs is not None and epoch >= field_epochs:
            self.shared.freeze("field")
        if weights_epochs is not None and epoch >= weights_epochs and "weights" in self.own.rates:
            self.own.freeze("weights", "bias")

    def step(
        self, batch: Batch | None, factor: float, numbers: Numbers, progress: float = 0.0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Takes one step at `factor` times the stage's learning rates, after a `progress` of the stage in
        [0, 1), which matters to corrections of views. Without a batch, shared parts learn from what the other
        processes see. Returns the objective's unweighted terms and the errors of rays before the step (see
        `terms`)."""
        if batch is None:
            self._step_shared(factor)
            return {}, None
        losses = self.stage.losses
        leaves = planes = None
        if needs_render(losses) or losses.tv:
            leaves = self.parameters.gather(batch.scenes, self.model.device)
            planes = self._planes(leaves, batch)
        if self.corrections is not None:
            batch = Corrected(self.corrections, batch, self.stage).batch
        found, errors = terms(self.model, planes, batch, losses, numbers)
        objective = total(found, losses)
        (objective if batch.share == 1 else batch.share * objective).backward()
        if batch.corrected is not None and (self.stage.rates.colors or self.stage.rates.cameras):
            batch.corrected.learn(batch.scenes, errors, factor, progress)
        if leaves is not None:
            self.own.step(batch.scenes, leaves, factor, round(len(batch.scenes) / batch.share))
        self._step_shared(factor)
        return found, errors

    def _step_shared(self, factor: float) -> None:
        self.team.sum_gradients(self.shared.parameters())
        self.shared.step(factor)

    def _planes(self, leaves: SceneParameters, batch: Batch) -> FusedPlanes:
        if not self.shortcuts:
            return self.model.compose(leaves)
        if self._macro is None and self._macro_is_constant():
            with torch.no_grad():
                device, rows = self.model.device, self.parameters
                self._macro = macro_planes(rows.weights.to(device), rows.bias.to(device), self.model.bases)
        return self.model.fuse(leaves, None if self._macro is None else self._macro[batch.scenes])

    def _macro_is_constant(self) -> bool:
        """Whether neither base planes nor weights learn, and all macro planes fit into memory."""
        size = 4 * len(self.parameters) * self.model.bases[:1].numel()
        learns = self.stage.rates.bases or "weights" in self.own.rates
        return not learns and 0 < size <= machine_memory() // 8


class Tracker:
    """Sends the scalars of `metrics.jsonl` to TensorBoard, wandb or trackio as well, or to none."""

    def __init__(self, kind: TrackerKind, run_path: Path, config: dict[str, Any]):
        self.kind, self.sink = kind, None
        options = {"project": "latentscenes", "name": run_path.name, "config": config, "resume": "allow"}
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.sink = SummaryWriter(str(run_path / "tensorboard"))
            elif kind == "wandb":
                import wandb

                # The same id for the same folder, so that a run continues after a stop
                options["id"] = hashlib.blake2b(str(run_path.resolve()).encode(), digest_size=8).hexdigest()
                self.sink = wandb.init(**options)
            elif kind == "trackio":
                import trackio

                self.sink = trackio.init(**options)
        except ImportError as error:
            raise UserError(
                f"--track {kind}: not installed ({error}). Run: pip install 'latentscenes[track]'."
            ) from None

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
