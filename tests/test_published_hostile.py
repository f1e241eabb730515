"""Published libraries of strangers: mutated pages and descriptions with right checksums, slow and endless
servers, links, publications that meet. Each ends in one message."""

import gzip
import hashlib
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from publications import Parts, add, made_library, serving
from safetensors.torch import load, save
from waiting import wait_for

import latentscenes
from latentscenes.cli.listing import library_list, library_show
from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, object_checksum
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published import addresses
from latentscenes.storage.published.addresses import BucketFiles
from latentscenes.storage.published.format import DESCRIPTION, PublishedFile, unpacked_json
from latentscenes.storage.published.publishing import publish
from latentscenes.storage.published.reader import PublishedLibrary
from latentscenes.storage.published.targets import BucketTarget, FolderTarget

ODD = (
    None, True, -1, 0, 1.5, 1e300, float("inf"), 10**18, 10**400, "", "../../etc/passwd", "packs/00/../x",
    "é" * 99, [], {}, [[[[]]]], {"file": "/etc/passwd", "bytes": 9, "sha256": "0" * 64}, "\x1b[31m", "a\0b",
    [1] * 9, -(2**70),
)  # fmt: skip
"""Values that are put in place of others."""


@pytest.fixture(scope="module")
def library(tmp_path_factory, solids) -> LibraryFolder:
    folder = LibraryFolder.open(made_library(tmp_path_factory.mktemp("library"), solids))
    add(folder, "a chair", "sofa")
    return folder


