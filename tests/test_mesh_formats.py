"""Mesh files mean what their formats say: small files written here, and those of the shared cases with their
right values."""

import base64
import io
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from latentscenes.core.cameras import orbit
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.data.meshes.importer import make_meshes, read_mesh
from latentscenes.data.meshes.sources import find_meshes
from latentscenes.data.meshes.surfaces import corner_faces, smooth_normals
from latentscenes.data.options import MeshChoice, MeshOptions, ViewOptions
from latentscenes.data.raycast import BLEND, BLEND_BOTH, RayCaster
from latentscenes.data.shading import LIGHTS

CASES = SHARED / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are absent")
CUBE = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.3, 0.3) for z in (-0.2, 0.2)])
SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
"""Quads, counter-clockwise from outside."""


def seen(path: Path, light: str = "flat", **options) -> np.ndarray:
    """Mean color of the object's pixels from eight cameras, 0 to 255."""
    soup, _ = read_mesh(path, MeshOptions(**options))
    rgb, alpha = RayCaster(soup, LIGHTS[light]).render(orbit(8), 48)
    return rgb[alpha > 250].mean(0)


def covered(path: Path) -> float:
    """Mean share of the views that the object covers, in percent."""
    _, alpha = RayCaster(read_mesh(path)[0], LIGHTS["flat"]).render(orbit(8), 48)
    return 100 * alpha.mean() / 255


# OBJ


def write_obj(folder: Path, mtl: str, name: str = "box", extra: str = "") -> Path:
    """A box whose sides all show the whole texture paint.png, which is red, 200 30 30."""
    folder.mkdir(exist_ok=True)
    lines = [
        "mtllib box.mtl",
        *(f"v {x} {y} {z}" for x, y, z in CUBE),
        "vt 0 0",
        "vt 1 0",
        "vt 1 1",
        "vt 0 1",
        extra,
    ]
    lines += [
        "usemtl body",
        *("f " + " ".join(f"{p + 1}/{k + 1}" for k, p in enumerate(side)) for side in SIDES),
    ]
    (folder / f"{name}.obj").write_text("\n".join(lines))
    (folder / "box.mtl").write_text(f"newmtl body\n{mtl}\n")
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "paint.png")
    return folder / f"{name}.obj"


RED, BLUE = (200, 30, 30), (26, 26, 204)


@pytest.mark.parametrize(
    "mtl",
    [
        "Kd 1 1 1\nmap_Kd paint.png", "map_Kd paint.png", "Kd 0.64 0.64 0.64\nmap_Kd paint.png",
        "Kd 0 0 0\nmap_Kd paint.png", "map_Kd -s 1 1 1 -o 0 0 0 -clamp on paint.png",
        "map_Kd -s 2 2 paint.png",
        "map_Kd -mm 0 1 -bm 2 paint.png", "map_Kd textures\\paint.png", "map_Kd C:\\Users\\me\\paint.png",
        "map_Kd PAINT.PNG", "\tmap_kd paint.png", "map_Kd .\\paint.png", "map_Kd paint.png # of 2 # coats",
        'map_Kd "paint.png" # red',
    ],
)  # fmt: skip
def test_a_texture_is_found_and_replaces_kd(tmp_path, mtl):
    assert seen(write_obj(tmp_path, mtl)) == pytest.approx(RED, abs=1.5)


def test_a_library_that_was_renamed_with_its_object_is_found(tmp_path):
    path = write_obj(tmp_path, "Kd 0.1 0.1 0.8")
    path.write_text(path.read_text().replace("box.mtl", "before.mtl"))
    assert seen(path) == pytest.approx(BLUE, abs=1.5)
    assert any(f"{path.stem}.mtl is taken for it" in remark for remark in read_mesh(path)[1])
    path.with_suffix(".mtl").unlink()
    assert seen(path) == pytest.approx((255,) * 3, abs=1.5)


def test_kd_multiplies_where_asked(tmp_path):
    path = write_obj(tmp_path, "Kd 0.5 0.5 0.5\nmap_Kd paint.png")
    light = ((np.array(RED) / 255 + 0.055) / 1.055) ** 2.4 * ((0.5 + 0.055) / 1.055) ** 2.4
    assert seen(path, multiply_kd=True) == pytest.approx(255 * (1.055 * light ** (1 / 2.4) - 0.055), abs=2)


