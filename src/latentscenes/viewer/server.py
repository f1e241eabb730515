"""`latentscenes view`: a viser server that shows a library in browsers, and the session of one browser.

The server renders images and sends them as JPEG. The browser moves its camera and draws other cameras on top.
"""

import contextlib
import io
import math
import os
import socket
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
import viser
from jinja2 import Template
from viser import CameraHandle, ClientHandle, NotificationHandle
from viser.transforms import SO3

from latentscenes.api import Library
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.console import bytes_text
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line, printable, tags_text
from latentscenes.viewer.guard import guarded
from latentscenes.viewer.painter import Blend, Frame, Painter, Renderer, ViewMode, ViewRequest
from latentscenes.viewer.panels import Callbacks, Datasets, Gallery, Photographs, Thumbnails

ANGLES = math.radians(25), math.radians(40)
"""Elevation and azimuth of the first camera; thumbnails use the same."""
FILLED = 0.9
"""Initial size of the sphere around the box, relative to the height of the window."""
MODES: dict[str, ViewMode] = {
    "picture": "rgb",
    "depth": "depth",
    "opacity": "opacity",
    "latent channel": "latent",
}
ABOUT = Template(
    """<div style="padding: 2px 14px 10px; overflow-wrap: anywhere">
<div style="font-size: 16px; font-weight: 600">{{name}}</div>
<div style="font-size: 13px">{{about}}</div><div style="font-size: 13px">{{blend}}</div>
<div style="font-size: 12px; opacity: 0.7">{{facts}}</div></div>""",
    autoescape=True,
)
SIMILAR = 6
"""Number of most similar scenes shown."""
JPEG_QUALITY = 88
ENDING = 2.0
"""Seconds in which browsers are disconnected when the viewer ends."""
WIDTH = 310
"""Width of the side panels, pixels."""


class _Server(viser.ViserServer):
    def request_share_url(self, verbose: bool = True) -> None:
        """Does nothing. Without this, any browser could open a tunnel to the internet."""


class Viewer:
    """A running server. Use it in a `with` block, or call `close`."""

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
            host: address to serve at; 0.0.0.0: all addresses of this machine.
            port: 0: any free port.
            data: folder of the scenes' dataset; None: the folder that the library names.
            moving, still: pixels along the shorter side of images while the camera moves and when it rests.

        Raises:
            UserError: the library is empty or damaged, `data` is no dataset, or the port is not available.
        """
        if not len(library):
            raise UserError(
                f"{library.path}: this library is empty, so there is nothing to show. "
                "Learn scenes with `latentscenes exploit`."
            )
        if not 16 <= moving <= still:
            raise UserError(
                f"--moving {moving} --still {still}: pixels; moving must be at least 16 and at most still."
            )
        library.picture_size()
        datasets = Datasets(library, data)
        check_port(host, port)
        for text in ("Queued a .* on a closed connection", r"\[viser\] .* does not match annotation"):
            warnings.filterwarnings("ignore", text)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"viser\.transforms")
        with guarded(host) as self._remark, contextlib.redirect_stdout(io.StringIO()):
            self._server = _Server(host=host, port=port, label=one_line(library.path.name), verbose=False)
        self.host, self.port = host, self._server.get_port()
        self._library, self._datasets = library, datasets
        self._renderer = Renderer(Painter(library), moving, still)
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        self._server.gui.configure_theme(show_logo=False, show_share_button=False)
        self._place_camera(library.box, 2 * math.atan(0.5 / library.folder.info.view.focal[1]))
        self._server.on_client_connect(self._connect)
        self._server.on_client_disconnect(self._disconnect)

    @property
    def url(self) -> str:
        """Address for a browser on this machine."""
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{self.port}"

    @property
    def sessions(self) -> int:
        """Number of connected browsers."""
        return len(self._sessions)

    def close(self) -> None:
        """Disconnects all browsers and ends the server."""
        self._renderer.close()
        with contextlib.redirect_stdout(io.StringIO()):
            self._server.stop()

    def __enter__(self) -> "Viewer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place_camera(self, box: Box, fov: float) -> None:
        """Sets the initial camera: a three-quarter view of the box. `fov` is vertical, radians."""
        elevation, azimuth = ANGLES
        across = math.cos(elevation)
        outward = np.array([across * math.cos(azimuth), across * math.sin(azimuth), math.sin(elevation)])
        center = np.array(box.center)
        camera = self._server.initial_camera
        camera.fov = fov
        camera.position = center + outward * float(np.linalg.norm(box.half)) / math.sin(fov / 2) / FILLED
        camera.look_at = center

    def _connect(self, client: ClientHandle) -> None:
        """Starts a session; widens the field of view in a narrow window. The browser may leave meanwhile."""
        camera, session = client.camera, None
        try:
            if 0 < camera.image_width < camera.image_height:
                camera.fov = 2 * math.atan(math.tan(camera.fov / 2) / camera.aspect)
            session = Session(client, self._library, self._renderer, self._datasets, self._library.names[0])
        except Exception as error:  # of this browser alone
            self._remark(error)
        finally:
            with self._lock:
                if session is not None:
                    self._sessions[client.client_id] = session
            if session is None or client.client_id not in self._server.get_clients():
                self._disconnect(client)

    def _disconnect(self, client: ClientHandle) -> None:
        with self._lock:
            self._sessions.pop(client.client_id, None)
        self._renderer.remove(client.client_id)


def check_port(host: str, port: int) -> None:
    """Checks that a port can be served at. Otherwise viser would choose another one, or hang. Raises a
    UserError if the port is taken or invalid, or the address is not of this machine."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be a number up to 65535; 0 chooses any free port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port}: cannot serve there ({error.strerror}). "
            "Choose another --port, 0 for any free one, or another --host."
        ) from None


