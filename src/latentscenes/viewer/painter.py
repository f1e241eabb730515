"""Images for the viewer: a scene or a blend of two, from any camera, in four modes; and the drawing thread.

- Rays are rendered in portions, so an image can be canceled. Large images need few (`adaptive_views`).
- Tri-planes and other slow results are cached for the scenes viewed last. The cache identifies a scene by its
  checksum, so changes of the library by other processes are seen.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.api import Library
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.export.sheets import Picture, color_depth, enlarge, gray
from latentscenes.model.model import RenderedImages, adaptive_views, render_images, to_uint8
from latentscenes.model.pictures import over, with_alpha
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.field import FusedPlanes

T = TypeVar("T")
ViewMode = Literal["rgb", "depth", "opacity", "latent"]

CACHED = 32
"""Entries in each cache."""
MAX_ASPECT = 3.0
"""Longest side of an image, relative to its shorter side."""
FAR_AWAY = 100.0
"""Depth of empty pixels, world units."""
PAUSE = 0.2
"""Seconds without a new request after which the image is drawn at full size."""


@dataclass(frozen=True)
class Blend:
    """Interpolation toward another scene."""

    other: str
    share: float
    """Fraction of the other scene in weights and bias, in [0, 1]."""
    micro: bool = False
    """Whether to blend micro planes too; otherwise the first scene's are used."""


@dataclass(frozen=True, eq=False)
class ViewRequest:
    """An image that a client asks for."""

    scene: str
    camera: Cameras
    """v = 1."""
    canvas: tuple[int, int]
    """Height and width of the client's canvas, pixels; upper bounds of the image's, with its aspect ratio."""
    mode: ViewMode = "rgb"
    channel: int = 0
    """Latent channel, in mode `latent`."""
    black: bool = False
    """Whether the background is black instead of white, in mode `rgb`."""
    blend: Blend | None = None
    depth: bool = False
    """Whether to return depth with the image."""


class Frame(NamedTuple):
    """An image. Depth may have fewer pixels; both fill the same rectangle."""

    picture: Picture
    depth: Float[np.ndarray, "h w"] | None
    """Distance along the camera's z axis, world units; FAR_AWAY where opacity is at most 0.5."""


class _StaleError(Exception):
    """The image is no longer wanted."""


