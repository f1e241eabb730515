"""Occupied cells: what they bound, visual hulls of silhouettes, what views and learning gain."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SOLIDS, photograph, write_solids
from egg import BOX, CENTER, SEMI, VIEW, egg_parts

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, orbit
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import visual_hull
from latentscenes.data.dataset import PosedImages
from latentscenes.model.model import Model, render_images
from latentscenes.model.planes import random_parameters
from latentscenes.rendering import occupancy
from latentscenes.rendering.kernels import native
from latentscenes.rendering.march import intersect_cube
from latentscenes.rendering.occupancy import SIDE, bound_rays, bound_rays_in_torch, dilated
from latentscenes.rendering.render import Rays
from latentscenes.training.batches import BatchSource, TrainingScenes
from latentscenes.training.hulls import carved

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernel is not compiled")


def random_rays(scenes=3, count=2000, seed=1):
    generator = torch.Generator().manual_seed(seed)
    origins = 3 * torch.nn.functional.normalize(torch.randn(scenes, count, 3, generator=generator), dim=-1)
    targets = 1.4 * (2 * torch.rand(scenes, count, 3, generator=generator) - 1)
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    return Rays(origins, directions, *intersect_cube(origins, directions))


def middles(side=SIDE):
    place = (torch.arange(side) + 0.5) * 2 / side - 1
    return torch.stack(torch.meshgrid(place, place, place, indexing="ij"), -1)


@pytest.mark.parametrize("bound", [bound_rays, bound_rays_in_torch])
def test_rays_enter_and_leave_where_cells_begin_and_end(bound):
    cells = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    cells[0, 2:4, 3:6, 7] = 1  # x in [-0.5, 0], y in [-0.25, 0.5], z in [0.75, 1]
    origins = torch.tensor([[[-3.0, 0.1, 0.8], [-0.3, 3, 0.8], [-3, 0.1, 0.5], [5, 5, 5], [-0.3, 0, 3]]])
    directions = torch.tensor([[[1.0, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1]]])
    rays = bound(Rays(origins, directions, *intersect_cube(origins, directions)), cells)
    first, last = rays.near, rays.far
    step = 2 / int(8 * occupancy.STEPS_PER_CELL)
    for ray, wanted in ((0, (2.5, 3.0)), (1, (2.5, 3.25)), (4, (2.0, 2.25))):
        assert wanted[0] - step <= first[0, ray] <= wanted[0] + step / 2
        assert wanted[1] - step / 2 <= last[0, ray] <= wanted[1] + step
    assert torch.equal(first[0, [2, 3]], last[0, [2, 3]])  # no cell, and not even the box


@needs_native
def test_kernel_and_torch_find_the_same_bounds():
    rays = random_rays()
    cells = (torch.rand(3, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) < 1e-3).float()
    cells = dilated(cells)
    by_kernel, by_torch = (torch.stack(bound(rays, cells)[2:]) for bound in (bound_rays, bound_rays_in_torch))
    same = (by_kernel - by_torch).abs() < 1e-5  # not where rounding moves a place across the edge of a cell
    assert same.float().mean() > 0.985
    met = by_torch[1] > by_torch[0]
    assert 0.3 < met[rays.far > rays.near].float().mean() < 0.999


def test_no_ray_samples_beside_what_it_could_see():
    """All that an object hides or shows lies between the bounds, since its neighbors count as occupied."""
    ball = dilated((middles().square().sum(-1) < 0.5**2).float()[None])
    rays = random_rays(1)
    origins, directions, first, last = bound_rays(rays, ball)
    middle = -(origins * directions).sum(-1)
    squared = 0.5**2 - (origins.square().sum(-1) - middle**2)
    hit = squared > 0
    assert hit.float().mean() > 0.1
    assert (first < middle - squared.clamp(min=0).sqrt())[hit].all()
    assert (last > middle + squared.clamp(min=0).sqrt())[hit].all()


def test_occupied_cells_are_those_with_density_and_their_neighbors():
    model, rows = egg_parts()
    planes = model.compose(rows, bounded=True)
    place = middles() * torch.tensor(BOX.half) + torch.tensor(BOX.center)
    radius = ((place - torch.tensor(CENTER)) / torch.tensor(SEMI)).square().sum(-1).sqrt()[None]
    least, most = (dilated((radius < limit).float()) > 0 for limit in (0.98, 1.05))
    assert (planes.occupied > 0)[least].all() and not (planes.occupied > 0)[~most].any()
    assert 0.1 < planes.occupied.float().mean() < 0.3


@needs_native
def test_kernel_and_torch_find_the_same_cells(tiny, solids, monkeypatch):
    model = Model(tiny, solids.box).eval().requires_grad_(False)
    rows = random_parameters(2, tiny.planes, torch.Generator().manual_seed(3))
    rows.micro.mul_(20)
    by_kernel = occupancy._densities(model.compose(rows), model.field, 16)
    assert by_kernel.shape == (2, 16, 16, 16) and by_kernel.std() > 1e-3
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    assert torch.allclose(occupancy._densities(model.compose(rows), model.field, 16), by_kernel, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plate_between_the_middles_of_cells_is_not_lost(axis):
    """It is 0.9 cells thick: nearly two texels."""
    cell = 2 * np.array(BOX.half) / SIDE
    semi = np.full(3, 10.0)
    semi[axis] = 0.45
    model, rows = egg_parts(semi=semi * cell, center=np.array(BOX.center))
    whole, bounded = (
        render_images(model, model.compose(rows, bounded), VIEW.orbit(4, 50.0), VIEW.size).opacity
        for bounded in (False, True)
    )
    assert whole.sum() > 10
    assert (bounded < 0.5)[whole > 0.9].float().mean() < 0.02


def test_density_that_depends_on_the_direction_has_no_cells(tiny, solids):
    directed = dataclasses.replace(tiny, field=dataclasses.replace(tiny.field, view_direction=True))
    model = Model(directed, solids.box).eval().requires_grad_(False)
    rows = random_parameters(1, directed.planes, torch.Generator().manual_seed(3))
    assert model.compose(rows, bounded=True).occupied is None


@needs_native
def test_bounded_views_are_the_same_from_fewer_samples():
    model, rows = egg_parts()
    cameras, samples = VIEW.orbit(3), []
    views = []
    for bounded in (False, True):
        planes = model.compose(rows, bounded)
        views.append(render_images(model, planes, cameras, VIEW.size))
        samples.append(native.evaluated(backward=False))
    error = (views[0].images - views[1].images).square().mean((1, 2, 3))
    assert (-10 * error.log10()).min() > 45
    assert (views[0].opacity - views[1].opacity).abs().mean() < 2e-3
    assert (views[0].depth - views[1].depth)[views[0].opacity < 0.001].abs().max() < 1e-3  # of the box's end
    assert samples[1] < 0.5 * samples[0]


@pytest.mark.parametrize("name", ["red_ball", "green_box", "pink_disc"])
def test_a_hull_holds_the_object_and_little_else(solids, name):
    scene = next(scene for scene in solids.scenes if scene.name == name)
    cells = torch.from_numpy(carved(solids, scene, solids.box.numbers)) > 0
    kind, size, *_ = SOLIDS[name]
    place = middles() * torch.tensor(solids.box.half) / torch.tensor(size)
    inside = (place.square().sum(-1) < 1) if kind == "ellipsoid" else (place.abs().amax(-1) < 1)
    assert cells[inside].all()
    assert cells.float().mean() < 3 * inside.float().mean() + 0.1


def test_a_hull_of_close_views_holds_a_wire():
    """Its shadow, 4 pixels wide, is narrower than a cell, and lies between the middles of cells."""
    cameras, half = orbit(6, focal=4.0), 0.45
    _, alpha = photograph("box", (0.4, 0.004, 0.004), (0.0, 0.0, 0.0), cameras, 128)
    hull = visual_hull(alpha > 8, cameras, Box((0.0, 0.0, 0.0), (half,) * 3), SIDE)
    cells = dilated(torch.from_numpy(hull)[None].float())[0]
    wire = ((torch.linspace(-0.39, 0.39, 200) / half + 1) * SIDE / 2).long()
    assert (cells[wire, SIDE // 2, SIDE // 2] > 0).all()
    assert cells[20:28, 20:28, 20:28].float().mean() < 0.5  # what all views see


@pytest.mark.parametrize("glass", [False, True])
def test_masks_that_lack_a_part_in_some_views_bound_nothing(solids, glass):
    scene = solids.select("train")[0]
    alpha = np.array(solids.alpha)
    alpha[scene.first + 1, :12] = 0  # above the upper third of the ball
    wrong = dataclasses.replace(solids, alpha=alpha // 4 if glass else alpha)
    assert carved(wrong, scene, solids.box.numbers).all()


def test_silhouettes_that_contradict_each_other_bound_nothing(solids):
    """A hull from wrong cameras misses a part of the object, which could then never be learned."""
    scene = solids.select("train")[0]
    turned = solids.cameras.cam2world.clone()
    turned[scene.first + 1, 0, 3] += 0.5
    wrong = dataclasses.replace(solids, cameras=dataclasses.replace(solids.cameras, cam2world=turned))
    assert not carved(solids, scene, solids.box.numbers).all()
    assert carved(wrong, scene, solids.box.numbers).all()


@pytest.mark.parametrize(("wrong", "bounded"), [(0, True), (1, True), (2, False)])
def test_of_a_dozen_silhouettes_one_may_be_wrong(tmp_path, wrong, bounded):
    solids = PosedImages.open(write_solids(tmp_path / "solids", views=14))
    scene = solids.select("train")[0]
    alpha = np.array(solids.alpha)
    alpha[[scene.first + 3, scene.first + 8][:wrong]] = 255  # as of a picture without a mask
    cells = carved(dataclasses.replace(solids, alpha=alpha), scene, solids.box.numbers) > 0
    kind, size, *_ = SOLIDS[scene.name]
    place = middles() * torch.tensor(solids.box.half) / torch.tensor(size)
    inside = (place.square().sum(-1) < 1) if kind == "ellipsoid" else (place.abs().amax(-1) < 1)
    assert cells[inside.numpy()].all()
    assert (cells.mean() < 0.5) == bounded


def source(views, **changes):
    config = config_io.parse(
        "codec: {kind: identity}\nplanes: {resolution: 8, micro: 4, macro: 0}\nrender: {coarse: 8, fine: 4}\n"
        "train:\n  - {name: a, epochs: 1, scenes: 2, views: 2, rays: 64, hull: true, losses: {latent: 1}, "
        "rates: {micro: 0.3, field: 0.01}}\n",
        "hulls",
    )
    model, entries = Model(config, views.box), views.select("train")
    rows = random_parameters(len(entries), config.planes, torch.Generator().manual_seed(1))
    stage = dataclasses.replace(config.train[0], **changes)
    return model, rows, BatchSource(model, TrainingScenes(rows, views, entries), stage, 0, Path())


def test_learning_samples_inside_hulls_and_where_rays_miss_them_in_the_whole_box(solids):
    model, rows, batches = source(solids)
    batch, entries = batches.batch(0), solids.select("train")
    for cells, scene in zip(batch.occupied, batch.scenes.tolist(), strict=True):
        assert np.array_equal(cells.numpy(), carved(solids, entries[scene], solids.box.numbers))
    planes = model.compose(rows.gather(batch.scenes, model.device))
    given = batch.cameras, batch.background
    whole = model.render(planes, *given, pixels=batch.pixels).rays
    planes = planes._replace(occupied=batch.occupied)
    inside = model.render(planes, *given, pixels=batch.pixels).rays
    mixed = model.render(planes, *given, torch.Generator().manual_seed(0), batch.pixels).rays
    missed = inside.near == inside.far
    assert 0.1 < missed.float().mean() < 0.9
    assert torch.equal(mixed.near[~missed], inside.near[~missed])
    assert torch.equal(mixed.far[~missed], inside.far[~missed])
    assert torch.equal(mixed.near[missed], whole.near[missed]) and torch.equal(
        mixed.far[missed], whole.far[missed]
    )
    assert ((inside.far - inside.near) < (whole.far - whole.near))[~missed].float().mean() > 0.8


def test_without_silhouettes_or_while_cameras_move_there_are_no_hulls(solids):
    assert source(dataclasses.replace(solids, alpha=None))[2].batch(0).occupied is None
    rates = dataclasses.replace(source(solids)[2].stage.rates, cameras=0.1)
    assert source(solids, rates=rates)[2].batch(0).occupied is None
    assert source(solids, hull=False)[2].batch(0).occupied is None


def test_hulls_need_rays_that_end_at_the_box():
    text = (
        "codec: {kind: identity}\nplanes: {micro: 4, macro: 0}\nrender: {near: 0.1, far: 2}\n"
        "train:\n"
        "  - {name: a, epochs: 1, scenes: 1, views: 1, hull: true, losses: {latent: 1}, rates: {micro: 1}}"
    )
    with pytest.raises(UserError, match="stages with hull need rays that end at the box"):
        config_io.parse(text, "near")


def test_boxes_of_models_with_a_box_for_each_object_bound_their_own_cells():
    """The same egg in a box twice as large has cells twice as large."""
    model, rows = egg_parts()
    wide = Box(BOX.center, tuple(2 * side for side in BOX.half))
    other, larger = egg_parts(box=wide)
    share, least = (
        some.compose(scene, bounded=True).occupied.float().mean()
        for some, scene in ((model, rows), (other, larger))
    )
    assert 4 < share / least < 9


def test_the_browser_bounds_rays_by_the_same_numbers():
    shader = (Path(occupancy.__file__).parents[1] / "web" / "shader.js").read_text()
    numbers = {name: float(value) for name, value in re.findall(r"const ([A-Z]+) = ([0-9.]+);", shader)}
    assert numbers["CELLS"] == SIDE
    assert numbers["LOOKUPS"] == occupancy.LOOKUPS
    assert numbers["STEPS"] == SIDE * occupancy.STEPS_PER_CELL
