"""Worker processes: the one way to start them, hear of them and stop them."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from latentscenes.core.console import console
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.runtime import StopFlag

Item = TypeVar("Item")
Result = TypeVar("Result")
Pipe = connection.Connection
Task = Callable[[Pipe], None]
"""The work of a process. It sends messages as pairs of None and a message. It can be pickled: it is a
function of a module, or a functools.partial of one."""
CHECK_SECONDS = 0.2
"""Time between two checks for a stop signal."""
SAVE_SECONDS = 120.0
"""Time that workers get to save before they are killed."""


class ProcessEnded(Exception):
    """A process has ended and says no more."""

    def __init__(self, code: int | None):
        self.code = code
        """Its exit code; 0: it did all that it had to do."""


class ChildProcesses:
    """Processes that this one starts, within a block. At its end, they are asked to stop and waited for. They
    must save their progress, and return or raise `Interrupted` soon after SIGTERM. If this process dies, they
    are stopped, too."""

    def __init__(self) -> None:
        self._members: dict[Pipe, BaseProcess] = {}

    def __enter__(self) -> "ChildProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, worker in self._members.items():
            pipe.close()  # ends a worker that waits for work
            if worker.is_alive():
                worker.terminate()  # a worker at work saves and ends
        for worker in self._members.values():
            worker.join(SAVE_SECONDS)
            if worker.is_alive():
                worker.kill()

    def start(self, task: Task) -> Pipe:
        """Starts a process. Returns the pipe by which it is heard."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(task, theirs), daemon=True)
        with _ignoring_interrupts():
            process.start()
        theirs.close()  # so that the death of the worker closes the pipe
        self._members[ours] = process
        return ours

    def receive(self, pipe: Pipe) -> Any:
        """Waits for the next message of a process and returns it. Raises the error that the process sent;
        `ProcessEnded` if it has ended, or `Interrupted` if SIGTERM ended it."""
        try:
            error, message = pipe.recv()
        except (EOFError, OSError):
            raise self.end(pipe) from None
        if error is not None:
            raise error
        return message

    def end(self, pipe: Pipe) -> Exception:
        """Waits for a process whose pipe is closed. Returns how it ended, as `heard` raises it."""
        worker = self._members.pop(pipe)
        worker.join()
        pipe.close()
        return Interrupted() if worker.exitcode == -signal.SIGTERM else ProcessEnded(worker.exitcode)

    def kill(self, pipe: Pipe) -> None:
        """Ends a process that hangs. `heard` then raises `ProcessEnded`."""
        self._members[pipe].kill()


def side_by_side(
    prepare: Callable[[], Callable[[Item], Result]], items: Sequence[Item], count: int
) -> Iterator[Result]:
    """Yields results of items as they come, from `count` processes. Each process calls `prepare` once and the
    function that it returns for every item. `prepare` must be picklable: a function of a module, or a
    functools.partial of one. For the duties of its work, see `ChildProcesses`.

    Raises:
        UserError: a worker raised it, or was killed.
        Interrupted: a signal asked to stop. All workers have saved.
    """
    waiting, busy = list(items), set()
    with StopFlag() as stopped, ChildProcesses() as crew:
        pipes = [crew.start(partial(_serve, prepare)) for _ in range(min(count, len(waiting)))]
        try:
            while waiting or busy:
                for pipe in [pipe for pipe in pipes if pipe not in busy][: len(waiting)]:
                    try:
                        pipe.send(waiting.pop(0))
                    except OSError:
                        raise crew.end(pipe) from None
                    busy.add(pipe)
                if stopped:
                    raise Interrupted
                for pipe in connection.wait(busy, CHECK_SECONDS):
                    result = crew.receive(pipe)
                    busy.remove(pipe)
                    yield result
        except ProcessEnded as end:
            raise killed(end, "What was finished is kept.") from None


def killed(end: ProcessEnded, kept: str) -> UserError:
    """The error for a process that something killed."""
    return UserError(
        f"a worker process was killed (exit code {end.code}), most likely because memory ran out. {kept} Run "
        "the same command with fewer --workers to continue."
    )


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


# In the worker


def _work(task: Task, pipe: Pipe) -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    console.quiet = True  # only the parent prints
    found: Exception | None = None
    try:
        task(pipe)
    except (Interrupted, UserError) as error:
        found = error
    except Exception:
        found = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
    if found:
        with suppress(OSError):  # the parent may be gone
            pipe.send((found, None))
    os._exit(0)  # all is written; taking the interpreter apart would take 0.3 CPU seconds


def _serve(prepare: Callable[[], Callable[[Any], Any]], pipe: Pipe) -> None:
    work = prepare()
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # no more work
            return
        pipe.send((None, work(item)))


def _stop_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
