"""Compares the renderer in the browser with Python's, and counts what it computes. Needs Chromium. Run:

    python -m benchmarks.web --library libraries/cars

Notable:
- Pictures are compared over white, as `LearnedScene.render` returns them; the browser then keeps haze.
- Counts and times are of pictures as the element draws them, without haze.
- Times are CPU seconds of Chromium's graphics process, which draws in software (SwiftShader). Other programs
  change them little; frames per second depend on the cores that are free.
"""

import base64
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

import latentscenes
from latentscenes.api import Library
from latentscenes.cli.common import MACHINE, MachineOptions, run_program, set_up
from latentscenes.core.cameras import Cameras
from latentscenes.core.console import Table, show, tracked
from latentscenes.core.errors import UserError
from latentscenes.export.sheets import captions_of
from latentscenes.model.model import Model, render_images
from latentscenes.rendering.field import FusedPlanes
from tests.browser import PROGRAM, Page, browser
from tests.published_pages import as_in_browser, published, served

MANY = 512
"""Stratified samples per ray of the converged picture."""
FINER, EDGES = 4, 6
"""Rays along each side of a pixel in the pictures that edges are compared with, and cameras of these."""
TIMES = 3
"""Frames that are timed."""
COUNT = """const original = WebGL2RenderingContext.prototype.shaderSource;
WebGL2RenderingContext.prototype.shaderSource = function (shader, text) {
  if (window.counting) text = text.replace("vec4 field(vec3 p, vec3 toward) {", "int spent = 0;\\n$&spent++;")
    .replace("written = vec4(color * alpha, alpha);", "written = vec4(float(spent) / 255.0, 1.0, 0.0, 1.0);");
  original.call(this, shader, text);
};"""
"""Makes the shader write how often it evaluated the field, not a color, and 1 where rays meet the box."""
SET_UP = """(async () => {
  const {PublishedLibrary} = await import("/web/library.js"), {ServerSource} = await import("/web/source.js");
  const {Scene} = await import("/web/compose.js"), {Renderer, RAW, CLEAN} = await import("/web/renderer.js");
  const library = await PublishedLibrary.open(new ServerSource("/library"));
  const plain = new Renderer(), modes = {RAW, CLEAN}, sharp = document.createElement("canvas");
  const counter = new Renderer();
  let scene;
  const renderer = counted => { // shaders are compiled at the first picture
    window.counting = counted;
    return counted ? counter : plain;
  };
  window.load = async name => {
    scene = await Scene.read(library, await library.find(name), name);
    return renderer(false).occupancy(scene);
  };
  window.shot = (camera, width, height, mode, counted, smooth) => {
    const chosen = renderer(counted);
    chosen.draw(scene, camera, width, height, {haze: modes[mode]});
    if (smooth) {
      [sharp.width, sharp.height] = [width, height];
      sharp.getContext("2d").drawImage(chosen.canvas, 0, chosen.canvas.height - height, width, height, 0, 0,
                                       width, height);
      chosen.smooth(scene, camera, sharp, width, height, {haze: modes[mode]});
    }
    const found = chosen.pixels(width, height), step = 8192, parts = [];
    for (let k = 0; k < found.length; k += step) {
      parts.push(String.fromCharCode(...found.subarray(k, k + step)));
    }
    return btoa(parts.join(""));
  };
  return library.count;
})()"""


@dataclass(frozen=True)
class Row:
    """A scene. PSNR in dB, over all cameras together, and of the worst one."""

    name: str
    psnr: float
    worst: float
    converged: float
    """Against many samples instead of the library's."""
    occupied: float
    """Share of the cells that may hold matter."""
    rays: float
    """Share of the pixels whose ray meets the box."""
    evaluations: float
    """Evaluations of the field for such a ray."""
    seconds: float
    """CPU seconds of the graphics process for a frame."""
    one_ray: float
    """Against means of 4 x 4 rays a pixel, computed in Python."""
    smooth: float
    """Likewise, with smooth edges."""
    edges: float
    """CPU seconds that smooth edges add to a frame."""


