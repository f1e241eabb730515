"""The body of a procedural car: its measures, and a smooth skin lofted along its length.

- Units are meters; the nose points toward +x, z is up, the ground is at z = 0.
- The side silhouette is a rounded polyline from under the nose over the roof to under the tail. A
  cross-section starts at each of its points: a cap (roof, bonnet or front face), the upper side (windows) and
  the lower side.
- Cross-sections bend backward from the middle to the sides, which rounds nose, windscreen and tail in plan.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float

KINDS = ("saloon", "hatchback", "estate", "suv", "van", "pickup", "coupe", "sports", "open")
STATIONS = 200
CAP, UPPER, LOWER = 30, 9, 15
"""Grid cells across half a section: cap, upper side, lower side."""


@dataclass(frozen=True)
class Car:
    """The measures of one car, in meters."""

    kind: str
    length: float
    width: float
    height: float
    sill: float
    """Height of the lower edge of the body."""
    belt: float
    """Height where the windows begin, at the middle of the car."""
    wedge: float
    """Rise of the belt from front to rear, meters per meter."""
    tumblehome: float
    """Inward lean of the windows, meters per meter of height."""
    ledge: float
    """Setback of the windows from the shoulder."""
    cap: float
    """Height of the rounding between side and top."""
    squareness: float
    """Exponent of the rounding: 2 an ellipse, 6 nearly a box."""
    bow: float
    """Setback of the corners of nose and tail."""
    taper: float
    """Share of the width lost toward nose and tail."""
    softness: float
    """Radius of the silhouette's corners."""
    bulge: float
    """Height of the wings above the bonnet."""
    flare: float
    """Overhang of the wheel arches."""
    wheel: float
    """Radius of the wheels."""
    front_axle: float
    rear_axle: float
    """Position of the axles along x."""
    knots: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Corners (x, z) of the silhouette from nose to tail, by name."""
    opening: tuple[float, float, float, float] | None = None
    """Cockpit or load bed: rear and front x, how far inside the sides, floor height."""

    @property
    def arch(self) -> float:
        """Radius of the wheel openings."""
        return self.wheel * 1.1 + 0.02

    def belt_at(self, x: np.ndarray) -> np.ndarray:
        return self.belt - self.wedge * x


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def draw_car(rng: np.random.Generator, kind: str) -> Car:
    """Draws a car of this kind; every measure comes from the usual range."""
    between = partial(_uniform, rng)
    length, width, height, wheel, sill, belt, cowl, cowl_z, lead_z, rake, tumblehome = (
        between(*pair) for pair in _MEASURES[kind]
    )
    softness = between(0.04, 0.10) * (0.8 if kind in ("suv", "van", "pickup") else 1)
    nose, bumper_z = length / 2, between(0.42, 0.52) + (0.1 if kind in ("suv", "pickup", "van") else 0)
    cowl_x = nose - cowl * length
    brow_x = cowl_x - rake
    roof_x, glass, tail = _rear_end(rng, kind, length, belt, brow_x)
    top = height - between(0.01, 0.03) * min(brow_x - roof_x, 1.5)
    knots = {
        "under": (nose - between(0.06, 0.18), sill + 0.05),
        "bumper": (nose, bumper_z),
        "lead": (nose - between(0.04, 0.16) - (0.2 if kind == "sports" else 0), lead_z),
        "hood": (nose - 0.45 * cowl * length, lead_z + (cowl_z - lead_z) * between(0.5, 0.68)),
        "cowl": (cowl_x, cowl_z),
        "brow": (brow_x, top),
        "roof": (brow_x + (roof_x - brow_x) * 0.45, height),
        "eave": (roof_x, top - between(0.0, 0.05)),
        "glass": glass,
        "tail": tail,
        "stern": (-length / 2, between(0.45, 0.58) + (0.1 if kind in ("suv", "pickup", "van") else 0)),
        "beneath": (-length / 2 + between(0.06, 0.16), sill + 0.07),
    }
    opening = None
    if kind == "open":
        for name in ("brow", "roof", "eave"):
            del knots[name]
        opening = (glass[0] + 0.12, cowl_x - 0.12, 0.16, 0.42)
    if kind == "pickup":
        opening = (-length / 2 + 0.10, glass[0] - 0.10, 0.11, belt - 0.42)
    front_axle = nose - between(0.165, 0.2) * length
    if kind in ("van", "hatchback"):
        front_axle = nose - between(0.17, 0.19) * length
    rear_overhang = between(0.15, 0.19) if kind in ("hatchback", "suv") else between(0.19, 0.24)
    sporty = kind in ("coupe", "sports", "open")
    return Car(
        kind, length, width, height, sill, belt, between(0.0, 0.035), tumblehome, between(0.015, 0.06),
        cap=between(0.13, 0.2) if kind != "van" else between(0.16, 0.24),
        squareness=between(2.8, 4.2) if sporty else between(3.4, 5.0),
        bow=between(0.18, 0.36) if kind != "van" else between(0.12, 0.22),
        taper=between(0.05, 0.13), softness=softness,
        bulge=between(0.03, 0.07) if sporty else between(0.0, 0.02),
        flare=between(0.01, 0.04), wheel=wheel, front_axle=front_axle,
        rear_axle=-length / 2 + rear_overhang * length, knots=knots, opening=opening,
    )  # fmt: skip


# fmt: off
_MEASURES = {
    # length, width, height, wheel, sill, belt;
    # cowl (share of length), cowl height, leading edge, rake, tumblehome
    "saloon": (
        (4.30, 4.90), (1.72, 1.86), (1.38, 1.48), (0.30, 0.34), (0.19, 0.25), (0.90, 0.97),
        (0.26, 0.31), (0.96, 1.02), (0.68, 0.80), (0.70, 0.95), (0.28, 0.50),
    ),
    "hatchback": (
        (3.60, 4.30), (1.65, 1.80), (1.42, 1.56), (0.28, 0.33), (0.19, 0.25), (0.90, 0.99),
        (0.22, 0.27), (0.98, 1.06), (0.70, 0.84), (0.60, 0.90), (0.22, 0.42),
    ),
    "estate": (
        (4.40, 4.90), (1.72, 1.86), (1.42, 1.54), (0.30, 0.34), (0.19, 0.26), (0.90, 0.97),
        (0.25, 0.29), (0.96, 1.03), (0.68, 0.80), (0.65, 0.90), (0.24, 0.42),
    ),
    "suv": (
        (4.20, 4.90), (1.80, 1.95), (1.65, 1.85), (0.35, 0.40), (0.28, 0.36), (1.06, 1.16),
        (0.24, 0.29), (1.12, 1.22), (0.92, 1.06), (0.40, 0.75), (0.14, 0.34),
    ),
    "van": (
        (4.40, 5.40), (1.78, 2.00), (1.80, 2.20), (0.31, 0.35), (0.22, 0.30), (1.06, 1.18),
        (0.14, 0.19), (1.12, 1.24), (0.80, 0.98), (0.55, 0.85), (0.06, 0.18),
    ),
    "pickup": (
        (4.90, 5.50), (1.78, 1.95), (1.68, 1.84), (0.35, 0.40), (0.30, 0.40), (1.04, 1.12),
        (0.25, 0.29), (1.08, 1.16), (0.90, 1.02), (0.45, 0.70), (0.20, 0.36),
    ),
    "coupe": (
        (4.10, 4.60), (1.72, 1.86), (1.24, 1.36), (0.31, 0.34), (0.15, 0.21), (0.84, 0.90),
        (0.30, 0.35), (0.90, 0.95), (0.62, 0.74), (0.65, 0.85), (0.40, 0.65),
    ),
    "sports": (
        (4.10, 4.60), (1.80, 1.98), (1.10, 1.22), (0.31, 0.34), (0.12, 0.17), (0.74, 0.82),
        (0.24, 0.28), (0.80, 0.86), (0.52, 0.60), (0.85, 1.05), (0.50, 0.80),
    ),
    "open": (
        (3.90, 4.50), (1.66, 1.85), (1.18, 1.28), (0.29, 0.33), (0.15, 0.22), (0.82, 0.90),
        (0.29, 0.36), (0.88, 0.94), (0.62, 0.74), (0.45, 0.65), (0.30, 0.50),
    ),
}
# fmt: on


def _rear_end(
    rng: np.random.Generator, kind: str, length: float, belt: float, brow_x: float
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Draws the ends of roof (x) and rear window (x, z), and the upper edge of the tail (x, z)."""
    between = partial(_uniform, rng)
    end = -length / 2
    if kind == "saloon":
        glass = (end + between(0.14, 0.19) * length, belt + between(0.06, 0.12))
        return glass[0] + between(0.55, 0.8), glass, (end + between(0.02, 0.08), belt + between(0.0, 0.08))
    if kind in ("hatchback", "estate"):
        glass = (end + between(0.08, 0.2), belt + between(0.03, 0.1))
        return glass[0] + between(0.25, 0.6), glass, (end + 0.04, belt - between(0.04, 0.12))
    if kind == "suv":
        glass = (end + between(0.08, 0.16), belt + between(0.02, 0.08))
        return glass[0] + between(0.15, 0.4), glass, (end + 0.05, belt - 0.08)
    if kind == "van":
        glass = (end + between(0.05, 0.1), belt + 0.02)
        return glass[0] + between(0.04, 0.16), glass, (end + 0.04, belt - 0.08)
    if kind == "pickup":
        cabin = between(1.1, 1.4) if rng.random() < 0.5 else between(1.7, 2.0)
        roof_x = brow_x - cabin
        return roof_x, (roof_x - between(0.08, 0.2), belt + 0.01), (end + 0.03, belt + 0.02)
    if kind == "coupe":
        glass = (end + between(0.1, 0.17) * length, belt + between(0.04, 0.1))
        roof_x = min(glass[0] + between(0.65, 0.95), brow_x - 0.6)
        return roof_x, glass, (end + between(0.02, 0.08), belt + between(0.0, 0.08))
    if kind == "sports":
        glass = (end + between(0.16, 0.24) * length, belt + between(0.08, 0.14))
        return min(glass[0] + between(0.6, 0.9), brow_x - 0.6), glass, (end + 0.06, belt + between(0.02, 0.1))
    back = end + between(0.24, 0.3) * length
    return back + 0.2, (back, belt + 0.04), (end + between(0.03, 0.1), belt - between(0.0, 0.06))


