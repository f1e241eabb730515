"""Importers against pictures and cameras that the tests draw themselves, in every layout that is read."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentscenes.cameras import OPENGL_TO_OPENCV, Box, Cameras, look_at, upper_hemisphere
from latentscenes.datasets.boxes import fit_box, parse_box
from latentscenes.datasets.camera_checks import check_cameras
from latentscenes.datasets.images import over_white, read_image, white_background
from latentscenes.datasets.importing import Options
from latentscenes.datasets.splits import choose_splits, natural_key, read_split
from latentscenes.datasets.srn import download_cars, make_srn
from latentscenes.datasets.transforms import make_transforms
from latentscenes.errors import UserError
from latentscenes.views import Views, spread

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SIDE = 48
CENTER, SEMI = np.array([0.05, -0.04, 0.08]), np.array([0.42, 0.2, 0.15])
"""The ellipsoid that is drawn."""


def around(count: int, lowest: float = 0.0, seed: int = 0) -> Cameras:
    return upper_hemisphere(count, torch.Generator().manual_seed(seed), lowest=lowest)


def silhouettes(cameras: Cameras, side: int = SIDE, center=CENTER, semi=SEMI) -> np.ndarray:
    """Where each camera sees the ellipsoid, by intersecting rays with it (v side side booleans)."""
    pixel = (np.arange(side) + 0.5) / side
    masks = []
    for matrix, (fx, fy, cx, cy) in zip(cameras.cam2world.double().numpy(), cameras.intrinsics.double().numpy(), strict=True):
        x, y = np.meshgrid((pixel - cx) / fx, (pixel - cy) / fy)
        direction = np.stack([x, y, np.ones_like(x)], -1) @ matrix[:, :3].T / semi
        origin = (matrix[:, 3] - center) / semi
        along, squared = direction @ origin, (direction**2).sum(-1)
        masks.append(along**2 - squared * (origin @ origin - 1) > 0)
    return np.stack(masks)


def pictures(cameras: Cameras, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """The ellipsoid in random colours, on white (v side side 3)."""
    colours = np.random.default_rng(seed).integers(0, 240, (len(cameras), side, side, 3), dtype=np.uint8)
    return np.where(silhouettes(cameras, side)[..., None], colours, np.uint8(255))


def write_object(folder: Path, cameras: Cameras, images: np.ndarray, intrinsics: str | None = None) -> None:
    """One object in ShapeNet-SRN's layout."""
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / "rgb" / f"{place:06d}.png")
        numbers = [*cameras.cam2world[place].reshape(-1).tolist(), 0.0, 0.0, 0.0, 1.0]
        (folder / "pose" / f"{place:06d}.txt").write_text(" ".join(repr(number) for number in numbers))
    focal = 1.025 * SIDE
    (folder / "intrinsics.txt").write_text(intrinsics or f"{focal} {SIDE / 2} {SIDE / 2} 0.\n0. 0. 0.\n1.\n{SIDE} {SIDE}\n")


def write_transforms(
    folder: Path, cameras: Cameras, images: np.ndarray, name: str = "transforms.json", part: str = "images", **top
) -> None:
    """One scene, or one part of it, in nerfstudio's and Blender's layout."""
    (folder / part).mkdir(parents=True)
    frames = []
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / part / f"r_{place}.png")
        matrix = torch.eye(4)
        matrix[:3] = cameras.cam2world[place]
        matrix[:3, :3] = matrix[:3, :3] @ OPENGL_TO_OPENCV
        frames.append({"file_path": f"./{part}/r_{place}", "transform_matrix": matrix.tolist()})
    top = top or {"camera_angle_x": 2 * math.atan(0.5 / 1.025)}
    (folder / name).write_text(json.dumps({**top, "frames": frames}))


def same_cameras(views: Views, index: list[int], cameras: Cameras) -> None:
    found = views.cameras[torch.tensor(index)]
    assert torch.equal(found.cam2world, cameras.cam2world)
    assert torch.allclose(found.intrinsics, cameras.intrinsics, atol=1e-6)


