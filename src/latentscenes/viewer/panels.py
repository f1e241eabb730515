"""The panels beside the image: the gallery of thumbnails, and the photographs scenes were learned from."""

import base64
import fnmatch
import math
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from jinja2 import Template
from torch import Tensor
from viser import CameraFrustumHandle, ClientHandle, GuiApi, GuiButtonHandle
from viser.transforms import SO3

from latentscenes.api import Library
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene, spread_evenly
from latentscenes.export.sheets import Picture, captions_of, in_row
from latentscenes.model import metrics
from latentscenes.model.model import render_images, to_uint8
from latentscenes.viewer.painter import Painter, Renderer

PAGE = 24
"""Scenes on a page of the gallery."""
GRID = Template(
    """<style>
.scenes { display: grid; gap: 6px; padding: 2px 10px 8px; }
.scenes label { cursor: pointer; border-radius: 6px; padding: 3px; text-align: center; min-width: 0; }
.scenes label:hover { background: rgba(34, 139, 230, 0.12); }
.scenes img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 4px;
  background: white; }
.scenes div { font-size: 11px; line-height: 1.25; opacity: 0.75; overflow: hidden; white-space: nowrap; }
</style><div class="scenes" style="grid-template-columns: repeat({{columns}}, minmax(0, 1fr))">
{% for button, name, short, about, picture, caption in tiles %}
<label for="{{button}}" title="{{name}}{% if about %}&#10;{{about}}{% endif %}">
<img alt="" src="{{picture}}"><div>{{short}}</div>
{% if caption %}<div>{{caption}}</div>{% endif %}</label>
{% endfor %}</div>""",
    autoescape=True,
)
NOTE = Template(
    '<div style="padding: 0 14px 7px; font-size: 12px; opacity: 0.75">{{text}}</div>', autoescape=True
)
"""A line of small text. All HTML comes from templates, which escape names and tags."""
LETTERS = 48  # of all captions in a row of the gallery
EMPTY = "data:,"
"""Address of no picture."""
LONGEST = 1024
"""Pixels of the longest side of a thumbnail that is shown: a small file may decode to a large picture."""
CAMERAS = 32
"""Maximum of cameras shown for a scene; of held-out cameras, a quarter."""
SMALL = 64
"""Pixels along the longer side of the image shown in a camera."""
LEARNED, HELD_OUT = (34, 139, 230), (245, 124, 0)
"""Colors of fitted and held-out cameras."""


