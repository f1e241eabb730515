"""Compares imported furniture with the icons that another renderer made of it: colors and silhouettes.

    python -m benchmarks.furniture --folder furniture --out furniture_import

The folder holds a catalog (catalogue.json: id, file, icon) of OBJ models with icons of 128 pixels. For each
object the camera whose silhouette overlaps the icon's most is searched over azimuths and elevations; boxes of
both silhouettes are brought together first. Colors are means over the silhouette: as the package lights
objects, compared after one gain for all, and after a gain for each, which leaves differences of hue and takes
out those of light; and as the icons' renderer lights them (icon_light.py), without any gain.

Icons show an object as its file was when they were made. With --drawn, each object is also compared with what
the icons' program draws of the same file from its usual camera, which needs no search (IconDraw.java):

    python -m benchmarks.furniture --folder furniture --out furniture_import --drawn drawn
"""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.icon_light import BEFORE_2013, Shine, icon_picture, read
from latentscenes.cli.common import run_program
from latentscenes.core.cameras import Cameras, orbit
from latentscenes.core.console import Table, show
from latentscenes.core.errors import UserError
from latentscenes.data.options import LightName
from latentscenes.data.raycast import RayCaster, TriangleSoup
from latentscenes.data.shading import LIGHTS
from latentscenes.export.sheets import captioned, grid, in_row, save_image

ELEVATIONS = (5.0, 15.0, 25.0, 35.0, 55.0, 85.0)
STEPS = ((14.0, 10.0), (7.0, 5.0), (3.0, 2.0), (1.5, 1.0))
"""Degrees of azimuth and elevation by which the usual camera, or the best of this grid, is then moved."""
FOCAL, DISTANCE = 0.5 / math.tan(math.pi / 8), 1.4 / math.tan(math.pi / 8) / 1.8
"""Lens of the icons' camera; its distance as a multiple of the object's longest side."""
YAW, PITCH = 22.5, 11.25
"""Degrees of the icons' usual camera beside the front, and above."""
SURE, CLEARLY = 0.9, 0.15
"""Icons show the front. Views from behind are tried below this score, and taken if better by this much."""
SIDE = 48
"""Pixels of silhouettes while the camera is searched."""
COLOR_TOLERANCE, OVERLAP = 0.15, 0.7
"""An object is off where its mean color differs by more of the icon's, or its silhouettes overlap less."""


@dataclass
class Found:
    """One object beside its icon."""

    name: str
    error: str = ""
    overlap: float = 0.0
    """Intersection over union of the silhouettes at the best camera."""
    ours: tuple[float, float, float] = (0.0, 0.0, 0.0)
    alike: tuple[float, float, float] = (0.0, 0.0, 0.0)
    icon: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean colors, 0 to 255; `alike`: ours under the light of the icons since 2013, or before, if that is
    closer where the first differs."""
    view: tuple[float, float] = (0.0, 0.0)
    """Degrees of azimuth and elevation of the best camera."""
    drawn: tuple[float, float, float] | None = None
    usual: tuple[float, float, float] = (0.0, 0.0, 0.0)
    drawn_overlap: float = 0.0
    """From the icons' usual camera: what the icons' program draws, and ours under its light."""
    seconds: float = 0.0

    def color_error(self, gain: float) -> float:
        """Distance of the mean colors as a share of the icon's."""
        difference = gain * np.array(self.ours) - np.array(self.icon)
        return float(np.linalg.norm(difference) / max(np.linalg.norm(self.icon), 16.0))

    def alike_error(self) -> float:
        """The error under the light of the icons, without a gain."""
        return replace(self, ours=self.alike).color_error(1.0)

    def drawn_error(self) -> float:
        """The error against what the icons' program draws of the same file."""
        return replace(self, ours=self.usual, icon=self.drawn).color_error(1.0)

    def hue_error(self) -> float:
        """The error after the gain that fits this object best."""
        ours, icon = np.array(self.ours), np.array(self.icon)
        return self.color_error(float(ours @ icon / max(ours @ ours, 1e-9)))


