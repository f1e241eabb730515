"""Importers against pictures and cameras that the tests draw themselves, in every layout that is read."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import SHARED
from drawn_scenes import (
    SIDE,
    around,
    holds_ellipsoid,
    pictures,
    same_cameras,
    silhouettes,
    write_object,
    write_transforms,
)
from PIL import Image

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, spread
from latentscenes.data.images import over_white, white_background
from latentscenes.data.importing import ImportOptions
from latentscenes.data.srn import make_srn
from latentscenes.data.transforms import make_transforms

DATA = SHARED / "data"

# ShapeNet-SRN


def test_srn_cameras_and_pixels_arrive_exactly(tmp_path):
    written = {}
    for seed, name in enumerate(("car_10", "car_9", "car_2")):
        cameras = around(24, seed=seed)
        written[name] = (cameras, pictures(cameras, seed=seed))
        write_object(tmp_path / "cars" / name, *written[name])
    made = make_srn(tmp_path / "cars", tmp_path / "set", options=ImportOptions(new=1, held_out=3))
    views = PosedImages.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["car_2", "car_9", "car_10"]  # natural order
    assert [scene.split for scene in views.scenes] == ["train", "train", "new"]
    assert (made.scenes, made.views, made.size, made.background) == (3, 72, (SIDE, SIDE), "white")
    assert views.alpha is None and views.box == made.box and made.box_from == "fitted to the silhouettes"
    for scene in views.scenes:
        cameras, images = written[scene.name]
        same_cameras(views, scene.views("all"), cameras)
        assert np.array_equal(views.rgb[scene.views("all")], images)
        assert scene.held_out == spread(24, 3)
    holds_ellipsoid(views.box, 0.12)


def test_srn_alpha_is_composited_over_white_and_kept(tmp_path):
    cameras = around(12)
    random = np.random.default_rng(0)
    rgba = random.integers(0, 256, (12, SIDE, SIDE, 4), dtype=np.uint8)
    rgba[..., 3] = np.where(silhouettes(cameras), random.integers(128, 256, (12, SIDE, SIDE)), 0)
    write_object(tmp_path / "one", cameras, rgba)
    made = make_srn(tmp_path / "one", tmp_path / "set")  # a single object's own folder
    views = PosedImages.open(tmp_path / "set")
    assert made.background == "alpha" and [scene.name for scene in views.scenes] == ["one"]
    assert np.array_equal(views.alpha, rgba[..., 3])
    share = rgba[..., 3:] / 255.0
    assert np.abs(views.rgb - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 0.5 + 1e-9


def test_srn_silhouettes_from_white_can_be_stored(tmp_path):
    cameras = around(12)
    images = pictures(cameras)
    masks = silhouettes(cameras)
    images[:, SIDE // 2 - 1 : SIDE // 2 + 1, SIDE // 2 : SIDE // 2 + 2] = (
        255  # a white patch inside the object
    )
    assert masks[:, SIDE // 2 - 2 : SIDE // 2 + 2, SIDE // 2 - 1 : SIDE // 2 + 3].all()
    write_object(tmp_path / "one", cameras, images)
    make_srn(tmp_path / "one", tmp_path / "set", options=ImportOptions(alpha_from_white=True))
    assert np.array_equal(PosedImages.open(tmp_path / "set").alpha, np.where(masks, 255, 0))


def test_srn_intrinsics_count_for_the_size_they_state(tmp_path):
    cameras = around(8)
    # a 48 px image whose intrinsics are stated for 512: focal 1.1, principal point (0.48, 0.53) of the image
    text = f"{1.1 * 512} {0.48 * 512} {0.53 * 512} 0.\n0. 0. 0.\n1.\n512 512\n"
    write_object(tmp_path / "one", cameras, pictures(cameras), text)
    make_srn(tmp_path / "one", tmp_path / "set")
    assert torch.allclose(
        PosedImages.open(tmp_path / "set").cameras.intrinsics,
        torch.tensor([1.1, 1.1, 0.48, 0.53]).expand(8, 4),
    )
    # a last line that is wrong is noticed, and can be overruled
    (tmp_path / "one" / "intrinsics.txt").write_text(text.replace("512 512", "128 128"))
    with pytest.raises(UserError, match=r"intrinsics.txt: the principal point.*--intrinsics-size"):
        make_srn(tmp_path / "one", tmp_path / "wrong")
    make_srn(tmp_path / "one", tmp_path / "right", intrinsics_size=512)
    assert torch.allclose(
        PosedImages.open(tmp_path / "right").cameras.intrinsics[0], torch.tensor([1.1, 1.1, 0.48, 0.53])
    )


def test_srn_above_keeps_views_higher_than_minus_a_half(tmp_path):
    cameras = around(30, lowest=-math.pi / 2)
    keep = cameras.positions[:, 2] > -0.5
    assert 5 < int(keep.sum()) < 25
    write_object(tmp_path / "one", cameras, pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", above=True)
    views = PosedImages.open(tmp_path / "set")
    same_cameras(views, list(range(int(keep.sum()))), cameras[keep.nonzero().ravel()])
    assert np.array_equal(views.rgb, pictures(cameras)[keep.numpy()])


def test_eg3d_labels(tmp_path):
    labels, written = [], {}
    for seed, name in enumerate(("b", "a")):
        cameras = around(8, seed=seed)
        written[name] = (cameras, pictures(cameras, seed=seed))
        (tmp_path / "export" / name).mkdir(parents=True)
        for place, image in enumerate(written[name][1]):
            Image.fromarray(image).save(tmp_path / "export" / name / f"{place}.png")
            pose = [*cameras.cam2world[place].reshape(-1).tolist(), 0, 0, 0, 1]
            labels.append([f"{name}/{place}.png", [*pose, 1.025, 0, 0.5, 0, 1.025, 0.5, 0, 0, 1]])
    (tmp_path / "export" / "dataset.json").write_text(json.dumps({"labels": labels}))
    make_srn(tmp_path / "export", tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["a", "b"]
    for scene in views.scenes:
        same_cameras(views, scene.views("all"), written[scene.name][0])
        assert np.array_equal(views.rgb[scene.views("all")], written[scene.name][1])
    labels[3][1] = labels[3][1][:24]
    (tmp_path / "export" / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match="b/3.png has 24 numbers; a label has 25"):
        make_srn(tmp_path / "export", tmp_path / "other")
    (tmp_path / "export" / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="dataset.json: must hold"):
        make_srn(tmp_path / "export", tmp_path / "other")


# Nerfstudio and Blender


def test_blender_test_frames_are_held_out(tmp_path):
    fit, val, test = around(10, seed=1), around(3, seed=3), around(4, seed=2)
    scene = tmp_path / "bulldozer"
    write_transforms(scene, fit, pictures(fit, seed=1), "transforms_train.json", "train")
    write_transforms(scene, val, pictures(val, seed=3), "transforms_val.json", "val")
    write_transforms(scene, test, pictures(test, seed=2), "transforms_test.json", "test")
    made = make_transforms(scene, tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    (only,) = views.scenes
    assert only.name == "bulldozer" and only.held_out == (10, 11, 12, 13)
    assert any("transforms_val.json not used" in note for note in made.notes)
    same_cameras(views, only.views("fit"), fit)
    same_cameras(views, only.views("held_out"), test)
    assert np.array_equal(views.rgb[10:], pictures(test, seed=2))
    make_transforms(scene, tmp_path / "val", held_out_from="val")
    assert np.array_equal(PosedImages.open(tmp_path / "val").rgb[10:], pictures(val, seed=3))
    make_transforms(scene, tmp_path / "none", held_out_from="none", options=ImportOptions(held_out=2))
    assert PosedImages.open(tmp_path / "none").scenes[0].held_out == spread(10, 2)
    (scene / "transforms_val.json").unlink()
    with pytest.raises(UserError, match="transforms_val.json: no such file"):
        make_transforms(scene, tmp_path / "again", held_out_from="val")


def test_nerfstudio_intrinsics_and_a_folder_of_scenes(tmp_path):
    cameras = around(10)
    intrinsics = torch.tensor([1.2, 1.1, 0.45, 0.55]).expand(10, 4).contiguous()
    cameras = Cameras(cameras.cam2world, intrinsics)
    top = {
        "w": 96,
        "h": 96,
        "fl_x": 1.2 * 96,
        "fl_y": 1.1 * 96,
        "cx": 0.45 * 96,
        "cy": 0.55 * 96,
        "k1": 0.0,
        "camera_model": "OPENCV",
    }
    for name in ("one", "two"):
        write_transforms(tmp_path / "scenes" / name, cameras, pictures(cameras), **top)
    made = make_transforms(
        tmp_path / "scenes", tmp_path / "set", options=ImportOptions(box="0,0,0,0.6,0.5,0.4", held_out=2)
    )
    views = PosedImages.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["one", "two"] and made.box == Box(
        (0.0, 0.0, 0.0), (0.6, 0.5, 0.4)
    )
    same_cameras(views, list(range(10)), cameras)
    # the same stated per frame
    file = tmp_path / "scenes" / "two" / "transforms.json"
    frames = json.loads(file.read_text())["frames"]
    file.write_text(json.dumps({"frames": [{**frame, **top} for frame in frames]}))
    make_transforms(tmp_path / "scenes" / "two", tmp_path / "frames")
    same_cameras(PosedImages.open(tmp_path / "frames"), list(range(10)), cameras)


def test_angle_of_view_of_an_oblong_image(tmp_path):
    cameras = around(6)
    images = np.zeros((6, 20, 40, 3), np.uint8)
    write_transforms(tmp_path / "one", cameras, images, camera_angle_x=math.pi / 2)
    made = make_transforms(tmp_path / "one", tmp_path / "set")
    # 90 degrees over the width: focal half the width, that is, once the height
    assert torch.allclose(
        PosedImages.open(tmp_path / "set").cameras.intrinsics[0], torch.tensor([0.5, 1.0, 0.5, 0.5])
    )
    assert made.background == "unknown" and "cameras see" in made.box_from
    assert made.box.half[0] == pytest.approx(1.3 * 1.0, rel=0.01)  # at distance 1.3, half the width is 1.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k4": 0.1, "camera_angle_x": 0.9}, "k4 = 0.1 means different things.*Undistort"),
        ({"k1": -9.0, "camera_angle_x": 0.9}, "k1 = -9 shows places twice"),
        ({"k1": 9.0, "camera_angle_x": 0.9}, "k1 = 9 shows places twice or not at all"),
        ({"k1": "wide", "camera_angle_x": 0.9}, "k1, k2, k3, p1, p2 must be numbers"),
        ({"x_fov": 0.9, "camera_angle_x": 0.9}, "camera_angle_x = 0.9 and x_fov = 0.9 contradict"),
        ({"x_fov": 180}, "x_fov = 180 must lie between 0 and 180 degrees"),
        ({"camera_model": "OPENCV_FISHEYE", "camera_angle_x": 0.9}, "no pinhole camera"),
        ({"aabb_scale": 1}, "no focal length"),
        ({"camera_angle_x": 60}, "must lie between 0 and pi"),
        ({"fl_x": "wide"}, "must be numbers"),
        ({"fl_x": 40.0, "w": 96, "h": 48}, "another shape"),
        ({"fl_x": -40.0, "w": 48, "h": 48}, "focal lengths"),
        ({"fl_x": 40.0, "w": 48, "h": 48, "cx": 240.0}, "principal point"),
    ],
)
def test_transforms_that_cannot_be_used(tmp_path, change, message):
    cameras = around(4)
    write_transforms(tmp_path / "one", cameras, pictures(cameras), **change)
    with pytest.raises(UserError, match=rf"transforms.json: frame 0.*{message}"):
        make_transforms(tmp_path / "one", tmp_path / "set")


@pytest.mark.parametrize("start", ["C:\\Users\\me\\shoe\\", "/home/me/shoe/", "D:/shoe/"])
def test_transforms_with_absolute_paths_of_another_machine(tmp_path, start):
    cameras = around(4)
    write_transforms(tmp_path / "one", cameras, pictures(cameras), rotation=0.3, camera_angle_x=0.9)
    file = tmp_path / "one" / "transforms.json"
    meta = json.loads(file.read_text())
    for number, frame in enumerate(meta["frames"]):
        frame |= {"file_path": f"{start}images/r_{number}.png", "sharpness": 7.0}
    file.write_text(json.dumps(meta))
    made = make_transforms(tmp_path / "one", tmp_path / "set", options=ImportOptions(held_out=1))
    assert PosedImages.open(tmp_path / "set").scenes[0].count == 4
    assert not [note for note in made.notes if "not used" in note]


def test_transforms_with_absent_images_or_bad_matrices(tmp_path):
    cameras = around(4)
    write_transforms(tmp_path / "one", cameras, pictures(cameras))
    file = tmp_path / "one" / "transforms.json"
    meta = json.loads(file.read_text())
    (tmp_path / "one" / "images" / "r_2.png").rename(tmp_path / "kept.png")
    made = make_transforms(tmp_path / "one", tmp_path / "three", options=ImportOptions(held_out=1))
    assert any("left out, as their images are absent" in note and "r_2" in note for note in made.notes)
    assert PosedImages.open(tmp_path / "three").scenes[0].count == 3
    (tmp_path / "one" / "images" / "r_3.png").rename(tmp_path / "kept_3.png")
    with pytest.raises(UserError, match="r_2: no such image.* 2 of 4 that transforms.json lists are absent"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    (tmp_path / "kept_3.png").rename(tmp_path / "one" / "images" / "r_3.png")
    (tmp_path / "kept.png").rename(tmp_path / "one" / "images" / "r_2.png")
    meta["frames"][1]["transform_matrix"] = [[1, 2], [3]]
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"frame 1 .*4 rows of 4"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    del meta["frames"][1]["file_path"]
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match="frame 1 has no file_path"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    file.write_text("{")
    with pytest.raises(UserError, match="not a readable JSON"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    file.unlink()
    with pytest.raises(UserError, match="no transforms.json"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    assert not (tmp_path / "set").exists()


# Shared data


def inside_the_box(views: PosedImages, masks: np.ndarray) -> None:
    """Every silhouette lies within the convex outline of the box's eight corners, seen by the same camera."""
    corners = torch.tensor(views.box.center) + torch.cartesian_prod(
        *[torch.tensor([-1.0, 1.0])] * 3
    ) * torch.tensor(views.box.half)
    places, depth = views.cameras.project(corners)
    assert (depth > 0).all()
    height, width = views.size
    for mask, outline in zip(masks, places.double().numpy() * [width, height], strict=True):
        row, column = np.nonzero(mask)
        pixels = np.stack([column + 0.5, row + 0.5], -1)
        for direction in np.linspace(0, 2 * math.pi, 64, endpoint=False):  # supporting lines all around
            normal = np.array([math.cos(direction), math.sin(direction)])
            assert (pixels @ normal).max() <= (outline @ normal).max() + 1e-6


