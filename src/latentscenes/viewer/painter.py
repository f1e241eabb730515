"""One picture for the viewer: a scene of a library, or a blend of two, from any camera, in one of four modes.

Notable:
- Rays that miss the box are not marched, the others in portions, so that a long picture can be given up half way.
- Tri-planes and what else is dear to make are kept for the scenes looked at last. A scene is known by its checksum, so
  what others change in the library is seen.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.api import Library
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.export.sheets import Picture, color_depth, enlarge, gray
from latentscenes.model.model import LatentView, Model, render_images, to_uint8
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.field import FusedPlanes
from latentscenes.rendering.render import camera_rays

T = TypeVar("T")
Mode = Literal["rgb", "depth", "opacity", "latent"]

RAYS = 16384
"""Marched before asking again whether to give up."""
KEPT = 32
"""Scenes whose tri-planes are kept, and as many of everything else."""
LONGEST = 3.0
"""A picture's longer side is at most so many times its shorter one, however narrow the window."""
FAR_AWAY = 100.0
"""Depth given to pixels that show nothing, world units."""


@dataclass(frozen=True)
class Blend:
    """Part of another scene."""

    other: str
    share: float
    """Of the other one in the weights over base planes, and in the bias; in [0, 1]."""
    micro: bool = False
    """Blend micro planes too, which otherwise stay those of the first scene."""


@dataclass(frozen=True, eq=False)
class ViewRequest:
    """What somebody wants to see."""

    scene: str
    camera: Cameras
    """v = 1."""
    canvas: tuple[int, int]
    """Height and width of where it is shown, pixels; they bound the picture's size and give its shape."""
    mode: Mode = "rgb"
    channel: int = 0
    """Of the latent, in mode `latent`."""
    blend: Blend | None = None
    depth: bool = False
    """Whether depth is wanted beside the picture."""


class Frame(NamedTuple):
    """What is shown. Depth may be coarser than the picture; both fill the same rectangle."""

    picture: Picture
    depth: Float[np.ndarray, "h w"] | None
    """Along the camera's z axis, world units; FAR_AWAY where nothing solid is."""


