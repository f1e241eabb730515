"""Micro-macro composition against loops; rows as leaves."""

import dataclasses

import pytest
import torch

from latentscenes.core.config import PlanesConfig
from latentscenes.model.planes import (
    SceneParameters,
    compose,
    mean_parameters,
    random_bases,
    random_parameters,
)


def made(scenes=3, seed=0, **settings):
    config = PlanesConfig(**({"resolution": 4, "micro": 2, "macro": 3, "bases": 5} | settings))
    generator = torch.Generator().manual_seed(seed)
    rows, bases = random_parameters(scenes, config, generator), random_bases(config, generator)
    rows.bias.copy_(torch.randn(rows.bias.shape, generator=generator))
    return rows, bases, config


def macro_by_loops(rows, bases, scene, plane, row, column, feature):
    total = sum(
        float(rows.weights[scene, k]) * float(bases[k, plane, row, column, feature])
        for k in range(len(bases))
    )
    return total + (float(rows.bias[scene, 0]) if rows.bias.shape[1] else 0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("fusion", "micro", "macro"),
    [("concat", 2, 3), ("concat", 2, 0), ("concat", 0, 3), ("sum", 3, 3), ("sum", 0, 3), ("sum", 2, 0)],
)
def test_compose_against_loops(fusion, micro, macro, bias):
    rows, bases, config = made(fusion=fusion, micro=micro, macro=macro, bias=bias)
    planes = compose(rows, bases, fusion)
    assert planes.shape == (3, 3, 4, 4, config.features)
    for scene in range(3):
        for place in torch.cartesian_prod(*map(torch.arange, (3, 4, 4))).tolist():
            own = rows.micro[(scene, *place)].tolist()
            shared = [macro_by_loops(rows, bases, scene, *place, feature) for feature in range(macro)]
            if fusion == "concat" or not own or not shared:
                expected = own + shared
            else:
                expected = [a + b for a, b in zip(own, shared, strict=True)]
            assert planes[(scene, *place)].tolist() == pytest.approx(expected, abs=1e-6)


def test_mixing_against_loops():
    rows, bases, config = made(mixing=True)
    plain = compose(rows, bases, "concat")
    assert rows.mixing.shape == (3, 5, 5) and torch.equal(
        plain, compose(dataclasses.replace(rows, mixing=torch.zeros(3, 0, 0)), bases, "concat")
    )
    rows.mixing.copy_(torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(9)))
    mixed = compose(rows, bases, "concat")
    for place in torch.cartesian_prod(*map(torch.arange, (3, 3, 4, 4))).tolist():
        texel, matrix = plain[tuple(place)].tolist(), rows.mixing[place[0]].tolist()
        expected = [texel[j] + sum(texel[i] * matrix[i][j] for i in range(5)) for j in range(5)]
        assert mixed[tuple(place)].tolist() == pytest.approx(expected, abs=1e-5)


def test_one_hot_weights_pick_a_base():
    rows, bases, _ = made(micro=0)
    rows = dataclasses.replace(rows, weights=torch.eye(5)[[3, 0, 4]])
    assert torch.equal(compose(rows, bases, "concat"), bases[[3, 0, 4]])


def test_gathered_rows_are_copies_that_take_gradients():
    rows, bases, _ = made(bias=True, mixing=True)
    rows.box = torch.rand(3, 6)
    before = {name: table.clone() for name, table in rows.tables().items()}
    batch = rows.gather(torch.tensor([2, 0]))
    for name, leaf in batch.tables().items():
        assert leaf.is_leaf and torch.equal(leaf, before[name][[2, 0]])
        assert leaf.requires_grad == (name != "box") and not rows.tables()[name].requires_grad
    bases.requires_grad_()
    compose(batch, bases, "concat").square().sum().backward()
    learned = [getattr(batch, name) for name in SceneParameters.LEARNED]
    assert all(leaf.grad.abs().sum() > 0 for leaf in learned) and bases.grad.abs().sum() > 0
    with torch.no_grad():
        for leaf in batch.tables().values():
            leaf.zero_()
    assert all(torch.equal(table, before[name]) for name, table in rows.tables().items())


def test_fresh_planes_are_spread_as_asked():
    rows, bases, _ = made(scenes=40, resolution=16, micro=4, macro=4, bases=20, initial_std=0.3)
    assert float(rows.micro.std()) == pytest.approx(0.3, rel=0.02) and float(bases.std()) == pytest.approx(
        0.3, rel=0.02
    )
    # macro planes start like micro ones: Σ w B has the same deviation
    planes = compose(rows, bases, "concat")
    assert float(planes[..., 4:].std()) == pytest.approx(0.3, rel=0.1)


def test_mean_rows():
    rows, _, _ = made(bias=True)
    mean = mean_parameters(2, rows)
    for name, table in mean.tables().items():
        assert len(table) == 2 and torch.equal(table[0], table[1])
        assert torch.allclose(table[0], sum(rows.tables()[name]) / 3)
    mean.micro[0] = 7.0  # rows of their own, not views of one
    assert float(mean.micro[1].max()) < 7


def test_bytes_of_a_scene_at_the_published_setting():
    # 3 planes of 64 x 64 texels with 10 features, and 50 weights, 4 bytes each
    config = PlanesConfig(resolution=64, micro=10, macro=22, bases=50)
    rows = random_parameters(2, config, torch.Generator().manual_seed(0))
    small = random_parameters(2, dataclasses.replace(config, micro=0), torch.Generator().manual_seed(0))
    assert sum(table[0].nbytes for table in rows.tables().values()) == 4 * (3 * 10 * 64**2 + 50)
    assert sum(table[0].nbytes for table in small.tables().values()) == 200
    assert len(rows) == 2 and isinstance(rows.to("cpu"), SceneParameters)
