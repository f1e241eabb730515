"""Sheets, orbits and their files: sizes, content and readable files."""

import math
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from results import made_run

from latentscenes.core.cameras import Box, Viewpoint, orbit
from latentscenes.core.errors import UserError
from latentscenes.export import sheets, video
from latentscenes.model import model as model_module
from latentscenes.storage.scene_set import SceneSet


@pytest.fixture
def run(tmp_path, tiny, solids):
    return made_run(tmp_path / "run", tiny, solids, "train")


def test_comparison_sheet(run, tmp_path, tiny, solids):
    ours = SceneSet.of_run(run)
    scenes = solids.select("train")
    alone = sheets.comparison_sheet(ours, solids, scenes, limit=2)
    other = SceneSet.of_run(made_run(tmp_path / "other", tiny, solids, "train", count=1)).labeled("RGB")
    both = sheets.comparison_sheet(ours, solids, scenes, limit=2, others=[other])
    assert (
        alone.dtype == np.uint8
        and both.shape[0] == alone.shape[0]
        and both.shape[1] == alone.shape[1] + 32 + sheets.GAP
    )
    index = torch.tensor(scenes[0].views("held_out"))
    left, top = 2 * sheets.GAP, 2 * sheets.GAP + sheets.CAPTION + 1
    assert np.array_equal(
        alone[top : top + 32, left : left + 32], solids.rgb[index[0]]
    )  # the truth, untouched
    mine = model_module.render_images(
        ours.model, ours.planes(scenes[0].name), solids.cameras[index], solids.size
    ).images
    third = left + 2 * (32 + sheets.GAP)
    assert np.array_equal(alone[top : top + 32, third : third + 32], model_module.to_uint8(mine)[0])


def test_captions_are_the_last_parts_that_are_unique():
    names = ["a__chairs__oak", "a__stools__oak", "b__lamp", "lamp", "c__sofa", "red_ball"]
    assert sheets.short_names(names) == {
        "a__chairs__oak": "chairs__oak",
        "a__stools__oak": "stools__oak",
        "b__lamp": "b__lamp",
        "lamp": "lamp",
        "c__sofa": "sofa",
        "red_ball": "red_ball",
    }
    assert sheets.short_names(["p406__base"]) == {"p406__base": "p406__base"}  # nothing to tell it from
    assert sheets.cut("convertible-sofa-closed", 11) == "conve…losed" and sheets.cut("sofa", 4) == "sofa"


def test_sheets_say_what_they_leave_out(run, solids, monkeypatch):
    lines, draw = [], sheets._line
    monkeypatch.setattr(sheets, "_line", lambda text, *rest: lines.append(text) or draw(text, *rest))
    scenes, ours = solids.select("train"), SceneSet.of_run(run)
    some = [
        sheets.comparison_sheet(ours, solids, scenes, limit=3),
        sheets.dashboard_sheet(ours, solids, scenes, limit=3),
    ]
    assert [line.strip() for line in lines].count("3 of 4 scenes shown") == 2
    lines.clear()
    whole = sheets.comparison_sheet(ours, solids, scenes)
    assert not any("shown" in line for line in lines) and some[0].shape[0] == whole.shape[0] + sheets.CAPTION


def test_long_captions_are_cut_in_the_middle(monkeypatch):
    texts, cut = [], sheets.cut
    monkeypatch.setattr(sheets, "cut", lambda *given: texts.append(cut(*given)) or texts[-1])
    picture = sheets.captioned(np.full((8, 60, 3), 255, np.uint8), "convertible-sofa-closed")
    assert picture.shape == (8 + sheets.CAPTION, 60, 3) and picture[8:].min() < 200
    start, end = texts[-1].split("…")
    assert len(start) >= 2 and "convertible-sofa-closed".startswith(start)
    assert len(end) >= 2 and "convertible-sofa-closed".endswith(end)


def test_rows_belong_to_scenes(run, solids):
    """The sheet of scene 1 alone equals its part of the sheet of all scenes."""
    model, rows = run.load()
    scenes = solids.select("train")
    all_of_them = sheets.comparison_sheet(SceneSet.of_run(run), solids, scenes, across=1)
    alone = SceneSet.of_table(model, rows.gather(torch.tensor([1])), [scenes[1].name])
    second = sheets.comparison_sheet(alone, solids, scenes[1:2], across=1)
    height = second.shape[0] - 4 * sheets.GAP  # of one group without the margins
    start = 2 * sheets.GAP + height + 2 * sheets.GAP
    assert np.array_equal(all_of_them[start : start + height], second[2 * sheets.GAP : -2 * sheets.GAP])


def test_dashboard_sheet(run, solids):
    scenes = solids.select("train")
    one, two = (sheets.dashboard_sheet(SceneSet.of_run(run), solids, scenes, limit=limit) for limit in (1, 2))
    assert one.shape[1] == two.shape[1] and two.shape[0] > 1.7 * one.shape[0]


