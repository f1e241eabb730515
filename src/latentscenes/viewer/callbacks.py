"""What the viewer does when somebody clicks: one thing at a time for each browser, mistakes told to who made them."""

import threading
from collections.abc import Callable
from typing import Any

from viser import ClientHandle

from latentscenes.core.errors import UserError


class Callbacks:
    """Makes callbacks for the controls of one browser.

    What a control does is given without its value: it reads the newest values when its turn comes. So a slider that is
    dragged while something else goes on is followed once, not a hundred times.
    """

    def __init__(self, client: ClientHandle):
        self._client, self._turn = client, threading.Lock()

    def __call__(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """A callback for viser that does `act`; changes of controls by the program itself are left alone."""
        waiting = threading.Lock()

        def callback(event: Any) -> None:
            if event.client_id is None or not waiting.acquire(blocking=False):
                return
            with self._turn:
                waiting.release()
                try:
                    act()
                except UserError as error:
                    self.tell(error)

        return callback

    def tell(self, error: Exception) -> None:
        """Show what went wrong in the browser."""
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._client.add_notification("That did not work", what, color="red", auto_close_seconds=10)
