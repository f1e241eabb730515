"""Meshes and points: an ellipsoid known in closed form is exported closed, in place, in its colors and
upright. Exported files can be read by trimesh and by `data meshes`."""

import json
import struct
import sys

import numpy as np
import pytest
import torch
import trimesh
from egg import BOX, CENTER, SEMI, VIEW, egg, egg_colors, egg_points, egg_run

from benchmarks.mesh_error import compare
from latentscenes.cli import main as cli
from latentscenes.core.cameras import Box, Cameras, look_at, orbit, spread_directions
from latentscenes.core.errors import UserError
from latentscenes.data.images import white_background
from latentscenes.data.meshes.importer import read_mesh
from latentscenes.data.shading import to_srgb
from latentscenes.export import mesh as export_mesh
from latentscenes.export import surface as export_surface
from latentscenes.export.mesh import (
    Mesh,
    Points,
    check_ending,
    scene_mesh,
    scene_points,
    write_glb,
    write_ply,
)
from latentscenes.export.surface import Grid, background, background_share, large_parts, max_transmittance
from latentscenes.model.model import RenderedImages

Y_TO_Z = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])

pytest.importorskip("skimage")
from scipy.spatial import cKDTree  # noqa: E402 — comes with scikit-image

CELLS = 48


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return scene_mesh(egg(), "egg", VIEW, cells=CELLS)


@pytest.fixture(scope="module")
def points() -> Points:
    return scene_points(egg(), "egg", VIEW, count=3000, cells=CELLS)


