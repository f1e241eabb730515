"""Ray casting and `data meshes`: known pictures, both up axes, cut-outs, and every file accounted for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from conftest import SHARED
from PIL import Image

from latentscenes.core.cameras import Cameras, look_at, orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.meshes.importer import make_meshes, read_mesh
from latentscenes.data.options import MeshChoice, MeshOptions
from latentscenes.data.raycast import (
    BLEND,
    BLEND_BOTH,
    RayCaster,
    TriangleSoup,
    ViewOptions,
    box_around,
    soup_from_mesh,
)
from latentscenes.data.shading import Lights

FLAT = Lights(ambient=1.0, sky=0.0, directions=(), strengths=())
"""Light under which colors stay what they are."""
FEW = ViewOptions(views=4, size=32, held_out=1)
COLORS = {
    (0, 1): (255, 0, 0),
    (0, -1): (0, 255, 0),
    (1, 1): (0, 0, 255),
    (1, -1): (255, 255, 0),
    (2, 1): (255, 0, 255),
    (2, -1): (0, 255, 255),
}


def seen_from(*position: float, focal: float = 1.0) -> Cameras:
    return Cameras(look_at(torch.tensor([position])), torch.tensor([[focal, focal, 0.5, 0.5]]))


def colored_cube() -> trimesh.Trimesh:
    """A cube of side 1 whose six sides are told apart by COLORS[axis, sign]."""
    cube = trimesh.creation.box()
    cube.unmerge_vertices()
    axis = np.abs(cube.face_normals).argmax(1)
    sign = np.sign(cube.face_normals[np.arange(12), axis]).astype(int)
    colors = np.array([(*COLORS[a, s], 255) for a, s in zip(axis, sign)], np.uint8)
    cube.visual = trimesh.visual.ColorVisuals(cube, vertex_colors=np.repeat(colors, 3, 0))
    return cube


def quad(texture: np.ndarray, x: float = 0.0, cutoff: float = 0.5) -> TriangleSoup:
    """A square in the plane x = `x`, y and z from -1/2 to 1/2, its texture upright when seen from +x."""
    corners = np.array([[x, -0.5, -0.5], [x, 0.5, -0.5], [x, 0.5, 0.5], [x, -0.5, 0.5]])
    uv = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    return soup_from_mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]), uv=uv, texture=texture, cutoff=cutoff)


@pytest.mark.parametrize("axis, sign", [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1)])
def test_each_side_of_a_cube_has_its_color_at_the_right_pixels(tmp_path, axis, sign):
    colored_cube().export(tmp_path / "cube.ply")
    soup, _ = read_mesh(tmp_path / "cube.ply")
    position = [0.0, 0.0, 0.0]
    position[axis] = sign * 2.0
    rgb, alpha = RayCaster(soup, FLAT).render(seen_from(*position), 64, samples=1)
    side = 1 / np.sqrt(3)  # of a cube with diagonal 1
    half = 64 * (side / 2) / (2 - side / 2)  # pixels from the middle to the near face's edge
    low, high = int(np.ceil(32 - half - 0.5)), int(np.floor(32 + half - 0.5))
    assert (rgb[0, low : high + 1, low : high + 1] == COLORS[axis, sign]).all()
    outside = np.ones((64, 64), bool)
    outside[low : high + 1, low : high + 1] = False
    assert (rgb[0][outside] == 255).all() and (alpha[0][outside] == 0).all()


def test_a_texture_stands_upright_and_is_not_mirrored():
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[..., :3] = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rgb, _ = RayCaster(quad(texture.repeat(16, 0).repeat(16, 1)), FLAT).render(
        seen_from(2.0, 0, 0), 64, samples=1
    )
    shown = rgb[0][[24, 40]][:, [24, 40]]
    assert (shown == texture[..., :3]).all()


def test_a_gltf_texture_has_its_origin_at_the_upper_left(tmp_path):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :16] = (255, 0, 0)
    square = trimesh.Trimesh(
        [[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]],
        [[0, 1, 2], [0, 2, 3]],
        process=False,
    )
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(picture), baseColorFactor=[255, 255, 255, 255]
    )
    square.visual = trimesh.visual.TextureVisuals(uv=[[0, 0], [1, 0], [1, 1], [0, 1]], material=material)
    square.export(tmp_path / "square.glb")
    soup, _ = read_mesh(tmp_path / "square.glb")
    rgb, _ = RayCaster(soup, FLAT).render(
        seen_from(0, -2.0, 0), 64, samples=1
    )  # glTF's front is -y once z is up
    assert tuple(rgb[0, 26, 26]) == (255, 0, 0) and not rgb[0, 26, 38].any() and not rgb[0, 38, 26].any()


def test_a_cut_out_shows_what_lies_behind():
    fence = np.full((32, 32, 4), 255, np.uint8)
    fence[8:24, 8:24, 3] = 0
    red = np.full((2, 2, 4), (255, 0, 0, 255), np.uint8)
    blue = np.full((2, 2, 4), (0, 0, 255, 255), np.uint8)
    fence[..., :3] = (0, 200, 0)
    both = TriangleSoup.joined([quad(fence, 0.2), quad(red, 0.0), quad(blue, -0.2)])
    rgb, alpha = RayCaster(both, FLAT).render(seen_from(3.0, 0, 0), 64)
    assert (
        tuple(rgb[0, 32, 32]) == (255, 0, 0)
        and tuple(rgb[0, 32, 24]) == (0, 200, 0)
        and alpha[0, 32, 32] == 255
    )
    rgb, alpha = RayCaster(quad(fence, 0.2), FLAT).render(seen_from(3.0, 0, 0), 64)
    assert tuple(rgb[0, 32, 32]) == (255, 255, 255) and alpha[0, 32, 32] == 0 and alpha[0, 32, 24] == 255


def test_a_translucent_pane_mixes_with_what_lies_behind():
    pane = quad(np.full((2, 2, 4), (0, 0, 255, 51), np.uint8), 0.2, BLEND)
    rgb, alpha = RayCaster(
        TriangleSoup.joined([pane, quad(np.full((2, 2, 4), (255, 0, 0, 255), np.uint8))]), FLAT
    ).render(seen_from(3.0, 0, 0), 16)
    assert tuple(rgb[0, 8, 8]) == (204, 0, 51) and alpha[0, 8, 8] == 255
    rgb, alpha = RayCaster(pane, FLAT).render(seen_from(3.0, 0, 0), 16)
    assert tuple(rgb[0, 8, 8]) == (204, 204, 255) and alpha[0, 8, 8] == 51


@pytest.mark.parametrize(
    "bodies, flipped, cutoff, expected",
    [
        ([0.0], False, BLEND, 0.4),
        ([0.0], True, BLEND, 0.4),
        ([-0.3, 0.3], False, BLEND, 1 - 0.6**2),
        ([0.0], False, BLEND_BOTH, 1 - 0.6**2),
    ],
    ids=["one body", "inside out", "two bodies", "backs are drawn"],
)
def test_glass_counts_once_where_a_ray_enters_and_leaves_it(bodies, flipped, cutoff, expected):
    cube = trimesh.creation.box((0.2, 0.2, 0.2))
    points = np.concatenate([cube.vertices + (x, 0, 0) for x in bodies])
    faces = np.concatenate([cube.faces[:, :: -1 if flipped else 1] + 8 * k for k in range(len(bodies))])
    glass = soup_from_mesh(points, faces, colors=(0.0, 0.0, 0.0, 0.4), cutoff=cutoff)
    _, alpha = RayCaster(glass, FLAT).render(seen_from(3.0, 0.05, 0.02), 32)
    assert abs(alpha[0, 16, 16] - 255 * expected) <= 1


@pytest.mark.parametrize("away", [3.0, -3.0])
def test_an_open_pane_of_glass_counts_from_both_sides(away):
    points = np.array([(0, -1, -1), (0, 1, -1), (0, 1, 1), (0, -1, 1)], float)
    pane = soup_from_mesh(points, np.array([(0, 1, 2), (0, 2, 3)]), colors=(0.0, 0.0, 0.0, 0.4), cutoff=BLEND)
    _, alpha = RayCaster(pane, FLAT).render(seen_from(away, 0, 0), 16)
    assert abs(alpha[0, 8, 8] - 102) <= 1


def test_light_does_not_depend_on_winding_or_viewer():
    texture = np.full((2, 2, 4), (200, 200, 200, 255), np.uint8)
    square = quad(texture)
    turned = TriangleSoup.joined([square])
    turned = TriangleSoup(
        turned.corners[:, ::-1],
        -turned.normals,
        turned.uv,
        turned.colors,
        turned.texture,
        turned.cutoff,
        turned.textures,
    )
    near, far = seen_from(2.0, 0, 0), seen_from(3.0, 0.4, 0.3)
    one = [RayCaster(square).render(camera, 32)[0][0, 16, 16] for camera in (near, far)]
    two = [RayCaster(turned).render(camera, 32)[0][0, 16, 16] for camera in (near, far)]
    assert np.ptp(np.array(one + two, int), axis=0).max() <= 1


def test_y_up_glb_and_z_up_ply_give_the_same_pictures(tmp_path):
    cube = colored_cube()
    cube.apply_scale([2.0, 1.0, 0.6])
    cube.apply_translation([5.0, -3.0, 7.0])
    cube.export(tmp_path / "shape.ply")
    cube.apply_transform([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    for name in ("shape.glb", "lying.ply"):
        cube.export(tmp_path / name)
    cameras = orbit(3, elevation=0.5)
    expected = RayCaster(read_mesh(tmp_path / "shape.ply")[0]).render(cameras, 48)
    for path, up in ((tmp_path / "shape.glb", "auto"), (tmp_path / "lying.ply", "y")):
        soup, remarks = read_mesh(path, MeshOptions(up=up))
        assert not remarks and np.linalg.norm(np.diff(soup.bounds, axis=0)) == pytest.approx(1, abs=1e-5)
        for got, want in zip(RayCaster(soup).render(cameras, 48), expected):
            differs = np.abs(got.astype(int) - want) > 2
            assert differs.mean() < 0.002  # rays along edges may fall either way


def test_gltf_factors_are_linear_light(tmp_path):
    cube = trimesh.creation.box()
    cube.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=[128, 0, 255, 255])
    )
    cube.export(tmp_path / "cube.glb")
    rgb, _ = RayCaster(read_mesh(tmp_path / "cube.glb")[0], FLAT).render(seen_from(2.0, 0, 0), 16)
    assert tuple(rgb[0, 8, 8]) == (188, 0, 255)


def test_an_obj_keeps_its_materials_and_a_lost_texture_is_remarked(tmp_path):
    (tmp_path / "paint.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl lost\nKd 0 1 0\nmap_Kd gone.png\n")
    vertices = "".join(f"v {x} {y} {z}\n" for x, y, z in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)])
    (tmp_path / "two.obj").write_text(
        f"mtllib paint.mtl\n{vertices}vt 0 0\nvt 1 0\nvt 0 1\nusemtl red\nf 1/1 2/2 3/3\nusemtl lost\nf 1/1 "
        "3/2 4/3\n"
    )
    soup, remarks = read_mesh(tmp_path / "two.obj")
    assert {tuple(color) for color in soup.colors[:, 0, :3].round(2)} == {(1, 0, 0), (0, 1, 0)}
    assert remarks == ("the texture 'gone.png' is not there",)


def test_silhouettes_agree_with_projected_vertices():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    ball.apply_scale([1.0, 0.6, 0.4])
    soup, cameras = soup_from_mesh(ball.vertices, ball.faces), orbit(4, elevation=0.3)
    _, alpha = RayCaster(soup).render(cameras, 64)
    places, _ = cameras.project(torch.tensor(ball.vertices, dtype=torch.float32))
    for view in range(4):
        rows, columns = np.nonzero(alpha[view])
        low, high = places[view].min(0).values.numpy() * 64, places[view].max(0).values.numpy() * 64
        assert np.allclose([columns.min(), rows.min()], np.floor(low), atol=1.01)
        assert np.allclose([columns.max(), rows.max()], np.floor(high), atol=1.01)


def test_an_object_partly_out_of_the_picture_or_round_the_camera_is_still_drawn():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    caster = RayCaster(soup_from_mesh(ball.vertices, ball.faces), FLAT)
    close = Cameras(seen_from(1.0, 0, 0).cam2world, torch.tensor([[1.0, 1.0, 0.0, 0.5]]))
    assert tuple(caster.render(close, 32)[1][0, 16, [0, 31]]) == (255, 0)
    assert (caster.render(seen_from(0.1, 0, 0), 16)[1] == 255).all()
    away = Cameras(
        look_at(torch.tensor([[2.0, 0, 0]]), torch.tensor([4.0, 0, 0])), torch.tensor([[1.0, 1.0, 0.5, 0.5]])
    )
    assert not caster.render(away, 16)[1].any()


def test_a_folder_becomes_a_dataset_and_every_file_is_accounted_for(tmp_path, capsys):
    folder = tmp_path / "meshes"
    (folder / "more").mkdir(parents=True)
    for name in ("a.ply", "b.glb", "more/c.obj"):
        colored_cube().export(folder / name)
    (folder / "broken.glb").write_bytes(b"glTF but not really")
    trimesh.PointCloud(np.eye(3)).export(folder / "points.ply")
    make_meshes(folder, tmp_path / "out", FEW, choice=MeshChoice(new=2))
    report = capsys.readouterr().err.replace("\n", " ")
    assert "broken.glb: is cut short" in report and "points.ply: holds points" in report
    views = PosedImages.open(tmp_path / "out")
    assert {scene.name for scene in views.scenes} == {"a", "b", "more__c"} and views.rgb.shape == (
        12,
        32,
        32,
        3,
    )
    assert [scene.name for scene in views.scenes if scene.split == "new"] == [
        "more__c"
    ]  # of the last two by name
    assert (
        all(half >= side for half, side in zip(views.box.half, [0.5 / np.sqrt(3)] * 3))
        and max(views.box.half) < 0.31
    )
    with pytest.raises(UserError, match="broken.glb"):
        make_meshes(folder, tmp_path / "strict", FEW, choice=MeshChoice(strict=True))
    assert not (tmp_path / "strict").exists()


def test_nothing_readable_is_an_error_that_names_the_files(tmp_path):
    (tmp_path / "one.glb").write_bytes(b"no")
    with pytest.raises(UserError, match="none of 1 meshes could be read(.|\n)*one.glb"):
        make_meshes(tmp_path, tmp_path / "out", FEW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no mesh"):
        make_meshes(tmp_path / "empty", tmp_path / "out", FEW)
    with pytest.raises(UserError, match="no such folder"):
        make_meshes(tmp_path / "absent", tmp_path / "out", FEW)
    assert not list(tmp_path.glob("out*"))


def test_a_split_file_decides_and_what_it_leaves_out_is_said(tmp_path, capsys):
    for name in ("a", "b", "c"):
        colored_cube().export(tmp_path / f"{name}.ply")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["c"], "new": ["a"]}))
    make_meshes(tmp_path, tmp_path / "out", FEW, choice=MeshChoice(split=tmp_path / "split.json"))
    assert {scene.name: scene.split for scene in PosedImages.open(tmp_path / "out").scenes} == {
        "c": "train",
        "a": "new",
    }
    assert "1 left out, as the split file does not name them: b" in capsys.readouterr().err
    (tmp_path / "split.json").write_text(json.dumps({"train": ["d"], "new": []}))
    with pytest.raises(UserError, match="'d'"):
        make_meshes(tmp_path, tmp_path / "other", FEW, choice=MeshChoice(split=tmp_path / "split.json"))


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    colored_cube().export(tmp_path / "a.ply")
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        make_meshes(tmp_path / "a.ply", tmp_path / name, ViewOptions(views=3, size=24, held_out=1, seed=seed))
    files = {name: (tmp_path / name / "rgb.npy").read_bytes() for name in ("one", "two", "three")}
    assert files["one"] == files["two"] != files["three"]


def test_the_box_holds_all_bounds_with_a_margin():
    bounds = [np.array([[-1, -2, -3], [1, 0, 3]], np.float32), np.array([[-2, -1, 0], [0, 2, 1]], np.float32)]
    box = box_around(bounds, margin=0.1)
    assert box.center == pytest.approx((-0.5, 0, 0)) and box.half == pytest.approx((1.65, 2.2, 3.3))


def test_options_out_of_range_are_refused():
    for wrong in ({"held_out": 40}, {"views": 0}, {"size": 0}, {"distance": 0.4}):
        with pytest.raises(UserError):
            ViewOptions(**wrong)


CARS = SHARED / "data" / "torcs_cars"


@pytest.mark.skipif(not CARS.is_dir(), reason=f"{CARS} is absent")
def test_real_cars_are_read_without_remarks_and_lie_along_x():
    for path in sorted(CARS.glob("*.glb"))[::15]:
        soup, remarks = read_mesh(Path(path))
        sides = np.diff(soup.bounds, axis=0)[0]
        assert (
            not remarks
            and sides[0] > sides[1] > sides[2]
            and np.linalg.norm(sides) == pytest.approx(1, abs=1e-4)
        )
        rgb, alpha = RayCaster(soup).render(orbit(2, elevation=0.4), 48, samples=2)
        assert 0.04 < (alpha / 255).mean() < 0.4 and rgb[alpha == 255].std() > 10
