"""Posed pictures can be read back with the same cameras, nerfstudio camera paths are followed, films are
complete."""

import json
import math
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from egg import BOX, CENTER, SEMI, VIEW, egg, egg_run
from PIL import Image

from latentscenes.cli import main as cli
from latentscenes.core.cameras import OPENGL_TO_OPENCV
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.images import read_image
from latentscenes.data.transforms import make_transforms
from latentscenes.export.pages import transforms, write_views
from latentscenes.export.video import camera_frames, read_camera_path
from latentscenes.model.model import RenderedImages, render_images, to_uint8
from latentscenes.model.pictures import over, with_alpha


@pytest.fixture
def run(tmp_path, solids):
    return egg_run(tmp_path / "run", solids)


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["latentscenes", *map(str, arguments)])
    cli.main()


# Posed pictures


def test_pictures_come_back_through_data_transforms(tmp_path):
    cameras, loaded = VIEW.dome(7, lowest=-20.0), egg()
    write_views(tmp_path / "set", loaded, ["egg"], cameras, VIEW.size)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    make_transforms(tmp_path / "set", tmp_path / "data")
    views = PosedImages.open(tmp_path / "data")
    assert [scene.name for scene in views.scenes] == ["egg"] and views.size == VIEW.size
    torch.testing.assert_close(views.cameras.cam2world, cameras.cam2world, atol=1e-5, rtol=0)
    torch.testing.assert_close(views.cameras.intrinsics, cameras.intrinsics, atol=1e-5, rtol=0)
    shown = render_images(loaded.model, loaded.planes("egg"), cameras, VIEW.size)
    change = np.abs(views.rgb.astype(int) - to_uint8(shown.images))
    assert change.max() <= 26 and change.mean() < 1  # haze is at most a tenth
    assert np.abs(views.alpha / 255 - shown.opacity.numpy()).mean() < 0.02
    low, high = np.subtract(views.box.center, views.box.half), np.add(views.box.center, views.box.half)
    assert (low < CENTER - 0.9 * SEMI).all() and (high > CENTER + 0.9 * SEMI).all()


def test_matrices_have_opengl_axes():
    """The camera's third axis points away from the object, its second axis up."""
    cameras = VIEW.orbit(3)
    for frame, eye in zip(
        transforms(cameras, ["a", "b", "c"], (40, 50))["frames"], cameras.positions, strict=True
    ):
        matrix = torch.tensor(frame["transform_matrix"])
        outward = torch.nn.functional.normalize(eye - torch.tensor(VIEW.center), dim=0)
        torch.testing.assert_close(matrix[:3, 2], outward)
        assert matrix[2, 1] > 0.5 and torch.equal(matrix[3], torch.tensor([0.0, 0, 0, 1]))
        assert frame["fl_x"] == pytest.approx(1.1 * 50) and frame["cy"] == pytest.approx(20)


def test_haze_vanishes_and_solid_parts_become_solid():
    """A black square on white: opacity 1 and 0.93 inside, 0.5 at an edge, 0.08 of haze around."""
    opacity = torch.full((1, 8, 8), 0.08)
    opacity[:, 2:6, 2:6] = 1.0
    opacity[:, 2, 2:6], opacity[:, 5, 2:6] = 0.93, 0.5
    images = (1 - opacity)[:, None].expand(1, 3, 8, 8)
    rgba = with_alpha(RenderedImages(images, images, opacity, opacity))[0]
    assert (rgba[2:5, 2:6] == (0, 0, 0, 255)).all() and (rgba[:2] == (255, 255, 255, 0)).all()
    assert (rgba[5, 2:6] == (0, 0, 0, 128)).all()
    white, black = over(rgba[None], "white"), over(rgba[None], "black")
    assert (white[0, 3:5, 3:5] == 0).all() and (white[0, :2] == 255).all() and (white[0, 5, 2:6] == 127).all()
    assert not black.any() and black.shape == (1, 8, 8, 3)


def test_opacities_of_latent_pixels_are_enlarged():
    opacity = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    rgba = with_alpha(
        RenderedImages(torch.full((1, 3, 8, 8), 0.9), torch.zeros(1, 1, 2, 2), opacity, opacity)
    )
    assert rgba.shape == (1, 8, 8, 4) and (rgba[0, :, -1, 3] == 255).all() and (rgba[0, :, 0, 3] == 0).all()


