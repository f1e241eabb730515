"""Files of strangers: odd names, text that wants to be code, small files that claim or become large ones."""

import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from conftest import TINY, write_solids
from PIL import Image
from results import made_run

import latentscenes
from benchmarks import hostile
from latentscenes.cli.main import main
from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.names import check_name, file_names, one_line, printable, short
from latentscenes.core.reading import parse_json, read_json, read_text
from latentscenes.data import images
from latentscenes.data.dataset import PosedImages
from latentscenes.data.meshes.importer import read_mesh
from latentscenes.data.splits import choose_splits
from latentscenes.data.writing import DatasetWriter
from latentscenes.model.planes import random_parameters
from latentscenes.storage import sqlite
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.quantize import pack, payload_precision, unpack

SCRIPT = '<img src=x onerror="window.ran=1"><script>window.ran=1</script><!--<script>'
UGLY = "\x1b[31mred\x07\n[/]"


@pytest.fixture(scope="module")
def made(tmp_path_factory, solids):
    """A library of four solids with random parameters."""
    folder = tmp_path_factory.mktemp("hostile")
    run = made_run(folder / "run", config_io.parse(TINY, "tiny"), solids, "train")
    return latentscenes.create_library(folder / "library", run.path, precision="int8", device="cpu")


@pytest.fixture
def library(made, tmp_path):
    made.export(made.names, tmp_path / "library")
    return latentscenes.open_library(tmp_path / "library", device="cpu")


def set_column(library, column: str, value: object) -> None:
    """Changes the index behind the library's back, for the scene red_ball."""
    with sqlite3.connect(library.path / FILE) as connection:
        connection.execute(f"UPDATE scenes SET {column} = ? WHERE name = 'red_ball'", (value,))
    connection.close()


