"""The renderer in the browser: its pictures are Python's; its element shows objects or says what is wrong."""

import base64
import gzip
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from browser import PROGRAM, browser
from published_pages import (
    BOX,
    COLORS,
    VIEW,
    as_in_browser,
    library_of,
    packed_before,
    published,
    random_model,
    random_scene,
    served,
)

from latentscenes.core.errors import UserError
from latentscenes.export import live
from latentscenes.export.live import write_live_page
from latentscenes.model.model import Model, render_images
from latentscenes.storage.quantize import pack, unpack
from latentscenes.storage.scene_set import SceneSet

pytest.importorskip("websockets", reason="the browser is driven by websockets, which the viewer extra brings")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")

SIZE = (40, 48)
KINDS = {
    "colors": COLORS,
    "product": """
codec: {kind: identity}
planes: {resolution: 9, micro: 5, macro: 0, mixing: true, aggregation: product, axes: eg3d}
field: {hidden: 8, frequencies: 2, view_direction: true}
render: {coarse: 12, fine: 0}
""",
    "guided": """
codec: {kind: guided, downsampling: 2, channels: 5, width: 8}
planes: {resolution: 16, micro: 4, macro: 4, bases: 2, fusion: sum}
field: {hidden: 12}
render: {coarse: 6, fine: 7, near: 0.9, far: 2.4}
""",
    "other": """
codec: {kind: convolutional, downsampling: 2, channels: 4, width: 8}
planes: {resolution: 8, micro: 4, macro: 0}
field: {hidden: 8}
""",
}
"""Configurations that use all that the renderer knows, and one that it cannot show."""
DRAW = """(async () => {
  const {PublishedLibrary} = await import("/web/library.js"), {ServerSource} = await import("/web/source.js");
  const {Scene} = await import("/web/compose.js"), {Renderer, RAW} = await import("/web/renderer.js");
  const library = await PublishedLibrary.open(new ServerSource("/" + KIND)), place = await library.find(NAME);
  const scene = await Scene.read(library, place, NAME), renderer = new Renderer();
  return CAMERAS.map(camera => {
    renderer.draw(scene, camera, WIDE, TALL, {haze: RAW});
    return btoa(String.fromCharCode(...renderer.pixels(WIDE, TALL)));
  });
})()"""


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {kind: random_model(settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module")
def libraries(models, tmp_path_factory):
    """A library of each kind; the scene `small` of the first has a box of its own, and scenes of the kind
    `guided` are stored as by earlier versions."""
    folder, made = tmp_path_factory.mktemp("libraries"), {}
    for kind, model in models.items():
        scenes = {"one": random_scene(model, 1), "two <b>": random_scene(model, 2)}
        if kind == "colors":
            scenes = {name: random_scene(model, 1, [*BOX.center, *BOX.half]) for name in scenes}
            scenes["small"] = random_scene(model, 4, (0.3, 0.2, 0.1, 0.2, 0.1, 0.3))
        precision, packed = ("float32" if kind == "product" else "int8"), pack
        if kind == "guided":
            packed = packed_before
        made[kind] = library_of(folder / kind, model, scenes, precision, packed=packed)
    return made


@pytest.fixture(scope="module")
def site(libraries, tmp_path_factory):
    """A server of all libraries, published."""
    folder = tmp_path_factory.mktemp("site")
    for kind, library in libraries.items():
        published(folder / kind, library)
    with served(folder) as running:
        running.page("empty", "")
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with browser(profile, 900, 400) as new:
        yield new()
    shutil.rmtree(profile, ignore_errors=True)


def emptied(tab) -> None:
    """Leaves the last page and forgets what happened there."""
    tab.open("about:blank")
    tab.wait("document.readyState === 'complete' && location.href === 'about:blank'")
    tab.problems.clear()
    tab.requests.clear()


def drawn(tab, site, kind: str, name: str, cameras) -> np.ndarray:
    """Pictures over white (v, h, w, 3) and opacity (v, h, w) from the browser."""
    emptied(tab)
    tab.open(f"{site.address}/empty.html")
    tab.wait("document.title === 'empty'")
    values = {
        "KIND": kind, "NAME": name, "TALL": SIZE[0], "WIDE": SIZE[1],
        "CAMERAS": [as_in_browser(cameras, k) for k in range(len(cameras))],
    }  # fmt: skip
    script = DRAW
    for key, value in values.items():
        script = script.replace(key, json.dumps(value))
    found = np.stack([
        np.frombuffer(base64.b64decode(one), np.uint8).reshape(*SIZE, 4)[::-1] for one in tab.evaluate(script)
    ])  # fmt: skip
    found = found.astype(np.float32) / 255
    return found[..., :3] + 1 - found[..., 3:], found[..., 3]


@pytest.mark.parametrize(
    ("kind", "name"), [("colors", "one"), ("colors", "small"), ("product", "two <b>"), ("guided", "one")]
)
def test_pictures_are_those_of_python(tab, site, libraries, models, kind, name):
    model, library = models[kind], libraries[kind]
    rows = library.parameters(name)
    cameras = VIEW.around(rows.own_box).dome(3, -30.0)
    white = torch.ones(model.codec.channels, *SIZE)
    with torch.no_grad():
        view = library.model().render(model.compose(rows, bounded=True), cameras, white)
    colors = (view.image(*SIZE)[:, :3].movedim(1, -1).numpy() + 1) / 2
    opacity = view.opacity.reshape(-1, *SIZE).numpy()
    shown, alpha = drawn(tab, site, kind, name, cameras)
    assert opacity.max() > 0.9 and colors.std() > 0.05  # there is something to see
    assert -10 * np.log10(((shown - colors) ** 2).mean()) > 40
    assert -10 * np.log10(((alpha - opacity) ** 2).mean()) > 40
    assert not tab.problems


STRICT = "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'"
"""A policy without inline scripts and styles, and without eval."""
WATCH = """window.events = [];
for (const kind of ["load", "error", "change"]) document.addEventListener(kind, ({target, detail}) => {
  if (target.localName === "latent-scene") events.push([kind, target.id, String(detail ?? "")]);
}, true);"""


def page_of(tab, site, name: str, *elements: str) -> None:
    """Opens a page of elements, each given by its attributes."""
    emptied(tab)
    body = "".join(f"<latent-scene {attributes}></latent-scene>" for attributes in elements)
    (site.folder / "watch.js").write_text(WATCH)
    (site.folder / "small.css").write_text("latent-scene { width: 120px; float: left; }")
    script = (
        '<link rel="stylesheet" href="small.css"><script src="watch.js"></script>'
        '<script type="module" src="web/latent-scene.js"></script>'
    )
    tab.open(site.page(name, script + body, STRICT))
    tab.wait(f"document.title === {json.dumps(name)} && customElements.get('latent-scene') !== undefined")


def shape(tab, number: int) -> str:
    """A script that returns the pixels of an element's picture as text."""
    return (
        f"document.querySelectorAll('latent-scene')[{number}].shadowRoot.querySelector('canvas').toDataURL()"
    )


def message(tab, number: int = 0) -> str:
    """Waits for the message of an element that has failed."""
    part = f"document.querySelectorAll('latent-scene')[{number}].shadowRoot.querySelector('p')"
    tab.wait(f"{part} && {part}.textContent")
    return tab.evaluate(f"{part}.textContent")


def test_two_elements_share_a_page(tab, site):
    page_of(
        tab, site, "pair", 'id="a" src="colors" scene="one" controls',
        'id="b" src="colors" scene="two &lt;b&gt;" controls autorotate="90"',
    )  # fmt: skip
    tab.wait("events.filter(event => event[0] === 'load').length === 2")
    assert tab.evaluate(
        "document.querySelectorAll('latent-scene')[1].shadowRoot.querySelector('[role=img]').ariaLabel"
    )
    one, two = tab.evaluate(shape(tab, 0)), tab.evaluate(shape(tab, 1))
    tab.wait(f"{shape(tab, 1)} !== {json.dumps(two)}")  # it turns
    # By hand
    x, y, wide = tab.evaluate(
        "(() => { const b = document.getElementById('a').getBoundingClientRect();"
        " return [b.x, b.y, b.width]; })()"
    )
    tab.evaluate("scrollTo(0, 0)")
    tab.drag((x + wide / 2, y + 60), (x + wide / 2 + 90, y + 80), 4)
    tab.wait("events.some(event => event[0] === 'change' && event[1] === 'a')")
    view = tab.evaluate("document.getElementById('a').view")
    assert view["azimuth"] != 40 and view["elevation"] > 25
    tab.wait(f"{shape(tab, 0)} !== {json.dumps(one)}")
    # By keys
    tab.command("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    turned = tab.evaluate("document.getElementById('a').view")
    assert round(turned["azimuth"] - view["azimuth"]) % 360 == 10
    tab.command("Input.dispatchKeyEvent", type="keyDown", key="0", code="Digit0")
    assert tab.evaluate("document.getElementById('a').view.azimuth") == 40
    # The model, the pack and the description are read once for both, or by one request each
    files = [request.rpartition("/")[2] for request in tab.requests if "/colors/" in request]
    assert not tab.problems and len([file for file in files if ".web." in file]) == 1


def test_objects_come_back_after_the_graphics_processor_was_lost(tab, site):
    page_of(tab, site, "lost", 'src="colors" scene="one"')
    tab.wait("events.length")
    tab.evaluate(
        "import('/web/stage.js').then(({stage}) => { const {gl} = stage.renderer;"
        " const extension = gl.getExtension('WEBGL_lose_context'); extension.loseContext();"
        " document.querySelector('latent-scene').view = {azimuth: 200};"
        f" window.before = {shape(tab, 0)};"
        " setTimeout(() => extension.restoreContext(), 300); })"
    )
    tab.wait(f"{shape(tab, 0)} !== window.before")
    assert tab.evaluate("events").pop()[0] == "load" and not tab.problems


PLANES = """(async () => {
  const {PublishedLibrary} = await import("/web/library.js"), {ServerSource} = await import("/web/source.js");
  const {Scene} = await import("/web/compose.js"), {Renderer} = await import("/web/renderer.js");
  const library = await PublishedLibrary.open(new ServerSource("/colors"));
  const place = await library.find("one"), read = () => Scene.read(library, place, "one");
  const bytes = 8 * 15 * 14 ** 2, renderer = new Renderer(2.5 * bytes), {gl} = renderer, planes = new Set();
  const bind = gl.bindTexture.bind(gl);
  gl.bindTexture = (kind, texture) => {
    if (kind === gl.TEXTURE_2D_ARRAY) planes.add(texture);
    bind(kind, texture);
  };
  for (let k = 0; k < 4; k++) renderer.occupancy(await read());
  const left = [...planes].map(texture => gl.isTexture(texture));
  try {
    new Renderer(bytes - 1).occupancy(await read());
  } catch (problem) {
    return [left, problem.message];
  }
})()"""
"""Uploads the same planes, of 15 layers with 14 x 14 texels, four times."""


def test_planes_in_the_graphics_memory_are_limited(tab, site):
    emptied(tab)
    tab.open(f"{site.address}/empty.html")
    tab.wait("document.title === 'empty'")
    left, problem = tab.evaluate(PLANES)
    assert left == [False, False, True, True]  # the oldest go
    assert "1 MiB of graphics memory" in problem


def test_elements_say_what_is_wrong(tab, site):
    page_of(
        tab, site, "wrong", 'src="colors" scene="on"', 'src="nowhere" scene="one"', 'src="other" scene="one"',
        'scene="one"', 'src="colors" scene="&lt;img src=x onerror=alert(1)&gt;"',
    )  # fmt: skip
    assert "no object “on”" in message(tab, 0)
    assert "answers 404" in message(tab, 1)
    assert "codec “convolutional”" in message(tab, 2)
    assert "attributes src" in message(tab, 3)
    assert "<img src=x" in message(tab, 4)
    assert tab.evaluate("document.getElementsByTagName('img').length") == 0
    assert [event[0] for event in tab.evaluate("events")] == 5 * ["error"]
    assert [problem for problem in tab.problems if "404" not in problem] == []


def hostile(description: dict, folder) -> dict[str, dict]:
    """Descriptions that lie, by what the element says about them."""
    tensors = {"weights": {"dtype": "F32", "shape": [1 << 30, 1 << 20], "data_offsets": [0, 1 << 50]}}
    header = json.dumps(tensors).encode()
    lying = len(header).to_bytes(8, "little") + header + bytes(64)
    bucket = gzip.compress(json.dumps({"one": [0, 0, 0, 1 << 40, 0, 0, "0" * 64]}).encode())
    short = gzip.compress(
        json.dumps({"one": [0, 0, 0, len(lying), 0, 0, hashlib.sha256(lying).hexdigest()]}).encode()
    )
    bomb = gzip.compress(b" " * (80 << 20))

    def put(kind: str, content: bytes, ending: str) -> dict:
        digest = hashlib.sha256(content).hexdigest()
        (folder / kind / digest[:2]).mkdir(parents=True, exist_ok=True)
        file = (
            f"{kind}/{digest[:32]}{ending}"
            if kind != "packs"
            else f"{kind}/{digest[:2]}/{digest[:32]}{ending}"
        )
        (folder / file).write_bytes(content)
        return {"file": file, "bytes": len(content), "sha256": digest}

    names, pack = (lambda content: [put("names", content, ".json.gz")]), put("packs", lying, ".pack")
    return {
        "a place that no pack has": description | {"names": names(bucket)},
        "a tensor beyond its end": description | {"names": names(short), "packs": [pack]},
        "more than 67108864 bytes": description | {"names": names(bomb)},
        "names is no list of files": description
        | {"names": [{"file": "../secret", "bytes": 1, "sha256": ""}]},
        "render.resolution": description | {"render": description["render"] | {"resolution": 10**9}},
        "the box is none": description | {"library": description["library"] | {"box": None}},
        "another": description | {"web_model": description["web_model"] | {"sha256": "0" * 64}},
        "of the format": {"format": "else"},
    }


def test_lies_in_a_library_give_messages(tab, site, tmp_path):
    original = site.folder / "colors"
    cases = hostile(json.loads((original / "published.json").read_text()), original)
    for number, description in enumerate(cases.values()):
        copy = site.folder / f"hostile{number}"
        copy.mkdir()
        for part in original.iterdir():
            if part.name != "published.json":
                (copy / part.name).symlink_to(part)
        (copy / "published.json").write_text(json.dumps(description))
    page_of(tab, site, "hostile", *(f'src="hostile{k}" scene="one"' for k in range(len(cases))))
    tab.evaluate("document.querySelectorAll('latent-scene').forEach(e => e.setAttribute('hidden', ''))")
    for number, words in enumerate(cases):
        tab.evaluate(f"document.querySelectorAll('latent-scene')[{number}].removeAttribute('hidden')")
        assert words in message(tab, number)
        tab.evaluate(f"document.querySelectorAll('latent-scene')[{number}].setAttribute('hidden', '')")
    assert not tab.problems


def test_servers_without_ranges_serve_too(tab, libraries, tmp_path):
    published(tmp_path / "site" / "colors", libraries["colors"])
    with served(tmp_path / "site", ranges=False) as plain:
        page_of(tab, plain, "plain", 'src="colors" scene="small"')
        tab.wait("events.length")
        assert tab.evaluate("events")[0][0] == "load" and not tab.problems


def test_without_webgl_the_thumbnail_stays(tab, site):
    page_of(tab, site, "poster", 'hidden src="colors" scene="one"')
    tab.evaluate(
        "HTMLCanvasElement.prototype.getContext = (original => function (kind, ...more) {"
        " return kind === 'webgl2' ? null : original.call(this, kind, ...more);"
        " })(HTMLCanvasElement.prototype.getContext)"
    )
    tab.evaluate("document.querySelector('latent-scene').removeAttribute('hidden')")
    assert "no WebGL2" in message(tab)
    tab.wait("document.querySelector('latent-scene').shadowRoot.querySelector('.poster').width > 1")
    middle = tab.evaluate(
        "(() => { const poster = document.querySelector('latent-scene').shadowRoot.querySelector('.poster');"
        " const {data} = poster.getContext('2d').getImageData(poster.width / 2, poster.height / 2, 1, 1);"
        " return [...data]; })()"
    )
    assert abs(middle[1] - 200) < 12 and middle[3] == 255 and middle[0] < 30


@pytest.mark.parametrize("shared_from", [0, 2.5], ids=["with base planes", "fused"])
def test_live_page_works_without_a_network(tab, libraries, tmp_path, monkeypatch, shared_from):
    monkeypatch.setattr(live, "SHARED_FROM", shared_from)
    emptied(tab)
    loaded = SceneSet.open_all(libraries["colors"].path)
    file = tmp_path / "live.html"
    assert write_live_page(file, loaded, ["small", "two <b>"], title="<i>") == file.stat().st_size
    tab.open(f"file://{file}")
    poster = "[...document.querySelectorAll('latent-scene')].map(e => e.shadowRoot.querySelector('.poster'))"
    tab.wait("document.querySelectorAll('latent-scene').length === 2")
    tab.wait(f"{poster}.every(part => part.classList.contains('past'))")
    text = tab.evaluate("document.body.innerText")
    assert "two <b>" in text and "2 of 3 scenes, rendered live" in text and "<i>" in text
    before = tab.evaluate(shape(tab, 1))
    tab.wait(f"{shape(tab, 1)} !== {json.dumps(before)}")  # it turns
    tab.click("figcaption button")
    tab.wait(
        "document.querySelector('dialog').open && document.querySelector('dialog latent-scene') !== null"
    )
    assert tab.requests == [f"file://{file}"] and not tab.problems


def test_live_page_is_refused_where_latents_are_no_colors(libraries, tmp_path):
    with pytest.raises(UserError, match="--live: .*convolutional"):
        write_live_page(tmp_path / "page.html", SceneSet.open_all(libraries["other"].path), ["one"])


def test_fused_scenes_look_alike(libraries):
    loaded = SceneSet.open_all(libraries["colors"].path)
    small, rows = live.without_bases(loaded.model), live.fused(loaded, "small", loaded.parameters("small"))
    stored = unpack(pack(rows, "int8"), small.config.planes)
    cameras = loaded.view_of("small").dome(2)
    before = render_images(loaded.model, loaded.planes("small"), cameras, SIZE).images
    after = render_images(small, small.compose(stored), cameras, SIZE).images
    assert small.bases.numel() == 0 and -10 * (before - after).square().mean().log10() > 40
