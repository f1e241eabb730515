"""Libraries: adding scenes from images, search, precision, export, commands, several processes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SOLIDS, TINY, photograph
from results import made_run

import latentscenes
from latentscenes.cli import listing
from latentscenes.cli import main as cli
from latentscenes.core import config_io
from latentscenes.core.cameras import orbit
from latentscenes.core.errors import UserError
from latentscenes.storage import maintenance
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.quantize import PRECISIONS, pack, unpack
from latentscenes.training import loop

NAMES = ["red_ball", "green_box", "blue_egg", "brown_bar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, solids):
    lively = config_io.parse(TINY, "tiny", ["planes.initial_std=3"])
    return made_run(tmp_path_factory.mktemp("runs") / "run", lively, solids, "train")


@pytest.fixture
def library(run, tmp_path):
    return latentscenes.create_library(tmp_path / "library", run.path, precision="float32", device="cpu")


@pytest.fixture
def disc():
    """Returns images, silhouettes and cameras of a solid."""
    kind, size, color, _ = SOLIDS["pink_disc"]
    cameras = orbit(6)
    return *photograph(kind, size, color, cameras, 32), cameras


# Adding


def test_adding_a_scene_from_pictures(library, disc):
    images, alpha, cameras = disc
    before = {file.name: file.read_bytes() for file in (library.path / "shards").iterdir()}
    scene = library.add("disc", images, cameras, tags={"color": "pink"})
    info = scene.metadata
    assert (info.name, info.origin, info.dataset, info.split, info.precision) == (
        "disc",
        "add",
        None,
        None,
        "float32",
    )
    assert (
        info.seconds > 0
        and info.psnr > 5
        and info.tags == {"color": "pink"}
        and scene.thumbnail.startswith(b"\x89PNG")
    )
    assert library.names == [*NAMES, "disc"] and not list((library.path / "work").glob("*/"))
    assert (
        before.items()
        <= {file.name: file.read_bytes() for file in (library.path / "shards").iterdir()}.items()
    )
    start = library.folder.starting_scene()
    assert not torch.equal(scene.rows.weights, start.weights) and not torch.equal(
        scene.rows.micro, start.micro
    )
    # The same images over black, as floats with masks
    share = alpha[..., None] / 255
    over_black = np.clip(images / 255 - (1 - share), 0, 1) / np.maximum(share, 1e-9)
    again = library.add("again", over_black.clip(0, 1), cameras, masks=alpha / 255, precision="int6")
    assert again.metadata.precision == "int6" and abs(again.metadata.psnr - info.psnr) < 0.1
    library.tag("disc", color=None, size=3)
    assert library["disc"].metadata.tags == {"size": 3}


def test_pictures_that_cannot_be_learned_are_refused(library, disc):
    images, alpha, cameras = disc

    def refused(message, *given, name="new", masks=None):
        add = latentscenes.Library.add.__wrapped__
        with pytest.raises(UserError, match=message):
            add(library, name, *given, masks)

    refused("a scene 'red_ball' is there already", images, cameras, name="red_ball")
    refused("the name is empty", images, cameras, name=" ")
    refused(r"must be \(v, H, W, 3\), RGB", images[0], cameras)
    refused("different sizes", [images[0], images[1][:16]], cameras[:2])
    refused(
        "30x32 pixels, but sides must be multiples of the codec's downsampling, 4",
        images[:, :, 1:31],
        cameras,
    )
    refused("must be bytes", images.astype(np.int64), cameras)
    refused(
        "reach from 0 to 255",
        np.minimum(images, 255).astype(np.float32) * (255 / images.max()) * (images > images.min()),
        cameras,
    )
    refused("their edges are not white", 255 - images, cameras)
    refused(r"masks: must be \(6, 32, 32\)", images, cameras, masks=alpha[:2])
    refused("5 of them for 6 images", images, cameras[:5])
    flipped = cameras.cam2world.clone()
    flipped[:, :, 1:3] *= -1
    refused(
        "Pass --axes opengl; from Python, negate", images, latentscenes.Cameras(flipped, cameras.intrinsics)
    )
    assert library.names == NAMES and not list((library.path / "work").glob("*/"))


def test_a_stopped_addition_leaves_nothing(library, disc, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    images, _, cameras = disc
    monkeypatch.setattr(loop.StageLearner, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        library.add("disc", images, cameras)
    assert library.names == NAMES and not list((library.path / "work").glob("*/"))


def test_searching_for_a_scene_of_a_dataset(library, solids):
    found = library.search(solids, "green_box", count=4)
    assert sorted(neighbor.name for neighbor in found) == sorted(NAMES) and library.names == NAMES
    weights = library.weights()
    assert library.nearest(3 * weights[2], count=1, metric="cosine")[0] == (
        "blue_egg",
        pytest.approx(0, abs=1e-6),
    )
    with pytest.raises(UserError, match="no scene 'green_bx' here; the nearest name is 'green_box'"):
        library.search(solids, "green_bx")


# Precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_packed_is_unpacked(precision, tiny):
    generator = torch.Generator().manual_seed(3)
    planes = dataclasses.replace(tiny.planes, bias=True)
    rows = latentscenes.model.planes.random_parameters(1, planes, generator)
    rows.micro[0, 1, :, :, 1] = 0
    again = unpack(pack(rows, precision), planes)
    bound = {"float32": 0.0, "float16": 2**-11}.get(precision)
    worst = rows.micro.abs().amax((2, 3), keepdim=True) * (
        bound if bound is not None else 0.5001 / (2 ** (int(precision[3:]) - 1) - 1)
    )
    assert (
        ((again.micro - rows.micro).abs() <= worst).all()
        and torch.equal(again.weights, rows.weights)
        and again.bias.shape == (1, 1)
    )
    stable = unpack(pack(again, precision), planes)
    assert torch.allclose(stable.micro, again.micro, rtol=1e-6)


def test_dial_and_repack(library, solids):
    settings = library.precision_costs()
    assert [setting.precision for setting in settings] == list(PRECISIONS) and settings[0].lost == 0
    assert [setting.bytes for setting in settings] == sorted(
        (setting.bytes for setting in settings), reverse=True
    )
    assert [setting.lost for setting in settings] == sorted(
        setting.lost for setting in settings
    ) and settings[-1].lost > 1e-3
    exact = {name: library[name].rows for name in NAMES}
    assert library.repack("int4") == 4 and library.repack("int4") == 0 and library.repack("int8") == 0
    assert library.verify() == [] and library.names == NAMES
    for name in NAMES:
        info, stored = library[name].metadata, library[name].rows
        assert (
            info.precision == "int4"
            and info.bytes == maintenance.payload_bytes(library.folder.payload(name))
            and info.psnr_lost > 0
        )
        assert torch.equal(
            stored.micro, unpack(pack(exact[name], "int4"), library.config.planes).micro
        ) and torch.equal(stored.weights, exact[name].weights)


def test_the_estimated_loss_is_the_measured_one(library, solids):
    """Errors of quantization add to those of the learned scene."""
    scene, model = solids.select("train")[0], library.model
    index = scene.views("all")
    fine, coarse = (pack(library["red_ball"].rows, precision) for precision in ("float32", "int3"))
    from latentscenes.training.append import measure

    psnr = [
        measure(model, unpack(payload, library.config.planes), solids, index) for payload in (fine, coarse)
    ]
    assert maintenance.loss(library.folder, model, fine, coarse, psnr[0]) == pytest.approx(
        psnr[0] - psnr[1], abs=0.05
    )


# Copies


def test_export_and_joining_of_libraries(library, tmp_path, run, disc):
    images, _, cameras = disc
    library.add("disc", images, cameras, precision="int8")
    assert library.export(["blue_egg", "disc"], tmp_path / "two") == 2
    two = latentscenes.open_library(tmp_path / "two", device="cpu")
    assert two.names == ["blue_egg", "disc"] and two.verify() == []
    for name in two.names:
        assert two[name].metadata == library[name].metadata and two.thumbnail(name) == library.thumbnail(name)
        assert two.folder.index.place(name).checksum == library.folder.index.place(name).checksum
    assert np.array_equal(two["disc"].render(two.orbit(1)).rgb, library["disc"].render(library.orbit(1)).rgb)
    assert library.export(library.names, tmp_path / "two") == 3 and len(two) == 5
    two.remove("disc")
    two.rename("blue_egg", "disc")
    with pytest.raises(UserError, match="holds another scene named 'disc'"):
        library.export(["disc"], tmp_path / "two")
    config = config_io.parse(TINY, "tiny", ["seed=6"])
    other = latentscenes.create_library(
        tmp_path / "other",
        made_run(
            tmp_path / "run", config, latentscenes.data.dataset.PosedImages.open(run.info.data), "train"
        ).path,
        device="cpu",
    )
    with pytest.raises(UserError, match="a library of another model"):
        library.export(["disc"], other.path)


def test_compact_clears_what_stopped_work_left_but_not_what_is_at_work(library):
    from latentscenes.training.add import work_folder

    (library.path / "work" / "stale").mkdir(parents=True)
    (library.path / "work" / "stale" / "lock").touch()
    with work_folder(library.folder) as busy:
        library.compact()
        assert busy.is_dir()
    library.compact()
    assert not (library.path / "work").exists()


def test_compact_merges_shards_and_keeps_every_bit(library, tmp_path, monkeypatch):
    for name in NAMES:
        library.export([name], tmp_path / "many")
    many = latentscenes.open_library(tmp_path / "many", device="cpu")
    assert len(list((many.path / "shards").iterdir())) == 4
    many.compact()
    assert len(list((many.path / "shards").iterdir())) == 1 and many.verify() == [] and many.names == NAMES
    assert all(torch.equal(many[name].rows.micro, library[name].rows.micro) for name in NAMES)

    class Crash(Exception):
        pass

    def crash(*_):
        raise Crash

    many.remove("green_box")
    monkeypatch.setattr(maintenance, "SHARD_BYTES", 4000)
    with monkeypatch.context() as broken:
        commits, commit = [], maintenance._commit
        broken.setattr(
            maintenance,
            "_commit",
            lambda *given: commits.append(1) or (crash() if len(commits) == 2 else commit(*given)),
        )
        with pytest.raises(Crash):
            many.compact()
    assert many.verify() == [] and len(many) == 3
    many.compact()
    assert many.verify() == [] and many.names == ["red_ball", "blue_egg", "brown_bar"]
    assert all(torch.equal(many[name].rows.micro, library[name].rows.micro) for name in many.names)


# Commands


@pytest.fixture
def call(monkeypatch, capsys):
    """Returns a function that runs a command and returns exit status, stdout and stderr."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["latentscenes", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return called


