"""Renders triangle soups by ray casting (Intel Embree): textured, two-sided, over white, anti-aliased.

- Rays come from `Cameras.rays` on a grid finer than the image, so images and cameras agree.
- Light is diffuse, without highlights, so that a field without view direction can learn it (shading.py).
- Rays continue behind transparent surfaces: up to `LAYERS` surfaces are composited front to back.
- Glass counts once where a ray enters and leaves it, as in renderers that do not draw backs; an open pane
  counts from both sides.
- Imported colors are lit in linear light. Samples are averaged as sRGB values, as later resizing does too.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Float32, Int, UInt8

from latentscenes.core.cameras import Box, Cameras, upper_hemisphere
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import parse_box
from latentscenes.data.dataset import Split, spread
from latentscenes.data.options import ViewOptions
from latentscenes.data.placing import fitting
from latentscenes.data.shading import SRGB_TO_LINEAR, Lights, to_srgb
from latentscenes.data.writing import DatasetWriter

BLOCK = 16384
"""Rays that are traced at once: few enough that results stay in the processor's caches."""
LAYERS = 12
"""Most surfaces that one ray passes."""
STEP = 1e-4
"""Distance behind a surface at which its ray continues, world units (objects have diagonal 1)."""
Wrap = Literal["repeat", "clamp", "mirror"]
WRAPS = ("repeat", "clamp", "mirror")
OPAQUE = -1.0
"""`TriangleSoup.cutoff` of a surface whose alpha is ignored."""
BLEND = -2.0
"""`TriangleSoup.cutoff` of a surface whose alpha is its opacity. The back of a closed body is not drawn."""
BLEND_BOTH = -3.0
"""`TriangleSoup.cutoff` of a surface whose alpha is its opacity, of fronts and of backs."""
DEFAULT_VIEWS = ViewOptions()
WHITE = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class TriangleSoup:
    """f separate triangles and their textures. Corner colors multiply texture colors."""

    corners: Float32[np.ndarray, "f 3 3"]
    """Positions: triangle, corner, xyz."""
    normals: Float32[np.ndarray, "f 3 3"]
    """Unit normals at the corners, interpolated between them; the sign does not matter."""
    uv: Float32[np.ndarray, "f 3 2"]
    """Texture coordinates; (0, 0) is the texture's lower left corner, and the texture repeats."""
    colors: Float32[np.ndarray, "f 3 4"]
    """RGB and alpha in [0, 1] at the corners."""
    texture: Int[np.ndarray, "f"]
    """Index of each triangle's texture."""
    cutoff: Float32[np.ndarray, "f"]
    """Alpha below which a triangle is fully transparent; or OPAQUE, BLEND or BLEND_BOTH."""
    textures: tuple[UInt8[np.ndarray, "_ _ 4"], ...]
    """RGBA images, first row on top."""
    wraps: tuple[tuple[Wrap, Wrap], ...] = ()
    """Rule beyond the edges of each texture, along u and v; empty: all repeat."""
    emission: Float32[np.ndarray, "f 3"] | None = None
    """Light that triangles add."""
    lit: Bool[np.ndarray, "f"] | None = None
    """False for triangles whose color is shown unlit; None: all are lit."""
    linear: bool = False
    """Colors and light are linear, and textures are decoded from sRGB. If false, all are multiplied as sRGB
    values."""

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def bounds(self) -> Float32[np.ndarray, "2 3"]:
        """Returns the lowest and highest x, y, z."""
        points = self.corners.reshape(-1, 3)
        return np.stack([points.min(0), points.max(0)])

    def turned(self, rotation: Float[np.ndarray, "3 3"]) -> "TriangleSoup":
        """Returns the object with every point p moved to `rotation` p."""
        matrix = np.asarray(rotation, np.float32).T
        return replace(self, corners=self.corners @ matrix, normals=self.normals @ matrix)

    def normalized(self) -> "TriangleSoup":
        """Returns the object with its bounding box centered at the origin, scaled to a diagonal of 1."""
        low, high = self.bounds.astype(np.float64)
        diagonal = np.linalg.norm(high - low)
        return replace(self, corners=((self.corners - (low + high) / 2) / diagonal).astype(np.float32))

    def select(self, keep: Bool[np.ndarray, "f"]) -> "TriangleSoup":
        """Returns the soup of the triangles marked in `keep`."""
        return replace(self, **{name: getattr(self, name)[keep] for name in self._arrays()})

    def _arrays(self) -> list[str]:
        """Names of the arrays with one row per triangle."""
        return [entry.name for entry in fields(self) if isinstance(getattr(self, entry.name), np.ndarray)]

    @staticmethod
    def joined(soups: "list[TriangleSoup]") -> "TriangleSoup":
        """Returns all soups as one. They must agree in `linear`, and in having `emission` and `lit`."""
        first = np.cumsum([0] + [len(soup.textures) for soup in soups])
        shifted = [replace(soup, texture=soup.texture + offset) for soup, offset in zip(soups, first)]
        together = {
            name: np.concatenate([getattr(soup, name) for soup in shifted]) for name in soups[0]._arrays()
        }
        lists = {name: sum((getattr(soup, name) for soup in soups), ()) for name in ("textures", "wraps")}
        return replace(soups[0], **together, **lists)


