"""What made chairs are made of: bars, boards, cushions; and their finish: wood, paint, metal, cloth.

Notable:
- A bar is a cross-section, a rectangle or an ellipse, moved along a path: legs, slats, boards, bent rails and moulded
  shells are all bars. It is cut into cells of a few centimetres, so that shadows at corners have places to lie.
- Metres, z up. Grain and stripes run along a bar's path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from jaxtyping import Float, UInt8

from latentscenes.datasets.embree import Soup, soup_from_mesh
from latentscenes.datasets.shapes_parts import Color, blob, grid_faces

TILE = 0.5
"""Side of a finish's picture, metres."""
CELL = 0.07
"""Longest side of a cell of a bar's surface, metres."""
AROUND = 20
Point = tuple[float | int, float | int, float | int] | Float[np.ndarray, "3"]
WOODS: tuple[Color, ...] = (
    (0.87, 0.72, 0.52), (0.80, 0.60, 0.38), (0.72, 0.48, 0.27), (0.60, 0.36, 0.20), (0.47, 0.27, 0.16), (0.33, 0.20, 0.13),
    (0.56, 0.22, 0.14), (0.70, 0.62, 0.52),
)  # fmt: skip
PAINTS: tuple[Color, ...] = (
    (0.90, 0.90, 0.87), (0.14, 0.14, 0.15), (0.75, 0.13, 0.11), (0.95, 0.76, 0.18), (0.16, 0.36, 0.62), (0.20, 0.52, 0.50),
    (0.55, 0.75, 0.68), (0.90, 0.48, 0.15), (0.32, 0.48, 0.25), (0.86, 0.60, 0.62), (0.45, 0.48, 0.52), (0.62, 0.80, 0.90),
)  # fmt: skip
CLOTHS: tuple[Color, ...] = (
    (0.88, 0.84, 0.74), (0.66, 0.62, 0.56), (0.42, 0.44, 0.47), (0.20, 0.22, 0.27), (0.14, 0.24, 0.45), (0.30, 0.52, 0.68),
    (0.62, 0.14, 0.16), (0.80, 0.38, 0.20), (0.88, 0.68, 0.24), (0.24, 0.42, 0.32), (0.52, 0.60, 0.36), (0.50, 0.28, 0.46),
    (0.84, 0.58, 0.56), (0.40, 0.24, 0.16),
)  # fmt: skip
METALS: tuple[Color, ...] = ((0.78, 0.79, 0.81), (0.50, 0.51, 0.53), (0.15, 0.15, 0.16), (0.76, 0.62, 0.34))


@dataclass(frozen=True)
class Finish:
    """How a surface looks: a colour, multiplied by a picture that repeats every TILE."""

    color: Color
    picture: UInt8[np.ndarray, "h w 4"] | None = None


def pick(rng: np.random.Generator, colors: Sequence[Color], spread: float = 0.04) -> Color:
    """One of the colours, a little changed."""
    color = np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.92, 1.06) + rng.uniform(-spread, spread, 3)
    return tuple(np.clip(color, 0.07, 0.95).tolist())


def wood(rng: np.random.Generator) -> Finish:
    """A tone of wood with grain."""
    v, u = np.meshgrid(np.arange(64) / 64, np.arange(64) / 64, indexing="ij")
    grain = np.zeros_like(u)
    for waves in (5, 8, 13, 19):
        phase, bend = rng.uniform(0, 2 * np.pi, 2)
        grain += np.sin(2 * np.pi * waves * u + phase + 1.6 * np.sin(2 * np.pi * v + bend)) / 4
    return Finish(pick(rng, WOODS, 0.02), _picture((0.9 + 0.1 * grain)[..., None] * np.ones(3)))


def cloth(rng: np.random.Generator) -> Finish:
    """Plain, striped, checked or dotted cloth."""
    style = ("plain", "plain", "stripes", "checks", "dots")[rng.integers(5)]
    ground = pick(rng, CLOTHS)
    if style == "plain":
        return Finish(ground)
    others = [color for color in CLOTHS if np.abs(np.subtract(color, ground)).max() > 0.3]
    second, count = np.array(pick(rng, others)), int(rng.integers(3, 8))
    v, u = np.meshgrid((np.arange(128) + 0.5) / 128 * count % 1, (np.arange(128) + 0.5) / 128 * count % 1, indexing="ij")
    width = float(rng.uniform(0.25, 0.6))
    if style == "stripes":
        share = (np.abs(u - 0.5) < width / 2) + 0.5 * (np.abs(u - 0.5) > 0.45)
    elif style == "checks":
        share = ((u < 0.5) * 0.5 + (v < 0.5) * 0.5) * 0.9
    else:
        share = np.hypot(u - 0.5, v - 0.5) < 0.2 + 0.2 * width
    share = np.asarray(share, float)[..., None]
    return Finish((1.0, 1.0, 1.0), _picture(ground * (1 - share) + second * share))


def metal(rng: np.random.Generator) -> Finish:
    return Finish(pick(rng, METALS, 0.01))


def paint(rng: np.random.Generator) -> Finish:
    return Finish(pick(rng, PAINTS, 0.03))


