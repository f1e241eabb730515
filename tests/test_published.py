"""Published libraries read from folders, servers and buckets: the same bits, few requests, clear errors."""

import gzip
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from publications import Parts, WholeFiles, add, made_library, serving

import latentscenes
from latentscenes.cli.main import main
from latentscenes.core.cameras import orbit
from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, object_checksum
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published import addresses
from latentscenes.storage.published.addresses import BucketFiles, address_of
from latentscenes.storage.published.format import DESCRIPTION, PublishedFile, unpacked_json
from latentscenes.storage.published.index import PublishedIndex
from latentscenes.storage.published.publishing import publish
from latentscenes.storage.published.reader import PublishedLibrary
from latentscenes.storage.published.targets import BucketTarget, FolderTarget
from latentscenes.storage.scene_set import SceneSet
from latentscenes.viewer.painter import Painter, ViewRequest


@pytest.fixture(scope="module")
def library(tmp_path_factory, solids) -> LibraryFolder:
    folder = LibraryFolder.open(made_library(tmp_path_factory.mktemp("library"), solids))
    add(folder, "a chair", "été / 🚗")
    return folder


@pytest.fixture
def out(library, tmp_path, monkeypatch):
    """The published library; the cache is empty, and failing servers are asked again at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    publish(library, FolderTarget(tmp_path / "out"))
    return tmp_path / "out"


def rendered(opened: latentscenes.Library, name: str):
    return opened[name].render(opened.orbit(2))


def same_as_the_library(opened: latentscenes.Library, library: LibraryFolder) -> None:
    ours = latentscenes.Library(library)
    assert opened.names == ours.names and len(opened) == 6 and "a chair" in opened and "sofa" not in opened
    for name in ours.names:
        one, other = rendered(ours, name), rendered(opened, name)
        for key in ("rgb", "latents", "depth", "opacity"):
            assert np.array_equal(getattr(one, key), getattr(other, key)), (name, key)
        info = library.index.info(name)
        tags = {key: None if key == "odd" else value for key, value in info.tags.items()}
        expected = replace(info, dataset=None, split=None, source=name, tags=tags)
        assert opened[name].metadata == expected
    assert np.array_equal(opened.weights(), ours.weights()) and opened.size == ours.size
    assert opened.folder.index.descriptions().keys() == library.index.descriptions().keys()
    assert "Box · number: 0" in opened.folder.index.descriptions()["a chair"]
    assert opened.folder.index.totals() == library.index.totals()
    assert [info.name for info in opened.folder.index.first(5)] == ours.names[:5]
    assert opened.nearest("red_ball", 3) == ours.nearest("red_ball", 3)
    picture = Image.open(io.BytesIO(opened.thumbnail("a chair")))
    assert (
        picture.size == (96, 96)
        and np.abs(np.subtract(picture.getpixel((48, 48)), (10, 200, 30, 255))).max() < 9
    )


def test_a_folder_reads_as_the_library(library, out):
    same_as_the_library(latentscenes.open_library(out, device="cpu"), library)


@pytest.mark.parametrize("kind", [Parts, WholeFiles])
def test_a_web_server_reads_as_the_library(library, out, kind):
    with serving(out, kind) as server:
        same_as_the_library(latentscenes.open_library(server.address, device="cpu"), library)


def test_a_bucket_reads_as_the_library(library, out, tmp_path):
    store = pytest.importorskip("obstore", reason="obstore is not installed").store.MemoryStore()
    publish(library, BucketTarget("s3://somewhere/cars", store))
    opened = PublishedLibrary(BucketFiles("s3://somewhere/cars", store))
    same_as_the_library(latentscenes.Library(opened), library)
    with pytest.raises(UserError, match="s3://somewhere/cars: no published library here"):
        PublishedLibrary(
            BucketFiles("s3://somewhere/cars", pytest.importorskip("obstore").store.MemoryStore())
        )


def test_an_s3_address_reads_through_obstore(library, out, tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed")
    (tmp_path / "bucket").mkdir()
    out.rename(tmp_path / "bucket" / "cars")
    with serving(tmp_path) as server:
        settings = {"ENDPOINT": server.address, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true", "REGION": "x"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        opened = latentscenes.open_library("s3://bucket/cars", device="cpu")
        ours = latentscenes.Library(library)
        assert np.array_equal(rendered(opened, "a chair").rgb, rendered(ours, "a chair").rgb)
        assert [path.split("/")[3] for path, part in server.asked if part] == ["packs"]
        with pytest.raises(UserError, match="s3://bucket/sofas: no published library here"):
            latentscenes.open_library("s3://bucket/sofas", device="cpu")


def test_a_scene_is_one_request_and_the_rest_is_cached(out):
    with serving(out) as server:
        opened = latentscenes.open_library(server.address, device="cpu")
        rendered(opened, "red_ball")
        kinds = [path.split("/")[1] for path, _ in server.asked]
        assert kinds == ["published.json", "names", "model", "packs"]
        rendered(opened, "a chair")
        assert len(server.asked) == 5 and server.asked[-1][1].startswith("bytes=")
        assert opened["a chair"].metadata.tags["category"] == "Box" and len(opened.names) == 6
        assert [path.split("/")[1] for path, _ in server.asked[5:]] == ["index"]
        server.asked.clear()
        again = latentscenes.open_library(server.address, device="cpu")
        rendered(again, "blue_egg"), again.names, again.infos()
        assert [path.split("/")[1] for path, _ in server.asked] == ["published.json", "packs"]


def test_servers_without_ranges_send_a_pack_once(out, capsys):
    with serving(out, WholeFiles) as server:
        opened = latentscenes.open_library(server.address, device="cpu")
        for name in ("red_ball", "green_box", "a chair"):
            assert opened[name].rows
        packs = [path for path, _ in server.asked if path.startswith("/packs")]
        assert len(packs) == 2 and "sends whole files only" in "".join(capsys.readouterr())


def test_damage_in_the_cache_is_fetched_again(out, tmp_path):
    with serving(out) as server:
        model = latentscenes.open_library(server.address, device="cpu").model.state_dict()
        for file in (tmp_path / "cache" / "latentscenes" / "published").iterdir():
            file.write_bytes(b"?" + file.read_bytes()[1:])
        again = latentscenes.open_library(server.address, device="cpu").model.state_dict()
        assert all(torch.equal(again[name], value) for name, value in model.items())


def test_a_passing_failure_is_tried_again(out):
    with serving(out) as server:
        server.failing = 2
        assert len(latentscenes.open_library(server.address, device="cpu")) == 6
        server.failing = 9
        with pytest.raises(UserError, match="cannot be fetched .HTTP 503.*Check the address"):
            latentscenes.open_library(server.address, device="cpu")
        assert server.failing == 6


def test_wrong_addresses_and_damage_are_told(out, tmp_path):
    with serving(out) as server:
        with pytest.raises(UserError, match="/cars: no published library here .published.json is absent"):
            latentscenes.open_library(f"{server.address}/cars", device="cpu")
        opened = latentscenes.open_library(server.address, device="cpu")
        with pytest.raises(
            UserError, match=r"^http://127.*no scene 'a char' here; the nearest names are 'a chair'"
        ):
            opened["a char"]
        server.shift = 8
        with pytest.raises(UserError, match="sends other bytes than those asked for"):
            assert opened["a chair"].rows
        server.shift = 0
        pack = next(out.glob("packs/*/*.pack"))
        content = pack.read_bytes()
        pack.write_bytes(bytes(len(content)))
        with pytest.raises(UserError, match="bytes .* damaged, its SHA-256 is not the one"):
            assert opened["a chair"].rows
        pack.unlink()
        with pytest.raises(UserError, match="absent. If the library was published again meanwhile"):
            assert opened["a chair"].rows
        next(out.glob("thumbnails/*")).write_bytes(bytes(100_000))
        with pytest.raises(UserError, match="has more than .* bytes"):
            opened.thumbnail("a chair")
        (out / DESCRIPTION).write_text("<html>welcome</html>")
        with pytest.raises(UserError, match="published.json: cannot be read .*right address"):
            latentscenes.open_library(server.address, device="cpu")
    with pytest.raises(UserError, match="cannot be fetched .Connection refused"):
        latentscenes.open_library(server.address, device="cpu")
    with pytest.raises(UserError, match="cannot hold"):
        latentscenes.open_library("https://example.org/cars?version=3")


def changed(out, entry: str, change) -> None:
    """Replaces the first page or bucket by one with other content, with right checksums."""
    about = json.loads((out / DESCRIPTION).read_text())
    content = unpacked_json((out / about[entry][0]["file"]).read_bytes())
    change(content)
    packed = gzip.compress(json.dumps(content).encode())
    file = PublishedFile.of("index" if entry == "pages" else entry, packed)
    (out / file.file).write_bytes(packed)
    about[entry][0] = vars(file)
    about[CHECKSUM] = object_checksum(about)
    (out / DESCRIPTION).write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        ("pages", lambda page: page["psnr"].pop()),
        ("pages", lambda page: page["name"].__setitem__(4, 7)),
        ("pages", lambda page: page["precision"].__setitem__(4, ["int8"])),
        ("pages", lambda page: page["tags"].__setitem__(4, "{}}")),
        ("names", lambda bucket: bucket.__setitem__("a chair", [4, 0, -5, 9, 0, 0, "0" * 64])),
        ("names", lambda bucket: bucket.__setitem__("a chair", [4, 99, 0, 9, 0, 0, "0" * 64])),
        ("names", lambda bucket: bucket.__setitem__("a chair", {"row": 4})),
        ("names", lambda bucket: bucket["a chair"].__setitem__(0, 2)),
        ("names", lambda bucket: bucket[""].__setitem__("a chair", ["int4"])),
        ("names", lambda bucket: bucket[""]["a chair"].__setitem__(0, "int1")),
        ("names", lambda bucket: bucket[""]["a chair"].__setitem__(8, "{}}")),
        ("names", lambda bucket: bucket[""].pop("a chair")),
        ("names", lambda bucket: bucket.__setitem__("", [])),
    ],
)
def test_pages_and_buckets_of_strangers_are_checked(out, entry, change):
    changed(out, entry, change)
    opened = latentscenes.open_library(out, device="cpu")
    with pytest.raises(UserError, match="damaged"):
        assert opened["a chair"].metadata and opened.folder.index.info_in_page("a chair")


def test_metadata_lie_beside_names(out, monkeypatch):
    """Who looks up a name reads no page; of an earlier version's publication, one."""
    pages = latentscenes.open_library(out, device="cpu").infos()
    with monkeypatch.context() as patch:
        patch.setattr(PublishedIndex, "_read_page", lambda *_: pytest.fail("a page is read"))
        fresh = latentscenes.open_library(out, device="cpu")
        assert [fresh[info.name].metadata for info in pages] == pages
        assert fresh.folder.index.info("") is None and fresh.folder.index.known([""]) == set()
    changed(out, "names", lambda bucket: bucket.pop(""))
    earlier = latentscenes.open_library(out, device="cpu")
    assert [earlier[info.name].metadata for info in pages] == pages and earlier.verify() == []


