"""Splats fitted to pictures: the renderer of the fit is that of the published formulas, and errors fall."""

import sys

import numpy as np
import pytest
import torch
from egg import VIEW, egg, egg_run

from benchmarks.splats import splat_pictures
from latentscenes.cli import main as cli
from latentscenes.core.errors import UserError
from latentscenes.export.splat_fit import check_fit, fitted, pairs, picture, project, transmittance
from latentscenes.export.splats import Splats, scene_splats
from latentscenes.model.model import render_images, to_uint8

pytest.importorskip("skimage", reason="scikit-image (the export extra) is absent")

SIZE = (64, 80)


@pytest.fixture(scope="module")
def splats() -> Splats:
    return scene_splats(egg(), "egg", VIEW, count=900, cells=64)


def shown(splats: Splats, camera, background=(1.0, 1.0, 1.0)) -> torch.Tensor:
    positions, axes, scales, opacities, colors = (
        torch.tensor(values, dtype=torch.float32) for values in vars(splats).values()
    )
    flat = project(positions, axes * scales[:, None], camera, SIZE)
    return picture(flat, opacities, colors, torch.tensor(background), SIZE)


def psnr(splats: Splats, cameras) -> float:
    loaded = egg()
    truth = to_uint8(render_images(loaded.model, loaded.planes("egg"), cameras, SIZE).images)
    error = (splat_pictures(splats, cameras, SIZE).astype(float) - truth) ** 2
    return float(-10 * np.log10(error.mean() / 255**2))


def test_pictures_are_those_of_the_published_formulas(splats):
    random = np.random.default_rng(1)
    mixed = Splats(
        splats.positions,
        splats.rotations,
        splats.scales,
        random.uniform(0.2, 0.95, len(splats.colors)),
        splats.colors,
    )
    cameras = VIEW.orbit(2, 20.0, 50.0)
    for k, expected in enumerate(splat_pictures(mixed, cameras, SIZE)):
        found = to_uint8(shown(mixed, cameras[k : k + 1]).movedim(-1, 0)[None])[0]
        assert np.abs(found.astype(float) - expected).max() <= 5  # faint and dark pairs are left out
        assert np.abs(found.astype(float) - expected).mean() < 0.4
    assert expected.min() < 100


def test_splats_behind_the_camera_are_not_seen():
    camera = VIEW.orbit(1, 0.0)
    eye = camera.positions[0].double().numpy()
    behind = 2 * eye - np.array(VIEW.center)
    one = Splats(behind[None], np.eye(3)[None], np.full((1, 3), 0.1), np.array([0.9]), np.zeros((1, 3)))
    assert torch.equal(shown(one, camera, (0.2, 0.4, 0.6)), torch.tensor([0.2, 0.4, 0.6]).expand(*SIZE, 3))


def test_light_falls_along_the_pairs_of_a_pixel():
    opacity, pixel = torch.tensor([0.5, 0.5, 0.25, 0.9]), torch.tensor([3, 3, 3, 7])
    torch.testing.assert_close(transmittance(opacity, pixel), torch.tensor([1.0, 0.5, 0.25, 1.0]))


def test_pairs_are_sorted_and_seen(splats):
    positions, axes, scales, opacities, _ = (
        torch.tensor(values, dtype=torch.float32) for values in vars(splats).values()
    )
    flat = project(positions, axes * scales[:, None], VIEW.orbit(1, 20.0), SIZE)
    splat, pixel = pairs(flat, opacities, SIZE)
    same = pixel[1:] == pixel[:-1]
    assert (pixel.diff() >= 0).all() and (flat.distance[splat].diff()[same] >= 0).all()
    assert len(splat.unique()) < 0.8 * len(positions)  # the far side is hidden


def test_a_fit_comes_nearer_from_other_sides(splats):
    loaded, held_out = egg(), VIEW.orbit(3, 40.0, 75.0)
    better = fitted(splats, loaded, "egg", VIEW.dome(8), [SIZE], rounds=5)
    assert psnr(better, held_out) > psnr(splats, held_out) + 2
    assert (better.colors >= 0).all() and (better.colors <= 1).all()
    assert (better.opacities > 0).all() and (better.opacities < 1).all()
    again = fitted(splats, loaded, "egg", VIEW.dome(8), [SIZE], rounds=5)
    np.testing.assert_array_equal(again.positions, better.positions)


def test_no_rounds_change_nothing(splats):
    same = fitted(splats, egg(), "egg", VIEW.dome(2), [SIZE], rounds=0)
    assert same is splats


def test_sizes_and_numbers_are_checked():
    height, width = VIEW.size
    assert check_fit(VIEW, 100) == [(2 * height, 2 * width), (3 * height, 3 * width)]
    assert max(check_fit(VIEW, 100, 1, 96)[0]) == 96
    for wrong, message in (
        ((200_000,), "up to 100000"),
        ((10, -1), "--rounds -1"),
        ((10, 0, 96), "--size 96: .* --rounds is 0"),
    ):
        with pytest.raises(UserError, match=message):
            check_fit(VIEW, *wrong)
    assert check_fit(VIEW, 200_000, 0)


def test_command_fits(solids, tmp_path, monkeypatch):
    run, files = egg_run(tmp_path / "run", solids), {}
    for rounds, size in ((0, ""), (1, "--size 40")):
        out = tmp_path / f"{rounds}.ply"
        given = f"export splats --run {run.path} --scene egg --count 300 --cells 32 --rounds {rounds} {size}"
        monkeypatch.setattr(
            sys, "argv", ["latentscenes", *given.split(), "--out", str(out), "--device", "cpu"]
        )
        cli.main()
        files[rounds] = out.read_bytes()
    assert len(files[0]) == len(files[1]) and files[0] != files[1]
