"""Habits of other programs and of folders on the internet, met in files of strangers; all files are written
here."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_mesh_formats import write_glb

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.meshes.importer import make_meshes, read_mesh
from latentscenes.data.meshes.sources import find_meshes
from latentscenes.data.options import MeshOptions, ViewOptions

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 1 1 1\nf 1 2 3\n"


def colors(path) -> np.ndarray:
    """Linear colors of the corners, without alpha."""
    return read_mesh(path)[0].colors.reshape(-1, 4)[:, :3]


def test_files_that_differ_only_in_the_ending_keep_it(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("chair.obj", "table.obj"):
        (folder / name).write_text(TRIANGLE)
    write_glb(folder / "chair.glb")
    assert list(find_meshes(folder)) == ["chair_glb", "chair_obj", "table"]
    make_meshes(folder, tmp_path / "out", ViewOptions(views=4, held_out=1, size=16))
    assert [scene.name for scene in PosedImages.open(tmp_path / "out").scenes] == [
        "chair_glb",
        "chair_obj",
        "table",
    ]


def test_an_invisible_node_hides_those_below_it(tmp_path):
    def hidden(content):
        content["scenes"] = [{"nodes": [0, 1]}]
        content["nodes"] = [
            {"children": [2], "extensions": {"KHR_node_visibility": {"visible": False}}},
            {"mesh": 0},
            {"mesh": 0, "translation": [9, 0, 0]},
        ]

    soup, _ = read_mesh(write_glb(tmp_path / "a.glb", changes=hidden))
    assert len(soup.corners) == 2  # one quad, and not that 9 to the right


def test_draco_colors_count_up_to_the_largest_of_the_files_type(tmp_path, monkeypatch):
    """The decoder hands out 16 bits as 32."""
    found = {
        "POSITION": np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32),
        "COLOR_0": np.full((4, 3), 65535, np.uint32),
    }
    attributes = [{"unique_id": place, "data": data} for place, data in enumerate(found.values())]
    mesh = SimpleNamespace(attributes=attributes, faces=np.array([[0, 1, 2], [0, 2, 3]], np.uint32))
    monkeypatch.setitem(sys.modules, "DracoPy", SimpleNamespace(decode=lambda data: mesh))

    def packed(content):
        primitive = content["meshes"][0]["primitives"][0]
        place = primitive["attributes"]["COLOR_0"]
        content["accessors"][place]["normalized"] = True
        numbers = {name: place for place, name in enumerate(found)}
        extension = {"bufferView": 0, "attributes": numbers}
        primitive["extensions"] = {"KHR_draco_mesh_compression": extension}

    path = tmp_path / "a.glb"
    write_glb(path, arrays={"COLOR_0": np.full((4, 4), 65535, "<u2")}, changes=packed)
    assert colors(path) == pytest.approx(1.0)


@pytest.mark.parametrize("line", ["l 1 2", "p 1", "surf 0 1 0 1 1 2 3"])
def test_obj_elements_that_are_no_polygons_are_named(tmp_path, line):
    path = tmp_path / "a.obj"
    path.write_text(TRIANGLE + line + "\n")
    _, (remark,) = read_mesh(path)
    assert remark.endswith("are left out")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8"])
def test_obj_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.obj"
    path.write_bytes(("\ufeff" + TRIANGLE).encode(encoding))
    assert len(read_mesh(path)[0].corners) == 1


@pytest.mark.parametrize(
    "line", ["my red.mtl", r"my\ red.mtl", "other.mtl my red.mtl", r"none.mtl my\ red.mtl"]
)
def test_libraries_whose_names_hold_spaces(tmp_path, line):
    (tmp_path / "my red.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (tmp_path / "other.mtl").write_text("newmtl blue\nKd 0 0 1\n")
    path = tmp_path / "a.obj"
    path.write_text(f"mtllib {line}\nusemtl red\n{TRIANGLE}")
    assert colors(path)[0] == pytest.approx((1, 0, 0)) and read_mesh(path)[1] == ()


def test_the_color_space_of_a_texture_is_an_option_and_no_name(tmp_path):
    Image.new("RGB", (2, 2), (200, 30, 30)).save(tmp_path / "paint.png")
    (tmp_path / "a.mtl").write_text("newmtl red\nmap_Kd -colorspace sRGB -o 0.1 paint.png\n")
    path = tmp_path / "a.obj"
    path.write_text("mtllib a.mtl\nvt 0 0\nusemtl red\n" + TRIANGLE.replace("1 2 3", "1/1 2/1 3/1"))
    soup, remarks = read_mesh(path)
    assert soup.textures[0][0, 0, :3].tolist() == [200, 30, 30] and remarks == ()


@pytest.mark.parametrize(
    ("rows", "expected", "remark"),
    [
        (["0 0 0 1 0 0"] * 3, (1, 0, 0), None),
        (["0 0 0 1 0 1 0"] * 3, (0, 1, 0), None),  # x y z w r g b
        (["0 0 0 0 0 1 1"] * 3, (0, 0, 1), None),  # x y z r g b a
        (["0 0 0 0 1 0", "0 0 0", "0 0 0 nan nan nan"], None, "taken as white"),
    ],
)
def test_vertices_with_colors_in_obj(tmp_path, rows, expected, remark):
    places = ("0 0 0", "1 0 0", "1 1 1")
    path = tmp_path / "a.obj"
    lines = [f"v {place}{row[5:]}\n" for place, row in zip(places, rows, strict=True)]
    path.write_text("".join(lines) + "f 1 2 3\n")
    expected = [(0, 1, 0), (1, 1, 1), (1, 1, 1)] if expected is None else [expected] * 3
    assert colors(path) == pytest.approx(np.array(expected, float))
    assert [remark in line for line in read_mesh(path)[1]] == [True] * bool(remark)


def test_strips_of_ply_under_either_name(tmp_path):
    path = tmp_path / "a.ply"
    head = "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
    strips = "element tristrips 1\nproperty list int int vertex_index\nend_header\n"
    path.write_text(f"{head}{strips}0 0 0\n1 0 0\n0 1 0\n1 1 0\n4 0 1 2 3\n")
    assert len(read_mesh(path)[0].corners) == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.obj", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS"),
        ("a.glb", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS"),
        ("a.gltf", json.dumps({"asset": {"version": "1.0"}}), "Convert it"),
        (
            "a.ply",
            "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nend_header\n0\n",
            "is cut short",
        ),
        (
            "b.ply",
            "ply\nformat ascii 1.0\nelement vertex 1\nproperty uint packed_position\nend_header\n0\n",
            "holds Gaussian splats",
        ),
        (
            "c.ply",
            "ply\nformat ascii 1.0\nelement face 1\nproperty list int int vertex_index\nend_header\n0.5 1\n",
            "not as its header says",
        ),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        read_mesh(tmp_path / name)


@pytest.mark.parametrize("multiply, kd", [(False, 1.0), (True, 0.5)])
def test_faces_without_coordinates_have_the_mean_color_of_their_texture(multiply, kd, tmp_path):
    """As the renderer of a furniture library shows them; Kd beside a texture is whatever the exporter had."""
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\nusemtl wood\nvt 0 0\n{TRIANGLE}f 1/1 2/1 3/1\n")
    (tmp_path / "a.mtl").write_text("newmtl wood\nKd 0.735357 0 0\nd 0.8\nmap_Kd wood.png\n")  # 0.5 of light
    picture = np.zeros((2, 4, 4), np.uint8)
    picture[:, :2], picture[:, 2:] = (255, 0, 0, 255), (255, 255, 0, 255)
    picture[0, 0] = (255, 255, 255, 0)  # not seen
    Image.fromarray(picture).save(tmp_path / "wood.png")
    soup, _ = read_mesh(tmp_path / "a.obj", MeshOptions(multiply_kd=multiply))
    textured = np.array([one.shape[1] > 1 for one in soup.textures])[soup.texture]
    assert textured.tolist().count(True) == 1 and len(soup) == 2
    green = 0 if multiply else 4 / 7
    assert np.allclose(soup.colors[~textured][0, 0], [kd, green, 0, 0.8], atol=1e-3)
