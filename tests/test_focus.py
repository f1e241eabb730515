"""Error-guided sampling: probabilities against counts, the error map against loops, and learning with it."""

import dataclasses

import pytest
import torch

from latentscenes.core import config as configuration
from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.storage.run import Run
from latentscenes.training import loop
from latentscenes.training.batches import (
    EXPONENT,
    MEMORY,
    SIDE,
    BatchSource,
    ErrorGuidedSampling,
    TrainingScenes,
    window,
)
from latentscenes.training.loop import train

CPU = torch.device("cpu")
CELLS = SIDE * SIDE


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_cells_come_by_their_chances_and_places_lie_in_them(share):
    focus = ErrorGuidedSampling(3, share, CPU)
    focus.errors[:] = uniform(0, 3, CELLS)
    focus.errors[1, ::2] = 0  # no errors there
    views, count = torch.tensor([2, 1]), 20000
    x, y, cells = focus.draw(views, uniform(1, 2, count), uniform(2, 2, count), uniform(3, 2, count))
    assert torch.equal(cells, (y * SIDE).long() * SIDE + (x * SIDE).long())
    assert x.min() >= 0 and x.max() < 1 and y.min() >= 0 and y.max() < 1
    for place, view in enumerate(views.tolist()):
        wrong = focus.errors[view] ** EXPONENT
        chances = (1 - share) / CELLS + share * wrong / wrong.sum()
        counts = torch.bincount(cells[place], minlength=CELLS)
        # Stratified: counts differ by less than 2
        assert (counts - count * chances).abs().max() < 2
    inside = (x * SIDE) % 1
    assert inside.mean() == pytest.approx(0.5, abs=0.01) and inside.var() == pytest.approx(1 / 12, rel=0.05)


def test_a_view_without_errors_is_seen_evenly():
    focus = ErrorGuidedSampling(2, 1.0, CPU)
    focus.errors[:] = 0
    x, y, cells = focus.draw(
        torch.tensor([1]), uniform(1, 1, CELLS), uniform(2, 1, CELLS), uniform(3, 1, CELLS)
    )
    assert torch.isfinite(x).all() and torch.isfinite(y).all()
    assert (torch.bincount(cells[0], minlength=CELLS) - 1).abs().max() <= 1


def test_errors_are_remembered_by_cell():
    focus = ErrorGuidedSampling(4, 0.5, CPU)
    focus.errors[:] = uniform(0, 4, CELLS)
    before, views, cells = focus.errors.clone(), torch.tensor([3, 0]), torch.tensor([[5, 5, 9], [9, 0, 63]])
    errors = torch.tensor([[1.0, 3.0, 5.0], [7.0, 0.0, 2.0]])
    focus.learn(views, cells, errors)
    expected = before.clone()
    for view, cell, mean in ((3, 5, 2.0), (3, 9, 5.0), (0, 9, 7.0), (0, 0, 0.0), (0, 63, 2.0)):
        expected[view, cell] = MEMORY * before[view, cell] + (1 - MEMORY) * mean
    torch.testing.assert_close(focus.errors, expected)


def stage_of(tiny, *settings):
    """Returns a configuration with error-guided sampling and the identity codec."""
    base = ["codec.kind=identity", "train.scenes.rays=40", "train.scenes.focus=0.9", "train.scenes.epochs=3"]
    config = config_io.parse(config_io.dump(tiny), "test", [*base, *settings])
    return dataclasses.replace(config, train=(config.train[1],), exploit=())


