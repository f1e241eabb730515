"""Native fusion and total variation against torch: values and gradients, odd sizes, every option."""

import subprocess
import sys

import pytest
import torch

from latentscenes.model.planes import SceneParameters, fuse_in_torch
from latentscenes.rendering.kernels import build, native
from latentscenes.training.losses import total_variation_in_torch

pytestmark = pytest.mark.skipif(build.load()[0] is None, reason=f"no native kernel: {build.load()[1]}")


def rows_and_bases(scenes, resolution, micro, macro, bases, bias):
    generator = torch.Generator().manual_seed(scenes + resolution)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    rows = SceneParameters(
        normal(scenes, 3, resolution, resolution, micro),
        normal(scenes, bases),
        normal(scenes, int(bias)),
        torch.zeros(scenes, 0, 0),
    )
    return rows, normal(bases, 3, resolution, resolution, macro)


def gradients(output, inputs, upstream):
    return torch.autograd.grad(output, inputs, upstream, allow_unused=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scenes", "resolution", "micro", "macro", "bases", "fusion"),
    [
        (4, 8, 3, 5, 4, "concat"),
        (1, 1, 1, 1, 1, "concat"),
        (3, 7, 0, 9, 2, "concat"),
        (2, 5, 4, 4, 3, "sum"),
        (5, 33, 10, 22, 6, "concat"),
    ],
)
def test_fusion(scenes, resolution, micro, macro, bases, fusion, bias, threads):
    rows, shared = rows_and_bases(scenes, resolution, micro, macro, bases, bias)
    inputs = [tensor for tensor in (rows.micro, rows.weights, rows.bias, shared) if tensor.numel()]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.compose(rows.micro, rows.weights, rows.bias, shared, fusion)
        upstream = torch.randn_like(found)
        found_gradients = gradients(found, inputs, upstream)
    finally:
        torch.set_num_threads(before)
    wanted = fuse_in_torch(rows.micro, rows.weights, rows.bias, shared, fusion)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found_gradients, gradients(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_only_wanted_gradients_of_a_fusion():
    rows, shared = rows_and_bases(2, 6, 2, 3, 4, False)
    shared = shared.detach()
    planes = native.compose(rows.micro, rows.weights, rows.bias, shared, "concat")
    planes.square().sum().backward()
    wanted = gradients(
        fuse_in_torch(rows.micro, rows.weights, rows.bias, shared, "concat").square().sum(),
        [rows.micro, rows.weights],
        None,
    )
    torch.testing.assert_close(rows.micro.grad, wanted[0])
    torch.testing.assert_close(rows.weights.grad, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5, 7), (1, 3, 2, 2, 1), (3, 3, 16, 16, 32)])
def test_total_variation(shape):
    planes = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found, wanted = native.total_variation(planes), total_variation_in_torch(planes)
    torch.testing.assert_close(found, wanted)
    (mine,), (theirs,) = gradients(3 * found, [planes], None), gradients(3 * wanted, [planes], None)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_same_inputs_same_bits():
    rows, shared = rows_and_bases(3, 20, 4, 6, 5, False)
    upstream = torch.randn(3, 3, 20, 20, 10)

    def once():
        planes = native.compose(rows.micro, rows.weights, rows.bias, shared, "concat")
        return [planes, *gradients(planes, [rows.micro, rows.weights, shared], upstream)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_gradients_do_not_load_the_compiler_of_torch():
    """It takes a second, in each process that learns."""
    script = (
        "import sys, torch\nfrom latentscenes.rendering.kernels import native\n"
        "micro, bases = (torch.rand(2, 3, 4, 4, 2, requires_grad=True) for _ in range(2))\n"
        "planes = native.compose(micro, torch.rand(2, 2), torch.zeros(2, 0), bases, 'concat')\n"
        "native.total_variation(planes).backward()\n"
        "assert micro.grad.abs().sum() > 0 and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
