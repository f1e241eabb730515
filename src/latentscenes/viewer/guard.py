"""Guards of the viewer: who may connect, which content the page may load, how odd messages end.

viser starts a server of the package websockets and offers no hook for its requests. `guarded` therefore wraps
`websockets.asyncio.server.serve` while viser calls it.
"""

import asyncio
import http
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import viser
import websockets.asyncio.server as sockets
from websockets import Headers
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from latentscenes.core.names import one_line

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
    "style-src 'unsafe-inline'; img-src 'self' data: blob:; font-src data:; connect-src 'self' data: blob:; "
    "worker-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's content security policy: nothing from other servers, no scripts in attributes of elements.
viser's own script stands in the page and makes functions from text, so these are allowed; a browser never
runs script elements that are inserted as text."""
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
LARGEST_MESSAGE = 1 << 20
"""Bytes of the largest message from a browser."""
MOST_BROWSERS = 100
"""Connections at one time; one more is refused."""
BETWEEN_REMARKS = 10.0
"""Seconds in which at most one remark about odd messages is printed."""

_starting = threading.Lock()


def refusal(headers: Headers, host: str) -> str | None:
    """Returns why a request is refused by a server bound to `host`, or None.

    - Bound to this machine alone, the request's Host must be a name of it. A web site whose own name has been
      made to lead here ("DNS rebinding") sends its own.
    - A page that connects must come from this server: its Origin must be the request's Host.
    """
    names, origins = headers.get_all("Host"), headers.get_all("Origin")
    try:
        asked = urlsplit(f"//{names[0]}") if len(names) == 1 else None
        if host in LOOPBACK and (asked is None or asked.hostname not in LOOPBACK):
            return "this viewer is open to this machine alone: ask for 127.0.0.1 or localhost"
        if origins and (len(origins) > 1 or asked is None or urlsplit(origins[0]).netloc != asked.netloc):
            return "a page of another site may not connect to this viewer"
    except ValueError:
        return "Host or Origin cannot be read"
    return None


@contextmanager
def guarded(host: str) -> Iterator["Remarks"]:
    """While viser starts its server for `host` in this block, makes it refuse foreign requests (`refusal`),
    send POLICY with its page, and print one line about odd messages instead of tracebacks. Yields what prints
    that line."""
    with _starting:
        original, remarks = sockets.serve, Remarks()

        def serve(handler: Callable, *place: Any, process_request: Callable, **options: Any) -> Any:
            guard = _Guard(host, handler, process_request, remarks)
            asyncio.get_running_loop().set_exception_handler(remarks.on_task)
            silent = logging.Logger("latentscenes.viewer", logging.CRITICAL + 1)
            options |= {"max_size": LARGEST_MESSAGE, "logger": silent}
            return original(guard.handle, *place, process_request=guard.answer, **options)

        sockets.serve = serve
        try:
            yield remarks
        finally:
            sockets.serve = original


class Remarks:
    """Prints one line about odd messages, at most every BETWEEN_REMARKS seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, error: Exception | str) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + BETWEEN_REMARKS
            what = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
            text = one_line(" ".join(what.split()))[:200]
            print(
                f"latentscenes: a browser sent a message that cannot be understood ({text}).", file=sys.stderr
            )

    def on_task(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handles errors of the server's own tasks, such as those that work on a single message."""
        self(context.get("exception") or context["message"])


class _Guard:
    """Stands before viser's two functions: the one for requests and the one for connected browsers."""

    def __init__(self, host: str, handler: Callable, process_request: Callable, remark: Remarks):
        self.host, self._handler, self._process_request = host, handler, process_request
        self._remark, self._connected = remark, 0

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Returns an HTTP response, or None where a browser may connect."""
        headers = request.headers
        if (reason := refusal(headers, self.host)) is not None:
            return connection.respond(http.HTTPStatus.FORBIDDEN, f"{reason}\n")
        if headers.get("Upgrade") == "websocket":
            spoken = headers.get("Sec-WebSocket-Protocol", "")
            if f"viser-v{viser.__version__}" not in [word.strip() for word in spoken.split(",")]:
                return connection.respond(http.HTTPStatus.BAD_REQUEST, "load this page again\n")
            if self._connected >= MOST_BROWSERS:
                return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many browsers\n")
        response = self._process_request(connection, request)
        if response is not None:
            response.headers["Content-Security-Policy"] = POLICY
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Referrer-Policy"] = "no-referrer"
        return response

    async def handle(self, connection: ServerConnection) -> None:
        """Serves a connected browser until it leaves or sends anything but a message of viser's page."""
        self._connected += 1
        try:
            await self._handler(connection)
        except ConnectionClosed:
            pass
        except Exception as error:
            self._remark(error)
        finally:
            self._connected -= 1
