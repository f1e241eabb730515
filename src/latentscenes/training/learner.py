"""One step of a stage: render, compare, learn. The loop around it is in train.py; bench times the same steps."""

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.config import StageConfig
from latentscenes.core.runtime import memory
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneRows, macro_planes
from latentscenes.storage.row_files import RowFiles
from latentscenes.training.losses import Batch, needs_render, terms, total
from latentscenes.training.optim import RowAdam, SharedAdam


class Learner:
    """A stage's grip on a model and its scenes: what learns, from which losses, with fresh optimisers."""

    def __init__(self, model: Model, rows: SceneRows, stage: StageConfig, files: RowFiles | None = None):
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

    def _planes(self, leaves: SceneRows, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
        return not learns and 0 < 4 * len(self.rows) * bases[:1].numel() <= memory() // 8