def pictures(
    page: Page, cameras: Cameras, size: int, mode: str, counted: bool = False, smooth: bool = False
) -> UInt8[np.ndarray, "v h w 4"]:
    """Returns what the browser draws, premultiplied."""
    found = []
    for number in range(len(cameras)):
        camera = json.dumps(as_in_browser(cameras, number))
        script = f"shot({camera}, {size}, {size}, {json.dumps([mode, counted, smooth])[1:-1]})"
        bytes_ = base64.b64decode(page.evaluate(script))
        found.append(np.frombuffer(bytes_, np.uint8).reshape(size, size, 4)[::-1])
    return np.stack(found)


def decibels(
    first: Float[np.ndarray, "v h w 3"], second: Float[np.ndarray, "v h w 3"]
) -> tuple[float, float]:
    """Returns the PSNR over all views together, and of the worst view."""
    errors = np.square(first - second).mean((1, 2, 3))
    return float(-10 * np.log10(errors.mean())), float(-10 * np.log10(errors.max()))


def in_python(
    model: Model, planes: FusedPlanes, cameras: Cameras, size: int, samples: int | None = None
) -> Float[np.ndarray, "v h w 3"]:
    """Renders with the library's samples, or with so many stratified ones; over white."""
    before = model.config
    if samples:
        model.config = dataclasses.replace(
            before, render=dataclasses.replace(before.render, coarse=samples, fine=0)
        )
    try:
        return render_images(model, planes, cameras, (size, size), False).images.movedim(1, -1).numpy()
    finally:
        model.config = before


