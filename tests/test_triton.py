"""The GPU kernels against `march_planes`: values and all gradients.

They run on a CUDA device, or without one slowly in Triton's interpreter. Another test compiles them for a
GPU, which needs no device.
"""

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install triton")

from test_kernels import assert_close, beside_a_louder_scene, gradients, network, problem  # noqa: E402

from latentscenes.core.errors import UserError  # noqa: E402
from latentscenes.rendering import march  # noqa: E402
from latentscenes.rendering.field import Field, FusedPlanes  # noqa: E402
from latentscenes.rendering.kernels import (  # noqa: E402
    native,
    triton_march,
    triton_ops,  # noqa: E402
)
from latentscenes.rendering.render import Rays, march_planes, render_rays  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter's time depends on the number of programs, not on their size."""
    if not CUDA:
        monkeypatch.setattr(triton_ops, "FORWARD_BLOCK", 1024)
        monkeypatch.setattr(triton_ops, "BACKWARD_BLOCK", 1024)
        monkeypatch.setattr(triton_ops, "LANES", 4096)


def on_device(arguments):
    planes, field, rays, *numbers = arguments
    planes = planes.detach().to(DEVICE).requires_grad_()
    return planes, field.to(DEVICE), Rays(*(x.to(DEVICE) for x in rays)), *(x.to(DEVICE) for x in numbers)


def small(**sizes):
    return on_device(problem(**{"rays": 5, **sizes}))


def run(
    planes, field, rays, u_coarse, u_fine, axes="xy,xz,yz", aggregation="sum", precision="float32", skip=0.0
):
    return triton_ops.render(
        planes, *network(field), *rays, u_coarse, u_fine, axes, aggregation, precision, skip
    )


def both_ways(arguments, axes="xy,xz,yz", aggregation="sum", precision="float32"):
    """Returns results and gradients of the kernels and of plain torch, for random upstream gradients."""
    planes, field = arguments[:2]
    actual = run(*arguments, axes, aggregation, precision)
    expected = march_planes(*arguments, axes, aggregation)[:3]
    upstream = [torch.randn_like(value) for value in expected]
    return (
        [*actual, *gradients(actual, upstream, planes, field)],
        [*expected, *gradients(expected, upstream, planes, field)],
    )


def assert_same_as_readable(arguments, axes="xy,xz,yz", aggregation="sum"):
    for index, (a, b) in enumerate(zip(*both_ways(arguments, axes, aggregation), strict=True)):
        assert_close(a, b, 1e-5 if index < 3 else 1e-4)


@pytest.mark.parametrize("axes", ["xy,xz,yz", "eg3d"])
@pytest.mark.parametrize("aggregation", ["sum", "product"])
def test_axes_and_aggregations(axes, aggregation):
    assert_same_as_readable(small(), axes, aggregation)


@pytest.mark.parametrize(("features", "aggregation"), [(5, "product"), (16, "sum")])
def test_view_direction(features, aggregation):
    planes, field, rays, *numbers = small(features=features, directed=True)
    # The network sees the unit vector all the same
    stretched = rays._replace(directions=1.7 * rays.directions)
    assert_same_as_readable((planes, field, stretched, *numbers), aggregation=aggregation)


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 1, "features": 32, "resolution": 16},
        {"channels": 32, "features": 16},
        {"channels": 9, "hidden": 20, "features": 22, "scenes": 3},
        {"fine": 0, "coarse": 2},
        {"fine": 0, "coarse": 100},
        {"coarse": 33, "fine": 31, "channels": 4, "scenes": 1},
        {"coarse": 2, "fine": 1, "rays": 3},
        {"rays": 1, "scenes": 1, "resolution": 1, "features": 1, "hidden": 1},
    ],
    ids=str,
)
def test_sizes(sizes):
    assert_same_as_readable(small(**sizes))


def test_samples_outside_the_planes_read_zero():
    assert_same_as_readable(small(bounds=(0.1, 6.0)))


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_dense_and_empty_fields(bias):
    arguments = small()
    with torch.no_grad():
        arguments[1].out.bias[0] += bias  # nothing to see; all of it in the first interval
    assert_same_as_readable(arguments)


