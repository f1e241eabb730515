"""Paint of a procedural car: a texture of its body, drawn with signed distances at every texel.

- Every texel has a position (x, y, z), a normal and a station on the silhouette. So windows, lamps, door gaps
  and stripes are shapes in meters, with soft edges of about a centimeter.
- Wheel openings are transparent texels.
"""

from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from latentscenes.data.synthetic.body import Car, Skin

ROWS, COLUMNS = 608, 496
EDGE = 0.009
"""Half the width of a soft edge, meters."""
Color = tuple[float, float, float]
Point = tuple[float, float]
# fmt: off
PAINTS: tuple[Color, ...] = (
    (0.93, 0.93, 0.92), (0.90, 0.90, 0.91), (0.74, 0.76, 0.78), (0.62, 0.64, 0.67), (0.36, 0.38, 0.41),
    (0.11, 0.11, 0.12), (0.14, 0.15, 0.18), (0.74, 0.07, 0.08), (0.86, 0.12, 0.08), (0.52, 0.05, 0.10),
    (0.93, 0.42, 0.06), (0.97, 0.76, 0.09), (0.10, 0.22, 0.58), (0.13, 0.40, 0.78), (0.36, 0.62, 0.86),
    (0.05, 0.10, 0.28), (0.05, 0.30, 0.17), (0.25, 0.55, 0.24), (0.55, 0.75, 0.15), (0.10, 0.52, 0.52),
    (0.80, 0.72, 0.58), (0.46, 0.33, 0.22), (0.42, 0.16, 0.48), (0.85, 0.55, 0.62),
)
# fmt: on
UPRIGHT = ("hatchback", "estate", "van", "suv", "pickup")
GLASS, PLASTIC, CHROME = (0.12, 0.145, 0.17), (0.13, 0.13, 0.14), (0.80, 0.81, 0.83)


@dataclass(frozen=True)
class Livery:
    """Colors and details that are painted on a car."""

    paint: Color
    accent: Color
    """Second color, of roof, stripes or numbers."""
    style: str
    """plain, roof, stripes, offset, flank, lower, number or checker."""
    number: int
    doors: int
    """Doors on each side, one or two."""
    lamps: tuple[float, float, float, float]
    """Headlamps: distance of the center from the car's middle line as a share of half the width, height as a
    share between bumper and leading edge, half width and half height in meters."""
    round_lamps: bool
    upright_tail: bool
    grille: tuple[float, float]
    """Half width as a share of half the car's, half height in meters."""
    chrome: bool
    plastic_bumpers: bool
    cladding: bool
    panel_van: bool
    trim: bool
    """A dark strip along the doors."""
    plate: Color
    tail: Color
    glass: Color


def draw_livery(rng: np.random.Generator, car: Car) -> Livery:
    """Draws the paint at random."""
    paint = PAINTS[rng.integers(len(PAINTS))]
    others = [color for color in PAINTS if np.abs(np.subtract(color, paint)).max() > 0.35]
    styles = ["plain"] * 9 + ["roof", "stripes", "flank", "lower", "number"]
    if car.kind in ("coupe", "sports", "open", "hatchback"):
        styles += ["stripes", "offset", "number", "number", "checker"]
    rugged = car.kind in ("suv", "pickup", "van")
    styles += ["flank", "lower", "flank"] if rugged else []
    few = car.kind in ("coupe", "sports", "open", "van")
    tint = rng.uniform(0.8, 1.5)

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    return Livery(
        paint, others[rng.integers(len(others))], styles[rng.integers(len(styles))],
        int(rng.integers(1, 100)), doors=1 if few or car.kind == "hatchback" and chance(0.4) else 2,
        lamps=(between(0.66, 0.76), between(0.62, 0.85), between(0.12, 0.2), between(0.05, 0.09)),
        round_lamps=chance(0.25), upright_tail=car.kind in UPRIGHT and chance(0.75),
        grille=(between(0.22, 0.46), between(0.04, 0.11) * (1.4 if rugged else 1)),
        chrome=chance(0.5), plastic_bumpers=chance(0.5 if rugged else 0.25),
        cladding=car.kind in ("suv", "pickup") and chance(0.6), panel_van=car.kind == "van" and chance(0.5),
        trim=chance(0.4), plate=((0.95, 0.95, 0.93), (0.96, 0.82, 0.25))[chance(0.25)],
        tail=(between(0.6, 0.8), 0.04, 0.05), glass=tuple(float(channel * tint) for channel in GLASS),
    )  # fmt: skip