def test_verify_names_what_is_damaged(out):
    opened = latentscenes.open_library(out, device="cpu")
    assert opened.verify() == []
    pack, atlas = next(out.glob("packs/*/*.pack")), next(out.glob("thumbnails/*"))
    pack.write_bytes(bytes(pack.stat().st_size))
    atlas.unlink()
    found = {damage.name: damage.what for damage in opened.verify()}
    assert found.keys() == {str(pack.relative_to(out)), str(atlas.relative_to(out))}
    assert "damaged, its SHA-256" in found[str(pack.relative_to(out))]
    assert found[str(atlas.relative_to(out))].startswith("absent")


def test_verify_compares_pages_and_buckets(out):
    changed(out, "names", lambda bucket: bucket["a chair"].__setitem__(2, 8))
    changed(out, "names", lambda bucket: bucket[""]["red_ball"].__setitem__(5, 99.0))
    found = {damage.name: damage.what for damage in latentscenes.open_library(out, device="cpu").verify()}
    assert found.keys() == {"a chair", "red_ball"} and "not that of its page" in found["a chair"]
    assert "not those of its page" in found["red_ball"]


def test_published_libraries_cannot_be_changed(out, solids):
    opened = latentscenes.open_library(out, device="cpu")
    changes = [
        lambda: opened.remove("a chair"),
        lambda: opened.rename("a chair", "x"),
        lambda: opened.tag("a chair", color="red"),
        lambda: opened.add("x", np.zeros((1, 32, 32, 3)), orbit(1)),
        opened.compact,
        lambda: opened.repack("int4"),
    ]
    for change in changes:
        with pytest.raises(UserError, match="a published library is for reading"):
            change()


