"""Made chairs: as many different seats as one likes from a seed, without any download.

Notable:
- A chair depends on the seed and its own number alone; kinds take turns, as those of made cars do.
- While it is built, in metres: the front toward +x, z up, the ground at z = 0. Its left half is built and mirrored.
"""

import numpy as np
from jaxtyping import Float

from latentscenes.datasets.embree import Soup
from latentscenes.datasets.shapes_bars import Finish, bar, both, cloth, curve, cushion, metal, paint, wood
from latentscenes.datasets.shapes_parts import in_turn, shadowed

STREAM = 1 << 21
"""Keeps a chair's random numbers apart from those of the car with the same seed and number."""


def make_chair(number: int, seed: int = 0, kind: str | None = None) -> Soup:
    """One chair: its front toward +x, z up, the middle of its bounding box at the origin, the box's diagonal 1."""
    rng = np.random.default_rng([seed, STREAM, number])
    soups = MAKERS[kind or in_turn(KINDS, number, seed)](rng)
    return shadowed(Soup.joined(soups), rng, within=0.35, strength=0.6).normalized()


def _wooden(rng: np.random.Generator) -> list[Soup]:
    """Four legs and a back; by chance rungs, arm rests, a cushion."""
    frame = wood(rng) if rng.random() < 0.65 else paint(rng)
    seat = frame if rng.random() < 0.7 else (wood(rng) if frame.picture is None else cloth(rng))
    h, d, w, s = rng.uniform(0.42, 0.48), rng.uniform(0.2, 0.24), rng.uniform(0.2, 0.26), rng.uniform(0.012, 0.026)
    t, rear, tall, lean = rng.uniform(0.015, 0.024), w * rng.uniform(0.82, 1.0), rng.uniform(0.38, 0.6), rng.uniform(0.08, 0.26)
    turned, splay, kick = bool(rng.random() < 0.4), rng.uniform(0, 0.06), rng.uniform(0, 0.04)
    front, back, y, left = d - t, t - d, rear - t, w - t

    def fore(z: float) -> tuple[float, float, float]:  # where the front and the rear leg are at a height
        return front + splay * (1 - z / h), left + splay * (1 - z / h), z

    def aft(z: float) -> tuple[float, float, float]:
        return back - (splay + kick + t) * (1 - z / h), y + splay * (1 - z / h), z

    soups = [bar([(-d, 0, h), (d, 0, h)], np.array([(rear, s), (w, s)]), seat)]
    soups += both(*(bar([leg(0.0), leg(h)], t, frame, round=turned, taper=0.7) for leg in (fore, aft)))
    soups += both(bar([(back - lean * tall, y, h + tall), aft(h)], t, frame, round=turned, taper=0.8))
    soups += _back(rng, frame, (back, h), (back - lean * tall, h + tall), y)
    if not turned or rng.random() < 0.5:
        soups += both(bar([aft(h - s - 0.03), fore(h - s - 0.03)], (0.008, 0.03), frame))
    if rng.random() < 0.5:
        low, high = aft(z := rng.uniform(0.12, 0.2)), fore(z)
        soups += both(bar([low, high], 0.009, frame, round=True))
        middle = (low[1] + high[1]) / 2
        soups.append(bar([((low[0] + high[0]) / 2, -middle, z), ((low[0] + high[0]) / 2, middle, z)], 0.009, frame, round=True))
    if rng.random() < 0.35:
        z, x = h + rng.uniform(0.18, 0.24), d - rng.uniform(0.02, 0.14)
        rest = bar([(back - lean * (z - h), y, z), (x + 0.03, left + 0.01, z)], (0.022, 0.011), frame)
        soups += both(rest, bar([(x - 0.02, left, h - s), (x, left + 0.01, z)], 0.012, frame, round=turned))
    if rng.random() < 0.45:
        soups.append(cushion((0.0, 0.0, h + s + 0.02), (d - 0.015, rear - 0.02, 0.032), cloth(rng), 5.0))
    return soups