class Canvas:
    """The body's texture during painting."""

    def __init__(self, skin: Skin, base: Color):
        position, normal, self.station = skin.finer(ROWS, COLUMNS)
        self.x, self.y, self.z = np.moveaxis(position, -1, 0)
        self.facing, self.side, self.up = np.moveaxis(normal, -1, 0)
        self.aside = np.abs(self.y)
        self.color = np.empty((ROWS, COLUMNS, 3), np.float32)
        self.color[:] = base
        self.alpha = np.ones((ROWS, COLUMNS), np.float32)

    def fill(self, distance: np.ndarray, color: Color | np.ndarray, strength: float = 1.0) -> None:
        """Paints where a signed distance (meters) is negative."""
        cover = np.clip(0.5 - distance / (2 * EDGE), 0, 1) * strength
        rows = np.flatnonzero(cover.any(1))
        if len(rows):
            part = slice(rows[0], rows[-1] + 1)
            tint = color[part] if isinstance(color, np.ndarray) else np.asarray(color, np.float32)
            self.color[part] += cover[part, :, None] * (tint - self.color[part])

    def line(
        self, distance: np.ndarray, within: np.ndarray,
        half: float = 0.009, color: Color = (0.04, 0.04, 0.05), strength: float = 0.8,
    ) -> None:  # fmt: skip
        """Paints a thin line where `distance` is zero, inside the shape `within`."""
        self.fill(np.maximum(np.abs(distance) - half, within), color, strength)

    def picture(self) -> UInt8[np.ndarray, "h w 4"]:
        """Returns the texture, first row on top, nose at the lower edge."""
        rgba = np.concatenate([self.color, self.alpha[..., None]], -1)
        return (np.clip(rgba[::-1], 0, 1) * 255 + 0.5).astype(np.uint8)


def rectangle(u: np.ndarray, v: np.ndarray, center: Point, half: Point, corner: float = 0.02) -> np.ndarray:
    """Returns the signed distance to a rectangle with rounded corners."""
    corner = min(corner, *half)
    du, dv = np.abs(u - center[0]) - half[0] + corner, np.abs(v - center[1]) - half[1] + corner
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0) - corner


def both(*distances: np.ndarray) -> np.ndarray:
    """Returns the signed distance to the intersection of shapes."""
    return reduce(np.maximum, distances)


def paint_body(car: Car, livery: Livery, skin: Skin) -> UInt8[np.ndarray, "h w 4"]:
    """Returns the body's texture."""
    canvas = Canvas(skin, livery.paint)
    _ornament(canvas, car, livery, skin)
    _lower_parts(canvas, car, livery)
    _gaps(canvas, car, livery, skin)
    if car.kind != "open":
        _windows(canvas, car, livery, skin)
    _front(canvas, car, livery)
    _rear(canvas, car, livery)
    # Cockpit or load bed
    if car.opening is not None:
        rear, front, inside, _ = car.opening
        along, across = both(rear - canvas.x, canvas.x - front) - 0.05, canvas.aside - car.width / 2 + inside
        sunk = both(along, across - 0.02, canvas.z - car.belt_at(canvas.x) + 0.01)
        dark = (0.16, 0.15, 0.15) if car.kind == "open" else tuple(0.55 * c + 0.03 for c in livery.paint)
        canvas.fill(sunk, dark)
    # Wheel openings
    for axle in (car.front_axle, car.rear_axle):
        ring = np.hypot(canvas.x - axle, canvas.z - car.wheel) - car.arch
        cut = both(ring, 0.5 * car.width / 2 - canvas.aside)
        canvas.alpha = np.minimum(canvas.alpha, np.clip(0.5 + cut / 0.02, 0, 1))
    return canvas.picture()


