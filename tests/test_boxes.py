"""A box for each object: rays, density, learning, storage, and models with one box for all."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SOLIDS, photograph
from egg import BOX, SEMI, egg_parts

from latentscenes.api import Library
from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, Viewpoint, look_at, orbit
from latentscenes.core.errors import UserError
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages
from latentscenes.data.options import ImportOptions, ViewOptions
from latentscenes.data.writing import DatasetWriter, join
from latentscenes.export.surface import surface
from latentscenes.model.model import Model, render_images
from latentscenes.model.planes import random_parameters
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

CPU = torch.device("cpu")
COMMON = Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
SETTINGS = """
codec: {kind: identity}
planes: {resolution: 16, micro: 4, macro: 4, bases: 2}
field: {hidden: 8}
render: {coarse: 8, fine: 8}
train:
  - {name: a, epochs: 8, scenes: 2, views: 2, rays: 64, losses: {latent: 1}, rates: {micro: 0.3, field: 0.01}}
exploit:
  - {name: b, epochs: 8, scenes: 2, views: 2, rays: 64, losses: {latent: 1}, rates: {micro: 0.3, weights: 1}}
"""


def write_boxed(path, own=True, grown=1.0):
    """The solids, each with a box of its own: its true size and 5 %."""
    cameras = orbit(6)
    with DatasetWriter(path, (32, 32), alpha=True, origin="solids") as writer:
        for name, (kind, size, color, split) in SOLIDS.items():
            images, alpha = photograph(kind, tuple(grown * side for side in size), color, cameras, 32)
            box = Box((0.0, 0.0, 0.0), tuple(1.05 * grown * side for side in size)) if own else None
            writer.add(name, images, cameras, split, (2,), alpha, box)
        writer.finish(Box((0.0, 0.0, 0.0), (0.45 * grown,) * 3))
    return PosedImages.open(path)


def made_scene(box, seed=0):
    model = Model(config_io.parse(SETTINGS, "boxes"), COMMON)
    rows = random_parameters(1, model.config.planes, torch.Generator().manual_seed(seed))
    rows.micro.mul_(20)
    rows.box = box.numbers[None]
    return model, rows


def test_a_scene_is_the_same_in_a_smaller_world():
    """Half the box in half the world: the same pictures, at half the depth."""
    small = Box((0.3, -0.2, 0.1), (0.25, 0.25, 0.25))
    model, rows = made_scene(small)
    far = orbit(3, 1.5)
    near = far.cam2world.clone()
    near[:, :, 3] = near[:, :, 3] / 2 + torch.tensor(small.center)
    own = render_images(model, model.compose(rows), Cameras(near, far.intrinsics), (24, 24))
    common = dataclasses.replace(rows, box=None)
    plain = render_images(model, model.compose(common), far, (24, 24))
    assert 0.05 < plain.opacity.mean() < 0.95
    assert torch.allclose(own.images, plain.images, atol=2e-4)
    assert torch.allclose(own.depth, plain.depth / 2, atol=2e-4)


@pytest.mark.parametrize("axis", range(3))
def test_matter_is_equally_dense_along_all_axes_of_a_stretched_box(axis):
    """A field of constant density σ: opacity 1 − exp(−σ L / u) over a length L, where u is the unit."""
    half = (0.4, 0.2, 0.05)
    model, rows = made_scene(Box((0.0, 0.0, 0.0), half))
    with torch.no_grad():
        for parameter in model.field.parameters():
            parameter.zero_()
    eye = torch.zeros(1, 3)
    eye[0, axis] = 2.0
    cameras = Cameras(look_at(eye), torch.tensor([[500.0, 500.0, 0.5, 0.5]]))
    with torch.no_grad():
        view = model.render(model.compose(rows), cameras, model.background(1, 1))
    unit = (0.4 * 0.2 * 0.05) ** (1 / 3) / 0.5
    density = np.log1p(np.exp(-1.0)) / unit
    # Samples in the middle of 8 slices leave half a slice at each end
    coarse, length = model.config.render.coarse, 2 * half[axis]
    covered = length * (coarse - 1) / coarse
    opacity = float(view.opacity)
    assert 1 - np.exp(-density * covered) == pytest.approx(opacity, rel=0.02)
    assert 2.0 - half[axis] < float(view.depth) < 2.0 + half[axis]


def test_a_surface_lies_at_its_place_in_the_world():
    model, rows = egg_parts()
    other = Model(model.config, Box((1.0, 1.0, 1.0), (2.0, 1.0, 3.0)))
    other.load_state_dict(model.state_dict())
    rows.box = BOX.numbers[None]
    cameras = Viewpoint((48, 48), 1.6, (1.1, 1.1), BOX.center).dome(24, -80.0)
    planes = other.compose(rows)
    found = surface(other, planes, render_images(other, planes, cameras, (48, 48)), cameras, 48)
    extent = found.vertices.max(0) - found.vertices.min(0)
    assert extent == pytest.approx(2 * SEMI, rel=0.12)
    assert found.vertices.mean(0) == pytest.approx([0.07, -0.11, 0.03], abs=0.02)


def test_datasets_keep_boxes_and_old_ones_have_none(tmp_path):
    own, common = write_boxed(tmp_path / "own"), write_boxed(tmp_path / "common", own=False)
    assert own.scenes[4].box == Box((0.0, 0.0, 0.0), tuple(1.05 * side for side in (0.35, 0.35, 0.12)))
    assert own.has_boxes and not common.has_boxes
    assert own.boxes(own.scenes[:1]).tolist()[0] == pytest.approx([0, 0, 0, *3 * [1.05 * 0.35]])
    assert common.boxes(common.scenes[:1]).tolist()[0] == pytest.approx([0, 0, 0, *3 * [0.45]])
    entries = json.loads((tmp_path / "common" / "views.json").read_text())["scenes"]
    assert all("box" not in entry for entry in entries)  # earlier versions can read it


def test_joined_datasets_have_boxes_if_one_has(tmp_path):
    write_boxed(tmp_path / "own")
    cameras = orbit(6)
    with DatasetWriter(tmp_path / "common", (32, 32), alpha=True, origin="solids") as writer:
        images, alpha = photograph("box", (0.2, 0.2, 0.2), (1.0, 0.0, 0.0), cameras, 32)
        writer.add("other", images, cameras, "train", (2,), alpha)
        writer.finish(Box((0.0, 0.0, 0.0), (0.3, 0.3, 0.3)))
    both = join([tmp_path / "own", tmp_path / "common"], tmp_path / "both")
    assert both.scenes[0].box.half == pytest.approx((1.05 * 0.35,) * 3)
    assert both.scenes[-1].box == Box((0.0, 0.0, 0.0), (0.3, 0.3, 0.3))


@pytest.mark.parametrize("options", [ViewOptions, ImportOptions])
def test_one_box_given_by_hand_contradicts_a_box_for_each(options):
    with pytest.raises(UserError, match="--box 0.5 and --boxes object are both given"):
        options(box=0.5, boxes="object")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run and a library of scenes with boxes of their own, and their dataset."""
    folder = tmp_path_factory.mktemp("boxes")
    config = config_io.parse(SETTINGS, "boxes")
    images = write_boxed(folder / "data")
    run = train(config, images, folder / "run", device=CPU)
    exploit(folder / "library", images, config, run, ExploitOptions(precision="int8"), CPU)
    return run, folder / "library", images


