"""The native kernel against `march_planes`: values, all gradients, and how it is built."""

import os
import subprocess
import sys

import pytest
import torch

from latentscenes.core.errors import UserError
from latentscenes.rendering import march
from latentscenes.rendering import render as rendering
from latentscenes.rendering.field import Field, FusedPlanes, mix
from latentscenes.rendering.kernels import build, native
from latentscenes.rendering.render import Rays, march_planes, render_rays, why_not_triton

needs_compiler = pytest.mark.skipif(build.load()[0] is None, reason=f"no native kernel: {build.load()[1]}")


def problem(
    scenes=2,
    rays=13,
    coarse=9,
    fine=7,
    resolution=7,
    features=5,
    channels=3,
    hidden=64,
    bounds=None,
    seed=0,
    directed=False,
):
    """Returns random arguments of march_planes: planes, network, rays around the box and numbers."""
    torch.manual_seed(seed)
    planes = torch.randn(scenes, 3, resolution, resolution, features).requires_grad_()
    field = Field(features, channels, hidden, view_direction=directed)
    origins = 1.9 * torch.nn.functional.normalize(torch.randn(scenes, rays, 3), dim=-1)
    directions = torch.nn.functional.normalize(-origins + 0.6 * torch.randn(scenes, rays, 3), dim=-1)
    near, far = march.intersect_cube(origins, directions)
    if bounds:
        near, far = (torch.full_like(near, bound) for bound in bounds)
    return (
        planes,
        field,
        Rays(origins, directions, near, far),
        torch.rand(scenes, rays, coarse),
        torch.rand(scenes, rays, fine),
    )


def network(field):
    return field.hidden.weight, field.hidden.bias, field.out.weight, field.out.bias


def run_native(planes, field, rays, u_coarse, u_fine, axes="xy,xz,yz", aggregation="sum", skip=0.0):
    return native.render(planes, *network(field), *rays, u_coarse, u_fine, axes, aggregation, skip)


def gradients(outputs, upstream, planes, field):
    return torch.autograd.grad(outputs, [planes, *network(field)], upstream)


def assert_close(actual, expected, tolerance):
    """Compares within `tolerance` times the largest entry, which bounds the rounding of sums."""
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max() + 1e-30


def assert_same_as_readable(arguments, axes="xy,xz,yz", aggregation="sum", tolerance=1e-4):
    planes, field = arguments[:2]
    expected = march_planes(*arguments, axes, aggregation)[:3]
    actual = run_native(*arguments, axes, aggregation)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-5)
    upstream = [torch.randn_like(value) for value in expected]
    for a, b in zip(
        gradients(actual, upstream, planes, field), gradients(expected, upstream, planes, field), strict=True
    ):
        assert_close(a, b, tolerance)


@needs_compiler
@pytest.mark.parametrize("axes", ["xy,xz,yz", "eg3d"])
@pytest.mark.parametrize("aggregation", ["sum", "product"])
def test_axes_and_aggregations(axes, aggregation):
    assert_same_as_readable(problem(), axes, aggregation)