def side_glass(car: Car, livery: Livery) -> list[tuple[float, float]]:
    """Returns the side windows from front to rear as (front x, rear x) at the belt, without pillars."""
    cowl, glass = car.knots["cowl"][0], car.knots["glass"][0]
    start, end = cowl - 0.22, glass + (0.12 if car.kind in ("hatchback", "estate", "suv", "van") else 0.2)
    if livery.panel_van:
        return [(start, start - 1.0)]
    if car.kind == "van":
        cuts = [start - 1.0, (start - 1.0 + end) / 2]
    elif car.kind in ("estate", "suv"):
        cuts = [start - 1.05, start - 1.95] if start - 1.95 > end + 0.35 else [start - 1.05]
    elif car.kind == "sports":
        cuts = []
    else:
        cuts = [start + (end - start) * (0.62 if livery.doors == 1 else 0.5)]
    edges = [start, *cuts, end]
    return list(zip(edges[:-1], edges[1:]))


def _windows(canvas: Canvas, car: Car, livery: Livery, skin: Skin) -> None:
    """Paints windscreen, rear window and side windows: dark glass, slightly lighter toward the sky."""
    z, aside = canvas.z, canvas.aside
    cowl, brow, eave, glass = (car.knots[name] for name in ("cowl", "brow", "eave", "glass"))
    # Glass color with a reflection
    level = np.clip((z - car.belt) / (car.height - car.belt), 0, 1)[..., None]
    tint = np.asarray(livery.glass, np.float32) * (0.9 + 0.9 * level)
    tint = tint + 0.05 * np.maximum(canvas.up, 0)[..., None]
    streak = np.exp(-((((canvas.x + 0.6 * z + 0.35 * canvas.y) % 1.3 - 0.65) / 0.16) ** 2))
    tint += 0.12 * (streak * np.clip(level[..., 0] * 2, 0, 1))[..., None]
    # Windscreen and rear window
    per_station = np.linalg.norm(np.subtract(brow, cowl)) / max(skin.marks["brow"] - skin.marks["cowl"], 1e-6)
    limit = car.width / 2 - car.ledge - car.tumblehome * np.maximum(z - car.belt, 0) - 0.10
    for near, far, fringe in (("cowl", "brow", 0.05), ("eave", "glass", 0.06)):
        if far == "glass" and livery.panel_van:
            continue
        first, last = skin.marks[near], skin.marks[far]
        middle, half = (first + last) / 2, (last - first) / 2 * per_station - fringe
        v = (canvas.station - middle) * per_station
        screen = rectangle(aside, v, (0.0, 0.0), (10.0, max(half, 0.08)), 0.01)
        canvas.fill(both(screen - 0.02, aside - limit - 0.02), PLASTIC)
        canvas.fill(both(screen, aside - limit), tint)
    # Side windows
    steep = np.abs(canvas.side) < 0.35
    upper = np.where(steep, 1.0, z - (car.height - car.cap * 0.62 - 0.015))
    above = car.belt_at(canvas.x) + 0.035 - z
    front = _half_plane(canvas, (cowl[0] - 0.05, cowl[1]), brow, 0.085)
    back = -_half_plane(canvas, glass, eave, -(0.10 if car.kind != "van" else 0.05))
    band = both(above, upper, front, back)
    windows = side_glass(car, livery)
    outer = both(band, windows[-1][1] - canvas.x, canvas.x - windows[0][0] - 0.3)
    canvas.fill(outer - 0.02, CHROME if livery.chrome else PLASTIC)
    canvas.fill(outer, PLASTIC)
    for index, (start, end) in enumerate(windows):
        first = 0.3 if index == 0 else -0.025
        canvas.fill(both(band + 0.006, canvas.x - start - first, end + 0.025 - canvas.x), tint)


