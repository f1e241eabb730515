"""Meshes with a texture: charts, baked colors, and files that come back through `data meshes` upright, in
place and in their colors."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
import trimesh
from egg import CENTER, SEMI, VIEW, egg, egg_colors, egg_run
from PIL import Image

from latentscenes.cli import main as cli
from latentscenes.core.cameras import Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.data.meshes.importer import read_mesh
from latentscenes.data.raycast import RayCaster, soup_from_mesh
from latentscenes.data.shading import LIGHTS
from latentscenes.export.mesh import scene_mesh
from latentscenes.export.mesh_files import write_textured
from latentscenes.export.outlines import outlined
from latentscenes.export.surface import Surface, simplified
from latentscenes.export.texture import (
    TexturedMesh,
    fitted_texels,
    spread_out,
    texels,
    textured_mesh,
    unwrapped,
)
from latentscenes.model.model import RenderedImages

for package in ("skimage", "xatlas", "fast_simplification"):
    pytest.importorskip(package, reason=f"{package} (the export extra) is absent")


@pytest.fixture(scope="module")
def mesh() -> TexturedMesh:
    return textured_mesh(egg(), "egg", VIEW, side=256, faces=1500, cells=32)


def ball(detail: int) -> Surface:
    sphere = trimesh.creation.icosphere(detail)
    return Surface(np.asarray(sphere.vertices), np.asarray(sphere.faces), 0.05)


def test_few_triangles_keep_the_shape():
    found = simplified(ball(4), 500)
    assert len(found.faces) <= 500
    assert np.abs(np.linalg.norm(found.vertices, axis=1) - 1).max() < 0.03
    closed = trimesh.Trimesh(found.vertices, found.faces, process=False)
    assert closed.is_watertight and closed.volume == pytest.approx(4 / 3 * np.pi, rel=0.03)
    few = ball(2)
    assert simplified(few, 500) is few
    with pytest.raises(UserError, match="--faces 99: at least 100"):
        simplified(few, 99)


def test_normals_are_unit_vectors_where_triangles_are_folded():
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    folded = Surface(corners, np.array([[0, 1, 2], [0, 2, 1]]), 0.1)
    assert (folded.normals() == [0, 0, 1]).all()


def test_charts_do_not_overlap_and_lie_in_the_square():
    found = ball(3)
    rows, corners, uv = unwrapped(found, 256)
    assert (found.vertices[rows][corners] == found.vertices[found.faces]).all()
    assert uv.min() >= 0 and uv.max() <= 1
    a, b, c = (256 * uv[corners[:, corner]] for corner in range(3))
    one, other = b - a, c - a
    area = np.abs(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum() / 2
    inside, face, weights = texels(corners, uv, 256)
    assert inside.sum() == len(face) and len(face) == pytest.approx(area, rel=0.02)
    places = (weights * 256 * uv[corners[face]].astype(float)).sum(1)
    np.testing.assert_allclose(places, np.argwhere(inside)[:, ::-1] + 0.5, atol=0.01)


def test_gaps_take_the_nearest_color():
    picture, known = np.zeros((4, 6, 3)), np.zeros((4, 6), bool)
    picture[1, 0], picture[2, 5] = (1, 0, 0), (0, 0, 1)
    known[1, 0] = known[2, 5] = True
    filled = spread_out(picture, known)
    assert (filled[:, :3] == (1, 0, 0)).all() and (filled[:, 3:] == (0, 0, 1)).all()


def test_texels_have_the_colors_of_the_surface(mesh):
    assert len(mesh.faces) <= 1500 and mesh.texture.shape == (256, 256, 3)
    inside, face, weights = texels(mesh.faces, mesh.uv, 256)
    places = (weights * mesh.vertices[mesh.faces[face]]).sum(1)
    above = places[:, 2] > CENTER[2]
    change = np.abs(mesh.texture[inside] / 255 - egg_colors(places))
    assert change[above].mean() < 0.02 and change[~above].mean() < 0.1
    along = (mesh.normals * ((mesh.vertices - CENTER) / SEMI**2)).sum(1)
    assert (along > 0).all()


def test_vertex_colors_of_few_triangles():
    found = scene_mesh(egg(), "egg", VIEW, cells=32, faces=400)
    assert len(found.faces) <= 400
    above = found.vertices[:, 2] > CENTER[2]
    assert np.abs(found.colors - egg_colors(found.vertices))[above].mean() < 0.02


def test_fitted_texels_look_like_pictures_whose_pixels_are_means():
    """Bands of a few pixels come back; texels that no picture shows stay as they were."""
    found = ball(3)
    charts = unwrapped(found, 128)
    inside, face, weights = texels(charts.corners, charts.uv, 128)
    places = (weights * found.vertices[charts.rows][charts.corners[face]]).sum(1)
    truth = np.full((128, 128, 3), 0.5)
    truth[inside] = 0.5 + 0.3 * np.sin(25 * places[:, [2, 0, 1]])
    mesh = TexturedMesh(
        found.vertices[charts.rows], charts.corners, found.normals()[charts.rows], charts.uv,
        np.round(255 * truth).astype(np.uint8),
    )  # fmt: skip
    soup = soup_from_mesh(
        mesh.vertices,
        mesh.faces,
        uv=mesh.uv * np.float32([1, -1]) + np.float32([0, 1]),
        texture=np.dstack([mesh.texture, np.full((128, 128), 255, np.uint8)]),
    )
    cameras = Viewpoint((40, 40), 4.0, (1.6, 1.6), (0.0, 0.0, 0.0)).dome(24, 0.0)
    rgb, alpha = (
        torch.from_numpy(values) / 255 for values in RayCaster(soup, LIGHTS["flat"]).render(cameras, 40)
    )
    shown = RenderedImages(rgb.movedim(-1, 1), rgb.movedim(-1, 1), alpha, alpha)
    start = np.full((128, 128, 3), 0.5)
    above = inside.copy()
    above[inside] = places[:, 2] > 0.2
    after = fitted_texels(start, inside, found, charts, shown, cameras)
    before, now = (np.abs(part - truth)[above].mean() for part in (start, after))
    assert now < 0.4 * before
    assert (after[~inside] == 0.5).all()
    unseen = inside.copy()
    unseen[inside] = places[:, 2] < -0.98
    assert np.abs(after - 0.5)[unseen].max() < 1e-6


def test_outlines_move_to_where_pictures_show_them():
    """A dented ball becomes round where cameras see it from aside; a round one stays."""
    truth = ball(4)
    cameras = Viewpoint((40, 40), 4.0, (1.6, 1.6), (0.0, 0.0, 0.0)).dome(24, 0.0)
    soup = soup_from_mesh(truth.vertices, truth.faces, colors=(0.1, 0.3, 0.6, 1.0))
    rgb, alpha = (
        torch.from_numpy(values) / 255 for values in RayCaster(soup, LIGHTS["flat"]).render(cameras, 40)
    )
    shown = RenderedImages(rgb.movedim(-1, 1), rgb.movedim(-1, 1), alpha, alpha)
    texture, uv = np.broadcast_to([0.1, 0.3, 0.6], (8, 8, 3)), np.full((len(truth.faces), 3, 2), 0.5)
    dents = 1 - 0.02 * (1 + np.sin(3 * truth.vertices[:, :1]))
    off = {}
    for name, start in (("dented", dents * truth.vertices), ("round", truth.vertices)):
        after = Surface(start, truth.faces, truth.step)
        for _ in range(2):
            after = outlined(after, truth.faces, uv, texture, shown, cameras)
        above = truth.vertices[:, 2] > 0.1
        off[name] = [
            np.abs(np.linalg.norm(part, axis=1) - 1)[above].mean() for part in (start, after.vertices)
        ]
    assert off["dented"][1] < 0.01 < off["dented"][0] and off["round"][1] < 0.006, off  # a pixel is 0.06


@pytest.mark.parametrize("ending", [".glb", ".obj"])
def test_textured_files_come_back_through_data_meshes(mesh, tmp_path, ending):
    """The object is upright, at the same place and in the same colors: 1.5 % off on average."""
    size = write_textured(tmp_path / f"egg{ending}", mesh, "egg <1>", {"license": "CC0"})
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    soup, remarks = read_mesh(tmp_path / f"egg{ending}")
    assert not remarks
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    scale = 1 / np.linalg.norm(high - low)
    np.testing.assert_allclose(
        soup.corners, (scale * (mesh.vertices - (low + high) / 2))[mesh.faces], atol=1e-5
    )
    cameras = VIEW.dome(4, 20.0).placed(None, scale, tuple((-scale * (low + high) / 2).tolist()))
    caster = RayCaster(soup, LIGHTS["flat"])
    shown, covered = caster.render(cameras, 48, 1)
    starts, toward = (part.reshape(-1, 3).numpy() for part in cameras.rays(48, 48))
    hit = caster.scene.run(starts, toward, output=True)
    places = (starts + hit["tfar"][:, None] * toward) / scale + (low + high) / 2
    solid = covered.reshape(-1) == 255
    assert solid.mean() > 0.05
    change = np.abs(shown.reshape(-1, 3)[solid] / 255 - egg_colors(places[solid]))
    assert change.mean() < 0.015
    middle = places[solid][:, 0] > CENTER[0] + 0.5 * SEMI[0]  # red where x is large
    assert shown.reshape(-1, 3)[solid][middle][:, 0].mean() > 200


def test_usdz_holds_mesh_and_texture(mesh, tmp_path):
    pxr = pytest.importorskip("pxr", reason="usd-core (the usd extra) is absent")
    from pxr import Usd, UsdGeom, UsdShade

    write_textured(tmp_path / "egg.usdz", mesh)
    with zipfile.ZipFile(tmp_path / "egg.usdz") as packed:
        names = {info.filename: info.compress_type for info in packed.infolist()}
        assert set(names.values()) == {zipfile.ZIP_STORED} and len(names) == 2
        (picture,) = (name for name in names if name.endswith(".png"))
        assert np.array_equal(np.array(Image.open(io.BytesIO(packed.read(picture)))), mesh.texture)
    stage = Usd.Stage.Open(str(tmp_path / "egg.usdz"))
    assert pxr and UsdGeom.GetStageUpAxis(stage) == "Y" and stage.GetDefaultPrim().GetName() == "Object"
    shape = UsdGeom.Mesh(stage.GetPrimAtPath("/Object/Surface"))
    points = np.array(shape.GetPointsAttr().Get())
    np.testing.assert_allclose(points[:, [0, 1]], mesh.vertices[:, [0, 2]], atol=1e-6)  # z up becomes y up
    np.testing.assert_allclose(points[:, 2], -mesh.vertices[:, 1], atol=1e-6)
    uv = np.array(UsdGeom.PrimvarsAPI(shape).GetPrimvar("st").Get())
    np.testing.assert_allclose(uv, mesh.uv * [1, -1] + [0, 1], atol=1e-6)
    material, _ = UsdShade.MaterialBindingAPI(shape.GetPrim()).ComputeBoundMaterial()
    surface = UsdShade.Shader(stage.GetPrimAtPath("/Object/Material/Surface"))
    assert material and surface.GetInput("emissiveColor").HasConnectedSource()


def test_mesh_command_with_a_texture(tmp_path, solids, monkeypatch, capsys):
    run = egg_run(tmp_path / "run", solids)
    command = ["latentscenes", "export", "mesh", "--run", str(run.path), "--scene", "egg", "--cells", "24"]
    monkeypatch.setattr(sys, "argv", [*command, "--texture", "128", "--out", str(tmp_path / "egg.obj")])
    cli.main()
    assert {"egg.obj", "egg.mtl", "egg.png"} <= {file.name for file in tmp_path.iterdir()}
    for wrong, message in (
        (["--texture", "16", "--out", "e.glb"], "--texture 16: choose between 64 and 8192 texels a side"),
        (["--faces", "3", "--out", "e.glb"], "--faces 3: at least 100"),
        (["--out", "e.stl"], "this command writes GLB or OBJ or USDZ"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *wrong[:-1], str(tmp_path / wrong[-1])])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_without_the_extras(monkeypatch, tmp_path, mesh):
    for package, call, extra in (
        ("fast_simplification", lambda: simplified(ball(3), 200), "export"),
        ("xatlas", lambda: unwrapped(ball(1), 64), "export"),
        ("pxr", lambda: write_textured(tmp_path / "egg.usdz", mesh), "usd"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"pip install latentscenes\[{extra}\]"):
            call()
