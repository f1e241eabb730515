"""Made cars: reproducible, different from each other, and shaped like cars."""

import dataclasses

import numpy as np
import pytest
import torch

from latentscenes.core.cameras import orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.raycast import OPAQUE, RayCaster, ViewOptions
from latentscenes.data.synthetic.body import KINDS, draw_car, loft
from latentscenes.data.synthetic.cars import blob, in_turn, make_car, make_cars


@pytest.fixture(scope="module")
def cars():
    return {kind: make_car(index, seed=1, kind=kind) for index, kind in enumerate(KINDS)}


def test_every_kind_lies_along_x_centred_with_diagonal_one(cars):
    for kind, soup in cars.items():
        low, high = soup.bounds
        assert np.allclose(low + high, 0, atol=1e-5) and np.linalg.norm(high - low) == pytest.approx(
            1, abs=1e-4
        ), kind
        length, width, height = high - low
        assert 1.8 < length / width < 3.2 and 0.15 < height / length < 0.6, kind


def test_a_car_is_nearly_the_same_from_left_and_right(cars):
    for kind, soup in cars.items():
        _, alpha = RayCaster(soup).render(orbit(4), 48, samples=2)  # front, left, rear, right
        left, right = alpha[1].astype(int), alpha[3, :, ::-1].astype(int)
        assert np.abs(left - right).mean() / max(left.mean(), 1) < 0.05, kind


def test_silhouettes_agree_with_projected_corners(cars):
    cameras = orbit(3, elevation=0.4)
    for kind in ("saloon", "van"):
        soup = cars[kind]
        opaque = soup.corners[soup.cutoff == OPAQUE].reshape(-1, 3)
        places, _ = cameras.project(torch.from_numpy(soup.corners.reshape(-1, 3)))
        _, alpha = RayCaster(soup).render(cameras, 64)
        assert len(opaque)
        for view in range(3):
            rows, columns = np.nonzero(alpha[view])
            extent = (places[view] * 64).numpy()
            assert np.allclose([columns.min(), rows.min()], np.floor(extent.min(0)), atol=1.01)
            assert np.allclose([columns.max(), rows.max()], np.floor(extent.max(0)), atol=1.01)


def test_seeds_reproduce_bit_for_bit_and_differ():
    one, again, other, reseeded = make_car(5), make_car(5), make_car(6), make_car(5, seed=1)
    for name in ("corners", "normals", "uv", "colors", "texture", "cutoff"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert all(np.array_equal(a, b) for a, b in zip(one.textures, again.textures))
    for different in (other, reseeded):
        assert one.corners.shape != different.corners.shape or not np.array_equal(
            one.corners, different.corners
        )


def test_bodies_are_symmetric_and_their_normals_point_outward():
    for index, kind in enumerate(KINDS):
        skin = loft(draw_car(np.random.default_rng(index), kind))
        mirrored = skin.points[:, ::-1] * [1, -1, 1]
        assert np.allclose(skin.points, mirrored) and np.isfinite(skin.normals).all()
        side = skin.normals[len(skin.points) // 2, -8]
        assert side[1] < -0.8, kind


def test_a_dataset_of_cars_has_splits_box_and_different_cars(tmp_path):
    options = ViewOptions(views=3, size=32, held_out=1, samples=1)
    make_cars(tmp_path / "cars", options, train=2, new=1)
    views = PosedImages.open(tmp_path / "cars")
    assert [scene.split for scene in views.scenes] == ["train", "train", "new"]
    assert all(len(scene.held_out) == 1 for scene in views.scenes) and views.alpha is not None
    half = np.array(views.box.half)
    assert (half < 0.52).all() and half[0] > half[1] > 0.1
    assert not np.array_equal(views.rgb[0], views.rgb[3])
    make_cars(tmp_path / "fewer", options, train=1, new=0)
    assert np.array_equal(
        PosedImages.open(tmp_path / "fewer").rgb, views.rgb[:3]
    )  # a car does not depend on its neighbors


def test_a_box_can_be_chosen_but_must_hold_every_object(tmp_path):
    options = ViewOptions(views=2, size=16, held_out=1, samples=1, box="0,0,0,0.49,0.25,0.3")
    make_cars(tmp_path / "cars", options, train=1, new=0)
    assert PosedImages.open(tmp_path / "cars").box.half == (0.49, 0.25, 0.3)
    with pytest.raises(UserError, match=r"--box 0.3: car_0000 reaches 0\.4\d+, .* would be cut off"):
        make_cars(tmp_path / "small", dataclasses.replace(options, box="0.3"), train=1, new=0)
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="give a half side above 0"):
        ViewOptions(box="wide")


def test_kinds_take_turns():
    for start in (0, len(KINDS)):
        assert {in_turn(KINDS, number, 7) for number in range(start, start + len(KINDS))} == set(KINDS)


def test_no_cars_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one car"):
        make_cars(tmp_path / "none", train=0, new=0)


def test_rounded_boxes_are_lit_from_outside():
    rng = np.random.default_rng(0)
    for _ in range(40):
        center, half = rng.uniform(-1, 1, 3), rng.uniform(0.02, 0.4, 3)
        soup = blob(tuple(center), tuple(half), (0.5, 0.5, 0.5), rng.uniform(2, 8), rng.uniform(-0.5, 0.5))
        assert ((soup.corners - center) * soup.normals).sum(-1).min() > 0