def _half_plane(canvas: Canvas, low: Point, high: Point, inset: float) -> np.ndarray:
    """Returns the distance in front of the line `low` to `high` (side view), moved backward by `inset`."""
    along = np.subtract(high, low)
    along = along / np.linalg.norm(along)
    return (canvas.x - low[0]) * along[1] - (canvas.z - low[1]) * along[0] + inset


def _gaps(canvas: Canvas, car: Car, livery: Livery, skin: Skin) -> None:
    """Paints the gaps of doors, bonnet and boot, door handles and the strip along the doors."""
    x, z, aside = canvas.x, canvas.z, canvas.aside
    # Doors
    side = 0.6 - np.abs(canvas.side)
    low, high = car.sill + 0.12, car.belt_at(x) + 0.02
    panel = both(low - z, z - high, side)
    cowl = car.knots["cowl"][0]
    front = max(cowl - 0.12, 0) if car.kind == "sports" else cowl - 0.12
    front = min(front, car.front_axle - car.arch - 0.1)
    ends = [front]
    if car.kind == "open":
        ends += [front - 1.15]
    else:
        windows = side_glass(car, livery)
        count = 2 if livery.doors == 2 and len(windows) > 1 else 1
        ends += [end for _, end in windows[:count]]
        if count == 2:
            ends[2] = max(ends[2], car.rear_axle + 0.12)
    for end in ends:
        canvas.line(x - end, panel)
    canvas.line(z - low, both(x - ends[0], ends[-1] - x, side))
    # Crease and strip
    crease = car.sill + 0.6 * (car.belt - car.sill)
    between_axles = both(x - car.front_axle - 0.3, car.rear_axle - 0.3 - x, side)
    canvas.line(z - crease - car.wedge * -x, between_axles, 0.012, (0.0, 0.0, 0.0), 0.22)
    if livery.trim:
        strip = np.abs(z - crease + 0.09) - 0.028
        canvas.fill(both(strip, x - ends[0] + 0.03, ends[-1] + 0.03 - x, side), PLASTIC)
    # Handles
    for end in ends[1:]:
        handle = rectangle(x, z, (end + 0.14, car.belt - car.wedge * end - 0.10), (0.075, 0.017), 0.012)
        canvas.fill(both(handle, side), CHROME if livery.chrome else (0.07, 0.07, 0.08))
    # Bonnet and boot
    top = 0.55 - canvas.up
    lead, tail = skin.marks["lead"], skin.marks["glass"]
    bonnet = both(cowl - x, aside - 0.78 * car.width / 2, lead + 1.5 - canvas.station)
    canvas.line(bonnet, top)
    if car.kind in ("saloon", "coupe", "sports", "open"):
        canvas.line(both(tail + 2.0 - canvas.station, aside - 0.7 * car.width / 2), top)


def _lower_parts(canvas: Canvas, car: Car, livery: Livery) -> None:
    """Paints sills, bumpers and wheel-arch cladding in dark plastic."""
    x, z = canvas.x, canvas.z
    canvas.fill(z - car.sill - 0.045, PLASTIC)
    if livery.plastic_bumpers:
        for knot, sign in (("bumper", 1), ("stern", -1)):
            height = car.knots[knot][1]
            reach = car.front_axle + car.arch + 0.03 if sign > 0 else -(car.rear_axle - car.arch - 0.03)
            canvas.fill(both(z - height - 0.08, reach - sign * x), PLASTIC)
    if livery.cladding:
        canvas.fill(z - car.sill - 0.15, PLASTIC)
        for axle in (car.front_axle, car.rear_axle):
            arch = np.hypot(x - axle, z - car.wheel) - car.arch - 0.07
            canvas.fill(both(arch, 0.5 - np.abs(canvas.side)), PLASTIC)


