"""Which of several processes this one is: by options, or by the program that started it. Loads neither torch
nor numpy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from latentscenes.core.errors import UserError
from latentscenes.core.options import RankOptions

AUTO = "auto"


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
