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
import html
import io
import math
import socket
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
import viser
from viser import CameraHandle, ClientHandle
from viser.transforms import SO3

from latentscenes.api import Library
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.console import bytes_text
from latentscenes.core.errors import UserError
from latentscenes.viewer.painter import Blend, Frame, Mode, Painter, Renderer, ViewRequest
from latentscenes.viewer.panels import Callbacks, Datasets, Gallery, Photographs, Thumbnails

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
        self,
        library: Library,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        data: Path | None = None,
        moving: int = 128,
        still: int = 384,
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
            raise UserError(
                f"{library.path}: this library is empty; there is nothing to see. Learn scenes with `latentscenes exploit`."
            )
        if not 16 <= moving <= still:
            raise UserError(
                f"--moving {moving} --still {still}: pixels; moving must be 16 at least, and still no less than moving."
            )
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
        self._place_camera(library.box, 2 * math.atan(0.5 / library.folder.info.view.focal[1]))
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
        outward = np.array(
            [
                math.cos(elevation) * math.cos(azimuth),
                math.cos(elevation) * math.sin(azimuth),
                math.sin(elevation),
            ]
        )
        center = np.array(box.center)
        camera = self._server.initial_camera
        camera.fov = fov
        camera.position = center + outward * float(np.linalg.norm(box.half)) / math.sin(fov / 2) / FILLED
        camera.look_at = center

    def _come(self, client: viser.ClientHandle) -> None:
        if (
            client.camera.aspect < 1
        ):  # a narrow window: show as much from side to side as others from top to bottom
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
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: cannot serve there ({error.strerror}). Give another --port, 0 for any free one, or another --host."
        ) from None


def view(library: Library, host: str, port: int, data: Path | None, moving: int, still: int) -> None:
    """Serve a library until Ctrl-C."""
    serving = Viewer(library, host=host, port=port, data=data, moving=moving, still=still)
    with contextlib.suppress(KeyboardInterrupt), serving as viewer:
        print(
            f"{library.path}: {len(library)} scenes at {viewer.url} — open it in a browser; Ctrl-C ends it.",
            flush=True,
        )
        threading.Event().wait()
    print("Ended.")


# One browser


MODES: dict[str, Mode] = {
    "picture": "rgb",
    "depth": "depth",
    "opacity": "opacity",
    "latent channel": "latent",
}
ALIKE = 6
"""Most similar scenes shown."""
JPEG_QUALITY = 88
WIDTH = 310
"""Of the panels at both sides, pixels."""