def _front(canvas: Canvas, car: Car, livery: Livery) -> None:
    """Paints grille, headlamps, lower intake, fog lamps and number plate."""
    half, bumper, lead = car.width / 2, car.knots["bumper"], car.knots["lead"]
    # Grille
    ahead = np.maximum(0.28 - canvas.facing, car.front_axle - canvas.x)
    wide, tall = livery.grille
    middle = lead[1] - tall - 0.035
    grille = rectangle(canvas.aside, canvas.z, (0.0, middle), (wide * half, tall), 0.04)
    if livery.chrome:
        canvas.fill(both(grille - 0.02, ahead), CHROME)
    canvas.fill(both(grille, ahead), (0.05, 0.05, 0.06))
    bars = np.abs((canvas.z - middle) % 0.05 - 0.025) - 0.006
    canvas.fill(both(grille + 0.01, bars, ahead), CHROME if livery.chrome else (0.22, 0.22, 0.23))
    # Headlamps
    out, share, lamp_wide, lamp_tall = livery.lamps
    center = (out * half + 0.02, bumper[1] + share * (lead[1] - bumper[1]))
    reach = np.maximum(0.12 - canvas.facing, bumper[0] - 0.55 - canvas.x)
    if livery.round_lamps:
        lamp = np.hypot(canvas.aside - center[0], canvas.z - center[1]) - lamp_tall * 1.15
    else:
        slant = canvas.z - 0.25 * (canvas.aside - center[0])
        lamp = rectangle(canvas.aside, slant, center, (lamp_wide, lamp_tall), 0.045)
    canvas.fill(both(lamp - 0.018, reach), (0.08, 0.08, 0.09))
    canvas.fill(both(lamp, reach), (0.86, 0.89, 0.92))
    bulb = np.hypot(canvas.aside - center[0] + 0.02, canvas.z - center[1]) - lamp_tall * 0.62
    canvas.fill(both(bulb, reach), (0.62, 0.66, 0.71))
    indicator = both(lamp, center[0] + lamp_wide * 0.6 - canvas.aside, reach)
    canvas.fill(indicator, (0.95, 0.6, 0.2), 0.0 if livery.round_lamps else 0.8)
    # Intake and fog lamps
    low = car.sill + 0.10
    intake = rectangle(canvas.aside, canvas.z, (0.0, low), (0.5 * half, 0.05), 0.03)
    canvas.fill(both(intake, ahead), (0.06, 0.06, 0.07))
    fog = np.hypot(canvas.aside - 0.7 * half, canvas.z - low - 0.02) - 0.05
    canvas.fill(both(fog, ahead), (0.78, 0.80, 0.82))
    _plate(canvas, livery, bumper[1] - 0.06, ahead)


def _rear(canvas: Canvas, car: Car, livery: Livery) -> None:
    """Paints tail lamps, number plate and lower edge."""
    half, stern, tail = car.width / 2, car.knots["stern"], car.knots["tail"]
    behind = np.maximum(0.25 + canvas.facing, canvas.x - car.rear_axle)
    reach = np.maximum(0.08 + canvas.facing, canvas.x - stern[0] - 0.4)
    if livery.upright_tail:
        bottom, top = stern[1] + 0.1, car.belt + (0.28 if car.kind in ("estate", "van") else 0.06)
        center, size = (0.90 * half, (bottom + top) / 2), (0.085, (top - bottom) / 2)
        white, shade = np.abs(canvas.z - bottom - 0.3 * (top - bottom)) - 0.05, (0.92, 0.90, 0.86)
    else:
        center, size = (0.76 * half, stern[1] + 0.68 * (tail[1] - stern[1])), (0.2 * half, 0.075)
        white, shade = np.abs(canvas.aside - 0.68 * half) - 0.05, (0.92, 0.88, 0.84)
    lamp = rectangle(canvas.aside, canvas.z, center, size, 0.03)
    canvas.fill(both(lamp - 0.012, reach), (0.08, 0.05, 0.05))
    canvas.fill(both(lamp, reach), livery.tail)
    canvas.fill(both(lamp + 0.015, white, reach), shade)
    height = stern[1] + 0.12 if livery.upright_tail or car.kind in ("saloon", "coupe") else stern[1] - 0.04
    recess = rectangle(canvas.aside, canvas.z, (0.0, height), (0.32, 0.08), 0.02)
    canvas.fill(both(recess, behind), (0.1, 0.1, 0.11), 0.6)
    _plate(canvas, livery, height, behind)
    canvas.fill(both(canvas.z - car.sill - 0.11, behind), PLASTIC)


