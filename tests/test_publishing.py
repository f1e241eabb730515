"""Libraries written as static files: their content, what a later publication adds, kills, foreign folders."""

import hashlib
import io
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from publications import add, made_library
from safetensors.torch import load, load_file

import latentscenes
from latentscenes.core.errors import UserError
from latentscenes.storage.joining import join
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import export_model
from latentscenes.storage.published import publishing
from latentscenes.storage.published.format import (
    DESCRIPTION,
    PublishedFile,
    bucket_count,
    bucket_of,
    check_description,
    files_of,
    unpacked_json,
)
from latentscenes.storage.published.parts import TagCounts
from latentscenes.storage.published.publishing import publish
from latentscenes.storage.published.targets import LOCK, BucketTarget, FolderTarget, open_target
from latentscenes.storage.quantize import payload_checksum


@pytest.fixture(scope="module")
def made(tmp_path_factory, solids):
    """A library of four solids with random parameters."""
    return made_library(tmp_path_factory.mktemp("published"), solids)


@pytest.fixture
def library(made, tmp_path) -> LibraryFolder:
    opened = LibraryFolder.open(made)
    copied = tmp_path / "library"
    latentscenes.Library(opened).export(opened.index.names(), copied)
    return LibraryFolder.open(copied)


def described(folder) -> dict:
    return check_description(json.loads((folder / DESCRIPTION).read_text()), str(folder))


def contents(folder) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in (DESCRIPTION, LOCK)
    }


def stored_scenes(folder) -> dict[str, bytes]:
    """Every scene of a published library, found by its page, after a comparison of all checksums."""
    about, found = described(folder), {}
    for file in files_of(about):
        content = (folder / file.file).read_bytes()
        assert len(content) == file.bytes and hashlib.sha256(content).hexdigest() == file.sha256
        assert file.sha256.startswith(file.file.split("/")[-1].split(".")[0])
    for number, file in enumerate(about["pages"]):
        page = unpacked_json((folder / file.file).read_bytes())
        weights = np.fromfile(folder / about["weights"][number].file, "<f4").reshape(len(page["name"]), -1)
        for row, name in enumerate(page["name"]):
            pack_file = (folder / about["packs"][page["pack"][row]].file).read_bytes()
            begin = page["offset"][row]
            content = pack_file[begin : begin + page["bytes"][row]]
            assert hashlib.sha256(content).hexdigest() == page["sha256"][row] and begin % 8 == 0
            payload = load(content)
            assert np.array_equal(payload["weights"].numpy(), weights[row])
            assert payload_checksum(payload) == page["payload"][row]
            found[name] = content
            bucket = about["names"][bucket_of(name, len(about["names"]))]
            entry = unpacked_json((folder / bucket.file).read_bytes())[name]
            assert entry[0] == number * about["page_size"] + row
            assert entry[1:] == [page[key][row] for key in publishing.ENTRY]
    assert len(found) == about["scenes"]
    return found


def test_all_scenes_are_in_it_with_metadata_and_model(library, tmp_path):
    add(library, "a chair", "été / 🚗")
    done = publish(library, open_target(str(tmp_path / "out")))
    found, about = stored_scenes(tmp_path / "out"), described(tmp_path / "out")
    assert done.scenes == 6 and list(found) == library.index.names()
    for name, content in found.items():
        ours, theirs = library.payload(name), load(content)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    page = unpacked_json((tmp_path / "out" / about["pages"][0].file).read_bytes())
    info = asdict(library.index.info("a chair"))
    assert page["psnr"][4] == info["psnr"] and page["stored"][4] == info["bytes"]
    assert page["tags"][4] == {"category": "Box", "number": 0, "odd": None}
    assert not {"dataset", "split", "source"} & page.keys()
    assert about["tags"] == {"category": {"Box": 2}, "number": {"0": 1, "1": 1}, "odd": {"inf": 2}}
    assert about["library"]["parent"] == "run" and str(tmp_path.parent) not in json.dumps(about["library"])
    exact = (tmp_path / "out" / about["model"].file).read_bytes()
    assert exact == library.shared_file.read_bytes()
    web, shared = load_file(tmp_path / "out" / about["web_model"].file), load_file(library.shared_file)
    assert web["bases"].dtype == torch.int8 and web["field.out.weight"].dtype == torch.float16
    step = web["bases.scale"][:, :, None, None]
    assert ((web["bases"] * step - shared["bases"]).abs() <= 0.501 * step).all()
    assert not any(name.startswith("codec.encoder") for name in web)
    assert about["render"]["bases"] == 3 and about["render"]["codec"]["downsampling"] == 4