def _picture(rgb: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 4"]:
    return (np.concatenate([np.clip(rgb, 0, 1), np.ones_like(rgb[..., :1])], -1) * 255 + 0.5).astype(np.uint8)


def curve(points: Sequence[Point], steps: int = 12) -> Float[np.ndarray, "n 3"]:
    """The Bézier curve of these points."""
    t, degree = np.linspace(0, 1, steps + 1)[:, None], len(points) - 1
    return sum(comb(degree, k) * (1 - t) ** (degree - k) * t**k * np.asarray(point) for k, point in enumerate(points))


def bar(
    path: Sequence[Point] | Float[np.ndarray, "n 3"],
    half: float | tuple[float, float] | Float[np.ndarray, "n 2"],
    finish: Finish,
    *,
    round: bool = False,
    taper: float = 1.0,
    dish: float = 0.0,
) -> Soup:
    """A solid along a path, its normals outward.

    Args:
        path: its middle line, two points or more.
        half: half width and half depth of its section, once or for each point. Width lies across the path and level, along
            y for most; of a path along y, it is the height.
        round: the section is an ellipse, else a rectangle.
        taper: the section's size where the path begins, as a share of that where it ends.
        dish: bends the section: how far the ends of its width lie off its middle, toward where the depth points.
    """
    path = np.asarray(path, float)
    half = np.asarray(half, float) * np.linspace(taper, 1, len(path))[:, None] * np.ones(2)
    length = np.concatenate([[0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
    pieces = [np.linspace(a, b, max(int(np.ceil((b - a) / CELL)), 1), endpoint=False) for a, b in zip(length, length[1:])]
    along = np.concatenate([*pieces, length[-1:]])
    path, half = (np.stack([np.interp(along, length, column) for column in values.T], -1) for values in (path, half))
    tangent = np.gradient(path, along, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    level = np.array([0.0, 1.0, 0.0]) if abs(tangent[:, 1].mean()) < 0.75 else np.array([0.0, 0.0, 1.0])
    across = level - (tangent @ level)[:, None] * tangent
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    axes = np.stack([across, np.cross(tangent, across)], 1)  # n 2 3

    if round:
        angle = np.linspace(0, 2 * np.pi, AROUND + 1)
        sides = [np.stack([np.cos(angle), np.sin(angle)], -1)]
        ends = np.array([1.0, 0.6, 0.0])[:, None, None] * sides[0]
    else:
        cells = np.maximum(np.ceil(2 * half.max(0) / CELL).astype(int), 1 if not dish else 6)
        corners = np.array([(1, -1), (1, 1), (-1, 1), (-1, -1), (1, -1)])
        sides = [np.linspace(a, b, cells[1 - k % 2] + 1) for k, (a, b) in enumerate(zip(corners, corners[1:]))]
        ends = np.stack([sides[1], sides[3][::-1]])

    def place(section: Float[np.ndarray, "r k 2"], at: slice) -> Float[np.ndarray, "_ k 3"]:
        bent = np.stack([np.zeros_like(section[..., 0]), dish * section[..., 0] ** 2], -1)
        return path[at, None] + (section * half[at, None] + bent) @ axes[at]

    grids = []  # points, normals, uv in metres
    for side in sides:
        points = place(side[None], slice(None))
        around = np.cumsum(np.linalg.norm(np.diff(points, axis=1, prepend=points[:, :1]), axis=2), 1)
        uv = np.stack([around - around.max() / 2, np.broadcast_to(along[:, None], around.shape)], -1)
        normals = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))
        if round:
            normals = side / half[:, None] @ axes
        grids.append((points, normals, uv))
    for at, sign in ((0, -1), (len(path) - 1, 1)):
        points = place(ends, slice(at, at + 1))
        grids.append((points, np.broadcast_to(sign * tangent[at], points.shape), ends * half[at]))
    return Soup.joined([
        soup_from_mesh(
            points.reshape(-1, 3), grid_faces(*points.shape[:2]), normals=normals.reshape(-1, 3), uv=uv.reshape(-1, 2) / TILE,
            colors=(*finish.color, 1.0), texture=finish.picture,
        ) for points, normals, uv in grids
    ])  # fmt: skip


def both(*soups: Soup) -> list[Soup]:
    """These, and their mirror images on the other side of the middle plane y = 0."""
    mirror = np.array([1, -1, 1], np.float32)
    return [*soups, *(replace(soup, corners=soup.corners * mirror, normals=soup.normals * mirror) for soup in soups)]


def cushion(
    center: tuple[float, float, float], half: tuple[float, float, float], finish: Finish, squareness: float = 4.0, lean: float = 0.0
) -> Soup:
    """A rounded box. `lean` moves its top backward, metres per metre of height. Its cloth is seen from its broad side."""
    soup = blob(center, half, finish.color, squareness, lean)
    if finish.picture is not None:
        flat = [axis for axis in (1, 0, 2) if axis != int(np.argmin(half))]
        uv = ((soup.corners - np.asarray(center, np.float32))[..., flat] / TILE).astype(np.float32)
        soup = replace(soup, uv=uv, textures=(finish.picture,))
    return soup
