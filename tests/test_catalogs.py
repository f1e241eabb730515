"""Archives, catalogs and tags: safe unpacking, rows that find their meshes, stopped imports."""

import io
import json
import shutil
import stat
import struct
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import trimesh
from conftest import TINY
from drawn_scenes import around, pictures, write_object, write_transforms
from results import made_run

import latentscenes
from latentscenes.cli import library as commands
from latentscenes.core import config_io
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.names import plain_text, tags_text
from latentscenes.data.catalog import Row, assign, properties, read_catalog
from latentscenes.data.dataset import PosedImages
from latentscenes.data.meshes import archives, importer
from latentscenes.data.meshes.archives import unpack
from latentscenes.data.meshes.importer import make_meshes, read_mesh
from latentscenes.data.meshes.sources import short_names
from latentscenes.data.options import ImportOptions, MeshChoice, MeshOptions, Placement, ViewOptions
from latentscenes.data.placing import place
from latentscenes.data.srn import make_srn
from latentscenes.data.transforms import make_transforms
from latentscenes.storage.scene_set import SceneSet

FEW = ViewOptions(views=3, size=16, held_out=1)
FURNITURE = r"""# made for this test
id=Test#Library
license=CC0 1.0
id#1=Test#sofa
name#1=Canap\u00e9 \ud83d\udecb
tags#1=soft, \
       red
category#1 : Living room
icon#1=/icons/sofa.png
model#1=/models/sofa/sofa.obj
modelRotation#1=0 0 1 0 1 0 -1 0 0
width#1=200
depth#1=90.5
height#1=80
creator#1=Someone <b>
id#2=Test#lamp
name#2=Lamp
category#2=Lights
model#2=/models/lamp.zip
license#2=CC-BY 3.0
id#3=Test#gone
model#3=/models/gone.obj
"""


def bar_obj(length: float = 2.0) -> bytes:
    """A bar along x."""
    return trimesh.creation.box((length, 0.5, 0.3)).export(file_type="obj").encode()


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def furniture(tmp_path) -> Path:
    """A furniture library with a catalog, an archive inside, and leftovers of a Mac."""
    path = tmp_path / "shop.sh3f"
    path.write_bytes(
        packed(
            {
                "PluginFurnitureCatalog.properties": FURNITURE.encode(),
                "PluginFurnitureCatalog_fr.properties": b"name#1=Autre",
                "icons/sofa.png": b"no picture",
                "models/sofa/sofa.obj": bar_obj(),
                "models/lamp.zip": packed({"lamp.obj": bar_obj(3)}),
                "models/stool/model.obj": bar_obj(4),
                "models/table/model.obj": bar_obj(5),
                "__MACOSX/models/._sofa.obj": b"?",
            }
        )
    )
    return path


# Archives


def test_an_archive_is_unpacked_with_those_inside(furniture, tmp_path):
    assert unpack(furniture, tmp_path / "out") == []
    files = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert "models/lamp.zip/lamp.obj" in files and "models/sofa/sofa.obj" in files
    assert len(files) == 7 and not any("MACOSX" in name or "packed" in name for name in files)
    assert (tmp_path / "out" / "models/lamp.zip/lamp.obj").read_bytes() == bar_obj(3)


@pytest.mark.parametrize(
    "name", ["../out.obj", "/tmp/out.obj", "a/../../out.obj", "..\\out.obj", "C:\\out.obj", "a\nb"]
)
def test_entries_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.zip").write_bytes(packed({"fine.obj": b"1", name: b"2"}))
    with pytest.raises(UserError, match="bad.zip: holds an entry named"):
        unpack(tmp_path / "in" / "bad.zip", tmp_path / "in" / "deep" / "out")
    assert not list(tmp_path.rglob("out.obj")) and not Path("/tmp/out.obj").exists()


