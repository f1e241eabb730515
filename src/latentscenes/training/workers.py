"""Work side by side in several processes, which stop and go on as one would.

Notable:
- Steps are short, so one process spends much of its time where only one core works. As many processes of one thread each
  lose nothing to that, and learn scenes faster than one process with all cores.
- A worker is a fresh interpreter ("spawn"): threads, kernels and GPU contexts do not survive a fork.
- Ctrl-C, a polite kill, an error or the death of one: all stop, each after saving what it has at hand. Should this process
  be killed outright, its workers notice, save and stop too.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from latentscenes.core.console import console
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.runtime import StopFlag

Item = TypeVar("Item")
Result = TypeVar("Result")
Prepare = Callable[[], Callable[[Item], Result]]
LOOK_SECONDS = 0.2
"""Time between two looks at whether to stop."""
PATIENCE_SECONDS = 120.0
"""How long workers may take to save before they are killed."""


def side_by_side(prepare: Prepare, items: Sequence[Item], count: int) -> Iterator[Result]:
    """Results of items as they come, from `count` processes. Each calls `prepare` once, which must be picklable (a function of
    a module, perhaps a functools.partial), and what it gives for every item. Calls must save what they do, and return or raise
    `Interrupted` soon after SIGTERM.

    Raises:
        UserError: what a worker raised, or a worker was killed.
        Interrupted: a signal asked to stop; all workers have saved.
    """
    waiting, busy = list(items), {}
    with StopFlag() as stopped:
        workers = _started(prepare, min(count, len(waiting)))
        try:
            while waiting or busy:
                for pipe in [pipe for pipe in workers if pipe not in busy][: len(waiting)]:
                    busy[pipe] = waiting.pop(0)
                    _send(pipe, workers[pipe], busy[pipe])
                if stopped:
                    raise Interrupted
                for pipe in connection.wait(list(busy), LOOK_SECONDS):
                    result = _received(pipe, workers[pipe])
                    del busy[pipe]
                    yield result
        finally:
            _end(workers)


Pipes = dict[connection.Connection, BaseProcess]


def _started(prepare: Prepare, count: int) -> Pipes:
    context, workers = multiprocessing.get_context("spawn"), {}
    with _ignoring_interrupts():
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(prepare, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of the worker closes the pipe
            workers[ours] = process
    return workers


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes started meanwhile do not hear Ctrl-C, which a terminal sends to all: this one passes it on."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _send(pipe: connection.Connection, worker: BaseProcess, item: object) -> None:
    try:
        pipe.send(item)
    except OSError:
        raise _died(worker) from None


def _received(pipe: connection.Connection, worker: BaseProcess) -> object:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        raise _died(worker) from None
    if kind == "refused":
        raise UserError(value)
    if kind == "stopped":
        raise Interrupted
    if kind == "failed":
        raise RuntimeError(f"a worker failed:\n{value}")
    return value


def _died(worker: BaseProcess) -> Exception:
    worker.join()
    if worker.exitcode == -signal.SIGTERM:
        return Interrupted()
    return UserError(
        f"a worker process was ended from outside (exit code {worker.exitcode}), most likely for want of memory. What was learned is kept; "
        "the same command with fewer --workers goes on."
    )


def _end(workers: Pipes) -> None:
    """Tell all to stop, and wait until they have."""
    for pipe, worker in workers.items():
        pipe.close()  # who waits for work ends
        if worker.is_alive():
            worker.terminate()  # who works saves and ends
    for worker in workers.values():
        worker.join(PATIENCE_SECONDS)
        if worker.is_alive():
            worker.kill()


# In the worker


def _work(prepare: Prepare, pipe: connection.Connection) -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    console.quiet = True  # bars and notes of several would overwrite each other; the parent tells
    try:
        work = prepare()
        while True:
            pipe.send(("done", work(pipe.recv())))
    except EOFError:  # no more work
        return
    except Interrupted:
        _tell(pipe, "stopped", None)
    except UserError as error:
        _tell(pipe, "refused", str(error))
    except Exception:
        _tell(pipe, "failed", traceback.format_exc())


def _tell(pipe: connection.Connection, kind: str, value: object) -> None:
    try:
        pipe.send((kind, value))
    except OSError:  # nobody listens any more
        return


def _stop_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