def graphics_seconds(profile: Path) -> float:
    """Returns the CPU seconds that the graphics process of the browser with this profile has taken."""
    tick, seconds, parents = os.sysconf("SC_CLK_TCK"), {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, numbers = (folder / "cmdline").read_text(), (folder / "stat").read_text()
        except OSError:  # it has ended
            continue
        fields = numbers.rpartition(")")[2].split()
        parents[int(folder.name)] = int(fields[1]), command
        if "--type=gpu-process" in command:
            seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / tick

    def ours(process: int) -> bool:
        parent, command = parents.get(process, (0, ""))
        return str(profile) in command or parent > 1 and ours(parent)

    return sum(value for process, value in seconds.items() if ours(process))


def measure(
    page: Page, profile: Path, library: Library, name: str, cameras: int, size: int, frame: int
) -> Row:
    """Compares one scene, and counts."""
    occupied = page.evaluate(f"load({json.dumps(name)})")
    scene = library[name]
    places = library.folder.info.view.around(scene.rows.own_box).dome(cameras)
    drawn = pictures(page, places, size, "RAW").astype(np.float32) / 255
    over_white = drawn[..., :3] + 1 - drawn[..., 3:]
    own = in_python(library.model, scene.planes, places, size)
    many = in_python(library.model, scene.planes, places, size, MANY)
    few = places[: min(EDGES, len(places))]
    finer = in_python(library.model, scene.planes, few, FINER * size)
    finer = finer.reshape(len(few), size, FINER, size, FINER, 3).mean((2, 4))
    smooth = pictures(page, few, size, "RAW", smooth=True).astype(np.float32) / 255
    smooth = smooth[..., :3] + 1 - smooth[..., 3:]
    counts = pictures(page, places[:4], frame, "CLEAN", counted=True)[..., :2].astype(np.float64)
    met = counts[..., 1] > 0
    pictures(page, places[:1], frame, "CLEAN")
    before = graphics_seconds(profile)
    pictures(page, places[:TIMES], frame, "CLEAN")
    middle = graphics_seconds(profile)
    pictures(page, places[:TIMES], frame, "CLEAN", smooth=True)
    spent, after = (middle - before) / TIMES, graphics_seconds(profile)
    rays_of_edges = max(0.0, (after - middle) / TIMES - spent)
    return Row(
        name, *decibels(over_white, own), decibels(over_white, many)[0], occupied, float(met.mean()),
        float(counts[..., 0][met].mean()), spent, decibels(over_white[: len(few)], finer)[0],
        decibels(smooth, finer)[0], rays_of_edges,
    )  # fmt: skip


def main(
    library: Path, scenes: int = 4, cameras: int = 20, size: int = 128, frame: int = 256,
    machine: MachineOptions = MACHINE,
) -> None:  # fmt: skip
    """Compare pictures from the browser with Python's, and count what the browser computes.

    Args:
        library: folder of a library whose latents are colors.
        scenes: number of its scenes, in order.
        cameras: number of cameras, on a dome over each scene.
        size: pixels along each side of compared pictures.
        frame: pixels along each side of frames that are counted and timed.
    """
    if PROGRAM is None:
        raise UserError("benchmarks.web: no Chromium here. Install one.")
    set_up(machine)
    opened = latentscenes.open_library(library, device="cpu")
    names = opened.names[:scenes]
    with tempfile.TemporaryDirectory() as folder:
        published(Path(folder) / "site" / "library", opened.folder)
        profile = Path(folder) / "profile"
        profile.mkdir()
        with served(Path(folder) / "site") as site, browser(profile) as new:
            page = new()
            page.open(site.page("empty", ""))
            page.wait("document.title === 'empty'")
            page.evaluate(COUNT)
            page.evaluate(SET_UP)
            rows = [
                measure(page, profile, opened, name, cameras, size, frame)
                for name in tracked(names, "comparing")
            ]
    show(table(rows), *summary(opened.model, rows, frame))


def table(rows: Sequence[Row]) -> Table:
    """Returns the table of all scenes: PSNR over all views, of the worst one, and against converged
    pictures; shares of occupied cells and of rays that meet the box, evaluations a ray, CPU seconds a frame;
    PSNR against finer pictures, without and with smooth edges, and CPU seconds of these."""
    columns = (
        "scene", "PSNR", "worst", f"{MANY} samples", "cells", "rays", "evaluations", "CPU s",
        f"{FINER}x{FINER} rays a pixel", "smooth edges", "CPU s",
    )  # fmt: skip
    short = captions_of([row.name for row in rows], 24)
    lines = (
        (
            short[row.name], f"{row.psnr:.1f}", f"{row.worst:.1f}", f"{row.converged:.1f}",
            f"{row.occupied:.2f}", f"{row.rays:.2f}", f"{row.evaluations:.1f}", f"{row.seconds:.2f}",
            f"{row.one_ray:.1f}", f"{row.smooth:.1f}", f"{row.edges:.2f}",
        )
        for row in rows
    )  # fmt: skip
    return Table("The browser's pictures against Python's", columns, tuple(lines))


def summary(model: Model, rows: Sequence[Row], frame: int) -> Iterator[str]:
    """Yields what a frame costs, by count: reads of four values with bilinear weights, and operations."""
    config: Any = model.config
    hidden, features = config.field.hidden, config.planes.features
    stored = hidden if config.planes.aggregation == "sum" else features
    reads = 3 * -(-stored // 4)
    # Per hidden unit: two sums of planes, one of the bias, five of the softplus, four products with sums
    operations = 16 * hidden + (0 if stored == hidden else 2 * hidden * features)
    count = float(np.mean([row.rays * row.evaluations for row in rows])) * frame**2
    yield f"a frame of {frame} x {frame} pixels: {count / 1e6:.2f} million evaluations, each {reads} reads"
    work = f"{count * reads / 1e6:.0f} million reads, {count * operations / 1e9:.2f} GFLOP"
    yield f"and {operations} operations: {work}"
    seconds = float(np.mean([row.seconds for row in rows]))
    yield f"in software {seconds:.2f} CPU s a frame, {1 / seconds:.2f} frames per second and core"


if __name__ == "__main__":
    run_program(main)
