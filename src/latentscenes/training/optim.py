"""Adam for what all scenes share, and Adam by rows for what each scene owns.

Rows keep their own step counts and moments: a scene that is not in the batch is not read, not written, and does not
drift on stale momentum (Kingma and Ba, arXiv 1412.6980, applied to each row as if it were alone).
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentscenes.core.config import Rates, StageConfig
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.kernels import native

if TYPE_CHECKING:
    from latentscenes.storage.row_files import RowFiles

BETA1 = 0.9
EPSILON = 1e-8


class RowAdam:
    """Adam over the rows of scene tables. State: `first` and `second` moments like the tables, `steps` (n,) per table.

    With `files`, the moments of micro planes lie there, and rows are kept there before they change.
    """

    def __init__(
        self,
        rows: SceneParameters,
        rates: dict[str, float],
        files: "RowFiles | None" = None,
        beta2: float = 0.999,
    ):
        self.rows, self.beta2 = rows, beta2
        self.rates = {name: rate for name, rate in rates.items() if rate and rows.tables()[name].numel()}
        tables = {name: rows.tables()[name] for name in self.rates}
        self.files = files if "micro" in tables else None
        filed = {} if self.files is None else {"micro": self.files.moments}
        self.first = {
            name: filed[name][0] if name in filed else torch.zeros_like(table)
            for name, table in tables.items()
        }
        self.second = {
            name: filed[name][1] if name in filed else torch.zeros_like(table)
            for name, table in tables.items()
        }
        self.steps = torch.zeros(len(rows), dtype=torch.int64)

    def freeze(self, *tables: str) -> None:
        """Stop learning these tables; their moments stay part of the state."""
        self.rates = {name: rate for name, rate in self.rates.items() if name not in tables}

    @torch.no_grad()
    def step(self, index: Int[Tensor, "s"], batch: SceneParameters, factor: float) -> None:
        """Update the rows at `index` (all different) with the gradients of the leaves that `gather` gave."""
        self.steps[index] += 1
        if self.files is not None:
            self.files.keep(index.tolist())
        for name, rate in self.rates.items():
            table, gradients = self.rows.tables()[name], batch.tables()[name].grad
            adam = native.adam if native.serves(table, gradients) and table.is_contiguous() else adam_in_torch
            adam(
                table,
                self.first[name],
                self.second[name],
                index,
                gradients.to(table.device),
                self.steps[index],
                rate * factor,
                (BETA1, self.beta2),
                EPSILON,
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        state = {"rows.steps": self.steps}
        for name in self.first:
            state |= {f"rows.first.{name}": self.first[name], f"rows.second.{name}": self.second[name]}
        return state


def adam_in_torch(
    table: Float[Tensor, "n *d"],
    first: Float[Tensor, "n *d"],
    second: Float[Tensor, "n *d"],
    index: Int[Tensor, "s"],
    gradients: Float[Tensor, "s *d"],
    steps: Int[Tensor, "s"],
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """One step of Adam, readable, on any device, for the rows of `table` at `index` and their moments, in place; `steps`
    counts each row's steps, this one included."""
    for row, gradient, count in zip(index.tolist(), gradients, steps.tolist(), strict=True):
        first[row].lerp_(gradient, 1 - betas[0])
        second[row].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        denominator = (second[row] / (1 - betas[1] ** count)).sqrt_().add_(epsilon)
        table[row].addcdiv_(first[row], denominator, value=-rate / (1 - betas[0] ** count))


class SharedAdam:
    """Adam over the shared parts that learn in a stage. State: moments and step count per parameter."""

    def __init__(self, parts: dict[str, list[tuple[str, nn.Parameter]]], rates: Rates, beta2: float = 0.999):
        self.names, groups = [], []
        for part, parameters in parts.items():
            rate = getattr(rates, part)
            for _, parameter in parameters:
                parameter.requires_grad_(rate > 0)
                parameter.grad = None
            if rate and parameters:
                self.names += [f"{part}.{name}" for name, _ in parameters]
                groups.append(
                    {
                        "params": [parameter for _, parameter in parameters],
                        "lr": rate,
                        "rate": rate,
                        "part": part,
                    }
                )
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
        return (
            [parameter for group in self.adam.param_groups for parameter in group["params"]]
            if self.adam
            else []
        )

    def freeze(self, part: str) -> None:
        """Stop learning one part for the rest of the stage."""
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
        """The tensors themselves, by name."""
        return {
            f"{name}.{key}": value
            for name, parameter in zip(self.names, self.parameters(), strict=True)
            for key, value in self.adam.state[parameter].items()
        }


def rate_factor(stage: StageConfig, step: int, steps_per_epoch: int) -> float:
    """What all rates of a stage are multiplied with at `step` (0 = first)."""
    if stage.schedule == "exponential":
        return stage.decay ** (step // steps_per_epoch)
    if stage.schedule == "cosine":
        progress = step / max(1, stage.epochs * steps_per_epoch)
        return stage.decay + (1 - stage.decay) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