def view(library: Library, host: str, port: int, data: Path | None, moving: int, still: int) -> None:
    """Serves a library until Ctrl-C; then ends the process at once if a picture takes longer than ENDING."""
    viewer = Viewer(library, host=host, port=port, data=data, moving=moving, still=still)
    opening = f"{library.path}: {counted(len(library), 'scene')} at {viewer.url} — open it in a browser; "
    with contextlib.suppress(KeyboardInterrupt):
        print(printable(f"{opening}press Ctrl-C to stop."), flush=True)
        threading.Event().wait()
    print("Ended.", flush=True)
    closing = threading.Thread(target=viewer.close, daemon=True)
    closing.start()
    closing.join(ENDING)
    os._exit(0)  # nothing is ever written; threads of viser's pool would be waited for


class Session:
    """Controls and state of one browser. Its id in the renderer is viser's client id."""

    def __init__(
        self, client: ClientHandle, library: Library, renderer: Renderer, datasets: Datasets, scene: str
    ):
        self._client, self._library, self._renderer = client, library, renderer
        self._scene, self._other, self._choosing = scene, "", False
        self._callbacks = Callbacks(client)
        text = "Reading the model and the scene."
        self._working: NotificationHandle | None = client.add_notification(
            "Drawing the first picture", text, loading=True, with_close_button=False
        )
        client.flush()  # not only after the panels are built
        renderer.add(client.client_id, self._display, self._fail)
        with client.atomic():
            self._build(datasets)
            self._photographs.show_scene(scene)
            self._describe()
        self._request()

        @client.camera.on_update
        async def _(camera: CameraHandle) -> None:
            self._photographs.camera_moved(camera.position)
            self._request()  # a mere note: all browsers share this thread

        self._find_similar()

    def _build(self, datasets: Datasets) -> None:
        gui, library, callbacks = self._client.gui, self._library, self._callbacks
        left = gui.add_panel()
        left.dock_left()
        left.set_width(WIDTH)
        with left.add_tab("Gallery"):
            self._gallery = Gallery(gui, callbacks, library, self._select)
        gui.main_panel.dock_right()
        gui.main_panel.set_width(WIDTH)
        self._about = gui.add_html("")
        self._mode = gui.add_dropdown("Show", tuple(MODES))
        self._channel = gui.add_slider(
            "Channel", 1, max(2, library.model.codec.channels), 1, 1, visible=False
        )
        self._mode.on_update(callbacks(self._change_mode))
        self._channel.on_update(callbacks(self._request))
        self._black = gui.add_checkbox("Black background", False)
        self._black.on_update(callbacks(self._request))
        planes = library.config.planes
        if planes.macro:
            with gui.add_folder("Blend"):
                self._choose = gui.add_button("Choose a second scene")
                hint = "Fraction of the second scene in the weights of the base planes."
                self._share = gui.add_slider("Share", 0.0, 1.0, 0.01, 0.5, visible=False, hint=hint)
                hint = "Blend the scenes' own planes too."
                self._micro = gui.add_checkbox("Micro planes too", False, visible=False, hint=hint)
                self._end = gui.add_button("End blending", color="gray", visible=False)
            self._choose.on_click(callbacks(self._begin_choosing))
            for control in (self._share, self._micro):
                control.on_update(callbacks(self._request))
            self._end.on_click(callbacks(self._end_blending))
            with gui.add_folder("Most alike, by weights"):
                self._similar = Thumbnails(gui, callbacks, library, SIMILAR, 3, self._select)
        with gui.add_folder("Photographs"):
            self._photographs = Photographs(
                self._client, callbacks, library, self._renderer, datasets, self._request
            )

    # Images

    def _request(self) -> None:
        """Requests the chosen image from the browser's camera."""
        self._renderer.request(self._client.client_id, self._wanted)

    def _wanted(self) -> ViewRequest:
        """Returns the image to draw now. Raises a UserError if the browser's camera is none."""
        camera = self._client.camera
        canvas = max(1, camera.image_height), max(1, camera.image_width)
        matrix = torch.from_numpy(SO3(camera.wxyz).as_matrix()).float()
        position = torch.from_numpy(camera.position).float()
        fy = 0.5 / math.tan(camera.fov / 2)
        intrinsics = torch.tensor([[fy * canvas[0] / canvas[1], fy, 0.5, 0.5]])
        pose = torch.cat([matrix, position[:, None]], 1)[None]
        if not (pose.isfinite().all() and intrinsics.isfinite().all() and fy > 0):
            raise UserError("The browser sent a camera without a valid position.")
        return ViewRequest(
            scene=self._scene,
            camera=Cameras(pose, intrinsics),
            canvas=canvas,
            mode=MODES[self._mode.value],
            channel=min(self._channel.value, self._library.model.codec.channels) - 1,
            black=self._black.value,
            blend=Blend(self._other, self._share.value, self._micro.value) if self._other else None,
            depth=self._photographs.shown,
        )

    def _display(self, frame: Frame) -> None:
        self._end_working()
        self._client.scene.set_background_image(
            frame.picture, format="jpeg", jpeg_quality=JPEG_QUALITY, depth=frame.depth
        )
        self._client.flush()

    def _fail(self, error: Exception) -> None:
        self._end_working()
        self._callbacks.show_error(error)

    def _end_working(self) -> None:
        """Removes the note of the first picture, which is there or has failed."""
        if self._working is not None:
            self._working.remove()
            self._working = None

    def _change_mode(self) -> None:
        mode = MODES[self._mode.value]
        self._channel.visible = mode == "latent" and self._library.model.codec.channels > 1
        self._black.visible = mode == "rgb"
        self._request()

    # Scenes

    def _select(self, name: str) -> None:
        """Shows the clicked scene, or blends with it. Raises a UserError if it was removed."""
        if self._choosing:
            self._other, self._choosing = name, False
            self._describe()
            self._request()
            return
        self._scene = self._library[name].name
        self._photographs.show_scene(name)
        self._describe()
        self._request()
        self._find_similar()

    def _begin_choosing(self) -> None:
        self._choosing = not self._choosing
        self._describe()

    def _end_blending(self) -> None:
        self._other, self._choosing = "", False
        self._describe()
        self._request()

    def _describe(self) -> None:
        """Updates text and controls."""
        info = self._library[self._scene].metadata
        facts = [info.origin, f"{info.precision}, {bytes_text(info.bytes)}"]
        facts += [] if info.psnr is None else [f"{info.psnr:.2f} dB"]
        blend = f"blended with {self._other}" if self._other else ""
        about, facts = tags_text(info.tags), " · ".join(facts)
        self._about.content = ABOUT.render(name=info.name, about=about, blend=blend, facts=facts)
        self._gallery.highlight(self._scene)
        if self._library.config.planes.macro:
            self._choose.label = "Now click a thumbnail …" if self._choosing else "Choose a second scene"
            for control in (self._share, self._end):
                control.visible = bool(self._other)
            self._micro.visible = bool(self._other) and self._library.config.planes.micro > 0

    def _find_similar(self) -> None:
        """Shows the scenes with the most similar weights."""
        if self._library.config.planes.macro:
            found = self._library.nearest(self._scene, SIMILAR)
            names, distances = [near.name for near in found], [f"{near.distance:.3f}" for near in found]
            self._similar.show(names, distances)