def compare(
    folder: Path, entry: dict, light: LightName, multiply: bool, pictures: Path, drawn: Path | None
) -> Found:
    """Imports one object and finds the camera of its icon."""
    torch.set_num_threads(1)  # one process for each core
    begun, found = time.process_time(), Found(entry["id"])
    icon = np.asarray(Image.open(folder / entry["icon"]).convert("RGBA"))
    solid = icon[..., 3] > 127
    turn = entry["rotation"] and tuple(map(float, entry["rotation"].split()))
    try:
        soup, shines = read(folder / entry["file"], turn, multiply)
    except UserError as error:
        found.error = str(error)
        return found
    over_white = (icon[..., :3] * (icon[..., 3:] / 255) + 255.0 - icon[..., 3:]).astype(np.uint8)
    caster = RayCaster(soup, LIGHTS[light])
    if (view := _camera(caster, _boxed(solid), _boxed(solid, over_white))) is None:
        found.error = "no view shows it"
        return found
    found.view = view
    camera = _seen(soup.bounds, *view)
    rgb, alpha = caster.render(camera, 128, 2)
    found.ours = _mean(rgb[0], alpha[0] / 255)
    found.icon = _mean(icon[..., :3], icon[..., 3] / 255, over_white=False)
    lit, shown = icon_picture(soup, shines, camera, 128)
    found.alike, found.overlap = _mean(lit, shown / 255), _overlap(_boxed(shown > 127), _boxed(solid))
    if found.alike_error() > COLOR_TOLERANCE:
        early, _ = icon_picture(soup, shines, camera, 128, BEFORE_2013)
        other = replace(found, alike=_mean(early, shown / 255))
        if other.alike_error() < found.alike_error():
            found, lit = other, early
    shots = {"icon": over_white, "ours": rgb[0], "alike": lit}
    if drawn is not None:
        shots |= _beside_drawn(found, soup, shines, drawn)
    found.seconds = time.process_time() - begun
    np.savez(pictures / f"{entry['id']}.npz", **shots)
    return found


def _beside_drawn(found: Found, soup: TriangleSoup, shines: list[Shine], drawn: Path) -> dict:
    """Compares an object with what the icons' program draws of it; returns both pictures."""
    white, black = (
        np.asarray(Image.open(drawn / f"{found.name}.{name}.png").convert("RGB"))
        for name in ("white", "black")
    )
    solid = np.where((white != 255).any(-1) | (black != 0).any(-1), np.uint8(255), np.uint8(0))
    white, solid = (np.asarray(Image.fromarray(picture).reduce(2)) for picture in (white, solid))
    lit, shown = icon_picture(soup, shines, _seen(soup.bounds, YAW - 90, PITCH, usual=True), len(white))
    for mask in (solid := solid.copy(), shown):  # the window's border
        mask[:2] = mask[-2:] = mask[:, :2] = mask[:, -2:] = 0
    found.drawn, found.usual = _mean(white, solid / 255), _mean(lit, shown / 255)
    found.drawn_overlap = _overlap(solid > 127, shown > 127)
    return {"drawn": white, "usual": lit}


def _seen(bounds: np.ndarray, azimuth: float, elevation: float, usual: bool = False) -> Cameras:
    """A camera at the icons' distance, with their lens or with one that the object just fits."""
    low, high = bounds
    distance, reach = DISTANCE * float((high - low).max()), float(np.linalg.norm(high - low)) / 2
    focal = FOCAL if usual else 0.5 * math.sqrt(distance**2 - reach**2) / reach
    return orbit(1, distance, focal, math.radians(elevation), start=math.radians(azimuth))


