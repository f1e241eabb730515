"""Surfaces as the mesh readers deliver them: triangles of one material, corner by corner, in double
precision.

Notable:
- Positions stay float64 until the whole object is centered, so that georeferenced coordinates keep their
  detail.
- Colors are linear light. A texture holds sRGB bytes and is decoded when it is read.
- A reader states in `Remarks` every property of a file that it leaves out.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import mapbox_earcut
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from latentscenes.core.errors import UserError
from latentscenes.core.reading import reason, require_regular
from latentscenes.data.images import MOST_PIXELS
from latentscenes.data.raycast import OPAQUE, TriangleSoup, Wrap
from latentscenes.data.shading import to_linear

BRIGHT = 2.0
"""Colors, written as fractions, may exceed 1 for light, but not this."""
LARGEST_TEXTURE = 4096
"""Pixels along a texture's side. Larger ones are reduced: no rendered view shows more."""
DAMAGE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
"""Errors that numbers and names which do not fit together raise in a reader."""
MOST_REPEATED = 4_000_000
"""Triangles that a file may have beyond one for each of its bytes, by instances and shared arrays."""


class Remarks(dict[str, None]):
    """Notes about one file in the order in which they came, each once."""

    def add(self, text: str) -> None:
        self[text] = None


@dataclass(frozen=True)
class Material:
    """How a surface looks, without its highlights."""

    factor: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Linear RGB and alpha that multiply the texture and the corners' colors."""
    texture: UInt8[np.ndarray, "h w 4"] | None = None
    """sRGB and alpha, first row on top."""
    wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
    """Beyond the texture's edges, along u and v."""
    cutoff: float = OPAQUE
    """Alpha below which the surface is cut out; or OPAQUE, BLEND or BLEND_BOTH (see TriangleSoup)."""
    emission: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Linear light that the surface adds."""
    lit: bool = True
    """False: the color is shown as it is, since it holds light already."""


@dataclass(frozen=True)
class Surface:
    """f triangles of one material."""

    corners: Float[np.ndarray, "f 3 3"]
    """Positions: triangle, corner, xyz; float64, in the file's units."""
    material: Material = Material()
    normals: Float[np.ndarray, "f 3 3"] | None = None
    """At the corners, of any length; None: the triangles are flat."""
    uv: Float[np.ndarray, "f 3 2"] | None = None
    """(0, 0) is the texture's lower left corner."""
    colors: Float[np.ndarray, "f 3 4"] | None = field(default=None)
    """Linear RGB and alpha in [0, 1]."""


def to_soup(path: Path, surfaces: list[Surface], matrix: Float[np.ndarray, "3 3"]) -> TriangleSoup:
    """Joins surfaces to one soup: its bounding box centered at the origin with diagonal 1, then moved by
    `matrix`.

    Raises:
        UserError: there are no triangles, a vertex is not finite, or the object has no extent.
    """
    surfaces = [surface for surface in surfaces if len(surface.corners)]
    if not surfaces:
        raise UserError(f"{path}: holds no triangles.")
    if not all(np.isfinite(surface.corners).all() for surface in surfaces):
        raise UserError(f"{path}: some vertices are not finite numbers.")
    low = np.min([surface.corners.min((0, 1)) for surface in surfaces], 0)
    high = np.max([surface.corners.max((0, 1)) for surface in surfaces], 0)
    if not (high - low).max() > 0:
        raise UserError(f"{path}: has no extent; all vertices lie in one point.")
    matrix = matrix / np.linalg.norm(high - low)
    return TriangleSoup.joined([_soup(surface, (low + high) / 2, matrix) for surface in surfaces])


def _soup(surface: Surface, middle: Float[np.ndarray, "3"], matrix: Float[np.ndarray, "3 3"]) -> TriangleSoup:
    count, material = len(surface.corners), surface.material
    corners = (surface.corners - middle) @ matrix.T
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.repeat(flat[:, None], 3, 1)
    if surface.normals is not None:
        given = surface.normals @ matrix.T
        usable = np.isfinite(given).all(2) & (np.abs(given).max(2) > 1e-12)
        normals = np.where(usable[..., None], given, normals)
    colors = np.ones((count, 3, 4)) if surface.colors is None else surface.colors
    textured = material.texture is not None and surface.uv is not None
    return TriangleSoup(
        corners=corners.astype(np.float32),
        normals=_unit(normals).astype(np.float32),
        uv=(np.nan_to_num(surface.uv) if textured else np.zeros((count, 3, 2))).astype(np.float32),
        colors=(np.nan_to_num(colors, nan=1.0) * np.array(material.factor)).astype(np.float32),
        texture=np.zeros(count, np.int64),
        cutoff=np.full(count, material.cutoff, np.float32),
        textures=(material.texture if textured else np.full((1, 1, 4), 255, np.uint8),),
        wraps=(material.wrap,),
        emission=np.tile(np.array(material.emission, np.float32), (count, 1)),
        lit=np.full(count, material.lit),
        linear=True,
    )