def test_thumbnails_lie_in_cells_of_atlases(library, tmp_path):
    add(library, *(f"box {number}" for number in range(100)))
    publish(library, open_target(str(tmp_path / "out")))
    about = described(tmp_path / "out")
    page = unpacked_json((tmp_path / "out" / about["pages"][0].file).read_bytes())
    assert (
        page["atlas"][:5] == [0] * 5 and page["atlas"][-4:] == [1] * 4 and page["cell"][-4:] == [0, 1, 2, 3]
    )
    sheet = np.asarray(Image.open(tmp_path / "out" / about["atlases"][0].file).convert("RGBA")).astype(int)
    assert sheet.shape == (960, 960, 4)
    cell = sheet[:96, 96 * 4 : 96 * 5]  # "box 0": 40 x 30, in the middle
    assert np.abs(cell[35:60, 30:65] - [10, 200, 30, 255]).max() < 12 and cell[:30].max() < 12
    ours = np.asarray(Image.open(io.BytesIO(library.index.thumbnail("red_ball"))).convert("RGBA"))
    height, width = ours.shape[:2]
    cell = sheet[(96 - height) // 2 :, (96 - width) // 2 :][:height, :width]
    assert np.abs(cell[..., 3] - ours[..., 3].astype(int)).mean() < 3


def test_many_atlases_lie_in_several_folders(library, tmp_path, monkeypatch):
    """A million scenes have 10,000 atlases."""
    add(library, *(f"box {number}" for number in range(100)))
    monkeypatch.setattr(publishing, "FLAT", 1)
    publish(library, open_target(str(tmp_path / "out")))
    flat, inner = (file.file for file in described(tmp_path / "out")["atlases"])
    assert flat.count("/") == 1
    assert inner.count("/") == 2 and inner.split("/")[1] == inner.split("/")[2][:2]
    opened = latentscenes.open_library(tmp_path / "out", device="cpu")
    assert Image.open(io.BytesIO(opened.thumbnail("box 99"))).size == (96, 96)
    written = publish(library, open_target(str(tmp_path / "out")))
    assert (written.files, written.removed) == (1, 0)  # only the description


def test_the_same_library_gives_the_same_bytes(library, tmp_path):
    for out in ("one", "two"):
        publish(library, open_target(str(tmp_path / out)))
    before = contents(tmp_path / "one")
    again = publish(library, open_target(str(tmp_path / "one")))
    assert before == contents(tmp_path / "one") == contents(tmp_path / "two") and again.files == 1
    one, two = (json.loads((tmp_path / out / DESCRIPTION).read_text()) for out in ("one", "two"))
    changing = {"made", "checksum"}
    assert {key: one[key] for key in one.keys() - changing} == {
        key: two[key] for key in two.keys() - changing
    }


def test_a_later_publication_adds_only_what_is_new(library, tmp_path):
    out = tmp_path / "out"
    publish(library, open_target(str(out)))
    first, old = contents(out), described(out)
    add(library, "a chair")
    done = publish(library, open_target(str(out)))
    second = contents(out)
    assert list(stored_scenes(out)) == library.index.names() and first.items() <= second.items()
    assert done.removed == 0 and described(out)["packs"][0] == old["packs"][0]
    assert len(second.keys() - first.keys()) == 5  # pack, atlas, page, weights, bucket
    library.remove(["red_ball"])
    done = publish(library, open_target(str(out)))
    third = contents(out)
    assert described(out)["packs"][:2] == described(out)["packs"] and len(described(out)["packs"]) == 2
    assert done.removed == 3 and not {old["pages"][0].file, old["names"][0].file} & third.keys()
    assert {file.file for file in old["packs"]} < third.keys() and "red_ball" not in stored_scenes(out)


def test_mostly_dead_packs_and_many_small_ones_are_written_anew(library, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "PACK_BYTES", 3000)  # two scenes each
    out = tmp_path / "out"
    publish(library, open_target(str(out)))
    assert len(described(out)["packs"]) == 2
    library.remove(["red_ball", "green_box", "blue_egg"])
    publish(library, open_target(str(out)))
    stored_scenes(out)
    assert len(described(out)["packs"]) == 1 and described(out)["scenes"] == 1
    monkeypatch.setattr(publishing, "PACK_BYTES", 1 << 20)
    monkeypatch.setattr(publishing, "MOST_SMALL", 4)
    for number in range(4):
        add(library, f"box {number}", seed=number)
        publish(library, open_target(str(out)))
    assert len(described(out)["packs"]) < 4 and list(stored_scenes(out)) == library.index.names()
    publish(library, open_target(str(out)))
    publish(library, open_target(str(out)))
    assert {file.file for file in files_of(described(out))} == contents(out).keys()


class Killed(BaseException):
    pass


class DyingTarget(FolderTarget):
    """Dies at a write, in the middle of the file."""

    left = 0

    def write(self, name, content):
        if self.left == 0:
            file = self.path / f"{name}.partial-elsewhere-1"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content[: len(content) // 2])
            raise Killed
        self.left -= 1
        super().write(name, content)


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_a_killed_publication_is_taken_up(library, tmp_path, before):
    if before:
        publish(library, FolderTarget(tmp_path / "out"))
        publish(library, FolderTarget(tmp_path / "clean"))
        add(library, "a chair")
    publish(library, FolderTarget(tmp_path / "clean"))
    kills = 0
    while True:
        dying = DyingTarget(tmp_path / "out")
        dying.left = 1
        try:
            publish(library, dying)
            break
        except Killed:
            kills += 1
        if before:
            assert "a chair" not in stored_scenes(tmp_path / "out")
        else:
            assert not (tmp_path / "out" / DESCRIPTION).exists()
    assert kills == (5 if before else 8)  # a file written by each
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_lost_and_cut_files_are_written_again(library, tmp_path):
    out = tmp_path / "out"
    publish(library, FolderTarget(out))
    before, about = contents(out), described(out)
    (out / about["packs"][0].file).unlink()
    (out / about["atlases"][0].file).write_bytes(b"cut")
    (out / about["pages"][0].file).write_bytes(b"")
    publish(library, FolderTarget(out))
    assert contents(out) == before


def test_what_is_foreign_is_refused_or_left_alone(library, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no published library, but 'thesis.tex'"):
        publish(library, open_target(str(foreign)))
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"]
    out = tmp_path / "out"
    publish(library, open_target(str(out)))
    (out / "index.html").write_text("a page beside it")
    publish(library, open_target(str(out)))
    assert (out / "index.html").exists()
    (out / "packs" / "link").symlink_to(foreign)
    with pytest.raises(UserError, match="symbolic link"):
        publish(library, open_target(str(out)))
    (out / "packs" / "link").unlink()
    (out / DESCRIPTION).write_text("{")
    with pytest.raises(UserError, match="published.json: cannot be read"):
        publish(library, open_target(str(out)))
    with pytest.raises(UserError, match="Give a folder, s3"):
        open_target("https://example.org/library")


def test_another_library_does_not_take_the_place_of_one(library, tmp_path):
    """Not even one of the same model; but a copy of the same library does, and one of an earlier version."""
    out, other = open_target(str(tmp_path / "out")), tmp_path / "other"
    publish(library, out)
    before = contents(tmp_path / "out") | {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_bytes()}
    latentscenes.Library(library).export(library.index.names()[:1], other)
    with pytest.raises(UserError, match=r"out: another library is published there \(4 scenes, .*--replace"):
        publish(LibraryFolder.open(other), out)
    assert contents(tmp_path / "out") | {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_bytes()} == before
    shutil.copytree(library.path, tmp_path / "copy")
    assert publish(LibraryFolder.open(tmp_path / "copy"), out).files == 1
    assert publish(LibraryFolder.open(other), out, replace=True).scenes == 1
    assert list(stored_scenes(tmp_path / "out")) == library.index.names()[:1]
    about = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    del about["identity"], about["checksum"]
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(about))
    assert publish(library, out).scenes == 4
    about["model"]["sha256"] = about["model"]["sha256"][::-1]
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(about))
    with pytest.raises(UserError, match="another library is published there"):
        publish(library, out)


def test_nothing_is_made_within_a_library(library, tmp_path):
    before = sorted(file.name for file in library.path.rglob("*"))
    opened, inner = latentscenes.Library(library), library.path / "a" / "b"
    for make in (
        lambda: publish(library, open_target(str(inner))),
        lambda: opened.export(library.index.names(), inner),
        lambda: export_model(library, inner),
        lambda: join(inner, [library.path]),
    ):
        with pytest.raises(UserError, match=f"{inner}: lies in the library {library.path}"):
            make()
    assert sorted(file.name for file in library.path.rglob("*")) == before


def test_a_damaged_scene_is_not_published(library, tmp_path):
    shard = next((library.path / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read .its bytes have changed.*library verify"):
        publish(LibraryFolder.open(library.path), open_target(str(tmp_path / "out")))
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_buckets_hold_the_same_files(library, tmp_path):
    store = pytest.importorskip("obstore", reason="obstore is not installed").store.MemoryStore()
    target = BucketTarget("s3://somewhere/cars", store)
    publish(library, target)
    publish(library, FolderTarget(tmp_path / "out"))
    assert target.sizes() == {name: len(content) for name, content in contents(tmp_path / "out").items()}
    assert all(target.read(name) == content for name, content in contents(tmp_path / "out").items())
    old = json.loads(target.read(DESCRIPTION))
    add(library, "a chair")
    for _ in range(2):
        publish(library, target)
    assert json.loads(target.read(DESCRIPTION))["scenes"] == 5
    assert target.read(old["pages"][0]["file"]) is None
    assert target.read(old["packs"][0]["file"]) is not None
    other = BucketTarget("s3://somewhere/else", pytest.importorskip("obstore").store.MemoryStore())
    other.write("thesis.tex", b"years of work")
    with pytest.raises(UserError, match="s3://somewhere/else: holds no published library"):
        publish(library, other)


def test_names_find_their_buckets():
    """Values of FNV-1a from RFC 9923."""
    assert [bucket_of(name, 1 << 32) for name in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
    assert [bucket_count(scenes) for scenes in (0, 1, 256, 257, 1000, 100_000)] == [1, 1, 1, 2, 4, 512]


def test_tags_are_counted_within_limits():
    counts = TagCounts()
    for number in range(6000):
        counts.add({"name": f"n{number}", "kind": ["a", "b"] if number % 2 else "a", "notes": {"x": 1}})
    assert counts.most_frequent() == {"kind": {"a": 6000, "b": 3000}}


def test_descriptions_are_checked():
    for content in (None, [], {"format": "other"}, {"format": "latentscenes published 9"}):
        with pytest.raises(UserError, match="^here: "):
            check_description(content, "here")
    for entry in ({"file": "../../etc/passwd"}, {"file": "packs/00/x.pack"}, 3):
        with pytest.raises(UserError, match="names no published file"):
            PublishedFile.read(entry, "here")