def _camera(caster: RayCaster, wanted: np.ndarray, colors: np.ndarray) -> tuple[float, float] | None:
    """Azimuth and elevation of the camera whose picture agrees best with the icon's silhouette and colors."""

    bounds = caster.soup.bounds

    def tried(places: list[tuple[float, float]]) -> Iterator[tuple[float, float, float]]:
        views = [_seen(bounds, *place) for place in places]
        cameras = Cameras(*(torch.cat(part) for part in zip(*((v.cam2world, v.intrinsics) for v in views))))
        rgb, alpha = caster.render(cameras, SIDE, 1)
        for place, picture, mask in zip(places, rgb, alpha > 127):
            if mask.any():
                score = _overlap(_boxed(mask), wanted) - 0.3 * _difference(_boxed(mask, picture), colors)
                yield score, *place

    def climbed(best: tuple | None, places: list[tuple[float, float]], clearly: float = 0.0) -> tuple | None:
        """The best of some views, moved to a better one, if that is better than `best`."""
        found = max(tried(places), default=None, key=lambda found: found[0])
        for across, up in STEPS if found else ():
            around = [
                (found[1] + across * x, min(max(found[2] + up * y, -89), 89))
                for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y
            ]  # fmt: skip
            found = max([found, *tried(around)], key=lambda found: found[0])
        return found if best is None or found is not None and found[0] > best[0] + clearly else best

    best = climbed(None, [(YAW - 90, PITCH)])
    if best is None or best[0] < SURE:
        best = climbed(best, [(-90.0 + 15 * step, up) for up in ELEVATIONS for step in range(-4, 5)])
    if best is None or best[0] < SURE:
        best = climbed(best, [(15.0 * step, up) for up in ELEVATIONS for step in range(24)], CLEARLY)
    return best and best[1:]


def _boxed(mask: np.ndarray, picture: np.ndarray | None = None) -> np.ndarray:
    """A silhouette, or a picture over white, cut to the silhouette's bounding box and centered in a square of
    SIDE."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = (mask if picture is None else picture)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape[:2])
    square = np.full((side, side, *cut.shape[2:]), 0 if picture is None else 255, cut.dtype)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    place = ((np.arange(SIDE) + 0.5) * side / SIDE).astype(int)
    return square[place][:, place]


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures, as a share of white, after each is brought to the same
    brightness."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a * b.mean() / max(a.mean(), 1) - b).mean() / 255)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Shared part of two silhouettes, where a pixel counts if the other one lies within one pixel: thin bars
    that lie half a pixel apart agree."""
    return float(((a & _grown(b)).sum() + (b & _grown(a)).sum()) / max(a.sum() + b.sum(), 1))


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    shifts = [
        padded[1 + y : 1 + y + mask.shape[0], 1 + x : 1 + x + mask.shape[1]]
        for y in (-1, 0, 1)
        for x in (-1, 0, 1)
    ]
    return np.any(shifts, 0)


def _mean(rgb: np.ndarray, alpha: np.ndarray, over_white: bool = True) -> tuple[float, float, float]:
    """Mean color of the object itself, weighted by its alpha."""
    color = rgb.astype(np.float64)
    if over_white:
        color = (color - 255 * (1 - alpha[..., None])) / np.maximum(alpha[..., None], 1e-3)
    weight = alpha * (alpha > 0.5)
    return tuple((np.clip(color, 0, 255) * weight[..., None]).sum((0, 1)) / max(weight.sum(), 1e-6))