def test_commands(library, tmp_path, call, solids_path, monkeypatch):
    path = library.path
    status, out, _ = call("library", "list", path, "--match", "b*")
    assert (
        status == 0
        and "blue_egg" in out
        and "brown_bar" in out
        and "red_ball" not in out
        and "2 of 4 scenes, " in out
    )
    status, out, _ = call("library", "list", path, "--as-json", "--limit", 1)
    assert status == 0 and json.loads(out)["name"] == "red_ball" and json.loads(out)["split"] == "train"
    with monkeypatch.context() as fewer:
        fewer.setattr(listing, "MANY", 3)
        status, out, _ = call("library", "list", path, "--limit", 0)
    lines = out.splitlines()
    assert (
        status == 0
        and [line.split()[0] for line in lines[1:5]] == NAMES
        and len({len(line) for line in lines[:5]}) == 1
        and "4 of 4 scenes, " in lines[5]
    )
    status, out, _ = call("library", "show", path)
    assert status == 0 and "4 (4 from stage 1)" in out and str(solids_path) in out and "32x32" in out
    status, out, _ = call("library", "show", path, "blue_egg")
    assert status == 0 and "PSNR" in out and "float32" in out
    assert call("library", "rename", path, "blue_egg", "an egg")[0] == 0 and "an egg" in library
    assert call("library", "remove", path, "an egg", "red_ball")[0] == 0 and library.names == [
        "green_box",
        "brown_bar",
    ]
    status, _, err = call("library", "export", path, "--match", "g*", "--out", tmp_path / "one")
    assert (
        status == 0
        and "1 scene copied" in err
        and LibraryFolder.open(tmp_path / "one").index.names() == ["green_box"]
    )
    status, out, _ = call("library", "repack", path, "--device", "cpu")
    assert status == 0 and "int3" in out and library["green_box"].metadata.precision == "float32"
    status, out, err = call("library", "repack", path, "--lost", "100", "--device", "cpu")
    assert status == 0 and "2 scenes stored as int3" in err
    status, _, err = call("library", "compact", path)
    assert status == 0 and "freed" in err
    status, out, _ = call("search", path, "green_box", "--device", "cpu")
    assert status == 0 and "brown_bar" in out
    status, out, _ = call("search", path, "blue_egg", "--data", solids_path, "--count", 1, "--device", "cpu")
    assert status == 0 and "cosine" in out
    status, _, err = call("library", "verify", path)
    assert status == 0 and "2 scenes, all intact" in err
    for shard in (path / "shards").iterdir():
        shard.unlink()
    status, out, _ = call("library", "verify", path)
    assert status == 1 and "green_box: its shard" in out


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("show",), ("show", "red_bal"), ("rename", "red_bal", "ball"), ("export", "red_bal")],
)
def test_short_answers_load_no_torch(arguments, library, tmp_path):
    command, *rest = arguments
    words = ["latentscenes", "library", command, str(library.path), *rest]
    words += ["--out", str(tmp_path / "out")] if command == "export" else []
    script = f"import sys; from latentscenes.cli import main as cli; sys.argv = {words!r}\n"
    script += "try: cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.returncode == (2 if "red_bal" in arguments else 0), done.stderr