def test_rays_that_miss_give_zero_and_no_gradient():
    planes, field, rays, u_coarse, u_fine = small(rays=13)
    far = torch.where(torch.arange(13, device=DEVICE) % 3 == 0, rays.near, rays.far)
    arguments = planes, field, rays._replace(far=far), u_coarse, u_fine
    assert_same_as_readable(arguments)
    for value in run(*arguments):
        assert (value[:, ::3] == 0).all() and (value != 0).any()
    all_miss = planes, field, rays._replace(far=rays.near), u_coarse, u_fine
    for gradient in gradients([run(*all_miss)[0].sum()], None, planes, field):
        assert (gradient == 0).all()


def test_no_rays():
    arguments = small(rays=0)
    features, depth, opacity = run(*arguments)
    assert features.shape == (2, 0, 3) and depth.shape == opacity.shape == (2, 0)
    assert all((gradient == 0).all() for gradient in gradients([features.sum()], None, *arguments[:2]))


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_each_output_alone_has_the_right_gradient(alone):
    planes, field, *rest = small()
    expected = march_planes(planes, field, *rest)[alone].square().sum()
    actual = run(planes, field, *rest)[alone].square().sum()
    for a, b in zip(
        gradients([actual], None, planes, field), gradients([expected], None, planes, field), strict=True
    ):
        assert_close(a, b, 1e-4)


def test_only_wanted_gradients_and_inference():
    planes, field, *rest = small()
    whole = gradients([run(planes, field, *rest)[0].sum()], None, planes, field)
    field.requires_grad_(False)
    (frozen_network,) = torch.autograd.grad(run(planes, field, *rest)[0].sum(), [planes])
    field.requires_grad_(True)
    fixed_planes = torch.autograd.grad(run(planes.detach(), field, *rest)[0].sum(), network(field))
    for a, b in zip((frozen_network, *fixed_planes), whole, strict=True):
        assert_close(a, b, 1e-6)
    with torch.no_grad():
        assert not run(planes, field, *rest)[0].requires_grad


def test_many_programs_share_the_work(monkeypatch):
    monkeypatch.undo()  # blocks as on a GPU: several programs, the last ones partly empty
    assert_same_as_readable(small(scenes=3))


def test_skipping_loses_little():
    arguments = small(rays=12, coarse=16, fine=16)
    with torch.no_grad():
        arguments[1].out.bias[0] += 8  # opaque: most samples are hidden
    exact, skipped = (
        gradients([run(*arguments, skip=skip)[0].sum()], None, *arguments[:2]) for skip in (0.0, native.SKIP)
    )
    for a, b in zip(skipped, exact, strict=True):
        assert (a - b).norm() <= 3e-3 * b.norm()
    assert not torch.equal(skipped[0], exact[0])


def test_gradients_of_a_scene_do_not_depend_on_others():
    assert_close(*beside_a_louder_scene(run, small(rays=12, coarse=16, fine=16)), 1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 5e-3), ("bfloat16", 5e-2)])
def test_lower_precision_stays_near(precision, tolerance):
    """Mantissas have 10 and 7 bits. The interpreter cuts where GPUs may round."""
    differences = []
    for a, b in zip(*both_ways(small(rays=20, features=16), precision=precision), strict=True):
        differences.append(((a - b).norm() / b.norm()).item())
    assert max(differences) <= tolerance
    assert differences[0] > 1e-6, "the setting did nothing"


def test_fine_samples_are_placed_as_march_places_them():
    torch.manual_seed(0)
    t = march.stratified(torch.ones(7), torch.full((7,), 3.0), torch.rand(7, 12)).to(DEVICE)
    density, u = 20 * torch.rand(7, 12).to(DEVICE) ** 4, torch.rand(7, 5).to(DEVICE)
    weights = march.composite(t, density, t.new_zeros(7, 12, 1)).weights
    both, places = (torch.cat([x, x.new_zeros(7, 5)], -1) for x in (density, t))
    triton_march.place_fine[(2,)](places, both, u, 7, 12, 5, R=4, M=8)
    assert_close(places[:, 12:], march.importance(t, weights, u), 1e-5)
    assert torch.equal(places[:, :12], t)