@pytest.fixture
def out(library, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    publish(library, FolderTarget(tmp_path / "out"))
    return tmp_path / "out"


def seal(out: Path, about: dict[str, Any]) -> None:
    """Writes a description with its right checksum."""
    about[CHECKSUM] = object_checksum({key: value for key, value in about.items() if key != CHECKSUM})
    (out / DESCRIPTION).write_text(json.dumps(about))


def put(out: Path, about: dict[str, Any], entry: str, content: bytes) -> None:
    """Replaces the first file of a kind."""
    file = PublishedFile.of({"pages": "index", "atlases": "thumbnails"}.get(entry, entry), content)
    (out / file.file).parent.mkdir(parents=True, exist_ok=True)
    (out / file.file).write_bytes(content)
    about[entry][0] = vars(file)


def change(value: Any, draw: random.Random) -> Any:
    """Returns a JSON value with one part, at a random depth, replaced or left out."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    found = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    if draw.random() < 0.1:
        del found[key]
    else:
        found[key] = change(value[key], draw)
    return found


def use(place: Path) -> None:
    """Does all that readers do."""
    with latentscenes.open_library(place, device="cpu") as opened:
        index = opened.folder.index
        steps = (
            lambda: opened.size, index.totals, lambda: index.first(3), opened.infos, index.descriptions,
            index.places, lambda: opened.thumbnail("a chair"), lambda: opened["a chair"].metadata,
            lambda: opened["a chair"].rows,
            lambda: opened.nearest("sofa", 3), lambda: opened.names, opened.verify, lambda: opened.model,
            lambda: repr(opened), lambda: opened.orbit(1), lambda: library_list(place),
            lambda: library_show(place), lambda: library_show(place, "a chair"),
        )  # fmt: skip
        for step in steps:
            try:
                step()
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_descriptions_pages_and_buckets(out, seed):
    draw, text = random.Random(seed), (out / DESCRIPTION).read_text()
    for _ in range(20):
        about, kind = json.loads(text), draw.choice(("pages", "names", "description", "description"))
        if kind == "description":
            about = change(about, draw)
            if not isinstance(about, dict):
                about = {"format": about}
        else:
            content = unpacked_json((out / about[kind][0]["file"]).read_bytes())
            put(out, about, kind, gzip.compress(json.dumps(change(content, draw)).encode(), 1))
        seal(out, about)
        try:
            use(out)
        except UserError as error:
            assert "\n" not in str(error)


def test_huge_counts_and_foreign_names_are_refused_before_anything_is_read(out):
    text = (out / DESCRIPTION).read_text()
    changes = [{"scenes": 10**400}, {"scenes": 10**15}, {"page_size": 0}, {"thumbnail": 10**6}, {"bytes": -1}]
    changes += [{"names": []}, {"psnr": 10**400}, {"library": []}, {"pages": {"0": 1}}]
    for one in changes:
        seal(out, json.loads(text) | one)
        with pytest.raises(UserError, match="published.json: damaged. Publish the library again"):
            latentscenes.open_library(out, device="cpu")
    for file in ("../../etc/passwd", "/etc/passwd", "packs/00/../../x", "model/x.safetensors\n"):
        seal(out, json.loads(text) | {"model": {"file": file, "bytes": 9, "sha256": "0" * 64}})
        with pytest.raises(UserError, match="names no published file"):
            latentscenes.open_library(out, device="cpu")


def test_large_files_are_refused_before_they_are_read(out):
    about = json.loads((out / DESCRIPTION).read_text())
    about["packs"][0]["bytes"] = about["pages"][0]["bytes"] = 1 << 40
    seal(out, about)
    opened = latentscenes.open_library(out, device="cpu")
    with pytest.raises(UserError, match="pack: has 1099511627776 bytes; the limit is"):
        assert opened["red_ball"].rows
    with pytest.raises(UserError, match="has more than 64 MiB, the limit"):
        assert opened.names


def test_pages_that_unfold_without_end_are_refused(out):
    about = json.loads((out / DESCRIPTION).read_text())
    put(out, about, "pages", gzip.compress(b" " * (65 << 20), 9))
    seal(out, about)
    with pytest.raises(UserError, match="cannot be read .it is cut, or unfolds to more than 64 MiB"):
        assert latentscenes.open_library(out, device="cpu").names


@pytest.mark.parametrize("kind", ["shape", "scale", "names", "noise"])
def test_scenes_that_do_not_fit_the_model_are_refused(out, kind):
    about = json.loads((out / DESCRIPTION).read_text())
    bucket = unpacked_json((out / about["names"][0]["file"]).read_bytes())
    _, _, offset, size, *_ = bucket["red_ball"]
    payload = load((out / about["packs"][0]["file"]).read_bytes()[offset : offset + size])
    content = {
        "shape": lambda: save(payload | {"weights": payload["weights"].repeat(9)}),
        "scale": lambda: save(payload | {"micro.scale": payload["micro.scale"][:1]}),
        "names": lambda: save({f"x{name}": value for name, value in payload.items()}),
        "noise": lambda: random.Random(0).randbytes(size),
    }[kind]()
    put(out, about, "packs", content)
    bucket["red_ball"] = [0, 0, 0, len(content), -1, -1, hashlib.sha256(content).hexdigest()]
    put(out, about, "names", gzip.compress(json.dumps(bucket).encode()))
    seal(out, about)
    with pytest.raises(UserError, match="scene 'red_ball' cannot be read"):
        assert latentscenes.open_library(out, device="cpu")["red_ball"].rows


class Odd(Parts):
    """A server that does with files of the library what `server.does` says."""

    def answer(self) -> None:
        does = self.server.does
        if does == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif does == "circle":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            if does == "short":
                self.send_header("Content-Length", "1000")
            self.send_header("Connection", "close")
            self.end_headers()
            self._body(does)
            self.close_connection = True

    def _body(self, does: str) -> None:
        if does == "hang":
            self.server.over.wait(5)
        try:
            while does in ("drip", "endless") and not self.server.over.wait(0.02 if does == "drip" else 0):
                self.wfile.write(b" " if does == "drip" else bytes(1 << 20))
        except OSError:
            pass  # the reader has gone


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("hang", "cannot be fetched .*timed out"),
        ("drip", "cannot be fetched .only .* bytes in"),
        ("endless", "has more than .* bytes, so it is damaged"),
        ("short", "cannot be fetched .IncompleteRead"),
        ("redirect", "cannot be fetched .HTTP 302.*not allowed"),
        ("circle", "cannot be fetched .HTTP 302.*infinite loop"),
    ],
)
def test_servers_that_hang_drip_or_never_end(out, monkeypatch, does, said):
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    monkeypatch.setattr(addresses, "SECONDS", 0.3)
    with serving(out, Odd) as server:
        server.does, server.over = does, threading.Event()
        with pytest.raises(UserError, match=f"^{server.address}/published.json: {said}") as caught:
            latentscenes.open_library(server.address, device="cpu")
        server.over.set()
    assert "\n" not in str(caught.value)


def test_links_and_fifos_in_a_published_folder(out, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    about = json.loads((out / DESCRIPTION).read_text())
    page, pack = (out / about[kind][0]["file"] for kind in ("pages", "packs"))
    page.unlink()
    page.symlink_to(secret)
    pack.unlink()
    os.mkfifo(pack)
    opened = latentscenes.open_library(out, device="cpu")
    with pytest.raises(UserError, match="damaged, its SHA-256 is not the one"):
        assert opened.names
    with pytest.raises(UserError, match="cannot be read"):
        assert opened["red_ball"].rows


def test_text_that_is_no_utf8_names_no_scene(out):
    assert "\udcff" not in latentscenes.open_library(out, device="cpu")


# Publications that meet


def test_a_second_publication_into_a_folder_waits(library, tmp_path, monkeypatch):
    out, inside, go, said = tmp_path / "out", threading.Event(), threading.Event(), []
    # Captured standard error loses what one thread writes while another reads it.
    monkeypatch.setattr("latentscenes.core.files.say", said.append)

    class Slow(FolderTarget):
        def write(self, name, content):
            inside.set()
            assert go.wait(400)  # the limit of `wait_for`: a busy machine runs threads slowly
            super().write(name, content)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(publish, LibraryFolder.open(library.path), Slow(out))
        wait_for(lambda: inside.is_set() or first.done())
        second = threads.submit(publish, LibraryFolder.open(library.path), FolderTarget(out))
        wait_for(lambda: said or second.done())
        assert not second.done()
        go.set()
        assert first.result().files > 5 and second.result().files == 1
    assert said == [f"{out}: another process is publishing into this folder; waiting for it …"]
    assert latentscenes.open_library(out, device="cpu").verify() == []


@pytest.mark.parametrize("late", [False, True], ids=["its files are removed", "its description is replaced"])
def test_publications_that_meet_in_a_bucket_are_told(library, tmp_path, late):
    store = pytest.importorskip("obstore", reason="obstore is not installed").store.MemoryStore()
    other = LibraryFolder.open(made_copy(library, tmp_path / "other"))

    class Met(BucketTarget):
        def write(self, name, content):
            if name == DESCRIPTION and not late:
                publish(other, BucketTarget(self.address, store))
            super().write(name, content)
            if name == DESCRIPTION and late:
                publish(other, BucketTarget(self.address, store), replace=True)

    with pytest.raises(UserError, match="^s3://some/cars: another process published there meanwhile"):
        publish(library, Met("s3://some/cars", store))
    publish(library, BucketTarget("s3://some/cars", store), replace=late)
    assert PublishedLibrary(BucketFiles("s3://some/cars", store)).verify() == []


def made_copy(library: LibraryFolder, path: Path) -> Path:
    """Copies two scenes, so that most of what is published of them differs."""
    latentscenes.Library(library).export(["a chair", "sofa"], path)
    return path


def test_damaged_pages_of_an_earlier_publication_are_made_anew(library, out):
    about = json.loads((out / DESCRIPTION).read_text())
    page = unpacked_json((out / about["pages"][0]["file"]).read_bytes())
    put(out, about, "pages", gzip.compress(json.dumps(page | {"pack": ["x"] * 6}).encode()))
    seal(out, about)
    publish(library, FolderTarget(out))
    assert latentscenes.open_library(out, device="cpu").verify() == []