def test_colors_without_a_texture(tmp_path):
    assert seen(write_obj(tmp_path, "Kd 0.1 0.1 0.8")) == pytest.approx(BLUE, abs=1.5)
    assert seen(write_obj(tmp_path, "Ka 1 1 1")) == pytest.approx((255, 255, 255))
    path = write_obj(tmp_path, "Kd 0.1 0.1 0.8\nmap_Kd gone.png")
    assert seen(path) == pytest.approx(BLUE, abs=1.5)
    assert read_mesh(path)[1] == ("the texture 'gone.png' is not there",)


@pytest.mark.parametrize(
    ("kd", "remark"),
    [
        ("0,1 0,1 0,8", None), ("0.1,0.1,0.8", None), ("0.1, 0.1, 0.8", None), ("0.1 0.1 0.8 # 1 2 3", None),
        ("26 26 204", "Kd of material 'body': taken as numbers from 0 to 255"),
    ],
)  # fmt: skip
def test_colors_as_other_programs_write_them(tmp_path, kd, remark):
    path = write_obj(tmp_path, f"Kd {kd}")
    assert seen(path) == pytest.approx(BLUE, abs=1.5)
    assert read_mesh(path)[1] == ((remark,) if remark else ())


def test_a_color_that_is_none_is_named(tmp_path):
    path = write_obj(tmp_path, "Kd spectral paint.rfl 1")
    assert seen(path) == pytest.approx((255, 255, 255))
    assert read_mesh(path)[1] == ("Kd of material 'body': 'spectral paint.rfl 1' is no color and left out",)
    assert seen(write_obj(tmp_path, "Kd 0.5 # 1 2")) == pytest.approx((127.5,) * 3, abs=1.5)


def test_a_texture_whose_name_holds_a_number_sign(tmp_path):
    path = write_obj(tmp_path, "map_Kd coat #2.png")
    Image.new("RGB", (8, 8), (26, 26, 204)).save(tmp_path / "coat #2.png")
    assert seen(path) == pytest.approx(BLUE, abs=1.5) and read_mesh(path)[1] == ()


@pytest.mark.parametrize(("color", "guessed"), [("0.1 0.1 0.8", False), ("26 26 204", True)])
def test_colors_of_vertices(tmp_path, color, guessed):
    remarks = ("colors of vertices: taken as numbers from 0 to 255",) if guessed else ()
    faces = ["f " + " ".join(str(p + 1) for p in side) for side in SIDES]
    path = tmp_path / "box.obj"
    path.write_text("\n".join([*(f"v {x} {y} {z} {color}" for x, y, z in CUBE), *faces]))
    assert seen(path) == pytest.approx(BLUE, abs=1.5) and read_mesh(path)[1] == remarks
    for kind in ("float", "int") if guessed else ("float",):
        path = tmp_path / f"{kind}.ply"
        names = [f"property {kind} {name}" for name in ("red", "green", "blue")]
        header = [
            "ply",
            "format ascii 1.0",
            "element vertex 8",
            *(f"property float {name}" for name in "xyz"),
        ]
        header += [*names, "element face 6", "property list uchar int vertex_indices", "end_header"]
        rows = [f"{x} {y} {z} {color}" for x, y, z in CUBE]
        rows += [" ".join(map(str, (4, *side))) for side in SIDES]
        path.write_text("\n".join([*header, *rows, ""]))
        assert seen(path) == pytest.approx(BLUE, abs=1.5) and read_mesh(path)[1] == remarks


@pytest.mark.parametrize(
    ("mtl", "alpha"),
    [
        ("d 0.2", 0.2),
        ("Tr 0.8", 0.2),
        ("d 1\nTr 1", 1),
        ("d 0", 1),
        ("Tr 1", 1),
        ("d 0.6\nTr 0.6", 0.6),
        ("d 0,2", 0.2),
    ],
)
def test_transparency(tmp_path, mtl, alpha):
    soup, _ = read_mesh(write_obj(tmp_path, f"Kd 1 0 0\n{mtl}"))
    _, opacity = RayCaster(soup).render(orbit(1, elevation=0.0), 48)
    assert opacity[0, 24, 24] / 255 == pytest.approx(alpha, abs=0.01)  # once for front and back