def _back(rng: np.random.Generator, frame: Finish, low: tuple[float, float], high: tuple[float, float], y: float) -> list[Soup]:
    """What stands between two posts that rise from `low` to `high` (x, z) at ±y."""
    style = ("slats", "spindles", "ladder", "panel", "padded", "splat", "cross")[rng.integers(7)]
    bow, rail, start = rng.uniform(0, 0.06) * (style != "padded"), rng.uniform(0.022, 0.05), rng.choice([0.02, 0.22])
    tall = high[1] - low[1]
    end = 1 - 0.6 * rail / tall

    def at(share: float, side: float = 0.0) -> tuple[float, float, float]:
        x, z = (np.asarray(low) * (1 - share) + np.asarray(high) * share).tolist()
        return x - bow * (1 - side**2), side * y, z

    def across(share: float, height: float) -> Soup:
        return bar([at(share, side) for side in np.linspace(-1, 1, 9)], (height, 0.009), frame)

    soups = [across(end, rail)]
    if style == "ladder":
        return soups + [across(share, rail * 0.8) for share in np.linspace(0.25, end, int(rng.integers(3, 5)))[:-1]]
    if start > 0.1:
        soups.append(across(start, 0.018))
    if style in ("slats", "spindles"):
        count, thick = (rng.integers(3, 7), (0.016, 0.006)) if style == "slats" else (rng.integers(5, 9), 0.007)
        sides = np.linspace(-1, 1, count + 2)[1:-1]
        soups += [bar([at(start, side), at(end, side)], thick, frame, round=style == "spindles") for side in sides]
    elif style == "cross":
        soups += both(bar([at(start, -0.97), at((start + end) / 2), at(end, 0.97)], (0.014, 0.006), frame))
    elif style == "splat":
        widths = np.array([(0.06, 0.007), (y * rng.uniform(0.2, 0.5), 0.007), (0.07, 0.007)])
        soups.append(bar([at(start), at(0.5), at(end)], widths, frame))
    else:
        soups.append(bar([at(start), at(end)], (y * 0.97, 0.008), frame, dish=-bow))
    if style == "padded":
        x, _, z = at((start + end) / 2)
        size = 0.03, y * 0.9, (end - start) * tall * 0.46
        soups.append(cushion((x + 0.027, 0.0, z), size, cloth(rng), 5.0, lean=(low[0] - high[0]) / tall))
    return soups


def _stool(rng: np.random.Generator) -> list[Soup]:
    """A seat without a back, low or at a bar, round or square, on three or four legs."""
    frame = (wood, wood, paint, metal)[rng.integers(4)](rng)
    top = frame if rng.random() < 0.5 else (wood, paint)[rng.integers(2)](rng)
    h = rng.uniform(0.4, 0.5) if rng.random() < 0.5 else rng.uniform(0.62, 0.78)
    r, t, splay, s = rng.uniform(0.15, 0.21), rng.uniform(0.012, 0.02), rng.uniform(0.02, 0.1), rng.uniform(0.012, 0.03)
    disc, turned, legs = bool(rng.random() < 0.6), bool(rng.random() < 0.6), 4 if h > 0.6 or rng.random() < 0.6 else 3
    angles = (np.arange(legs) + (0.5 if legs == 4 else 0)) * 2 * np.pi / legs
    around, reach = np.stack([np.cos(angles), np.sin(angles), 0 * angles], -1), (r - 2 * t) * (1 if disc else 1.2)

    def ring(z: float) -> Float[np.ndarray, "legs 3"]:
        return around * (reach + splay * (1 - z / h)) + [0, 0, z]

    if disc:
        soups = [bar([(0, 0, h - s), (0, 0, h + s)], r, top, round=True)]
    else:
        soups = [bar([(-r, 0, h), (r, 0, h)], (r * rng.uniform(0.9, 1.2), s), top)]
    soups += [bar([foot, head], t, frame, round=turned, taper=0.8) for foot, head in zip(ring(0.0), ring(h - s))]
    for z in (0.3 * h, 0.36 * h)[: 1 + (rng.random() < 0.3)]:
        soups += [bar([ring(z)[k - 1], ring(z)[k]], 0.008, frame, round=True) for k in range(legs)]
    if rng.random() < 0.4:
        soups.append(cushion((0.0, 0.0, h + s + 0.018), (0.95 * r, 0.95 * r, 0.04), cloth(rng), 2.6 if disc else 5.0))
    return soups


def _bench(rng: np.random.Generator) -> list[Soup]:
    """A long seat of boards, much like a low table; by chance a shelf, a back, a cushion."""
    frame = wood(rng) if rng.random() < 0.7 else paint(rng)
    top, boards, panels = frame if rng.random() < 0.6 else wood(rng), int(rng.integers(1, 5)), rng.random() < 0.25
    h, d, w, t = rng.uniform(0.38, 0.5), rng.uniform(0.16, 0.26), rng.uniform(0.38, 0.65), rng.uniform(0.018, 0.032)
    s, splay, y = rng.uniform(0.012, 0.024), rng.uniform(0, 0.08), w - rng.uniform(0.02, 0.1) - t
    front, wide = d - t - 0.01, d / boards
    rows = wide * np.arange(1 - boards, boards, 2)
    soups = [bar([(x, -w, h), (x, w, h)], (s, wide - 0.005 * (boards > 1)), top) for x in rows]
    if panels:
        soups += both(bar([(0, y, 0), (0, y, h - s)], (t * 0.7, d * 0.92), frame))
    else:
        soups += both(*(bar([(x, y + splay, 0), (x, y, h - s)], t, frame, taper=0.7) for x in (front, -front)))
        soups += both(bar([(-front, y, h - s - 0.025), (front, y, h - s - 0.025)], (0.009, 0.025), frame))
    if panels or rng.random() < 0.6:
        soups.append(bar([(0, -y, 0.15), (0, y, 0.15)], (0.009, d * rng.choice([0.15, 0.8])), frame))
    if rng.random() < 0.4:
        tall, lean = rng.uniform(0.3, 0.42), rng.uniform(0.1, 0.25)
        soups += both(bar([(-front, y, h), (-front - lean * tall, y, h + tall)], (t, t * 0.7), frame))
        soups += _back(rng, frame, (-front, h), (-front - lean * tall, h + tall), y)
    if rng.random() < 0.4:
        soups.append(cushion((0.01, 0.0, h + s + 0.025), (d * 0.92, w * 0.95, 0.035), cloth(rng), 6.0))
    return soups


