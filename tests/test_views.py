"""The packed dataset: what goes in comes out, and a broken or unfinished one is refused."""

import json

import numpy as np
import pytest
import torch

from latentscenes.core.cameras import Box, orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, spread
from latentscenes.data.writing import DatasetWriter

BOX = Box((0.0, 0.1, 0.2), (0.5, 0.6, 0.7))


def _write(path, alpha=True):
    random = np.random.default_rng(0)
    scenes = {}
    with DatasetWriter(path, size=(4, 6), alpha=alpha, origin="a test") as writer:
        for name, count, split in (("a", 3, "train"), ("b", 5, "new"), ("c", 2, "train")):
            images = random.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
            silhouettes = random.integers(0, 256, (count, 4, 6), dtype=np.uint8) if alpha else None
            cameras = orbit(count, distance=1.0 + count)
            writer.add(name, images, cameras, split, spread(count, 1), silhouettes)
            scenes[name] = (images, silhouettes, cameras)
        assert not path.exists()  # nothing under the final name before it is finished
        writer.finish(BOX)
    return scenes


@pytest.mark.parametrize("alpha", [True, False])
def test_what_is_written_is_read(tmp_path, alpha):
    written = _write(tmp_path / "set", alpha)
    views = PosedImages.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["a", "b", "c"]
    assert views.box == BOX and views.size == (4, 6) and views.origin == "a test"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]  # no debris
    for scene in views.scenes:
        images, silhouettes, cameras = written[scene.name]
        index = scene.views("all")
        assert torch.equal(views.images(index), torch.from_numpy(images).permute(0, 3, 1, 2))
        assert torch.equal(views.cameras[torch.tensor(index)].cam2world, cameras.cam2world)
        assert torch.equal(views.cameras[torch.tensor(index)].intrinsics, cameras.intrinsics)
        if alpha:
            assert np.array_equal(views.alpha[index], silhouettes)
        else:
            assert views.alpha is None


def test_held_out_views_and_splits(tmp_path):
    _write(tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    b = views.scenes[1]
    assert b.views("all") == [3, 4, 5, 6, 7] and b.views("held_out") == [5] and b.views("fit") == [3, 4, 6, 7]
    assert [scene.name for scene in views.select("train")] == ["a", "c"]
    assert [scene.name for scene in views.select("train", limit=1)] == ["a"]
    assert [scene.name for scene in views.select("new", names=["b"])] == ["b"]
    with pytest.raises(UserError, match="no scene 'b' in split 'train'"):
        views.select("train", names=["b"])


def test_spread_is_even_and_leaves_something():
    assert spread(10, 2) == (2, 7)
    assert spread(10, 0) == ()
    assert len(spread(250, 50)) == 50
    with pytest.raises(UserError, match="hold out fewer"):
        spread(4, 4)


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "set", (4, 4), False, "") as writer:
        writer.add("a", np.zeros((1, 4, 4, 3), np.uint8), orbit(1), "train", ())
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with DatasetWriter(tmp_path / "set", (4, 4), True, "") as writer:
        with pytest.raises(UserError, match="4x4 with 3 cameras"):
            writer.add("a", images, orbit(3), "train", (), np.zeros((2, 4, 4), np.uint8))
        with pytest.raises(UserError, match="silhouettes"):
            writer.add("a", images, orbit(2), "train", ())
        writer.add("a", images, orbit(2), "train", (), np.zeros((2, 4, 4), np.uint8))
        with pytest.raises(UserError, match="twice"):
            writer.add("a", images, orbit(2), "train", (), np.zeros((2, 4, 4), np.uint8))
    with (
        DatasetWriter(tmp_path / "none", (4, 4), False, "") as writer,
        pytest.raises(UserError, match="nothing to write"),
    ):
        writer.finish(BOX)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        DatasetWriter(tmp_path / "full", (4, 4), False, "")


@pytest.mark.parametrize("name", ["rgb.npy", "alpha.npy", "cameras.npy"])
def test_truncated_and_absent_arrays_are_named(tmp_path, name):
    _write(tmp_path / "set")
    array = tmp_path / "set" / name
    whole = array.read_bytes()
    array.write_bytes(whole[: len(whole) - 7])
    with pytest.raises(UserError, match=f"{name}.*truncated"):
        PosedImages.open(tmp_path / "set")
    array.write_bytes(b"")
    with pytest.raises(UserError, match=name):
        PosedImages.open(tmp_path / "set")
    np.save(array, np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=f"{name}.*views.json says"):
        PosedImages.open(tmp_path / "set")
    array.unlink()
    with pytest.raises(UserError, match=f"{name}: absent"):
        PosedImages.open(tmp_path / "set")


def test_broken_indices_are_named(tmp_path):
    with pytest.raises(UserError, match="no dataset here"):
        PosedImages.open(tmp_path)
    _write(tmp_path / "set")
    index = tmp_path / "set" / "views.json"
    meta = json.loads(index.read_text())
    index.write_text(json.dumps({**meta, "format": "latentscenes-views-9"}))
    with pytest.raises(UserError, match="this version reads"):
        PosedImages.open(tmp_path / "set")
    del meta["box"]
    index.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="views.json.*box"):
        PosedImages.open(tmp_path / "set")
    index.write_text('{"format": ')
    with pytest.raises(UserError, match="views.json: cannot be read"):
        PosedImages.open(tmp_path / "set")