@pytest.mark.skipif(not (DATA / "lego").is_dir(), reason="shared data (lego) is absent")
def test_lego(tmp_path):
    made = make_transforms(DATA / "lego", tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    (scene,) = views.scenes
    assert (
        len(scene.views("fit")) == 100 and len(scene.views("held_out")) == 200 and made.background == "alpha"
    )
    assert torch.allclose(
        views.cameras.intrinsics[0, 0], torch.tensor(0.5 / math.tan(0.6911112070083618 / 2))
    )
    inside_the_box(views, views.alpha > 127)
    assert max(views.box.half) < 1.3  # the model is 2.3 long
    with Image.open(DATA / "lego" / "train" / "r_10.png") as image:
        pixels = np.asarray(image)
    assert np.array_equal(views.alpha[10], pixels[..., 3]) and np.array_equal(
        views.rgb[10], over_white(pixels)
    )


@pytest.mark.skipif(not (DATA / "srn_sample").is_dir(), reason="shared data (srn_sample) is absent")
def test_srn_sample(tmp_path):
    made = make_srn(DATA / "srn_sample", tmp_path / "set", options=ImportOptions(new=2))
    views = PosedImages.open(tmp_path / "set")
    assert (made.scenes, made.views, made.size) == (8, 240, (128, 128))
    assert torch.allclose(
        views.cameras.intrinsics, torch.tensor([1.0253906, 1.0253906, 0.5, 0.5]).expand(240, 4)
    )
    inside_the_box(views, ~white_background(views.rgb))
    assert 0.4 < views.box.half[0] < 0.52 and max(views.box.half[1:]) < 0.3  # bounding-box diagonal 1


def test_lists_of_nerfstudio_mean_what_they_mean_there(tmp_path):
    cameras = around(14)
    lists = {
        "train_filenames": [f"images/r_{k}" for k in range(8)],
        "val_filenames": ["images\\r_8"],
        "test_filenames": ["./images/r_9", "./images/r_12"],
    }
    lens = {"camera_angle_x": 2 * math.atan(0.5 / 1.025)}
    write_transforms(tmp_path / "one", cameras, pictures(cameras), **lens, **lists)
    made = make_transforms(tmp_path / "one", tmp_path / "set")
    views = PosedImages.open(tmp_path / "set")
    assert views.scenes[0].count == 10 and views.scenes[0].held_out == (8, 9)
    same_cameras(views, views.scenes[0].views("all"), cameras[torch.tensor([*range(8), 9, 12])])
    assert any("no list that is used names them: 4 frames" in note for note in made.notes)
    make_transforms(tmp_path / "one", tmp_path / "val", held_out_from="val")
    assert PosedImages.open(tmp_path / "val").scenes[0].held_out == (8,)

    write_transforms(tmp_path / "two", cameras, pictures(cameras), **lens, val_filenames=["images/r_99"])
    with pytest.raises(UserError, match=r"val_filenames lists images/r_99, which is no frame's file_path"):
        make_transforms(tmp_path / "two", tmp_path / "no")
    write_transforms(tmp_path / "three", cameras, pictures(cameras), **lens, val_filenames=["images/r_3"])
    with pytest.raises(UserError, match="has no test_filenames"):
        make_transforms(tmp_path / "three", tmp_path / "no", held_out_from="test")
    write_transforms(tmp_path / "four", cameras, pictures(cameras), **lens, train_filenames=7)
    with pytest.raises(UserError, match="train_filenames must be a list"):
        make_transforms(tmp_path / "four", tmp_path / "no")
