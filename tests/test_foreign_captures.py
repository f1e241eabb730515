"""Captures as strangers' programs leave them: shared cases, each against one that is clean."""

import re
import shutil

import numpy as np
import pytest
from conftest import SHARED

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.photos.importer import make_photos
from latentscenes.data.srn import make_srn
from latentscenes.data.transforms import make_transforms

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are absent")


def images(folder):
    made = PosedImages.open(folder)
    return made.images(list(range(len(made.rgb)))).numpy()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    pytest.importorskip("pycolmap")
    out = tmp_path_factory.mktemp("plain") / "out"
    make_photos(CASES / "16-colmap" / "plain", out, size=48)
    return images(out)


@pytest.mark.parametrize("case", ["windows_names", "no_points3d", "nerfstudio_layout", "macos_fair"])
def test_colmap_models_of_every_origin_give_the_same_pictures(case, plain, tmp_path):
    make_photos(CASES / "16-colmap" / case, tmp_path / "out", size=48)
    assert np.array_equal(images(tmp_path / "out"), plain)


def test_a_second_copy_of_the_model_in_another_place_is_passed_over(plain, tmp_path):
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    home = tmp_path / "in" / "thing"
    shutil.copytree(home / "sparse", home / "colmap" / "sparse")
    make_photos(tmp_path / "in", tmp_path / "out", size=48)
    assert np.array_equal(images(tmp_path / "out"), plain)


def test_transforms_of_windows_are_read(tmp_path):
    for case in ("backslash", "backslash_dot", "bom"):
        make_transforms(CASES / "11-transforms" / case, tmp_path / case)
    first = images(tmp_path / "backslash")
    assert np.array_equal(images(tmp_path / "backslash_dot"), first)
    assert np.array_equal(images(tmp_path / "bom"), first)


@pytest.mark.parametrize("case", ["11-transforms/is_fisheye", "20-fisheye/in"])
def test_fisheye_lenses_are_refused(case, tmp_path):
    with pytest.raises(UserError, match=r"transforms\.json: frame 0 .*is_fisheye = True.*Undistort"):
        make_transforms(CASES / case, tmp_path / "out")


@pytest.mark.parametrize(
    "key, value", [("latlong", True), ("ftheta_p1", 0.3), ("distortion_params", [0, 0.1])]
)
def test_other_lenses_are_refused_too(key, value, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(CASES / "11-transforms" / "backslash", folder)
    file = folder / "transforms.json"
    text = file.read_text()
    rest = text[1:].lstrip()
    zero = re.sub(r"[\d.]+", "0", str(value)).replace("True", "false")
    file.write_text(f'{{"{key}": {zero}, {rest}')
    make_transforms(folder, tmp_path / "straight")
    file.write_text(f'{{"{key}": {str(value).lower()}, {rest}')
    with pytest.raises(UserError, match=f"{key} = "):
        make_transforms(folder, tmp_path / "out")


def test_pictures_that_exif_turns_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"r_000\.jpg: its EXIF orientation \(6\)"):
        make_transforms(CASES / "11-transforms" / "portrait_flag_square_exif", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["srn_junk", "srn_junk_rgb_only"])
def test_leftovers_of_a_mac_are_no_pictures(case, tmp_path):
    make_srn(CASES / "13-macos" / "srn", tmp_path / "clean")
    make_srn(CASES / "13-macos" / case, tmp_path / "out")
    assert np.array_equal(images(tmp_path / "out"), images(tmp_path / "clean"))


def test_a_model_whose_points_were_cut_off_is_read(plain, tmp_path):
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    (tmp_path / "in" / "thing" / "sparse" / "0" / "points3D.bin").write_bytes(b"")
    make_photos(tmp_path / "in", tmp_path / "out", size=48)
    assert np.array_equal(images(tmp_path / "out"), plain)


@pytest.mark.parametrize(
    "entry, message",
    [
        ('"is_fisheye": "false", "k1": "0.0", "distortion_params": {"k1": 0.0}', None),
        ('"distortion_params": [[0], [0, 1]]', "distortion_params = "),
        ('"fl_x": 1' + "0" * 400, "intrinsics must be numbers"),
        ('"fl_x": 1' + "0" * 5000, "not a readable JSON file"),
    ],
)
def test_odd_values_are_read_or_named(entry, message, tmp_path):
    shutil.copytree(CASES / "11-transforms" / "backslash", tmp_path / "in")
    file = tmp_path / "in" / "transforms.json"
    text = file.read_text().replace('"fl_x"', '"was"', 1) if "fl_x" in entry else file.read_text()
    file.write_text(f"{{{entry}, {text.lstrip()[1:]}")
    if message is None:
        make_transforms(tmp_path / "in", tmp_path / "out")
        return
    with pytest.raises(UserError, match=message):
        make_transforms(tmp_path / "in", tmp_path / "out")