class Callbacks:
    """Makes callbacks for the controls of one browser. They run one at a time.

    An action reads the current values of controls when it runs. Events that arrive while the same action
    waits are dropped, so a dragged slider does not queue a hundred actions.
    """

    def __init__(self, client: ClientHandle):
        self._client, self._running = client, threading.Lock()

    def __call__(self, action: Callable[[], None]) -> Callable[[Any], None]:
        """Returns a viser callback that runs `action`, unless the program itself changed the control."""
        waiting = threading.Lock()

        def callback(event: Any) -> None:
            if event.client_id is None or not waiting.acquire(blocking=False):
                return
            with self._running:
                waiting.release()
                try:
                    action()
                except Exception as error:  # of this browser alone
                    self.show_error(error)

        return callback

    def show_error(self, error: Exception) -> None:
        """Shows an error in the browser."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._client.add_notification("That did not work", text, color="red", auto_close_seconds=10)


class Thumbnails:
    """A grid of up to `count` scenes. A click calls `select` with the scene's name."""

    def __init__(
        self,
        gui: GuiApi,
        callbacks: Callbacks,
        library: Library,
        count: int,
        columns: int,
        select: Callable[[str], None],
    ):
        self._library, self._columns, self._select = library, columns, select
        self._names: list[str] = []
        self._grid = gui.add_html("")
        self._highlight = gui.add_html("")
        with gui.add_folder("By name", expand_by_default=False) as self._folder:
            self._buttons = [gui.add_button("", visible=False, color="gray") for _ in range(count)]
        for place, button in enumerate(self._buttons):
            button.on_click(callbacks(partial(self._clicked, place)))

    def _clicked(self, place: int) -> None:
        if place < len(self._names):
            self._select(self._names[place])

    def show(self, names: Sequence[str], captions: Sequence[str] = ()) -> None:
        """Shows up to `count` scenes, each with an optional second line of text."""
        self._names, descriptions = list(names), self._library.folder.index.descriptions()
        tiles, shorter = [], captions_of(names, LETTERS // self._columns)
        for place, button in enumerate(self._buttons):
            button.visible = place < len(names)
            if place < len(names):
                button.label = names[place]
                caption = captions[place] if captions else ""
                name, about = names[place], descriptions.get(names[place], "")
                tiles.append((element_id(button), name, shorter[name], about, self._picture(name), caption))
        self._folder.visible = bool(names)
        self._grid.content = GRID.render(columns=self._columns, tiles=tiles)

    def _picture(self, name: str) -> str:
        """Returns the address of a thumbnail; of nothing for a scene that was just removed."""
        try:
            return picture_address(self._library.thumbnail(name))
        except UserError:
            return EMPTY

    def highlight(self, name: str) -> None:
        """Frames a scene, if it is shown."""
        found = element_id(self._buttons[self._names.index(name)]) if name in self._names else None
        frame = "outline: 2px solid #228be6; background: rgba(34, 139, 230, 0.12);"
        self._highlight.content = f'<style>label[for="{found}"] {{ {frame} }}</style>' if found else ""


def picture_address(png: bytes) -> str:
    """Returns the address (data:) of a thumbnail; of nothing if it is no PNG, or its sides exceed LONGEST."""
    size = struct.unpack_from(">II", png, 16) if png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 24 else (0,)
    known = 0 < min(size) <= max(size) <= LONGEST
    return f"data:image/png;base64,{base64.b64encode(png).decode()}" if known else EMPTY


def element_id(handle: GuiButtonHandle) -> str:
    """Returns the id of a button's HTML element. Viser has no public name for it; a test clicks one."""
    return handle._impl.uuid


class Gallery:
    """The scenes whose names or tags match a search, in pages. Only the thumbnails of one page are read."""

    def __init__(self, gui: GuiApi, callbacks: Callbacks, library: Library, select: Callable[[str], None]):
        self._library, self._page, self._highlighted = library, 0, ""
        self._search = gui.add_text(
            "Search", "", hint="Part of a name or tag, or a pattern for names with * and ?"
        )
        self._step = gui.add_button_group("Page", ("previous", "next"))
        self._count = gui.add_html("")
        self._thumbnails = Thumbnails(gui, callbacks, library, PAGE, 3, select)
        self._search.on_update(callbacks(lambda: self._show(0)))
        self._step.on_click(
            callbacks(lambda: self._show(self._page + (1 if self._step.value == "next" else -1)))
        )
        self._show(0)

    def _show(self, page: int) -> None:
        descriptions = self._library.folder.index.descriptions()
        names = matching(descriptions, self._search.value)
        pages = max(1, -(-len(names) // PAGE))
        self._page = page % pages
        first = self._page * PAGE
        shown = names[first : first + PAGE]
        text = (
            f"{first + 1:,}–{first + len(shown):,} of {len(names):,}" if shown else "No name or tag matches."
        )
        self._count.content = NOTE.render(text=text)
        self._step.visible = pages > 1
        self._thumbnails.show(shown)
        self._thumbnails.highlight(self._highlighted)

    def highlight(self, name: str) -> None:
        """Frames a scene wherever it is shown."""
        self._highlighted = name
        self._thumbnails.highlight(name)


def matching(descriptions: Mapping[str, str], search: str) -> list[str]:
    """Returns names that contain `search` or whose tags do, ignoring case. With * or ?, `search` is a pattern
    for names."""
    search = search.strip().casefold()
    if any(letter in search for letter in "*?"):
        return [name for name in descriptions if fnmatch.fnmatchcase(name.casefold(), search)]
    return [name for name, about in descriptions.items() if search in f"{name}\n{about}".casefold()]


class Datasets:
    """Finds the views that a scene was learned from. All browsers share the opened datasets."""

    def __init__(self, library: Library, data: Path | None = None):
        """`data` is the folder of the scenes' dataset; None: the folders that the library names."""
        self._library, self._data = library, data
        self._opened: dict[Path, tuple[PosedImages, dict[str, Scene]]] = {}
        if data is not None:
            self._open(data)

    def find(self, name: str) -> tuple[PosedImages, Scene]:
        """Returns the dataset and the scene in it. Raises a UserError if the scene has no dataset, or the
        dataset has moved."""
        info = self._library[name].metadata
        path = self._data or (info.dataset and Path(info.dataset))
        if not path:
            raise UserError("Learned from images that were not kept.")
        if not (path / "views.json").is_file():
            raise UserError(f"The dataset is no longer at {path}. State its folder with --data FOLDER.")
        images, scenes = self._open(path)
        if info.source not in scenes:
            raise UserError(f"{path} holds no scene {info.source!r}.")
        return images, scenes[info.source]

    def _open(self, path: Path) -> tuple[PosedImages, dict[str, Scene]]:
        if path not in self._opened:
            images = PosedImages.open(path)
            self._opened[path] = images, {scene.name: scene for scene in images.scenes}
        return self._opened[path]


class Photographs:
    """The panel of photographs in one browser. Calls `changed` when their cameras appear or disappear."""

    def __init__(
        self,
        client: ClientHandle,
        callbacks: Callbacks,
        library: Library,
        renderer: Renderer,
        datasets: Datasets,
        changed: Callable[[], None],
    ):
        self._client, self._callbacks, self._library = client, callbacks, library
        self._renderer, self._datasets, self._changed = renderer, datasets, changed
        self._name = ""
        self._images: PosedImages | None = None
        self._index: list[int] = []
        """Views to choose from."""
        self._held_out: set[int] = set()
        self._frusta: dict[int, CameraFrustumHandle] = {}
        self._lock = threading.Lock()
        """Protects `_frusta`."""
        self._near = 0.0
        """Cameras closer to the viewer are hidden, since they would cover the image. World units."""
        gui = client.gui
        self._note = gui.add_html("", visible=False)
        hint = "Blue: fitted. Orange: held out. Click a camera to look through it."
        self._show = gui.add_checkbox("Show cameras", False, hint=hint)
        self._which = gui.add_slider("Photograph", 1, 2, 1, 1)
        self._pair = gui.add_image(np.full((1, 2, 3), 255, np.uint8), visible=False)
        self._show.on_update(callbacks(self._toggle))
        self._which.on_update(callbacks(self._look_through))

    @property
    def shown(self) -> bool:
        """Whether cameras are shown."""
        return bool(self._frusta)

    def show_scene(self, name: str) -> None:
        """Shows the photographs of another scene."""
        self._name, self._images, self._index = name, None, []
        try:
            self._images, scene = self._datasets.find(name)
            fitted, held_out = scene.views("fit"), scene.views("held_out")
            self._held_out = set(held_out)
            self._index = sorted({*spread_evenly(fitted, CAMERAS), *spread_evenly(held_out, CAMERAS // 4)})
            self._note.visible = False
        except UserError as error:
            self._note.content = NOTE.render(text=error)
            self._note.visible = True
        for control in (self._show, self._which):
            control.visible = len(self._index) > 1
        self._pair.visible = False
        if len(self._index) > 1:
            self._which.max = len(self._index)
            self._which.value = 1
        self._draw_frusta()

    def camera_moved(self, position: np.ndarray) -> None:
        """Hides cameras close to the viewer's position."""
        with self._lock:
            for frustum in self._frusta.values():
                frustum.visible = bool(np.linalg.norm(position - np.asarray(frustum.position)) > self._near)

    # Cameras

    def _toggle(self) -> None:
        """Shows or hides the cameras. Moves the viewer back, so that they are in sight."""
        if self._show.value:
            camera, center = self._client.camera, np.array(self._box.center)
            outward = camera.position - center
            reach = 2.2 * self._distances().max().item()
            with self._client.atomic():
                camera.position = center + outward / np.linalg.norm(outward) * reach
                camera.look_at = center
        self._draw_frusta()

    @property
    def _box(self) -> Box:
        return self._library[self._name].box

    def _distances(self) -> Float[Tensor, "n"]:
        """Returns the cameras' distances from the center of the box."""
        center = torch.tensor(self._box.center)
        return (self._images.cameras.positions[self._index] - center).norm(dim=1)

    def _draw_frusta(self) -> None:
        with self._lock:
            for frustum in self._frusta.values():
                frustum.remove()
            self._frusta = {}
        if self._show.value and self._images is not None:
            self._near = 0.5 * self._distances().median().item()
            self._frusta = {
                view: self._frustum(self._images, number, view) for number, view in enumerate(self._index)
            }
            self.camera_moved(self._client.camera.position)
        self._changed()

    def _frustum(self, images: PosedImages, number: int, view: int) -> CameraFrustumHandle:
        matrix = images.cameras.cam2world[view].double().numpy()
        fx, fy, _, _ = images.cameras.intrinsics[view].tolist()
        picture = images.rgb[view]
        step = max(1, max(picture.shape[:2]) // SMALL)
        frustum = self._client.scene.add_camera_frustum(
            f"/photographs/{view}",
            fov=2 * math.atan(0.5 / fy),
            aspect=fy / fx,
            scale=0.22 * float(np.linalg.norm(self._box.half)),
            thickness=1.5,
            thickness_units="screen",
            color=HELD_OUT if view in self._held_out else LEARNED,
            image=np.ascontiguousarray(picture[::step, ::step]),
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
        """Moves the viewer to the chosen photograph's camera and shows photograph and render side by side."""
        if self._images is None:
            return
        images, view = self._images, self._index[min(self._which.value, len(self._index)) - 1]
        self._move_to(images.cameras[torch.tensor([view])])
        job = self._renderer.run(lambda painter: compare(painter, self._name, images, view))
        picture, decibels = job.result()
        part = "held out" if view in self._held_out else "fitted"
        self._pair.image = picture
        self._pair.label = f"Photograph | render, {decibels:.1f} dB, {part}"
        self._pair.visible = True

    def _move_to(self, camera: Cameras) -> None:
        """Moves the browser's camera to another one and fits all of that camera's image into the window."""
        position, forward = camera.positions[0].double().numpy(), camera.cam2world[0, :, 2].double().numpy()
        fx, fy = camera.intrinsics[0, :2].tolist()
        center = np.array(self._box.center)
        with self._client.atomic():
            own = self._client.camera
            own.position = position
            own.look_at = position + forward * max(1e-3, float(forward @ (center - position)))
            own.fov = 2 * math.atan(max(0.5 / fy, 0.5 / fx / own.aspect))


def compare(painter: Painter, name: str, images: PosedImages, view: int) -> tuple[Picture, float]:
    """Returns a photograph and the render of its camera side by side, and the PSNR (dB)."""
    camera, truth = images.cameras[torch.tensor([view])], images.images([view])
    shown = render_images(
        painter.library.model, painter.planes(name), camera, images.size, geometry=False
    ).images
    pair = in_row([to_uint8(truth / 255)[0], to_uint8(shown)[0]])
    return pair, metrics.psnr(shown, truth.float() / 255).item()