@dataclass(frozen=True)
class Skin:
    """The lofted body as a grid: s stations from nose to tail, a points from left (+y) to right."""

    points: Float[np.ndarray, "s a 3"]
    normals: Float[np.ndarray, "s a 3"]
    """Outward, unit length."""
    marks: dict[str, float]
    """Station (0 … s − 1, fractional) of each knot of the silhouette."""

    def finer(
        self, rows: int, columns: int
    ) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
        """Returns positions, normals and stations at the centers of rows x columns texels over the grid."""
        down, across = _interpolation(rows, len(self.points)), _interpolation(columns, self.points.shape[1])
        fields = np.concatenate([self.points, self.normals], -1).astype(np.float32)
        fine = np.einsum("hs,sac->hac", down, fields, optimize=True)
        fine = np.einsum("wa,hac->hwc", across, fine, optimize=True)
        station = down @ np.arange(len(self.points), dtype=np.float32)
        return fine[..., :3], fine[..., 3:], np.repeat(station[:, None], columns, 1)


def _interpolation(fine: int, coarse: int) -> np.ndarray:
    """Returns linear interpolation from grid points 0 … coarse − 1 to texel centers, as a matrix."""
    at = (np.arange(fine) + 0.5) / fine * (coarse - 1)
    low = np.minimum(at.astype(int), coarse - 2)
    matrix = np.zeros((fine, coarse), np.float32)
    matrix[np.arange(fine), low] = 1 - (at - low)
    matrix[np.arange(fine), low + 1] = at - low
    return matrix