@pytest.mark.parametrize("mode", ["rgb", "colors", "depth", "opacity", "latent", "dashboard"])
def test_frames_of_an_orbit(run, mode):
    learned = SceneSet.of_run(run)
    cameras = learned.view.orbit(3, 25.0)
    frames = list(video.camera_frames(learned, "green_box", cameras, (16, 16), mode))
    assert len(frames) == 3 and all(
        frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames
    )
    if mode in ("rgb", "colors", "depth", "opacity"):
        assert frames[0].shape == (16, 16, 3)
    elif mode == "latent":
        assert frames[0].shape[0] == 16
    else:
        assert frames[0].shape[0] == 16 + sheets.CAPTION and frames[0].shape[1] > 4 * 16


def test_orbit_of_unknown_scene_or_size(run):
    learned = SceneSet.of_run(run)
    with pytest.raises(UserError, match="no scene 'green_bx' here; the nearest names are 'green_box'"):
        learned.check("green_bx")
    with pytest.raises(UserError, match="multiple of the codec's downsampling, 4; try 20"):
        video.scaled(learned.view.size, 18 + 1, learned.model.codec.downsampling)


def test_orbit_cameras_are_like_those_of_the_data():
    like = orbit(9, distance=2.0, focal=1.5, center=(1.0, 2.0, 3.0))
    box = Box((1.0, 2.0, 3.0), (0.5, 0.4, 0.3))
    cameras = Viewpoint.of(like, (32, 32), box).orbit(8, 30.0)
    outward = cameras.positions - torch.tensor(box.center)
    torch.testing.assert_close(outward.norm(dim=1), torch.full((8,), 2.0))
    torch.testing.assert_close(outward[:, 2], torch.full((8,), 2 * math.sin(math.radians(30))))
    torch.testing.assert_close(cameras.intrinsics, torch.tensor([1.5, 1.5, 0.5, 0.5]).expand(8, 4))
    seen, depth = cameras.project(torch.tensor([box.center]))
    torch.testing.assert_close(seen, torch.full((8, 1, 2), 0.5))
    assert (depth > 0).all()


def test_depth_and_opacity_of_a_known_scene(run, solids):
    """Both pictures are white where nothing is solid; a wall twice as far has another color."""
    depth, opacity = np.array([[[1.0, 2.0, 1.5]]], np.float32), np.array([[[1.0, 1.0, 0.0]]], np.float32)
    near, far, nothing = sheets.color_depth(depth, opacity, (1.0, 2.0))[0, 0]
    assert np.array_equal(near, sheets.DEPTH_COLORS[0]) and np.array_equal(far, sheets.DEPTH_COLORS[-1])
    assert np.array_equal(nothing, [255, 255, 255])
    assert sheets.gray(opacity, (1.0, 0.0))[0, 0, :, 0].tolist() == [0, 0, 255]


def test_enlarge_keeps_squares():
    small = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    assert np.array_equal(sheets.enlarge(small, (4, 6)), small.repeat(2, 1).repeat(3, 2))


@pytest.fixture
def moving() -> list[np.ndarray]:
    """Five frames of 31 x 45, a colored square moving over white."""
    frames = np.full((5, 31, 45, 3), 255, np.uint8)
    for k in range(5):
        frames[k, 8:20, 5 + 5 * k : 17 + 5 * k] = (200, 40, 10 + 40 * k)
    return list(frames)


def test_gif(tmp_path, moving):
    video.save_frames(tmp_path / "a" / "x.gif", moving, fps=10)
    with Image.open(tmp_path / "a" / "x.gif") as file:
        assert (
            file.n_frames == 5
            and file.size == (45, 31)
            and file.info["duration"] == 100
            and file.info["loop"] == 0
        )
        for k, frame in enumerate(moving):
            file.seek(k)
            found = np.array(file.convert("RGB")).astype(int)
            assert np.abs(found - frame).max() <= 12
            assert (found[(frame == 255).all(-1)] == 255).all()  # white stays white


def test_gif_of_nothing_but_white(tmp_path):
    video.save_frames(tmp_path / "x.gif", [np.full((4, 4, 3), 255, np.uint8)] * 2)
    with Image.open(tmp_path / "x.gif") as file:
        assert np.array(file.convert("RGB")).min() == 255


def test_mp4(tmp_path, moving):
    pytest.importorskip("av")
    video.save_frames(tmp_path / "x.mp4", moving)
    found = imageio.imread(tmp_path / "x.mp4", plugin="pyav")
    assert found.shape == (5, 32, 46, 3)  # padded to even sides
    assert np.abs(found[0][:31, :45].astype(int) - moving[0]).mean() < 10


def test_mp4_without_pyav(tmp_path, moving, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install latentscenes\[export\]"):
        video.save_frames(tmp_path / "x.mp4", moving)


def test_strip_and_image(tmp_path, moving):
    video.save_frames(tmp_path / "x.png", moving)
    with Image.open(tmp_path / "x.png") as file:
        strip = np.array(file)
    assert strip.shape[1] > 5 * 45 and np.array_equal(strip[8 : 8 + 31, 8 : 8 + 45], moving[0])
    sheets.save_image(tmp_path / "one.png", moving[1])
    with Image.open(tmp_path / "one.png") as file:
        assert np.array_equal(np.array(file), moving[1])
    for save in (
        lambda: video.save_frames(tmp_path / "x.avi", moving),
        lambda: sheets.save_image(tmp_path / "x.txt", moving[0]),
    ):
        with pytest.raises(UserError, match="are written as"):
            save()
