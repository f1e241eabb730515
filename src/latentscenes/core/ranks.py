"""Which of several processes this one is: by options, or by the program that started it. Loads neither torch
nor numpy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from latentscenes.core.errors import UserError

AUTO = "auto"
Engine = Literal["slurm", "local", "ray"]


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


@dataclass(frozen=True)
class Rank:
    """One of several processes."""

    number: int
    count: int
    source: str
    """Where both numbers come from, for people."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.number < self.count:
            raise UserError(
                f"{self.source}: rank {self.number} of {self.count}. Ranks count from 0 to world size − 1."
            )


def chosen_rank(options: RankOptions, environment: Mapping[str, str] = os.environ) -> Rank:
    """Returns the rank that the options state, or with `auto` the one in the environment.

    Raises:
        UserError: a number is absent or impossible.
    """
    if options.rank == AUTO:
        return _from_environment(environment, options.world_size)
    number = _integer(options.rank, "--rank", "Give a number from 0, or auto")
    if options.world_size is None:
        raise UserError(f"--rank {number}: also give --world-size, the number of all processes.")
    return Rank(number, options.world_size, "--rank and --world-size")


def _from_environment(environment: Mapping[str, str], count: int | None) -> Rank:
    def number(name: str) -> int:
        return _integer(environment.get(name), name, "It must be a whole number")

    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Rank(number("RANK"), number("WORLD_SIZE"), "RANK and WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        # Each task of an array may itself be several processes of srun
        tasks = number("SLURM_NTASKS") if "SLURM_NTASKS" in environment else 1
        inner = number("SLURM_PROCID") if tasks > 1 and "SLURM_PROCID" in environment else 0
        first = number("SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
        step = number("SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
        task = (number("SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
        used = "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT"
        used += ", SLURM_PROCID and SLURM_NTASKS" if tasks > 1 else ""
        return Rank(task * tasks + inner, number("SLURM_ARRAY_TASK_COUNT") * tasks, used)
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        return Rank(number("SLURM_PROCID"), number("SLURM_NTASKS"), "SLURM_PROCID and SLURM_NTASKS")
    if "JOB_COMPLETION_INDEX" in environment:
        if count is None:
            raise UserError(
                "--rank auto: JOB_COMPLETION_INDEX is set, but Kubernetes does not say how many there are. "
                "Also give --world-size, the job's completions."
            )
        return Rank(number("JOB_COMPLETION_INDEX"), count, "JOB_COMPLETION_INDEX and --world-size")
    raise UserError(
        "--rank auto: none of RANK and WORLD_SIZE (torchrun), SLURM_ARRAY_TASK_ID, SLURM_PROCID (SLURM), "
        "JOB_COMPLETION_INDEX (Kubernetes) is set. Give --rank and --world-size."
    )


def _integer(text: str | None, name: str, remedy: str) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"{name} {text}: no whole number. {remedy}.") from None