def _plate(canvas: Canvas, livery: Livery, height: float, where: np.ndarray) -> None:
    area = partial(rectangle, canvas.aside, canvas.z, (0.0, height), corner=0.008)
    canvas.fill(both(area((0.25, 0.055)), where), livery.plate)
    canvas.fill(both(area((0.20, 0.026)), where), (0.15, 0.15, 0.2), 0.55)


def _ornament(canvas: Canvas, car: Car, livery: Livery, skin: Skin) -> None:
    """Paints second color, stripes and numbers."""
    accent, style = livery.accent, livery.style
    top = 0.45 - np.abs(canvas.up)
    if style == "roof" and car.kind != "open":
        cabin = np.maximum(skin.marks["cowl"] - canvas.station, canvas.station - skin.marks["glass"]) * 0.035
        canvas.fill(both(cabin, car.belt_at(canvas.x) + 0.03 - canvas.z), accent)
    if style == "stripes":
        canvas.fill(both(np.abs(canvas.aside - 0.17) - 0.09, np.abs(canvas.side) - 0.7), accent)
    if style == "offset":
        canvas.fill(both(np.abs(canvas.y - 0.34) - 0.13, np.abs(canvas.side) - 0.7), accent)
        canvas.fill(both(np.abs(canvas.y - 0.12) - 0.035, np.abs(canvas.side) - 0.7), accent)
    if style in ("flank", "checker"):
        level = canvas.z - car.belt_at(canvas.x) + 0.24
        band = both(np.abs(level) - 0.075, 0.5 - np.abs(canvas.side))
        canvas.fill(band, accent)
        if style == "checker":
            odd = (np.floor(canvas.x / 0.15) + np.floor(level / 0.075)) % 2 < 1
            canvas.fill(np.where(odd, band, 1.0), livery.paint)
    if style == "lower":
        canvas.fill(canvas.z - car.sill - 0.42 * (car.belt - car.sill) - 0.1, accent)
    if style == "number":
        _roundels(canvas, car, livery, top)


def _roundels(canvas: Canvas, car: Car, livery: Livery, top: np.ndarray) -> None:
    """Paints a number in a white disc on both doors and the bonnet."""
    digits = _digits(livery.number)
    side_x, side_z = (car.front_axle + car.rear_axle) / 2 + 0.1, car.sill + 0.55 * (car.belt - car.sill)
    hood_x = (car.knots["cowl"][0] + car.knots["lead"][0]) / 2
    for u, v, where in (
        (np.sign(canvas.y) * (side_x - canvas.x), canvas.z - side_z, 0.6 - np.abs(canvas.side)),
        (canvas.y, hood_x - canvas.x, np.maximum(top, car.knots["cowl"][0] - canvas.x)),
    ):
        radius = 0.27
        canvas.fill(both(np.hypot(u, v) - radius, where), (0.95, 0.95, 0.94))
        places = (0.5 + np.stack([-v, u]) / (2 * radius)) * len(digits)
        row, column = np.clip(places.astype(int), 0, len(digits) - 1)
        ink = np.where(digits[row, column] > 127, -1.0, 1.0)
        canvas.fill(both(ink, np.hypot(u, v) - radius, where), (0.05, 0.05, 0.06))


def _digits(number: int) -> UInt8[np.ndarray, "64 64"]:
    """Returns an image of a number."""
    image, font = Image.new("L", (64, 64)), ImageFont.load_default(40)
    ImageDraw.Draw(image).text((32, 32), str(number), 255, font, anchor="mm", stroke_width=2)
    return np.array(image)
