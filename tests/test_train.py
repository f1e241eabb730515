"""The training loop: what learns and what is frozen, on solids that are learned in seconds."""

import dataclasses
import math

import pytest
import torch

from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.runtime import seeded
from latentscenes.evaluation.evaluate import evaluate
from latentscenes.evaluation.tables import scores_table
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.kernels import build
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet
from latentscenes.training.loop import train

CPU = torch.device("cpu")


def changed(config, *overrides):
    return config_io.parse(config_io.dump(config), "test", overrides)


@pytest.fixture(scope="module")
def trained(solids, tmp_path_factory):
    """Returns a finished run of all stages."""
    from conftest import TINY

    return train(
        config_io.parse(TINY, "tiny"), solids, tmp_path_factory.mktemp("runs") / "trained", device=CPU
    )


def state(run):
    model, rows = run.load()
    return model.state_dict(), rows.tables()


def test_a_finished_run_says_what_it_did(trained, solids, tiny):
    assert trained.finished and trained.info.scenes == ["red_ball", "green_box", "blue_egg", "brown_bar"]
    # 5 views to fit in pairs, so 3 turns of 2 batches of 2 scenes an epoch, in 1 + 2 + 1 epochs
    assert trained.position.total == 6 * (1 + 2 + 1)
    assert set(trained.position.seconds) == {"codec", "scenes", "joint"}
    lines = trained.metrics()
    assert [line["total"] for line in lines] == sorted(line["total"] for line in lines) and lines[-1][
        "total"
    ] == 24
    assert set(lines[-1]) >= {"latent", "rgb", "autoencoder", "tv", "rate", "stage", "step"}
    before = trained.position
    train(tiny, solids, trained.path, device=CPU)  # nothing is left to do
    assert trained.position == before


def test_same_seed_same_result_and_other_seed_another(trained, solids, tiny, tmp_path):
    again = train(tiny, solids, tmp_path / "again", device=CPU)
    other = train(changed(tiny, "seed=6"), solids, tmp_path / "other", device=CPU)
    for mine, twin, third in zip(state(trained), state(again), state(other), strict=True):
        assert all(torch.equal(value, twin[name]) for name, value in mine.items())
        assert not any(
            torch.equal(value, third[name])
            for name, value in mine.items()
            if value.numel() and not name.startswith("normalizer")
        )


@pytest.fixture
def only_two_batches(monkeypatch):
    """Each stage ends after its first batch, which holds two of the four scenes."""
    from latentscenes.training.batches import BatchSource

    monkeypatch.setattr(BatchSource, "steps", property(lambda self: 1))


def test_scenes_outside_the_batches_keep_every_bit(solids, tiny, tmp_path, only_two_batches):
    config = dataclasses.replace(tiny, train=tiny.train[2:])
    run = train(config, solids, tmp_path / "run", device=CPU)
    fresh = random_parameters(4, config.planes, seeded("cpu", config.seed, "rows"))
    _, rows = run.load()
    moved = [not torch.equal(rows.micro[k], fresh.micro[k]) for k in range(4)]
    assert sum(moved) == 2
    for k in range(4):
        assert torch.equal(rows.weights[k], fresh.weights[k]) == (not moved[k])


def test_field_epochs_freeze_the_field(solids, tiny, tmp_path):
    fields = []
    for epochs in (1, 2):
        stage = dataclasses.replace(tiny.train[1], epochs=epochs, field_epochs=1)
        run = train(dataclasses.replace(tiny, train=(stage,)), solids, tmp_path / str(epochs), device=CPU)
        fields.append(run.load()[0])
    assert all(
        torch.equal(a, b)
        for a, b in zip(fields[0].field.parameters(), fields[1].field.parameters(), strict=True)
    )
    assert not torch.equal(fields[0].bases, fields[1].bases)


def test_the_loss_falls(solids, tiny, tmp_path):
    config = changed(
        tiny,
        "train.scenes.epochs=10",
        "train.scenes.field_epochs=null",
        "train.codec.epochs=25",
        "train.codec.losses={autoencoder: 1}",
    )
    lines = train(config, solids, tmp_path / "run", device=CPU).metrics()
    for stage, name in (("codec", "autoencoder"), ("scenes", "latent")):
        values = [line[name] for line in lines if line["stage"] == stage]
        assert sum(values[-3:]) < 0.8 * sum(values[:3]), (stage, values)