def test_sorting_is_stable():
    torch.manual_seed(0)
    t = torch.randint(6, (5, 21)).float().to(DEVICE)
    order = torch.empty(5, 21, dtype=torch.int32, device=DEVICE)
    triton_march.sort_samples[(2,)](t, order, 5, 21, R=4, N=32)
    assert torch.equal(order.long(), t.sort(dim=-1, stable=True).indices)


def test_render_rays_takes_it_and_counts_free_light_as_far():
    planes, *rest = small()
    arguments = FusedPlanes(planes), *rest
    by_torch = render_rays(*arguments, kernel="torch")
    for kernel in ("triton", "auto"):  # auto takes it where tensors are on a GPU
        for a, b in zip(render_rays(*arguments, kernel=kernel), by_torch, strict=True):
            assert_close(a, b, 1e-5)


def test_demanded_but_impossible_says_why(monkeypatch):
    planes, field, rays, *numbers = small()
    for wrong, reason in (
        (Field(5, 3, frequencies=2), "positional encoding"),
        (Field(5, 3, hidden=129), "128 hidden units"),
        (Field(5, 64), "64 outputs"),
    ):
        with pytest.raises(UserError, match=reason):
            render_rays(FusedPlanes(planes), wrong.to(DEVICE), rays, *numbers, kernel="triton")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(UserError, match="no fixed order"):
        render_rays(FusedPlanes(planes), field, rays, *numbers, kernel="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="CUDA device, got cpu"):
        render_rays(
            FusedPlanes(planes.cpu()),
            field.cpu(),
            Rays(*(x.cpu() for x in rays)),
            *(x.cpu() for x in numbers),
            kernel="triton",
        )


def python(code, **environment):
    """Runs code in a new process, with kernels interpreted only if asked for. Returns what it prints."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_triton_it_says_what_to_install():
    code = """
import sys, torch
sys.modules["triton"] = None  # as if it were not installed
from latentscenes.core.errors import UserError
from latentscenes.rendering.field import Field, FusedPlanes
from latentscenes.rendering.render import Rays, render_rays
rays = Rays(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(1, 2), torch.ones(1, 2))
planes = FusedPlanes(torch.ones(1, 3, 4, 4, 2))
arguments = planes, Field(2, 3), rays, torch.rand(1, 2, 4), torch.rand(1, 2, 4)
try:
    render_rays(*arguments, kernel="triton")
except UserError as error:
    print(error)
"""
    assert "Triton is not installed (pip install triton)" in python(code, TRITON_INTERPRET="1")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from latentscenes.rendering.kernels import triton_field as field, triton_march as march

POINTERS = {"kept": "*i64", "keep": "*i8", "order": "*i32"}
NUMBERS = "points first count rays samples resolution plane_features inputs hidden channels coarse fine"

def compile(kernel, capability, warps, **constants):
    numbers = NUMBERS.split()
    kinds = {name: "i32" if name in numbers else POINTERS.get(name, "*fp32") for name in kernel.arg_names}
    kinds |= {name: "constexpr" for name in constants}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, kinds, constants)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})
    print(kernel.__name__, capability, compiled.metadata.shared)

network = dict(EG3D=False, PRODUCT=False, DIRECTED=False, PRECISION="float32")
network |= dict(INPUTS=32, HIDDEN=64, OUTPUTS=16)
compile(field.field_forward, 80, 8, BLOCK=64, **network)
compile(field.field_backward_planes, 80, 8, BLOCK=32, **network)
compile(field.field_backward_network, 80, 8, BLOCK=32, **network)
compile(march.place_fine, 80, 4, R=8, M=64)
for kernel in (march.sort_samples, march.composite, march.composite_backward):
    compile(kernel, 80, 4, R=4, N=128)
"""


def test_compilers_take_the_kernels():
    """They compile for a GPU of 2020 without having one, and each fits into 99 KiB of shared memory."""
    lines = [line.split() for line in python(COMPILE).splitlines()]
    assert len(lines) == 7
    assert all(int(shared) <= 99 * 1024 for _, _, shared in lines), lines