def test_white_matter_is_transparent(tmp_path):
    """White matter around an object becomes transparent; white inside the object stays."""
    images, opacity = torch.zeros(1, 3, 16, 16), torch.ones(1, 16, 16)
    images[..., :4] = 1.0
    images[..., 8:12, 8:12] = 1.0
    rgba = with_alpha(RenderedImages(images, images, opacity, opacity))
    assert (
        (rgba[0, :, :4, 3] == 0).all()
        and (rgba[0, :, 4:, 3] == 255).all()
        and (rgba[0, 9:11, 9:11] == 255).all()
    )
    Image.fromarray(rgba[0]).save(tmp_path / "x.png")
    rgb, alpha = read_image(tmp_path / "x.png")
    assert np.array_equal(rgb, to_uint8(images)[0]) and np.array_equal(alpha, rgba[0, ..., 3])


def test_white_parts_stay_where_silhouettes_are_known():
    """A white object that touches the border, in a clear picture with faint haze."""
    images, opacity = torch.ones(1, 3, 16, 16), torch.full((1, 16, 16), 0.05)
    opacity[:, :8, 4:12] = 1.0
    rgba = with_alpha(RenderedImages(images, images, opacity, opacity), silhouettes=True)
    assert (rgba[0, :8, 4:12] == 255).all() and rgba[0, ..., 3].sum() == 255 * 64
    assert not with_alpha(RenderedImages(images, images, opacity, opacity))[..., 3].any()


