"""The gallery of a published library: files, list, search, objects, similar ones, keys; names stay text."""

import json
import sys

import pytest
from browser import PROGRAM, browser
from published_pages import COLORS, library_of, random_model, random_scene, served

import latentscenes
from latentscenes.cli import main as cli
from latentscenes.core.errors import UserError
from latentscenes.export.live import MODULES, check_site, write_site
from latentscenes.storage.published import publishing
from latentscenes.storage.published.targets import BucketTarget, FolderTarget

MARKUP = '<img src=x onerror="document.title=1">'
NAMES = [f"chair {number:02d}" for number in range(64)] + ["lamp", "lamp shade", MARKUP]
TAGS = {name: {"category": "Seat", "year": 1990 + int(name[-2:]) % 3} for name in NAMES[:64]}
TAGS |= {
    "lamp": {"category": "Light", "tags": ["red", "Ünlit"]},
    MARKUP: {"category": "Light", MARKUP: "<b>"},
}
TAGS["chair 06"] |= {"name": "Oak <i>seat</i>"}
CARDS = "[...document.querySelectorAll('#view .card')].map(card => card.dataset.name)"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    model = random_model(COLORS)
    scenes = {name: random_scene(model, seed) for seed, name in enumerate(NAMES)}
    return library_of(tmp_path_factory.mktemp("library") / "things", model, scenes, tags=TAGS)


@pytest.fixture(scope="module")
def gallery(library, tmp_path_factory):
    """The address of a served gallery, whose index has pages of 16 objects."""
    folder = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "PAGE", 16)
        publishing.publish(library, FolderTarget(folder))
    write_site(FolderTarget(folder), "Things & more")
    with served(folder, modules=False) as running:
        yield running


# Files


def test_a_second_time_nothing_is_written(library, tmp_path):
    target = FolderTarget(tmp_path / "out")
    publishing.publish(library, target)
    assert write_site(target, "<Things>") == 2 + len(list(MODULES.glob("*.js")))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<title>&lt;Things&gt;</title>" in page and "unsafe" not in page
    assert write_site(target, "<Things>") == 0 and write_site(target, "Others") == 1
    publishing.publish(library, target)
    assert (tmp_path / "out" / "web" / "gallery.js").is_file()


def test_another_page_is_kept(library, tmp_path):
    (tmp_path / "index.html").write_text("<p>mine")
    with pytest.raises(UserError, match="index.html: is no gallery of this package. Move it"):
        check_site(FolderTarget(tmp_path))
    assert (tmp_path / "index.html").read_text() == "<p>mine"


def test_buckets_tell_browsers_what_files_are():
    obstore = pytest.importorskip("obstore", reason="obstore (the cloud extra) is absent")
    from obstore.store import MemoryStore

    store = MemoryStore()
    write_site(BucketTarget("s3://some/place", store), "Things")
    kinds = {
        name: obstore.get(store, name).attributes
        for name in ("index.html", "web/gallery.js", "web/gallery.css")
    }
    assert [found["Content-Type"].split(";")[0] for found in kinds.values()] == [
        "text/html", "text/javascript", "text/css",
    ]  # fmt: skip
    assert all(found["Cache-Control"] == "no-cache" for found in kinds.values())


def test_publish_command(library, tmp_path, monkeypatch, capsys):
    command = ["latentscenes", "library", "publish", str(library.path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--site"])
    cli.main()
    assert "<title>things</title>" in (tmp_path / "out" / "index.html").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--title", "Things"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--title: only with --site" in capsys.readouterr().err


# In a browser

in_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    pytest.importorskip(
        "websockets", reason="the browser is driven by websockets, which the viewer extra brings"
    )
    with browser(tmp_path_factory.mktemp("profile"), 1000, 700) as new:
        yield new()


def opened(tab, gallery, query: str, status: str) -> list[str]:
    """Opens the gallery, waits until it says something, and returns the names on cards."""
    tab.open(f"{gallery.address}/index.html{query}")
    said = f"({STATUS}).includes({json.dumps(status)}) && !({STATUS}).endsWith('…')"
    tab.wait(f"document.readyState === 'complete' && {said}")
    return tab.evaluate(CARDS)


@in_browser
def test_the_list_in_parts(tab, gallery):
    tab.problems.clear(), tab.requests.clear()
    assert opened(tab, gallery, "", "Objects 1 to 60 of 67") == NAMES[:60]
    assert tab.evaluate("document.querySelector('h1').textContent") == "Things & more"
    assert not any("packs/" in address or "weights/" in address for address in tab.requests)
    tab.click(".pager a:last-child")
    tab.wait(f"({STATUS}) === 'Objects 61 to 67 of 67'")
    assert tab.evaluate(CARDS) == NAMES[60:] and tab.evaluate("location.search") == "?from=60"
    tab.evaluate("history.back()")
    tab.wait(f"({STATUS}) === 'Objects 1 to 60 of 67'")
    pixels = "[...document.querySelector('.card canvas').getContext('2d').getImageData(48, 48, 1, 1).data]"
    tab.wait(f"({pixels})[3] === 255")
    assert tab.evaluate(pixels) == pytest.approx([10, 200, 30, 255], abs=4)
    assert not tab.problems and all(address.startswith(gallery.address) for address in tab.requests)


@in_browser
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("?q=LAMP", ["lamp", "lamp shade"]),
        ("?q=%C3%BCnlit+red", ["lamp"]),
        ("?tag=category%3DLight", ["lamp", MARKUP]),
        ("?tag=category%3DSeat&q=07", ["chair 07"]),
        ("?tag=tags%3Dred", ["lamp"]),
        ("?q=chair+63", ["chair 63"]),
    ],
)
def test_words_and_tags(tab, gallery, query, found):
    assert opened(tab, gallery, query, f"{len(found)} object") == found