def test_rgb_baseline_learns_a_ball(solids, tmp_path):
    config = config_io.load(
        "rgb",
        [
            "planes.resolution=16",
            "planes.micro=8",
            "render.coarse=16",
            "render.fine=8",
            "field.hidden=32",
            "train.0.rays=256",
            "train.0.views=5",
            "train.0.epochs=1",
            "train.0.schedule=constant",
            "train.0.losses.tv=1e-3",
        ],
    )
    scene = solids.select("train", limit=1)
    scores = {}
    for epochs in (1, 150):
        longer = dataclasses.replace(config, train=(dataclasses.replace(config.train[0], epochs=epochs),))
        run = train(longer, solids, tmp_path / str(epochs), limit=1, device=CPU)
        scores[epochs] = evaluate(SceneSet.of_run(run), solids, scene)
    assert scores[150].views == 1 and scores[150].mean.codec_psnr > 60  # the identity loses nothing
    assert scores[150].mean.psnr > scores[1].mean.psnr + 6 and scores[150].mean.psnr > 18
    # Latents are the image in (−1, 1), so the two errors must agree (clamping images can only help)
    assert scores[150].mean.psnr >= -10 * math.log10(scores[150].mean.latent_error / 4) - 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(solids, tiny, tmp_path, monkeypatch):
    from latentscenes.training import loop

    calls, true_terms = [], loop.terms

    def spoiled(*arguments):
        calls.append(1)
        found, errors = true_terms(*arguments)
        return {name: value * math.nan for name, value in found.items()} if len(calls) == 9 else found, errors

    monkeypatch.setattr(loop, "terms", spoiled)
    # A checkpoint is due at every step, between two logged ones
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    with pytest.raises(UserError, match="stage 'scenes', step 3: a loss is no longer finite"):
        train(tiny, solids, tmp_path / "run", device=CPU)
    run = Run.open(tmp_path / "run")
    assert run.position.total == 8
    assert all(torch.isfinite(value).all() for part in state(run) for value in part.values())


OPTIONS = {
    "sum and bias": ["planes.fusion=sum", "planes.micro=3", "planes.bias=true"],
    "product": ["planes.aggregation=product"],
    "eg3d axes": ["planes.axes=eg3d"],
    "tanh": ["normalizer.kind=tanh"],
    "minmax": ["normalizer.kind=minmax"],
    "meanstd": ["normalizer.kind=meanstd"],
    "meanstd and tanh": ["normalizer.kind=meanstd_tanh"],
    "preview": ["render.preview=true", "train.0.losses={latent: 1, preview: 1}"],
    "depth": ["train.0.losses={latent: 1, depth_tv: 0.1}"],
    "equivariance and edges": [
        "train.0.losses={latent: 1, rgb: 1, autoencoder: 1, equivariance: 0.5, edges: 0.1}"
    ],
    "ultra-light": ["planes.micro=0"],
    "micro alone": ["planes.macro=0"],
    "view direction": ["field.view_direction=true"],
    "frequencies": ["field.frequencies=2"],
    "torch kernel": ["render.kernel=torch"],
    "native kernel": ["render.kernel=native"],
    "no fine samples": ["render.fine=0"],
    "bounds and a fixed box": ["render.near=0.5", "render.far=2.1", "render.half_side=1.0"],
    "some rays": ["train.0.rays=9", "train.0.losses={latent: 1, autoencoder: 1}"],
    "downsampling 8": ["codec.downsampling=8"],
    "bfloat16": ["codec.bfloat16=true"],
    "identity codec": ["codec.kind=identity", "train.0.rays=50", "train.0.losses={latent: 1}"],
    "frozen codec": [
        "train.0.rates={micro: 1e-2, weights: 1e-2, bases: 1e-2, field: 1e-2}",
        "normalizer.kind=minmax",
    ],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_a_step(name, solids, tiny, tmp_path, only_two_batches):
    if name == "native kernel" and build.load()[0] is None:
        pytest.skip(f"no native kernel: {build.load()[1]}")
    config = changed(dataclasses.replace(tiny, train=tiny.train[2:]), *OPTIONS[name])
    run = train(config, solids, tmp_path / "run", device=CPU)
    assert run.finished
    lines = run.metrics()
    weights = dataclasses.asdict(config.train[0].losses)
    assert {term for term in weights if weights[term]} <= set(lines[-1])
    model, rows = run.load()
    assert all(
        torch.isfinite(value).all() for value in (*model.state_dict().values(), *rows.tables().values())
    )
    view = evaluate(SceneSet.of_run(run), solids, solids.select("train", limit=1))
    assert math.isfinite(view.mean.psnr)


GUIDED = """
codec: {kind: guided, downsampling: 2, channels: 5, width: 8, bfloat16: false}
planes: {resolution: 16, micro: 8, macro: 0}
field: {hidden: 32}
render: {coarse: 12, fine: 6}
train:
  - name: colors
    epochs: 40
    scenes: 2
    views: 5
    rays: 128
    focus: 0.5
    losses: {color: 1, tv: 1e-3}
    rates: {micro: 0.1, field: 1e-2}
  - name: crops
    epochs: 40
    scenes: 2
    views: 5
    crop: 6
    focus: 0.5
    losses: {color: 0.05, rgb: 1}
    rates: {decoder: 1e-2, micro: 3e-2, field: 3e-3}
"""


def test_a_guided_decoder_learns_to_sharpen_enlarged_colors(solids, tmp_path):
    config = config_io.parse(GUIDED, "guided")
    run = train(config, solids, tmp_path / "run", device=CPU)
    loaded, scenes = SceneSet.of_run(run), solids.select("train")
    decoded = evaluate(loaded, solids, scenes)
    torch.nn.init.zeros_(loaded.model.codec.decoder_parameters()[-1])
    enlarged = evaluate(loaded, solids, scenes)
    assert enlarged.mean.psnr > 14 and decoded.mean.psnr > enlarged.mean.psnr + 0.5
    # Encoding leaves features out, so it is no ceiling
    assert decoded.mean.codec_psnr is None and decoded.mean.latent_error is None
    assert "latent error" not in scores_table(decoded).columns
