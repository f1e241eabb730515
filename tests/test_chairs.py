"""Made chairs: reproducible, different from each other, standing like chairs; and the bars they are built of."""

import numpy as np
import pytest
import torch

from latentscenes.cameras import orbit
from latentscenes.datasets.embree import Caster, ViewOptions
from latentscenes.datasets.shapes import make_car, make_shapes
from latentscenes.datasets.shapes_bars import Finish, bar, both, cloth, curve, cushion, wood
from latentscenes.datasets.shapes_chairs import KINDS, make_chair
from latentscenes.errors import UserError
from latentscenes.views import Views

WHITE = Finish((1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def chairs():
    return {(kind, index): make_chair(index, seed=3, kind=kind) for kind in KINDS for index in range(3)}


def volume(soup):
    """By the divergence theorem, with the sides that the stored normals call outside."""
    a, b, c = soup.corners.astype(float).transpose(1, 0, 2)
    area = np.cross(b - a, c - a) / 2
    area *= np.where((area * soup.normals.mean(1)).sum(-1, keepdims=True) < 0, -1, 1)
    return float((area * (a + b + c) / 3).sum() / 3)


# Bars


@pytest.mark.parametrize("ends", [((0, 0, 0), (0, 0, 0.8)), ((-0.3, 0.1, 0.2), (0.5, 0.1, 0.2)), ((0, 0.4, 0), (0, -0.4, 0))])
def test_a_straight_bar_holds_the_volume_of_its_section_times_its_length(ends):
    assert volume(bar(ends, (0.1, 0.03), WHITE)) == pytest.approx(0.2 * 0.06 * 0.8, rel=1e-4)
    twenty = 20 / 2 * np.sin(2 * np.pi / 20)  # area of a regular polygon of 20 corners, for π
    assert volume(bar(ends, 0.05, WHITE, round=True)) == pytest.approx(twenty * 0.05**2 * 0.8, rel=1e-4)


def test_a_tapered_bar_is_a_frustum():
    small, large = 0.06**2 * 4, 0.1**2 * 4
    frustum = (small + large + np.sqrt(small * large)) / 3
    assert volume(bar([(0, 0, 0), (0, 0, 1)], 0.1, WHITE, taper=0.6)) == pytest.approx(frustum, rel=0.01)


def test_the_width_of_a_bar_is_level_or_upright_along_y():
    def sides(soup):
        return soup.bounds[1] - soup.bounds[0]

    assert np.allclose(sides(bar([(0, 0, 0), (0, 0, 1)], (0.2, 0.1), WHITE)), [0.2, 0.4, 1])
    assert np.allclose(sides(bar([(0, 0, 0), (1, 0, 0)], (0.2, 0.1), WHITE)), [1, 0.4, 0.2])
    assert np.allclose(sides(bar([(0, 0, 0), (0, 1, 0)], (0.2, 0.1), WHITE)), [0.2, 1, 0.4])


def test_a_dish_raises_the_sides_of_a_level_board():
    flat, dished = (bar([(0, 0, 0), (1, 0, 0)], (0.2, 0.01), WHITE, dish=dish) for dish in (0.0, 0.05))
    assert flat.bounds[1, 2] == pytest.approx(0.01) and dished.bounds[1, 2] == pytest.approx(0.06)
    assert dished.bounds[0, 2] == pytest.approx(-0.01)


def test_a_curve_is_the_parabola_of_its_three_points():
    points = curve([(0, 0, 0), (1, 0, 1), (2, 0, 0)], 8)
    assert np.allclose(points[:, 2], points[:, 0] * (2 - points[:, 0]) / 2)


def test_normals_of_a_cushion_point_outward_wherever_it_lies():
    rng = np.random.default_rng(0)
    for _ in range(10):
        center, half = rng.uniform(-1, 1, 3), rng.uniform(0.05, 0.4, 3)
        soup = cushion(tuple(center), tuple(half), cloth(rng), 4.0)
        assert ((soup.corners - center) * soup.normals).sum(-1).min() > -1e-6
        assert np.allclose(soup.bounds, [center - half, center + half], atol=1e-5)


def test_mirror_images_lie_across_the_middle_plane():
    one, other = both(bar([(0, 0.3, 0), (0.1, 0.5, 1)], 0.05, WHITE))
    assert np.allclose(other.bounds[:, 1], -one.bounds[::-1, 1]) and np.allclose(other.bounds[:, [0, 2]], one.bounds[:, [0, 2]])
    assert volume(one) == pytest.approx(volume(other), rel=1e-6)


def test_grain_repeats_without_a_seam():
    picture = wood(np.random.default_rng(1)).picture.astype(int)
    for axis in (0, 1):
        seam = np.abs(np.diff(picture, axis=axis, append=picture.take([0], axis))).max((1 - axis, 2))
        assert seam[-1] <= seam[:-1].max()


# Chairs


def test_every_chair_is_centred_with_diagonal_one(chairs):
    for key, soup in chairs.items():
        low, high = soup.bounds
        assert np.allclose(low + high, 0, atol=1e-5) and np.linalg.norm(high - low) == pytest.approx(1, abs=1e-4), key
        assert (soup.colors >= 0).all() and (soup.colors <= 1).all() and np.isfinite(soup.normals).all(), key


def test_chairs_stand_on_feet_spread_around_their_middle(chairs):
    for key, soup in chairs.items():
        points = soup.corners.reshape(-1, 3)
        feet = points[points[:, 2] < soup.bounds[0, 2] + 0.02]
        assert (feet.min(0)[:2] < -0.05).all() and (feet.max(0)[:2] > 0.05).all(), key


def test_backs_are_at_the_rear(chairs):
    for (kind, index), soup in chairs.items():
        if kind in ("wooden", "armchair", "easy", "shell", "swivel"):
            points = soup.corners.reshape(-1, 3)
            top = points[points[:, 2] > soup.bounds[1, 2] - 0.06]
            assert top[:, 0].mean() < -0.05, (kind, index)


def test_a_seat_can_be_sat_on(chairs):
    """Straight down in the middle there is something, below the middle of the back and well above the ground."""
    for key, soup in chairs.items():
        hit = Caster(soup).scene.run(np.array([[0.02, 0.001, 2.0]], np.float32), np.array([[0, 0, -1.0]], np.float32), output=True)
        assert hit["primID"][0] >= 0, key
        assert 2.0 - hit["tfar"][0] > soup.bounds[0, 2] + 0.12, key


def test_pictures_show_a_chair_and_not_all_the_same(chairs):
    seen = []
    for key, soup in chairs.items():
        rgb, alpha = Caster(soup).render(orbit(2, elevation=0.4), 32, samples=2)
        covered = (alpha > 128).mean((1, 2))
        assert (covered > 0.04).all() and (covered < 0.6).all(), key
        assert rgb[alpha > 250].std() > 4, key
        seen.append(rgb.astype(int))
    for first in range(len(seen)):
        for second in range(first):
            assert np.abs(seen[first] - seen[second]).mean() > 1


def test_seeds_reproduce_bit_for_bit_and_differ():
    one, again, other, reseeded = make_chair(5), make_chair(5), make_chair(6), make_chair(5, seed=1)
    for name in ("corners", "normals", "uv", "colors", "texture", "cutoff"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert all(np.array_equal(a, b) for a, b in zip(one.textures, again.textures))
    for different in (other, reseeded, make_car(5)):
        assert one.corners.shape != different.corners.shape or not np.array_equal(one.corners, different.corners)


def test_two_of_a_kind_differ_in_shape():
    for kind in KINDS:
        sides = [np.diff(make_chair(number, kind=kind).bounds, axis=0)[0] for number in range(3)]
        assert min(np.abs(sides[a] - sides[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.005, kind


def test_a_dataset_of_chairs_has_splits_a_box_and_does_not_depend_on_its_length(tmp_path):
    options = ViewOptions(views=3, size=24, held_out=1, samples=1)
    make_shapes(tmp_path / "chairs", options, train=2, new=1, kind="chair")
    views = Views.open(tmp_path / "chairs")
    assert [(scene.name, scene.split) for scene in views.scenes] == [
        ("chair_0000", "train"), ("chair_0001", "train"), ("chair_0002", "new"),
    ]  # fmt: skip
    corners = [make_chair(number).corners.reshape(-1, 3) for number in range(3)]
    inside = np.abs(np.concatenate(corners) - np.array(views.box.center)) / np.array(views.box.half)
    assert inside.max() <= 1 and views.alpha is not None
    make_shapes(tmp_path / "fewer", options, train=1, new=0, kind="chair")
    fewer = Views.open(tmp_path / "fewer")
    assert np.array_equal(fewer.rgb, views.rgb[:3]) and torch.equal(fewer.cameras.cam2world, views.cameras.cam2world[:3])


def test_no_chairs_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one chair"):
        make_shapes(tmp_path / "none", train=0, new=0, kind="chair")
