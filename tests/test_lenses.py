"""What transforms.json says beside matrices: focal lengths in every spelling, distortion, masks, moving
cameras, and keys that are not used."""

import json
import math

import numpy as np
import pytest
import torch
from drawn_scenes import SIDE, around, pictures, same_cameras, silhouettes, write_transforms
from PIL import Image

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.importing import ImportOptions
from latentscenes.data.lenses import read_lens
from latentscenes.data.options import Placement
from latentscenes.data.placing import rotation
from latentscenes.data.transforms import make_transforms

FINE = 192
"""Pixels along each side of pictures that are distorted."""


def changed(folder, change):
    """Edits a scene's transforms.json."""
    file = folder / "transforms.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"x_fov": 90.0}, (0.5, 0.5)),
        ({"y_fov": 60.0}, (0.8660254, 0.8660254)),
        ({"x_fov": 90.0, "y_fov": 60.0}, (0.5, 0.8660254)),
        ({"camera_angle_y": math.pi / 2}, (0.5, 0.5)),
        ({"x_fov": 90.0, "fl_x": 24.0, "w": SIDE, "h": SIDE}, (0.5, 0.5)),
    ],
)
def test_angles_of_view_in_every_spelling(tmp_path, top, expected):
    cameras = around(6)
    write_transforms(tmp_path / "one", cameras, pictures(cameras), **top)
    make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(box=0.6, held_out=1))
    found = PosedImages.open(tmp_path / "set").cameras.intrinsics[:, :2]
    assert torch.allclose(found, torch.tensor(expected).expand(6, 2))


def test_focal_lengths_of_a_frame_replace_those_of_its_file(tmp_path):
    cameras = around(6)
    write_transforms(tmp_path / "one", cameras, pictures(cameras), x_fov=20.0, y_fov=20.0)
    changed(tmp_path / "one", lambda content: content["frames"][2].update(x_fov=90.0))
    make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(box=0.6, held_out=1))
    found = PosedImages.open(tmp_path / "set").cameras.intrinsics
    assert found[2, :2].tolist() == pytest.approx([0.5, 0.5])
    assert found[1, :2].tolist() == pytest.approx([0.5 / math.tan(math.pi / 18)] * 2)


def test_a_distorted_lens_is_undone():
    """A picture whose colors are its coordinates shows, after undistortion, where each pixel comes from."""
    side, k1, focal = 200, -0.2, 0.8
    where = ((np.arange(side) + 0.5) / side * 255).astype(np.float32)
    picture = np.stack([*np.meshgrid(where, where), np.zeros((side, side))], -1).round().astype(np.uint8)
    lens = read_lens({"k1": k1}, (focal, focal, 0.5, 0.5), "one")
    assert lens.zoom == 1  # a barrel: its middle covers the whole picture
    found = lens.undistorted(picture)
    for column, row in ((100, 100), (40, 100), (20, 160), (150, 30)):
        x, y = ((column + 0.5) / side - 0.5) / focal, ((row + 0.5) / side - 0.5) / focal
        radial = 1 + k1 * (x * x + y * y)
        expected = [255 * (0.5 + focal * x * radial), 255 * (0.5 + focal * y * radial)]
        assert found[row, column, :2].tolist() == pytest.approx(expected, abs=1.5)
    pincushion = read_lens({"k1": 0.1, "p1": 0.01}, (focal, focal, 0.5, 0.5), "one")
    assert 1.05 < pincushion.zoom < 1.15 and pincushion.pinhole[0] == pytest.approx(focal * pincushion.zoom)
    assert read_lens({"k1": 0, "p1": "0.0", "camera_model": "OPENCV"}, (1.0, 1.0, 0.5, 0.5), "one") is None


def test_tangential_distortion_is_that_of_opencv():
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    numbers = {"k1": 0.05, "k2": -0.02, "k3": 0.01, "p1": 0.004, "p2": -0.006}
    focal, center = (90.0, 110.0), (48.0, 52.0)
    order = [*focal, *center, *(numbers[key] for key in ("k1", "k2", "p1", "p2", "k3")), 0.0, 0.0, 0.0]
    camera = pycolmap.Camera(model="FULL_OPENCV", width=100, height=100, params=order)
    lens = read_lens(numbers, (0.9, 1.1, 0.48, 0.52), "one")
    across, down = np.array([0.1, 0.5, 0.9, 0.3]), np.array([0.2, 0.5, 0.8, 0.9])
    points = np.stack(
        [(across - 0.48) / (0.9 * lens.zoom), (down - 0.52) / (1.1 * lens.zoom), np.ones(4)], -1
    )
    expected = np.stack([camera.img_from_cam(point) for point in points]) / 100
    assert np.allclose(np.stack(lens.places(across, down), -1), expected, atol=1e-9)


