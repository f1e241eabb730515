"""Procedural cars: any number of different cars from a seed, without a download.

- A car depends only on the seed and its number: datasets of 10 and of 1000 cars start with the same ones.
- Kinds of cars take turns, so small datasets hold all of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from latentscenes.core.console import say, tracked
from latentscenes.core.errors import UserError
from latentscenes.data.options import ViewOptions
from latentscenes.data.raycast import (
    BLEND,
    DEFAULT_VIEWS,
    OPAQUE,
    RayCaster,
    TriangleSoup,
    render_object,
    scene_box,
    soup_from_mesh,
)  # fmt: skip
from latentscenes.data.synthetic.body import KINDS, Car, draw_car, grid_normals, half_width, loft
from latentscenes.data.synthetic.paint import draw_livery, paint_body
from latentscenes.data.writing import DatasetWriter


def make_cars(out: Path, options: ViewOptions = DEFAULT_VIEWS, *, train: int = 48, new: int = 16) -> None:
    """Makes cars and renders them into a new dataset.

    Args:
        out: folder of the dataset; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        train: cars to learn in stage 1.
        new: cars kept for stage 2.

    Raises:
        UserError: the counts are negative or both 0, or a car does not fit the given box.
    """
    if train < 0 or new < 0 or train + new == 0:
        raise UserError(f"train = {train}, new = {new}: ask for at least one car.")
    size, bounds = (options.size, options.size), []
    with DatasetWriter(out, size, alpha=True, origin=f"made cars, seed {options.seed}") as writer:
        for number in tracked(range(train + new), "making cars"):
            soup = make_car(number, options.seed)
            split = "train" if number < train else "new"
            render_object(writer, f"car_{number:04d}", soup, split, options)
            bounds.append(soup.bounds)
        writer.finish(scene_box(bounds, options))
    say(f"{out}: {train + new} cars")


def make_car(number: int, seed: int = 0, kind: str | None = None) -> TriangleSoup:
    """Makes one car: nose toward +x, z up, bounding box centered at the origin with diagonal 1."""
    rng = np.random.default_rng([seed, number])
    kind = kind or in_turn(KINDS, number, seed)
    car = draw_car(rng, kind)
    livery = draw_livery(rng, car)
    skin = loft(car)
    v, u = np.meshgrid(*(np.linspace(0, 1, count) for count in skin.points.shape[:2]), indexing="ij")
    uv, texture = np.clip(np.stack([u, v], -1), 0.001, 0.999), paint_body(car, livery, skin)
    body = _grid_soup(skin.points, skin.normals, uv=uv, texture=texture, cutoff=0.5)
    soups = [body, floor(car), *wheels(car, wheel_picture(rng)), *extras(rng, car, livery.paint)]
    if kind == "open":
        soups += cockpit(rng, car)
    return shadowed(TriangleSoup.joined(soups), rng).normalized()


# Parts


Color = tuple[float, float, float]
AROUND = 36


def in_turn(kinds: Sequence[str], number: int, seed: int) -> str:
    """Returns the kind of object `number`. Each round holds every kind once, in a random order."""
    order = np.random.default_rng([seed, 1 << 20, number // len(kinds)]).permutation(len(kinds))
    return kinds[order[number % len(kinds)]]


def grid_faces(rows: int, columns: int) -> Int[np.ndarray, "f 3"]:
    """Returns two triangles for each cell of a grid of points that is stored row by row."""
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)]).reshape(-1, 3)


def lathe(
    outline: Float[np.ndarray, "n 2"],
    center: tuple[float, float, float],
    texture: UInt8[np.ndarray, "h w 4"] | None,
    color: Color,
) -> TriangleSoup:
    """Makes a solid of revolution around the y axis from its outline (y, radius). The texture is projected
    along y and covers the outline's largest radius."""
    angle = np.linspace(0, 2 * np.pi, AROUND + 1)

    def spun(y: np.ndarray, radius: np.ndarray) -> np.ndarray:
        y = np.broadcast_to(y, (len(y), len(angle)))
        return np.stack([radius * np.cos(angle), y, radius * np.sin(angle)], -1)

    radius, steps = outline[:, 1:], np.diff(outline, axis=0)
    slopes = np.concatenate([steps[:1], steps[:-1] + steps[1:], steps[-1:]])
    ring, normals = spun(outline[:, :1], radius), spun(slopes[:, 1:], -slopes[:, :1])
    uv = 0.5 + ring[..., [0, 2]] / (2 * radius.max()) * 0.985
    return _grid_soup(ring + np.asarray(center), normals, color, uv=uv, texture=texture)