def main(
    folder: Path,
    out: Path,
    light: LightName = "studio",
    multiply: bool = False,
    limit: int | None = None,
    workers: int = 2,
    drawn: Path | None = None,
) -> None:
    """Import all furniture of a catalog and compare it with its icons.

    Args:
        folder: of the catalog.
        out: folder for the figures (furniture.json), the table (furniture.md) and contact sheets: of 60
            objects under CC0 (furniture.png), and of the 60 worst.
        light: of the views.
        multiply: multiply textures by Kd.
        limit: compare only so many objects, evenly spread.
        workers: processes.
        drawn: folder with what the icons' program draws of each object (ID.white.png, ID.black.png).
    """
    torch.set_num_threads(1)
    entries = json.loads((folder / "catalogue.json").read_text())
    if limit:
        entries = entries[:: max(1, len(entries) // limit)][:limit]
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    each = [(folder, entry, light, multiply, pictures, drawn) for entry in entries]
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(compare, *zip(*each, strict=True)))
    free = [one for one, entry in zip(found, entries) if entry["licence"].startswith("CC0") and not one.error]
    save_sheet(out / "furniture.png", pictures, free[:: max(1, len(free) // 60)][:60])
    report(out, found, light)


def report(out: Path, found: list[Found], light: LightName) -> None:
    """Writes and shows the figures, with sheets of the worst objects."""
    count, pictures = len(found), out / "pictures"
    seen = [one for one in found if not one.error]
    gain = float(np.median([np.linalg.norm(one.icon) / max(np.linalg.norm(one.ours), 1.0) for one in seen]))
    colors = [one for one in seen if one.color_error(gain) > COLOR_TOLERANCE]
    shapes = [one for one in seen if one.overlap < OVERLAP]
    off = {one.name for one in [*colors, *shapes]} | {one.name for one in found if one.error}
    hues = [one for one in seen if one.hue_error() > COLOR_TOLERANCE]
    alike = [one for one in seen if one.alike_error() > COLOR_TOLERANCE]
    again = [one for one in seen if one.drawn]
    differ = [one for one in again if one.drawn_error() > COLOR_TOLERANCE or one.drawn_overlap < OVERLAP]
    rows = (
        ("objects", f"{count}"),
        ("not read", f"{count - len(seen)}"),
        (f"color off by more than {COLOR_TOLERANCE:.0%}", f"{len(colors)} ({len(colors) / count:.1%})"),
        ("… after a gain for each object", f"{len(hues)} ({len(hues) / count:.1%})"),
        ("… under the light of the icons, no gain", f"{len(alike)} ({len(alike) / count:.1%})"),
        (f"silhouettes overlap less than {OVERLAP:.0%}", f"{len(shapes)} ({len(shapes) / count:.1%})"),
        ("any of these", f"{len(off)} ({len(off) / count:.1%})"),
        ("median color error", f"{np.median([one.color_error(gain) for one in seen]):.1%}"),
        ("… under the light of the icons", f"{np.median([one.alike_error() for one in seen]):.1%}"),
        ("median overlap", f"{np.median([one.overlap for one in seen]):.1%}"),
        ("gain of ours", f"{gain:.3f}"),
        ("drawn by the icons' program from the same file", f"{len(again)}"),
        ("… from which ours differs in color or silhouette", f"{len(differ)} ({len(differ) / count:.1%})"),
        ("CPU seconds an object", f"{np.mean([one.seconds for one in seen]):.2f}"),
    )
    table = Table("Furniture beside its icons", ("", light), rows)
    (out / "furniture.md").write_text(table.markdown())
    figures = [
        asdict(one)
        | {"color_error": one.color_error(gain), "alike_error": one.alike_error()}
        | ({"drawn_error": one.drawn_error()} if one.drawn else {})
        for one in found
    ]
    (out / "furniture.json").write_text(json.dumps({"gain": gain, "objects": figures}, indent=1))
    for name, far in (("colors", lambda one: one.alike_error()), ("shapes", lambda one: 1 - one.overlap)):
        worst = sorted(seen, key=far, reverse=True)[:60]
        save_sheet(out / f"worst_{name}.png", pictures, worst, [f"{far(one):.2f}" for one in worst])
    show(table)


def save_sheet(path: Path, pictures: Path, found: list[Found], notes: list[str] | None = None) -> None:
    """Icon | ours | ours under the light of the icons."""
    tiles = []
    for place, one in enumerate(found):
        pair = np.load(pictures / f"{one.name}.npz")
        name = one.name.removeprefix("Blend_Swap_CC-0_").removeprefix("Scopia_")
        tiles.append(
            captioned(
                in_row([pair["icon"], pair["ours"], pair["alike"]]),
                f"{notes[place]} {name}" if notes else name,
            )
        )
    save_image(path, grid(tiles, 4))


if __name__ == "__main__":
    run_program(main)
