"""Smooth edges in the browser: they come near to many rays a pixel; an element at rest shows them. Also white
objects, and base planes as they are read."""

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from browser import PROGRAM, browser
from published_pages import (
    COLORS,
    VIEW,
    as_in_browser,
    library_of,
    published,
    random_model,
    random_scene,
    served,
)

pytest.importorskip("websockets", reason="the browser is driven by websockets, which the viewer extra brings")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")

TALL, WIDE, FINER = 40, 48, 4
DRAW = """(async () => {
  const {PublishedLibrary} = await import("/web/library.js"), {ServerSource} = await import("/web/source.js");
  const {Scene} = await import("/web/compose.js"), {Renderer, RAW} = await import("/web/renderer.js");
  const library = await PublishedLibrary.open(new ServerSource("/library"));
  const scene = await Scene.read(library, await library.find("one"), "one"), renderer = new Renderer();
  const bytes = () => btoa(String.fromCharCode(...renderer.pixels(WIDE, TALL)));
  const sharp = document.createElement("canvas"), found = [];
  [sharp.width, sharp.height] = [WIDE, TALL];
  renderer.draw(scene, CAMERA, WIDE, TALL, {haze: RAW});
  const top = renderer.canvas.height - TALL;
  sharp.getContext("2d").drawImage(renderer.canvas, 0, top, WIDE, TALL, 0, 0, WIDE, TALL);
  found.push(bytes());
  renderer.draw(scene, CAMERA, WIDE, TALL, {haze: RAW});
  for (const [from, rows] of [[0, 15], [15, TALL - 15]]) {
    renderer.smooth(scene, CAMERA, sharp, WIDE, TALL, {haze: RAW, from, rows});
  }
  found.push(bytes());
  return found;
})()"""
SHOWN = "document.querySelector('latent-scene').shadowRoot.querySelector('canvas').toDataURL()"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    model = random_model(COLORS)
    return library_of(tmp_path_factory.mktemp("edges") / "made", model, {"one": random_scene(model, 1)})


@pytest.fixture(scope="module")
def site(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    published(folder / "library", library)
    with served(folder) as running:
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with browser(profile, 300, 200) as new:
        yield new()
    shutil.rmtree(profile, ignore_errors=True)


def decibels(first: np.ndarray, second: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(first - second).mean()))


def test_edges_are_means_of_several_rays(tab, site, library):
    cameras, rows, model = VIEW.dome(1), library.parameters("one"), library.model()
    white = torch.ones(model.codec.channels, FINER * TALL, FINER * WIDE)
    with torch.no_grad():
        view = model.render(model.compose(rows, bounded=True), cameras, white)
    fine = (view.image(FINER * TALL, FINER * WIDE)[0, :3].movedim(0, -1).numpy() + 1) / 2
    mean = fine.reshape(TALL, FINER, WIDE, FINER, 3).mean((1, 3))
    tab.open(site.page("empty", ""))
    tab.wait("document.title === 'empty'")
    script = DRAW.replace("CAMERA", json.dumps(as_in_browser(cameras, 0)))
    found = tab.evaluate(script.replace("TALL", str(TALL)).replace("WIDE", str(WIDE)))
    sharp, smooth = (
        np.frombuffer(base64.b64decode(one), np.uint8).reshape(TALL, WIDE, 4)[::-1] / 255.0 for one in found
    )
    changed = np.abs(smooth - sharp).max(-1) > 1.5 / 255
    assert 0.02 < changed.mean() < 0.9
    one_ray, several = (decibels(kind[..., :3] + 1 - kind[..., 3:], mean) for kind in (sharp, smooth))
    assert several > one_ray + 5 and several > 33, (one_ray, several)
    assert not tab.problems


WHITE = """(async () => {
  const {PublishedLibrary} = await import("/web/library.js"), {ServerSource} = await import("/web/source.js");
  const {Scene} = await import("/web/compose.js"), {Renderer} = await import("/web/renderer.js");
  const library = await PublishedLibrary.open(new ServerSource("/FOLDER")), renderer = new Renderer();
  renderer.draw(await Scene.read(library, await library.find("one"), "one"), CAMERA, 48, 40);
  return renderer.pixels(48, 40).filter((_, k) => k % 4 === 3).reduce((a, b) => Math.max(a, b));
})()"""