def soup_from_mesh(
    vertices: Float[np.ndarray, "p 3"],
    faces: Int[np.ndarray, "f 3"],
    *,
    normals: Float[np.ndarray, "p 3"] | None = None,
    uv: Float[np.ndarray, "p 2"] | None = None,
    colors: Float[np.ndarray, "p 4"] | Float[np.ndarray, "f 3 4"] | tuple[float, float, float, float] = WHITE,
    texture: UInt8[np.ndarray, "h w 4"] | None = None,
    cutoff: float = OPAQUE,
) -> TriangleSoup:
    """Builds a soup from shared vertices and one texture. Without normals, triangles are flat-shaded."""
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
    """Renders images of one soup."""

    def __init__(self, soup: TriangleSoup, lights: Lights | None = None):
        self.soup, self.lights = soup, lights or Lights()
        self.scene = rtcore_scene.EmbreeScene()
        self.mesh = TriangleMesh(self.scene, np.ascontiguousarray(soup.corners, np.float32))
        shapes = np.array([picture.shape[:2] for picture in soup.textures])
        self.texels = np.concatenate([picture.reshape(-1, 4) for picture in soup.textures]).view(np.uint32)
        self.first = np.cumsum([0, *shapes.prod(1)])[:-1].astype(np.int32)[soup.texture]
        self.height, self.width = shapes.astype(np.int32)[soup.texture].T
        codes = [[WRAPS.index(wrap) for wrap in pair] for pair in soup.wraps] or [[0, 0]] * len(shapes)
        self.wrap = np.array(codes, np.int8)[soup.texture] if np.any(codes) else None
        even = np.array([(picture[..., 3] == 255).all() for picture in soup.textures])[soup.texture]
        glass = np.flatnonzero(even & (soup.cutoff == BLEND) & (soup.colors[..., 3] < 1).any(1))
        bodies, numbers = np.unique(soup.texture[glass], return_inverse=True)
        self.bodies, self.glass = len(bodies), np.full(len(soup), -1)
        self.glass[glass] = numbers

    def render(
        self, cameras: Cameras, size: int, samples: int = 3
    ) -> tuple[UInt8[np.ndarray, "v size size 3"], UInt8[np.ndarray, "v size size"]]:
        """Returns images over white, and each pixel's coverage, from samples² rays per pixel. Computes in as
        many threads as torch has."""
        rgb = np.full((len(cameras), size, size, 3), 255, np.uint8)
        alpha = np.zeros((len(cameras), size, size), np.uint8)
        windows = self._windows(cameras, size)
        fine = size * samples

        def shoot(view: int) -> None:
            rows, columns = windows[view]
            height, width = rows.stop - rows.start, columns.stop - columns.start
            if height <= 0 or width <= 0:
                return
            y, x = (torch.arange(part.start * samples, part.stop * samples) for part in (rows, columns))
            pixels = (y[:, None] * fine + x).reshape(1, -1)
            rays = [values[0].numpy() for values in cameras[view : view + 1].rays(fine, fine, pixels)]
            starts = range(0, len(rays[0]), BLOCK)
            parts = [self.trace(*(values[k : k + BLOCK] for values in rays)) for k in starts]
            colors, rest = (np.concatenate(values) for values in zip(*parts))
            rgb[view, rows, columns] = _shrink(colors + rest[:, None], height, width, samples)
            alpha[view, rows, columns] = _shrink(1 - rest[:, None], height, width, samples)[..., 0]

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(shoot, range(len(cameras))))
        return rgb, alpha

    def _windows(self, cameras: Cameras, size: int) -> list[tuple[slice, slice]]:
        """Returns the rows and columns of each image that show the object's bounding box."""
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
        """Returns the color of each ray (unit direction), and the share of it that passes all surfaces."""
        colors, rest = np.zeros((len(origins), 3), np.float32), np.ones(len(origins), np.float32)
        ray = np.arange(len(origins))
        start, toward = np.ascontiguousarray(origins), np.ascontiguousarray(directions)
        entered = np.zeros((len(origins), self.bodies), np.int8)
        for _ in range(LAYERS):
            # Next surface
            hit = self.scene.run(start, toward, output=True)
            met = np.flatnonzero(hit["primID"] >= 0)
            ray, start, toward, distance = ray[met], start[met], toward[met], hit["tfar"][met]
            face, u, v, across = (hit[key][met] for key in ("primID", "u", "v", "Ng"))
            color, opacity = self._surface(face, u, v, across, toward)
            if self.bodies:
                self._leave(entered, ray, face, (across * toward).sum(-1), opacity)
            # Composite
            share = rest[ray] * opacity
            colors[ray] += share[:, None] * color
            rest[ray] -= share
            # Continue behind transparent surfaces
            on = np.flatnonzero(rest[ray] > 0.01)
            if not len(on):
                break
            ray, toward = ray[on], toward[on]
            start = start[on] + toward * (distance[on, None] + np.float32(STEP))
        return colors, np.maximum(rest, 0)

    def _leave(self, entered, ray, face, along, opacity):
        """Clears the opacity where rays leave glass that they entered. `entered` holds for each ray and
        material the side of the last surface that counted, 0 for none; it is updated."""
        here = np.flatnonzero(self.glass[face] >= 0)
        place = ray[here], self.glass[face[here]]
        side = np.sign(along[here]).astype(np.int8)
        leaves = (entered[place] == -side) & (side != 0)
        entered[place] = np.where(leaves, 0, side)
        opacity[here[leaves]] = 0

    def _surface(self, face, u, v, across, toward):
        """Returns lit color (n 3) and opacity (n) where rays meet triangles `face` at (u, v)."""
        soup = self.soup
        weights = np.stack([1 - u - v, u, v], -1)[:, None]
        # Normal on the visible side
        normal = (weights @ soup.normals.take(face, 0))[:, 0]
        geometric = across * -np.sign((across * toward).sum(-1, keepdims=True))
        normal *= np.where((normal * geometric).sum(-1, keepdims=True) < 0, -1, 1).astype(np.float32)
        # Color
        color = (weights @ soup.colors.take(face, 0))[:, 0]
        painted = np.flatnonzero(self.width[face] > 1)
        uv = (weights[painted] @ soup.uv.take(face[painted], 0))[:, 0]
        color[painted] *= self._texel(face[painted], uv)
        # Opacity
        cutoff = soup.cutoff[face]
        cut = np.where(cutoff <= BLEND, color[:, 3], color[:, 3] >= cutoff)
        opacity = np.where(cutoff == OPAQUE, 1, cut)
        # Light
        light = self.lights.shade(_unit(normal), toward)
        if soup.lit is not None:
            light = np.where(soup.lit[face], light, np.float32(1))
        seen = color[:, :3] * light[:, None]
        if soup.emission is not None:
            seen += soup.emission[face]
        return to_srgb(seen) if soup.linear else seen, opacity.astype(np.float32)

    def _texel(self, face, uv):
        """Returns RGBA in [0, 1] (n 4) of each face's texture at uv (n 2), bilinear, in the soup's colors."""
        first, width, height = self.first[face], self.width[face], self.height[face]
        if self.wrap is None:
            uv = uv - np.floor(uv)
        x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
        left, top = np.floor(x), np.floor(y)
        x, y = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
        left, top = left.astype(np.int32), top.astype(np.int32)
        wrap_u, wrap_v = (None, None) if self.wrap is None else self.wrap[face].T
        columns = [_wrapped(left + k, width, wrap_u) for k in (0, 1)]
        rows = [first + _wrapped(top + k, height, wrap_v) * width for k in (0, 1)]
        above = self._decoded(rows[0] + columns[0]) * (1 - x) + self._decoded(rows[0] + columns[1]) * x
        below = self._decoded(rows[1] + columns[0]) * (1 - x) + self._decoded(rows[1] + columns[1]) * x
        blended = above * (1 - y) + below * y
        return blended if self.soup.linear else blended * np.float32(1 / 255)

    def _decoded(self, places):
        """Returns texels: linear light in [0, 1] with alpha for linear soups, else bytes."""
        texels = self.texels.take(places).view(np.uint8).reshape(-1, 4)
        if not self.soup.linear:
            return texels
        values = SRGB_TO_LINEAR.take(texels)
        values[:, 3] = texels[:, 3] * np.float32(1 / 255)
        return values

    def reached(
        self, origins: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"], within: float
    ) -> Bool[np.ndarray, "n"]:
        """Returns whether each ray (unit direction) hits any surface nearer than `within`."""
        hit = self.scene.run(np.ascontiguousarray(origins), np.ascontiguousarray(directions), output=True)
        return hit["tfar"] < within


