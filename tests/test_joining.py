"""Datasets joined: every view, camera, split and name as in the parts."""

import numpy as np
import pytest
import torch

from latentscenes.core.cameras import Box, orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, box_of
from latentscenes.data.writing import DatasetWriter, join


def dataset(path, prefix, counts, *, size=(6, 8), alpha=True, seed=0):
    """Noise; scene k has counts[k] views, every second scene is new, and its view k + 1 is held out."""
    rng = np.random.default_rng(seed)
    with DatasetWriter(path, size, alpha=alpha, origin=f"noise {prefix}") as writer:
        for k, count in enumerate(counts):
            images = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
            cameras = orbit(count, elevation=float(rng.uniform(0.1, 1)))
            silhouettes = rng.integers(0, 256, (count, *size), dtype=np.uint8) if alpha else None
            writer.add(f"{prefix}_{k}", images, cameras, ("train", "new")[k % 2], (k + 1,), silhouettes)
        writer.finish(Box((0.0, 0.0, 0.0), (0.5, 0.4, 0.3)))
    return path


def test_a_joined_dataset_equals_its_parts_view_by_view(tmp_path):
    counts = {"a": (3, 5), "b": (4, 3, 5), "c": (2,)}
    parts = [dataset(tmp_path / name, name, counts[name], seed=seed) for seed, name in enumerate(counts)]
    joined = join(parts, tmp_path / "all")
    expected = [(part, scene) for part in map(PosedImages.open, parts) for scene in part.scenes]
    assert [scene.name for scene in joined.scenes] == ["a_0", "a_1", "b_0", "b_1", "b_2", "c_0"]
    for ours, (part, scene) in zip(joined.scenes, expected, strict=True):
        assert (ours.count, ours.split, ours.held_out) == (scene.count, scene.split, scene.held_out)
        for one, other in zip(ours.views("all"), scene.views("all"), strict=True):
            assert np.array_equal(joined.rgb[one], part.rgb[other]) and np.array_equal(
                joined.alpha[one], part.alpha[other]
            )
            for array in ("cam2world", "intrinsics"):
                assert torch.equal(getattr(joined.cameras, array)[one], getattr(part.cameras, array)[other])
    assert len(joined.rgb) == 22 and [scene.name for scene in joined.select("new")] == ["a_1", "b_1"]
    assert joined.origin == "noise a; noise b; noise c"


def test_the_box_is_the_smallest_that_holds_all_boxes():
    one, other = Box((0.0, 0.1, 0.0), (0.5, 0.2, 0.3)), Box((0.2, 0.0, -0.1), (0.4, 0.4, 0.1))
    both = box_of([one, other])
    corners = torch.cat([one.corners(), other.corners()])
    assert torch.allclose(both.corners().amin(0), corners.amin(0)) and torch.allclose(
        both.corners().amax(0), corners.amax(0)
    )
    assert np.allclose(box_of([one]).center, one.center) and np.allclose(box_of([one]).half, one.half)


def test_silhouettes_are_left_out_where_a_part_has_none(tmp_path):
    parts = [dataset(tmp_path / "a", "a", (3,)), dataset(tmp_path / "b", "b", (3,), alpha=False)]
    joined = join(parts, tmp_path / "all")
    assert joined.alpha is None and not (tmp_path / "all" / "alpha.npy").exists()
    assert np.array_equal(joined.rgb[:3], PosedImages.open(parts[0]).rgb)


def test_what_cannot_be_joined_is_refused_and_nothing_is_left_behind(tmp_path):
    first, larger = dataset(tmp_path / "a", "a", (3,)), dataset(tmp_path / "b", "b", (3,), size=(8, 8))
    twin = dataset(tmp_path / "c", "a", (3,))
    for folders, message in (
        ([first, larger], "b: images of 8x8, but those of .*a are 8x6"),
        ([first, twin], "c: scene 'a_0' is also in .*a"),
        ([first, first], "scene 'a_0' is also in"),
        ([first], "two or more"),
        ([first, tmp_path / "nowhere"], "nowhere: no dataset here"),
    ):
        with pytest.raises(UserError, match=message):
            join(folders, tmp_path / "out")
    with pytest.raises(UserError, match="not an empty folder"):
        join([first, dataset(tmp_path / "d", "d", (3,))], twin)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]
