"""Captures as strangers' programs leave them: shared cases, each against one that is clean."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image, ImageCms

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.images import read_image
from latentscenes.data.photos.importer import make_photos
from latentscenes.data.shading import to_linear, to_srgb
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


def icc(name, red, green, blue, gamma=None):
    """A color profile: that of sRGB with other primaries (XYZ for D50), and a power law as its curve."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert len(name) == 4
    for place in range(132, 132 + 12 * int.from_bytes(content[128:132]), 12):
        tag, start = bytes(content[place : place + 4]), int.from_bytes(content[place + 4 : place + 8])
        if tag in (primaries := {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}):
            numbers = [round(65536 * value) for value in primaries[tag]]
            content[start + 8 : start + 20] = struct.pack(">3i", *numbers)
        elif tag == b"desc":
            at = content.index("sRGB".encode("utf-16-be"), start)
            content[at : at + 8] = name.encode("utf-16-be")
        elif tag in (b"rTRC", b"gTRC", b"bTRC") and gamma:
            content[start : start + 14] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))
    return bytes(content)


P3 = icc("P3 D", (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = icc(
    "Adob", (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.2
)
P3_TO_SRGB = [[1.2249, -0.2247, 0], [-0.042, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]
ADOBE_TO_SRGB = [[1.3983, -0.3984, 0], [0, 1, 0], [0, -0.043, 1.0429]]


@pytest.mark.parametrize(
    "profile, matrix, gamma", [(P3, P3_TO_SRGB, None), (ADOBE, ADOBE_TO_SRGB, 563 / 256)], ids=["P3", "Adobe"]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_of_a_profile_become_srgb(profile, matrix, gamma, mode, tmp_path):
    color = np.array([200, 110, 90])
    Image.new("RGB", (4, 4), tuple(color.tolist())).convert(mode, palette=Image.Palette.ADAPTIVE).save(
        tmp_path / "a.png", icc_profile=profile
    )
    pixels, alpha = read_image(tmp_path / "a.png")
    light = to_linear(color / 255) if gamma is None else (color / 255) ** gamma
    assert np.abs(pixels - 255 * to_srgb(np.array(matrix) @ light)).max() < 1.5
    assert np.abs(pixels[0, 0] - color).max() > 10  # not just the numbers of the file
    assert (alpha is None) == (mode != "RGBA") and (alpha is None or (alpha == 255).all())


def test_other_profiles_are_passed_over_or_named(tmp_path):
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (4, 4), (200, 110, 90)).save(tmp_path / "srgb.jpg", icc_profile=content, quality=100)
    Image.new("RGB", (4, 4), (200, 110, 90)).save(tmp_path / "none.jpg", quality=100)
    assert np.array_equal(read_image(tmp_path / "srgb.jpg")[0], read_image(tmp_path / "none.jpg")[0])
    Image.new("L", (4, 4), 90).save(tmp_path / "gray.png", icc_profile=P3)
    assert np.abs(read_image(tmp_path / "gray.png")[0].astype(int) - 90).max() <= 1
    Image.new("RGBA", (4, 4), (200, 110, 90, 128)).save(tmp_path / "bad.png", icc_profile=P3[:200])
    with pytest.raises(UserError, match=r"bad\.png: its color profile \(ICC\) cannot be used .*exiftool"):
        read_image(tmp_path / "bad.png")


def test_pictures_of_linear_light_are_named(tmp_path):
    for name in ("a.exr", "a.HDR"):
        (tmp_path / name).write_bytes(b"\x76\x2f\x31\x01\x02\0\0\0")
        with pytest.raises(UserError, match=f"{name}: pictures of linear light .*PNG or JPEG"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    "place, content, told",
    [
        ("keyframes/corrected_cameras/1.json", '{"t_00": 1}', "of Polycam: .*ns-process-data polycam"),
        ("metadata.json", '{"K": [1], "poses": []}', "of Record3D: .*ns-process-data record3d"),
        ("cameras.xml", '<?xml version="1.0"?>\n<document version="2.0.0">', "of Metashape: "),
        ("cameras.csv", "#name,x,y,alt,heading,pitch,roll,f,px,py\n", "of RealityCapture: "),
        ("sparse/0/cameras.txt", "", "COLMAP model: latentscenes data photos"),
        ("car/sparse/0/cameras.txt", "", "car holds a COLMAP model: latentscenes data photos"),
        ("models.csv", "file,name\n", "even in subfolders.$"),
    ],
)
def test_exports_that_must_be_converted_are_named(place, content, told, tmp_path):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(content)
    with pytest.raises(UserError, match=rf"no transforms\.json .*{told}"):
        make_transforms(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("ending", ["_mask.png", ".png.mask.png"])
def test_masks_named_by_other_programs(ending, plain, tmp_path):
    shutil.copytree(CASES / "16-colmap" / "plain", tmp_path / "in")
    masks = list((tmp_path / "in" / "thing" / "masks").iterdir())
    for mask in masks:
        mask.rename(mask.with_name(mask.name.split(".")[0] + ending))
    make_photos(tmp_path / "in", tmp_path / "out", size=48)
    assert np.array_equal(images(tmp_path / "out"), plain)