@needs_compiler
@pytest.mark.parametrize("features", [5, 16])
def test_view_direction(features):
    planes, field, rays, *numbers = problem(features=features, directed=True)
    # The network sees the unit vector all the same
    stretched = rays._replace(directions=1.7 * rays.directions)
    assert_same_as_readable((planes, field, stretched, *numbers))


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 1, "features": 32, "resolution": 16},
        {"channels": 32, "hidden": 64, "features": 16},
        {"channels": 9, "hidden": 20, "features": 22, "scenes": 3},
        {"fine": 0, "coarse": 2},
        {"fine": 0, "coarse": 100},
        {"coarse": 48, "fine": 48, "features": 32, "channels": 4, "scenes": 1},
        {"rays": 1, "scenes": 1, "resolution": 1, "features": 1},
    ],
    ids=str,
)
def test_sizes(sizes):
    assert_same_as_readable(problem(**sizes))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_share_scenes(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_as_readable(problem(scenes=2, rays=7))
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_samples_outside_the_planes_read_zero():
    assert_same_as_readable(problem(bounds=(0.1, 6.0)))


@needs_compiler
def test_dense_and_empty_fields():
    for bias in (-30.0, 30.0):  # nothing to see; all of it in the first interval
        arguments = problem()
        with torch.no_grad():
            arguments[1].out.bias[0] += bias
        assert_same_as_readable(arguments)


@needs_compiler
def test_rays_that_miss_give_zero_and_no_gradient():
    planes, field, rays, u_coarse, u_fine = problem()
    far = torch.where(torch.arange(13) % 3 == 0, rays.near, rays.far)
    arguments = planes, field, rays._replace(far=far), u_coarse, u_fine
    assert_same_as_readable(arguments)
    features, depth, opacity = run_native(*arguments)
    for value in (features, depth, opacity):
        assert (value[:, ::3] == 0).all() and (value != 0).any()
    all_miss = planes, field, rays._replace(far=rays.near), u_coarse, u_fine
    for gradient in gradients([run_native(*all_miss)[0].sum()], None, planes, field):
        assert (gradient == 0).all()


@needs_compiler
@pytest.mark.parametrize("alone", [0, 1, 2])
def test_each_output_alone_has_the_right_gradient(alone):
    planes, field, *rest = problem()
    expected = march_planes(planes, field, *rest)[alone].square().sum()
    actual = run_native(planes, field, *rest)[alone].square().sum()
    for a, b in zip(
        gradients([actual], None, planes, field), gradients([expected], None, planes, field), strict=True
    ):
        assert_close(a, b, 1e-4)


@needs_compiler
def test_only_wanted_gradients_and_inference():
    planes, field, *rest = problem()
    whole = gradients([run_native(planes, field, *rest)[0].sum()], None, planes, field)
    field.requires_grad_(False)
    (frozen_network,) = torch.autograd.grad(run_native(planes, field, *rest)[0].sum(), [planes])
    field.requires_grad_(True)
    fixed_planes = torch.autograd.grad(run_native(planes.detach(), field, *rest)[0].sum(), network(field))
    for a, b in zip((frozen_network, *fixed_planes), whole, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert not run_native(planes, field, *rest)[0].requires_grad


def with_free_rays(arguments):
    """Lets rays take gradients. Their directions need not be unit vectors."""
    planes, field, rays, *numbers = arguments
    free = {"origins": rays.origins.clone(), "directions": 1.3 * rays.directions}
    rays = rays._replace(**{name: value.requires_grad_() for name, value in free.items()})
    return planes, field, rays, *numbers


@needs_compiler
@pytest.mark.parametrize("aggregation", ["sum", "product"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"features": 32, "resolution": 16, "coarse": 16, "fine": 12},
        {"directed": True, "features": 7},
        {"directed": True, "features": 16, "scenes": 3, "rays": 7},
        {"bounds": (0.1, 6.0)},  # samples outside the planes
    ],
    ids=str,
)
def test_gradients_of_rays(sizes, aggregation):
    arguments = with_free_rays(problem(**sizes))
    planes, field, rays = arguments[:3]
    everything = [planes, *network(field), rays.origins, rays.directions]
    expected = march_planes(*arguments, "eg3d", aggregation)[:3]
    actual = run_native(*arguments, "eg3d", aggregation)
    upstream = [torch.randn_like(value) for value in expected]
    by_torch = torch.autograd.grad(expected, everything, upstream)
    found = torch.autograd.grad(actual, everything, upstream)
    for a, b in zip(found, by_torch, strict=True):
        assert b.abs().max() > 0
        assert_close(a, b, 1e-4)
    # Those of rays alone are the same, and others stay as they are without them
    alone = run_native(planes.detach(), field.requires_grad_(False), *arguments[2:], "eg3d", aggregation)
    for a, b in zip(torch.autograd.grad(alone, everything[5:], upstream), found[5:], strict=True):
        assert torch.equal(a, b)
    field.requires_grad_(True)
    fixed = rays._replace(origins=rays.origins.detach(), directions=rays.directions.detach())
    without = run_native(planes, field, fixed, *arguments[3:], "eg3d", aggregation)
    for a, b in zip(torch.autograd.grad(without, everything[:5], upstream), found[:5], strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("which", ["origins", "directions"])
def test_gradients_of_rays_are_the_slopes_of_the_render(which):
    """Finite differences in float64 by the torch path, over steps too small to cross a texel's border."""
    planes, field, rays, u_coarse, u_fine = with_free_rays(problem(rays=4, directed=True, fine=0))
    found = run_native(planes, field, rays, u_coarse, u_fine)
    weights = [torch.randn_like(value) for value in found]
    (gradient,) = torch.autograd.grad(found, [getattr(rays, which)], weights)
    exact = Field(5, 3, 64, view_direction=True).double()
    exact.load_state_dict(field.state_dict())
    fixed = Rays(*(value.detach().double() for value in rays))

    def value(moved):
        found = march_planes(
            planes.detach().double(),
            exact,
            fixed._replace(**{which: moved}),
            u_coarse.double(),
            u_fine.double(),
        )
        return sum((w * part).sum() for w, part in zip(weights, found[:3], strict=True)).item()

    start, slopes = getattr(fixed, which), torch.zeros_like(gradient)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3)).tolist():
        step = torch.zeros_like(start)
        step[tuple(place)] = 1e-7
        slopes[tuple(place)] = (value(start + step) - value(start - step)) / 2e-7
    assert_close(gradient, slopes, 1e-4)