def test_a_report_needs_the_run_that_the_library_was_made_from(run, tmp_path, call):
    parent = shutil.copytree(run.path, tmp_path / "run")
    made = latentscenes.create_library(tmp_path / "library", parent, device="cpu")
    parent.rename(tmp_path / "moved")
    status, _, err = call("report", "--run", made.path, "--out", tmp_path / "a.html", "--device", "cpu")
    assert status == 2 and f"{parent}, which it was made from, is not here" in err


def test_a_list_may_be_read_in_part(library):
    read, write = os.pipe()
    os.close(read)
    words = ["latentscenes", "library", "list", str(library.path), "--as-json"]
    script = f"import sys; from latentscenes.cli import main as cli; sys.argv = {words!r}; cli.main()"
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["library", "list", "{tmp}/absent"], "no library here"),
        (["library", "remove", "{library}", "red_bal"], "the nearest names are 'red_ball'"),
        (["library", "rename", "{library}", "red_ball", "blue_egg"], "is there already"),
        (["library", "export", "{library}", "--out", "{tmp}/x"], "no scenes named"),
        (
            ["library", "export", "{library}", "red_ball", "--out", "{tmp}/file/x"],
            "file/x: cannot be written",
        ),
        (["library", "model", "{library}", "{tmp}/file/x"], "file/x: cannot be written"),
        (["library", "remove", "{library}"], "no scenes named, so none is removed"),
        (["library", "list", "{library}", "--limit", "-1"], "--limit -1: must be at least 1, or 0 for all"),
        (["library", "repack", "{library}", "--lost", "-1"], "--lost -1: dB, must be at least 0"),
        (
            ["library", "repack", "{library}", "--lost", "1", "--precision", "int8"],
            "--lost 1: cannot be combined with --precision",
        ),
        (["search", "{library}", "red_ball", "--count", "0"], "--count 0: must be at least 1"),
        (
            ["render", "--run", "{library}", "--scene", "red_ball", "--out", "{tmp}/file/a.gif"],
            "file/a.gif: cannot be created:",
        ),
        (
            ["render", "--run", "{library}", "--scene", "red_ball", "--out", "{tmp}/folder.gif"],
            "folder.gif: this is a folder",
        ),
        (
            [
                "render",
                "--run",
                "{library}",
                "--scene",
                "red_ball",
                "--out",
                "{tmp}/a.gif",
                "--elevation",
                "95",
            ],
            "--elevation 95: degrees",
        ),
        (
            [
                "export",
                "page",
                "--run",
                "{library}",
                "--match",
                "*",
                "--out",
                "{tmp}/a.html",
                "--elevations",
                "95",
            ],
            "--elevations 95: degrees",
        ),
        (
            ["export", "images", "--run", "{library}", "--match", "*", "--out", "{tmp}/file/x"],
            "file/x: cannot be created:",
        ),
        (["library", "repack", "{tmp}", "--precision", "int8"], "no library here"),
        (["search", "{library}", "x"], "the nearest names are"),
        (
            ["render", "--run", "{library}", "--scene", "red_bal", "--out", "{tmp}/a.gif"],
            "the nearest names are 'red_ball'",
        ),
        (
            ["exploit", "--data", "{data}", "--out", "{tmp}/new"],
            "no library here yet. With --run, name the run that provides",
        ),
        (["exploit", "--finetune", "--data", "{data}", "--out", "{library}"], "to finetune, name with --run"),
        (
            ["exploit", "--data", "{data}", "--out", "{library}", "--group", "0"],
            "--group 0: must be at least 1",
        ),
    ],
)
def test_mistakes_take_one_line(arguments, message, library, tmp_path, call, solids_path):
    places = {"tmp": tmp_path, "library": library.path, "data": solids_path}
    (tmp_path / "file").touch()
    (tmp_path / "folder.gif").mkdir()
    status, out, err = call(*(argument.format(**places) for argument in arguments))
    assert (
        status == 2
        and out == ""
        and err.startswith("latentscenes: ")
        and message in err
        and err.count("\n") == 1
    )


