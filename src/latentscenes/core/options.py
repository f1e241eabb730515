"""Options of commands that are no settings of a configuration. Loads neither torch nor numpy."""

from dataclasses import dataclass
from typing import Literal

from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError

TrackerKind = Literal["none", "tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class ExploitOptions:
    """How new scenes come into a library."""

    group: int | None = None
    """Number of scenes that are learned and committed together. Unset: as many as fit into a batch."""
    precision: StoragePrecision | None = None
    """How scenes are stored. Unset: the library's own precision, int8 for a new library."""
    stage_one: bool = True
    """Start a new library with the scenes of stage 1."""
    limit: int | None = None
    """Learn at most this many of the dataset's new scenes, in order."""
    wait: bool = True
    """If another process learns into the same library, wait for it. Without: exit with an error."""
    workers: int = 1
    """Number of processes that learn groups in parallel and share the threads. 0: one per thread, as far as
    groups and memory suffice; one on a GPU. In Python, more than one needs `if __name__ == "__main__"` in the
    script."""
    track: TrackerKind = "none"
    """Also send metrics to a tracker."""

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise UserError(f"--group {self.group}: must be at least 1.")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be at least 1, or 0 for one per core.")