def blob(
    center: tuple[float, float, float],
    half: tuple[float, float, float],
    color: Color,
    squareness: float = 4.0,
    lean: float = 0.0,
) -> TriangleSoup:
    """Makes a rounded box (superellipsoid). `lean` moves its top backward, meters per meter of height."""
    across, down = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(-np.pi / 2, np.pi / 2, 15))
    power = 2 / squareness

    def signed(value: np.ndarray) -> np.ndarray:
        return np.sign(value) * np.abs(value) ** power

    ring = signed(np.cos(down))
    points = np.stack(
        [ring * signed(np.cos(across)), ring * signed(np.sin(across)), signed(np.sin(down))], -1
    )
    points = points * np.asarray(half)
    points[..., 0] -= lean * points[..., 2]
    normals = grid_normals(points)
    outward = (points * normals).sum(-1, keepdims=True) >= 0
    normals = np.where(outward, normals, -normals)
    normals[[0, -1]] = [[[0, 0, -1.0]], [[0, 0, 1.0]]]
    return _grid_soup(points + np.asarray(center), normals, color)


def _grid_soup(
    points: Float[np.ndarray, "s a 3"],
    normals: Float[np.ndarray, "s a 3"],
    color: Color = (1.0, 1.0, 1.0),
    uv: Float[np.ndarray, "s a 2"] | None = None,
    texture: UInt8[np.ndarray, "h w 4"] | None = None,
    cutoff: float = OPAQUE,
) -> TriangleSoup:
    """Makes a surface from a grid of points."""
    uv = None if uv is None else uv.reshape(-1, 2)
    return soup_from_mesh(
        points.reshape(-1, 3), grid_faces(*points.shape[:2]), normals=normals.reshape(-1, 3), uv=uv,
        colors=(*color, 1.0), texture=texture, cutoff=cutoff,
    )  # fmt: skip


def wheel_picture(rng: np.random.Generator) -> UInt8[np.ndarray, "192 192 4"]:
    """Draws rim and tire seen from outside: spokes, a steel wheel or a hub cap."""
    grid = (np.arange(192) + 0.5) / 96 - 1
    x, y = np.meshgrid(grid, grid)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    rim = float(rng.uniform(0.66, 0.76))
    shine = float(rng.uniform(0.75, 1.0)) if rng.random() < 0.85 else 0.3
    metal = np.array([shine, shine, shine * 1.02])
    spokes = int(rng.choice([5, 5, 6, 7, 8, 10, 12]))
    twist = float(rng.choice([0.0, 0.0, 0.5]))
    phase = (angle * spokes / (2 * np.pi) + twist * radius) % 1
    width = float(rng.uniform(0.2, 0.42))
    spoke = (np.abs(phase - 0.5) < width / 2 * (1.25 - 0.5 * radius / rim)) | (radius < 0.24 * rim)
    picture = np.full((192, 192, 3), 0.09)
    picture[radius < 0.9] = 0.11
    inside = radius < rim
    picture[inside] = 0.10 if rng.random() < 0.75 else 0.28
    picture[inside & spoke] = metal
    picture[(radius < rim) & (radius > rim - 0.085)] = metal * 0.95
    picture[radius < 0.1 * rim] = metal * 0.6
    rgba = np.concatenate([picture, np.ones_like(picture[..., :1])], -1)
    return (rgba * 255 + 0.5).astype(np.uint8)