def render_object(
    writer: DatasetWriter, name: str, soup: TriangleSoup, split: Split, options: ViewOptions
) -> None:
    """Renders the views of one object and appends them to a dataset. Raises as `render_views`."""
    rgb, alpha, cameras = render_views(name, soup, options)
    box = own_box(soup.bounds, options)
    writer.add(name, rgb, cameras, split, spread(options.views, options.held_out), alpha, box)


def render_views(
    name: str, soup: TriangleSoup, options: ViewOptions, lights: Lights | None = None
) -> tuple[UInt8[np.ndarray, "v H W 3"], UInt8[np.ndarray, "v H W"], Cameras]:
    """Returns the pictures of one object over white, its coverage, and the cameras, moved for `options.fit`.

    The cameras depend on the seed and the object's name, not on other objects.

    Raises:
        UserError: `options.box` would cut the object off, or no view shows it.
    """
    if options.box is not None and not options.fit:
        box = parse_box(options.box)
        reach = np.abs(soup.bounds - np.array(box.center)).max(0)
        if (reach > np.array(box.half) + 1e-6).any():
            sides = ", ".join(f"{side:.3f}" for side in reach)
            raise UserError(
                f"--box {options.box}: {name} reaches {sides} from the box's center along x, y and z and "
                "would be cut off. Give a larger box."
            )
    # torch uses only 32 bits of a seed
    generator = torch.Generator().manual_seed(zlib.crc32(f"{options.seed} {name}".encode()))
    cameras = upper_hemisphere(options.views, generator, options.distance, options.focal, options.lowest)
    if options.fill is not None:
        cameras = _filled(cameras, soup.bounds, options.fill)
    rgb, alpha = RayCaster(soup, lights).render(cameras, options.size, options.samples)
    if not alpha.any():
        raise UserError(f"{name}: no view shows it; it is transparent, or cameras look past it.")
    if options.fit:  # move the world instead of the object
        cameras = cameras.placed(None, *fitting(box_around([soup.bounds], 0.0), parse_box(options.box)))
    return rgb, alpha, cameras


