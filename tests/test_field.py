"""The field against brute-force loops, its formulas by hand, and finite differences."""

import math

import pytest
import torch

from latentscenes.rendering.field import Field, sample_planes

DOUBLE = torch.float64


def bilinear(plane, x, y):
    """Reads plane[row][column] of feature lists at (x, y) in [-1, 1]. Texel centers: (2k + 1) / r − 1; zero
    outside."""
    r, features = len(plane), len(plane[0][0])
    column, row = ((x + 1) * r - 1) / 2, ((y + 1) * r - 1) / 2
    out = [0.0] * features
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < r and 0 <= j < r:
                share = (1 - abs(row - i)) * (1 - abs(column - j))
                for f in range(features):
                    out[f] += share * plane[i][j][f]
    return out


COORDINATES = {"xy,xz,yz": ["xy", "xz", "yz"], "eg3d": ["xy", "xz", "zx"]}
"""For each plane, the coordinates along columns and along rows."""


@pytest.mark.parametrize("aggregation", ["sum", "product"])
@pytest.mark.parametrize("axes", COORDINATES)
def test_planes_against_a_loop(axes, aggregation):
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(2, 3, 5, 5, 2, dtype=DOUBLE, generator=generator)
    points = 2.6 * torch.rand(2, 40, 3, dtype=DOUBLE, generator=generator) - 1.3  # some outside
    found = sample_planes(planes, points, axes, aggregation)
    for scene in range(2):
        tables = planes[scene].tolist()
        for p, point in enumerate(points[scene].tolist()):
            at = dict(zip("xyz", point, strict=True))
            read = [bilinear(tables[k], at[pair[0]], at[pair[1]]) for k, pair in enumerate(COORDINATES[axes])]
            combine = sum if aggregation == "sum" else math.prod
            expected = [combine(plane[f] for plane in read) for f in range(2)]
            assert found[scene, p].tolist() == pytest.approx(expected, abs=1e-12)


def test_texel_centres_give_texels():
    planes = torch.randn(1, 3, 4, 4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    planes[:, 1:] = 0
    place = [(2 * k + 1) / 4 - 1 for k in range(4)]
    points = torch.tensor([[[place[2], place[1], 0.0]]], dtype=DOUBLE)
    # Row along y, column along x
    assert torch.allclose(sample_planes(planes, points)[0, 0], planes[0, 0, 1, 2])


def test_every_plane_matters():
    generator = torch.Generator().manual_seed(2)
    planes = torch.randn(1, 3, 6, 6, 2, generator=generator)
    points = 1.6 * torch.rand(1, 30, 3, generator=generator) - 0.8
    before = sample_planes(planes, points)
    for k in range(3):
        changed = planes.clone()
        changed[:, k] += torch.randn(planes[:, k].shape, generator=generator)
        assert (sample_planes(changed, points) - before).abs().amin(dim=(0, 1)).max() > 0


@pytest.mark.parametrize(("axes", "seen"), [("xy,xz,yz", True), ("eg3d", False)])
def test_only_a_yz_plane_tells_structure_in_y_and_z_apart(axes, seen):
    # Only functions of (y, z) have a mixed second difference in y and z; those of (x, y) and (x, z) have none
    generator = torch.Generator().manual_seed(3)
    planes = torch.randn(1, 3, 8, 8, 1, dtype=DOUBLE, generator=generator)
    corner = torch.tensor([[[0.1, y, z] for y in (-0.5, 0.4) for z in (-0.3, 0.6)]], dtype=DOUBLE)
    low_low, low_high, high_low, high_high = sample_planes(planes, corner, axes)[0, :, 0]
    mixed = float(high_high - high_low - low_high + low_low)
    assert (abs(mixed) > 1e-3) == seen


def test_field_is_its_formula():
    torch.manual_seed(4)
    field = Field(5, 3, hidden=7).double()
    features, points = torch.randn(11, 5, dtype=DOUBLE), torch.randn(11, 3, dtype=DOUBLE)
    density, latent = field(features, points, points)
    for p in range(11):
        hidden = [
            math.log1p(math.exp(sum(w * x for w, x in zip(row, features[p].tolist(), strict=True)) + b))
            for row, b in zip(field.hidden.weight.tolist(), field.hidden.bias.tolist(), strict=True)
        ]
        raw = [
            sum(w * h for w, h in zip(row, hidden, strict=True)) + b
            for row, b in zip(field.out.weight.tolist(), field.out.bias.tolist(), strict=True)
        ]
        assert density[p].detach().item() == pytest.approx(math.log1p(math.exp(raw[0] - 1)))
        expected = [2 * ((1 + 2 * 0.001) / (1 + math.exp(-x)) - 0.001) - 1 for x in raw[1:]]
        assert latent[p].tolist() == pytest.approx(expected)


def test_field_stays_in_its_range():
    torch.manual_seed(5)
    field = Field(4, 2)
    density, latent = field(1e3 * torch.randn(500, 4), torch.zeros(500, 3), torch.zeros(500, 3))
    assert (density >= 0).all() and torch.isfinite(density).all()
    assert latent.abs().max() <= 1.002 + 1e-6  # the margin on either side
    assert latent.abs().max() > 1.0  # so that the ends of (−1, 1) can be reached


def test_extra_inputs_change_the_output_only_where_asked_for():
    torch.manual_seed(6)
    features, points = torch.randn(9, 4), torch.rand(9, 3)
    directions, others = torch.nn.functional.normalize(torch.randn(2, 9, 3), dim=-1)
    plain = Field(4, 2)
    assert torch.equal(plain(features, points, directions)[1], plain(features, -points, others)[1])

    viewing = Field(4, 2, view_direction=True)
    assert not torch.allclose(viewing(features, points, directions)[1], viewing(features, points, others)[1])
    assert torch.equal(viewing(features, points, directions)[1], viewing(features, -points, directions)[1])

    placed = Field(4, 2, frequencies=3)
    assert not torch.allclose(
        placed(features, points, directions)[1], placed(features, points + 0.1, directions)[1]
    )
    assert torch.equal(placed(features, points, directions)[1], placed(features, points, others)[1])
    # all octaves repeat with the first one's period, 2
    assert torch.allclose(
        placed(features, points, directions)[1], placed(features, points + 2, directions)[1], atol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"frequencies": 2, "view_direction": True}])
def test_gradients_of_the_field(options):
    torch.manual_seed(7)
    field = Field(3, 2, hidden=4, **options).double()
    features, points = (
        torch.randn(5, 3, dtype=DOUBLE, requires_grad=True),
        torch.randn(5, 3, dtype=DOUBLE, requires_grad=True),
    )
    directions = torch.randn(5, 3, dtype=DOUBLE)
    weights = [parameter.detach().requires_grad_() for parameter in field.parameters()]
    names = [name for name, _ in field.named_parameters()]

    def call(features, points, *weights):
        return torch.func.functional_call(
            field, dict(zip(names, weights, strict=True)), (features, points, directions)
        )

    assert torch.autograd.gradcheck(call, (features, points, *weights))


@pytest.mark.parametrize("aggregation", ["sum", "product"])
def test_gradients_of_plane_reading(aggregation):
    generator = torch.Generator().manual_seed(8)
    planes = torch.randn(1, 3, 3, 3, 2, dtype=DOUBLE, generator=generator).requires_grad_()
    points = (1.9 * torch.rand(1, 4, 3, dtype=DOUBLE, generator=generator) - 0.95).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: sample_planes(a, b, "xy,xz,yz", aggregation), (planes, points)
    )
