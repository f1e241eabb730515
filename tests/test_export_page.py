"""The page that turns scenes: sheets hold every view; in a browser, dragging works, with no errors or
requests."""

import base64
import contextlib
import io
import json
import re
import shutil
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from browser import PROGRAM, browser
from egg import BOX, VIEW, egg, egg_run
from PIL import Image

from latentscenes.cli import main as cli
from latentscenes.core.errors import UserError
from latentscenes.export.pages import FIRST, sheet, window_on, write_page
from latentscenes.model.model import render_images
from latentscenes.model.pictures import with_alpha
from latentscenes.model.planes import mean_parameters
from latentscenes.storage.scene_set import SceneSet


def embedded(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_sheets_keep_order():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 3, 4, 4), np.uint8) + 1
    found = sheet(pictures, 3)
    assert found.shape == (6, 12, 4)
    assert found[::3, ::4, 0].tolist() == [[1, 2, 3], [4, 5, 0]] and (found[:3, :4] == 1).all()


def test_window_holds_the_box():
    cameras = VIEW.orbit(12, 20.0)
    rows, columns = window_on(BOX, cameras, VIEW.size)
    places, _ = cameras.project(BOX.corners())
    pixels = places.flatten(0, 1).clamp(0, 1) * torch.tensor(
        [VIEW.size[1], VIEW.size[0]]
    )  # it reaches out of the pictures below
    assert (pixels[:, 0] >= columns.start).all() and (pixels[:, 0] <= columns.stop).all()
    assert (pixels[:, 1] >= rows.start).all() and (pixels[:, 1] <= rows.stop).all()
    assert rows.stop - rows.start < VIEW.size[0]


def test_page_holds_every_view(tmp_path):
    loaded = egg()
    loaded.tags = lambda name: {"category": "Food</script><!--<script>"}
    size = write_page(
        tmp_path / "page.html",
        loaded,
        VIEW,
        ["egg"],
        title="Eggs </script> & {{data}}",
        frames=5,
        elevations=(40.0, 10.0),
    )
    text = (tmp_path / "page.html").read_text()
    assert size == len(text.encode()) and len(list(tmp_path.iterdir())) == 1
    assert "<title>Eggs &lt;/script&gt; &amp; {{data}}</title>" in text and "10 views of" in text
    data = embedded(text)
    assert data["scenes"][0]["about"] == "Food</script><!--<script>" and "Food<" not in text
    assert (data["frames"], data["rows"], data["columns"], data["lines"]) == (5, 2, 4, 3)
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(data["scenes"][0]["sheet"]))))
    cameras = VIEW.orbit(5, 40.0, FIRST)
    window = window_on(BOX, VIEW.orbit(5, 10.0, FIRST), VIEW.size)
    tall, wide = picture.shape[0] // 3, picture.shape[1] // 4
    shown = with_alpha(render_images(loaded.model, loaded.planes("egg"), cameras, VIEW.size))
    for k in range(5):  # the second elevation comes after the first
        line, column = divmod(5 + k, 4)
        tile = picture[line * tall : (line + 1) * tall, column * wide : (column + 1) * wide]
        whole = shown[k][..., 3]
        assert abs(int((tile[..., 3] > 127).sum()) - int((whole > 127).sum())) <= 6  # nothing is cut off
        seen = tile[..., 3] > 250
        assert np.abs(tile[seen][:, :3].mean(0) - shown[k][whole > 250][:, :3].mean(0)).max() < 12
    assert tall >= window[0].stop - window[0].start


def test_bad_numbers_are_refused(tmp_path):
    for wrong, message in (
        ({"frames": 0}, "--frames 0"),
        ({"elevations": ()}, "0 elevations"),
        ({"frames": 900, "size": 800}, "too large for WebP"),
    ):
        with pytest.raises(UserError, match=message):
            write_page(tmp_path / "page.html", egg(), VIEW, ["egg"], **wrong)


