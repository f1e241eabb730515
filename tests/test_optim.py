"""Adam by rows against torch's Adam for each scene alone; the state of shared Adam; schedules."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from latentscenes.core.config import LossWeights, PlanesConfig, Rates, StageConfig
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.kernels import native
from latentscenes.training.optim import RowAdam, SharedAdam, adam_at_once, adam_in_torch, rate_factor

SETTINGS = PlanesConfig(resolution=3, micro=2, macro=2, bases=4, bias=True, mixing=True)
RATES = {"micro": 1e-2, "weights": 3e-2, "bias": 3e-2, "mixing": 2e-2}
TURNS = [[0, 2], [2, 1], [2], [0, 2], [1, 2], [2, 0]]
"""Scenes of each step, never scene 3."""


def made_rows(count=4):
    return random_parameters(count, SETTINGS, torch.Generator().manual_seed(0))


def learned(rows):
    return {name: getattr(rows, name) for name in RATES}


def gradient(step, row, like, name):
    generator = torch.Generator().manual_seed(hash((step, row, list(RATES).index(name))))
    return 10.0 ** (row - 1) * torch.randn(like.shape, generator=generator)


def take_step(adam, rows, step, index, factor=1.0):
    batch = rows.gather(torch.tensor(index))
    for name, leaf in learned(batch).items():
        leaf.grad = torch.stack([gradient(step, row, leaf[0], name) for row in index])
    adam.step(torch.tensor(index), batch, factor)


def test_all_rows_at_once_as_one_by_one():
    """A GPU takes the rows of a step at once."""
    found = []
    for adam in (adam_in_torch, adam_at_once):
        table = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
        moments, steps = (torch.zeros_like(table), torch.zeros_like(table)), torch.zeros(5, dtype=torch.int64)
        for turn, index in enumerate(([0, 3, 4], [3, 1], [0, 3])):
            gradients = torch.randn(len(index), 3, 4, generator=torch.Generator().manual_seed(turn))
            steps[index] += 1
            given = (torch.tensor(index), gradients, steps[index], 0.1, (0.9, 0.99), 1e-8)
            adam(native.AdamStep(table, moments, *given))
        found.append((table, *moments))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_epsilon_falls_with_the_number_of_scenes():
    """A mean over twice as many scenes halves the gradient of each, but not what it learns."""
    found = []
    for count in (4, 8, 512):
        rows = made_rows()
        batch, adam = rows.gather(torch.tensor([0, 1])), RowAdam(rows, RATES)
        for leaf in learned(batch).values():
            leaf.grad = torch.full_like(leaf, 1e-7 / count)  # near ε
        adam.step(torch.tensor([0, 1]), batch, 1.0, count)
        found.append(rows.micro)
    assert torch.allclose(found[0], found[1], rtol=1e-5) and torch.allclose(found[0], found[2], rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_rows_learn_as_if_each_scene_were_alone(beta2, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    rows = made_rows()
    alone = {}
    for row in range(4):
        mine = {name: nn.Parameter(table[row].clone()) for name, table in learned(rows).items()}
        alone[row] = (
            mine,
            torch.optim.Adam(
                [{"params": [mine[name]], "lr": rate, "rate": rate} for name, rate in RATES.items()],
                betas=(0.9, beta2),
            ),
        )
    adam = RowAdam(rows, RATES, beta2=beta2)
    for step, index in enumerate(TURNS):
        factor = 0.8**step
        take_step(adam, rows, step, index, factor)
        for row in index:
            mine, optimizer = alone[row]
            for name, parameter in mine.items():
                parameter.grad = gradient(step, row, parameter, name)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
            optimizer.step()
    for row, (mine, _) in alone.items():
        for name, parameter in mine.items():
            torch.testing.assert_close(rows.tables()[name][row], parameter.detach(), rtol=1e-5, atol=1e-7)
    assert adam.steps.tolist() == [3, 2, 6, 0]


def test_rows_outside_the_batch_are_not_touched():
    rows = made_rows()
    adam = RowAdam(rows, RATES)
    take_step(adam, rows, 0, [1, 3])
    before = {name: table.clone() for name, table in (learned(rows) | adam.state()).items()}
    take_step(adam, rows, 1, [0, 3])
    for name, table in (learned(rows) | adam.state()).items():
        assert torch.equal(table[[1, 2]], before[name][[1, 2]]), name
        assert not torch.equal(table[0], before[name][0]) and not torch.equal(table[3], before[name][3]), name


def test_a_rate_of_zero_leaves_a_table_alone():
    rows = made_rows()
    micro, weights = rows.micro.clone(), rows.weights.clone()
    adam = RowAdam(rows, {"micro": 0.0, "weights": 1e-2, "bias": 0.0, "mixing": 0.0})
    assert set(adam.state()) == {"rows.steps", "rows.first.weights", "rows.second.weights"}
    take_step(adam, rows, 0, [0, 1, 2, 3])
    assert torch.equal(rows.micro, micro) and not torch.equal(rows.weights, weights)


def test_row_state_loaded_into_its_tensors_goes_on_exactly():
    rows = made_rows()
    adam = RowAdam(rows, RATES)
    for step in range(3):
        take_step(adam, rows, step, TURNS[step])
    kept_rows, kept = (
        dataclasses.replace(rows, **{name: table.clone() for name, table in rows.tables().items()}),
        {name: value.clone() for name, value in adam.state().items()},
    )
    again = RowAdam(kept_rows, RATES)
    for name, value in again.state().items():
        value.copy_(kept[name])
    for step in range(3, 6):
        take_step(adam, rows, step, TURNS[step])
        take_step(again, kept_rows, step, TURNS[step])
    for name, table in rows.tables().items():
        assert torch.equal(table, kept_rows.tables()[name])


# Shared parts


def made_parts(seed=0):
    torch.manual_seed(seed)
    networks = {name: nn.Linear(3, 3) for name in ("encoder", "decoder", "field")}
    return networks, {name: list(network.named_parameters()) for name, network in networks.items()} | {
        "bases": []
    }


def shared_step(networks, adam, step, factor=1.0):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    for network in networks.values():
        x = network(x).tanh()
    x.square().sum().backward()
    adam.step(factor)


def test_shared_parts_learn_like_torch_adam():
    networks, parts = made_parts()
    twins, _ = made_parts()
    adam = SharedAdam(parts, Rates(decoder=1e-2, field=1e-3))
    reference = torch.optim.Adam(
        [
            {"params": twins["decoder"].parameters(), "lr": 1e-2},
            {"params": twins["field"].parameters(), "lr": 1e-3},
        ]
    )
    for step in range(4):
        for group, rate in zip(reference.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = rate * 0.5**step
        reference.zero_grad()
        shared_step(twins, type("Step", (), {"step": lambda self, factor: reference.step()})(), step)
        shared_step(networks, adam, step, 0.5**step)
    for name, network in networks.items():
        for mine, other in zip(network.parameters(), twins[name].parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_what_has_no_rate_is_frozen():
    networks, parts = made_parts()
    before = [parameter.clone() for parameter in networks["encoder"].parameters()]
    adam = SharedAdam(parts, Rates(decoder=1e-2, field=1e-3))
    shared_step(networks, adam, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, networks["encoder"].parameters(), strict=True))
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in networks["encoder"].parameters()
    )
    SharedAdam(parts, Rates(encoder=1e-2))  # the next stage learns something else
    assert all(parameter.requires_grad for parameter in networks["encoder"].parameters())
    assert not any(
        parameter.requires_grad for name in ("decoder", "field") for parameter in networks[name].parameters()
    )


def test_shared_state_loaded_into_its_tensors_goes_on_exactly():
    networks, parts = made_parts()
    rates = Rates(encoder=1e-2, decoder=1e-2, field=1e-3)
    adam = SharedAdam(parts, rates)
    for step in range(3):
        shared_step(networks, adam, step)
    twins, twin_parts = made_parts(seed=9)
    for name, network in networks.items():
        twins[name].load_state_dict(network.state_dict())
    again = SharedAdam(twin_parts, rates)
    for name, value in again.state().items():
        value.copy_(adam.state()[name])
    for step in range(3, 6):
        shared_step(networks, adam, step)
        shared_step(twins, again, step)
    for name, network in networks.items():
        assert all(
            torch.equal(a, b) for a, b in zip(network.parameters(), twins[name].parameters(), strict=True)
        )


def test_a_part_frozen_midway_stays_as_it_is():
    networks, parts = made_parts()
    adam = SharedAdam(parts, Rates(decoder=1e-2, field=1e-2))
    shared_step(networks, adam, 0)
    adam.freeze("field")
    field, decoder = (
        [parameter.clone() for parameter in networks[name].parameters()] for name in ("field", "decoder")
    )
    for step in range(1, 4):
        shared_step(networks, adam, step)
    assert all(torch.equal(a, b) for a, b in zip(field, networks["field"].parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(decoder, networks["decoder"].parameters(), strict=True))


def test_nothing_shared_learns():
    _, parts = made_parts()
    adam = SharedAdam(parts, Rates(micro=1e-2))
    adam.freeze("field")
    adam.step(1.0)
    assert adam.state() == {} and adam.parameters() == []


# Schedules


def stage(**settings):
    return StageConfig(
        "s", epochs=10, scenes=1, views=1, losses=LossWeights(latent=1.0), rates=Rates(micro=1.0), **settings
    )


def test_schedules():
    assert {rate_factor(stage(), step, 7) for step in range(70)} == {1.0}
    published = stage(schedule="exponential", decay=0.94157)
    assert [rate_factor(published, step, 7) for step in (0, 6, 7, 20, 69)] == pytest.approx(
        [1, 1, 0.94157, 0.94157**2, 0.94157**9]
    )
    cosine = stage(schedule="cosine", decay=0.1)
    assert [rate_factor(cosine, step, 7) for step in (0, 35)] == pytest.approx([1, 0.55])
    assert rate_factor(cosine, 69, 7) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 69 / 70)) / 2)
    falling = [rate_factor(cosine, step, 7) for step in range(70)]
    assert falling == sorted(falling, reverse=True) and falling[-1] > 0.1
