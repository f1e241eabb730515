"""`latentscenes view`: a library of learned scenes in the browser.

    viewer_painter.py      one picture
    viewer_renderer.py     pictures for all who look, in turns, on one thread
    viewer_callbacks.py    one click at a time
    viewer_gallery.py      thumbnails
    viewer_photographs.py  what scenes were learned from
    viewer_session.py      one browser: controls and state
    viewer.py              the server

Pictures are rendered here and sent as JPEG; the browser draws cameras over them and moves its own.
"""

import contextlib
import io
import math
import socket
import threading
import warnings
from pathlib import Path

import numpy as np

from latentscenes.api import Library
from latentscenes.core.cameras import Box
from latentscenes.core.errors import UserError

try:
    import viser
except ImportError:
    raise UserError("view needs viser. Run: pip install latentscenes[viewer]") from None

from latentscenes.viewer.painter import Painter
from latentscenes.viewer.photographs import Datasets
from latentscenes.viewer.renderer import Renderer
from latentscenes.viewer.session import Session

ANGLES = math.radians(25), math.radians(40)
"""Elevation and azimuth of the first camera: those of thumbnails."""
FILLED = 0.9
"""How large the sphere around the box is at first, of what would just fit from top to bottom."""


class _Server(viser.ViserServer):
    def request_share_url(self, verbose: bool = True) -> None:
        """Would open a tunnel to the outside when any browser asks for it."""


class Viewer:
    """A running server. Use it in a `with` block, or `close` it."""

    def __init__(
        self, library: Library, *, host: str = "127.0.0.1", port: int = 8080, data: Path | None = None, moving: int = 128, still: int = 384
    ):
        """
        Args:
            host: address to listen at; 0.0.0.0 for all of this machine's.
            port: 0 for any free one.
            data: where the scenes' dataset lies, if not where the library says.
            moving, still: pixels along the shorter side of pictures while the camera moves and when it is still.

        Raises:
            UserError: the library is empty, `data` is no dataset, or the port is taken.
        """
        if not len(library):
            raise UserError(f"{library.path}: this library is empty; there is nothing to see. Learn scenes with `latentscenes exploit`.")
        if not 16 <= moving <= still:
            raise UserError(f"--moving {moving} --still {still}: pixels; moving must be 16 at least, and still no less than moving.")
        library.picture_size()  # reads the model, so that damage shows now
        datasets = Datasets(library, data)
        check_port(host, port)
        warnings.filterwarnings("ignore", "Queued a .* on a closed connection")  # browsers go at any time
        with contextlib.redirect_stdout(io.StringIO()):  # viser's own banner
            self._server = _Server(host=host, port=port, label=library.path.name, verbose=False)
        self.host, self.port = host, self._server.get_port()
        self._library, self._datasets = library, datasets
        self._renderer = Renderer(Painter(library), moving, still)
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        self._server.gui.configure_theme(show_logo=False, show_share_button=False)
        self._place_camera(library.box, 2 * math.atan(0.5 / library.store.info.view.focal[1]))
        self._server.on_client_connect(self._come)
        self._server.on_client_disconnect(self._go)

    @property
    def url(self) -> str:
        """What to open in a browser of this machine."""
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"

    @property
    def sessions(self) -> int:
        """How many browsers look."""
        return len(self._sessions)

    def close(self) -> None:
        """Stop serving, and let all browsers go."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.stop()
        self._renderer.close()

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place_camera(self, box: Box, fov: float) -> None:
        """Three-quarter view of the box; `fov` from top to bottom, radians."""
        elevation, azimuth = ANGLES
        outward = np.array([math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)])
        center = np.array(box.center)
        camera = self._server.initial_camera
        camera.fov = fov
        camera.position = center + outward * float(np.linalg.norm(box.half)) / math.sin(fov / 2) / FILLED
        camera.look_at = center

    def _come(self, client: viser.ClientHandle) -> None:
        if client.camera.aspect < 1:  # a narrow window: show as much from side to side as others from top to bottom
            client.camera.fov = 2 * math.atan(math.tan(client.camera.fov / 2) / client.camera.aspect)
        session = None
        try:
            session = Session(client, self._library, self._renderer, self._datasets, self._library.names[0])
        finally:
            with self._lock:
                if session is not None:
                    self._sessions[client.client_id] = session
            if session is None or client.client_id not in self._server.get_clients():  # gone in the meantime
                self._go(client)

    def _go(self, client: viser.ClientHandle) -> None:
        with self._lock:
            self._sessions.pop(client.client_id, None)
        self._renderer.forget(client.client_id)


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken or none, or an address that is not this machine's; viser would try the next ones, or hang."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: ports are numbers up to 65535; 0 takes any free one.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot serve there ({error.strerror}). Give another --port, 0 for any free one, or another --host.") from None


def view(library: Library, host: str, port: int, data: Path | None, moving: int, still: int) -> None:
    """Serve a library until Ctrl-C."""
    serving = Viewer(library, host=host, port=port, data=data, moving=moving, still=still)
    with contextlib.suppress(KeyboardInterrupt), serving as viewer:
        print(f"{library.path}: {len(library)} scenes at {viewer.url} — open it in a browser; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    print("Ended.")