def test_page_command(tmp_path, solids, monkeypatch, capsys):
    run = egg_run(tmp_path / "run", solids)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "latentscenes",
            "export",
            "page",
            "--run",
            str(run.path),
            "--scenes",
            "egg",
            "--out",
            str(tmp_path / "p.html"),
            "--frames",
            "3",
        ],
    )
    cli.main()
    assert "1 scene" in capsys.readouterr().err
    assert [scene["name"] for scene in embedded((tmp_path / "p.html").read_text())["scenes"]] == ["egg"]


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_page_in_a_browser(tmp_path):
    pytest.importorskip("websockets")

    one = egg()
    many = SceneSet.of_table(
        one.model, mean_parameters(12, one.parameters("egg")), [f"egg {k}" for k in range(12)]
    )
    write_page(
        tmp_path / "page.html", many, VIEW, many.names, frames=12, elevations=(5.0, 25.0, 60.0), title="Eggs"
    )
    profile = tmp_path / "profile"
    profile.mkdir()
    with browser(profile, 900, 700) as new:
        page = new()
        page.open(f"file://{tmp_path}/page.html")
        page.wait("document.querySelectorAll('figure').length === 12")
        place = "document.querySelector('.view').style.backgroundPosition"
        page.wait("document.querySelector('.view').style.backgroundImage.startsWith('url(\"data:image/webp')")
        before = page.evaluate(place)
        page.wait(f"{place} !== {json.dumps(before)}")  # it turns by itself
        page.click("#play")
        assert page.evaluate("document.getElementById('play').textContent") == "Turn"
        still = page.evaluate(place)
        time.sleep(0.5)
        assert page.evaluate(place) == still
        x, y, wide, tall = page.evaluate(
            "(() => { const b = document.querySelector('.view').getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]; })()"
        )
        page.drag((x + wide / 2, y + tall / 2), (x + wide / 2 + wide / 4, y + tall / 2))
        dragged = page.evaluate(place)
        assert dragged != still
        page.drag((x + wide / 2, y + tall / 2), (x + wide / 2, y + tall / 2 + tall / 2))
        assert page.evaluate(place) != dragged  # from higher
        turned = page.evaluate(place)
        page.command("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
        assert page.evaluate(place) != turned
        page.click("figcaption button")
        page.wait("document.querySelector('dialog').open && document.querySelector('dialog .view') !== null")
        page.command(
            "Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27
        )
        page.wait("!document.querySelector('dialog').open")
        page.evaluate("document.getElementById('filter').focus()")
        page.type("egg 11")
        page.wait("[...document.querySelectorAll('figure')].filter(figure => !figure.hidden).length === 1")
        assert (
            not page.problems
            and [request for request in page.requests if not request.startswith("file:")] == []
        )
    shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_page_prints_all_pictures(tmp_path):
    """Also those below the screen, and where printers leave backgrounds out."""
    pytest.importorskip("websockets")
    one, profile = egg(), tmp_path / "profile"
    names = [f"egg {k}" for k in range(12)]
    many = SceneSet.of_table(one.model, mean_parameters(12, one.parameters("egg")), names)
    write_page(tmp_path / "page.html", many, VIEW, names, frames=4)
    profile.mkdir()
    with browser(profile, 400, 300) as new:
        page = new()
        page.open(f"file://{tmp_path}/page.html")
        shown = "document.querySelectorAll('.view[style*=webp]').length"
        page.wait(f"document.querySelectorAll('figure').length === 12 && {shown} > 0")
        assert page.evaluate(shown) < 12
        printed = base64.b64decode(page.command("Page.printToPDF", printBackground=False)["data"])
        page.wait(f"{shown} < 12")  # those out of sight are released again
    drawn = 0
    for start in re.finditer(rb"stream\r?\n", printed):
        with contextlib.suppress(zlib.error):  # pictures and fonts are streams, too
            drawn += len(re.findall(rb"/X\d+ Do", zlib.decompressobj().decompress(printed[start.end() :])))
    assert drawn == 12
    shutil.rmtree(profile, ignore_errors=True)