def holds_ellipsoid(box: Box, slack: float) -> None:
    """The box reaches as far as the ellipsoid, and at most `slack` farther."""
    low, high = np.subtract(box.center, box.half), np.add(box.center, box.half)
    assert (low <= CENTER - SEMI).all() and (high >= CENTER + SEMI).all(), box
    assert (low >= CENTER - SEMI - slack).all() and (high <= CENTER + SEMI + slack).all(), box


# -- ShapeNet-SRN ------------------------------------------------------------------------------------------------------


def test_srn_cameras_and_pixels_arrive_exactly(tmp_path):
    written = {}
    for seed, name in enumerate(("car_10", "car_9", "car_2")):
        cameras = around(24, seed=seed)
        written[name] = (cameras, pictures(cameras, seed=seed))
        write_object(tmp_path / "cars" / name, *written[name])
    calls = []
    made = make_srn(
        tmp_path / "cars", tmp_path / "set", options=Options(new=1, held_out=3), progress=lambda *call: calls.append(call)
    )
    views = Views.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["car_2", "car_9", "car_10"]  # natural order
    assert [scene.split for scene in views.scenes] == ["train", "train", "new"]
    assert (made.scenes, made.views, made.size, made.background) == (3, 72, (SIDE, SIDE), "white")
    assert views.alpha is None and views.box == made.box and made.box_from == "fitted to the silhouettes"
    assert calls == [(0, 3, "car_2"), (1, 3, "car_9"), (2, 3, "car_10"), (3, 3, "")]
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
    views = Views.open(tmp_path / "set")
    assert made.background == "alpha" and [scene.name for scene in views.scenes] == ["one"]
    assert np.array_equal(views.alpha, rgba[..., 3])
    share = rgba[..., 3:] / 255.0
    assert np.abs(views.rgb - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 0.5 + 1e-9


def test_srn_silhouettes_from_white_can_be_stored(tmp_path):
    cameras = around(12)
    images = pictures(cameras)
    masks = silhouettes(cameras)
    images[:, SIDE // 2 - 1 : SIDE // 2 + 1, SIDE // 2 : SIDE // 2 + 2] = 255  # a white patch inside the object
    assert masks[:, SIDE // 2 - 2 : SIDE // 2 + 2, SIDE // 2 - 1 : SIDE // 2 + 3].all()
    write_object(tmp_path / "one", cameras, images)
    make_srn(tmp_path / "one", tmp_path / "set", options=Options(alpha_from_white=True))
    assert np.array_equal(Views.open(tmp_path / "set").alpha, np.where(masks, 255, 0))


def test_srn_intrinsics_count_for_the_size_they_state(tmp_path):
    cameras = around(8)
    # a 48 px image whose intrinsics are stated for 512: focal 1.1, principal point (0.48, 0.53) of the image
    text = f"{1.1 * 512} {0.48 * 512} {0.53 * 512} 0.\n0. 0. 0.\n1.\n512 512\n"
    write_object(tmp_path / "one", cameras, pictures(cameras), text)
    make_srn(tmp_path / "one", tmp_path / "set")
    assert torch.allclose(Views.open(tmp_path / "set").cameras.intrinsics, torch.tensor([1.1, 1.1, 0.48, 0.53]).expand(8, 4))
    # a last line that is wrong is noticed, and can be overruled
    (tmp_path / "one" / "intrinsics.txt").write_text(text.replace("512 512", "128 128"))
    with pytest.raises(UserError, match=r"intrinsics.txt: the principal point.*intrinsics_size"):
        make_srn(tmp_path / "one", tmp_path / "wrong")
    make_srn(tmp_path / "one", tmp_path / "right", intrinsics_size=512)
    assert torch.allclose(Views.open(tmp_path / "right").cameras.intrinsics[0], torch.tensor([1.1, 1.1, 0.48, 0.53]))


def test_srn_above_keeps_views_higher_than_minus_a_half(tmp_path):
    cameras = around(30, lowest=-math.pi / 2)
    keep = cameras.positions[:, 2] > -0.5
    assert 5 < int(keep.sum()) < 25
    write_object(tmp_path / "one", cameras, pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", above=True)
    views = Views.open(tmp_path / "set")
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
    views = Views.open(tmp_path / "set")
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


# -- nerfstudio and Blender --------------------------------------------------------------------------------------------


def test_blender_test_frames_are_held_out(tmp_path):
    fit, val, test = around(10, seed=1), around(3, seed=3), around(4, seed=2)
    scene = tmp_path / "bulldozer"
    write_transforms(scene, fit, pictures(fit, seed=1), "transforms_train.json", "train")
    write_transforms(scene, val, pictures(val, seed=3), "transforms_val.json", "val")
    write_transforms(scene, test, pictures(test, seed=2), "transforms_test.json", "test")
    made = make_transforms(scene, tmp_path / "set")
    views = Views.open(tmp_path / "set")
    (only,) = views.scenes
    assert only.name == "bulldozer" and only.held_out == (10, 11, 12, 13)
    assert any("transforms_val.json not used" in note for note in made.notes)
    same_cameras(views, only.views("fit"), fit)
    same_cameras(views, only.views("held_out"), test)
    assert np.array_equal(views.rgb[10:], pictures(test, seed=2))
    make_transforms(scene, tmp_path / "val", held_out_from="val")
    assert np.array_equal(Views.open(tmp_path / "val").rgb[10:], pictures(val, seed=3))
    make_transforms(scene, tmp_path / "none", held_out_from="none", options=Options(held_out=2))
    assert Views.open(tmp_path / "none").scenes[0].held_out == spread(10, 2)
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
    made = make_transforms(tmp_path / "scenes", tmp_path / "set", options=Options(box="0,0,0,0.6,0.5,0.4", held_out=2))
    views = Views.open(tmp_path / "set")
    assert [scene.name for scene in views.scenes] == ["one", "two"] and made.box == Box((0.0, 0.0, 0.0), (0.6, 0.5, 0.4))
    same_cameras(views, list(range(10)), cameras)
    # the same stated per frame
    file = tmp_path / "scenes" / "two" / "transforms.json"
    frames = json.loads(file.read_text())["frames"]
    file.write_text(json.dumps({"frames": [{**frame, **top} for frame in frames]}))
    make_transforms(tmp_path / "scenes" / "two", tmp_path / "frames")
    same_cameras(Views.open(tmp_path / "frames"), list(range(10)), cameras)


def test_angle_of_view_of_an_oblong_image(tmp_path):
    cameras = around(6)
    images = np.zeros((6, 20, 40, 3), np.uint8)
    write_transforms(tmp_path / "one", cameras, images, camera_angle_x=math.pi / 2)
    made = make_transforms(tmp_path / "one", tmp_path / "set")
    # 90 degrees over the width: focal half the width, that is, once the height
    assert torch.allclose(Views.open(tmp_path / "set").cameras.intrinsics[0], torch.tensor([0.5, 1.0, 0.5, 0.5]))
    assert made.background == "unknown" and "cameras see" in made.box_from
    assert made.box.half[0] == pytest.approx(1.3 * 1.0, rel=0.01)  # at distance 1.3, half the width is 1.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0.1, "camera_angle_x": 0.9}, "k1 = 0.1.*Undistort"),
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


def test_transforms_with_absent_images_or_bad_matrices(tmp_path):
    cameras = around(4)
    write_transforms(tmp_path / "one", cameras, pictures(cameras))
    file = tmp_path / "one" / "transforms.json"
    meta = json.loads(file.read_text())
    (tmp_path / "one" / "images" / "r_2.png").rename(tmp_path / "kept.png")
    with pytest.raises(UserError, match="r_2: no such image"):
        make_transforms(tmp_path / "one", tmp_path / "set")
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


# -- mistakes in files -------------------------------------------------------------------------------------------------


def spoil(folder: Path, what: str) -> str:
    """Do one kind of damage to an object; gives what the message must say."""
    image, pose = folder / "rgb" / "000003.png", folder / "pose" / "000003.txt"
    numbers = pose.read_text().split()

    def rewrite(places: dict[int, float]) -> None:
        pose.write_text(" ".join(str(places.get(k, n)) for k, n in enumerate(numbers)))

    match what:
        case "truncated":
            image.write_bytes(image.read_bytes()[:-400])
            return "000003.png: cannot be decoded.*truncated"
        case "no image at all":
            image.write_bytes(b"")
            return "000003.png: is not an image"
        case "absent image":
            image.unlink()
            return "000003.txt: has no image"
        case "absent pose":
            pose.unlink()
            return "000003.png: has no pose"
        case "mixed sizes":
            Image.open(image).resize((SIDE // 2, SIDE)).save(image)
            return rf"000003.png: is {SIDE // 2}x{SIDE} .*images before it {SIDE}x{SIDE}.*Give a size"
        case "fifteen numbers":
            pose.write_text(" ".join(numbers[:15]))
            return "000003.txt: holds 15 numbers.*16"
        case "words":
            pose.write_text("no pose")
            return "000003.txt: must hold 16 numbers"
        case "nan":
            rewrite({5: math.nan})
            return "000003.txt.*NaN"
        case "mirrored":
            rewrite({k: -float(numbers[k]) for k in (1, 5, 9)})
            return "000003.txt.*mirrors.*both the y and the z column"
        case "scaled":
            rewrite({k: 2 * float(numbers[k]) for k in (0, 1, 2, 4, 5, 6, 8, 9, 10)})
            return "000003.txt.*scaled by 2"
        case "sheared":
            rewrite({0: 3.0})
            return "000003.txt.*not a rotation"
        case "transposed":
            matrix = np.array(numbers, float).reshape(4, 4).T
            pose.write_text(" ".join(map(str, matrix.ravel())))
            return "000003.txt.*last row.*transposed"
        case "no intrinsics":
            (folder / "intrinsics.txt").unlink()
            return "intrinsics.txt: no such file"
        case "bad intrinsics":
            (folder / "intrinsics.txt").write_text("focal\n48 48")
            return "intrinsics.txt: the first line must hold focal"
        case "oblong intrinsics":
            (folder / "intrinsics.txt").write_text("49 24 24 0\n48 96")
            return "intrinsics.txt: is stated for 96x48.*another shape"
        case "no poses":
            (folder / "pose").rename(folder / "poses")
            return "pose: no such folder"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    "truncated|no image at all|absent image|absent pose|mixed sizes|fifteen numbers|words|nan|mirrored|scaled|sheared|"
    "transposed|no intrinsics|bad intrinsics|oblong intrinsics|no poses".split("|"),
)  # fmt: skip
def test_damage_is_named_and_nothing_is_left_behind(tmp_path, what):
    cameras = around(6)
    for name in ("a", "b"):
        write_object(tmp_path / "cars" / name, cameras, pictures(cameras))
    message = spoil(tmp_path / "cars" / "b", what)
    with pytest.raises(UserError, match=rf"/b/.*{message}"):
        make_srn(tmp_path / "cars", tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cars"]


def converted(cameras: Cameras, what: str) -> Cameras:
    """Cameras stored by another convention than the one they will be read by."""
    rotation, position = cameras.cam2world[:, :, :3], cameras.cam2world[:, :, 3:]
    if "inverse" in what:
        rotation, position = rotation.mT, -rotation.mT @ position
    if "opengl" in what:
        rotation = rotation @ OPENGL_TO_OPENCV
    return Cameras(torch.cat([rotation, position], -1), cameras.intrinsics)


@pytest.mark.parametrize("box", [None, 0.5])
@pytest.mark.parametrize(
    ("what", "message"), [("opengl", "seem to be opengl ones.*axes='opengl'"), ("inverse", r"world-to-camera matrices.*Invert")]
)
def test_cameras_by_another_convention_are_recognised(tmp_path, what, message, box):
    cameras = around(10)
    write_object(tmp_path / "one", converted(cameras, what), pictures(cameras))
    with pytest.raises(UserError, match=rf"000000.txt.*{message}"):
        make_srn(tmp_path / "one", tmp_path / "set", options=Options(box=box))


def test_opengl_poses_can_be_declared(tmp_path):
    cameras = around(10)
    write_object(tmp_path / "one", converted(cameras, "opengl"), pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", axes="opengl")
    same_cameras(Views.open(tmp_path / "set"), list(range(10)), cameras)


def test_opencv_matrices_in_transforms_are_recognised(tmp_path):
    cameras = around(10)
    write_transforms(tmp_path / "one", converted(cameras, "opengl"), pictures(cameras))
    with pytest.raises(UserError, match=r"frame 0 .*axes='opencv'"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    make_transforms(tmp_path / "one", tmp_path / "set", axes="opencv")
    same_cameras(Views.open(tmp_path / "set"), list(range(10)), cameras)


def test_world_to_camera_matrices_in_transforms_are_recognised(tmp_path):
    cameras = around(10)
    for name, given in (
        ("opengl", converted(converted(cameras, "opengl"), "inverse opengl")),
        ("opencv", converted(cameras, "inverse opengl")),
    ):
        write_transforms(tmp_path / name, given, pictures(cameras))
        with pytest.raises(UserError, match=rf"world-to-camera matrices \(with {name} axes\)"):
            make_transforms(tmp_path / name, tmp_path / "set")


def test_opaque_alpha_is_no_silhouette(tmp_path):
    cameras = around(6)
    images = np.full((6, SIDE, SIDE, 4), 255, np.uint8)
    images[..., :3] = pictures(cameras)
    write_object(tmp_path / "white", cameras, images)
    assert make_srn(tmp_path / "white", tmp_path / "set").background == "white"
    images[..., :3] = 90
    write_object(tmp_path / "photo", cameras, images)
    assert make_srn(tmp_path / "photo", tmp_path / "other").background == "unknown"
    with pytest.raises(UserError, match="do not bound the object.*box="):
        make_srn(tmp_path / "photo", tmp_path / "forced", options=Options(background="alpha"))


def test_scenes_too_large_for_memory_go_through_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("latentscenes.datasets.importing.IN_MEMORY", 1000)
    cameras = around(6)
    write_object(tmp_path / "one", cameras, pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", options=Options(alpha_from_white=True))
    views = Views.open(tmp_path / "set")
    assert np.array_equal(views.rgb, pictures(cameras)) and np.array_equal(views.alpha > 0, silhouettes(cameras))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "set"]


def test_one_camera_that_misses_the_box_is_named():
    cameras = around(5)
    away = look_at(cameras.positions[3:4], torch.tensor([0.0, 0.0, 5.0]))
    cameras = Cameras(torch.cat([cameras.cam2world[:3], away, cameras.cam2world[4:]]), cameras.intrinsics)
    with pytest.raises(UserError, match="view 3: 1 of 5 cameras, this one first, see nothing of the box"):
        check_cameras(cameras, [f"view {k}" for k in range(5)], Box((0.0, 0.0, 0.0), (0.4, 0.4, 0.4)))
    inside = Cameras(look_at(torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([3.0, 0, 0])), cameras.intrinsics[:1])
    check_cameras(inside, ["inside"], Box((0.0, 0.0, 0.0), (0.4, 0.4, 0.4)))  # a camera within the box sees it


def test_images_of_other_objects_are_noticed(tmp_path):
    cameras = around(10)
    masks = silhouettes(cameras, center=np.array([0.4, 0.0, 0.0]), semi=0.3 * SEMI)
    images = np.where(masks[..., None], np.zeros(3, np.uint8), np.uint8(255))
    write_object(tmp_path / "one", cameras, np.roll(images, 5, axis=0))
    with pytest.raises(UserError, match="do not belong together"):
        make_srn(tmp_path / "one", tmp_path / "set")


def test_empty_and_wrong_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    for make in (make_srn, make_transforms):
        with pytest.raises(UserError, match="is empty"):
            make(tmp_path / "empty", tmp_path / "set")
        with pytest.raises(UserError, match="no such folder"):
            make(tmp_path / "nowhere", tmp_path / "set")
    cameras = around(3)
    write_object(tmp_path / "srn_cars" / "cars_train" / "a", cameras, pictures(cameras))
    with pytest.raises(UserError, match="It holds collections: .*cars_train"):
        make_srn(tmp_path / "srn_cars", tmp_path / "set")


# -- images, sizes, splits ---------------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (5, 7), dtype=np.uint8)
    three = np.repeat(grey[..., None], 3, -1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    Image.fromarray(three).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(np.stack([grey, 255 - grey], -1)).save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.full((16, 16, 3), 93, np.uint8)).save(tmp_path / "photo.jpg", quality=95)
    assert Image.open(tmp_path / "grey16.png").mode.startswith("I")
    for name in ("grey.png", "grey16.png"):
        rgb, alpha = read_image(tmp_path / name)
        assert alpha is None and np.array_equal(rgb, three), name
    rgb, alpha = read_image(tmp_path / "grey_alpha.png")
    assert np.array_equal(alpha, 255 - grey) and np.array_equal(rgb, over_white(np.dstack([three, 255 - grey])))
    assert np.abs(read_image(tmp_path / "photo.jpg")[0].astype(int) - 93).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "clear.png", transparency=1)
    rgb, alpha = read_image(tmp_path / "clear.png")
    assert rgb.tolist() == [[[255, 0, 0], [255, 255, 255]]] and alpha.tolist() == [[255, 0]]


def test_resizing_averages(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    means = image.reshape(4, 3, 6, 3, 3).mean((1, 3))
    assert np.abs(read_image(tmp_path / "a.png", (4, 6))[0] - means).max() < 0.6
    with pytest.raises(UserError, match="18x12 .*smaller than the wanted 24x12"):
        read_image(tmp_path / "a.png", (12, 24))


def test_datasets_at_other_sizes(tmp_path):
    cameras = around(8)
    write_object(tmp_path / "one", cameras, pictures(cameras))
    for name, options in (("size", Options(size=SIDE // 2)), ("reduce", Options(reduce=2))):
        make_srn(tmp_path / "one", tmp_path / name, options=options)
        views = Views.open(tmp_path / name)
        means = pictures(cameras).reshape(8, SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
        assert np.abs(views.rgb - means).max() <= 0.51
        same_cameras(views, list(range(8)), cameras)
    Image.fromarray(np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)).save(tmp_path / "one" / "rgb" / "000005.png")
    with pytest.raises(UserError, match="000005.png.*Give a size"):
        make_srn(tmp_path / "one", tmp_path / "mixed")
    make_srn(tmp_path / "one", tmp_path / "same", options=Options(size=(SIDE, SIDE), background="unknown"))
    assert (Views.open(tmp_path / "same").rgb[5] == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32, "reduce": 2}, "both given"),
        ({"reduce": 0}, "whole number"),
        ({"size": 4096}, "smaller than the wanted"),
        ({"box": "1,2,3"}, "give a half side"),
        ({"box": -1.0}, "give a half side"),
        ({"new": 2}, "there are 1 scenes"),
        ({"held_out": 6}, "scene 'one': .*hold out fewer"),
        ({"held_out": -1}, "0 or more"),
        ({"background": "alpha"}, "000000.png: has no alpha"),
        ({"limit": 0}, "at least one"),
    ],
)
def test_options_that_contradict(tmp_path, options, message):
    cameras = around(6)
    write_object(tmp_path / "one", cameras, pictures(cameras))
    with pytest.raises(UserError, match=message):
        make_srn(tmp_path / "one", tmp_path / "set", options=Options(**options))
    assert not (tmp_path / "set").exists()


def test_splits(tmp_path):
    names = ["b_10", "b_9", "a"]
    assert sorted(names, key=natural_key) == ["a", "b_9", "b_10"]
    assert choose_splits(names, new=1) == {"a": "train", "b_9": "train", "b_10": "new"}
    file = tmp_path / "split.json"
    file.write_text('{"train": ["b_10"], "new": ["a"]}')
    assert list(choose_splits(names, file).items()) == [("a", "new"), ("b_10", "train")]
    for text, message in (
        ('{"train": ["b_11"]}', "lists scene 'b_11', which is not among the 3 found; did you mean 'b_10'"),
        ('{"train": ["a"], "new": ["a"]}', "twice"),
        ('{"train": ["a"], "test": ["b_9"]}', "a split file looks like"),
        ('{"train": "a"}', "a split file looks like"),
        ('{"train": []}', "no scene at all"),
        ("[", "not a readable JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape("split.json") + f".*{message}"):
            read_split(file, names)
    with pytest.raises(UserError, match="no such split file"):
        read_split(tmp_path / "none.json", names)


def test_a_split_file_says_what_it_leaves_out(tmp_path):
    cameras = around(6)
    for name in "abc":
        write_object(tmp_path / "cars" / name, cameras, pictures(cameras))
    (tmp_path / "split.json").write_text('{"train": ["c"], "new": ["a"]}')
    made = make_srn(tmp_path / "cars", tmp_path / "set", options=Options(split=tmp_path / "split.json"))
    assert [(scene.name, scene.split) for scene in Views.open(tmp_path / "set").scenes] == [("a", "new"), ("c", "train")]
    assert any("1 of 3 scenes" in note for note in made.notes)


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_box_recovers_an_ellipsoid():
    cameras = around(40, lowest=-math.pi / 2)
    box = fit_box([("e", silhouettes(cameras, 128), cameras)])
    voxel = 2 * SEMI / 64  # of the last grid, and the margin is 1.5 of them; pixels are 0.01 wide at the object
    low, high = np.subtract(box.center, box.half), np.add(box.center, box.half)
    assert (np.abs(low + 1.5 * voxel - (CENTER - SEMI)) < voxel + 0.01).all()
    assert (np.abs(high - 1.5 * voxel - (CENTER + SEMI)) < voxel + 0.01).all()
    holds_ellipsoid(box, 0.04)


def test_box_survives_a_bad_silhouette_and_views_from_above_only():
    cameras = around(40)
    masks = silhouettes(cameras, 128)
    masks[7] = False
    holds_ellipsoid(fit_box([("e", masks, cameras)]), 0.05)


def test_box_of_objects_that_images_cut_off():
    cameras = around(30, lowest=-math.pi / 2)
    close = Cameras(cameras.cam2world, cameras.intrinsics * torch.tensor([1.4, 1.4, 1, 1]))
    masks = silhouettes(close, 128)
    assert masks[:, :, [0, -1]].any()
    holds_ellipsoid(fit_box([("e", masks, close)]), 0.06)


def test_box_holds_all_objects():
    cameras = around(30, lowest=-math.pi / 2)
    other = np.array([-0.3, 0.3, 0.0])
    box = fit_box([("a", silhouettes(cameras, 96), cameras), ("b", silhouettes(cameras, 96, other, np.full(3, 0.1)), cameras)])
    expected = np.stack([np.minimum(CENTER - SEMI, other - 0.1), np.maximum(CENTER + SEMI, other + 0.1)])
    found = np.stack([np.subtract(box.center, box.half), np.add(box.center, box.half)])
    assert np.abs(found - expected).max() < 0.05 and (found[0] <= expected[0]).all() and (found[1] >= expected[1]).all()


def test_boxes_by_hand():
    assert parse_box("0.5") == parse_box(0.5) == Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    assert parse_box("1,2,3,4,5,6") == Box((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def test_white_background_is_what_touches_the_border():
    image = np.full((1, 9, 9, 3), 255, np.uint8)
    image[0, 2:7, 2:7] = 0
    image[0, 3:6, 3:6] = 255  # a hole, not background
    assert (~white_background(image))[0].sum() == 25
    image[0, 4, 2] = 251  # an opening
    assert (~white_background(image))[0].sum() == 25 - 9 - 1


# -- the published archive ---------------------------------------------------------------------------------------------


def test_download_unpacks_and_says_what_failed(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "cars.zip", "w") as archive:
        archive.writestr("cars_train/a/intrinsics.txt", "x")
    found = download_cars(tmp_path / "cars", url=(tmp_path / "cars.zip").as_uri())
    assert found == tmp_path / "cars" / "cars_train" and (found / "a" / "intrinsics.txt").is_file()
    with pytest.raises(UserError, match="exists already"):
        download_cars(tmp_path / "cars")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cars.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match="not a whole zip archive"):
        download_cars(tmp_path / "new", url=(tmp_path / "cut.zip").as_uri())
    with pytest.raises(UserError, match="cannot be reached.*by hand"):
        download_cars(tmp_path / "new", url="http://127.0.0.1:9/cars.zip")
    (tmp_path / "page.html").write_text("quota")
    with pytest.raises(UserError, match="web page instead"):
        download_cars(tmp_path / "new", url=(tmp_path / "page.html").as_uri())
    assert not [entry for entry in tmp_path.iterdir() if "partial" in entry.name]


# -- shared data -------------------------------------------------------------------------------------------------------


def inside_the_box(views: Views, masks: np.ndarray) -> None:
    """Every silhouette lies within the convex outline of the box's eight corners, seen by the same camera."""
    corners = torch.tensor(views.box.center) + torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * torch.tensor(
        views.box.half
    )
    places, depth = views.cameras.project(corners)
    assert (depth > 0).all()
    height, width = views.size
    for mask, outline in zip(masks, places.double().numpy() * [width, height], strict=True):
        row, column = np.nonzero(mask)
        pixels = np.stack([column + 0.5, row + 0.5], -1)
        for direction in np.linspace(0, 2 * math.pi, 64, endpoint=False):  # supporting lines all around
            normal = np.array([math.cos(direction), math.sin(direction)])
            assert (pixels @ normal).max() <= (outline @ normal).max() + 1e-6


@pytest.mark.skipif(not (SHARED / "lego").is_dir(), reason="shared data (lego) is absent")
def test_lego(tmp_path):
    made = make_transforms(SHARED / "lego", tmp_path / "set")
    views = Views.open(tmp_path / "set")
    (scene,) = views.scenes
    assert len(scene.views("fit")) == 100 and len(scene.views("held_out")) == 200 and made.background == "alpha"
    assert torch.allclose(views.cameras.intrinsics[0, 0], torch.tensor(0.5 / math.tan(0.6911112070083618 / 2)))
    inside_the_box(views, views.alpha > 127)
    assert max(views.box.half) < 1.3  # the model is 2.3 long
    with Image.open(SHARED / "lego" / "train" / "r_10.png") as image:
        pixels = np.asarray(image)
    assert np.array_equal(views.alpha[10], pixels[..., 3]) and np.array_equal(views.rgb[10], over_white(pixels))


@pytest.mark.skipif(not (SHARED / "srn_sample").is_dir(), reason="shared data (srn_sample) is absent")
def test_srn_sample(tmp_path):
    made = make_srn(SHARED / "srn_sample", tmp_path / "set", options=Options(new=2))
    views = Views.open(tmp_path / "set")
    assert (made.scenes, made.views, made.size) == (8, 240, (128, 128))
    assert torch.allclose(views.cameras.intrinsics, torch.tensor([1.0253906, 1.0253906, 0.5, 0.5]).expand(240, 4))
    inside_the_box(views, ~white_background(views.rgb))
    assert 0.4 < views.box.half[0] < 0.52 and max(views.box.half[1:]) < 0.3  # bounding-box diagonal 1