def test_scenes_learn_and_are_stored_in_their_own_boxes(learned):
    run, folder, images = learned
    _, rows = Run.open(run.path).load()
    assert torch.equal(rows.box, images.boxes(images.select("train")))
    with Library(LibraryFolder.open(folder)) as library:
        disc = library["pink_disc"]
        assert disc.box.half == pytest.approx((1.05 * 0.35, 1.05 * 0.35, 1.05 * 0.12))
        assert library["red_ball"].box.half == pytest.approx((1.05 * 0.35,) * 3)
        # Rays that pass the flat box meet nothing, and those through it meet the disc
        shown = disc.render(images.cameras[torch.tensor([0])], 32)
        alpha = images.alpha[images.scenes[4].first] / 255
        assert shown.opacity[0][alpha == 0].mean() < 0.3 < shown.opacity[0][alpha == 1].mean()
        assert (shown.opacity[0] == 0).mean() > 0.5


def test_objects_of_any_size_fit_a_model_with_a_box_for_each(learned, tmp_path):
    run, _, _ = learned
    large = write_boxed(tmp_path / "large", grown=4.0)
    config = config_io.parse(SETTINGS, "boxes")
    exploit(tmp_path / "library", large, config, run, ExploitOptions(stage_one=False), CPU)
    with Library(LibraryFolder.open(tmp_path / "library")) as library:
        assert library["gray_cube"].box.half == pytest.approx((4 * 1.05 * 0.24,) * 3)


def test_a_model_in_one_box_does_not_use_boxes_of_objects(learned, tmp_path, capsys):
    _, _, images = learned
    config = config_io.parse(SETTINGS, "boxes")
    common = write_boxed(tmp_path / "common", own=False)
    run = train(config, common, tmp_path / "run", device=CPU)
    exploit(tmp_path / "library", images, config, run, ExploitOptions(stage_one=False), CPU)
    assert "learned in one box for all objects" in " ".join(capsys.readouterr().err.split())
    assert not LibraryFolder.open(tmp_path / "library").parameters("pink_disc").box.numel()
    large = write_boxed(tmp_path / "large", grown=1.2)
    with pytest.raises(UserError, match="would be cut off"):
        exploit(tmp_path / "other", large, config, run, ExploitOptions(stage_one=False), CPU)


def test_pictures_given_in_python_get_a_box_of_their_own(learned, tmp_path):
    _, folder, images = learned
    cameras = Viewpoint((32, 32), 1.3, (1.025, 1.025), (0.0, 0.0, 0.0)).dome(16, -60.0)
    pictures, masks = photograph("box", (0.3, 0.1, 0.15), (0.2, 0.8, 0.3), cameras, 32)
    with Library(LibraryFolder.open(folder)) as library:
        added = library.add("bar", pictures, cameras, masks)
        assert added.box.half == pytest.approx((0.3, 0.1, 0.15), abs=0.06)
        assert len(library.search(images, "gray_cube", 2)) == 2