def corner_faces(polygons: list[list[int]], points: Float[np.ndarray, "p 3"]) -> Int[np.ndarray, "t 3"]:
    """Cuts polygons of point numbers into triangles, by ear clipping where they are not convex.

    Returns:
        Places in the concatenated polygons, three for each triangle.
    """
    counts = np.array([len(polygon) for polygon in polygons], np.int64)
    starts = np.cumsum(counts) - counts
    found: list[Int[np.ndarray, "t 3"]] = [np.zeros((0, 3), np.int64)] * len(polygons)
    for count in np.unique(counts[counts >= 3]).tolist():
        places = np.flatnonzero(counts == count)
        if count == 3:
            fans = np.ones(len(places), bool)
        else:
            fans = _convex(points[np.array([polygons[place] for place in places])])
        fan = np.stack([np.zeros(count - 2, np.int64), np.arange(1, count - 1), np.arange(2, count)], 1)
        for place, is_fan in zip(places.tolist(), fans.tolist()):
            found[place] = starts[place] + (fan if is_fan else _cut(points[polygons[place]], fan))
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def _convex(corners: Float[np.ndarray, "k n 3"]) -> Bool[np.ndarray, "k"]:
    """Whether each polygon is convex, seen along its normal (Newell's), and goes round once: a star turns
    one way, too."""
    corners = corners - corners.mean(1, keepdims=True)
    ahead = np.roll(corners, -1, 1) - corners
    normal = np.cross(corners, np.roll(corners, -1, 1)).sum(1)
    following = np.roll(ahead, -1, 1)
    turned = np.cross(ahead, following)
    turns = (turned @ normal[..., None])[..., 0]
    one_way = (turns >= -1e-9 * np.maximum(np.abs(turns).max(1), 1e-300)[:, None]).all(1)
    length = np.linalg.norm(normal, axis=1)
    unit = normal / np.maximum(length, 1e-300)[:, None]
    angles = np.arctan2((turned @ unit[..., None])[..., 0], (ahead * following).sum(2))
    return one_way & ((length < 1e-300) | (np.abs(angles.sum(1)) < 3 * np.pi))


def _cut(corners: Float[np.ndarray, "n 3"], fan: Int[np.ndarray, "t 3"]) -> Int[np.ndarray, "t 3"]:
    """Triangles of a polygon that is not convex: ear clipping in its plane, or the fan where that finds
    none."""
    corners = corners - corners.mean(0)
    normal = np.cross(corners, np.roll(corners, -1, 0)).sum(0)
    flat = np.delete(corners, np.abs(normal).argmax(), 1)
    cut = mapbox_earcut.triangulate_float64(np.ascontiguousarray(flat), np.array([len(corners)], np.uint32))
    cut = cut.astype(np.int64).reshape(-1, 3)
    if not len(cut):
        return fan
    edges = corners[cut[:, 1:]] - corners[cut[:, :1]]
    turned = np.cross(edges[:, 0], edges[:, 1]) @ normal < 0
    cut[turned] = cut[turned][:, ::-1]  # the polygon's own side stays in front
    return cut


def smooth_normals(
    corners: Float[np.ndarray, "f 3 3"], groups: Int[np.ndarray, "f 3"]
) -> Float[np.ndarray, "f 3 3"]:
    """Normals averaged over all corners of the same group, weighted by the corners' angles; a negative group
    is flat."""
    flat = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    one, two = _unit(np.roll(corners, -1, 1) - corners), _unit(np.roll(corners, 1, 1) - corners)
    angle = np.arccos(np.clip((one * two).sum(2), -1, 1))
    weighted = flat[:, None] * angle[..., None]
    flat_groups = groups.reshape(-1)
    smooth = flat_groups >= 0
    sums = np.zeros((flat_groups.max(initial=-1) + 1, 3))
    np.add.at(sums, flat_groups[smooth], weighted.reshape(-1, 3)[smooth])
    found = np.repeat(flat[:, None], 3, 1).reshape(-1, 3)
    found[smooth] = sums[flat_groups[smooth]]
    return found.reshape(corners.shape)


def read_texture(source: Path | object, name: str) -> UInt8[np.ndarray, "h w 4"]:
    """Reads an image file as sRGB bytes with alpha, reduced to LARGEST_TEXTURE.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if isinstance(source, Path):
            require_regular(source)
        with Image.open(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{name}: has {image.width}x{image.height} pixels, too many for a texture.")
            image.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE), Image.Resampling.BOX)
            if image.mode in ("I", "I;16", "I;16B"):
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
            return np.array(image.convert("RGBA"))
    except UserError:
        raise
    except Exception as error:  # a broken image may break its reader in any way
        raise UserError(f"{name}: cannot be read as an image ({reason(error)}).") from None


def linear_colors(values: np.ndarray) -> Float[np.ndarray, "*n 4"]:
    """sRGB colors of three or four channels, as fractions, to linear RGB with alpha 1."""
    light = to_linear(np.clip(values[..., :3], 0, 1))
    return np.concatenate([light, np.ones_like(light[..., :1])], -1)


def unit_colors(colors: np.ndarray, what: str, remarks: Remarks) -> np.ndarray:
    """Returns sRGB colors as fractions. Integers count up to the largest of their type, but up to 255 where
    none is larger; fractions of which some exceed BRIGHT count up to 255. A remark tells where 255 was
    guessed, and where a number is none: white takes its place."""
    known = np.isfinite(colors)
    most = float(np.max(colors, initial=0, where=known))
    if colors.dtype.kind in "ui":
        scale = 255 if most <= 255 else np.iinfo(colors.dtype).max
    else:
        scale = 255 if most > BRIGHT else 1
    if scale == 255 and colors.dtype != np.uint8:
        remarks.add(f"{what}: taken as numbers from 0 to 255")
    if not known.all():
        remarks.add(f"{what}: some are no numbers and taken as white")
    return np.where(known, colors / scale, 1.0)


def _unit(vectors: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300)