def drawn(cameras):
    """The ellipsoid in gray."""
    return np.where(silhouettes(cameras, FINE)[..., None], 60, 255).repeat(3, -1).astype(np.uint8)


def test_distorted_captures_come_in_as_pinhole_pictures(tmp_path):
    """Pictures drawn through a lens give, undone, those drawn without, but for sampling at the outline."""
    cameras, k1 = around(8), 0.15
    straight, focal = drawn(cameras), float(cameras.intrinsics[0, 0])
    sides = (np.arange(FINE) + 0.5) / FINE - 0.5
    across, down = (values / focal for values in np.meshgrid(sides, sides))
    bent = np.hypot(across, down)
    radius = bent.copy()
    for _ in range(50):  # which radius the lens bends to this one
        radius = bent / (1 + k1 * radius**2)
    rows, columns = (
        (focal * values * radius / bent * FINE + FINE / 2).clip(0, FINE - 1).astype(int)
        for values in (down, across)
    )
    lens = {"fl_x": focal * FINE, "w": FINE, "h": FINE, "k1": k1, "camera_model": "SIMPLE_RADIAL"}
    write_transforms(tmp_path / "one", cameras, straight[:, rows, columns], **lens)
    made = make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(held_out=1))
    views = PosedImages.open(tmp_path / "set")
    assert any("8 of 8 images are undistorted, and enlarged by up to" in note for note in made.notes)
    assert focal * 1.05 < float(views.cameras.intrinsics[0, 0]) < focal * 1.15
    truth = drawn(views.cameras) < 128
    assert ((views.rgb < 128) != truth).mean() < 0.25 * ((straight < 128) != truth).mean()


def write_masks(folder, masks, values=(0, 255)):
    (folder / "masks").mkdir()
    for place, mask in enumerate(masks):
        levels = np.where(mask, values[1], values[0]).astype(np.uint8)
        Image.fromarray(levels).save(folder / "masks" / f"r_{place}.png")

    def name_them(content):
        for place, frame in enumerate(content["frames"]):
            frame["mask_path"] = f"masks\\r_{place}.png"

    changed(folder, name_them)


def test_masks_are_silhouettes(tmp_path):
    """Photographs before a gray wall, with masks: as pictures with alpha."""
    cameras = around(8)
    rgb, masks = pictures(cameras), silhouettes(cameras)
    wall = np.where(masks[..., None], rgb, 90).astype(np.uint8)
    write_transforms(tmp_path / "one", cameras, wall)
    write_masks(tmp_path / "one", masks)
    made = make_transforms(tmp_path / "one", tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    assert made.background == "alpha" and "fitted to the silhouettes" in made.box_from
    assert np.array_equal(views.alpha > 127, masks)
    assert np.array_equal(views.rgb, np.where(masks[..., None], rgb, 255))
    same_cameras(views, list(range(8)), cameras)
    small = make_transforms(tmp_path / "one", tmp_path / "small", options=ImportOptions(reduce=2))
    assert small.size == (SIDE // 2, SIDE // 2)
    plain = make_transforms(
        tmp_path / "one", tmp_path / "plain", options=ImportOptions(background="unknown", box=0.6)
    )
    assert np.array_equal(PosedImages.open(tmp_path / "plain").rgb, wall)
    assert any(
        "masks are not used, as the background is taken as unknown: one" in note for note in plain.notes
    )


def test_masks_of_what_moves_are_no_silhouettes(tmp_path):
    cameras = around(6)
    write_transforms(tmp_path / "one", cameras, pictures(cameras) // 2)
    masks = np.ones((6, SIDE, SIDE), bool)
    masks[:, 20:24, 20:24] = False
    write_masks(tmp_path / "one", masks)
    made = make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(box=0.6, held_out=1))
    assert made.background == "unknown" and PosedImages.open(tmp_path / "set").alpha is None
    assert any("masks are not used" in note and "--background alpha" in note for note in made.notes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "masks" / "r_3.png").unlink(), "r_3.png: no such mask, which .*frame 3"),
        (lambda folder: Image.new("L", (9, 9)).save(folder / "masks" / "r_3.png"), "r_3.png: is 9x9"),
        (
            lambda folder: changed(folder, lambda content: content["frames"][3].update(mask_path=7)),
            "must be a file",
        ),
        (
            lambda folder: changed(folder, lambda content: content["frames"][3].pop("mask_path")),
            "r_3.png: has no alpha channel and no mask",
        ),
    ],
)
def test_masks_that_do_not_fit_are_named(tmp_path, spoil, message):
    cameras = around(6)
    write_transforms(tmp_path / "one", cameras, pictures(cameras))
    write_masks(tmp_path / "one", silhouettes(cameras))
    spoil(tmp_path / "one")
    with pytest.raises(UserError, match=message):
        make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(held_out=1))