def wheels(car: Car, picture: UInt8[np.ndarray, "h w 4"]) -> list[TriangleSoup]:
    """Makes four wheels, each in a dark well."""
    r, w = car.wheel, 0.105 if car.kind not in ("suv", "pickup", "sports") else 0.125
    tire = np.array([
        (-w, 0.3), (-w, 0.92), (-0.8 * w, 0.985), (-0.5 * w, 1), (0.5 * w, 1), (0.8 * w, 0.985),
        (0.97 * w, 0.93), (w, 0.82), (0.93 * w, 0.73), (0.72 * w, 0.68), (0.66 * w, 0.3), (0.74 * w, 0.0),
    ])  # fmt: skip
    soups = []
    for axle in (car.front_axle, car.rear_axle):
        end = min(abs(axle) / car.length * 2, 1)
        outside = car.width / 2 * (1 - car.taper * max((end - 0.44) / 0.56, 0) ** 2.2) - 0.015
        for side in (1, -1):
            outline = tire * [side, r]
            soups.append(lathe(outline, (axle, side * (outside - w), r), picture, (1.0, 1.0, 1.0)))
            depth, radius = -side * (2 * w + 0.06), car.arch + 0.005
            outline = np.array([(0.0, radius), (depth, radius), (depth, 0.01)])
            well = lathe(outline, (axle, side * (outside - 0.075), r), None, (0.05, 0.05, 0.05))
            soups.append(well.select(well.corners[:, :, 2].min(1) > car.sill - 0.03))
    return soups


def floor(car: Car) -> TriangleSoup:
    """Makes the dark underside."""
    half, end = car.width / 2 * 0.8, car.length / 2 - 0.3
    points = np.array([(end, half), (-end, half), (-end, -half), (end, -half)])
    points = np.concatenate([points, np.full((4, 1), car.sill + 0.03)], 1)
    return soup_from_mesh(points, np.array([[0, 1, 2], [0, 2, 3]]), colors=(0.05, 0.05, 0.05, 1.0))


def extras(rng: np.random.Generator, car: Car, paint: Color) -> list[TriangleSoup]:
    """Makes mirrors, exhaust, and at random a wing, roof rails, a roof box or a roll bar."""
    dark, cowl, half = (0.10, 0.10, 0.11), car.knots["cowl"], car.width / 2
    soups, color = [], paint if rng.random() < 0.65 else dark
    # Mirrors and exhaust
    for side in (1, -1):
        x, z = cowl[0] - 0.32, car.belt + 0.085
        at = float(half_width(car, np.array([x]), np.array([z]))[0])
        soups.append(blob((x, side * (at + 0.10), z), (0.06, 0.095, 0.062), color, 2.8))
        pipe = (-car.length / 2 + 0.30, side * half * 0.45, car.sill + 0.09)
        soups.append(blob(pipe, (0.14, 0.035, 0.03), (0.5, 0.5, 0.52), 2.2))
    # Wing
    tail = car.knots["tail"]
    sporty = car.kind in ("coupe", "sports", "saloon", "open")
    if sporty and rng.random() < (0.55 if car.kind == "sports" else 0.25):
        rise, wing = float(rng.uniform(0.12, 0.26)), paint if rng.random() < 0.6 else dark
        x = tail[0] + 0.26
        soups.append(blob((x, 0.0, tail[1] + rise), (0.13, half * 0.78, 0.022), wing, 5.0))
        for side in (1, -1):
            stand = (x, side * half * 0.5, tail[1] + rise / 2)
            soups.append(blob(stand, (0.07, 0.02, rise / 2 + 0.05), wing, 5.0))
            soups.append(blob((x, side * half * 0.78, tail[1] + rise), (0.14, 0.015, 0.07), wing, 5.0))
    elif car.kind in ("hatchback", "suv") and rng.random() < 0.6:
        eave = car.knots["eave"]
        soups.append(blob((eave[0] - 0.1, 0.0, eave[1] + 0.0), (0.15, half * 0.62, 0.025), paint, 4.0))
    # Roof rails and roof box
    inner = half - car.ledge - car.tumblehome * (car.height - car.belt) - 0.1
    if car.kind in ("estate", "suv") and rng.random() < 0.6:
        brow, eave = car.knots["brow"], car.knots["eave"]
        for side in (1, -1):
            center = ((brow[0] + eave[0]) / 2, side * inner * 0.92, car.height - 0.035)
            metal = dark if rng.random() < 0.5 else (0.7, 0.7, 0.72)
            soups.append(blob(center, ((brow[0] - eave[0]) / 2 - 0.1, 0.022, 0.05), metal, 6.0))
    if car.kind in ("estate", "suv", "hatchback") and rng.random() < 0.12:
        center = (car.knots["roof"][0] - 0.2, 0.0, car.height + 0.17)
        soups.append(blob(center, (0.75, 0.36, 0.15), dark, 3.5))
    # Roll bar
    if car.kind == "pickup" and rng.random() < 0.4:
        x = car.knots["glass"][0] - 0.18
        soups.append(blob((x, 0.0, car.height - 0.06), (0.03, half * 0.72, 0.03), dark, 3.0))
        for side in (1, -1):
            center = (x, side * half * 0.72, (car.height + car.belt) / 2)
            soups.append(blob(center, (0.03, 0.03, (car.height - car.belt) / 2), dark, 3.0))
    return soups


