"""One step of a stage: render, compare, learn. The loop around it is in train.py; bench times the same steps."""

import torch
from torch import Tensor

from latentscenes.config import StageConfig
from latentscenes.losses import Batch, needs_render, terms, total
from latentscenes.model import Model
from latentscenes.optim import RowAdam, SharedAdam
from latentscenes.planes import SceneRows
from latentscenes.row_files import RowFiles


class Learner:
    """A stage's grip on a model and its scenes: what learns, from which losses, with fresh optimisers."""

    def __init__(self, model: Model, rows: SceneRows, stage: StageConfig, files: RowFiles | None = None):
        self.model, self.rows, self.stage = model, rows, stage
        rates = stage.rates
        self.shared = SharedAdam(model.parts(), rates, stage.beta2)
        own = {"micro": rates.micro, "weights": rates.weights, "bias": rates.weights, "mixing": rates.mixing}
        self.own = RowAdam(rows, own, files, stage.beta2)

    def state(self) -> dict[str, Tensor]:
        """The optimisers' tensors themselves, by name."""
        return self.shared.state() | self.own.state()

    def freeze(self, part: str) -> None:
        """Stop learning a shared part for the rest of the stage."""
        self.shared.freeze(part)

    def step(self, batch: Batch, factor: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Take one step at `factor` times the stage's rates; gives the terms of the objective before it, unweighted."""
        losses = self.stage.losses
        leaves = self.rows.gather(batch.scenes, self.model.bases.device) if needs_render(losses) or losses.tv else None
        planes = self.model.fuse(leaves) if leaves is not None else None
        mixing = leaves.mixing if leaves is not None and leaves.mixing.numel() else None
        found = terms(self.model, planes, batch, losses, generator, mixing)
        total(found, losses).backward()
        if leaves is not None:
            self.own.step(batch.scenes, leaves, factor)
        self.shared.step(factor)
        return found