def own_box(bounds: Float32[np.ndarray, "2 3"], options: ViewOptions) -> Box | None:
    """Returns an object's own box, if the options ask for a box for each."""
    return box_around([bounds]) if options.boxes == "object" else None


def _filled(cameras: Cameras, bounds: Float32[np.ndarray, "2 3"], fill: float) -> Cameras:
    """Returns cameras moved along their axes to one distance at which the object's bounding box spans at most
    `fill` of every image."""
    corners = torch.cartesian_prod(*torch.tensor(np.array(bounds, np.float32)).T)
    turned = torch.einsum("vij,pi->vpj", cameras.cam2world[:, :, :3], corners)
    lateral = (turned[..., :2].abs() * cameras.intrinsics[:, None, :2]).amax(-1)
    distance = (lateral / (fill / 2) - turned[..., 2]).max()
    cam2world = cameras.cam2world.clone()
    cam2world[:, :, 3] = -distance * cam2world[:, :, 2]
    return Cameras(cam2world, cameras.intrinsics)


def scene_box(bounds: list[Float32[np.ndarray, "2 3"]], options: ViewOptions) -> Box:
    """Returns the box in the options, or else the one around all objects."""
    return box_around(bounds) if options.box is None else parse_box(options.box)


def box_around(bounds: list[Float32[np.ndarray, "2 3"]], margin: float = 0.03) -> Box:
    """Returns the smallest axis-aligned box that holds all bounds, widened by `margin` of its sides."""
    low = np.min([bound[0] for bound in bounds], 0).astype(float)
    high = np.max([bound[1] for bound in bounds], 0).astype(float)
    half = np.maximum((high - low) / 2 * (1 + margin), 1e-3)
    return Box(tuple(((low + high) / 2).tolist()), tuple(half.tolist()))


def _wrapped(index, size, wrap):
    """Returns texel numbers in [0, size) by each texture's rule (places in WRAPS); all repeat for None."""
    if wrap is None:
        return index % size
    mirrored = index % (2 * size)
    mirrored = np.minimum(mirrored, 2 * size - 1 - mirrored)
    return np.where(wrap == 0, index % size, np.where(wrap == 1, np.clip(index, 0, size - 1), mirrored))


def _unit(vectors):
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _shrink(
    values: Float32[np.ndarray, "n c"], height: int, width: int, samples: int
) -> UInt8[np.ndarray, "h w c"]:
    """Returns the mean of each samples x samples block, as bytes."""
    values = np.clip(values, 0, 1).reshape(height, samples, width, samples, -1)
    mean = sum(values[:, row, :, column] for row in range(samples) for column in range(samples)) / samples**2
    return (mean * 255 + 0.5).astype(np.uint8)
