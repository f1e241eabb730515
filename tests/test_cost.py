"""Costs against published values (arXiv 2403.11678, sections 3 and 4), hand calculations and real models."""

import dataclasses
import math

import pytest
import torch
from results import made_library, made_run

from latentscenes.core import config, config_io
from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.evaluation import cost
from latentscenes.evaluation.cost import MIB, MemoryCost, TimeCost
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet


def autoencoder_kl_parameters(base=128, multipliers=(1, 2, 4, 4), latents=4) -> int:
    """Number of parameters of Stable Diffusion's KL autoencoder, from its published architecture."""

    def conv(i, o, k=3):
        return i * o * k * k + o

    def residual(i, o):
        return 2 * i + conv(i, o) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    widths = [base * m for m in multipliers]
    top = widths[-1]
    middle = 2 * residual(top, top) + 2 * top + 4 * conv(top, top, 1)  # resnet, single-head attention, resnet
    encoder = conv(3, base) + middle + 2 * top + conv(top, 2 * latents)
    for level, (i, o) in enumerate(zip([base, *widths], widths, strict=False)):
        encoder += residual(i, o) + residual(o, o) + (conv(o, o) if level < 3 else 0)
    decoder = conv(latents, top) + middle + 2 * base + conv(base, 3)
    for level, (i, o) in enumerate(zip([top, *widths[::-1]], widths[::-1], strict=False)):
        decoder += residual(i, o) + 2 * residual(o, o) + (conv(o, o) if level < 3 else 0)
    return encoder + decoder + conv(2 * latents, 2 * latents, 1) + conv(latents, latents, 1)


def test_known_codec_is_counted_layer_by_layer():
    assert autoencoder_kl_parameters() == cost.KNOWN_CODECS["stable-diffusion"] == 83_653_863


def test_published_memory():
    ours, rgb = (cost.config_costs(config_io.load(name)).memory for name in ("paper", "rgb"))
    assert rgb.scene == 3 * 32 * 64 * 64 * 4 == 1.5 * MIB
    assert ours.scene == 3 * 10 * 64 * 64 * 4 + 50 * 4
    assert ours.scene / MIB == pytest.approx(0.469, abs=5e-4)
    assert ours.codec / MIB == pytest.approx(319, abs=0.5) and ours.bases / MIB == pytest.approx(
        51.6, abs=0.05
    )
    assert ours.per_scene(1000) / MIB == pytest.approx(0.84, abs=5e-3)
    assert round(cost.saving(ours.per_scene(1000), rgb.per_scene(1000))) == -44
    assert math.ceil(cost.memory_break_even(ours, rgb)) == 360  # (319.1 + 51.6) / (1.5 − 0.469)


def test_published_time():
    """Scaled-IG: 2.23 min per scene against 16.02 at N = 1000 is −86 %, for any share of stage 1."""
    ours, rgb = time_cost(1000.0, 500, 1.23), time_cost(0.0, 0, 16.02)
    assert round(cost.saving(ours.per_scene(1000).cpu, rgb.per_scene(1000).cpu)) == -86
    assert ours.per_scene_counting(1000).cpu == pytest.approx((1000 + 500 * 1.23) / 1000)
    assert ours.per_scene_counting(100).cpu == pytest.approx(10)  # all of them are in stage 1
    assert cost.time_break_even(ours, rgb) == pytest.approx(1000 / (16.02 - 1.23))
    assert TimeCost(Spent(10.0, 10.0), 5, None).per_scene(7) is None


def time_cost(stage_one: float, scenes: int, scene: float) -> TimeCost:
    """CPU times, with the wall times of a machine that is busy in stage 2."""
    return TimeCost(Spent(stage_one, stage_one), scenes, Spent(10 * scene, scene))


