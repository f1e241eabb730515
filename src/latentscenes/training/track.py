"""Experiment trackers, all optional: what `metrics.jsonl` gets is also sent to TensorBoard, wandb or trackio."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from latentscenes.core.errors import UserError

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