def _armchair(rng: np.random.Generator) -> list[Soup]:
    """Upholstered, for one or two; by chance pillows."""
    cover, foot, square = cloth(rng), (wood, metal)[rng.integers(2)](rng), rng.uniform(4.5, 9)
    soft, seats = cover if rng.random() < 0.6 else cloth(rng), 1 if rng.random() < 0.65 else 2
    inner, d, thick = 0.28 if seats == 1 else 0.5, rng.uniform(0.32, 0.38), rng.uniform(0.05, 0.1)
    legs, rise, tall, lean = rng.uniform(0.06, 0.18), rng.uniform(0.12, 0.22), rng.uniform(0.3, 0.48), rng.uniform(0.05, 0.25)
    base, w, x = legs + 0.09, inner + thick, d - 0.06
    back = (0.08 - d - lean * tall / 2, 0.0, base + tall / 2 + 0.1), (0.09, inner + 0.02, tall / 2 + 0.13)
    soups = [cushion((0.0, 0.0, base), (d, w, 0.1), cover, square), cushion(*back, cover, square, lean)]
    soups += both(cushion((0.0, w, base + rise / 2), (d * 0.99, thick, rise / 2 + 0.12), cover, square))
    feet = ([(1.04 * at, w - 0.01, 0), (at, w - 0.03, legs + 0.02)] for at in (x, -x))
    soups += both(*(bar(path, 0.022, foot, round=True, taper=0.5) for path in feet))
    for y in (0.0,) if seats == 1 else (-inner / 2, inner / 2):
        soups.append(cushion((0.06, y, base + 0.16), (d - 0.07, inner / seats - 0.01, 0.075), soft, 5.0))
        if rng.random() < 0.45:
            place = 0.24 - d, y + rng.uniform(-0.05, 0.05), base + 0.36
            soups.append(cushion(place, (0.06, 0.16, 0.15), cloth(rng), 3.0, lean + 0.15))
    return soups


def _easy(rng: np.random.Generator) -> list[Soup]:
    """A wooden frame with arm rests, low and leaning, and two thick cushions."""
    frame, cover, turned = wood(rng) if rng.random() < 0.8 else paint(rng), cloth(rng), bool(rng.random() < 0.4)
    h, d, w, t = rng.uniform(0.28, 0.36), rng.uniform(0.27, 0.33), rng.uniform(0.27, 0.33), rng.uniform(0.015, 0.022)
    tall, lean, arm, splay = rng.uniform(0.42, 0.58), rng.uniform(0.3, 0.5), h + rng.uniform(0.2, 0.26), rng.uniform(0, 0.08)
    low, high, inner = (0.02 - d, h), (-d - lean * tall, h + tall), w - 2 * t
    soups = [bar([(-d, 0, h - 0.03), (d, 0, h)], (w - t, 0.015), frame)]
    soups += both(
        bar([(d + splay, w, 0), (d - 0.03, w, arm)], t, frame, round=turned, taper=0.8),
        bar([(-d - splay, w, 0), (0.02 - d, w, arm)], t, frame, round=turned, taper=0.8),
        bar(curve([(-d - 0.1, w, arm), (0, w, arm + 0.03), (d + 0.03, w, arm)]), (0.035, 0.011), frame),
        bar([(-d, w - t, h - 0.03), (d, w - t, h)], (t * 0.8, 0.03), frame),
        bar([(low[0], inner, h - 0.03), (high[0], inner, high[1])], (t, t * 0.8), frame),
    )
    soups += _back(rng, frame, low, high, inner)
    soups.append(cushion((0.03, 0.0, h + 0.06), (d - 0.02, w - 0.03, 0.06), cover, 5.0))
    middle = 0.1 - d - lean * tall * 0.55, 0.0, h + 0.1 + tall * 0.45
    return [*soups, cushion(middle, (0.06, w - 0.04, tall * 0.45), cover, 5.0, lean)]