def test_eval_cost_and_render_read_libraries(library, call, tmp_path):
    status, out, _ = call("eval", "--run", library.path, "--sheet", tmp_path / "sheet.png", "--device", "cpu")
    assert (
        status == 0
        and "4 scenes, 4 held-out views" in out
        and (tmp_path / "sheet.png").exists()
        and (library.path / "evaluation.json").exists()
    )
    status, out, _ = call("cost", "--run", library.path)
    assert status == 0 and "as stored" in out and "Stage 1 took 7.50 s CPU, 13.5 s wall for 4 scenes" in out
    status, _, _ = call(
        "render",
        "--run",
        library.path,
        "--scene",
        "red_ball",
        "--out",
        tmp_path / "orbit.gif",
        "--frames",
        2,
        "--device",
        "cpu",
    )
    assert status == 0 and (tmp_path / "orbit.gif").stat().st_size > 100
    library.rename("red_ball", "ball")
    assert not (library.path / "evaluation.json").exists()
    status, out, _ = call("eval", "--run", library.path, "--part", "fit", "--views", 1, "--device", "cpu")
    assert status == 0 and "ball" in out and (library.path / "evaluation_fit.json").exists()


# Several processes


def test_readers_beside_a_writer_see_whole_scenes(library):
    reader = latentscenes.open_library(library.path, device="cpu")
    rows, problems, stop = {name: library[name].rows for name in NAMES}, [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                names = reader.names
                weights = reader.weights()
                if len(weights) < 4 or not set(NAMES) <= set(reader.names):
                    problems.append((names, weights.shape))
                for name in names:
                    stored = reader.folder.parameters(name)
                    if not torch.equal(stored.micro, rows[name.split("/")[0]].micro):
                        problems.append(name)
            except UserError as error:
                if "no scene" not in str(error):
                    problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    payload, info = library.folder.payload("red_ball"), library["red_ball"].metadata
    for turn in range(8):
        copies = [NewScene(dataclasses.replace(info, name=f"red_ball/{turn}/{k}"), payload) for k in range(3)]
        library.folder.append(copies)
        if turn % 2:
            library.remove(f"red_ball/{turn}/0", f"red_ball/{turn - 1}/1")
            library.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == [] and len(library) == 4 + 8 * 3 - 8 and library.verify() == []


def test_what_is_kept_in_memory_is_read_anew_after_a_change(library):
    other = latentscenes.open_library(library.path, device="cpu")
    before, names = other.weights(), other.names
    library.remove("green_box")
    library.rename("red_ball", "ball")
    assert (
        other.names == ["ball", "blue_egg", "brown_bar"]
        and np.array_equal(other.weights(), before[[0, 2, 3]])
        and names == NAMES
    )
    assert [name for name, _ in other.nearest("ball", 5)] == [name for name, _ in library.nearest("ball", 5)]
    other.weights()[:] = 0
    assert np.array_equal(other.weights(["blue_egg"]), before[[2]])


# Examples in the documentation


@pytest.mark.parametrize(
    ("page", "folder", "names"),
    [("docs/library.md", "cars", ["car_0024", "car_0025"]), ("README.md", "chairs", ["chair_007", "x"])],
)
def test_python_of_the_pages_runs(page, folder, names, run, tmp_path, monkeypatch, disc, capsys):
    images, alpha, cameras = disc
    library = latentscenes.create_library(tmp_path / "libraries" / folder, run.path, device="cpu")
    for old, new in zip(NAMES, names, strict=False):
        library.rename(old, new)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / page).read_text()
    blocks = [block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "librar" in block]
    assert blocks
    space = {"images": images, "cameras": cameras, "masks": alpha}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    if folder == "cars":
        assert (tmp_path / "libraries" / "one_car" / "library.json").exists() and "our car" not in library
        assert space["views"].rgb.shape == (8, 32, 32, 3)
    else:
        assert "my chair" in library