def test_times_compare_by_cpu_where_both_sides_know_it():
    ours, rgb = time_cost(100.0, 10, 2.0), time_cost(0.0, 0, 4.0)
    assert cost.clock(ours, rgb) == "cpu" and cost.time_break_even(ours, rgb) == 100 / 2
    old = dataclasses.replace(rgb, scene=Spent(40.0, None))
    assert cost.clock(ours, old) == "wall" and cost.time_break_even(ours, old) == 100 / 20
    assert ours.per_scene(100) == Spent(1.0 + 20.0, 1.0 + 2.0)
    assert old.per_scene(100) == Spent(40.0, None)


def test_break_even_is_where_the_costs_meet():
    ours, other = MemoryCost(1000, 500, 10, 7), MemoryCost(0, 0, 10, 12)
    meeting = cost.memory_break_even(ours, other)
    assert ours.scene + ours.shared / meeting == pytest.approx(other.scene + other.shared / meeting)
    assert cost.break_even(5, 3, 3) is None and cost.break_even(5, 4, 3) is None
    assert cost.break_even(-5, 1, 3) == 0


@pytest.mark.parametrize(
    "change",
    [
        "planes: {resolution: 8, micro: 2, macro: 3, bases: 4, bias: true}",
        "planes: {resolution: 8, micro: 5, macro: 0}",
        "planes: {resolution: 8, micro: 0, macro: 3, bases: 2}\n"
        "field: {frequencies: 2, view_direction: true}",
        "codec: {kind: identity}\nplanes: {resolution: 8, micro: 2, macro: 0}\nrender: {preview: true}",
    ],
)
def test_memory_equals_that_of_a_real_model(change, solids):
    settings = config_io.parse(change, "test")
    model, generator = Model(settings, solids.box), torch.Generator()
    memory = cost.config_costs(settings).memory
    assert memory.codec == sum(4 * p.numel() for p in model.codec.parameters())
    assert memory.bases == 4 * model.bases.numel()
    assert memory.field == sum(4 * p.numel() for p in model.field.parameters())
    tables = random_parameters(3, settings.planes, generator).tables()
    assert memory.scene == sum(table[0].nbytes for table in tables.values())


def test_account_of_runs(tmp_path, tiny, solids):
    train = made_run(tmp_path / "train", tiny, solids, "train")
    stage_one = cost.learned_costs(SceneSet.of_run(train))
    assert stage_one.time == TimeCost(Spent(13.5, 7.5), 4, None)
    assert stage_one.memory == cost.config_costs(tiny).memory
    shared, scene = stage_one.stored
    assert (
        stage_one.memory.shared < shared < stage_one.memory.shared + 20_000
        and stage_one.memory.scene < scene < stage_one.memory.scene + 2_000
    )
    made_library(tmp_path / "library", train, tiny, solids)
    ours = cost.learned_costs(SceneSet.open(tmp_path / "library"))
    assert ours.time == TimeCost(Spent(13.5, 7.5), 4, Spent(4.5, 2.5))
    assert ours.time.per_scene(10) == Spent(1.35 + 4.5, 0.75 + 2.5)
    assert ours.memory == stage_one.memory and 0.2 < ours.stored[1] / ours.memory.scene < 0.31
    old = cost.learned_costs(SceneSet.open(tmp_path / "library", split="train"))
    assert old.time == TimeCost(Spent(13.5, 7.5), 4, None)

    plain = dataclasses.replace(
        tiny, codec=config.CodecConfig("identity"), planes=config.PlanesConfig(resolution=8, macro=0)
    )
    rgb = made_run(tmp_path / "rgb", plain, solids, "new")
    assert cost.learned_costs(SceneSet.of_run(rgb)).time == TimeCost(Spent(0.0, 0.0), 0, Spent(6.75, 3.75))
    begun = Run.create(tmp_path / "begun", tiny, train.info)
    with pytest.raises(UserError, match="not finished.*The command that began it continues it: .+"):
        cost.learned_costs(SceneSet.of_run(begun))


def test_unknown_codec_is_refused():
    with pytest.raises(UserError, match="not known by name"):
        cost.codec_parameters(config.CodecConfig("diffusers", path="someone/else"))