def test_scenes_are_copied_into_a_library_of_ones_own(library, out, tmp_path):
    with serving(out) as server, latentscenes.open_library(server.address, device="cpu") as opened:
        assert opened.export(["a chair", "red_ball"], tmp_path / "own") == 2
        assert opened.export(library.index.names(), tmp_path / "own") == 4
    own = LibraryFolder.open(tmp_path / "own")
    ours, theirs = library.index.places(), own.index.places()
    assert {name: place.checksum for name, place in ours.items()} == {
        name: place.checksum for name, place in theirs.items()
    }
    assert own.checksums["shared.safetensors"] == library.checksums["shared.safetensors"]


def test_exports_and_viewer_read_addresses(library, out):
    with serving(out) as server:
        learned = SceneSet.open_all(server.address)
        ours = SceneSet.open_all(library.path)
        assert learned.names == ours.names and learned.tags("a chair")["number"] == 0
        assert torch.equal(learned.planes("a chair").texels, ours.planes("a chair").texels)
        with pytest.raises(UserError, match="names no datasets"):
            SceneSet.open(server.address)
        request = ViewRequest("a chair", orbit(1), (40, 40))
        frames = [
            Painter(opened).draw(request, 32).picture
            for opened in (
                latentscenes.Library(library),
                latentscenes.open_library(server.address, device="cpu"),
            )
        ]
        assert np.array_equal(*frames)