def silhouette(car: Car) -> tuple[np.ndarray, dict[str, float]]:
    """Returns the rounded side silhouette as STATIONS points (x, z), and the station of each knot."""
    # Sample the polyline densely
    corners = np.array(list(car.knots.values()))
    steps = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    dense = np.linspace(0, steps[-1], 1200)
    line = np.stack([np.interp(dense, steps, corners[:, k]) for k in (0, 1)], -1)
    # Smooth it with a Gaussian
    sigma = car.softness / (dense[1] - dense[0])
    reach = int(3 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    before = 2 * line[0] - line[reach:0:-1]
    after = 2 * line[-1] - line[-2 : -reach - 2 : -1]
    padded = np.concatenate([before, line, after])
    smooth = np.stack([np.convolve(padded[:, k], kernel / kernel.sum(), "valid") for k in (0, 1)], -1)
    # Resample
    even = np.linspace(0, steps[-1], STATIONS)
    points = np.stack([np.interp(even, dense, smooth[:, k]) for k in (0, 1)], -1)
    return points, dict(zip(car.knots, steps / steps[-1] * (STATIONS - 1)))


def _cap_curve(squareness: float) -> np.ndarray:
    """Returns CAP + 1 points of a quarter superellipse, even if it is three times as wide as high."""
    angle = np.linspace(0, np.pi / 2, 4000)
    curve = np.stack([np.sin(angle) ** (2 / squareness), np.cos(angle) ** (2 / 2.2)], -1)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve * [3, 1], axis=0), axis=1))])
    even = np.linspace(0, along[-1], CAP + 1)
    return np.stack([np.interp(even, along, curve[:, k]) for k in (0, 1)], -1)


