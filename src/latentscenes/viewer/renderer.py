"""One thread that draws for all who look: the newest wish of each, in turns.

Notable:
- Who moves is drawn small at once. Who has been still for a while is drawn again, larger, when nobody moves; that is
  given up as soon as somebody does.
- A wish that was not drawn before the next came is never drawn, so nobody lags behind, however many look.
- What fails for one is told to that one; the thread goes on.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from latentscenes.viewer.painter import Frame, Painter, Wish

T = TypeVar("T")

PAUSE = 0.2
"""Seconds without a new wish after which somebody counts as still."""


@dataclass
class _Watcher:
    show: Callable[[Frame], None]
    fail: Callable[[Exception], None]
    wish: Wish | None = None
    waits: bool = False
    """The wish is not drawn yet."""
    sharpen_at: float = math.inf
    """When to draw it again, larger; on the clock of time.monotonic."""


class Renderer:
    """Draws with `painter`: pictures of `moving` pixels along their shorter side, then of `still` pixels."""

    def __init__(self, painter: Painter, moving: int = 128, still: int = 384):
        self._painter, self._moving, self._still = painter, moving, still
        self._watchers: OrderedDict[int, _Watcher] = OrderedDict()
        self._jobs: deque[tuple[Callable[[Painter], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="renderer", daemon=True)
        self._thread.start()

    def attend(self, watcher: int, show: Callable[[Frame], None], fail: Callable[[Exception], None]) -> None:
        """Somebody comes. `show` and `fail` are called on the renderer's thread."""
        with self._changed:
            self._watchers[watcher] = _Watcher(show, fail)

    def forget(self, watcher: int) -> None:
        """Somebody has gone, perhaps before having come."""
        with self._changed:
            self._watchers.pop(watcher, None)

    def ask(self, watcher: int, wish: Wish) -> None:
        """What somebody wants to see now, in the place of all that they wanted before."""
        with self._changed:
            found = self._watchers.get(watcher)
            if found is not None:
                found.wish, found.waits, found.sharpen_at = wish, True, time.monotonic() + PAUSE
                self._changed.notify()

    def run(self, job: Callable[[Painter], T]) -> "Future[T]":
        """Something else to be done with the painter, on its thread."""
        future: Future[T] = Future()
        with self._changed:
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    @property
    def watchers(self) -> int:
        """How many look."""
        return len(self._watchers)

    def close(self) -> None:
        """End the thread; jobs not begun are cancelled."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()
        for _, future in self._jobs:
            future.cancel()

    # On the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._open and (task := self._next()) is None:
                    self._changed.wait(self._seconds_to_sharpen())
                if not self._open:
                    return
            task()

    def _next(self) -> Callable[[], None] | None:
        """What to do now, if anything."""
        if self._jobs:
            job, future = self._jobs.popleft()
            return lambda: self._do(job, future)
        for number, watcher in self._watchers.items():
            if watcher.waits:
                watcher.waits = False
                self._watchers.move_to_end(number)  # the others come first next time
                return lambda: self._draw(watcher, watcher.wish, sharp=False)
        now = time.monotonic()
        for watcher in self._watchers.values():
            if watcher.sharpen_at <= now:
                watcher.sharpen_at = math.inf
                return lambda: self._draw(watcher, watcher.wish, sharp=True)
        return None

    def _seconds_to_sharpen(self) -> float | None:
        earliest = min((watcher.sharpen_at for watcher in self._watchers.values()), default=math.inf)
        return None if earliest == math.inf else max(0.0, earliest - time.monotonic())

    def _somebody_waits(self) -> bool:
        with self._changed:
            return not self._open or bool(self._jobs) or any(watcher.waits for watcher in self._watchers.values())

    def _draw(self, watcher: _Watcher, wish: Wish, sharp: bool) -> None:
        try:
            if not sharp:
                frame = self._painter.draw(wish, self._moving)
            else:
                frame = self._painter.draw(wish, self._still, give_up=self._somebody_waits)
            if frame is not None:
                watcher.show(frame)
            else:
                with self._changed:
                    if watcher.sharpen_at == math.inf:
                        watcher.sharpen_at = time.monotonic() + PAUSE
        except Exception as error:  # noqa: BLE001 — one who looks must not end it for the others
            watcher.fail(error)

    def _do(self, job: Callable[[Painter], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job(self._painter))
        except Exception as error:  # noqa: BLE001 — belongs to who asked
            future.set_exception(error)
