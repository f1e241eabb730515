"""Batches: which views come when, and their targets."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from latentscenes.core import config as configuration
from latentscenes.core import config_io
from latentscenes.core.cameras import orbit
from latentscenes.core.config import PlanesConfig
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.render import camera_rays
from latentscenes.training import batches as batches_module
from latentscenes.training.batches import BatchSource, TrainingScenes, window
from latentscenes.training.losses import at_pixels

CPU = torch.device("cpu")


def learned(images, entries):
    parameters = random_parameters(len(entries), PlanesConfig(resolution=2, bases=1), torch.Generator())
    return TrainingScenes(parameters, images, entries)


def source(config, views, name="scenes", seed=5, **changes):
    """Returns batches of the stage `name`."""
    stage = next(stage for stage in (*config.train, *config.exploit) if stage.name == name)
    return BatchSource(
        Model(config, views.box),
        learned(views, views.select("train")),
        dataclasses.replace(stage, **changes),
        seed,
        Path(),
    )


def seen(batches, views, scenes):
    """Returns (scene name, dataset index) of every view of an epoch, found by cameras and row numbers."""
    pairs = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        each = len(batch.cameras) // len(batch.scenes)
        for k, camera in enumerate(batch.cameras.cam2world):
            scene = scenes[int(batch.scenes[k // each])]
            same = [
                index for index in scene.views("all") if torch.equal(views.cameras.cam2world[index], camera)
            ]
            assert len(same) == 1
            pairs.append((scene.name, same[0]))
    return pairs


@pytest.mark.parametrize(("scenes", "size"), [(1, 1), (2, 5), (4, 5), (3, 1)])
def test_every_view_comes_once_an_epoch(solids, tiny, scenes, size):
    chosen = solids.select("train")
    stage = dataclasses.replace(tiny.train[1], scenes=scenes, views=size)
    pairs = seen(
        BatchSource(Model(tiny, solids.box), learned(solids, chosen), stage, 0, Path()), solids, chosen
    )
    assert Counter(pairs) == Counter((scene.name, index) for scene in chosen for index in scene.views("fit"))


def test_a_last_chunk_is_filled_up_with_views_of_the_same_scene(solids, tiny):
    chosen = solids.select("train")  # 5 views to fit, in chunks of 2: one comes twice
    counts = Counter(seen(source(tiny, solids), solids, chosen))
    for scene in chosen:
        mine = [counts[scene.name, index] for index in scene.views("all")]
        assert sorted(mine) == [0, 1, 1, 1, 1, 2] and mine[scene.held_out[0]] == 0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_held_out_views_are_never_learned_from(solids, tiny, size):
    chosen = solids.select("train")
    batches = BatchSource(
        Model(tiny, solids.box),
        learned(solids, chosen),
        dataclasses.replace(tiny.train[1], views=size, epochs=3),
        0,
        Path(),
    )
    held = {index for scene in chosen for index in scene.views("held_out")}
    assert len(held) == 4
    for step in range(batches.steps):
        for camera in batches.batch(step).cameras.cam2world:
            places = {
                k for k in range(len(solids.cameras)) if torch.equal(solids.cameras.cam2world[k], camera)
            }
            # The same orbit for all scenes: held-out places are held out everywhere
            assert not places <= held
    assert {index for scene in batches.fitted for index in scene.tolist()}.isdisjoint(held)


def test_scenes_of_a_batch_differ(solids, tiny):
    batches = source(tiny, solids)
    for step in range(batches.steps):
        scenes = batches.batch(step).scenes.tolist()
        assert len(set(scenes)) == len(scenes) == 2


def same(a, b):
    return torch.equal(a.scenes, b.scenes) and torch.equal(a.cameras.cam2world, b.cameras.cam2world)


def test_order_depends_on_seed_stage_and_epoch_alone(solids, tiny):
    one, two, other = source(tiny, solids), source(tiny, solids), source(tiny, solids, seed=6)
    steps = range(one.steps_per_epoch)
    backwards = [two.batch(step) for step in reversed(range(two.steps))][::-1]  # any order of asking
    assert all(same(one.batch(step), backwards[step]) for step in range(one.steps))
    assert not all(same(one.batch(step), other.batch(step)) for step in steps)
    assert not all(same(one.batch(step), one.batch(step + one.steps_per_epoch)) for step in steps)
    renamed = dataclasses.replace(tiny, train=(dataclasses.replace(tiny.train[1], name="other"),))
    assert not all(same(one.batch(step), source(renamed, solids, "other").batch(step)) for step in steps)


def test_scenes_with_different_numbers_of_views(solids, tiny):
    full, short, single, _ = solids.select("train")
    scenes = [full, dataclasses.replace(short, count=4), dataclasses.replace(single, count=1, held_out=())]
    batches = BatchSource(
        Model(tiny, solids.box),
        learned(solids, scenes),
        dataclasses.replace(tiny.train[1], scenes=2, views=2),
        0,
        Path(),
    )
    counts = Counter(seen(batches, solids, scenes))
    assert set(counts) == {(scene.name, index) for scene in scenes for index in scene.views("fit")}
    totals = {scene.name: sum(n for (name, _), n in counts.items() if name == scene.name) for scene in scenes}
    assert totals == {"red_ball": 6, "green_box": 4, "blue_egg": 2}  # 5, 3 and 1 views, rounded up to pairs


def test_images_and_cached_latents_belong_to_the_cameras(solids, tiny):
    model = Model(tiny, solids.box)
    chosen = solids.select("train")
    learning = BatchSource(model, learned(solids, chosen), tiny.train[2], 0, Path())
    cached = BatchSource(
        model,
        learned(solids, chosen),
        dataclasses.replace(tiny.train[2], losses=tiny.train[1].losses, rates=tiny.train[1].rates),
        0,
        Path(),
    )
    for step in range(3):
        a, b = learning.batch(step), cached.batch(step)
        assert same(a, b) and a.latents is None and b.images is None
        torch.testing.assert_close(
            b.latents, at_pixels(model.encode(a.images)).detach(), atol=1e-5, rtol=1e-5
        )
        each = len(a.images) // len(a.scenes)
        for k in range(len(a.images)):
            scene = chosen[int(a.scenes[k // each])]
            index = next(
                i
                for i in scene.views("all")
                if torch.equal(solids.cameras.cam2world[i], a.cameras.cam2world[k])
            )
            assert torch.equal(a.images[k], solids.images([index])[0].float() / 255)


def test_rays_are_drawn_anew_each_step_and_alike_each_time(solids, tiny):
    some, again = source(tiny, solids, rays=7), source(tiny, solids, rays=7)
    pixels = [some.batch(step).pixels for step in range(3)]
    assert all(p.shape == (4, 7) and 0 <= int(p.min()) and int(p.max()) < 64 for p in pixels)
    assert not torch.equal(pixels[0], pixels[1])
    assert all(torch.equal(p, again.batch(step).pixels) for step, p in enumerate(pixels))
    assert source(tiny, solids).batch(0).pixels is None
    assert source(tiny, solids, rays=1000).batch(0).pixels.shape == (4, 64)


def test_drawn_rays_see_the_box_and_miss_none_that_does(solids):
    """Every ray that meets the box lies in the window, and the window touches the box on all sides."""
    rays = camera_rays(solids.cameras, solids.box.numbers.expand(len(solids.cameras), 6), 32, 32)
    hits = (rays.far > rays.near).reshape(-1, 32, 32)
    for hit, (left, right, top, bottom) in zip(
        hits, window(solids.cameras, solids.box.corners(), 32, 32).int().tolist(), strict=True
    ):
        rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
        assert left <= int(columns.min()) <= left + 1 and right - 2 <= int(columns.max()) < right
        assert top <= int(rows.min()) <= top + 1 and bottom - 2 <= int(rows.max()) < bottom


def test_the_window_of_a_camera_inside_the_box_is_the_whole_view(solids):
    inside = orbit(3, distance=0.05)
    assert window(inside, solids.box.corners(), 8, 16).tolist() == 3 * [[0, 16, 0, 8]]


def test_targets_of_drawn_rays_are_those_of_their_pixels(solids, tiny):
    """Targets come from images if latents are pixels, and from the cache of a frozen codec."""
    for codec in (tiny.codec, configuration.CodecConfig(kind="identity")):
        config = dataclasses.replace(tiny, codec=codec)
        model, chosen = Model(config, solids.box), solids.select("train")
        some = BatchSource(
            model, learned(solids, chosen), dataclasses.replace(tiny.train[1], rays=9), 0, Path()
        ).batch(0)
        whole = BatchSource(model, learned(solids, chosen), tiny.train[1], 0, Path()).batch(0)
        expected = whole.latents.gather(1, some.pixels[..., None].expand(-1, -1, whole.latents.shape[2]))
        torch.testing.assert_close(some.latents, expected, atol=1e-6, rtol=1e-6)


def test_a_cache_too_large_for_memory_is_a_file_that_is_gone_with_it(solids, tiny, tmp_path, monkeypatch):
    chosen, model = solids.select("train"), Model(tiny, solids.box)
    stage = dataclasses.replace(tiny.train[1], rays=9)
    in_memory = BatchSource(model, learned(solids, chosen), stage, 0, tmp_path)
    monkeypatch.setattr(batches_module, "machine_memory", lambda: 1000)
    filed = BatchSource(model, learned(solids, chosen), stage, 0, tmp_path)
    assert not list(tmp_path.iterdir())
    for step in range(3):
        assert torch.equal(filed.batch(step).latents, in_memory.batch(step).latents)


@pytest.mark.parametrize("kind", ["minmax", "meanstd", "meanstd_tanh"])
@pytest.mark.parametrize("codec", ["convolutional", "identity"])
def test_a_frozen_codec_gives_latents_and_background_one_normalizer(solids, tiny, codec, kind):
    config = config_io.parse(config_io.dump(tiny), "tiny", [f"normalizer.kind={kind}", f"codec.kind={codec}"])
    batches = source(config, solids)
    model, batch = batches.model, batches.batch(0)
    assert not model.normalizer.has_no_statistics
    torch.testing.assert_close(batch.background, model.background(32, 32))


def crops(config, views, **changes):
    """Returns batches of crops of 2 x 2 latents, of 4 x 4 pixels each."""
    settings = ["codec.kind=guided", "codec.channels=5"]
    guided = config_io.parse(config_io.dump(config), "tiny", settings)
    losses = configuration.LossWeights(rgb=1.0)
    return source(guided, views, "joint", losses=losses, crop=2, **changes)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_crops_belong_to_their_pixels_and_cells(solids, tiny, focus):
    batches, height, width = crops(tiny, solids, focus=focus), *(side // 4 for side in solids.size)
    places = set()
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch.grid == (2, 2) and batch.images.shape == (4, 3, 8, 8)
        corners = window(batch.cameras, batches.model.box.corners(), height, width)
        for view, camera in enumerate(batch.cameras.cam2world):
            row, column = divmod(int(batch.pixels[view, 0]), width)
            assert batch.pixels[view].tolist() == [
                (row + down) * width + column + across for down in (0, 1) for across in (0, 1)
            ]
            places.add((row, column))
            left, right, top, bottom = corners[view].tolist()
            assert left <= column and column + 2 <= right and top <= row and row + 2 <= bottom
            index = next(
                index
                for scene in solids.select("train")
                for index in scene.views("fit")
                if batch.scenes[view // 2] == solids.select("train").index(scene)
                and torch.equal(solids.cameras.cam2world[index], camera)
            )
            image = solids.images([index])[0].float() / 255
            rows, columns = slice(4 * row, 4 * row + 8), slice(4 * column, 4 * column + 8)
            torch.testing.assert_close(batch.images[view], image[:, rows, columns])
            if focus:
                down = int((row + 0.5 - top) / (bottom - top) * batches_module.SIDE)
                across = int((column + 0.5 - left) / (right - left) * batches_module.SIDE)
                assert batch.cells[view, 0] == down * batches_module.SIDE + across
    assert len(places) > 4


def test_crops_are_drawn_where_errors_were(solids, tiny):
    batches = crops(tiny, solids, focus=1.0)
    batches.focus.errors[:] = 0
    batches.focus.errors[:, -1] = 1  # the lower right cell of each view
    batch = batches.batch(0)
    corners = window(batch.cameras, batches.model.box.corners(), *batch.background.shape[1:])
    width = batch.background.shape[2]
    for pixels, (_, right, _, bottom) in zip(batch.pixels, corners.tolist(), strict=True):
        assert int(pixels[-1]) == (bottom - 1) * width + right - 1


def test_crops_larger_than_the_view_are_the_view(solids, tiny):
    whole = crops(tiny, solids)
    whole.stage = dataclasses.replace(whole.stage, crop=100)
    height, width = (side // 4 for side in solids.size)
    batch = whole.batch(0)
    assert batch.grid == (height, width)
    assert batch.pixels[0].tolist() == list(range(height * width))
    assert batch.images.shape[2:] == solids.size
