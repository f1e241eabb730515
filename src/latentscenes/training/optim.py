"""Adam (Kingma and Ba, arXiv 1412.6980): for shared parts, and row by row for scene parameters.

Each row has its own step count and moments, as if it were optimized alone. So scenes outside the batch are
neither read nor written, and do not drift on old momentum.
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from latentscenes.core.config import Rates, StageConfig
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.kernels import native

if TYPE_CHECKING:
    from latentscenes.storage.row_files import RowFiles

BETA1 = 0.9
EPSILON = 1e-8
FEW = 4
"""Scenes of a batch up to which Adam's ε is EPSILON for rows."""


class RowAdam:
    """Adam over the rows of scene tables. With `files`, these hold the moments of micro planes, and a copy of
    each row from before it changes."""

    def __init__(
        self,
        rows: SceneParameters,
        rates: dict[str, float],
        files: "RowFiles | None" = None,
        beta2: float = 0.999,
    ):
        self.rows, self.beta2 = rows, beta2
        self.rates = {name: rate for name, rate in rates.items() if rate and rows.tables()[name].numel()}
        self.files = files if "micro" in self.rates else None
        filed = {} if self.files is None else {"micro": self.files.moments}
        self.moments = {
            name: filed[name] if name in filed else (torch.zeros_like(table), torch.zeros_like(table))
            for name, table in rows.tables().items()
            if name in self.rates
        }
        self.steps = torch.zeros(len(rows), dtype=torch.int64)

    def freeze(self, *tables: str) -> None:
        """Stops learning these tables. Their moments stay part of the state."""
        self.rates = {name: rate for name, rate in self.rates.items() if name not in tables}

    @torch.no_grad()
    def step(self, index: Int[Tensor, "s"], batch: SceneParameters, factor: float, count: int = 0) -> None:
        """Updates the rows at `index` (all different) with the gradients of `batch`, their gathered leaves.
        `count` is the number of scenes of the whole step; 0: these.

        Losses are means over the scenes of a step, so with many scenes, gradients of each become small
        beside Adam's ε. So ε falls with their number, and rows learn the same with any.
        """
        self.steps[index] += 1
        epsilon = EPSILON * min(1.0, FEW / (count or len(index)))
        if self.files is not None:
            self.files.keep(index.tolist())
        for name, rate in self.rates.items():
            table, gradients = self.rows.tables()[name], batch.tables()[name].grad
            adam = native.adam if native.serves(table, gradients) and table.is_contiguous() else adam_in_torch
            given = table, self.moments[name], index, gradients.to(table.device), self.steps[index]
            adam(native.AdamStep(*given, rate * factor, (BETA1, self.beta2), epsilon))

    def state(self) -> dict[str, Tensor]:
        """Returns the state's tensors, not copies: per row the steps, and per table the first and second
        moments."""
        state = {"rows.steps": self.steps}
        for name, (first, second) in self.moments.items():
            state |= {f"rows.first.{name}": first, f"rows.second.{name}": second}
        return state


def adam_in_torch(step: native.AdamStep) -> None:
    """Takes one step of Adam in plain torch."""
    table, (first, second), index, gradients, steps, rate, betas, epsilon = step
    if table.device.type != "cpu":
        return adam_at_once(step)
    for row, gradient, count in zip(index.tolist(), gradients, steps.tolist(), strict=True):
        first[row].lerp_(gradient, 1 - betas[0])
        second[row].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        denominator = (second[row] / (1 - betas[1] ** count)).sqrt_().add_(epsilon)
        table[row].addcdiv_(first[row], denominator, value=-rate / (1 - betas[0] ** count))


def adam_at_once(step: native.AdamStep) -> None:
    """Computes `adam_in_torch` for all rows at once, as a GPU needs it: in few calls, with copies."""
    table, moments, index, gradients, steps, rate, betas, epsilon = step
    place, axes = index.to(table.device), (-1, *[1] * (table.dim() - 1))
    corrections = (1 - torch.tensor(betas, dtype=torch.float64)[:, None] ** steps.cpu().double()).float()
    by_first, by_second = (one.to(table.device).view(axes) for one in corrections)
    first = moments[0][place].lerp_(gradients, 1 - betas[0])
    second = moments[1][place].mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    moments[0][place], moments[1][place] = first, second
    denominator = second.div_(by_second).sqrt_().add_(epsilon)
    table.index_add_(0, place, first.div_(by_first).div_(denominator), alpha=-rate)


class SharedAdam:
    """Adam over the shared parts that learn in a stage. The others are frozen."""

    def __init__(self, parts: dict[str, list[tuple[str, nn.Parameter]]], rates: Rates, beta2: float = 0.999):
        self.names, groups = [], []
        for part, parameters in parts.items():
            rate = getattr(rates, part)
            for _, parameter in parameters:
                parameter.requires_grad_(rate > 0)
                parameter.grad = None
            if rate and parameters:
                self.names += [f"{part}.{name}" for name, _ in parameters]
                own = [parameter for _, parameter in parameters]
                groups.append({"params": own, "lr": rate, "rate": rate, "part": part})
        self.adam = (
            torch.optim.Adam(groups, betas=(BETA1, beta2), eps=EPSILON, fused=True) if groups else None
        )
        for parameter in self.parameters():
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def parameters(self) -> list[nn.Parameter]:
        groups = self.adam.param_groups if self.adam else []
        return [parameter for group in groups for parameter in group["params"]]

    def freeze(self, part: str) -> None:
        """Stops learning a part."""
        for group in self.adam.param_groups if self.adam else []:
            if group["part"] == part:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
                    parameter.grad = None

    def step(self, factor: float) -> None:
        if self.adam is None:
            return
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Returns the state's tensors, not copies: per parameter the step count and moments."""
        return {
            f"{name}.{key}": value
            for name, parameter in zip(self.names, self.parameters(), strict=True)
            for key, value in self.adam.state[parameter].items()
        }


def rate_factor(stage: StageConfig, step: int, steps_per_epoch: int) -> float:
    """Returns the factor of all learning rates of a stage at `step` (0 = first)."""
    if stage.schedule == "exponential":
        return stage.decay ** (step // steps_per_epoch)
    if stage.schedule == "cosine":
        progress = step / max(1, stage.epochs * steps_per_epoch)
        return stage.decay + (1 - stage.decay) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