@needs_compiler
def test_rays_that_miss_have_no_gradient():
    planes, field, rays, *numbers = with_free_rays(problem(scenes=1))
    rays = rays._replace(far=torch.where(torch.arange(13) % 3 == 0, rays.near, rays.far))
    features = run_native(planes, field, rays, *numbers)[0]
    for gradient in torch.autograd.grad(features.sum(), [rays.origins, rays.directions]):
        assert (gradient[:, ::3] == 0).all() and (gradient[:, 1::3] != 0).any()


def test_where_rays_take_gradients_the_gpu_kernel_says_no(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(rendering, "triton_kernel", lambda: object())
    arguments = with_free_rays(problem())
    assert "no gradients to rays" in why_not_triton(*arguments[:4])
    with torch.no_grad():
        assert why_not_triton(*arguments[:4]) == ""


@needs_compiler
def test_same_inputs_same_bits():
    arguments = problem(scenes=3, rays=50, coarse=24, fine=24, features=32, resolution=16)
    first, second = (run_native(*arguments, skip=1e-5) for _ in range(2))
    assert all(map(torch.equal, first, second))
    sums = [sum(value.sum() for value in values) for values in (first, second)]
    once, again = (gradients([value], None, *arguments[:2]) for value in sums)
    assert all(map(torch.equal, once, again))


@needs_compiler
def test_skipping_loses_little():
    arguments = problem(scenes=2, rays=60, coarse=24, fine=24, features=32, resolution=16)
    with torch.no_grad():
        arguments[1].out.bias[0] += 8  # opaque: most samples are hidden
    exact, skipped = (
        gradients([run_native(*arguments, skip=skip)[0].sum()], None, *arguments[:2])
        for skip in (0.0, native.SKIP)
    )
    for a, b in zip(skipped, exact, strict=True):
        assert (a - b).norm() <= 3e-3 * b.norm()
    assert not torch.equal(skipped[0], exact[0])


def beside_a_louder_scene(render, arguments):
    """Returns gradients of a scene's planes, alone and in a batch with one of far larger gradients."""
    planes, field, rays, *numbers = arguments
    upstream = torch.randn(2, *rays.near.shape[1:], 3) * torch.tensor([1.0, 1000.0])[:, None, None]
    first = planes[:1], field, Rays(*(value[:1] for value in rays)), *(value[:1] for value in numbers)
    alone = torch.autograd.grad(render(*first, skip=0.03)[0], planes, upstream[:1])[0][0]
    beside = torch.autograd.grad(render(*arguments, skip=0.03)[0], planes, upstream)[0][0]
    exact = torch.autograd.grad(render(*arguments, skip=0.0)[0], planes, upstream)[0][0]
    assert not torch.equal(beside, exact)  # some samples are skipped
    return alone, beside


@needs_compiler
def test_gradients_of_a_scene_do_not_depend_on_others():
    assert torch.equal(*beside_a_louder_scene(run_native, problem(rays=60, coarse=24, fine=24)))


@needs_compiler
def test_without_gradients_results_are_the_same():
    arguments = problem()
    with_gradients = run_native(*arguments)
    assert with_gradients[0].requires_grad
    with torch.no_grad():
        without = run_native(*arguments)
    for mine, theirs in zip(without, with_gradients, strict=True):
        assert torch.equal(mine, theirs)


@needs_compiler
def test_no_rays():
    arguments = problem(rays=0)
    features, depth, opacity = run_native(*arguments)
    assert features.shape == (2, 0, 3) and depth.shape == opacity.shape == (2, 0)
    assert all((gradient == 0).all() for gradient in gradients([features.sum()], None, *arguments[:2]))


@needs_compiler
def test_render_rays_picks_the_kernel_and_counts_free_light_as_far():
    planes, field, rays, u_coarse, u_fine = problem()
    by_torch = render_rays(FusedPlanes(planes), field, rays, u_coarse, u_fine, kernel="torch")
    for kernel in ("auto", "native"):
        rendered = render_rays(FusedPlanes(planes), field, rays, u_coarse, u_fine, kernel=kernel)
        for a, b in zip(rendered, by_torch, strict=True):
            assert_close(a, b, 1e-5)
    composite = march_planes(planes, field, rays, u_coarse, u_fine)
    assert_close(by_torch.depth, composite.depth + (1 - composite.opacity) * rays.far, 1e-6)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize(("aggregation", "directed"), [("sum", False), ("sum", True), ("product", False)])
def test_planes_mixed_as_they_are_read(aggregation, directed, threads, monkeypatch):
    """The native kernel mixes by hidden weights per scene, plain torch mixes texel by texel."""
    monkeypatch.setattr(native, "SKIP", 0.0)
    planes, field, *rest = problem(scenes=3, rays=11, features=6, hidden=20, directed=directed)
    mixing = torch.randn(3, 6, 6).mul_(0.3).requires_grad_()
    inputs = [planes, mixing, *network(field)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = render_rays(
            FusedPlanes(planes, mixing, aggregation=aggregation), field, *rest, kernel="native"
        )
        upstream = [torch.randn_like(value) for value in found]
        found_gradients = torch.autograd.grad(found, inputs, upstream)
    finally:
        torch.set_num_threads(before)
    wanted = render_rays(FusedPlanes(planes, mixing, aggregation=aggregation), field, *rest, kernel="torch")
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 1e-5)
    for a, b in zip(found_gradients, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        assert_close(a, b, 1e-4)
    mixed = render_rays(
        FusedPlanes(mix(planes, mixing), aggregation=aggregation), field, *rest, kernel="torch"
    )
    assert torch.equal(mixed.features, wanted.features)


def test_native_demanded_but_impossible_says_why():
    planes, _, rays, u_coarse, u_fine = problem()
    encoded = Field(5, 3, frequencies=2)
    with pytest.raises(UserError, match="positional encoding"):
        render_rays(FusedPlanes(planes), encoded, rays, u_coarse, u_fine, kernel="native")
    assert render_rays(FusedPlanes(planes), encoded, rays, u_coarse, u_fine).features.shape == (2, 13, 3)


def run_python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_compiler
def test_two_processes_build_at_once(tmp_path):
    code = "from latentscenes.rendering.kernels import build; library = str(build.build())"
    code += "; build.ctypes.CDLL(library).latentscenes_forward"
    both = [run_python(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (built,) = (tmp_path / "latentscenes").iterdir()
    assert built.suffix == ".so"


def test_the_cache_is_a_folder_that_only_the_user_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be written there
    folder = build.cache_folder()
    assert folder == build.cache_folder() == tmp_path / f"latentscenes-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # others could put code there
    with pytest.raises(build.BuildError, match="belong to other users"):
        build.cache_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.BuildError, match="belong to other users"):
        build.cache_folder()


def test_without_a_compiler_the_torch_path_renders_and_says_so_once(tmp_path):
    code = """
import torch, warnings
from latentscenes.rendering.field import Field, FusedPlanes
from latentscenes.rendering.render import Rays, render_rays
rays = Rays(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(1, 2), torch.ones(1, 2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        u = torch.rand(1, 2, 4)
        render_rays(FusedPlanes(torch.ones(1, 3, 4, 4, 2)), Field(2, 3), rays, u, u)
print(len(caught), caught[0].message)
"""
    process = run_python(code, XDG_CACHE_HOME=str(tmp_path), CXX="/nonexistent")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.startswith("1 The fast CPU kernel is off: CXX=/nonexistent")