def chamfer(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean distance to the nearest point of the other set, in both directions."""
    return cKDTree(other).query(one)[0].mean(), cKDTree(one).query(other)[0].mean()


def depth_below(points: np.ndarray) -> np.ndarray:
    """Depth below the ellipsoid, relative to its radius in that direction."""
    return 1 - np.linalg.norm((points - CENTER) / SEMI, axis=1)


# Where the light stops


def test_cells_are_cubes_that_fill_the_box():
    grid = Grid.filling(Box((1.0, 2.0, 3.0), (0.5, 0.3, 0.26)), 20)
    assert grid.count == (20, 12, 11) and grid.step == pytest.approx(0.05)
    places = grid.points()
    assert places.shape == (20, 12, 11, 3)
    torch.testing.assert_close(places[0, 0, 0], torch.tensor([0.525, 1.725, 2.75]))
    torch.testing.assert_close(places[-1, -1, -1], torch.tensor([1.475, 2.275, 3.25]))


def test_light_through_a_slab():
    """Half the space is fog. Vertical light decays with exp(−σ t), and slanted light has a longer path."""
    density = np.zeros((24, 24, 24), np.float32)
    density[:, :, :12] = 3.0
    step = 0.02
    straight = max_transmittance(density, step, np.float32([[0.0, 0.0, 1.0]]))
    depth = (12 - np.arange(24) - 0.5) * step
    assert np.abs(straight - np.exp(-3 * depth.clip(0))).max() < 1e-6
    slanted = max_transmittance(density, step, np.float32([[0.6, 0.0, 0.8]]))
    assert np.abs(slanted[12, 12, 8:12] - np.exp(-3 * depth[8:12] / 0.8)).max() < 1e-6
    both = max_transmittance(density, step, np.float32([[0.0, 0.0, 1.0], [0.6, 0.0, 0.8]]))
    assert (both == np.maximum(straight, slanted)).all()


def test_light_goes_straight_past_a_bar():
    """A bar along y leaves its shadow where lines of every direction, traced one by one, meet it."""
    density = np.zeros((20, 12, 26), np.float32)
    density[8:11, :, 12:15] = 4.0
    for toward in ([0.36, 0.48, 0.8], [-0.8, 0.36, 0.48], [-0.48, 0.36, -0.8], [0.8, -0.48, -0.36]):
        light = max_transmittance(density, 0.1, np.float32([toward]))
        middles = np.argwhere(np.ones_like(density)).astype(float)
        fine = np.linspace(0, 40, 401)  # cells
        places = middles[:, None] + fine[:, None] * np.array(toward)
        inside = ((places[..., [0, 2]] >= [7.5, 11.5]) & (places[..., [0, 2]] < [10.5, 14.5])).all(2)
        inside &= (places[..., 1] > -0.5) & (places[..., 1] < 11.5)
        truth = np.exp(-4.0 * 0.1 * 0.1 * inside.sum(1)).reshape(density.shape)
        assert np.abs(light - truth).mean() < 0.02 and np.abs(light - truth).max() < 0.25
        assert light.min() < 0.35


def test_directions_are_even_and_reach_down_to_the_lowest():
    everywhere = spread_directions(400)
    torch.testing.assert_close(everywhere.norm(dim=1), torch.ones(400))
    assert everywhere.mean(0).abs().max() < 0.01
    nearest = (everywhere @ everywhere.T - 2 * torch.eye(400)).amax(1).acos()
    assert nearest.min() > 0.5 * nearest.max()
    above = spread_directions(50, 0.5)[:, 2]
    assert above.min() > np.sin(0.5) and above.max() > 0.95


def test_small_parts_are_left_out():
    cells = np.zeros((20, 20, 20), bool)
    cells[2:12, 2:12, 2:12] = True
    cells[15, 15, 15] = True
    kept = large_parts(cells)
    assert kept.sum() == 1000 and not kept[15, 15, 15]
    assert not large_parts(np.zeros((3, 3, 3), bool)).any()


def test_ground_is_white_that_reaches_the_border():
    """A black frame around white: the white inside the frame is not background, the white outside is."""
    picture = np.full((1, 40, 40, 3), 255, np.uint8)
    picture[:, 8:32, 8:32] = 0
    picture[:, 14:26, 14:26] = 255
    ground = white_background(picture)
    camera = Cameras(look_at(torch.tensor([[0.0, -2.0, 0.0]])), torch.tensor([[1.0, 1.0, 0.5, 0.5]]))
    grid = Grid.filling(Box((0.0, 0.0, 0.0), (0.9, 0.9, 0.9)), 9)
    share = background_share(grid.points().reshape(-1, 3), ground, camera).reshape(grid.count)
    assert share[4, 4, 4] == 0 and share[6, 4, 4] == 0 and share[8, 4, 4] == 1 and share[4, 4, 0] == 1


@pytest.mark.parametrize("white", [1, 8])
def test_white_parts_of_the_object_are_no_background(white):
    """A ball that one of eight pictures shows in white is an object; one that all show so is white matter."""
    box = Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    cameras, grid = VIEW.around(box).orbit(8, 10.0), Grid.filling(box, 40)
    origins, directions = cameras.rays(*VIEW.size)
    along = -(origins * directions).sum(-1)
    inner = 0.3**2 - (origins.square().sum(-1) - along**2)
    depth = (along - inner.clamp_min(0).sqrt()).view(8, *VIEW.size)
    hit = (inner > 0).view(8, *VIEW.size)
    images = torch.ones(8, 3, *VIEW.size)
    images[white:] = torch.where(hit[white:, None], 0.0, images[white:])
    shown = RenderedImages(images, images, depth, hit.float())
    near = np.argwhere((grid.points().norm(dim=-1) < 0.34).numpy())
    ground = background(shown, cameras, grid, near)
    assert ground[~hit.numpy()].all()
    inner = (inner > 0.04).view(8, *VIEW.size).numpy()  # not the edge, beside which there is background
    share = ground[:white][inner[:white]].mean()
    assert share > 0.95 if white == 8 else share < 0.05


# The mesh


def test_mesh_is_closed_and_in_place(mesh):
    opened = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert opened.is_watertight and opened.is_winding_consistent and opened.body_count == 1
    assert opened.volume == pytest.approx(4 / 3 * np.pi * SEMI.prod(), rel=0.1)
    there, back = chamfer(mesh.vertices, egg_points())
    step = 2 * max(BOX.half) / CELLS
    assert there < 0.35 * step and back < 0.6 * step  # a cell is a 29th of the egg


def test_normals_point_outward(mesh):
    truth = (mesh.vertices - CENTER) / SEMI**2
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    along = (mesh.normals * truth).sum(1)
    assert along.min() > 0.6 and along.mean() > 0.96


def test_colors_are_those_of_the_surface(mesh):
    above = mesh.vertices[:, 2] > CENTER[2]
    assert np.abs(mesh.colors - egg_colors(mesh.vertices))[above].mean() < 0.02
    # Invisible vertices take the colors of the nearest visible ones.
    assert np.abs(mesh.colors - egg_colors(mesh.vertices))[~above].mean() < 0.1


def test_empty_space_inside_is_filled():
    """A hollow ball has one closed surface, since no light gets in."""
    cells = np.zeros((30, 30, 30), np.float32)
    place = np.linalg.norm(np.meshgrid(*3 * [np.linspace(-1, 1, 30)]), axis=0)
    cells[(place > 0.6) & (place < 0.8)] = 200.0
    light = max_transmittance(cells, 2 / 29, spread_directions(export_surface.DIRECTIONS).numpy())
    assert light[15, 15, 15] < 0.01 and light[0, 0, 0] > 0.99


def test_white_matter_in_the_air_is_left_out(monkeypatch):
    """A slab of white beside the egg is in the field, but no picture over white shows it."""
    loaded = egg()
    density = export_surface.density

    def with_slab(model, planes, grid):
        found = density(model, planes, grid).clone()
        found[-4:] = 500.0
        return found

    monkeypatch.setattr(export_surface, "density", with_slab)
    clean = scene_mesh(loaded, "egg", VIEW, cells=32)
    assert clean.vertices[:, 0].max() < CENTER[0] + SEMI[0] + 0.03
    monkeypatch.setattr(export_surface, "GROUND", 1.1)
    assert scene_mesh(loaded, "egg", VIEW, cells=32).vertices[:, 0].max() > 0.5


def test_scenes_without_a_surface_and_bad_numbers_are_refused():
    with pytest.raises(UserError, match="nothing in this scene is solid"):
        scene_mesh(egg(semi=0.001 * SEMI), "egg", VIEW, cells=16)
    for wrong, message in (
        ({"cells": 4}, "--cells 4: choose between 8 and 512"),
        ({"lowest": 90.0}, "--lowest 90: an elevation"),
    ):
        with pytest.raises(UserError, match=message):
            scene_mesh(egg(), "egg", VIEW, **wrong)
    with pytest.raises(UserError, match="--count 0"):
        scene_points(egg(), "egg", VIEW, count=0)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(UserError, match=r"pip install latentscenes\[export\]"):
        scene_mesh(egg(), "egg", VIEW, cells=16)


# Points


def test_points_lie_on_what_is_seen(points):
    assert points.positions.shape == points.normals.shape == points.colors.shape == (3000, 3)
    assert np.abs(depth_below(points.positions)).mean() < 0.04
    np.testing.assert_allclose(np.linalg.norm(points.normals, axis=1), 1, atol=1e-6)
    assert np.abs(points.colors - egg_colors(points.positions)).mean() < 0.02
    assert points.normals[:, 2].min() > -0.99  # cameras above do not see faces that point down
    everywhere = scene_points(egg(), "egg", VIEW, count=500, cells=CELLS, lowest=-90.0)
    assert everywhere.normals[:, 2].min() < -0.999


def test_points_are_even():
    """Each horizontal band of a sphere gets a share of points equal to its share of the area."""
    sphere = trimesh.creation.icosphere(3)
    found = export_surface.Surface(np.asarray(sphere.vertices), np.asarray(sphere.faces), 0.1)
    positions, normals = export_mesh.sampled(found, 20_000, np.random.default_rng(0))
    counts = np.histogram(positions[:, 2], bins=np.linspace(-1, 1, 6))[0]
    assert np.abs(counts / 4000 - 1).max() < 0.05  # Archimedes: equal heights, equal areas
    assert np.abs(normals - positions).max() < 0.1


# Files


def test_glb_opens_elsewhere_with_y_up(mesh, tmp_path):
    size = write_glb(tmp_path / "a" / "egg.glb", mesh, "egg <1>")
    assert size == (tmp_path / "a" / "egg.glb").stat().st_size and len(list((tmp_path / "a").iterdir())) == 1
    (opened,) = trimesh.load_scene(tmp_path / "a" / "egg.glb", process=False).geometry.values()
    assert opened.is_watertight and opened.volume > 0
    np.testing.assert_allclose(opened.vertices @ Y_TO_Z.T, mesh.vertices, atol=1e-6)
    np.testing.assert_allclose(opened.vertex_normals @ Y_TO_Z.T, mesh.normals, atol=1e-6)
    assert np.array_equal(opened.faces, mesh.faces)


def test_glb_keeps_what_the_standard_asks(mesh, tmp_path):
    write_glb(tmp_path / "egg.glb", mesh, "egg", {"license": "CC0", "tags": ["food"]})
    content = (tmp_path / "egg.glb").read_bytes()
    magic, version, length, text = struct.unpack("<4sIII", content[:16])
    assert (magic, version, length) == (b"glTF", 2, len(content)) and text % 4 == 0
    tree = json.loads(content[20 : 20 + text])
    for view, accessor in zip(tree["bufferViews"], tree["accessors"], strict=True):
        width = {5123: 2, 5125: 4, 5126: 4}[accessor["componentType"]] * {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[
            accessor["type"]
        ]
        assert view["byteOffset"] % 4 == 0 and view["byteLength"] == width * accessor["count"]
    assert tree["buffers"][0]["byteLength"] == len(content) - 28 - text
    assert tree["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}
    (primitive,) = tree["meshes"][0]["primitives"]
    used = {name: tree["accessors"][at] for name, at in primitive["attributes"].items()}
    np.testing.assert_allclose(used["POSITION"]["min"], (mesh.vertices @ Y_TO_Z).min(0), atol=1e-6)
    assert used["COLOR_0"]["componentType"] == 5123 and used["COLOR_0"]["normalized"]
    assert primitive["material"] == 0 and tree["nodes"] == [
        {"mesh": 0, "name": "egg", "extras": {"license": "CC0", "tags": ["food"]}}
    ]


def test_glb_comes_back_through_data_meshes(mesh, tmp_path):
    """The mesh is turned, centered and scaled like every imported mesh and has the same colors."""
    write_glb(tmp_path / "egg.glb", mesh)
    soup, remarks = read_mesh(tmp_path / "egg.glb")
    assert not remarks
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    expected = (mesh.vertices - (low + high) / 2) / np.linalg.norm(high - low)
    np.testing.assert_allclose(soup.corners, expected[mesh.faces], atol=1e-5)
    assert soup.linear and soup.lit is not None and not soup.lit.any()  # its colors hold light already
    np.testing.assert_allclose(to_srgb(soup.colors[..., :3]), mesh.colors[mesh.faces], atol=2e-3)


def test_exported_mesh_lies_on_its_source(mesh, tmp_path):
    """The export of a learned ellipsoid lies on an analytic ellipsoid in a y-up GLB."""
    source = trimesh.creation.icosphere(4)
    source.vertices = (source.vertices * SEMI + CENTER) @ Y_TO_Z
    source.export(tmp_path / "source.glb")
    write_glb(tmp_path / "egg.glb", mesh)
    clouds = [read_mesh(tmp_path / name)[0].corners.reshape(-1, 3) for name in ("source.glb", "egg.glb")]
    assert max(chamfer(*clouds)) < 0.015  # the diagonal is 1
    turned = clouds[1] @ Y_TO_Z.T.astype(np.float32)
    assert min(chamfer(clouds[0], turned)) > 0.03


def test_ply_opens_elsewhere(points, tmp_path):
    size = write_ply(tmp_path / "egg.ply", points)
    assert size == (tmp_path / "egg.ply").stat().st_size
    opened = trimesh.load(tmp_path / "egg.ply")
    np.testing.assert_allclose(opened.vertices, points.positions, atol=1e-6)
    assert np.array_equal(np.asarray(opened.colors)[:, :3], np.round(255 * points.colors))
    header, _, body = (tmp_path / "egg.ply").read_bytes().partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\n") and b"element vertex 3000" in header
    np.testing.assert_allclose(
        np.frombuffer(body[:27], "<f4", 6), [*points.positions[0], *points.normals[0]], rtol=1e-6
    )


def test_wrong_endings_are_refused(tmp_path):
    with pytest.raises(UserError, match="this command writes GLB; name a file that ends in .glb"):
        check_ending(tmp_path / "car.obj", ".glb")
    (tmp_path / "car.glb").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_ending(tmp_path / "car.glb", ".glb")
    check_ending(tmp_path / "new" / "folders" / "car.glb", ".glb")
    assert not (tmp_path / "new").exists()


def test_hidden_and_grazing_places_have_no_color():
    """An overhead camera sees only the top of the upper of two plates."""
    plate = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    found = export_surface.Surface(
        np.concatenate([plate, plate + [0, 0, 0.5]]),
        np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]),
        0.02,
    )
    cameras = orbit(1, distance=4.0, elevation=np.pi / 2)
    white = torch.ones(1, 3, 16, 16)
    shown = export_mesh.RenderedImages(
        white * torch.tensor([1.0, 0.5, 0.0])[:, None, None], white, white[:, 0], white[:, 0]
    )
    places = np.array([[0.1, 0.2, 0.5], [0.1, 0.2, 0.5], [0.1, 0.2, 0.5], [0.1, 0.2, 0.0]])
    normals = np.array([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [0, 0, 1]])
    colors, seen = export_mesh.Photographed("plates", found, shown, cameras).paint(places, normals)
    assert seen.tolist() == [True, False, False, False]
    np.testing.assert_allclose(colors, [[1, 0.5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


def test_distance_to_a_source_that_is_larger(mesh, tmp_path):
    """Concentric spheres, one 5 % larger, are 5 % of a radius apart. No camera sees the core inside."""
    ball, core = trimesh.creation.icosphere(4), trimesh.creation.icosphere(2, radius=0.5)
    (ball + core).export(tmp_path / "source.ply")
    radius = 1 / np.linalg.norm([2, 2, 2])  # as imported, its box has a diagonal of 1
    vertices = 1.05 * radius * np.asarray(ball.vertices)
    larger = Mesh(vertices, np.asarray(ball.faces), vertices, vertices)
    apart = compare(larger, tmp_path / "source.ply", orbit(8, elevation=0.5))
    assert apart.to_source == pytest.approx(0.025, abs=0.002) and apart.to_export == pytest.approx(
        0.025, abs=0.002
    )
    assert apart.chamfer == pytest.approx((apart.to_source + apart.to_export) / 2)
    assert 0.2 < apart.hidden < 0.6  # the core is a fifth of the area, and cameras above see most of the ball


def test_mesh_and_points_commands(tmp_path, solids, monkeypatch, capsys):
    run = egg_run(tmp_path / "run", solids)
    options = ["--run", str(run.path), "--scene", "egg", "--cells", "32"]
    for arguments in (
        ["mesh", *options, "--out", str(tmp_path / "e.glb")],
        ["points", *options, "--out", str(tmp_path / "e.ply"), "--count", "50"],
    ):
        monkeypatch.setattr(sys, "argv", ["latentscenes", "export", *arguments])
        cli.main()
    printed = " ".join(capsys.readouterr().err.split())
    assert "triangles" in printed and "50 points" in printed
    assert (
        trimesh.load_mesh(tmp_path / "e.glb").is_watertight
        and len(trimesh.load(tmp_path / "e.ply").vertices) == 50
    )