def test_map_d_is_the_brightness_of_a_picture(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8).repeat(8, 1).repeat(8, 0)).save(tmp_path / "mask.png")
    half = write_obj(tmp_path, "map_Kd paint.png\nmap_d mask.png")
    assert covered(half) < 0.9 * covered(write_obj(tmp_path, "map_Kd paint.png"))


def test_concave_polygons_are_not_filled():
    """An L has 3/4 of its square's area; a square with a square hole, joined by a bridge, 8/9."""
    for points, area in (
        ([(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)], 3),
        ([(0, 0), (3, 0), (3, 3), (0, 3), (0, 0), (1, 1), (1, 2), (2, 2), (2, 1), (1, 1)], 8),
        ([(0, 0), (4, 0), (4, 3), (2, 1), (0, 3)], 8),
    ):
        flat = np.array([(x, y, 0.1 * x) for x, y in points], np.float64)
        cut = corner_faces([list(range(len(points)))], flat)
        corners = flat[cut][..., :2]
        sides = corners[:, 1:] - corners[:, :1]
        areas = (sides[:, 0, 0] * sides[:, 1, 1] - sides[:, 0, 1] * sides[:, 1, 0]) / 2
        assert areas.sum() == pytest.approx(area) and (areas >= -1e-9).all()


def test_normals_are_smooth_where_the_file_says_so(tmp_path):
    """A ring of a cylinder: flat without a word, round with smoothing groups, and as `vn` says."""
    around = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 13)[:-1]]
    points = [f"v {x} {y} {z}" for z in (0, 1) for x, y in around]
    faces = [f"f {k + 1} {(k + 1) % 12 + 1} {(k + 1) % 12 + 13} {k + 13}" for k in range(12)]
    normals = {}
    for name, word in (("flat", ""), ("off", "s off"), ("smooth", "s 1")):
        (tmp_path / f"{name}.obj").write_text("\n".join([*points, word, *faces]))
        soup, _ = read_mesh(tmp_path / f"{name}.obj", MeshOptions(up="z"))
        outward = soup.corners * [1, 1, 0]
        normals[name] = (soup.normals * outward / np.linalg.norm(outward, axis=2, keepdims=True)).sum(2)
    assert normals["smooth"].min() == pytest.approx(1, abs=1e-5)
    assert normals["flat"].max() == pytest.approx(np.cos(np.pi / 12), abs=1e-5) == normals["off"].max()


def test_smoothing_groups_keep_their_edges():
    corners = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]]], float)
    apart = smooth_normals(corners, np.array([[0, 1, 2], [3, 4, 5]]))
    assert (apart[0] @ [0, 0, 1] > 0).all() and np.allclose(np.cross(apart[0], [0, 0, 1]), 0)
    assert (apart[1] @ [1, 0, 0] > 0).all() and np.allclose(np.cross(apart[1], [1, 0, 0]), 0)
    joined = smooth_normals(corners, np.array([[0, 1, 2], [0, 2, 3]]))
    assert joined[0, 0][2] == pytest.approx(joined[0, 0][0])  # both corners have a right angle


def test_far_coordinates_keep_their_detail(tmp_path):
    near, far = tmp_path / "near.obj", tmp_path / "far.obj"
    faces = "\n".join("f " + " ".join(str(p + 1) for p in side) for side in SIDES)
    for path, shift in ((near, 0), (far, np.array([431250.0, 87.0, 4583120.0]))):
        path.write_text(
            "\n".join(f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in CUBE / 1000 + shift) + "\n" + faces
        )
    assert np.allclose(read_mesh(near)[0].corners, read_mesh(far)[0].corners, atol=1e-3)


# glTF