def test_a_camera_that_moves_during_the_exposure_is_refused(tmp_path):
    cameras = around(6)
    write_transforms(tmp_path / "one", cameras, pictures(cameras))

    def at_rest(content):
        for frame in content["frames"]:
            frame["transform_matrix_start"] = frame["transform_matrix_end"] = frame.pop("transform_matrix")

    changed(tmp_path / "one", at_rest)
    make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(held_out=1))
    same_cameras(PosedImages.open(tmp_path / "set"), list(range(6)), cameras)

    def moving(content):
        content["frames"][4]["transform_matrix_end"][0][3] += 0.1

    changed(tmp_path / "one", moving)
    with pytest.raises(UserError, match="frame 4 .*moves during the exposure"):
        make_transforms(tmp_path / "one", tmp_path / "no")


def test_keys_that_are_not_used_are_named_once(tmp_path):
    cameras = around(6)
    angle = {"camera_angle_x": 2 * math.atan(0.5 / 1.025)}
    extra = {
        "aabb_scale": 4,
        "scale": 0.5,
        "offset": [0, 0, 1],
        "orientation_override": "none",
        "is_hdr": False,
    }
    for name in ("one", "two"):
        write_transforms(tmp_path / "in" / name, cameras, pictures(cameras), **angle, **extra)
        changed(tmp_path / "in" / name, lambda content: content["frames"][0].update(depth_file_path="a.png"))
    Image.new("L", (4, 4)).save(tmp_path / "in" / "one" / "images" / "dynamic_mask_r_0.png")
    made = make_transforms(tmp_path / "in", tmp_path / "set", options=ImportOptions(held_out=1))
    named = [note for note in made.notes if "not used" in note]
    assert "keys that are not used: aabb_scale, depth_file_path, offset, orientation_override, scale" in named
    assert len(named) == 2 and "not used: 1 mask named dynamic_mask_…" in "".join(named)
    changed(tmp_path / "in" / "one", lambda content: content.update(normal_mts_args={}))
    with pytest.raises(UserError, match="Mitsuba's axes"):
        make_transforms(tmp_path / "in", tmp_path / "no")


def test_worlds_with_another_axis_up_are_named_and_turned(tmp_path):
    cameras = around(12)
    for up in ("y", "-z", "x"):
        lying = rotation(up, None, 0.0).T  # turns z to that axis
        turned = cameras.placed(torch.from_numpy(lying.copy()).float())
        folder = tmp_path / f"up{up}"
        write_transforms(folder / "in", Cameras(turned.cam2world, cameras.intrinsics), pictures(cameras))
        made = make_transforms(folder / "in", folder / "set")
        assert any(f"add --up {up}" in note for note in made.notes)
        made = make_transforms(folder / "in", folder / "up", options=ImportOptions(up=up))
        assert not any("--up" in note for note in made.notes)
        found = PosedImages.open(folder / "up").cameras.cam2world
        assert torch.allclose(found, cameras.cam2world, atol=1e-5)


def test_every_axis_turns_up_by_a_rotation():
    for up in ("x", "y", "z", "-x", "-y", "-z"):
        matrix = rotation(up, None, 0.0)
        axis = (-1 if up[0] == "-" else 1) * np.eye(3)["xyz".index(up[-1])]
        assert np.allclose(matrix @ axis, [0, 0, 1]) and np.linalg.det(matrix) == pytest.approx(1)
    assert Placement().up == "auto"
