"""The panels beside the picture: the gallery of thumbnails, and the photographs that scenes were learned from."""

import base64
import fnmatch
import html
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from viser import CameraFrustumHandle, ClientHandle, GuiApi, GuiButtonHandle
from viser.transforms import SO3

from latentscenes.api import Library
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene, spread_evenly
from latentscenes.export.sheets import Picture, beside
from latentscenes.model import metrics
from latentscenes.model.model import render_images, to_uint8
from latentscenes.viewer.painter import Painter, Renderer


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


PAGE = 24
"""Scenes on a page."""
STYLE = """<style>
.scenes { display: grid; gap: 6px; padding: 2px 10px 8px; }
.scenes label { cursor: pointer; border-radius: 6px; padding: 3px; text-align: center; min-width: 0; }
.scenes label:hover { background: rgba(34, 139, 230, 0.12); }
.scenes img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 4px; background: white; }
.scenes div { font-size: 11px; line-height: 1.25; opacity: 0.75; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
</style>"""


class Thumbnails:
    """Up to `count` scenes in rows of `across`; `pick` is called with the name of the one that is clicked."""

    def __init__(
        self,
        gui: GuiApi,
        callbacks: Callbacks,
        library: Library,
        count: int,
        across: int,
        pick: Callable[[str], None],
    ):
        self._library, self._across, self._pick = library, across, pick
        self._names: list[str] = []
        self._grid = gui.add_html("")
        self._mark = gui.add_html("")
        with gui.add_folder("By name", expand_by_default=False) as self._folder:
            self._buttons = [gui.add_button("", visible=False, color="gray") for _ in range(count)]
        for place, button in enumerate(self._buttons):
            button.on_click(callbacks(partial(self._clicked, place)))

    def _clicked(self, place: int) -> None:
        if place < len(self._names):
            self._pick(self._names[place])

    def show(self, names: Sequence[str], captions: Sequence[str] = ()) -> None:
        """These scenes, at most as many as there is room for, with a second line of text each."""
        self._names = list(names)
        tiles = []
        for place, button in enumerate(self._buttons):
            button.visible = place < len(names)
            if place < len(names):
                button.label = names[place]
                tiles.append(self._tile(button, names[place], captions[place] if captions else ""))
        self._folder.visible = bool(names)
        self._grid.content = f'{STYLE}<div class="scenes" style="grid-template-columns: repeat({self._across}, minmax(0, 1fr))">{"".join(tiles)}</div>'

    def _tile(self, button: GuiButtonHandle, name: str, caption: str) -> str:
        try:
            picture = f"data:image/png;base64,{base64.b64encode(self._library.thumbnail(name)).decode()}"
        except UserError:  # removed since its name was read
            picture = "data:,"
        text, second = html.escape(name), f"<div>{html.escape(caption)}</div>" if caption else ""
        return f'<label for="{element_id(button)}" title="{text}"><img alt="" src="{picture}"><div>{text}</div>{second}</label>'

    def mark(self, name: str) -> None:
        """Put a frame around a scene, if it is here."""
        found = element_id(self._buttons[self._names.index(name)]) if name in self._names else None
        frame = "outline: 2px solid #228be6; background: rgba(34, 139, 230, 0.12);"
        self._mark.content = f'<style>label[for="{found}"] {{ {frame} }}</style>' if found else ""


def element_id(handle: GuiButtonHandle) -> str:
    """The id of a button's element in the page. viser has no public name for it; test_viewer.py clicks one."""
    return handle._impl.uuid