@in_browser
def test_search_as_it_is_typed_and_by_choices(tab, gallery):
    opened(tab, gallery, "", "Objects 1 to 60")
    tab.evaluate("document.activeElement.blur()")
    tab.command("Input.dispatchKeyEvent", type="keyDown", key="/", text="/")
    assert tab.evaluate("document.activeElement.id") == "words"
    tab.type("nothing of this")
    tab.wait(f"({STATUS}) === 'No object has these words and tags.'")
    assert tab.evaluate("location.search") == "?q=nothing+of+this"
    opened(tab, gallery, "", "Objects 1 to 60")
    choose = "const box = document.querySelector('select'); box.value = 'category=Seat';"
    tab.evaluate(f"{{ {choose} box.dispatchEvent(new Event('change')); }}")
    tab.wait(f"({STATUS}) === 'Objects 1 to 60 of 64'")
    assert tab.evaluate("document.querySelector('select').value") == "category=Seat"


@in_browser
def test_an_object_with_similar_ones(tab, gallery, library):
    tab.problems.clear()
    opened(tab, gallery, "?object=chair+05", "")
    tab.wait("document.querySelectorAll('section .card').length === 12")
    nearest = latentscenes.Library(library).nearest("chair 05", 12)
    assert tab.evaluate(CARDS) == [neighbor.name for neighbor in nearest]
    text = tab.evaluate("document.querySelector('dl').textContent")
    assert "categorySeat" in text and "year1992" in text
    assert tab.evaluate("document.title") == "chair 05 – Things & more"
    assert tab.evaluate("document.activeElement.tagName") == "H2"
    assert tab.evaluate("document.querySelector('latent-scene').getAttribute('scene')") == "chair 05"
    assert not tab.evaluate(
        "document.querySelector('latent-scene').shadowRoot.querySelector('p').textContent"
    )
    page, message = tab.evaluate("document.querySelector('pre').textContent"), "no object “chair 99”"
    assert f'<latent-scene src="{gallery.address}/" scene="chair 05" controls>' in page
    assert not tab.problems
    opened(tab, gallery, "?object=chair+99", message)


@in_browser
def test_an_object_goes_by_the_name_of_its_catalog(tab, gallery):
    assert opened(tab, gallery, "?q=oak", "1 object") == ["chair 06"]
    assert tab.evaluate("document.querySelector('#view .card').textContent") == "Oak <i>seat</i>Seat"
    opened(tab, gallery, "?object=chair+06", "")
    assert tab.evaluate("document.querySelector('h2').textContent") == "Oak <i>seat</i>"
    assert "scenechair 06category" in tab.evaluate("document.querySelector('dl').textContent")


@in_browser
def test_a_download_is_the_file_of_the_pack(tab, gallery, library):
    opened(tab, gallery, "", "Objects")
    kept = tab.evaluate("""(async () => {
      const {PublishedLibrary} = await import("/web/library.js");
      const {ServerSource} = await import("/web/source.js");
      const library = await PublishedLibrary.open(new ServerSource("/")), place = await library.find("lamp");
      return [place.sha256, (await library.file(place)).length, [...(await library.weights(4))]];
    })()""")
    assert len(kept[0]) == 64 and kept[1] > 1000
    rows = latentscenes.Library(library).weights(NAMES[64:])
    assert kept[2] == pytest.approx(rows.ravel().tolist(), abs=1e-6)


@in_browser
def test_keys_move_among_cards_and_back(tab, gallery):
    opened(tab, gallery, "", "Objects 1 to 60")
    tab.evaluate("document.querySelector('.card').focus()")
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: KEY, bubbles: true}))"
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.evaluate(press.replace("KEY", json.dumps(key)))
    assert tab.evaluate("document.activeElement.dataset.name") == "chair 01"
    tab.evaluate("document.activeElement.click()")
    tab.wait("document.activeElement.tagName === 'H2'")
    tab.evaluate(press.replace("KEY", '"Escape"'))
    tab.wait("document.activeElement.dataset.name === 'chair 01'")


@in_browser
def test_names_and_tags_are_text(tab, gallery):
    assert opened(tab, gallery, "?q=%3Cimg", "1 object") == [MARKUP]
    tab.click(".card")
    tab.wait("!!document.querySelector('latent-scene')")
    assert tab.evaluate("document.querySelector('h2').textContent") == MARKUP
    assert not tab.evaluate("document.querySelectorAll('#view img, #view b').length")
    assert tab.evaluate("document.title") == f"{MARKUP} – Things & more"
    assert "&lt;img src=x" in tab.evaluate("document.querySelector('pre').textContent")
