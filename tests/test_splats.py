"""Scenes as 3D Gaussian splats: they lie on the surface, their pictures are those of the scene, and both file
formats say the same."""

import gzip
import json
import struct
import sys

import numpy as np
import pytest
import torch
from egg import CENTER, SEMI, VIEW, egg, egg_colors, egg_run
from scipy.spatial import cKDTree

from benchmarks.splats import splat_pictures
from latentscenes.cli import main as cli
from latentscenes.core.errors import UserError
from latentscenes.data.shading import to_linear
from latentscenes.export.splats import HARMONIC, Splats, gathered, scene_splats, write_splats
from latentscenes.model.model import render_images, to_uint8

pytest.importorskip("skimage", reason="scikit-image (the export extra) is absent")


@pytest.fixture(scope="module")
def splats() -> Splats:
    return scene_splats(egg(), "egg", VIEW, count=2500, cells=96)


def test_points_are_gathered_in_even_cells():
    random = np.random.default_rng(0)
    points = np.pad(random.random((6000, 2)), ((0, 0), (0, 1)))
    middles, cell = gathered(points, 100, random)
    counts = np.bincount(cell)
    assert len(middles) == len(counts) <= 100 and counts.min() > 15 and counts.max() < 140
    np.testing.assert_allclose(middles[7], points[cell == 7].mean(0))


def test_splats_are_flat_and_lie_on_the_surface(splats):
    assert 2300 < len(splats.positions) <= 2500
    radius = np.linalg.norm((splats.positions - CENTER) / SEMI, axis=1)
    assert np.abs(radius - 1).mean() < 0.08
    np.testing.assert_allclose(np.linalg.det(splats.rotations), 1)
    assert (splats.scales[:, 2] < 0.5 * splats.scales[:, 1]).all()
    outward = (splats.positions - CENTER) / SEMI**2
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    along = (splats.rotations[:, :, 2] * outward).sum(1)
    assert along.mean() > 0.9
    assert np.abs(splats.colors - egg_colors(splats.positions)).mean() < 0.03


def test_pictures_are_those_of_the_scene(splats):
    cameras, loaded = VIEW.orbit(2, 30.0, 20.0), egg()
    size = (128, 160)
    truth = to_uint8(render_images(loaded.model, loaded.planes("egg"), cameras, size).images)
    shown = splat_pictures(splats, cameras, size)
    error = ((shown.astype(float) - truth) ** 2).mean() / 255**2
    assert -10 * np.log10(error) > 23
    solid = (truth.min(3) < 100) & (shown.min(3) < 100)
    assert solid.mean() > 0.02 and np.abs(shown.astype(float) - truth)[solid].mean() < 8


def test_one_splat_is_drawn_where_the_camera_sees_it():
    camera = VIEW.orbit(1, 0.0)
    place = np.array([VIEW.center]) + [[0.0, 0.1, 0.1]]
    ball = Splats(place, np.eye(3)[None], np.full((1, 3), 0.02), np.ones(1), np.array([[1.0, 0, 0]]))
    (shown,) = splat_pictures(ball, camera, (96, 120))
    rows, columns = np.nonzero(shown[..., 1] < 128)
    (x, y), _ = (part[0, 0] for part in camera.project(torch.tensor(place, dtype=torch.float32)))
    assert abs(columns.mean() + 0.5 - 120 * float(x)) < 0.6 and abs(rows.mean() + 0.5 - 96 * float(y)) < 0.6
    sigma = 0.02 / VIEW.distance * VIEW.focal[1] * 96
    reach = np.sqrt(2 * np.log(2)) * np.sqrt(sigma**2 + 0.3)  # half of the color is left there
    assert len(rows) == pytest.approx(np.pi * reach**2, rel=0.25)