def test_white_objects_are_shown_where_silhouettes_are_known(tab, site, tmp_path):
    model, opacity = random_model(COLORS), {}
    model.field.out.bias[1:], model.field.out.weight[1:] = 40.0, 0.0
    for known in (None, True):
        made = library_of(tmp_path / f"{known}", model, {"one": random_scene(model, 1)}, silhouettes=known)
        published(site.folder / f"white{known}", made)
        tab.open(site.page("empty", ""))
        tab.wait("document.title === 'empty'")
        script = WHITE.replace("CAMERA", json.dumps(as_in_browser(VIEW.dome(1), 0)))
        opacity[known] = tab.evaluate(script.replace("FOLDER", f"white{known}"))
    assert opacity[None] == 0 and opacity[True] > 230


def test_element_at_rest_has_smooth_edges(tab, site):
    watch = (
        "<style>latent-scene { width: 100px; }</style><script type=module>"
        "import {Renderer} from '/web/renderer.js'; window.bands = [];"
        "const {paint} = Renderer.prototype; Renderer.prototype.paint = function (...given) {"
        f" const before = {SHOWN}, [, , , width, height, {{from, rows, sharp}} = {{}}] = given;"
        " bands.push({width, height, from, rows, sharp: sharp?.toDataURL() === before && !!sharp});"
        " paint.apply(this, given); };</script>"
    )
    body = '<script type="module" src="web/latent-scene.js"></script><latent-scene src="library" scene="one">'
    tab.open(site.page("element", watch + body))
    tab.wait("window.bands?.some(({sharp, from, rows, height}) => sharp && from + rows === height)")
    bands = tab.evaluate("bands")
    smoothed = [band for band in bands if band["sharp"]]
    assert not bands[0]["sharp"] and bands[-len(smoothed) :] == smoothed  # edges come last
    assert all((band["width"], band["height"]) == (100, 75) for band in smoothed)
    assert [band["from"] for band in smoothed] == [0, *np.cumsum([band["rows"] for band in smoothed])[:-1]]
    assert sum(band["rows"] for band in smoothed) == 75
    count = len(bands)
    tab.evaluate("new Promise(done => setTimeout(done, 400))")
    assert len(tab.evaluate("bands")) == count and not tab.problems  # it rests


BASES = """import("/web/compose.js").then(({basesOf}) => {
  const bytes = (...parts) => new Uint8Array(new Uint8Array([9, ...parts]).buffer, 1); // not aligned
  const sizes = {bases: 2, resolution: 2, macro: 2}, shape = [2, 3, 2, 2, 2];
  const codes = Array.from({length: 48}, (_, k) => k - 24);
  const steps = new Uint8Array(Float32Array.from({length: 12}, (_, k) => k + 1).buffer);
  const today = new Map([["bases", {kind: "I8", shape, bytes: bytes(...codes)}],
                         ["bases.scale", {kind: "F32", shape: [2, 3, 2], bytes: steps}]]);
  const halves = codes.flatMap(k => k % 2 ? [0, 0xb8] : [0, 0x3c]); // -1/2 and 1
  const before = new Map([["bases", {kind: "F16", shape, bytes: bytes(...halves)}]]);
  return [today, before].map(model => [0, 1].map(k => [...basesOf(model, sizes)(k)]));
})"""


def test_base_planes_are_codes_times_steps_and_those_of_earlier_versions_are_numbers(tab, site):
    tab.open(site.page("bases", ""))
    tab.wait("document.title === 'bases'")
    today, before = np.array(tab.evaluate(BASES))
    codes, steps = np.arange(-24, 24).reshape(2, 3, 4, 2), np.arange(1, 13).reshape(2, 3, 1, 2)
    assert (today == (codes * steps).reshape(2, 24)).all()
    assert (before == np.where(codes % 2, -0.5, 1).reshape(2, 24)).all()
