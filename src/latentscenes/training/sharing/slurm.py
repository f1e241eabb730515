"""Ranks as an array of SLURM jobs, by the package submitit.

submitit passes the call to the jobs by pickles in a folder of its own beside the library (LIBRARY.jobs), to
which only its owner should be able to write; their output is there, too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, writing_to
from latentscenes.training.sharing.ranks import RankCall

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

DEFAULTS = {"timeout_min": 240}
MOST_STOPS = 1000
"""How often a job may run out of its time before submitit no longer queues it again."""
JOBS = ".jobs"
"""Ending of the folder of the jobs, beside the library."""


@dataclass(frozen=True)
class Resumable:
    """A rank that submitit may stop and queue again."""

    call: RankCall

    def __call__(self) -> int:
        return self.call()

    def checkpoint(self) -> "DelayedSubmission":
        """Called when SLURM is about to stop the job: what is learned lies in files already, so the same call
        goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    call: RankCall, count: int, cluster: Literal["slurm", "local", "debug"], options: dict[str, Any]
) -> "list[Job[int]]":
    """Submits `count` ranks. Returns their jobs; the result of a job is the number of groups it learned.

    Args:
        cluster: where SLURM is absent, submitit can stand in for it: `local`: processes of this machine;
            `debug`: this process, when a job is waited for.
        options: parameters of submitit's executor.

    Raises:
        UserError: submitit or SLURM is absent, or an option is none.
    """
    try:
        from submitit import AutoExecutor
    except ModuleNotFoundError:
        raise UserError('--engine: submitit is absent. Run: pip install "latentscenes[slurm]"') from None
    folder = jobs_folder(call.out)
    with writing_to(folder):
        make_folder(folder)
    try:
        again = {} if cluster == "debug" else {f"{cluster}_max_num_timeout": MOST_STOPS}
        executor = AutoExecutor(folder=folder, cluster=cluster, **again)
        executor.update_parameters(name="latentscenes", **DEFAULTS | options)
    except (NameError, TypeError, RuntimeError, ValueError) as error:  # as submitit raises them
        raise UserError(
            f"--engine {cluster}: {' '.join(str(error).split())[:300]}. Correct --engine-options, or run "
            "this where SLURM is."
        ) from None
    ranks = [Resumable(call.of(number, count)) for number in range(count)]
    try:
        return executor.submit_array(ranks)
    except (OSError, RuntimeError) as error:  # sbatch is absent or refused
        raise UserError(f"--engine {cluster}: {' '.join(str(error).split())[:300]}.") from None


def jobs_folder(out: Path) -> Path:
    """Returns the folder where submitit keeps the jobs of a library."""
    return out.absolute().with_name(out.name + JOBS)
