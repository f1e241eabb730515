"""Objects turned, scaled and fitted: through all importers, by moving cameras."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from latentscenes.core.cameras import Box, Cameras, orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.options import ImportOptions, Placement, ViewOptions
from latentscenes.data.placing import fitting, place, rotation, rotation_of
from latentscenes.data.synthetic.cars import make_cars
from latentscenes.storage.pretrained import open_parent
from latentscenes.training import add, fit

POINTS = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.1, -0.1]])


def moved(points, turn, scale, shift):
    return scale * points @ torch.as_tensor(turn, dtype=torch.float32).T + torch.tensor(shift)


def test_moved_cameras_see_a_moved_world_as_before():
    cameras = orbit(5, elevation=0.3)
    turn, scale, shift = torch.from_numpy(rotation("z", "+y", 30.0)).float(), 0.7, (0.2, -0.1, 0.4)
    places, depth = cameras.placed(turn, scale, shift).project(moved(POINTS, turn, scale, shift))
    before, near = cameras.project(POINTS)
    assert torch.allclose(places, before, atol=1e-5) and torch.allclose(depth, scale * near, atol=1e-5)
    same = cameras.placed()
    assert torch.equal(same.cam2world, cameras.cam2world) and isinstance(same, Cameras)


def test_the_front_of_objects_turns_to_x():
    assert rotation("z", "+y", 0.0) @ [0, 1, 0] == pytest.approx([1, 0, 0], abs=1e-12)
    assert rotation("z", "-x", 90.0) @ [-1, 0, 0] == pytest.approx([0, 1, 0], abs=1e-12)
    with pytest.raises(UserError, match="points up or down"):
        rotation("z", "+z", 0.0)


def test_a_box_is_moved_into_another_until_it_just_fits():
    scale, shift = fitting(Box((1.0, 0.0, 0.0), (0.5, 0.2, 0.1)), Box((0.0, 0.0, 2.0), (0.4, 0.1, 0.2)))
    assert scale == 0.5 and shift == (-0.5, 0.0, 2.0)


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    path = tmp_path_factory.mktemp("placing") / "cars"
    make_cars(path, ViewOptions(views=8, size=32, held_out=2), train=2, new=0)
    return PosedImages.open(path)


def test_datasets_are_turned_and_scaled(cars, tmp_path):
    made = place(cars.path, tmp_path / "turned", Placement(turn=90.0, scale=0.5))
    assert np.array_equal(made.rgb, cars.rgb) and [s.name for s in made.scenes] == [
        s.name for s in cars.scenes
    ]
    x, y, z = cars.box.half
    assert made.box.half == pytest.approx((y / 2, x / 2, z / 2))
    turn = rotation("z", None, 90.0)
    here, _ = cars.cameras.project(POINTS)
    there, _ = made.cameras.project(moved(POINTS, turn, 0.5, (0.0, 0.0, 0.0)))
    assert torch.allclose(here, there, atol=1e-4)


def test_datasets_are_fitted_to_a_box(cars, tmp_path):
    box = Box((0.0, 0.0, 1.0), (0.2, 0.2, 0.2))
    made = place(cars.path, tmp_path / "fitted", Placement(), box)
    assert made.box == box
    # The cars' silhouettes lie where the box is seen, and reach near its ends
    corners, _ = made.cameras.project(box.corners())
    for view in range(len(made.rgb)):
        rows, columns = np.nonzero(made.alpha[view] > 128)
        low, high = corners[view].amin(0) * 32, corners[view].amax(0) * 32
        assert columns.min() > low[0] - 2 and columns.max() < high[0] + 2
        assert rows.min() > low[1] - 2 and rows.max() < high[1] + 2


def test_rendered_objects_are_fitted_to_a_box(cars, tmp_path):
    options = ViewOptions(views=8, size=32, held_out=2, box="0,0,1,0.2,0.1,0.1", fit=True)
    make_cars(tmp_path / "cars", options, train=2, new=0)
    made = PosedImages.open(tmp_path / "cars")
    assert np.array_equal(made.rgb, cars.rgb) and made.box.center == (0.0, 0.0, 1.0)
    places, depth = made.cameras.project(torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.allclose(places, torch.tensor(0.5), atol=1e-4)
    assert 0.3 < depth.min() < depth.max() < 0.7  # cameras came nearer, since the cars became smaller


@pytest.mark.parametrize("options", [ViewOptions, ImportOptions])
def test_fitting_needs_a_box(options):
    with pytest.raises(UserError, match="--fit: give the box"):
        options(fit=True)


def test_the_way_in_which_a_model_knows_cars_is_found(tmp_path, monkeypatch, capsys):
    """Cars that lie on a side, of another size, for the model of the package, which knows cars along x."""
    wrong = Placement(up="-y", turn=90.0, scale=0.01)
    monkeypatch.setattr(fit, "TRIED", 1)
    monkeypatch.setattr(add, "QUICK_STEPS", 20)
    monkeypatch.setattr(fit, "ROUGH_STEPS", 8)
    make_cars(tmp_path / "cars", ViewOptions(views=10, size=32, held_out=2), train=0, new=1)
    place(tmp_path / "cars", tmp_path / "turned", wrong)
    learned, images = open_parent(Path("cars")), PosedImages.open(tmp_path / "turned")
    found = fit.fitted_dataset(images, learned, learned.config, "cars", torch.device("cpu"))
    up, turn = re.search(
        r"--out \S+turned_fitted --up (\S+) --turn (\d+) --fit-to cars", capsys.readouterr().err
    ).groups()
    assert found.path == tmp_path / "turned_fitted" and found.box == learned.info.box
    both = rotation(up, None, float(turn)) @ rotation_of(wrong).double().numpy()
    assert np.allclose(np.abs(both), np.eye(3), atol=1e-6) and both[2, 2] > 0  # along x, wheels down
    turned = images.cameras.placed(rotation_of(Placement(up=up, turn=float(turn)))).cam2world[:, :, :3]
    assert torch.allclose(found.cameras.cam2world[:, :, :3], turned, atol=1e-5)
    monkeypatch.setattr(fit, "errors_by_placement", None)  # the second time, nothing is learned
    assert fit.fitted_dataset(images, learned, learned.config, "cars", torch.device("cpu")).path == found.path


def test_models_with_a_box_for_each_object_need_no_fit(solids):
    learned = open_parent(Path("objects"))
    with pytest.raises(UserError, match=r"objects has a box for each object: .* leave out --fit.*data place"):
        fit.fitted_dataset(solids, learned, learned.config, "objects", torch.device("cpu"))


def test_another_way_is_taken_only_if_it_is_clearly_better():
    as_it_is, back, lying = Placement(up="z"), Placement(up="z", turn=180.0), Placement(up="x", turn=90.0)
    assert as_it_is in fit.PLACEMENTS and len(set(fit.PLACEMENTS)) == 24
    for errors, expected in (
        ((1.0, 0.97, 0.9), as_it_is),
        ((1.0, 0.9, 0.83), back),
        ((1.0, 0.9, 0.6), lying),
        ((0.5, 0.9, 0.6), as_it_is),
    ):
        assert fit.best_placement(dict(zip((as_it_is, back, lying), errors, strict=True))) == expected