def test_links_repeated_and_encrypted_entries_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.obj")
    link.external_attr, link.create_system = (stat.S_IFLNK | 0o777) << 16, 3
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="link.obj is a link"):
        unpack(tmp_path / "link.zip", tmp_path / "1")
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive,
    ):
        for content in ("one", "two"):
            archive.writestr("a.obj", content)
    with pytest.raises(UserError, match="twice.zip: holds a.obj twice"):
        unpack(tmp_path / "twice.zip", tmp_path / "2")
    secret = bytearray(packed({"a.obj": b"1"}))
    secret[secret.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(secret)
    with pytest.raises(UserError, match="secret.zip: is encrypted"):
        unpack(tmp_path / "secret.zip", tmp_path / "3")


def test_bombs_and_damage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 100_000)
    monkeypatch.setattr(archives, "RATIO", 2)
    bomb = packed({"a.obj": bytes(10_000_000)})
    (tmp_path / "bomb.zip").write_bytes(bomb)
    with pytest.raises(UserError, match="bomb.zip: unpacks to more than"):
        unpack(tmp_path / "bomb.zip", tmp_path / "1")
    assert sum(path.stat().st_size for path in (tmp_path / "1").rglob("*")) <= 2_100_000
    (tmp_path / "deep.zip").write_bytes(packed({"deep/bomb.zip": bomb}))
    assert "deep.zip/deep/bomb.zip" not in unpack(tmp_path / "deep.zip", tmp_path / "2")[0]
    assert not list((tmp_path / "2").rglob("*.obj"))
    lying = bytearray(bomb)
    place = lying.index(b"PK\1\2") + 24
    lying[place : place + 4] = struct.pack("<I", 10)  # of ten million bytes, the index states ten
    (tmp_path / "lying.zip").write_bytes(lying)
    with pytest.raises(UserError, match="lying.zip"):
        unpack(tmp_path / "lying.zip", tmp_path / "3")
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    (tmp_path / "many.zip").write_bytes(packed({f"{number}.obj": b"" for number in range(4)}))
    with pytest.raises(UserError, match="many.zip: unpacks to more than 3 files"):
        unpack(tmp_path / "many.zip", tmp_path / "4")
    (tmp_path / "cut.zip").write_bytes(bomb[: len(bomb) // 2])
    with pytest.raises(UserError, match="cut.zip: is no zip archive that can be read"):
        unpack(tmp_path / "cut.zip", tmp_path / "5")


def test_names_from_archives_are_short_and_unique():
    shown = [
        "a.zip/x/chair.obj",
        "a.zip/y/chair.obj",
        "a.zip/y/table.obj",
        "b.zip/sofa.obj",
        "b.zip/sofa.glb",
    ]
    paths = {Path(f"/unpacked/{place}"): PurePosixPath(path) for place, path in enumerate(shown)}
    names = short_names(paths, taken=["table"])
    assert {name: shown[int(path.name)] for name, path in names.items()} == {
        "x__chair": "a.zip/x/chair.obj",
        "y__chair": "a.zip/y/chair.obj",
        "y__table": "a.zip/y/table.obj",
        "b_zip__sofa_obj": "b.zip/sofa.obj",
        "b_zip__sofa_glb": "b.zip/sofa.glb",
    }


# Catalogs


def test_properties_are_read_as_java_does():
    text = "a = b\n! no\n  # no\\\nc:d\\\n   e\\u00e9\\\\\nf\\ g\\=h i\n\nempty=\nlast\\n=\\t\\q"
    assert dict(properties(text)) == {
        "a": "b", "c": "deé\\", "f g=h": "i", "empty": "", "last\n": "\tq"
    }  # fmt: skip


def test_a_furniture_catalog_in_latin_letters(tmp_path):
    path = tmp_path / "a.properties"
    path.write_bytes(
        "name#2=Fauteuil à bascule\nmodel#2=/a.obj\nname#1=Ü\nmodel#1=/b.obj\n".encode("latin-1")
    )
    assert read_catalog(path) == [Row("/b.obj", {"name": "Ü"}), Row("/a.obj", {"name": "Fauteuil à bascule"})]
    path.write_bytes("name#1=Ü ✓\nmodel#1=/b.obj".encode())
    assert read_catalog(path) == [Row("/b.obj", {"name": "Ü ✓"})]


def test_csv_of_any_office(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        "File Name;TITLE;Class;Keywords;Licence;Width;Depth;Height;Price €\r\n"
        'a\\chair.obj;"Chair; big";Seats;red, wood ,;CC0;1;2,5;3;10\r\n;;;;;;;;\r\n'
        "b.obj;\x1b[31mTable\u202e;;;;;;4;\r\n"
        .encode("utf-8-sig")
    )  # fmt: skip
    chair, table = read_catalog(path)
    assert chair == Row(
        "a\\chair.obj",
        {
            "name": "Chair; big", "category": "Seats", "tags": ["red", "wood"], "license": "CC0",
            "size": "1 x 2,5 x 3", "price €": "10",
        },
    )  # fmt: skip
    assert table == Row("b.obj", {"name": "[31mTable", "height": "4"})
    path.write_bytes("file,name\na.obj,Stühle –\n".encode("cp1252"))
    assert read_catalog(path) == [Row("a.obj", {"name": "Stühle –"})]
    path.write_text("file\tname\na.obj\tChair\tmore\n")
    with pytest.raises(UserError, match="line 2 has 3 cells, but the first line names 2"):
        read_catalog(path)
    path.write_text("price,weight\n3,4\n")
    with pytest.raises(UserError, match="no column says which file"):
        read_catalog(path)


@pytest.mark.parametrize(
    "content",
    [
        [{"file": "a.obj", "Category": "Chair", "size_cm": [1, 2.5, 3], "tags": ["x", "y"],
          "made": {"by": 1}}],
        {"version": 2, "objects": [{"path": "a.obj", "type": "Chair", "sizeCM": "1 x 2.5 x 3", "tags": "x|y",
                                    "made": '{"by": 1}'}]},
        {"a.obj": {"category": "Chair", "size cm": [1, 2.5, 3], "keywords": "x,y", "made": {"by": 1}}},
    ],
)  # fmt: skip
def test_json_in_three_shapes(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    tags = {"category": "Chair", "size": "1 x 2.5 x 3 cm", "tags": ["x", "y"], "made": '{"by": 1}'}
    assert read_catalog(tmp_path / "a.json") == [Row("a.obj", tags)]


def test_texts_are_lines_of_limited_length():
    assert plain_text("a\x00\n\tb\u200e  c", 10) == "a b c" and plain_text("x" * 400) == "x" * 299 + "…"
    tags = {"made": 1, "license": "CC0", "tags": ["a", "b"], "name": "Chair\n"}
    assert tags_text(tags) == "Chair · a, b · CC0 · made: 1"


def test_rows_find_their_meshes():
    root = PurePosixPath("/data")
    meshes = {
        name: root / path
        for name, path in {
            "one": "one/Chair.OBJ", "two": "two/chair.obj", "lamp": "lamps.zip/lamp.obj",
            "bulb": "lamps.zip/bulb.obj",
            "sofa": "x/sofa.glb", "bed_7": "x/bed_7.ply",
        }.items()
    }  # fmt: skip
    rows = [
        Row("one\\chair.obj", {"name": "in the folder"}), Row("chair.obj", {"name": "two have this end"}),
        Row("lamps.zip", {"name": "all in it"}), Row("lamp.obj", {"name": "late"}),
        Row("data/x/sofa.fbx", {"name": "other ending, from above"}),
        Row("D:\\shop\\two\\chair.obj", {"name": "moved"}),
        Row("y/bed_7.ply", {"name": "another folder"}), Row(None, {"id": "BED_7", "name": "by id"}),
    ]  # fmt: skip
    found, lost, late = assign(rows, meshes, root)
    assert {name: row.tags["name"] for name, row in found.items()} == {
        "one": "in the folder", "lamp": "all in it", "bulb": "all in it", "sofa": "other ending, from above",
        "two": "moved", "bed_7": "by id",
    }  # fmt: skip
    assert [row.tags["name"] for row in lost] == ["two have this end", "another folder"]
    assert [row.tags["name"] for row in late] == ["late"]


# Imports


def test_a_furniture_library_becomes_a_dataset_with_tags(furniture, tmp_path, capsys):
    make_meshes(furniture, tmp_path / "out", FEW)
    views = PosedImages.open(tmp_path / "out")
    tags = {scene.name: scene.tags for scene in views.scenes}
    assert tags == {
        "lamp": {"id": "Test#lamp", "name": "Lamp", "category": "Lights", "license": "CC-BY 3.0"},
        "sofa": {
            "id": "Test#sofa", "name": "Canapé 🛋", "category": "Living room", "tags": ["soft", "red"],
            "license": "CC0 1.0", "creator": "Someone <b>", "size": "200 x 90.5 x 80 cm",
        },
        "stool__model": {}, "table__model": {},
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "shop.sh3f: 4 meshes (4 OBJ); 2 with a row in a catalog" in told
    shown = f"remark: {furniture}/PluginFurnitureCatalog.properties: "
    assert f"{shown}1 row that names no mesh: /models/gone.obj" in told
    assert f"{shown}2 meshes without a row: stool__model, table__model" in told
    assert not list(tmp_path.glob("out.*"))
    assert '"tags"' not in (tmp_path / "out" / "views.json").read_text().split("stool__model")[1]


def test_the_rotation_of_a_furniture_catalog_turns_the_mesh(tmp_path):
    (tmp_path / "bar.obj").write_bytes(bar_obj())
    plain, _ = read_mesh(tmp_path / "bar.obj")
    turned, _ = read_mesh(tmp_path / "bar.obj", MeshOptions(), (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0))
    size, other = np.ptp(plain.bounds, 0), np.ptp(turned.bounds, 0)
    assert size[0] > 3 * size[1] and other == pytest.approx(size[[1, 0, 2]])
    _, remarks = read_mesh(tmp_path / "bar.obj", MeshOptions(), (2.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert "no rotation" in remarks[0]


def test_archives_in_a_folder_and_a_catalog_beside_it(furniture, tmp_path, capsys):
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "desk.obj").write_bytes(bar_obj(1))
    (folder / "broken.zip").write_bytes(b"PK\3\4 no archive")
    furniture.rename(folder / "shop.sh3f")
    (tmp_path / "list.csv").write_text("File,Category\ndesk.obj,Office\nsofa.obj,Seats\n")
    make_meshes(folder, tmp_path / "out", FEW, choice=MeshChoice(catalog=tmp_path / "list.csv", new=1))
    found = {scene.name: scene.tags.get("category") for scene in PosedImages.open(tmp_path / "out").scenes}
    assert found == {
        "desk": "Office",
        "lamp": "Lights",
        "sofa": "Seats",
        "stool__model": None,
        "table__model": None,
    }
    told = capsys.readouterr().err
    assert "1 of 6 could not be read:\n" in told and f"{folder / 'broken.zip'}: is no zip archive" in told
    (folder / "desk.obj").unlink()
    (folder / "shop.sh3f").unlink()
    with pytest.raises(UserError, match="holds no mesh(.|\n)*broken.zip: is no zip archive"):
        make_meshes(folder, tmp_path / "other", FEW)
    assert not list(tmp_path.glob("other*"))


# Stops


def bars(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"bar_{number}.obj").write_bytes(bar_obj(1 + number))
    return folder


def content(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in ("views.json", "rgb.npy", "alpha.npy", "cameras.npy")]


def test_a_stopped_import_goes_on(tmp_path, monkeypatch, capsys):
    folder, rendered, real = bars(tmp_path / "in", 4), [], importer.render_views
    make_meshes(folder, tmp_path / "whole", FEW)

    def stopping(name, *others):
        rendered.append(name)
        if len(rendered) == 3:
            raise Interrupted
        return real(name, *others)

    monkeypatch.setattr(importer, "render_views", stopping)
    with pytest.raises(Interrupted):
        make_meshes(folder, tmp_path / "out", FEW)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.work").glob("*.npz"))) == 2
    assert "out.work: keeps 2 finished objects" in capsys.readouterr().err
    (folder / "bar_1.obj").write_bytes(bar_obj(2) + b"# changed\n")
    make_meshes(folder, tmp_path / "out", FEW)
    assert rendered[3:] == ["bar_1", "bar_2", "bar_3"] and not (tmp_path / "out.work").exists()
    told = capsys.readouterr().err
    assert "1 of 4 objects is there from a stopped command" in told
    assert "1 object of a stopped command had other options or files" in told
    one, two = content(tmp_path / "out"), content(tmp_path / "whole")
    assert one[1:] == two[1:] and one[0].replace(b"/out", b"/whole") == two[0]


def test_a_damaged_object_is_rendered_again(tmp_path, monkeypatch):
    folder = bars(tmp_path / "in", 2)
    monkeypatch.setattr(importer, "_write", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        make_meshes(folder, tmp_path / "out", FEW)
    monkeypatch.undo()
    file = sorted((tmp_path / "out.work").glob("*.npz"))[0]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{file.name}: damaged"):
        make_meshes(folder, tmp_path / "out", FEW)
    make_meshes(folder, tmp_path / "out", FEW)
    assert len(PosedImages.open(tmp_path / "out").scenes) == 2


def test_several_processes_make_the_same_bytes_and_list_broken_files(tmp_path, capsys):
    folder = bars(tmp_path / "in", 3)
    (folder / "broken.obj").write_text("v 1 2 x")
    for workers in (1, 2):
        make_meshes(folder, tmp_path / f"out{workers}", FEW, choice=MeshChoice(workers=workers))
        told = capsys.readouterr().err
        assert "1 of 4 could not be read" in told and told.count("broken.obj:") == 1
    assert f"in {workers} processes" in told and content(tmp_path / "out1") == content(tmp_path / "out2")


def test_several_processes_and_a_stop_keep_boxes_and_fits(tmp_path, monkeypatch):
    folder, real = bars(tmp_path / "in", 3), importer.render_views
    box = "0,0,1,2,2,2"
    for name, options in (("boxes", replace(FEW, boxes="object")), ("fit", replace(FEW, box=box, fit=True))):
        make_meshes(folder, tmp_path / f"{name}2", options, choice=MeshChoice(workers=2))

        def stopping(scene, *rest):
            if scene == "bar_2":
                raise Interrupted
            return real(scene, *rest)

        monkeypatch.setattr(importer, "render_views", stopping)
        with pytest.raises(Interrupted):
            make_meshes(folder, tmp_path / name, options, choice=MeshChoice(workers=1))
        monkeypatch.setattr(importer, "render_views", real)
        make_meshes(folder, tmp_path / name, options, choice=MeshChoice(workers=1))
        assert content(tmp_path / name) == content(tmp_path / f"{name}2")
    own, fit = PosedImages.open(tmp_path / "boxes"), PosedImages.open(tmp_path / "fit")
    lengths = [max(scene.box.half) for scene in own.scenes]
    assert len(set(lengths)) == 3 and max(own.box.half) == max(lengths) and not fit.has_boxes
    assert fit.box.center == (0, 0, 1) and fit.box.half == (2, 2, 2)
    assert not np.allclose(own.cameras.cam2world, fit.cameras.cam2world)


# Tags travel


@pytest.mark.parametrize("tags", [["Ball"], None, {"category": 7}, {"tags": ["red", None]}])
def test_tags_that_are_no_texts_are_refused(tmp_path, solids_path, tags):
    shutil.copytree(solids_path, tmp_path / "data")
    index = json.loads((tmp_path / "data" / "views.json").read_text())
    index["scenes"][1]["tags"] = tags
    (tmp_path / "data" / "views.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"views.json: incomplete(.|\n)*tags"):
        PosedImages.open(tmp_path / "data")


def test_a_placed_dataset_keeps_tags(tmp_path):
    folder = bars(tmp_path / "in", 2)
    (tmp_path / "list.csv").write_text("file,category\nbar_0,Bars\n")
    make_meshes(folder, tmp_path / "out", FEW, choice=MeshChoice(catalog=tmp_path / "list.csv"))
    placed = place(tmp_path / "out", tmp_path / "placed", Placement(turn=90.0))
    assert [scene.tags for scene in placed.scenes] == [{"category": "Bars"}, {}]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory, solids_path):
    """A library of solids whose dataset has tags."""
    home = tmp_path_factory.mktemp("tagged")
    shutil.copytree(solids_path, home / "data")
    index = json.loads((home / "data" / "views.json").read_text())
    index["scenes"][0]["tags"] = {"name": "Red <b>ball</b>", "category": "Ball", "tags": ["round", "red"]}
    index["scenes"][1]["tags"] = {"category": "Box", "license": "CC0 1.0"}
    (home / "data" / "views.json").write_text(json.dumps(index))
    images = PosedImages.open(home / "data")
    run = made_run(home / "run", config_io.parse(TINY, "tiny"), images, "train")
    return latentscenes.create_library(home / "library", run.path, device="cpu")


def test_tags_of_a_dataset_reach_the_library_and_its_commands(tagged, capsys):
    assert tagged["red_ball"].metadata.tags["tags"] == ["round", "red"]
    assert tagged["blue_egg"].metadata.tags == {}
    for where, names in (
        (["category=b*"], ["red_ball", "green_box"]), (["tags=RED"], ["red_ball"]),
        (["category=b*", "license=CC0*"], ["green_box"]), (["license=CC-BY*"], []),
    ):  # fmt: skip
        assert [info.name for info in tagged.infos(where=where)] == names
    with pytest.raises(
        UserError, match="--where licence=x: give TAG=PATTERN; the tags are category, license"
    ):
        tagged.infos(where=["licence=x"])
    commands.library_list(tagged.path, where=("category=ball",))
    told = capsys.readouterr().out
    assert "Red <b>ball</b>" in told and "green_box" not in told and "1 of 4 scenes" in told
    commands.library_show(tagged.path, "red_ball")
    assert "tag category    Ball\n" in capsys.readouterr().out
    commands.library_show(tagged.path)
    assert "categories     Ball 1, Box 1" in capsys.readouterr().out
    commands.search(tagged.path, "blue_egg", where=("category=*",))
    told = capsys.readouterr().out
    assert "Ball · round, red" in told and "CC0 1.0" in told and "brown_bar" not in told


def test_tags_of_a_run_are_those_of_its_dataset(tagged):
    scenes = SceneSet.open_all(tagged.path.parent / "run")
    assert (
        scenes.tags("green_box") == {"category": "Box", "license": "CC0 1.0"}
        and scenes.tags("blue_egg") == {}
    )


# Catalogs of captures


@pytest.mark.parametrize("make, write", [(make_transforms, write_transforms), (make_srn, write_object)])
def test_posed_images_get_the_tags_of_a_catalog(tmp_path, make, write):
    cameras = around(5)
    for name in ("chair_1", "chair_2"):
        write(tmp_path / "in" / name, cameras, pictures(cameras))
    table = tmp_path / "table.csv"
    table.write_text("file,title,category\nchair_2,Second chair,Seats\nchair_9,Gone,Seats\n")
    made = make(tmp_path / "in", tmp_path / "set", options=ImportOptions(catalog=table, held_out=1))
    tags = {scene.name: scene.tags for scene in PosedImages.open(tmp_path / "set").scenes}
    assert tags == {"chair_1": {}, "chair_2": {"name": "Second chair", "category": "Seats"}}
    assert f"{table}: 1 row that names no object: chair_9" in made.notes
    assert f"{table}: 1 object without a row: chair_1" in made.notes


def test_the_only_object_gets_its_row(tmp_path):
    cameras = around(5)
    write_transforms(tmp_path / "lamp", cameras, pictures(cameras))
    table = tmp_path / "table.json"
    table.write_text('[{"file": "lamp", "license": "CC0"}]')
    make_transforms(tmp_path / "lamp", tmp_path / "set", options=ImportOptions(catalog=table, held_out=1))
    assert PosedImages.open(tmp_path / "set").scenes[0].tags == {"license": "CC0"}


def test_a_catalog_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path):
    cameras = around(5)
    write_transforms(tmp_path / "lamp", cameras, pictures(cameras))
    options = ImportOptions(catalog=tmp_path / "absent.csv")
    with pytest.raises(UserError, match="absent.csv: cannot be read"):
        make_transforms(tmp_path / "lamp", tmp_path / "set", options=options)
    assert not (tmp_path / "set").exists()