def write_glb(path: Path, changes=None, arrays: dict | None = None, image: Image.Image | None = None) -> Path:
    """A quad in the plane z = 0, facing +z, as GLB; `changes` edits its JSON before it is written."""
    points = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], "<f4")
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], "<f4")
    arrays = {
        "POSITION": points,
        "TEXCOORD_0": uv,
        "indices": np.array([0, 1, 2, 0, 2, 3], "<u2"),
        **(arrays or {}),
    }
    types = {"i1": 5120, "u1": 5121, "<i2": 5122, "<u2": 5123, "<u4": 5125, "<f4": 5126}
    binary, views, accessors = b"", [], []
    for values in arrays.values():
        binary += b"\0" * (-len(binary) % 4)
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": values.nbytes})
        width = 1 if values.ndim == 1 else values.shape[1]
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[width]
        code = types[values.dtype.str if values.dtype.itemsize > 1 else values.dtype.str[1:]]
        accessors.append(
            {"bufferView": len(views) - 1, "componentType": code, "count": len(values), "type": kind}
        )
        binary += values.tobytes()
    attributes = {name: place for place, name in enumerate(arrays) if name.isupper()}
    primitive = {"attributes": attributes, "indices": list(arrays).index("indices")}
    content = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": len(binary)}],
    }  # fmt: skip
    if image is not None:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content |= {"images": [{"uri": uri}], "textures": [{"source": 0}]}
        content["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
        content["meshes"][0]["primitives"][0]["material"] = 0
    if changes:
        changes(content)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    binary += b"\0" * (-len(binary) % 4)
    size = 12 + 8 + len(text) + 8 + len(binary)
    head = struct.pack("<4sIII4s", b"glTF", 2, size, len(text), b"JSON")
    path.write_bytes(head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary)
    return path


def corner_colors(path: Path) -> np.ndarray:
    """What the quad of `write_glb` shows at the centers of its quarters, upper left, upper right, lower left,
    lower right."""
    soup, _ = read_mesh(path)
    caster = RayCaster(soup, LIGHTS["flat"])
    far = np.abs(soup.corners).max()
    places = np.array([(x, -2, z) for z in (0.5, -0.5) for x in (-0.5, 0.5)], np.float32) * [far, 1, far]
    colors, _ = caster.trace(places.astype(np.float32), np.tile(np.array([0, 1, 0], np.float32), (4, 1)))
    return np.round(255 * colors).astype(int)


def quarters() -> Image.Image:
    """Red, green / blue, white."""
    table = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
    return Image.fromarray(table.repeat(32, 0).repeat(32, 1))


def test_a_texture_lies_upright(tmp_path):
    found = corner_colors(write_glb(tmp_path / "q.glb", image=quarters()))
    assert found.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ({"offset": [0.5, 0], "scale": [0.5, 0.5]}, [[0, 255, 0]] * 4),
        ({"offset": [0.5, 0]}, [[0, 255, 0], [255, 0, 0], [255, 255, 255], [0, 0, 255]]),
        ({"offset": [0, 1], "rotation": np.pi / 2}, [[0, 0, 255], [255, 0, 0], [255, 255, 255], [0, 255, 0]]),
    ],
)
def test_texture_transforms(tmp_path, transform, expected):
    def changes(content):
        info = content["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
        info["extensions"] = {"KHR_texture_transform": transform}
        content["extensionsRequired"] = ["KHR_texture_transform"]

    assert corner_colors(write_glb(tmp_path / "q.glb", changes, image=quarters())).tolist() == expected


def test_a_second_set_of_texture_coordinates(tmp_path):
    other = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], "<f4")  # mirrored

    def changes(content):
        content["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = 1

    found = corner_colors(write_glb(tmp_path / "q.glb", changes, {"TEXCOORD_1": other}, quarters()))
    assert found.tolist() == [[0, 255, 0], [255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_normalized_integers_and_padding(tmp_path):
    """Positions as signed shorts, texture coordinates as unsigned bytes, as KHR_mesh_quantization allows."""
    points = np.array(
        [[-32767, -32767, 0, 9], [32767, -32767, 0, 9], [32767, 32767, 0, 9], [-32767, 32767, 0, 9]], "<i2"
    )
    uv = np.array([[0, 255], [255, 255], [255, 0], [0, 0]], "u1")

    def changes(content):
        for place in (0, 1):
            content["accessors"][place]["normalized"] = True
        content["accessors"][0]["type"] = "VEC3"
        content["bufferViews"][0]["byteStride"] = 8
        content["extensionsRequired"] = ["KHR_mesh_quantization"]

    path = write_glb(tmp_path / "q.glb", changes, {"POSITION": points, "TEXCOORD_0": uv}, quarters())
    assert corner_colors(path).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


def test_sparse_accessors(tmp_path):
    """The third and fourth point come from a sparse accessor over zeros."""
    rows, values = (
        np.array([0, 1, 2, 3], "<u2"),
        np.array([[-1, -1, 0], [1, -1, 0], [1, 3, 0], [-1, 3, 0]], "<f4"),
    )

    def changes(content):
        sparse = {
            "count": 4,
            "indices": {"bufferView": 3, "componentType": 5123},
            "values": {"bufferView": 4},
        }
        content["accessors"][0] = {"componentType": 5126, "count": 4, "type": "VEC3", "sparse": sparse}

    soup, _ = read_mesh(write_glb(tmp_path / "q.glb", changes, {"rows": rows, "values": values}))
    low, high = soup.bounds
    assert (high - low)[2] == pytest.approx(2 * (high - low)[0])  # y became z


def test_vertex_alpha_counts_only_where_the_material_says_so(tmp_path):
    color = np.tile(np.array([255, 0, 0, 0], "u1"), (4, 1))

    def normalized(content):
        content["accessors"][-1]["normalized"] = True

    assert covered(write_glb(tmp_path / "opaque.glb", normalized, {"COLOR_0": color})) > 5

    def blended(content):
        normalized(content)
        content["materials"] = [{"alphaMode": "BLEND"}]
        content["meshes"][0]["primitives"][0]["material"] = 0

    assert covered(write_glb(tmp_path / "blend.glb", blended, {"COLOR_0": color})) == 0


@pytest.mark.parametrize("double, cutoff", [(False, BLEND), (True, BLEND_BOTH)])
@pytest.mark.parametrize(
    "glass",
    [{"alphaMode": "BLEND"}, {"extensions": {"KHR_materials_transmission": {"transmissionFactor": 0.6}}}],
    ids=["blended", "transmitting"],
)
def test_backs_of_glass_count_where_the_material_is_double_sided(tmp_path, glass, double, cutoff):
    def blended(content):
        content["materials"] = [glass | {"doubleSided": double}]
        content["meshes"][0]["primitives"][0]["material"] = 0

    soup, _ = read_mesh(write_glb(tmp_path / "glass.glb", blended))
    assert set(soup.cutoff) == {cutoff}


def test_an_object_that_no_view_shows_is_listed(tmp_path):
    def invisible(content):
        content["materials"] = [
            {"alphaMode": "BLEND", "pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, 0]}}
        ]
        content["meshes"][0]["primitives"][0]["material"] = 0

    write_glb(tmp_path / "ghost.glb", invisible)
    with pytest.raises(UserError, match="ghost.glb: ghost: no view shows it"):
        make_meshes(tmp_path, tmp_path / "out", ViewOptions(views=4, size=16, held_out=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            lambda c: c.update(extensionsRequired=["EXT_unheard_of"]),
            "needs EXT_unheard_of, which cannot be read",
        ),
        (lambda c: c["accessors"][0].update(type="VEC2"), "no positions of three numbers"),
        (lambda c: c["accessors"][0].update(count=1 << 30), "holds more numbers than can be read"),
        (lambda c: c["accessors"][0].update(count=5), "reaches beyond its buffer view"),
        (lambda c: c["bufferViews"][0].update(byteLength=1 << 20), "reaches beyond its buffer"),
        (lambda c: c["buffers"][0].update(byteLength=1 << 20), "is cut short"),
        (lambda c: c["nodes"].append({"children": [0]}) or c["nodes"][0].update(children=[1]), "comes twice"),
        (lambda c: c.pop("asset"), "is no glTF"),
        (lambda c: c["meshes"][0]["primitives"][0].pop("attributes"), "is damaged"),
        (lambda c: c["buffers"][0].update(uri="https://a.b/c.bin"), "no file beside it"),
    ],
)
def test_damaged_gltf_says_why(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        read_mesh(write_glb(tmp_path / "q.glb", changes))


def test_meshopt_is_read_where_its_package_is(tmp_path):
    codec = pytest.importorskip("meshoptimizer", reason="meshoptimizer is not installed")
    points = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], "<f4")
    packed = np.frombuffer(bytes(codec.encode_vertex_buffer(points, 4, 12)), np.uint8)

    def changes(content):
        view = {"buffer": 0, "mode": "ATTRIBUTES", "count": 4, "byteStride": 12}
        view |= {key: content["bufferViews"][3][key] for key in ("byteOffset", "byteLength")}
        content["bufferViews"][0] = {
            "buffer": 1,
            "byteLength": 48,
            "extensions": {"EXT_meshopt_compression": view},
        }

    path = write_glb(tmp_path / "q.glb", changes, {"packed": packed}, quarters())
    assert corner_colors(path).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize("width", [2, 4])
def test_indices_packed_by_meshopt(tmp_path, width):
    codec = pytest.importorskip("meshoptimizer", reason="meshoptimizer is not installed")
    corners = np.array([0, 1, 2, 0, 2, 3], np.uint32)
    packed = np.frombuffer(bytes(codec.encode_index_buffer(corners, 6, 4)), np.uint8)

    def changes(content):
        view = {"buffer": 0, "mode": "TRIANGLES", "count": 6, "byteStride": width}
        view |= {key: content["bufferViews"][3][key] for key in ("byteOffset", "byteLength")}
        extensions = {"EXT_meshopt_compression": view}
        content["bufferViews"][2] = {"buffer": 1, "byteLength": 6 * width, "extensions": extensions}
        content["accessors"][2]["componentType"] = {2: 5123, 4: 5125}[width]

    path = write_glb(tmp_path / "q.glb", changes, {"packed": packed}, quarters())
    assert corner_colors(path).tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


# Shared cases


@needs_cases
def test_case_texture_transform():
    folder = CASES / "01-texture-transform" / "in"
    truth = seen(folder / "baked.glb")
    assert truth[1] > 150 and truth[0] < 50 > truth[2]
    for name in ("transformed.glb", "required.glb"):
        assert seen(folder / name) == pytest.approx(truth, abs=1)


@needs_cases
@pytest.mark.parametrize("name", ["skinned_untouched", "skinned_node_turned", "skinned_joint_stands_it_up"])
def test_case_skinned(name):
    truth, _ = read_mesh(CASES / "04-skinned" / "in" / "plain.glb")
    soup, _ = read_mesh(CASES / "04-skinned" / "in" / f"{name}.glb")
    assert np.allclose(soup.corners, truth.corners, atol=1e-5)


@needs_cases
def test_case_vertex_alpha_without_a_material_is_opaque():
    folder = CASES / "03-vertex-alpha" / "in"
    truth = seen(folder / "rgb_only.glb")
    for path in folder.glob("*.glb"):
        assert seen(path) == pytest.approx(truth, abs=1)


@needs_cases
def test_case_georeferenced_coordinates():
    folder = CASES / "05-utm" / "in"
    truth, _ = read_mesh(folder / "statue_local.obj")
    far, _ = read_mesh(folder / "statue_utm.obj")
    assert np.allclose(far.corners, truth.corners, atol=2e-3)
    assert np.allclose(np.abs(far.normals), np.abs(truth.normals), atol=0.1)
    double, _ = read_mesh(folder / "statue_utm_double.ply", MeshOptions(up="y"))
    assert np.allclose(double.bounds, truth.bounds, atol=2e-3) and len(double.corners) == len(truth.corners)


@needs_cases
@pytest.mark.parametrize(
    "name",
    ["backslash", "crlf", "indented_case", "kd_black_with_map", "option_scale", "options", "spaces",
     "windows_absolute", "wrong_case_file"],
)  # fmt: skip
def test_case_mtl_textures(name):
    folder = CASES / "07-mtl" / "in"
    assert seen(folder / name / f"{name}.obj") == pytest.approx(seen(folder / "plain" / "plain.obj"), abs=4)


@needs_cases
def test_case_mtl_colors_and_what_is_absent():
    folder = CASES / "07-mtl" / "in"
    for name, color, said in (
        ("opaque_kd", (26, 26, 204), ()),
        ("d_zero", (26, 26, 204), ("would be invisible",)),
        ("missing_texture", (204, 26, 26), ("the texture 'gone.png' is not there",)),
    ):
        path = folder / name / f"{name}.obj"
        assert seen(path) == pytest.approx(color, abs=2), name
        told = read_mesh(path)[1]
        assert len(told) == len(said) and all(word in line for word, line in zip(said, told)), name
    half, whole = (covered(folder / name / f"{name}.obj") for name in ("map_d", "plain"))
    assert 0.5 * whole < half < 0.9 * whole
    turned = seen(folder / "negative_quads" / "negative_quads.obj")  # some sides red, some blue
    assert turned[1] == pytest.approx(26, abs=2) and turned[0] + turned[2] == pytest.approx(230, abs=4)


@needs_cases
def test_case_obj_files_beside_ply_files():
    folder = CASES / "18-ply" / "in"
    assert seen(folder / "obj_vertex_colours.obj") == pytest.approx((204, 31, 31), abs=1)
    assert seen(folder / "float_colours.ply") == pytest.approx((204, 30, 30), abs=5)
    for name, said in (
        ("obj_crlf_latin1", ()),
        ("obj_missing_mtl", ("its material library (MTL) is not there",)),
    ):
        path = folder / f"{name}.obj"
        told = read_mesh(path)[1]
        assert seen(path) == pytest.approx((255, 255, 255)) and len(told) == len(said), name
        assert all(line.startswith(word) for word, line in zip(said, told))
    with pytest.raises(UserError, match="holds no triangles"):
        read_mesh(folder / "obj_empty.obj")


@needs_cases
def test_case_a_factor_of_gltf_darkens_its_texture():
    folder = CASES / "19-no-kd" / "in"
    factor = lambda level: 1.055 * (0.4 * ((level / 255 + 0.055) / 1.055) ** 2.4) ** (1 / 2.4) - 0.055  # noqa: E731
    full = seen(folder / "trimesh_obj" / "trimesh_made.obj")
    assert seen(folder / "trimesh_made_glb.glb") == pytest.approx(255 * factor(full), abs=8)
    assert seen(folder / "nothing.obj") == pytest.approx((255, 255, 255))


@needs_cases
@pytest.mark.parametrize("name", ["glass_d", "glass_tr"])
def test_case_glass_is_see_through(name):
    soup, _ = read_mesh(CASES / "07-mtl" / "in" / name / f"{name}.obj")
    _, alpha = RayCaster(soup).render(orbit(8), 48)
    assert alpha.max() / 255 == pytest.approx(0.2, abs=0.01)


@needs_cases
def test_case_no_kd_is_as_bright_as_kd_one():
    folder = CASES / "19-no-kd" / "in"
    truth = seen(folder / "kd_one.obj", "studio")
    for name in ("no_kd.obj", "no_kd_ka_ks.obj", "kd_08.obj", "trimesh_obj/trimesh_made.obj"):
        assert seen(folder / name, "studio") == pytest.approx(truth, abs=1)


@needs_cases
def test_case_ply():
    folder = CASES / "18-ply" / "in"
    for name in (
        "alpha_zero",
        "big_endian",
        "degenerate",
        "diffuse_names",
        "face_colours",
        "mixed_tri_quad",
        "plain_red",
        "quads",
    ):
        assert seen(folder / f"{name}.ply") == pytest.approx((200, 30, 30), abs=4), name
    textured = seen(folder / "vertex_st.ply")
    assert textured == pytest.approx(seen(folder / "wedge_uv_meshlab.ply"), abs=2)
    assert textured == pytest.approx(seen(CASES / "19-no-kd" / "in" / "kd_one.obj"), abs=8)  # other axis up
    for name, reason in (("points_only", "points and no faces"), ("gaussian_splat", "Gaussian splats")):
        with pytest.raises(UserError, match=reason):
            read_mesh(folder / f"{name}.ply")


@needs_cases
def test_case_compressed():
    folder = CASES / "08-compressed" / "in"
    assert seen(folder / "webp.glb") == pytest.approx(seen(folder / "plain.glb"), abs=6)
    with pytest.raises(UserError, match="textures in KTX2"):
        read_mesh(folder / "ktx2.glb")
    pytest.importorskip("DracoPy", reason="DracoPy is not installed")
    assert seen(folder / "draco.glb") == pytest.approx(seen(folder / "plain.glb"), abs=1)


@needs_cases
def test_case_meshopt_whose_data_are_elsewhere_is_named():
    """The file names its picture as the packed points, and the bytes meant hold no points either."""
    pytest.importorskip("meshoptimizer", reason="meshoptimizer is not installed")
    with pytest.raises(UserError, match="its meshopt data cannot be read"):
        read_mesh(CASES / "08-compressed" / "in" / "meshopt.glb")


@needs_cases
@pytest.mark.parametrize(("package", "name"), [("DracoPy", "draco"), ("meshoptimizer", "meshopt")])
def test_case_compressed_files_name_the_extra_that_is_absent(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install .latentscenes\[meshes\]"):
        read_mesh(CASES / "08-compressed" / "in" / f"{name}.glb")


@needs_cases
def test_case_broken_files_are_listed_and_the_others_come_in(tmp_path, capsys):
    make_meshes(CASES / "22-broken" / "in", tmp_path / "out", ViewOptions(views=4, size=32, held_out=1))
    told = capsys.readouterr().err
    assert "1 scene" in told and "3 of 4 could not be read" in told
    for name in ("indices_out_of_range", "truncated", "vec2_positions"):
        assert f"{name}.glb" in told


@needs_cases
def test_case_macos_leftovers_are_no_meshes():
    assert list(find_meshes(CASES / "13-macos" / "meshes")) == ["chair_a", "chair_b", "chair_c"]


@needs_cases
def test_case_macos_archives_give_whole_meshes_as_new_ones(tmp_path):
    home = CASES / "13-macos" / "zip"
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for path in sorted(home.rglob("*")):
            archive.write(path, path.relative_to(home))
    (tmp_path / "linked").symlink_to(home)
    views = ViewOptions(views=4, size=16, held_out=1)
    for source in ("mac.zip", "linked"):
        out = tmp_path / f"{source}_out"
        make_meshes(tmp_path / source, out, views, choice=MeshChoice(new=2))
        made = PosedImages.open(out)
        assert [scene.name for scene in made.select("new")] == ["003", "004"] and len(made.scenes) == 4
        assert all(
            (made.alpha[scene.first : scene.first + 4] > 250).any((1, 2)).all() for scene in made.scenes
        )


def test_what_obj_leaves_out_is_named_once(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.obj").write_text(
            f"mtllib {name}.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 1\nusemtl wood\nf 1 2 3\nusemtl iron\nf 3 2 1\n"
        )
        iron = "newmtl iron\nKs 0.5 0.5 0.5\nbump relief.png\n"
        (tmp_path / "in" / f"{name}.mtl").write_text(f"newmtl wood\nKs 0 0 0\nmap_Kd wood.png\n{iron}")
        Image.new("RGB", (2, 2), "red").save(tmp_path / "in" / "wood.png")
    make_meshes(tmp_path / "in", tmp_path / "out", ViewOptions(views=4, held_out=1, size=16))
    told = capfd.readouterr().err
    assert told.count("remark: highlights (Ks) are left out: a, b") == 1
    assert told.count("remark: relief (bump and normal maps) is left out: a, b") == 1
    assert (
        told.count("faces without texture coordinates have the mean color of the texture of wood: a, b") == 1
    )


def test_odd_lines_of_obj_do_not_stop_it(tmp_path):
    path = tmp_path / "a.obj"
    path.write_text(
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 1 # top\ns ²\nusemtl wood\nf 1 2 3 # x y\n", encoding="utf-8"
    )
    (tmp_path / "a.mtl").write_text(f"newmtl wood\nKd 0.8, 0.6, 0.4\nmap_Kd {'n' * 300}\n")
    soup, remarks = read_mesh(path)
    assert soup.bounds.shape == (2, 3) and "is not there" in remarks[0]