def run(*arguments: object) -> tuple[int, str, str]:
    """Runs a command in this process. Returns its status, output and messages."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["latentscenes", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


# Names


@pytest.mark.parametrize("name", [
    "", "  ", ".", " .. ", "a\nb", "a\0b", "\x1b[31m", "a\x7f", "\u202eabc", "\ud800", "ä" * 101, 7, None,
])  # fmt: skip
def test_names_that_no_scene_may_have(name):
    with pytest.raises(UserError, match="data: .* cannot name a scene: it ") as raised:
        check_name(name, "data")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "name", ["a", "cars/7", "[/]", "..a", "車 12", "<b>", "e\u0301", "👩\u200d🚀", "ä" * 100]
)
def test_names_that_scenes_may_have(name):
    assert check_name(name, "data") == name


def test_text_for_a_terminal():
    assert one_line(UGLY) == r"\x1b[31mred\x07\n[/]" and printable("a\nb\r\ud800") == "a\nb\\r\\ud800"
    assert short([1] * 1000) == "a list" and short("x" * 500) == "'" + "x" * 79 + " …"


def test_file_names_are_safe_and_differ():
    names = ["a/b", "a\\b", "A_b", "..", "con", "x" * 300, "x" * 301, "a:b ", "\x1b", "plain.1"]
    files = file_names(names)
    assert list(files) == names and files["plain.1"] == "plain.1" and files[".."] == "_"
    assert [files["a/b"], files["a\\b"], files["A_b"], files["con"]] == ["a_b", "a_b-2", "A_b-3", "_con"]
    assert len({file.casefold() for file in files.values()}) == len(names)
    assert all(len(file.encode()) < 130 and not set(file) & set('/\\:*?"<>|\x1b') for file in files.values())


def test_every_entrance_keeps_the_rule(library, tmp_path):
    with pytest.raises(UserError, match="cannot name a scene"):
        library.rename("red_ball", "a\x1bb")
    with pytest.raises(UserError, match="cannot name a scene"):
        choose_splits(["a", "b\n"])
    views = write_solids(tmp_path / "data") / "views.json"
    views.write_text(views.read_text().replace("pink_disc", "pink\\n"))
    dataset = PosedImages.open(tmp_path / "data")
    assert "pink\n" in [scene.name for scene in dataset.scenes]
    writer = DatasetWriter(tmp_path / "new", (32, 32), False, "made")
    with pytest.raises(UserError, match="cannot name a scene"):
        writer.add("pink\n", dataset.rgb[:6], dataset.cameras[:6], "new", ())
    status, _, err = run("exploit", "--data", tmp_path / "data", "--out", library.path, "--threads", "1")
    assert status == 2 and "'pink\\n' cannot name a scene" in err and len(library) == 4


def test_a_library_with_a_forbidden_name_opens_and_the_scene_can_be_renamed(library):
    set_column(library, "name", UGLY)
    status, out, _ = run("library", "list", library.path)
    assert status == 0 and "\x1b" not in out and r"\x1b[31mred" in out
    status, out, err = run("library", "rename", library.path, UGLY, "[/] plain")
    assert (status, out) == (0, "") and "\x1b" not in err and "'[/] plain'" in err
    assert "[/] plain" in library.names
    assert run("library", "show", library.path, "[/] plain")[0] == 0


def test_a_terminal_without_unicode_shows_escapes(made):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    command = [sys.executable, "-m", "latentscenes", "library", "show", str(made.path), "grün"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (
        done.returncode == 2
        and rb"no scene 'gr\xfcn' here" in done.stderr
        and b"Traceback" not in done.stderr
    )


# Text that wants to be code


def test_what_an_index_cannot_hold_is_refused(library):
    for column, value in (("origin", SCRIPT), ("precision", "int99"), ("bytes", "many"), ("tags", "[1]"),
                          ("psnr", "x"), ("split", "other"), ("name", b"\xff")):  # fmt: skip
        with sqlite3.connect(library.path / FILE) as connection:
            (before,) = connection.execute(f"SELECT {column} FROM scenes WHERE id = 1").fetchone()
            connection.execute(f"UPDATE scenes SET {column} = ? WHERE id = 1", (value,))
        with pytest.raises(UserError, match="entry of scene .* is damaged"):
            library.infos()
        with connection:
            connection.execute(f"UPDATE scenes SET {column} = ? WHERE id = 1", (before,))
        connection.close()
    assert len(library.infos()) == 4


def test_no_text_ends_the_script_of_a_page(library, tmp_path):
    set_column(library, "name", SCRIPT)
    arguments = ("--match", "*", "--frames", "1", "--title", SCRIPT, "--threads", "1")
    status, _, err = run("export", "page", "--run", library.path, "--out", tmp_path / "page.html", *arguments)
    assert status == 0, err
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page and "<!--" not in page
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert {scene["name"] for scene in json.loads(data)["scenes"]} == set(library.names)


# Small files that become large


def test_aliases_are_counted_before_they_are_followed():
    lines = ["a0: &a0 [x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 30))]
    with pytest.raises(UserError, match="bomb.yaml: not valid YAML: it has more than"):
        config_io.parse("\n".join(lines), "bomb.yaml")
    with pytest.raises(UserError, match="more than"):
        config_io.parse("a: &a [*a]", "circle.yaml")
    with pytest.raises(UserError, match="nested too deeply"):
        config_io.parse("[" * 20_000, "deep.yaml")
    assert config_io.parse("seed: &n 3\nplanes: {bases: *n}", "fine.yaml").planes.bases == 3


def test_sizes_in_a_configuration_are_limited():
    with pytest.raises(UserError, match=r"x: planes.resolution: 100000 is above 4096"):
        config_io.parse("planes: {resolution: 100000}", "x")
    with pytest.raises(UserError, match="a scene would have more than"):
        config_io.parse("planes: {resolution: 4096, micro: 1000}", "x")
    with pytest.raises(UserError, match="expected float"):
        config_io.parse(f"normalizer: {{scale: 1{'0' * 400}}}", "x")


def test_base_planes_are_compared_with_the_file_before_they_are_allocated(library):
    settings = library.path / "config.yaml"
    settings.write_text(settings.read_text().replace("bases: 3", "bases: 99999"))
    with pytest.raises(UserError, match=r"base planes are \[3, .*needs \[99999, "):
        latentscenes.open_library(library.path, device="cpu").model  # noqa: B018


def test_planes_inflate_to_their_own_size_only(tiny):
    payload = pack(random_parameters(1, tiny.planes, torch.Generator()), "int8")
    bomb = zlib.compress(bytes(1 << 24))
    for name in ("micro.differences.stream", "micro.stream"):
        held = {"micro.scale": payload["micro.scale"], "weights": payload["weights"]}
        with pytest.raises(ValueError, match="hold other than"):
            unpack(held | {name: torch.from_numpy(np.frombuffer(bomb, np.uint8).copy())}, tiny.planes)
        with pytest.raises(ValueError, match="hold other than"):
            payload_precision({name: held["weights"].new_tensor([*zlib.compress(b"abc")]).byte()})
        with pytest.raises(ValueError, match="are damaged"):
            payload_precision(held | {name: torch.zeros(9, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"weights is \(9,\), but the configuration needs \(3,\)"):
        unpack(payload | {"weights": torch.zeros(9)}, tiny.planes)


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    Image.new("L", (20, 6)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match="large.png: has 20x6 pixels"):
        images.read_image(tmp_path / "large.png")
    assert images.over_white(np.full((2, 2, 4), 0, np.uint8)).min() == 255


def test_threads_decode_only_what_fits_at_one_time():
    budget, held = images._PixelBudget(), []

    def take(pixels: int) -> None:
        with budget.of(pixels):
            held.append(images.MOST_PIXELS - budget._free)

    images.in_parallel(take, [images.MOST_PIXELS // 2] * 16)
    assert max(held) <= images.MOST_PIXELS == budget._free


@pytest.mark.parametrize("code", [
    "CREATE VIEW v AS WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT * FROM c",
    "CREATE TRIGGER t AFTER UPDATE ON scenes BEGIN DELETE FROM scenes; END",
    "ALTER TABLE scenes ADD COLUMN z AS (hex(name))", "CREATE INDEX e ON scenes (length(name))",
])  # fmt: skip
def test_an_index_that_computes_is_refused(tmp_path, code):
    Index.create(tmp_path / FILE).close()
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute(code)
    connection.close()
    with pytest.raises(UserError, match="which runs code"):
        Index(tmp_path / FILE)


def test_a_statement_without_end_is_stopped(library, monkeypatch):
    monkeypatch.setattr(sqlite, "MOST_STEPS", 10**6)
    index = latentscenes.open_library(library.path, device="cpu").folder.index
    with pytest.raises(UserError, match="interrupted"):
        index._ask("WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT sum(x) FROM c")
    assert len(index) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_not_waited_for(library, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros", "."):
        with pytest.raises(OSError, match="is no regular file"):
            read_text(tmp_path / name)
    with pytest.raises(UserError, match="pipe: cannot be opened"):
        images.image_size(tmp_path / "pipe")
    shard = library.path / "shards" / "000001.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    fresh = latentscenes.open_library(library.path, device="cpu")
    assert len(fresh.verify()) == 4
    with pytest.raises(UserError, match="is no regular file"):
        fresh["red_ball"].rows  # noqa: B018


@pytest.mark.parametrize(("name", "content", "fault"), [
    ("a.ply", b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "comes before any element"),
    ("a.obj", b"v 0 0 0\nvt x\nf 1/1 1 1\n", "holds something else than numbers"),
    ("a.gltf", b'{"asset": {"version": "2.0"}, "extensionsRequired": [[]]}', "is damaged: TypeError"),
    ("b.gltf", b'{"asset": {"version": "2.0"}, "scenes": [' + b"9" * 5000 + b"]}", "holds no valid JSON"),
])  # fmt: skip
def test_damaged_meshes_are_named(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{fault}"):
        read_mesh(tmp_path / name)


def test_a_mesh_that_repeats_itself_is_limited(tmp_path):
    """A hundred accessors of zeros, which stand nowhere in the file."""
    accessor = {"componentType": 5126, "type": "VEC3", "count": 60_000_000}
    primitive = {"attributes": {"POSITION": 0}}
    content = {
        "asset": {"version": "2.0"},
        "accessors": [accessor],
        "meshes": [{"primitives": [primitive] * 100}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
    }
    (tmp_path / "zeros.gltf").write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds more numbers than can be read"):
        read_mesh(tmp_path / "zeros.gltf")
    content["accessors"][0]["count"] = 1_500_000
    (tmp_path / "zeros.gltf").write_text(json.dumps(content))
    with pytest.raises(UserError, match="repeats its meshes to more than"):
        read_mesh(tmp_path / "zeros.gltf")


# Odd JSON


@pytest.mark.parametrize(("text", "fault"), [
    ('{"a": 1, "a": 2}', "the key 'a' comes twice"), ("[" * 100_000, "nested too deeply"),
    ("1" * 5000, "digits"), ('{"a": }', "Expecting value"),
])  # fmt: skip
def test_json_that_is_refused(tmp_path, text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json: cannot be read .*{fault}.* Remake it."):
        read_json(tmp_path / "x.json", "Remake it.")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + b"a" * 97)
    assert read_text(tmp_path / "x", 100) == "a" * 97
    with pytest.raises(OSError, match="has more than"):
        read_text(tmp_path / "x", 99)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_descriptions_end_in_one_message(library, solids, tmp_path, seed):
    """The long campaign is `python -m benchmarks.hostile`."""
    draw = random.Random(seed)
    name = ("library.json", "config.yaml", FILE, "shards/000001.safetensors", "views.json")[seed % 5]
    folder = write_solids(tmp_path / "data", 8, 3) if name == "views.json" else library.path
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(changed := hostile.mutated(name, content, draw))
    if name == FILE and changed == content:
        hostile.change_index(folder / name, draw)
    if name == "views.json":
        commands = [("data", "join", "--folders", folder, solids.path, "--out", tmp_path / "out")]
    else:
        commands = [("library", "list", folder), ("library", "verify", folder), ("library", "show", folder)]
    for command in commands:
        status, out, err = run(*command)
        assert status in (0, 1, 2) and "\x1b" not in out + err
        said = [line for line in err.splitlines() if not line.startswith("Note: ")]
        assert status != 2 or len(said) == 1 and said[0].startswith("latentscenes: ")