class Gallery:
    """All scenes of a library whose names match, a page at a time. Only the thumbnails of that page are read."""

    def __init__(self, gui: GuiApi, callbacks: Callbacks, library: Library, pick: Callable[[str], None]):
        self._library, self._page, self._marked = library, 0, ""
        self._search = gui.add_text("Search", "", hint="Part of a name, or a pattern with * and ?")
        self._turn = gui.add_button_group("Page", ("previous", "next"))
        self._count = gui.add_html("")
        self._thumbnails = Thumbnails(gui, callbacks, library, PAGE, 3, pick)
        self._search.on_update(callbacks(lambda: self._go(0)))
        self._turn.on_click(
            callbacks(lambda: self._go(self._page + (1 if self._turn.value == "next" else -1)))
        )
        self._go(0)

    def _go(self, page: int) -> None:
        names = matching(self._library.names, self._search.value)
        pages = max(1, -(-len(names) // PAGE))
        self._page = page % pages
        first = self._page * PAGE
        shown = names[first : first + PAGE]
        text = f"{first + 1:,}–{first + len(shown):,} of {len(names):,}" if shown else "No name is like that."
        self._count.content = f'<div style="padding: 0 14px 6px; font-size: 12px; opacity: 0.75">{text}</div>'
        self._turn.visible = pages > 1
        self._thumbnails.show(shown)
        self._thumbnails.mark(self._marked)

    def mark(self, name: str) -> None:
        """Put a frame around a scene where it is shown."""
        self._marked = name
        self._thumbnails.mark(name)


def matching(names: Sequence[str], wanted: str) -> list[str]:
    """Names that hold `wanted`, or match it if it has * or ?, whatever the case of letters."""
    wanted = wanted.strip().casefold()
    if any(letter in wanted for letter in "*?"):
        return [name for name in names if fnmatch.fnmatchcase(name.casefold(), wanted)]
    return [name for name in names if wanted in name.casefold()]


SHOWN = 32
"""Cameras shown of one scene, at most; of those held out a quarter as many."""
SMALL = 64
"""Pixels along the longer side of a photograph shown in its camera."""
LEARNED, HELD_OUT = (34, 139, 230), (245, 124, 0)
"""Colors of cameras."""


class Datasets:
    """Finds the views that a scene was learned from. Datasets are opened when first needed and shared by all."""

    def __init__(self, library: Library, data: Path | None = None):
        """`data`: where the scenes' dataset lies; unset: where the library says. It is opened at once."""
        self._library, self._data = library, data
        self._opened: dict[Path, tuple[PosedImages, dict[str, Scene]]] = {}
        if data is not None:
            self._open(data)

    def find(self, name: str) -> tuple[PosedImages, Scene]:
        """A scene's dataset and its place there.

        Raises:
            UserError: it has none, or that is not where it was.
        """
        info = self._library[name].metadata
        path = self._data or (info.dataset and Path(info.dataset))
        if not path:
            raise UserError("Learned from pictures that were not kept.")
        if not (path / "views.json").is_file():
            raise UserError(f"They are not at {path} any more. Say where they are: --data FOLDER.")
        views, scenes = self._open(path)
        if info.source not in scenes:
            raise UserError(f"{path} holds no scene {info.source!r}.")
        return views, scenes[info.source]

    def _open(self, path: Path) -> tuple[PosedImages, dict[str, Scene]]:
        if path not in self._opened:
            views = PosedImages.open(path)
            self._opened[path] = views, {scene.name: scene for scene in views.scenes}
        return self._opened[path]


class Photographs:
    """One browser's panel of them. `changed` is called when their cameras appear or go."""

    def __init__(
        self,
        client: ClientHandle,
        callbacks: Callbacks,
        library: Library,
        renderer: Renderer,
        datasets: Datasets,
        changed: Callable[[], None],
    ):
        self._client, self._callbacks, self._library, self._renderer, self._datasets = (
            client,
            callbacks,
            library,
            renderer,
            datasets,
        )
        self._changed = changed
        self._name = ""
        self._views: PosedImages | None = None
        self._index: list[int] = []
        """Views that can be chosen."""
        self._held_out: set[int] = set()
        self._frusta: dict[int, CameraFrustumHandle] = {}
        self._turn = threading.Lock()
        """Held while cameras are hidden, shown or taken away."""
        self._near = 0.0
        """Cameras nearer than this to who looks are not drawn; they would hide everything. World units."""
        gui = client.gui
        self._note = gui.add_html("", visible=False)
        self._show = gui.add_checkbox(
            "Show cameras", False, hint="Blue: learned from. Orange: held out. Click one to look through it."
        )
        self._which = gui.add_slider("Photograph", 1, 2, 1, 1)
        self._pair = gui.add_image(np.full((1, 2, 3), 255, np.uint8), visible=False)
        self._show.on_update(callbacks(self._toggle))
        self._which.on_update(callbacks(self._look_through))

    @property
    def shown(self) -> bool:
        """Whether cameras are in the picture."""
        return bool(self._frusta)

    def follow(self, name: str) -> None:
        """Show those of another scene."""
        self._name, self._views, self._index = name, None, []
        try:
            self._views, scene = self._datasets.find(name)
            self._held_out = set(scene.views("held_out"))
            chosen = {
                *spread_evenly(scene.views("fit"), SHOWN),
                *spread_evenly(scene.views("held_out"), SHOWN // 4),
            }
            self._index = sorted(chosen)
            self._note.visible = False
        except UserError as error:
            self._note.content = f'<div style="padding: 0 14px 8px; font-size: 12px; opacity: 0.75">{html.escape(str(error))}</div>'
            self._note.visible = True
        for control in (self._show, self._which):
            control.visible = len(self._index) > 1
        self._pair.visible = False
        if len(self._index) > 1:
            self._which.max = len(self._index)
            self._which.value = 1
        self._draw_frusta()

    def moved(self, position: np.ndarray) -> None:
        """Who looks is here now."""
        with self._turn:
            for frustum in self._frusta.values():
                frustum.visible = bool(np.linalg.norm(position - np.asarray(frustum.position)) > self._near)

    # Cameras in space

    def _toggle(self) -> None:
        if self._show.value:  # step back, so that they are in sight
            camera, center = self._client.camera, np.array(self._library.box.center)
            outward = camera.position - center
            with self._client.atomic():
                camera.position = (
                    center + outward / np.linalg.norm(outward) * 2.2 * self._distances().max().item()
                )
                camera.look_at = center
        self._draw_frusta()

    def _distances(self) -> Float[Tensor, "n"]:
        """Of the cameras from the middle of the box."""
        return (self._views.cameras.positions[self._index] - torch.tensor(self._library.box.center)).norm(
            dim=1
        )

    def _draw_frusta(self) -> None:
        with self._turn:
            for frustum in self._frusta.values():
                frustum.remove()
            self._frusta = {}
        if self._show.value and self._views is not None:
            self._near = 0.5 * self._distances().median().item()
            self._frusta = {
                view: self._frustum(self._views, number, view) for number, view in enumerate(self._index)
            }
            self.moved(self._client.camera.position)
        self._changed()

    def _frustum(self, views: PosedImages, number: int, view: int) -> CameraFrustumHandle:
        matrix, (fx, fy, _, _) = (
            views.cameras.cam2world[view].double().numpy(),
            views.cameras.intrinsics[view].tolist(),
        )
        frustum = self._client.scene.add_camera_frustum(
            f"/photographs/{view}",
            fov=2 * math.atan(0.5 / fy),
            aspect=fy / fx,
            scale=0.22 * float(np.linalg.norm(self._library.box.half)),
            thickness=1.5,
            thickness_units="screen",
            color=HELD_OUT if view in self._held_out else LEARNED,
            image=_shrunk(views.rgb[view]),
            wxyz=SO3.from_matrix(matrix[:, :3]).wxyz,
            position=matrix[:, 3],
            cast_shadow=False,
            receive_shadow=False,
        )

        def clicked() -> None:
            self._which.value = number + 1
            self._look_through()

        frustum.on_click(self._callbacks(clicked))
        return frustum

    # One photograph

    def _look_through(self) -> None:
        """Stand where the chosen photograph was taken, and show it beside what the scene shows there."""
        if self._views is None:
            return
        views, view = self._views, self._index[min(self._which.value, len(self._index)) - 1]
        self._stand(views.cameras[torch.tensor([view])])
        picture, decibels = self._renderer.run(
            lambda painter: compare(painter, self._name, views, view)
        ).result()
        part = "held out" if view in self._held_out else "learned from"
        self._pair.image = picture
        self._pair.label = f"Truth | scene, {decibels:.1f} dB, {part}"
        self._pair.visible = True

    def _stand(self, camera: Cameras) -> None:
        """Move the browser's camera to another one, so that all that is in its picture is in sight."""
        position, forward = camera.positions[0].double().numpy(), camera.cam2world[0, :, 2].double().numpy()
        fx, fy = camera.intrinsics[0, :2].tolist()
        middle = np.array(self._library.box.center)
        with self._client.atomic():
            self._client.camera.position = position
            self._client.camera.look_at = position + forward * max(1e-3, float(forward @ (middle - position)))
            self._client.camera.fov = 2 * math.atan(max(0.5 / fy, 0.5 / fx / self._client.camera.aspect))


def compare(painter: Painter, name: str, views: PosedImages, view: int) -> tuple[Picture, float]:
    """A photograph and what the scene shows there, side by side, and the PSNR (dB)."""
    camera, truth = views.cameras[torch.tensor([view])], views.images([view])
    shown = render_images(
        painter.library.model, painter.planes(name), camera, views.size, geometry=False
    ).images
    return beside([to_uint8(truth / 255)[0], to_uint8(shown)[0]]), metrics.psnr(
        shown, truth.float() / 255
    ).item()


def _shrunk(picture: Picture) -> Picture:
    """Every so many pixels of it, about SMALL along the longer side."""
    step = max(1, max(picture.shape[:2]) // SMALL)
    return np.ascontiguousarray(picture[::step, ::step])
