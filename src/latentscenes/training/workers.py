"""Runs work in several processes, which stop together and continue together.

Notable:
- Steps are short, so one process often uses only one core. As many processes with one thread each lose
  nothing to that, and learn scenes faster than one process with all cores.
- Workers are started by "spawn", because threads, kernels and GPU contexts do not survive a fork.
- On Ctrl-C, SIGTERM, an error or the death of one process, all stop, and each worker saves its work first. If
  the parent is killed, its workers notice, save and stop too.
- The standard library's ProcessPoolExecutor cannot do this: it has no public way to signal running workers.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from latentscenes.core.console import console
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.runtime import StopFlag

Item = TypeVar("Item")
Result = TypeVar("Result")
Prepare = Callable[[], Callable[[Item], Result]]
Workers = dict[connection.Connection, BaseProcess]
CHECK_SECONDS = 0.2
"""Time between two checks for a stop signal."""
SAVE_SECONDS = 120.0
"""Time that workers get to save before they are killed."""


def side_by_side(prepare: Prepare, items: Sequence[Item], count: int) -> Iterator[Result]:
    """Yields results of items as they come, from `count` processes. Each process calls `prepare` once and the
    function that it returns for every item. `prepare` must be picklable: a function of a module, or a
    functools.partial of one. The work must save its progress, and return or raise `Interrupted` soon after
    SIGTERM.

    Raises:
        UserError: a worker raised it, or was killed.
        Interrupted: a signal asked to stop. All workers have saved.
    """
    waiting, busy = list(items), set()
    with StopFlag() as stopped:
        workers = _start(prepare, min(count, len(waiting)))
        try:
            while waiting or busy:
                for pipe in [pipe for pipe in workers if pipe not in busy][: len(waiting)]:
                    with _alive(workers[pipe]):
                        pipe.send(waiting.pop(0))
                    busy.add(pipe)
                if stopped:
                    raise Interrupted
                for pipe in connection.wait(busy, CHECK_SECONDS):
                    with _alive(workers[pipe]):
                        error, result = pipe.recv()
                    if error is not None:
                        raise error
                    busy.remove(pipe)
                    yield result
        finally:
            _stop(workers)


def _start(prepare: Prepare, count: int) -> Workers:
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
    """Makes processes started here ignore Ctrl-C, which a terminal sends to all; the parent forwards it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _alive(worker: BaseProcess) -> Iterator[None]:
    """Turns errors of a closed pipe into the reason why the worker ended."""
    try:
        yield
    except (EOFError, OSError):
        worker.join()
        if worker.exitcode == -signal.SIGTERM:
            raise Interrupted from None
        raise UserError(
            f"a worker process was killed (exit code {worker.exitcode}), most likely because memory ran out. "
            "What was learned is saved. Run the same command with fewer --workers to continue."
        ) from None


def _stop(workers: Workers) -> None:
    """Asks all workers to stop and waits until they have."""
    for pipe, worker in workers.items():
        pipe.close()  # ends a worker that waits for work
        if worker.is_alive():
            worker.terminate()  # a worker at work saves and ends
    for worker in workers.values():
        worker.join(SAVE_SECONDS)
        if worker.is_alive():
            worker.kill()


# In the worker


def _work(prepare: Prepare, pipe: connection.Connection) -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    console.quiet = True  # only the parent prints
    try:
        work = prepare()
        while True:
            pipe.send((None, work(pipe.recv())))
    except EOFError:  # no more work
        return
    except (Interrupted, UserError) as error:
        found = error
    except Exception:
        found = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
    with suppress(OSError):  # the parent may be gone
        pipe.send((found, None))


def _stop_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