class Session:
    """Controls of one browser, and the state behind them. The renderer knows it by the number of its client."""

    def __init__(
        self, client: ClientHandle, library: Library, renderer: Renderer, datasets: Datasets, scene: str
    ):
        self._client, self._library, self._renderer = client, library, renderer
        self._scene, self._other, self._choosing = scene, "", False
        self._callbacks = Callbacks(client)
        renderer.attend(client.client_id, self._display, self._callbacks.tell)
        with client.atomic():
            self._build(datasets)
            self._photographs.follow(scene)
            self._describe()
        self._ask()

        @client.camera.on_update
        async def _(camera: CameraHandle) -> None:  # on the event loop, hence in order
            self._photographs.moved(camera.position)
            self._ask()

        self._find_alike()

    def _build(self, datasets: Datasets) -> None:
        gui, library, callbacks = self._client.gui, self._library, self._callbacks
        left = gui.add_panel()
        left.dock_left()
        left.set_width(WIDTH)
        with left.add_tab("Gallery"):
            self._gallery = Gallery(gui, callbacks, library, self._pick)
        gui.main_panel.dock_right()
        gui.main_panel.set_width(WIDTH)
        self._about = gui.add_html("")
        self._mode = gui.add_dropdown("Show", tuple(MODES))
        self._channel = gui.add_slider(
            "Channel", 1, max(2, library.model.codec.channels), 1, 1, visible=False
        )
        self._mode.on_update(callbacks(self._change_mode))
        self._channel.on_update(callbacks(self._ask))
        planes = library.config.planes
        if planes.macro:
            with gui.add_folder("Blend"):
                self._choose = gui.add_button("Choose a second scene")
                self._share = gui.add_slider(
                    "Share",
                    0.0,
                    1.0,
                    0.01,
                    0.5,
                    visible=False,
                    hint="Of the second scene, in the weights of the base planes.",
                )
                self._micro = gui.add_checkbox(
                    "Micro planes too", False, visible=False, hint="Blend also what each scene owns alone."
                )
                self._end = gui.add_button("End blending", color="gray", visible=False)
            self._choose.on_click(callbacks(self._begin_choosing))
            self._share.on_update(callbacks(self._ask))
            self._micro.on_update(callbacks(self._ask))
            self._end.on_click(callbacks(self._end_blending))
            with gui.add_folder("Most alike, by weights"):
                self._alike = Thumbnails(gui, callbacks, library, ALIKE, 3, self._pick)
        with gui.add_folder("Photographs"):
            self._photographs = Photographs(
                self._client, callbacks, library, self._renderer, datasets, self._ask
            )

    # What is seen

    def _ask(self) -> None:
        """Wish for what is chosen, from where the browser's camera is."""
        camera = self._client.camera
        canvas = max(1, camera.image_height), max(1, camera.image_width)
        matrix = torch.from_numpy(SO3(camera.wxyz).as_matrix()).float()
        position = torch.from_numpy(camera.position).float()
        fy = 0.5 / math.tan(camera.fov / 2)
        wish = ViewRequest(
            scene=self._scene,
            camera=Cameras(
                torch.cat([matrix, position[:, None]], 1)[None],
                torch.tensor([[fy * canvas[0] / canvas[1], fy, 0.5, 0.5]]),
            ),
            canvas=canvas,
            mode=MODES[self._mode.value],
            channel=min(self._channel.value, self._library.model.codec.channels) - 1,
            blend=Blend(self._other, self._share.value, self._micro.value) if self._other else None,
            depth=self._photographs.shown,
        )
        self._renderer.ask(self._client.client_id, wish)

    def _display(self, frame: Frame) -> None:
        self._client.scene.set_background_image(
            frame.picture, format="jpeg", jpeg_quality=JPEG_QUALITY, depth=frame.depth
        )
        self._client.flush()

    def _change_mode(self) -> None:
        self._channel.visible = MODES[self._mode.value] == "latent" and self._library.model.codec.channels > 1
        self._ask()

    # Scenes

    def _pick(self, name: str) -> None:
        """A thumbnail was clicked."""
        if self._choosing:
            self._other, self._choosing = name, False
            self._describe()
            self._ask()
            return
        self._library[name]  # it may have been removed
        self._scene = name
        self._photographs.follow(name)
        self._describe()
        self._ask()
        self._find_alike()

    def _begin_choosing(self) -> None:
        self._choosing = not self._choosing
        self._describe()

    def _end_blending(self) -> None:
        self._other, self._choosing = "", False
        self._describe()
        self._ask()

    def _describe(self) -> None:
        """Say what is chosen."""
        info = self._library[self._scene].metadata
        facts = [info.origin, f"{info.precision}, {bytes_text(info.bytes)}"] + (
            [] if info.psnr is None else [f"{info.psnr:.2f} dB"]
        )
        blend = (
            f'<div style="font-size: 13px">blended with {html.escape(self._other)}</div>'
            if self._other
            else ""
        )
        self._about.content = (
            '<div style="padding: 2px 14px 10px; overflow-wrap: anywhere">'
            f'<div style="font-size: 16px; font-weight: 600">{html.escape(info.name)}</div>{blend}'
            f'<div style="font-size: 12px; opacity: 0.7">{" · ".join(facts)}</div></div>'
        )
        self._gallery.mark(self._scene)
        if self._library.config.planes.macro:
            self._choose.label = "Now click a thumbnail …" if self._choosing else "Choose a second scene"
            for control in (self._share, self._end):
                control.visible = bool(self._other)
            self._micro.visible = bool(self._other) and self._library.config.planes.micro > 0

    def _find_alike(self) -> None:
        """Show the scenes with the nearest weights."""
        if self._library.config.planes.macro:
            found = self._library.nearest(self._scene, ALIKE)
            self._alike.show(
                [neighbor.name for neighbor in found], [f"{neighbor.distance:.3f}" for neighbor in found]
            )
