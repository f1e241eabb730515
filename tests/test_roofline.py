"""Counts of operations and bytes against counts by hand and by torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Cost, step_cost
from latentscenes.rendering.field import Field


def test_one_sample_of_the_smallest_field_counted_by_hand():
    cost = step_cost(scenes=1, rays=1, samples=1, resolution=1, features=1, hidden=1, channels=1)
    # Place 6; texels' places and weights 3 * 16; read 12 * 2; hidden 2 + 1; outputs 2 * (2 + 1);
    # activations 1 + 2; interval: density 4, transmittance 1, weight 1, opacity 1, depth 4, feature 4.
    assert cost.forward.flops == 6 + 48 + 24 + 3 + 6 + 3 + 15
    # Hidden unit; density, feature; exp and expm1 of compositing.
    assert cost.forward.functions == 1 + 2 + 2
    # Planes 3; network 1 + 1 + 2 + 2; ray 8; random number 1; results 3; saved 3.
    assert cost.forward.bytes == 4 * (3 + 6 + 8 + 1 + 3 + 3)
    assert cost.forward.texel_bytes == 4 * 12
    # Again: place, read and hidden; then add 24, hidden 2 * 2 + 2, outputs 2 * 4 + 2, composite 11 + 24.
    assert cost.backward.flops == 54 + 24 + 3 + 24 + 6 + 10 + 35
    assert cost.backward.functions == 2 + 3
    assert cost.backward.bytes == 4 * (2 * (3 + 6) + 8 + 3 + 3)
    assert cost.backward.texel_bytes == 4 * 36


def test_matrix_products_are_those_that_torch_counts():
    """The difference between two widths comes from products, biases and slopes of the wider layer."""
    sizes = {"scenes": 2, "rays": 5, "samples": 7, "resolution": 4, "features": 6, "channels": 3}
    points = 2 * 5 * 7

    def counted(hidden: int) -> tuple[int, int]:
        field = Field(6, 3, hidden)
        features = torch.randn(points, 6, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            density, colors = field(features, torch.zeros(points, 3), torch.zeros(points, 3))
        with FlopCounterMode(display=False) as backward:
            (density.sum() + colors.sum()).backward()
        return forward.get_total_flops(), backward.get_total_flops()

    narrow, wide = step_cost(hidden=8, **sizes), step_cost(hidden=72, **sizes)
    (forward_narrow, backward_narrow), (forward_wide, backward_wide) = counted(8), counted(72)
    assert wide.forward.flops - narrow.forward.flops == forward_wide - forward_narrow + points * 64
    again = points * 2 * 6 * 64  # the hidden layer is evaluated a second time
    assert (
        wide.backward.flops - narrow.backward.flops
        == backward_wide - backward_narrow + again + points * 3 * 64
    )


def test_dropped_samples_cost_only_their_compositing():
    sizes = {
        "scenes": 2,
        "rays": 3,
        "samples": 10,
        "resolution": 8,
        "features": 4,
        "hidden": 16,
        "channels": 5,
    }
    whole, half, none = (step_cost(**sizes, kept=kept) for kept in (1.0, 0.5, 0.0))
    assert none.forward == whole.forward
    assert none.backward.flops == 60 * (11 * 5 + 24) and none.backward.texel_bytes == 0
    assert half.backward.flops == pytest.approx((whole.backward.flops + none.backward.flops) / 2)


def test_total_and_least_time():
    cost = step_cost(2, 3, 4, 8, 16, 32, 4)
    assert cost.total.flops == cost.forward.flops + cost.backward.flops
    assert cost.total.bytes == cost.forward.bytes + cost.backward.bytes
    bound = Cost(flops=100, functions=10, bytes=40, texel_bytes=0)
    assert bound.seconds(flops_per_second=50.0, bytes_per_second=40.0) == 2  # arithmetic decides
    assert bound.seconds(flops_per_second=50.0, bytes_per_second=10.0) == 4  # memory decides
    assert (
        bound.seconds(flops_per_second=50.0, bytes_per_second=10.0, flops_per_function=20.0) == 6
    )  # functions do
