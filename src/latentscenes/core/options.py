"""Options of commands that are no settings of a model. Loads neither torch nor numpy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentscenes.core.errors import UserError

StoragePrecision = Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3"]
"""How a library stores scenes, from exact to coarse."""
TrackerKind = Literal["none", "tensorboard", "wandb", "trackio"]
Engine = Literal["slurm", "local", "ray"]


@dataclass(frozen=True)
class ExploitOptions:
    """How new scenes come into a library."""

    group: int | None = None
    """Number of scenes that are learned and committed together. Unset: as many as fit into a batch."""
    precision: StoragePrecision | None = None
    """How scenes are stored. Unset: the library's own precision, int8 for a new library."""
    stage_one: bool = True
    """Start a new library with the scenes of stage 1."""
    scenes: int | Literal["auto", "settings"] | None = None
    """Scenes that are learned together in a step: a number; `settings`: that of the settings; `auto`: as many
    as fill the device. `auto` measures them where a library is made and writes the number into its settings;
    after that, it is the library's number, on any machine. Unset: `auto` on a GPU, otherwise `settings`."""
    limit: int | None = None
    """Learn at most this many of the dataset's new scenes, in order."""
    wait: bool = True
    """If another process learns into the same library, wait for it. Without: exit with an error."""
    workers: int = 1
    """Number of processes that learn groups in parallel and share the threads. 0: one per thread, as far as
    groups and memory suffice; one on a GPU. In Python, more than one needs `if __name__ == "__main__"` in the
    script."""
    drop_views: bool = False
    """Learn a scene again without the views that turn out odd: they disagree with the others, their cameras
    miss the object, or their masks do not match."""
    track: TrackerKind = "none"
    """Also send metrics to a tracker."""

    def fills(self, device: str) -> bool:
        """Whether steps are to fill a device of this type (`cpu`, `cuda` …)."""
        return self.scenes == "auto" or self.scenes is None and device != "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.scenes, int) and self.scenes < 1:
            raise UserError(f"--scenes {self.scenes}: must be at least 1.")
        if self.group is not None and self.group < 1:
            raise UserError(f"--group {self.group}: must be at least 1.")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be at least 1, or 0 for one per core.")


@dataclass(frozen=True)
class RankOptions:
    """How several processes, also of several machines, share the work of one command."""

    rank: str | None = None
    """Number of this process, from 0, if several share the work; each runs the same command. `auto`: as
    SLURM, torchrun or a Kubernetes Job numbers it."""
    world_size: int | None = None
    """Number of processes that share the work. With --rank auto, only a Kubernetes Job needs it: its
    completions. With --engine ray, unset: as many as the cluster has room for."""
    parts: Path | None = None
    """Folder that all processes see. Each keeps its scenes there until all parts are joined. Unset:
    the folder `parts` of the library."""
    lease: float = 60.0
    """Seconds without a sign of life after which another process takes over a process's group."""
    patience: float = 600.0
    """Seconds without any progress, such as a step, after which a process that is alive counts as hung. It
    then no longer renews its lease, so another one learns its group."""
    engine: Engine | None = None
    """The program that starts the processes. `local`: this command, on this machine; `--engine local
    --world-size 4` is `--workers 4`. `slurm`: an array of jobs, submitted by submitit. `ray`: actors of a Ray
    cluster."""
    engine_options: tuple[str, ...] = ()
    """Resources of each process, as KEY=VALUE. slurm: parameters of submitit, such as slurm_partition=gpu
    timeout_min=240 cpus_per_task=2 gpus_per_node=1. ray: options of actors, such as num_cpus=2 num_gpus=1."""
    address: str | None = None
    """With --engine ray, the cluster to connect to, such as `auto` on its nodes; unset: a new one of this
    machine."""

    def __post_init__(self) -> None:
        if self.engine is not None:
            if self.rank is not None:
                raise UserError(f"--rank {self.rank}: --engine {self.engine} numbers its processes itself.")
            if self.world_size is None and self.engine != "ray":
                raise UserError(f"--engine {self.engine}: also give --world-size, the number of processes.")
            self.parsed_options()
            self._refuse_for_local()
        elif self.engine_options or self.address is not None:
            option = "--engine-options" if self.engine_options else "--address"
            raise UserError(f"{option}: only for processes that an engine starts. Also give --engine.")
        if self.address is not None and self.engine != "ray":
            raise UserError(f"--address: only for --engine ray, not {self.engine}.")
        if self.world_size is not None and self.world_size < 1:
            raise UserError(f"--world-size {self.world_size}: must be at least 1.")
        if self.lease <= 0:
            raise UserError(f"--lease {self.lease:g}: must be more than 0 seconds.")
        if self.patience <= 0:
            raise UserError(f"--patience {self.patience:g}: must be more than 0 seconds.")
        if (
            self.rank is None
            and self.engine is None
            and (self.world_size is not None or self.parts is not None)
        ):
            option = "--world-size" if self.world_size is not None else "--parts"
            raise UserError(
                f"{option}: only for work that several processes share. Also give --rank or --engine."
            )

    def _refuse_for_local(self) -> None:
        """Refuses options that processes of one machine do not need."""
        if self.engine == "local":
            for option, default in (("parts", None), ("lease", 60.0), ("patience", 600.0)):
                if getattr(self, option) != default:
                    raise UserError(
                        f"--{option} {getattr(self, option)}: not with --engine local, whose processes write "
                        "into the library and are started again when they end. Leave it out."
                    )
            if self.engine_options:
                raise UserError("--engine-options: not with --engine local. Leave it out.")

    def parsed_options(self) -> dict[str, Any]:
        """Returns the engine's options by name. Raises a UserError if one is not KEY=VALUE."""
        import yaml

        found = {}
        for option in self.engine_options:
            key, equals, value = option.partition("=")
            try:
                found[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                equals = ""
            if not key or not equals:
                raise UserError(f"--engine-options {option}: must be KEY=VALUE, such as num_cpus=2.")
        return found