def _shell(rng: np.random.Generator) -> list[Soup]:
    """A moulded seat and back in one, on splayed legs, a sled or a foot; by chance a pad."""
    skin, base = (paint, paint, wood, cloth)[rng.integers(4)](rng), ("legs", "legs", "sled", "foot")[rng.integers(4)]
    frame = wood(rng) if base == "legs" and rng.random() < 0.6 else metal(rng)
    h, tall, w, dish = rng.uniform(0.42, 0.47), rng.uniform(0.3, 0.46), rng.uniform(0.21, 0.25), rng.uniform(0.02, 0.09)
    profile = ((-0.27, tall), (-0.22, 0.12), (-0.28, -0.08), (0.06, -0.02), (0.24, 0.05), (0.26, -0.02))
    width = curve([(k, 0, 0) for k in (rng.uniform(0.55, 0.95), 0.95, rng.uniform(0.8, 1.2), 1.1, 0.85)], 20)[:, 0] * w
    width *= np.clip(1 - np.linspace(-1, 1, 21) ** 6, 0.1, 1) ** 0.5  # round where it begins and ends
    soups = [bar(curve([(x, 0, h + z) for x, z in profile], 20), np.stack([width, np.full(21, 0.007)], -1), skin, dish=dish)]
    under = h - 0.02
    fore, aft, front, rear = (0.2, 0.2, 0.008), (-0.22, 0.2, 0.008), (0.1, 0.13, under), (-0.08, 0.13, under)
    if base == "foot":
        soups.append(bar([(0, 0, 0), (0, 0, 0.02)], 0.21, frame, round=True))
        soups.append(bar([(0, 0, 0.02), (0, 0, under)], 0.025, frame, round=True))
    else:
        soups += [bar([(x, -0.13, under), (x, 0.13, under)], 0.011, frame, round=True) for x in (0.1, -0.08)]
        soups += both(bar([front, rear], 0.012, frame, round=True))
    if base == "sled":
        soups += both(bar([front, fore, aft, rear], 0.009, frame, round=True))
    elif base == "legs":
        soups += both(*(bar(leg, 0.017, frame, round=True, taper=0.65) for leg in ([fore, front], [aft, rear])))
    if rng.random() < 0.35:
        soups.append(cushion((0.03, 0.0, h + 0.015), (0.17, 0.17, 0.025), cloth(rng), 3.5))
    return soups


def _swivel(rng: np.random.Generator) -> list[Soup]:
    """A padded seat that turns on a star with castors; by chance arm rests."""
    cover, frame, dark = cloth(rng), metal(rng), Finish((0.12, 0.12, 0.13))
    h, w, tall, lean = rng.uniform(0.42, 0.5), rng.uniform(0.21, 0.26), rng.uniform(0.24, 0.62), rng.uniform(0.08, 0.2)
    arms, r, phase, gap = int(rng.choice([4, 5, 5])), rng.uniform(0.25, 0.31), rng.uniform(0, np.pi), rng.uniform(0.03, 0.14)
    soups = [bar([(0, 0, h - 0.04), (0, 0, 0.07)], 0.032, frame, round=True, taper=0.75)]
    for angle in phase + np.arange(arms) * 2 * np.pi / arms:
        x, y = float(r * np.cos(angle)), float(r * np.sin(angle))
        soups.append(bar([(x, y, 0.065), (0, 0, 0.1)], (0.022, 0.018), frame, taper=0.65))
        soups.append(cushion((x, y, 0.03), (0.028, 0.028, 0.03), dark, 2.2))
    soups.append(cushion((0.0, 0.0, h), (w, w * 1.02, rng.uniform(0.035, 0.06)), cover, rng.uniform(3.0, 6.0)))
    x, z = -w - 0.01 - lean * (gap + tall / 2), h + gap + tall / 2
    soups.append(bar([(0.12 - w, 0, h - 0.03), (-w - 0.06, 0, h - 0.02), (x - 0.05, 0, z)], (0.03, 0.01), dark))
    soups.append(cushion((x, 0.0, z), (0.04, w * rng.uniform(0.8, 1.0), tall / 2), cover, rng.uniform(3.0, 6.0), lean))
    if rng.random() < 0.55:
        z, y = h + rng.uniform(0.17, 0.23), w + 0.04
        stem = bar([(0, w - 0.08, h - 0.03), (0, y, h - 0.02), (-0.02, y, z)], (0.011, 0.018), dark)
        soups += both(stem, bar([(-0.14, y, z), (0.12, y, z)], (0.028, 0.014), dark))
    return soups


MAKERS = {
    "wooden": _wooden, "stool": _stool, "armchair": _armchair, "bench": _bench, "shell": _shell, "swivel": _swivel, "easy": _easy,
}  # fmt: skip
KINDS = tuple(MAKERS)