def test_rays_go_where_a_view_had_errors(solids, tiny, tmp_path):
    config = stage_of(tiny)
    scenes = solids.select("train")
    source = BatchSource(
        Model(config, solids.box),
        TrainingScenes(random_parameters(len(scenes), config.planes, torch.Generator()), solids, scenes),
        config.train[0],
        0,
        tmp_path,
    )
    batch = source.batch(0)
    assert batch.pixels.shape == batch.cells.shape == (4, 40) and len(set(batch.views.tolist())) == 4
    wrong = torch.full((4, 40), 1e-9)
    wrong[1][batch.cells[1] < SIDE] = 1.0  # the upper row of cells of the second view
    for _ in range(40):  # replaces the initial errors
        source.focus.learn(batch.views, torch.arange(CELLS).expand(4, CELLS), torch.full((4, CELLS), 1e-9))
    source.learn(batch, wrong)
    height, width = batch.background.shape[1:]
    fitted = torch.cat(source.fitted)
    for step in range(source.steps):
        again = source.batch(step)
        for view, pixels in zip(again.views.tolist(), again.pixels, strict=True):
            left, right, top, bottom = window(
                solids.cameras[fitted[view : view + 1]], solids.box.corners(), height, width
            )[0]
            row, column = pixels // width, pixels % width
            assert ((row >= top) & (row < bottom) & (column >= left) & (column < right)).all()
            if view == batch.views[1]:
                upper = (row - top) / (bottom - top) * SIDE < 1
                assert upper.float().mean() > 0.8


def test_focus_needs_rays_whose_errors_are_known(tiny):
    for settings, message in (
        (["train.scenes.rays=0"], "give rays and losses.latent"),
        (["train.scenes.focus=1.5"], r"focus must be in \[0, 1\]"),
        (["train.scenes.losses={tv: 1}"], "give rays and losses.latent"),
    ):
        with pytest.raises(UserError, match=message):
            stage_of(tiny, *settings)


def test_focus_and_frozen_weights_resume_exactly(solids, tiny, tmp_path, monkeypatch):
    config = stage_of(
        tiny,
        "train.scenes.weights_epochs=1",
        "train.scenes.rates={micro: 1e-2, weights: 1e-2}",
        "train.scenes.field_epochs=null",
    )
    whole = train(config, solids, tmp_path / "whole", device=CPU)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    true_save, count = Run.save, [0]

    def dying(self, *arguments):
        true_save(self, *arguments)
        count[0] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", dying)
    for _ in range(100):
        try:
            broken = train(config, solids, tmp_path / "broken", device=CPU)
            break
        except KeyboardInterrupt:
            pass
    assert count[0] > 10
    for mine, other in zip(
        whole.load()[1].tables().values(), broken.load()[1].tables().values(), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_weights_rest_after_their_epochs(solids, tiny, tmp_path, fusion):
    rates = "train.scenes.rates={micro: 1e-2, weights: 1e-2}"
    sizes = ["planes.micro=3", f"planes.fusion={fusion}", "planes.bias=true", "train.scenes.focus=0", rates]
    runs = [
        train(
            stage_of(tiny, *sizes, f"train.scenes.epochs={epochs}", "train.scenes.weights_epochs=1"),
            solids,
            tmp_path / str(epochs),
            device=CPU,
        )
        for epochs in (1, 2)
    ]
    short, long = (run.load()[1] for run in runs)
    assert (
        torch.equal(short.weights, long.weights)
        and torch.equal(short.bias, long.bias)
        and not torch.equal(short.micro, long.micro)
    )


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_macro_planes_that_rest_are_summed_once_to_the_same_end(solids, tiny, tmp_path, monkeypatch, fusion):

    settings = [
        "planes.micro=3",
        f"planes.fusion={fusion}",
        "planes.bias=true",
        "train.scenes.rates={micro: 1e-2}",
        "train.scenes.losses.tv=0.1",
    ]
    config = stage_of(tiny, *settings)
    kept = train(config, solids, tmp_path / "kept", device=CPU)
    monkeypatch.setattr(loop, "machine_memory", lambda: 0)  # no room to keep them
    summed = train(config, solids, tmp_path / "summed", device=CPU)
    torch.testing.assert_close(kept.load()[1].micro, summed.load()[1].micro, rtol=1e-3, atol=1e-4)


def test_weights_do_not_rest_where_shared_parts_learn():
    config = config_io.load("small")
    assert config.exploit[0].weights_epochs == configuration.frozen(config).exploit[0].weights_epochs == 8
    learning = configuration.learning_shared(config).exploit[0]
    assert (
        learning.weights_epochs is None
        and learning.rates.bases > 0
        and learning.focus == config.exploit[0].focus
    )