def half_width(car: Car, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Returns half the car's width at position x and height z."""
    end = np.clip((np.abs(x) - 0.22 * car.length) / (0.28 * car.length), 0, 1)
    width = car.width / 2 * (1 - car.taper * end**2.2)
    belt = car.belt_at(x)
    middle = car.sill + 0.62 * (belt - car.sill)
    below = np.clip((middle - z) / (middle - car.sill), 0, 1)
    above = np.clip((z - middle) / (belt - middle), 0, 1)
    inward = 0.075 * below**2 + 0.025 * above**2
    step = np.clip((z - belt) / 0.05, 0, 1)
    lean = car.ledge * step * step * (3 - 2 * step) + car.tumblehome * np.maximum(z - belt, 0)
    return width * (1 - inward) - lean


def loft(car: Car) -> Skin:
    """Returns the body's skin."""
    # Heights of each cross-section
    profile, marks = silhouette(car)
    x, top = profile[:, :1], profile[:, 1:]
    ends = np.clip((np.abs(x) - 0.4 * car.length) / (0.1 * car.length), 0, 1)
    bottom = np.minimum(car.sill + 0.06 * ends**2, top - 0.004)
    cap = np.minimum(car.cap, 0.45 * (top - bottom))
    curve = _cap_curve(car.squareness)
    eaves = top - cap
    belt = np.clip(np.minimum(car.belt_at(x), eaves), bottom, None)
    z = np.concatenate(
        [
            eaves + cap * curve[None, :, 1],
            eaves + (belt - eaves) * (np.arange(1, UPPER + 1) / UPPER),
            belt + (bottom - belt) * (np.arange(1, LOWER + 1) / LOWER),
        ],
        1,
    )
    # Positions along and across
    share = np.concatenate([curve[:, 0], np.ones(UPPER + LOWER)])[None]
    wide = straight = _limited_to_ends(np.repeat(x, z.shape[1], 1), z, profile, marks)
    y = half_width(car, wide, z) * share
    reach = np.clip(y / (car.width / 2), 0, 1)
    along = np.linspace(1, -1, STATIONS)[:, None]
    wide = wide - car.bow * np.sign(along) * np.abs(along) ** 1.5 * reach**2.6
    # Wheel arches and wings
    for axle in (car.front_axle, car.rear_axle):
        ring = np.hypot(wide - axle, z - car.wheel) - car.arch
        y = y + car.flare * np.exp(-((ring / 0.09) ** 2)) * (reach > 0.8)
        swell = np.clip((reach - 0.45) / 0.35, 0, 1)
        low = z < car.belt_at(wide) + 0.12
        z = z + car.bulge * swell**2 * (3 - 2 * swell) * np.exp(-(((wide - axle) / 0.42) ** 2)) * low
    z = _sunken(car, straight, y, z)
    # Mirror
    left = np.stack([wide, y, z], -1)
    points = np.concatenate([left[:, :0:-1], left * [1, -1, 1]], 1)
    return Skin(points, grid_normals(points), marks)


def _limited_to_ends(
    x: np.ndarray, z: np.ndarray, profile: np.ndarray, marks: dict[str, float]
) -> np.ndarray:
    """Limits positions x to nose and tail at height z, so that bumpers curve inward below."""
    nose = profile[: int(marks["bumper"]) + 1]
    tail = profile[int(marks["stern"]) :][::-1]
    return np.clip(x, np.interp(z, tail[:, 1], tail[:, 0]), np.interp(z, nose[:, 1], nose[:, 0]))


def _sunken(car: Car, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Lowers heights z to the floor of the cockpit or load bed."""
    if car.opening is None:
        return z
    rear, front, inside, floor = car.opening
    margin = np.minimum(np.minimum(x - rear, front - x), car.width / 2 - inside - y)
    share = np.clip(margin / 0.05, 0, 1)
    lowered = z > car.belt_at(x) - 0.2
    return np.where(lowered, z + (np.minimum(floor, z) - z) * share, z)


def grid_normals(points: Float[np.ndarray, "s a 3"]) -> Float[np.ndarray, "s a 3"]:
    """Returns outward unit normals of a grid of points: normalized sums of the adjacent cells' normals."""
    one, two = points[1:, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, 1:]
    cell = np.cross(one, two)
    normals = np.zeros_like(points)
    for rows in (slice(0, -1), slice(1, None)):
        for columns in (slice(0, -1), slice(1, None)):
            normals[rows, columns] += cell
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    middle = normals.shape[1] // 2
    return normals if normals[:, middle, 2].sum() > 0 else -normals