class Painter:
    """Draws requested images. For one thread at a time."""

    def __init__(self, library: Library):
        self.library = library
        self._rows = lru_cache(CACHED)(lambda scene, checksum: library[scene].rows)
        self._planes = lru_cache(CACHED)(self._compose)
        self._channel_ranges = lru_cache(CACHED)(self._measure_channels)
        self._background = lru_cache(CACHED)(lambda *size: library.model.background(*size))

    @torch.no_grad()
    def draw(
        self, request: ViewRequest, side: int, is_stale: Callable[[], bool] = lambda: False
    ) -> Frame | None:
        """Draws an image whose shorter side has about `side` pixels. Returns None once `is_stale()` is true.
        Raises a UserError if the scene is unknown or cannot be read."""
        model = self.library.model
        size = picture_size(request.canvas, side, model.codec.downsampling)
        background = self._background(*size)
        if request.mode in ("depth", "opacity"):
            background = background.new_zeros(background.shape[0], *size)
        camera = request.camera.to(self.library.device)
        planes = self.planes(request.scene, request.blend)

        def watch() -> None:
            if is_stale():
                raise _StaleError

        try:
            view = adaptive_views(model, planes, camera, background, watch=watch)
        except _StaleError:
            return None
        # Colors for the mode
        latents, depth, opacity = view.latents, view.depth[0].cpu(), view.opacity[0].cpu()
        if request.mode == "depth":
            ends = self._depth_range(planes, request.camera)
            picture = color_depth(depth[None].numpy(), opacity[None].numpy(), ends)
        elif request.mode == "opacity":
            picture = gray(opacity[None].numpy(), (1.0, 0.0))
        elif request.mode == "rgb":
            decoded = model.decode(latents.contiguous()).float().clamp(0, 1).cpu()
            shown = RenderedImages(decoded, latents.cpu(), depth[None], opacity[None])
            picture = (
                over(with_alpha(shown, self._known(request)), "black") if request.black else to_uint8(decoded)
            )
        else:
            channel = latents[:, request.channel].float().cpu().numpy()
            ranges = self._channel_ranges(request.scene, self._checksum(request.scene))
            picture = enlarge(gray(channel, ranges[request.channel]), size)
        along = along_axis(depth, camera).where(opacity > 0.5, FAR_AWAY).numpy() if request.depth else None
        return Frame(picture[0], along)

    def _known(self, request: ViewRequest) -> bool:
        """Whether opacities say where the object is, of a scene and of what it is blended with."""
        names = [request.scene, *([request.blend.other] if request.blend else [])]
        infos = [self.library.folder.index.info(name) for name in names]
        return all(info and info.silhouettes for info in infos)

    def planes(self, scene: str, blend: Blend | None = None) -> FusedPlanes:
        """Returns the fused tri-planes of a scene or a blend."""
        return self._planes(scene, self._checksum(scene), blend, blend and self._checksum(blend.other))

    @torch.no_grad()
    def _compose(
        self, scene: str, checksum: str, blend: Blend | None, other_checksum: str | None
    ) -> FusedPlanes:
        rows = self._rows(scene, checksum)
        if blend is not None:
            rows = blended(rows, self._rows(blend.other, other_checksum), blend)
        return self.library.model.compose(rows, bounded=True)

    def _checksum(self, scene: str) -> str:
        place = self.library.folder.index.place(scene)
        if place is None:
            raise UserError(f"{self.library.path}: scene {scene!r} was removed or renamed meanwhile.")
        return place.checksum

    def _measure_channels(self, scene: str, checksum: str) -> list[tuple[float, float]]:
        """Returns for each latent channel the values to show black and white, the same from all sides."""
        library, planes = self.library, self.planes(scene)
        cameras = library[scene].orbit(4)
        shown = render_images(library.model, planes, cameras, library.size, geometry=False)
        channels = shown.latents.transpose(0, 1).flatten(1)
        some = channels[:, :: max(1, channels.shape[1] // 100_000)]
        low, high = torch.quantile(some, torch.tensor([0.005, 0.995]), dim=1).tolist()
        return list(zip(low, high, strict=True))

    def _depth_range(self, planes: FusedPlanes, camera: Cameras) -> tuple[float, float]:
        """Returns the distances of the nearest and farthest corner of the scene's box."""
        corners = self.library.model.box_of(planes).corners()
        distances = (corners - camera.positions[0]).norm(dim=1)
        return distances.min().item(), distances.max().item()


def blended(first: SceneParameters, second: SceneParameters, blend: Blend) -> SceneParameters:
    """Interpolates between the parameters of two scenes (n = 1 each)."""
    kept = () if blend.micro else ("micro", "mixing")
    others = second.tables()
    return SceneParameters(
        **{
            name: table if name in kept else torch.lerp(table, others[name], blend.share)
            for name, table in first.tables().items()
        }
    )


def along_axis(depth: Float[Tensor, "h w"], camera: Cameras) -> Float[Tensor, "h w"]:
    """Converts distances along rays to distances along the camera's z axis."""
    _, directions = camera.rays(*depth.shape)
    cosine = (directions[0] @ camera.cam2world[0, :, 2]).unflatten(0, depth.shape).cpu()
    return depth * cosine


def picture_size(canvas: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """Returns height and width of an image: multiples of `step`, with about the aspect ratio of the canvas.
    The shorter side has about `side` pixels, at most those of the canvas."""
    height, width = (max(1, pixels) for pixels in canvas)
    shorter = min(side, height, width)
    scale = shorter / min(height, width)

    def fitting(pixels: int) -> int:
        return max(step, round(min(pixels * scale, MAX_ASPECT * shorter) / step) * step)

    return fitting(height), fitting(width)


@dataclass
class _Client:
    """The state of one client of the drawing thread."""

    show: Callable[[Frame], None]
    fail: Callable[[Exception], None]
    request: Callable[[], ViewRequest] | None = None
    pending: bool = False
    """The request is not drawn yet."""
    sharpen_at: float = math.inf
    """When to draw the request at full size, on the clock of time.monotonic."""


class Renderer:
    """The drawing thread. Draws the newest request of each client in turn: first with `moving` pixels along
    the shorter side, then, after a pause, with `still` pixels."""

    def __init__(self, painter: Painter, moving: int = 128, still: int = 384):
        self._painter, self._moving, self._still = painter, moving, still
        self._clients: OrderedDict[int, _Client] = OrderedDict()
        self._jobs: deque[tuple[Callable[[Painter], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._open, self._did_job = True, False
        self._thread = threading.Thread(target=self._work, name="renderer", daemon=True)
        self._thread.start()

    def add(self, client: int, show: Callable[[Frame], None], fail: Callable[[Exception], None]) -> None:
        """Adds a client, which comes next. The drawing thread calls `show` and `fail`."""
        with self._changed:
            self._clients[client] = _Client(show, fail)
            self._clients.move_to_end(client, last=False)

    def remove(self, client: int) -> None:
        """Removes a client, if it is known."""
        with self._changed:
            self._clients.pop(client, None)

    def request(self, client: int, request: Callable[[], ViewRequest]) -> None:
        """Replaces the request of a client, if it is known. The drawing thread calls `request` when the image
        is drawn."""
        with self._changed:
            found = self._clients.get(client)
            if found is not None:
                found.request, found.pending, found.sharpen_at = request, True, time.monotonic() + PAUSE
                self._changed.notify()

    def run(self, job: Callable[[Painter], T]) -> "Future[T]":
        """Runs a function of the painter on the drawing thread."""
        future: Future[T] = Future()
        with self._changed:
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self._clients)

    def close(self) -> None:
        """Ends the thread and cancels jobs that have not begun."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()
        for _, future in self._jobs:
            future.cancel()

    # On the drawing thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._open and (task := self._next()) is None:
                    self._changed.wait(self._seconds_to_sharpen())
                if not self._open:
                    return
            task()

    def _next(self) -> Callable[[], None] | None:
        """Returns the next task: a job, a pending request, or a full-size image. Clients take turns, and jobs
        take turns with requests."""
        pending = any(client.pending for client in self._clients.values())
        self._did_job = bool(self._jobs) and not (self._did_job and pending)
        if self._did_job:
            job, future = self._jobs.popleft()
            return lambda: self._do(job, future)
        for number, client in self._clients.items():
            if client.pending:
                client.pending = False
                self._clients.move_to_end(number)
                return lambda: self._draw(client, client.request, sharp=False)
        now = time.monotonic()
        for client in self._clients.values():
            if client.sharpen_at <= now:
                client.sharpen_at = math.inf
                return lambda: self._draw(client, client.request, sharp=True)
        return None

    def _seconds_to_sharpen(self) -> float | None:
        earliest = min((client.sharpen_at for client in self._clients.values()), default=math.inf)
        return None if earliest == math.inf else max(0.0, earliest - time.monotonic())

    def _is_busy(self) -> bool:
        """Returns whether another task is more urgent than a full-size image."""
        with self._changed:
            pending = any(client.pending for client in self._clients.values())
            return not self._open or bool(self._jobs) or pending

    def _draw(self, client: _Client, request: Callable[[], ViewRequest], sharp: bool) -> None:
        """Draws a request. A canceled full-size image is tried again later; errors go to this client."""
        try:
            if not sharp:
                frame = self._painter.draw(request(), self._moving)
            else:
                frame = self._painter.draw(request(), self._still, is_stale=self._is_busy)
            if frame is not None:
                client.show(frame)
            else:
                with self._changed:
                    if client.sharpen_at == math.inf:
                        client.sharpen_at = time.monotonic() + PAUSE
        except Exception as error:
            client.fail(error)

    def _do(self, job: Callable[[Painter], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job(self._painter))
        except Exception as error:
            future.set_exception(error)