class Painter:
    """Draws what is wished for. One thread at a time."""

    def __init__(self, library: Library):
        self.library = library
        self._rows: OrderedDict[object, SceneParameters] = OrderedDict()
        self._planes: OrderedDict[object, FusedPlanes] = OrderedDict()
        self._ends: OrderedDict[object, list[tuple[float, float]]] = OrderedDict()
        self._backgrounds: OrderedDict[object, Tensor] = OrderedDict()

    @torch.no_grad()
    def draw(
        self, wish: ViewRequest, side: int, is_stale: Callable[[], bool] = lambda: False
    ) -> Frame | None:
        """A picture whose shorter side is about `side` pixels, or None once `is_stale` says so.

        Raises:
            UserError: the library has no such scene, or it cannot be read.
        """
        model = self.library.model
        height, width = picture_size(wish.canvas, side, model.codec.downsampling)
        background = self._background(height, width)
        if wish.mode in ("depth", "opacity"):  # marched for every pixel
            background = background.new_zeros(background.shape[0], height, width)
        camera = wish.camera.to(self.library.device)
        view = march(model, self.planes(wish.scene, wish.blend), camera, background, is_stale)
        if view is None:
            return None
        depth, opacity = (
            value[0].unflatten(0, background.shape[1:]).cpu() for value in (view.depth, view.opacity)
        )
        along = along_axis(depth, camera).where(opacity > 0.5, FAR_AWAY).numpy() if wish.depth else None
        return Frame(self._picture(wish, view, depth, opacity, background, (height, width)), along)

    def _picture(
        self,
        wish: ViewRequest,
        view: LatentView,
        depth: Float[Tensor, "a b"],
        opacity: Float[Tensor, "a b"],
        background: Tensor,
        size: tuple[int, int],
    ) -> Picture:
        if wish.mode == "depth":
            return color_depth(depth[None].numpy(), opacity[None].numpy(), self._depth_ends(wish.camera))[0]
        if wish.mode == "opacity":
            return gray(opacity[None].numpy(), (1.0, 0.0))[0]
        latents = view.image(*background.shape[1:])
        if wish.mode == "rgb":
            return to_uint8(self.library.model.decode(latents).float())[0]
        return enlarge(
            gray(
                latents[:, wish.channel].float().cpu().numpy(), self._channel_ends(wish.scene)[wish.channel]
            ),
            size,
        )[0]

    # What is kept

    def planes(self, scene: str, blend: Blend | None = None) -> FusedPlanes:
        """Fused tri-planes of a scene or a blend."""
        key = (self._mark(scene), blend and (self._mark(blend.other), blend.share, blend.micro))

        def compose() -> FusedPlanes:
            rows = self.rows(scene)
            if blend is not None:
                rows = blended(rows, self.rows(blend.other), blend)
            with torch.no_grad():
                return self.library.model.compose(rows)

        return _kept(self._planes, key, compose)

    def rows(self, scene: str) -> SceneParameters:
        """What a scene owns (n = 1)."""
        return _kept(self._rows, self._mark(scene), lambda: self.library[scene].rows)

    def _mark(self, scene: str) -> str:
        """What tells a stored scene from every other one, and from itself as it was before."""
        place = self.library.folder.index.place(scene)
        if place is None:
            raise UserError(f"{self.library.path}: scene {scene!r} was removed or renamed meanwhile.")
        return place.checksum

    def _channel_ends(self, scene: str) -> list[tuple[float, float]]:
        """For each latent channel of a scene what is shown black and what white: the same from every side."""

        def measure() -> list[tuple[float, float]]:
            shown = render_images(
                self.library.model,
                self.planes(scene),
                self.library.orbit(4),
                self.library.size,
                geometry=False,
            )
            channels = shown.latents.transpose(0, 1).flatten(1)
            low, high = torch.quantile(
                channels[:, :: max(1, channels.shape[1] // 100_000)], torch.tensor([0.005, 0.995]), dim=1
            ).tolist()
            return list(zip(low, high, strict=True))

        return _kept(self._ends, self._mark(scene), measure)

    def _background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        return _kept(self._backgrounds, (height, width), lambda: self.library.model.background(height, width))

    def _depth_ends(self, camera: Cameras) -> tuple[float, float]:
        """Nearest and farthest corner of the scene box."""
        distances = (self.library.box.corners() - camera.positions[0]).norm(dim=1)
        return distances.min().item(), distances.max().item()


@torch.no_grad()
def march(
    model: Model,
    planes: FusedPlanes,
    camera: Cameras,
    background: Float[Tensor, "c h w"],
    is_stale: Callable[[], bool] = lambda: False,
) -> LatentView | None:
    """`model.render` for one camera, some rays at a time and only those that meet the box; None once `is_stale` says so."""
    height, width = background.shape[1:]
    bounds = None if model.config.render.near is None else (model.config.render.near, model.config.render.far)
    rays = camera_rays(camera, 1, height, width, model.box, bounds)
    latents, opacity = background.flatten(1).t()[None].clone(), torch.zeros_like(rays.near)
    whole = LatentView(latents, latents.new_ones(*opacity.shape, 0), rays.far.clone(), opacity)
    for some in (rays.far > rays.near)[0].nonzero()[:, 0].split(RAYS):
        if is_stale():
            return None
        part = model.render(planes, camera, background, pixels=some[None])
        whole.latents[:, some], whole.depth[:, some], whole.opacity[:, some] = (
            part.latents,
            part.depth,
            part.opacity,
        )
    return whole


def blended(first: SceneParameters, second: SceneParameters, blend: Blend) -> SceneParameters:
    """Rows between those of two scenes (n = 1 each)."""

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return torch.lerp(a, b, blend.share)

    kept = () if blend.micro else ("micro", "mixing")
    return SceneParameters(
        **{
            name: table if name in kept else mix(table, second.tables()[name])
            for name, table in first.tables().items()
        }
    )


def along_axis(depth: Float[Tensor, "h w"], camera: Cameras) -> Float[Tensor, "h w"]:
    """Distances along rays as distances along the camera's z axis."""
    _, directions = camera.rays(*depth.shape)
    cosine = (directions[0] @ camera.cam2world[0, :, 2]).unflatten(0, depth.shape).cpu()
    return depth * cosine


def picture_size(canvas: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """Height and width, multiples of `step`: the shorter about `side`, or that of the canvas if that is less; the other
    as the canvas is shaped."""
    height, width = (max(1, pixels) for pixels in canvas)
    shorter = min(side, height, width)
    scale = shorter / min(height, width)

    def fitting(pixels: int) -> int:
        return max(step, round(min(pixels * scale, LONGEST * shorter) / step) * step)

    return fitting(height), fitting(width)


def _kept(store: OrderedDict[object, T], key: object, make: Callable[[], T]) -> T:
    """What is kept under a key; made, if it is not there, in the place of what was not asked for longest."""
    if key not in store:
        store[key] = make()
        if len(store) > KEPT:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]


# The thread that draws


T = TypeVar("T")

PAUSE = 0.2
"""Seconds without a new wish after which somebody counts as still."""


@dataclass
class _Client:
    show: Callable[[Frame], None]
    fail: Callable[[Exception], None]
    wish: ViewRequest | None = None
    waits: bool = False
    """The wish is not drawn yet."""
    sharpen_at: float = math.inf
    """When to draw it again, larger; on the clock of time.monotonic."""


class Renderer:
    """Draws with `painter`: pictures of `moving` pixels along their shorter side, then of `still` pixels."""

    def __init__(self, painter: Painter, moving: int = 128, still: int = 384):
        self._painter, self._moving, self._still = painter, moving, still
        self._watchers: OrderedDict[int, _Client] = OrderedDict()
        self._jobs: deque[tuple[Callable[[Painter], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="renderer", daemon=True)
        self._thread.start()

    def attend(self, watcher: int, show: Callable[[Frame], None], fail: Callable[[Exception], None]) -> None:
        """Somebody comes. `show` and `fail` are called on the renderer's thread."""
        with self._changed:
            self._watchers[watcher] = _Client(show, fail)

    def forget(self, watcher: int) -> None:
        """Somebody has gone, perhaps before having come."""
        with self._changed:
            self._watchers.pop(watcher, None)

    def ask(self, watcher: int, wish: ViewRequest) -> None:
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
        """End the thread; jobs not begun are canceled."""
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
            return (
                not self._open
                or bool(self._jobs)
                or any(watcher.waits for watcher in self._watchers.values())
            )

    def _draw(self, watcher: _Client, wish: ViewRequest, sharp: bool) -> None:
        try:
            if not sharp:
                frame = self._painter.draw(wish, self._moving)
            else:
                frame = self._painter.draw(wish, self._still, is_stale=self._somebody_waits)
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