def cockpit(rng: np.random.Generator, car: Car) -> list[TriangleSoup]:
    """Makes seats, dashboard, steering wheel and windscreen of an open car."""
    colors = ((0.12, 0.11, 0.11), (0.45, 0.26, 0.14), (0.72, 0.62, 0.48), (0.45, 0.07, 0.07))
    leather = colors[int(rng.integers(4))]
    rear, front, _, base = car.opening
    rows = [front - 0.95] if front - rear < 2.0 else [front - 0.85, rear + 0.32]
    soups = []
    for x in rows:
        for side in (1, -1):
            y = side * car.width * 0.2
            soups.append(blob((x + 0.2, y, base + 0.14), (0.26, 0.23, 0.11), leather, 3.5))
            soups.append(blob((x - 0.08, y, base + 0.40), (0.085, 0.22, 0.30), leather, 3.5, 0.25))
            soups.append(blob((x - 0.19, y, base + 0.76), (0.05, 0.11, 0.075), leather, 3.0))
    dashboard, wheel = (front - 0.1, 0.0, car.belt - 0.08), (front - 0.36, car.width * 0.2, car.belt - 0.04)
    soups.append(blob(dashboard, (0.16, car.width / 2 - 0.2, 0.10), (0.1, 0.1, 0.1), 3.5))
    soups.append(blob(wheel, (0.03, 0.17, 0.17), (0.05, 0.05, 0.05), 2.0, 0.4))
    return soups + [_windscreen(car)]


def _windscreen(car: Car) -> TriangleSoup:
    """Makes a curved pane in a dark frame."""
    up, across = np.meshgrid(np.linspace(0, 1, 8), np.linspace(-1, 1, 25), indexing="ij")
    base, top = car.knots["cowl"], car.height
    half = car.width / 2 - 0.1 - 0.16 * up
    x = base[0] - 0.06 - 0.95 * (top - base[1]) * up - 0.22 * across**2
    points = np.stack([x, half * across, base[1] - 0.04 + (top - base[1] + 0.04) * up], -1)
    picture = np.zeros((64, 128, 4), np.uint8)
    picture[...] = (150, 170, 180, 90)
    picture[:5] = picture[-3:] = (25, 25, 28, 255)
    picture[:, :4] = picture[:, -4:] = (25, 25, 28, 255)
    uv = np.stack([(across + 1) / 2 * 0.98 + 0.01, up * 0.98 + 0.01], -1)
    return _grid_soup(points, grid_normals(points), uv=uv, texture=picture, cutoff=BLEND)


def shadowed(
    soup: TriangleSoup, rng: np.random.Generator, rays: int = 24, within: float = 0.5, strength: float = 0.55
) -> TriangleSoup:
    """Darkens colors by ambient occlusion from surfaces and the ground, with `rays` directions per corner up
    to `within` meters. Normals must point outward."""
    # Distinct corners
    points = np.concatenate([soup.corners, soup.normals], -1).reshape(-1, 6)
    mixer = np.random.default_rng(0).integers(1 << 40, 1 << 62, 6)
    key = np.round(points * 10000).astype(np.int64) @ mixer
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    position, normal = points[first, :3], points[first, 3:]
    # Rays over the hemisphere of each corner
    toward = rng.normal(size=(rays, 3))
    toward = (toward / np.linalg.norm(toward, axis=1, keepdims=True)).astype(np.float32)
    direction = normal[:, None] + 0.98 * toward[None]
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    origin = np.repeat((position + 0.012 * normal)[:, None], rays, 1)
    blocked = RayCaster(soup).reached(origin.reshape(-1, 3), direction.reshape(-1, 3), within)
    ground = (direction[..., 2] < 0) & (origin[..., 2] + direction[..., 2] * within < 0)
    # Occlusion
    shade = np.maximum(blocked.reshape(-1, rays), 0.6 * ground).mean(1)
    light = 1 - strength * shade.astype(np.float32)
    colors = soup.colors.copy()
    colors[..., :3] *= light[inverse.reshape(-1)].reshape(-1, 3, 1)
    return replace(soup, colors=colors)
