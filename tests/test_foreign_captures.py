"""Captures as strangers' programs leave them: shared cases, each against one that is clean."""

import json
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
        ('"cx": NaN', r"frame 0 .*: the principal point \(cx, cy\) lies at nan"),
        ('"cy": -1e9', r"frame 0 .*: the principal point \(cx, cy\) lies at 0.5, -"),
        ('"fl_x": Infinity', "focal lengths inf"),
    ],
)
def test_odd_values_are_read_or_named(entry, message, tmp_path):
    shutil.copytree(CASES / "11-transforms" / "backslash", tmp_path / "in")
    file = tmp_path / "in" / "transforms.json"
    key = entry.split('"')[1]
    text = file.read_text().replace(f'"{key}"', '"was"', 1)
    file.write_text(f"{{{entry}, {text.lstrip()[1:]}")
    if message is None:
        make_transforms(tmp_path / "in", tmp_path / "out")
        return
    with pytest.raises(UserError, match=message):
        make_transforms(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transform_matrix": ["1000", "0100", "0010", "0001"]}, "must be 4 rows of 4 numbers"),
        ({"transform_matrix": {"a": [1, 0, 0, 0]}}, "must be 4 rows of 4 numbers"),
        ({"transform_matrix": [[1, 0, 0, 0], "0100", [0, 0, 1, 3]]}, "must be 4 rows of 4 numbers"),
        ({"file_path": "half \ud800"}, r"frame 0: no file can be named 'half \\ud800'"),
        ({"file_path": "null \0"}, r"frame 0: no file can be named 'null \\x00'"),
    ],
)
def test_frames_that_are_none_are_refused(change, message, tmp_path):
    shutil.copytree(CASES / "11-transforms" / "backslash", tmp_path / "in")
    file = tmp_path / "in" / "transforms.json"
    content = json.loads(file.read_text())
    content["frames"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        make_transforms(tmp_path / "in", tmp_path / "out")


def test_labels_that_name_no_file_are_refused(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["car/\ud800.png", [0.0] * 25]]}))
    with pytest.raises(UserError, match=r"dataset\.json: no file can be named 'car/\\ud800\.png'"):
        make_srn(tmp_path, tmp_path / "out")


def test_a_model_in_two_forms_is_named(plain, tmp_path):
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    model = tmp_path / "in" / "thing" / "sparse" / "0"
    (model / "cameras.bin").rename(model / "cameras.txt")
    with pytest.raises(UserError) as caught:
        make_photos(tmp_path / "in", tmp_path / "out", size=48)
    told = str(caught.value)
    assert told.startswith(f"{model}: cameras.bin or images.txt is absent.") and "model_converter" in told


def test_a_stray_file_of_the_other_form_is_passed_over(plain, tmp_path):
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    (tmp_path / "in" / "thing" / "sparse" / "0" / "images.txt").write_text("# of another model")
    make_photos(tmp_path / "in", tmp_path / "out", size=48)
    assert np.array_equal(images(tmp_path / "out"), plain)


def test_a_damaged_model_without_points_is_named_by_its_own_folder(tmp_path):
    pytest.importorskip("pycolmap")
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    model = tmp_path / "in" / "thing" / "sparse" / "0"
    (model / "points3D.bin").unlink()
    (model / "images.bin").write_bytes(b"torn")
    with pytest.raises(UserError, match="no readable COLMAP model") as caught:
        make_photos(tmp_path / "in", tmp_path / "out", size=48)
    paths = re.findall(r"/[^ :,)\"]+", str(caught.value))
    assert all(path.startswith(str(tmp_path)) for path in paths)
