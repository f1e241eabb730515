"""Pictures of triangle soups by ray casting (Intel Embree): textured, two-sided, over white, anti-aliased.

Notable:
- Rays come from `Cameras.rays` on a grid finer than the image, so pictures and cameras cannot disagree.
- Light depends on the surface alone (ambient and directional, no highlights): an object looks the same from
  everywhere, which is what a field without view direction can learn.
- A transparent or translucent surface lets its ray go on: up to `LAYERS` surfaces are composited front to back.
- Colors are multiplied and averaged as stored (sRGB values), as every later resizing of the pictures does too.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Float32, Int, UInt8

from latentscenes.core.cameras import Box, Cameras, upper_hemisphere
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import parse_box

LAYERS = 12
"""Most surfaces one ray is followed through; all but the last let light pass."""
STEP = 1e-4
"""How far behind a surface its ray goes on, in world units (objects have a bounding-box diagonal of 1)."""
OPAQUE = -1.0
"""`TriangleSoup.cutoff` of a surface whose texture's alpha means nothing."""
BLEND = -2.0
"""`TriangleSoup.cutoff` of a surface that is as opaque as its alpha says."""


@dataclass(frozen=True)
class Lights:
    """Light that comes from the world, not from the camera. White turned fully to the sky is about 1."""

    ambient: float = 0.52
    """What every surface gets."""
    sky: float = 0.12
    """More for surfaces that look up, less for those that look down."""
    directions: tuple[tuple[float, float, float], ...] = ((0.45, 0.55, 0.75), (-0.7, -0.5, 0.45))
    """Toward the lamps, of any length."""
    strengths: tuple[float, ...] = (0.36, 0.22)

    def shade(self, normals: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n"]:
        """Light that arrives at surfaces with these unit normals."""
        light = self.ambient + self.sky * normals[:, 2]
        for direction, strength in zip(self.directions, self.strengths):
            toward = np.asarray(direction, np.float32) / np.float32(np.linalg.norm(direction))
            light += np.float32(strength) * np.maximum(normals @ toward, 0)
        return light


@dataclass(frozen=True)
class TriangleSoup:
    """f triangles that share nothing, and k textures. Corner colors multiply texture colors."""

    corners: Float32[np.ndarray, "f 3 3"]
    """Positions: triangle, corner, xyz."""
    normals: Float32[np.ndarray, "f 3 3"]
    """Unit normals at the corners, interpolated between. Which side they point to does not matter."""
    uv: Float32[np.ndarray, "f 3 2"]
    """Texture coordinates; (0, 0) is the texture's lower left corner, and the texture repeats."""
    colors: Float32[np.ndarray, "f 3 4"]
    """RGB and alpha in [0, 1] at the corners."""
    texture: Int[np.ndarray, "f"]
    """Which texture each triangle wears."""
    cutoff: Float32[np.ndarray, "f"]
    """Alpha below which a triangle is not there; or OPAQUE, or BLEND."""
    textures: tuple[UInt8[np.ndarray, "_ _ 4"], ...]
    """RGBA pictures, first row on top."""

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def bounds(self) -> Float32[np.ndarray, "2 3"]:
        """Lowest and highest x, y, z."""
        points = self.corners.reshape(-1, 3)
        return np.stack([points.min(0), points.max(0)])

    def turned(self, rotation: Float[np.ndarray, "3 3"]) -> "TriangleSoup":
        """The same object with every point p moved to `rotation` p."""
        matrix = np.asarray(rotation, np.float32).T
        return replace(self, corners=self.corners @ matrix, normals=self.normals @ matrix)

    def normalized(self) -> "TriangleSoup":
        """The same object with the middle of its bounding box at the origin and the box's diagonal 1."""
        low, high = self.bounds.astype(np.float64)
        diagonal = np.linalg.norm(high - low)
        return replace(self, corners=((self.corners - (low + high) / 2) / diagonal).astype(np.float32))

    @staticmethod
    def joined(soups: "list[TriangleSoup]") -> "TriangleSoup":
        """All soups as one."""
        first = np.cumsum([0] + [len(soup.textures) for soup in soups])
        together = {
            name: np.concatenate([getattr(soup, name) for soup in soups])
            for name in ("corners", "normals", "uv", "colors", "cutoff")
        }
        texture = np.concatenate([soup.texture + offset for soup, offset in zip(soups, first)])
        return TriangleSoup(**together, texture=texture, textures=sum((soup.textures for soup in soups), ()))


def soup_from_mesh(
    vertices: Float[np.ndarray, "p 3"],
    faces: Int[np.ndarray, "f 3"],
    *,
    normals: Float[np.ndarray, "p 3"] | None = None,
    uv: Float[np.ndarray, "p 2"] | None = None,
    colors: Float[np.ndarray, "p 4"] | Float[np.ndarray, "f 3 4"] | tuple[float, float, float, float] = (
        1.0,
        1.0,
        1.0,
        1.0,
    ),
    texture: UInt8[np.ndarray, "h w 4"] | None = None,
    cutoff: float = OPAQUE,
) -> TriangleSoup:
    """A soup from shared vertices and one texture. Without normals every triangle is flat."""
    count, corners = len(faces), vertices[faces].astype(np.float32)
    if normals is None:
        flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        per_corner = np.repeat(_unit(flat)[:, None], 3, 1)
    else:
        per_corner = _unit(normals[faces].astype(np.float32))
    if isinstance(colors, tuple):
        rgba = np.broadcast_to(np.asarray(colors, np.float32), (count, 3, 4)).copy()
    else:
        rgba = (colors[faces] if colors.ndim == 2 else colors).astype(np.float32)
    return TriangleSoup(
        corners, per_corner,
        np.zeros((count, 3, 2), np.float32) if uv is None else uv[faces].astype(np.float32),
        rgba, np.zeros(count, np.int64), np.full(count, cutoff, np.float32),
        (np.full((1, 1, 4), 255, np.uint8) if texture is None else texture,),
    )  # fmt: skip


class RayCaster:
    """A soup made ready for rays: build once, take many pictures."""

    def __init__(self, soup: TriangleSoup, lights: Lights | None = None):
        self.soup, self.lights = soup, lights or Lights()
        self.scene = rtcore_scene.EmbreeScene()
        self.mesh = TriangleMesh(self.scene, np.ascontiguousarray(soup.corners, np.float32))
        shapes = np.array([picture.shape[:2] for picture in soup.textures])
        self.texels = np.concatenate([picture.reshape(-1, 4) for picture in soup.textures])
        self.first = np.cumsum([0, *shapes.prod(1)])[:-1].astype(np.int32)[soup.texture]
        self.height, self.width = shapes.astype(np.int32)[soup.texture].T

    def render(
        self, cameras: Cameras, size: int, samples: int = 3, threads: int | None = None
    ) -> tuple[UInt8[np.ndarray, "v size size 3"], UInt8[np.ndarray, "v size size"]]:
        """Pictures over white, and the share of each pixel that the object covers, from samples² rays a pixel."""
        rgb = np.full((len(cameras), size, size, 3), 255, np.uint8)
        alpha = np.zeros((len(cameras), size, size), np.uint8)
        windows = self._windows(cameras, size)
        fine = size * samples

        def shoot(view: int) -> None:
            rows, columns = windows[view]
            height, width = rows.stop - rows.start, columns.stop - columns.start
            if height <= 0 or width <= 0:
                return
            inside = (
                slice(rows.start * samples, rows.stop * samples),
                slice(columns.start * samples, columns.stop * samples),
            )
            origins, directions = (
                rays.numpy().reshape(fine, fine, 3)[inside].reshape(-1, 3)
                for rays in cameras[view : view + 1].rays(fine, fine)
            )
            colors, rest = self.trace(origins, directions)
            rgb[view, rows, columns] = _shrink(colors + rest[:, None], height, width, samples)
            alpha[view, rows, columns] = _shrink(1 - rest[:, None], height, width, samples)[..., 0]

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            list(pool.map(shoot, range(len(cameras))))
        return rgb, alpha

    def _windows(self, cameras: Cameras, size: int) -> list[tuple[slice, slice]]:
        """The rows and columns of each picture between which the object's bounding box appears."""
        low, high = self.soup.bounds
        corners = [[(low, high)[k >> axis & 1][axis] for axis in range(3)] for k in range(8)]
        places, depth = cameras.project(torch.tensor(np.array(corners, np.float32)))
        whole = slice(0, size), slice(0, size)
        first = (places.amin(1) * size).floor().sub(1).clamp(0, size)
        last = (places.amax(1) * size).ceil().add(1).clamp(0, size)
        spans = zip(first.int().tolist(), last.int().tolist())
        return [
            (slice(y0, y1), slice(x0, x1)) if near > 1e-3 else whole
            for ((x0, y0), (x1, y1)), near in zip(spans, depth.amin(1).tolist())
        ]

    def trace(
        self, origins: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"]
    ) -> tuple[Float32[np.ndarray, "n 3"], Float32[np.ndarray, "n"]]:
        """Color that each ray (unit direction) gathers, and the share of it that passes everything."""
        colors, rest = np.zeros((len(origins), 3), np.float32), np.ones(len(origins), np.float32)
        ray, start, toward = (
            np.arange(len(origins)),
            np.ascontiguousarray(origins),
            np.ascontiguousarray(directions),
        )
        for _ in range(LAYERS):
            hit = self.scene.run(start, toward, output=True)
            met = np.flatnonzero(hit["primID"] >= 0)
            ray, start, toward, distance = ray[met], start[met], toward[met], hit["tfar"][met]
            color, opacity = self._surface(
                hit["primID"][met], hit["u"][met], hit["v"][met], hit["Ng"][met], toward
            )
            share = rest[ray] * opacity
            colors[ray] += share[:, None] * color
            rest[ray] -= share
            on = np.flatnonzero(rest[ray] > 0.01)
            if not len(on):
                break
            ray, toward = ray[on], toward[on]
            start = start[on] + toward * (distance[on, None] + np.float32(STEP))
        return colors, np.maximum(rest, 0)

    def _surface(self, face, u, v, across, toward):
        """Lit color (n 3) and opacity (n) where rays along `toward` meet triangles `face` at (u, v)."""
        soup = self.soup
        weights = np.stack([1 - u - v, u, v], -1)[:, None]
        normal = (weights @ soup.normals[face])[:, 0]
        geometric = across * -np.sign((across * toward).sum(-1, keepdims=True))  # the side that is seen
        normal *= np.where((normal * geometric).sum(-1, keepdims=True) < 0, -1, 1).astype(np.float32)
        color = (weights @ soup.colors[face])[:, 0]
        painted = np.flatnonzero(self.width[face] > 1)
        uv = (weights[painted] @ soup.uv[face[painted]])[:, 0]
        color[painted] *= self._texel(face[painted], uv)
        cutoff = soup.cutoff[face]
        opacity = np.where(cutoff == OPAQUE, 1, np.where(cutoff == BLEND, color[:, 3], color[:, 3] >= cutoff))
        return color[:, :3] * self.lights.shade(_unit(normal))[:, None], opacity.astype(np.float32)

    def _texel(self, face, uv):
        """RGBA in [0, 1] (n 4) of each face's texture at uv (n 2), bilinear, repeating."""
        first, width, height = self.first[face], self.width[face], self.height[face]
        uv = uv - np.floor(uv)
        x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
        left, top = np.floor(x), np.floor(y)
        x, y = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
        left, top = left.astype(np.int32), top.astype(np.int32)
        columns = (left % width, (left + 1) % width)
        rows = (first + top % height * width, first + (top + 1) % height * width)
        above = self.texels[rows[0] + columns[0]] * (1 - x) + self.texels[rows[0] + columns[1]] * x
        below = self.texels[rows[1] + columns[0]] * (1 - x) + self.texels[rows[1] + columns[1]] * x
        return (above * (1 - y) + below * y) * np.float32(1 / 255)

    def reached(
        self, origins: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"], within: float
    ) -> Bool[np.ndarray, "n"]:
        """Whether each ray (unit direction) meets anything, seen or not, nearer than `within`."""
        return (
            self.scene.run(np.ascontiguousarray(origins), np.ascontiguousarray(directions), output=True)[
                "tfar"
            ]
            < within
        )


@dataclass(frozen=True)
class ViewOptions:
    """How the objects of a dataset are photographed."""

    views: int = 40
    """Pictures of each object, from cameras spread over the upper hemisphere."""
    size: int = 128
    """Pixels along each side of a picture."""
    held_out: int = 4
    """Views of each object kept for evaluation, evenly spread."""
    seed: int = 0
    """Decides the cameras (and, for made objects, the objects). The same seed gives the same bytes."""
    distance: float = 1.3
    """From camera to the object's middle, in lengths of the object's bounding-box diagonal."""
    focal: float = 1.025
    """Focal length as a fraction of the picture's width."""
    lowest: float = 0.0
    """Lowest camera elevation above the horizon, radians."""
    samples: int = 3
    """samples² rays are averaged into each pixel."""
    box: Box | str | None = None
    """The scene box: half side of a cube around the origin, or "cx,cy,cz,hx,hy,hz". None: the smallest around all objects."""

    def __post_init__(self) -> None:
        self.chosen_box()
        for name in ("views", "size", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if self.held_out < 0 or self.held_out >= self.views:
            raise UserError(
                f"held_out = {self.held_out} of views = {self.views}: keep at least one view to learn from."
            )
        if self.distance <= 0.5:
            raise UserError(
                f"distance = {self.distance}: cameras must stay outside the object, whose radius is 0.5."
            )

    def cameras(self, name: str) -> Cameras:
        """The cameras of one object. They depend on the seed and its name, not on its neighbors."""
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{self.seed} {name}".encode())
        )  # torch uses 32 bits
        return upper_hemisphere(self.views, generator, self.distance, self.focal, self.lowest)

    def chosen_box(self) -> Box | None:
        return None if self.box is None else parse_box(self.box)

    def check_fits(self, name: str, bounds: Float32[np.ndarray, "2 3"]) -> None:
        """Refuse an object that the chosen box would cut off."""
        box = self.chosen_box()
        if box is None:
            return
        reach = np.abs(bounds - np.array(box.center)).max(0)
        if (reach > np.array(box.half) + 1e-6).any():
            sides = ", ".join(f"{side:.3f}" for side in reach)
            raise UserError(
                f"box={self.box!r}: {name} reaches {sides} from the box's center along x, y and z and would be cut off. Give a larger one."
            )

    def scene_box(self, bounds: list[Float32[np.ndarray, "2 3"]]) -> Box:
        """The chosen box, or the one around all objects."""
        return self.chosen_box() or box_around(bounds)


DEFAULT_VIEWS = ViewOptions()


def box_around(bounds: list[Float32[np.ndarray, "2 3"]], margin: float = 0.03) -> Box:
    """The smallest axis-aligned box that holds all bounds, widened by `margin` of its sides."""
    low = np.min([bound[0] for bound in bounds], 0).astype(float)
    high = np.max([bound[1] for bound in bounds], 0).astype(float)
    half = np.maximum((high - low) / 2 * (1 + margin), 1e-3)
    return Box(tuple(float(value) for value in (low + high) / 2), tuple(float(value) for value in half))


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _shrink(
    values: Float32[np.ndarray, "n c"], height: int, width: int, samples: int
) -> UInt8[np.ndarray, "h w c"]:
    """The mean of each samples x samples block, as bytes."""
    values = np.clip(values, 0, 1).reshape(height, samples, width, samples, -1)
    mean = sum(values[:, row, :, column] for row in range(samples) for column in range(samples)) / samples**2
    return (mean * 255 + 0.5).astype(np.uint8)
