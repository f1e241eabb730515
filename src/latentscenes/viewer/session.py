"""One browser that looks: its controls, what it has chosen, and what it therefore wishes to see."""

import html
import math

import torch
from viser import CameraHandle, ClientHandle
from viser.transforms import SO3

from latentscenes.api import Library
from latentscenes.core.cameras import Cameras
from latentscenes.core.tables import bytes_text
from latentscenes.viewer.callbacks import Callbacks
from latentscenes.viewer.gallery import Gallery, Thumbnails
from latentscenes.viewer.painter import Blend, Frame, Mode, Wish
from latentscenes.viewer.photographs import Datasets, Photographs
from latentscenes.viewer.renderer import Renderer

MODES: dict[str, Mode] = {"picture": "rgb", "depth": "depth", "opacity": "opacity", "latent channel": "latent"}
ALIKE = 6
"""Most similar scenes shown."""
JPEG_QUALITY = 88
WIDTH = 310
"""Of the panels at both sides, pixels."""


class Session:
    """Controls of one browser, and the state behind them. The renderer knows it by the number of its client."""

    def __init__(self, client: ClientHandle, library: Library, renderer: Renderer, datasets: Datasets, scene: str):
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
        self._channel = gui.add_slider("Channel", 1, max(2, library.model.codec.channels), 1, 1, visible=False)
        self._mode.on_update(callbacks(self._change_mode))
        self._channel.on_update(callbacks(self._ask))
        planes = library.config.planes
        if planes.macro:
            with gui.add_folder("Blend"):
                self._choose = gui.add_button("Choose a second scene")
                self._share = gui.add_slider("Share", 0.0, 1.0, 0.01, 0.5, visible=False, hint="Of the second scene, in the weights of the base planes.")
                self._micro = gui.add_checkbox("Micro planes too", False, visible=False, hint="Blend also what each scene owns alone.")
                self._end = gui.add_button("End blending", color="gray", visible=False)
            self._choose.on_click(callbacks(self._begin_choosing))
            self._share.on_update(callbacks(self._ask))
            self._micro.on_update(callbacks(self._ask))
            self._end.on_click(callbacks(self._end_blending))
            with gui.add_folder("Most alike, by weights"):
                self._alike = Thumbnails(gui, callbacks, library, ALIKE, 3, self._pick)
        with gui.add_folder("Photographs"):
            self._photographs = Photographs(self._client, callbacks, library, self._renderer, datasets, self._ask)

    # What is seen

    def _ask(self) -> None:
        """Wish for what is chosen, from where the browser's camera is."""
        camera = self._client.camera
        canvas = max(1, camera.image_height), max(1, camera.image_width)
        matrix = torch.from_numpy(SO3(camera.wxyz).as_matrix()).float()
        position = torch.from_numpy(camera.position).float()
        fy = 0.5 / math.tan(camera.fov / 2)
        wish = Wish(
            scene=self._scene,
            camera=Cameras(torch.cat([matrix, position[:, None]], 1)[None], torch.tensor([[fy * canvas[0] / canvas[1], fy, 0.5, 0.5]])),
            canvas=canvas,
            mode=MODES[self._mode.value],
            channel=min(self._channel.value, self._library.model.codec.channels) - 1,
            blend=Blend(self._other, self._share.value, self._micro.value) if self._other else None,
            depth=self._photographs.shown,
        )
        self._renderer.ask(self._client.client_id, wish)

    def _display(self, frame: Frame) -> None:
        self._client.scene.set_background_image(frame.picture, format="jpeg", jpeg_quality=JPEG_QUALITY, depth=frame.depth)
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
        facts = [info.origin, f"{info.precision}, {bytes_text(info.bytes)}"] + ([] if info.psnr is None else [f"{info.psnr:.2f} dB"])
        blend = f'<div style="font-size: 13px">blended with {html.escape(self._other)}</div>' if self._other else ""
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
            self._alike.show([neighbour.name for neighbour in found], [f"{neighbour.distance:.3f}" for neighbour in found])
