"""What importers share: damage and mix-ups named, images of every kind, sizes, splits, boxes."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_scenes import (
    CENTER,
    SEMI,
    SIDE,
    around,
    converted,
    holds_ellipsoid,
    pictures,
    same_cameras,
    silhouettes,
    write_object,
    write_transforms,
)
from PIL import Image

from latentscenes.core.cameras import Box, Cameras, look_at
from latentscenes.core.errors import UserError
from latentscenes.data.boxes import fit_box, parse_box
from latentscenes.data.checks import check_cameras
from latentscenes.data.dataset import PosedImages
from latentscenes.data.images import over_white, read_image, white_background
from latentscenes.data.importing import ImportOptions
from latentscenes.data.splits import choose_splits, natural_key, read_split
from latentscenes.data.srn import make_srn
from latentscenes.data.transforms import make_transforms

# Mistakes in files


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
            return rf"000003.png: is {SIDE // 2}x{SIDE} .*earlier images are {SIDE}x{SIDE}.*Give a --size"
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
    "truncated|no image at all|absent image|absent pose|mixed sizes|fifteen "
    "numbers|words|nan|mirrored|scaled|sheared|"
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


@pytest.mark.parametrize("box", [None, 0.5])
@pytest.mark.parametrize(
    ("what", "message"),
    [("opengl", "seem to be opengl ones.*--axes opengl"), ("inverse", r"world-to-camera matrices.*Invert")],
)
def test_cameras_by_another_convention_are_recognized(tmp_path, what, message, box):
    cameras = around(10)
    write_object(tmp_path / "one", converted(cameras, what), pictures(cameras))
    with pytest.raises(UserError, match=rf"000000.txt.*{message}"):
        make_srn(tmp_path / "one", tmp_path / "set", options=ImportOptions(box=box))


def test_opengl_poses_can_be_declared(tmp_path):
    cameras = around(10)
    write_object(tmp_path / "one", converted(cameras, "opengl"), pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", axes="opengl")
    same_cameras(PosedImages.open(tmp_path / "set"), list(range(10)), cameras)


def test_opencv_matrices_in_transforms_are_recognized(tmp_path):
    cameras = around(10)
    write_transforms(tmp_path / "one", converted(cameras, "opengl"), pictures(cameras))
    with pytest.raises(UserError, match=r"frame 0 .*--axes opencv"):
        make_transforms(tmp_path / "one", tmp_path / "set")
    make_transforms(tmp_path / "one", tmp_path / "set", axes="opencv")
    same_cameras(PosedImages.open(tmp_path / "set"), list(range(10)), cameras)


def test_world_to_camera_matrices_in_transforms_are_recognized(tmp_path):
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
    with pytest.raises(UserError, match="do not bound the object.*--box"):
        make_srn(tmp_path / "photo", tmp_path / "forced", options=ImportOptions(background="alpha"))


def test_scenes_too_large_for_memory_go_through_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("latentscenes.data.importing.IN_MEMORY", 1000)
    cameras = around(6)
    write_object(tmp_path / "one", cameras, pictures(cameras))
    make_srn(tmp_path / "one", tmp_path / "set", options=ImportOptions(alpha_from_white=True))
    views = PosedImages.open(tmp_path / "set")
    assert np.array_equal(views.rgb, pictures(cameras)) and np.array_equal(
        views.alpha > 0, silhouettes(cameras)
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "set"]


def test_one_camera_that_misses_the_box_is_named():
    cameras = around(5)
    away = look_at(cameras.positions[3:4], torch.tensor([0.0, 0.0, 5.0]))
    cameras = Cameras(torch.cat([cameras.cam2world[:3], away, cameras.cam2world[4:]]), cameras.intrinsics)
    with pytest.raises(UserError, match="view 3: 1 of 5 cameras, this one first, see nothing of the box"):
        check_cameras(cameras, [f"view {k}" for k in range(5)], Box((0.0, 0.0, 0.0), (0.4, 0.4, 0.4)))
    inside = Cameras(
        look_at(torch.tensor([[0.1, 0.1, 0.1]]), torch.tensor([3.0, 0, 0])), cameras.intrinsics[:1]
    )
    check_cameras(
        inside, ["inside"], Box((0.0, 0.0, 0.0), (0.4, 0.4, 0.4))
    )  # a camera within the box sees it


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


# Images, sizes, splits


def test_images_of_every_kind(tmp_path):
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (5, 7), dtype=np.uint8)
    three = np.repeat(gray[..., None], 3, -1)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    Image.fromarray(three).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(np.stack([gray, 255 - gray], -1)).save(tmp_path / "gray_alpha.png")
    Image.fromarray(np.full((16, 16, 3), 93, np.uint8)).save(tmp_path / "photo.jpg", quality=95)
    assert Image.open(tmp_path / "gray16.png").mode.startswith("I")
    for name in ("gray.png", "gray16.png"):
        rgb, alpha = read_image(tmp_path / name)
        assert alpha is None and np.array_equal(rgb, three), name
    rgb, alpha = read_image(tmp_path / "gray_alpha.png")
    assert np.array_equal(alpha, 255 - gray) and np.array_equal(
        rgb, over_white(np.dstack([three, 255 - gray]))
    )
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
    for name, options in (("size", ImportOptions(size=SIDE // 2)), ("reduce", ImportOptions(reduce=2))):
        make_srn(tmp_path / "one", tmp_path / name, options=options)
        views = PosedImages.open(tmp_path / name)
        means = pictures(cameras).reshape(8, SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
        assert np.abs(views.rgb - means).max() <= 0.51
        same_cameras(views, list(range(8)), cameras)
    Image.fromarray(np.full((2 * SIDE, 2 * SIDE, 3), 255, np.uint8)).save(
        tmp_path / "one" / "rgb" / "000005.png"
    )
    with pytest.raises(UserError, match="000005.png.*Give a --size"):
        make_srn(tmp_path / "one", tmp_path / "mixed")
    make_srn(
        tmp_path / "one", tmp_path / "same", options=ImportOptions(size=(SIDE, SIDE), background="unknown")
    )
    assert (PosedImages.open(tmp_path / "same").rgb[5] == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32, "reduce": 2}, "both given"),
        ({"reduce": 0}, "whole number"),
        ({"size": 4096}, "smaller than the wanted"),
        ({"box": "1,2,3"}, "give a half side"),
        ({"box": -1.0}, "give a half side"),
        ({"new": 2}, "only 1 scene found"),
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
        make_srn(tmp_path / "one", tmp_path / "set", options=ImportOptions(**options))
    assert not (tmp_path / "set").exists()


def test_splits(tmp_path):
    names = ["b_10", "b_9", "a"]
    assert sorted(names, key=natural_key) == ["a", "b_9", "b_10"]
    assert choose_splits(names, new=1) == {"a": "train", "b_9": "train", "b_10": "new"}
    assert set(choose_splits(names, new="all").values()) == {"new"}
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
    made = make_srn(tmp_path / "cars", tmp_path / "set", options=ImportOptions(split=tmp_path / "split.json"))
    assert [(scene.name, scene.split) for scene in PosedImages.open(tmp_path / "set").scenes] == [
        ("a", "new"),
        ("c", "train"),
    ]
    assert any("1 of 3 scenes" in note for note in made.notes)


# Boxes


def test_box_recovers_an_ellipsoid():
    cameras = around(40, lowest=-math.pi / 2)
    box = fit_box([("e", silhouettes(cameras, 128), cameras)])
    voxel = (
        2 * SEMI / 64
    )  # of the last grid, and the margin is 1.5 of them; pixels are 0.01 wide at the object
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
    box = fit_box(
        [
            ("a", silhouettes(cameras, 96), cameras),
            ("b", silhouettes(cameras, 96, other, np.full(3, 0.1)), cameras),
        ]
    )
    expected = np.stack([np.minimum(CENTER - SEMI, other - 0.1), np.maximum(CENTER + SEMI, other + 0.1)])
    found = np.stack([np.subtract(box.center, box.half), np.add(box.center, box.half)])
    assert (
        np.abs(found - expected).max() < 0.05
        and (found[0] <= expected[0]).all()
        and (found[1] >= expected[1]).all()
    )


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