def test_images_command(tmp_path, run, monkeypatch, capsys):
    call(
        monkeypatch,
        "export",
        "images",
        "--run",
        run.path,
        "--match",
        "e*",
        "--out",
        tmp_path / "set",
        "--views",
        3,
        "--size",
        16,
        "--around",
        "orbit",
    )
    assert "1 scene, 3 pictures of 16x16 each" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(path.name for path in (tmp_path / "set" / "egg" / "images").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
    for wrong, message in (
        (["--match", "x*"], "no scenes chosen. Name some with --scenes, or give --match"),
        (["--scenes", "eg"], "no scene 'eg' here; the nearest names are 'egg'"),
        (["--scenes", "egg"], "exists and is not an empty folder"),
        (["--scenes", "egg", "--views", "0"], "--views 0: at least 1"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, "export", "images", "--run", run.path, "--out", tmp_path / "set", *wrong)
        assert message in capsys.readouterr().err


# Camera paths


def path_content(cameras, fov: float, **top) -> dict:
    """A camera path as nerfstudio's viewer saves it."""
    frames = []
    for matrix in cameras.cam2world:
        turned = torch.eye(4)
        turned[:3] = torch.cat([matrix[:, :3] @ OPENGL_TO_OPENCV, matrix[:, 3:]], 1)
        frames.append({"camera_to_world": turned.flatten().tolist(), "fov": fov, "aspect": 1.5})
    return {
        "camera_type": "perspective",
        "render_height": 32,
        "render_width": 48,
        "fps": 12,
        "seconds": 1,
        "keyframes": [],
        "camera_path": frames,
        **top,
    }


def test_camera_path_is_read(tmp_path):
    cameras = VIEW.orbit(5)
    (tmp_path / "path.json").write_text(json.dumps(path_content(cameras, 40.0)))
    path = read_camera_path(tmp_path / "path.json")
    torch.testing.assert_close(path.cameras.cam2world, cameras.cam2world, atol=1e-6, rtol=0)
    assert path.size == (32, 48) and path.fps == 12
    fx, fy, cx, cy = path.cameras.intrinsics[0].tolist()
    assert 2 * math.degrees(math.atan(0.5 / fy)) == pytest.approx(40, abs=1e-4)  # the vertical angle
    assert fx * 48 == pytest.approx(fy * 32) and (cx, cy) == (0.5, 0.5)  # square pixels
    wide = path.at((32, 64)).intrinsics[0]
    assert wide[1].item() == pytest.approx(fy) and wide[0].item() * 64 == pytest.approx(fy * 32)
    (tmp_path / "path.json").write_text(json.dumps(path_content(cameras, 40.0, fps=None, seconds=2.5)))
    assert read_camera_path(tmp_path / "path.json").fps == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), 'needs a list "camera_path"'),
        (lambda c: c.update(camera_type="equirectangular"), "camera_type is 'equirectangular'"),
        (lambda c: c.update(render_width="wide"), "render_width must be a number above 0, not 'wide'"),
        (
            lambda c: c["camera_path"][1].pop("fov"),
            r"camera_path\[1\]: fov must be a number above 0, not None",
        ),
        (lambda c: c["camera_path"][0].update(fov=200), "fov is 200; it must lie between 0 and 180"),
        (
            lambda c: c["camera_path"][0].update(camera_to_world=[1, 2]),
            r"camera_path\[0\]: camera_to_world must be 16 numbers",
        ),
        (
            lambda c: c["camera_path"][0].update(camera_to_world=[0.0] * 16),
            "must be a rotation and a translation",
        ),
    ],
)
def test_bad_camera_paths_are_refused(tmp_path, change, message):
    content = path_content(VIEW.orbit(2), 40.0)
    change(content)
    (tmp_path / "path.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_camera_path(tmp_path / "path.json")


def test_absent_and_broken_camera_paths(tmp_path):
    with pytest.raises(UserError, match="no such file. Save a camera path"):
        read_camera_path(tmp_path / "path.json")
    (tmp_path / "path.json").write_text("{")
    with pytest.raises(UserError, match="path.json: cannot be read"):
        read_camera_path(tmp_path / "path.json")


# Films


def test_film_of_a_camera_path_shows_what_the_cameras_see(tmp_path, run, monkeypatch):
    pytest.importorskip("av")
    cameras = VIEW.orbit(4)
    (tmp_path / "path.json").write_text(json.dumps(path_content(cameras, 50.0)))
    call(
        monkeypatch,
        "render",
        "--run",
        run.path,
        "--scene",
        "egg",
        "--path",
        tmp_path / "path.json",
        "--out",
        tmp_path / "film.mp4",
    )
    film = imageio.imread(tmp_path / "film.mp4", plugin="pyav")
    assert film.shape == (4, 32, 48, 3)
    meta = imageio.immeta(tmp_path / "film.mp4", plugin="pyav")
    assert meta["codec"] == "h264" and meta["video_format"] == "yuv420p" and meta["fps"] == 12
    loaded = egg()
    expected = list(camera_frames(loaded, "egg", read_camera_path(tmp_path / "path.json").cameras, (32, 48)))
    assert np.abs(film.astype(int) - np.stack(expected)).mean() < 4
    places, _ = read_camera_path(tmp_path / "path.json").cameras.project(
        torch.tensor(CENTER[None], dtype=torch.float32)
    )
    for frame, (x, y) in zip(film, places[:, 0].tolist(), strict=True):
        assert (
            frame[int(y * 32), int(x * 48)].min() < 60 and (frame[0] > 245).all()
        )  # the egg, where it is; above it, nothing


def test_frames_into_a_folder(tmp_path, run, monkeypatch, capsys):
    command = [
        "render",
        "--run",
        run.path,
        "--scene",
        "egg",
        "--out",
        tmp_path / "frames",
        "--frames",
        9,
        "--size",
        16,
        "--mode",
        "depth",
    ]
    call(monkeypatch, *command)
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"{place:05d}.png" for place in range(9)]
    assert not list(tmp_path.glob("*partial*"))
    for again, message in (
        (command, "exists and is not an empty folder"),
        ([*command, "--frames", 0], ""),
        (["render", *command[1:6], tmp_path / "x.avi"], "are written as .mp4, .gif or .png"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *again)
        assert message in capsys.readouterr().err


def test_films_are_the_same_in_portions(monkeypatch):
    from latentscenes.export import video

    loaded = egg()
    whole = list(camera_frames(loaded, "egg", VIEW.orbit(6), (16, 20), "dashboard"))
    monkeypatch.setattr(video, "PIXELS", 400)
    portions = list(camera_frames(loaded, "egg", VIEW.orbit(6), (16, 20), "dashboard"))
    assert len(whole) == 6 and all(np.array_equal(a, b) for a, b in zip(whole, portions, strict=True))


def test_what_was_begun_is_removed(tmp_path):
    from latentscenes.export.video import save_frames

    def frames():
        yield np.zeros((8, 8, 3), np.uint8)
        raise RuntimeError("stopped")

    for name in ("film.mp4", "film.gif", "frames"):
        if name.endswith("mp4"):
            pytest.importorskip("av")
        with pytest.raises(RuntimeError):
            save_frames(tmp_path / name, frames())
    assert not list(tmp_path.iterdir())


def test_box_of_the_egg_is_that_of_its_run(run):
    assert run.info.box == BOX