def test_both_formats_say_the_same(splats, tmp_path):
    count = len(splats.positions)
    size = write_splats(tmp_path / "egg.ply", splats)
    header, _, body = (tmp_path / "egg.ply").read_bytes().partition(b"end_header\n")
    assert size == len(header) + 11 + len(body)
    names = [line.split()[2].decode() for line in header.splitlines() if line.startswith(b"property float")]
    rows = dict(zip(names, np.frombuffer(body, "<f4").reshape(count, -1).T, strict=True))
    write_splats(tmp_path / "egg.glb", splats, "egg <1>", {"license": "CC0"})
    content = (tmp_path / "egg.glb").read_bytes()
    magic, version, length, text = struct.unpack("<4sIII", content[:16])
    assert (magic, version, length) == (b"glTF", 2, len(content)) and text % 4 == 0
    tree, binary = json.loads(content[20 : 20 + text]), content[28 + text :]
    assert tree["nodes"] == [{"mesh": 0, "name": "egg <1>", "extras": {"license": "CC0"}}]
    (primitive,) = tree["meshes"][0]["primitives"]
    extension = primitive["extensions"]["KHR_gaussian_splatting"]
    assert extension == {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    assert primitive["mode"] == 0 and "KHR_gaussian_splatting" in tree["extensionsUsed"]

    def read(key: str) -> np.ndarray:
        accessor = tree["accessors"][primitive["attributes"][key]]
        view = tree["bufferViews"][accessor["bufferView"]]
        kind = {5126: "<f4", 5123: "<u2"}[accessor["componentType"]]
        values = np.frombuffer(binary, kind, view["byteLength"] // int(kind[2]), view["byteOffset"])
        assert view["byteOffset"] % 4 == 0 and accessor["count"] == count
        return values.reshape(count, -1)

    x, y, z = splats.positions.T
    np.testing.assert_allclose(read("POSITION"), np.stack([x, z, -y], 1), atol=1e-6)  # y up
    for key, values in (("x", x), ("y", -z), ("z", y)):  # y down
        np.testing.assert_allclose(rows[key], values, atol=1e-6)
    scales, opacity = (read(f"KHR_gaussian_splatting:{key}") for key in ("SCALE", "OPACITY"))
    np.testing.assert_allclose(scales, splats.scales, rtol=1e-6)
    np.testing.assert_allclose(np.exp(np.stack([rows[f"scale_{k}"] for k in range(3)], 1)), scales, rtol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(-rows["opacity"])), opacity[:, 0], rtol=1e-5)
    harmonics = read("KHR_gaussian_splatting:SH_DEGREE_0_COEF_0")
    np.testing.assert_allclose(0.5 + HARMONIC * harmonics, splats.colors, atol=1e-6)
    np.testing.assert_allclose(np.stack([rows[f"f_dc_{k}"] for k in range(3)], 1), harmonics, atol=1e-6)
    np.testing.assert_allclose(read("COLOR_0")[:, :3] / 65535, to_linear(splats.colors), atol=1e-5)
    from scipy.spatial.transform import Rotation

    up = Rotation.from_quat(read("KHR_gaussian_splatting:ROTATION")).as_matrix()
    down = Rotation.from_quat(np.stack([rows[f"rot_{k}"] for k in (1, 2, 3, 0)], 1)).as_matrix()
    a, b, c = splats.rotations.transpose(1, 0, 2)
    np.testing.assert_allclose(up, np.stack([a, c, -b], 1), atol=1e-5)
    np.testing.assert_allclose(down, np.stack([a, -c, b], 1), atol=1e-5)
    np.testing.assert_allclose(np.stack([rows["nx"], rows["ny"], rows["nz"]], 1), down[:, :, 2], atol=1e-5)


def test_splats_command(tmp_path, solids, monkeypatch, capsys):
    run = egg_run(tmp_path / "run", solids)
    command = ["latentscenes", "export", "splats", "--run", str(run.path), "--scene", "egg", "--cells", "24"]
    monkeypatch.setattr(sys, "argv", [*command, "--count", "60", "--out", str(tmp_path / "egg.ply")])
    cli.main()
    assert "splats" in capsys.readouterr().err and (tmp_path / "egg.ply").stat().st_size > 60 * 17 * 4 * 0.8
    for wrong, message in (
        (["--count", "0", "--out", "e.glb"], "--count 0: choose between 1 and"),
        (["--out", "e.splat"], "this command writes PLY or GLB or SPZ or SOG; name a file that ends in .ply"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *wrong[:-1], str(tmp_path / wrong[-1])])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_other_endings_are_refused(splats, tmp_path):
    with pytest.raises(UserError, match="splats are written as .ply, .glb, .spz or .sog"):
        write_splats(tmp_path / "egg.splat", splats)


def test_spz_holds_the_same_y_up(splats, tmp_path):
    pytest.importorskip("gaussforge", reason="gaussforge (the splats extra) is absent")
    size, count = write_splats(tmp_path / "egg.spz", splats), len(splats.positions)
    raw = gzip.decompress((tmp_path / "egg.spz").read_bytes())
    magic, version, stated, degree, bits = struct.unpack("<4sIIBB", raw[:14])
    assert (magic, version, stated, degree) == (b"NGSP", 3, count, 0) and size < 20 * count

    def read(start: int, width: int) -> np.ndarray:
        part = raw[16 + start * count : 16 + (start + width) * count]
        return np.frombuffer(part, np.uint8).reshape(count, width).astype(int)

    low, middle, high = read(0, 9).reshape(count, 3, 3).transpose(2, 0, 1)
    places = low + 256 * middle + 65536 * (high - 256 * (high > 127))
    x, y, z = splats.positions.T
    np.testing.assert_allclose(places / 2**bits, np.stack([x, z, -y], 1), atol=0.6 / 2**bits)
    np.testing.assert_allclose(read(9, 1)[:, 0] / 255, splats.opacities, atol=0.003)
    np.testing.assert_allclose(0.5 + HARMONIC * (read(10, 3) / 255 - 0.5) / 0.15, splats.colors, atol=0.006)
    np.testing.assert_allclose(read(13, 3) / 16 - 10, np.log(splats.scales), atol=0.04)


def test_sog_holds_the_same_y_down(splats, tmp_path):
    gaussforge = pytest.importorskip("gaussforge", reason="gaussforge (the splats extra) is absent")
    write_splats(tmp_path / "egg.sog", splats)
    back = gaussforge.GaussForge().convert((tmp_path / "egg.sog").read_bytes(), "sog", "ply")["data"]
    header, _, body = back.partition(b"end_header\n")
    names = [line.split()[2] for line in header.decode().splitlines() if line.startswith("property float")]
    rows = np.frombuffer(body, "<f4").reshape(len(splats.positions), -1)
    places = rows[:, [names.index(axis) for axis in "xyz"]]
    x, y, z = splats.positions.T
    distance, nearest = cKDTree(np.stack([x, -z, y], 1)).query(places)
    assert distance.max() < 1e-3
    colors = 0.5 + HARMONIC * rows[:, [names.index(f"f_dc_{k}") for k in range(3)]]
    assert np.abs(colors - splats.colors[nearest]).mean() < 0.01


def test_small_files_say_what_they_need(splats, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gaussforge", None)
    with pytest.raises(UserError, match=r"latentscenes\[splats\]"):
        write_splats(tmp_path / "egg.spz", splats)
