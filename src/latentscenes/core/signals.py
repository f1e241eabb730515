"""Stopping politely: a signal raises a flag, and who works looks at it between two steps."""

import signal
from types import FrameType


class StopFlag:
    """True once SIGINT or SIGTERM came in; a second one has its usual effect."""

    def __init__(self) -> None:
        self.raised = False

    def __bool__(self) -> bool:
        return self.raised

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
        signal.signal(number, self._before[number])

    def __enter__(self) -> "StopFlag":
        try:
            self._before = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are someone else's business
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