def test_commands_read_addresses(library, out, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["latentscenes", *words])
        main()
        return "".join(capsys.readouterr())

    with serving(out) as server:
        assert "6 of 6 scenes" in run("library", "list", server.address)
        told = [json.loads(line) for line in run("library", "list", server.address, "--as-json").splitlines()]
        assert [one["name"] for one in told][:2] == ["red_ball", "green_box"]
        assert "scenes         6" in run("library", "show", server.address)
        assert "tag category" in run("library", "show", f"{server.address}/published.json", "a chair")
        assert f"{server.address}: 6 scenes, all intact" in run("library", "verify", server.address)
        assert "red_ball" in run("search", server.address, "a chair")
        pictures = []
        for place in (server.address, str(library.path)):
            pictures.append(tmp_path / f"{len(pictures)}.png")
            scene = ("--scene", "a chair", "--frames", "2", "--out", str(pictures[-1]))
            run("render", "--run", place, *scene)
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
        with pytest.raises(SystemExit):
            run("library", "remove", server.address, "a chair")
        assert "for reading" in capsys.readouterr().err


def test_addresses_are_told_from_paths():
    assert address_of("https://example.org/cars/") == "https://example.org/cars"
    assert address_of("http:/example.org/cars/published.json") == "http://example.org/cars"
    assert address_of("s3://bucket/cars").name == "cars" and address_of("gs://bucket") == "gs://bucket"
    assert [address_of(path) for path in ("cars", "./https", "file:///etc", "ftp://x/y", "https:/")] == [
        None
    ] * 5
