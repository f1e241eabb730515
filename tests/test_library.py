"""Libraries: scenes are stored exactly and read one by one, and a crash loses nothing."""

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from published_pages import COLORS, library_of, packed_before, random_model, random_scene
from results import made_run
from safetensors.torch import load_file, save_file

import latentscenes
from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.files import open_tensors
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation.cost import learned_costs
from latentscenes.storage import shards
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.maintenance import repack
from latentscenes.storage.quantize import CODES, DIFFERENCES, pack, payload_bytes, payload_precision
from latentscenes.storage.scene_set import SceneSet


@pytest.fixture(scope="module")
def run(tmp_path_factory, solids):
    """Returns a finished stage 1 of four solids with random parameters."""
    return made_run(tmp_path_factory.mktemp("runs") / "run", config_io.parse(TINY, "tiny"), solids, "train")


@pytest.fixture
def library(run, tmp_path):
    return latentscenes.create_library(tmp_path / "library", run.path, precision="float32", device="cpu")


SOLIDS = ["red_ball", "green_box", "blue_egg", "brown_bar"]


def test_importing_the_package_loads_no_torch():
    script = "import sys, latentscenes; print({'torch', 'numpy'} & set(sys.modules)); "
    script += "latentscenes.open_library; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "True"]
    assert set(latentscenes.__all__) <= set(dir(latentscenes)) and all(
        getattr(latentscenes, name) for name in latentscenes.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'opn_library'"):
        latentscenes.opn_library  # noqa: B018


def test_scenes_of_stage_one_are_in_it_to_the_last_bit(library, run):
    model, rows = run.load()
    assert len(library) == 4 and library.names == SOLIDS and [scene.name for scene in library] == SOLIDS
    for place, name in enumerate(SOLIDS):
        for table, value in library[name].rows.tables().items():
            assert torch.equal(value[0], rows.tables()[table][place]), (name, table)
    assert all(
        torch.equal(value, library.model.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert np.array_equal(library.weights(), rows.weights.numpy())
    assert np.array_equal(library.weights(["blue_egg", "red_ball"]), rows.weights[[2, 0]].numpy())


def test_rendering_gives_numpy(library, run, solids):
    model, rows = run.load()
    shown = library["blue_egg"].render(library.orbit(3))
    assert (
        shown.rgb.shape == (3, 32, 32, 3)
        and shown.latents.shape == (3, 8, 8, 4)
        and shown.depth.shape == shown.opacity.shape == (3, 32, 32)
    )
    assert (
        shown.images.dtype == np.uint8
        and 0 <= shown.rgb.min()
        and shown.rgb.max() <= 1
        and {value.dtype for value in vars(shown).values()} == {np.dtype("float32")}
    )
    index = torch.tensor(solids.select("train")[2].views("held_out"))
    with torch.no_grad():
        background = model.background(32, 32)
        planes = model.compose(rows.gather(torch.tensor([2])), bounded=True)
        view = model.render(planes, solids.cameras[index], background)
        truth = model.decode(view.image(8, 8)).clamp(0, 1)
    coarse = library["blue_egg"].render(solids.cameras[index], geometry=False)
    assert np.array_equal(coarse.rgb, truth.movedim(1, -1).numpy()) and np.array_equal(
        coarse.depth, view.depth.unflatten(1, (8, 8)).numpy()
    )
    assert library["red_ball"].render(library.orbit(1), size=(16, 24)).rgb.shape == (1, 16, 24, 3)


def test_cameras_of_the_orbit_stand_where_those_of_the_data_stand(library, solids):
    cameras = library.orbit(4, elevation=25.0, azimuth=90.0)
    distance = cameras.positions.norm(dim=1)
    assert (
        torch.allclose(distance, solids.cameras.positions.norm(dim=1).median().expand(4))
        and cameras.positions[0, 1] > 0.9 * distance[0]
    )
    assert torch.allclose(cameras.intrinsics[0], solids.cameras.intrinsics[0])
    flipped = cameras.cam2world.clone()
    flipped[:, :, 1:3] *= -1
    again = latentscenes.Cameras.from_matrices(flipped.numpy(), 1.025, axes="opengl")
    assert torch.allclose(again.cam2world, cameras.cam2world) and torch.allclose(
        again.intrinsics, cameras.intrinsics
    )
    with pytest.raises(UserError, match=r"must be \(v, 3, 4\)"):
        latentscenes.Cameras.from_matrices(np.eye(4), 1.0)


def test_mistakes_are_explained(library, tmp_path):
    with pytest.raises(UserError, match="no scene 'red_bal' here; the nearest names are 'red_ball'"):
        library["red_bal"]
    with pytest.raises(UserError, match="size 30: no multiple of the codec's downsampling, 4; try 32"):
        library["red_ball"].render(library.orbit(1), size=30)
    with pytest.raises(UserError, match="must be latentscenes.Cameras, not ndarray"):
        latentscenes.LearnedScene.render.__wrapped__(library["red_ball"], np.eye(4))
    with pytest.raises(UserError, match="no library here"):
        latentscenes.open_library(tmp_path / "absent")
    with pytest.raises(UserError, match="holds a library already"):
        latentscenes.create_library(library.path, library.folder.info.parent)
    with pytest.raises(UserError, match="no 'int9'; choose one of float32"):
        latentscenes.create_library.__wrapped__(
            tmp_path / "other", library.folder.info.parent, precision="int9", device="cpu"
        )
    with pytest.raises(UserError, match=r"\(7,\) weights given, but this library has 3 base planes"):
        library.nearest(np.zeros(7))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").touch()
    with pytest.raises(UserError, match="exists and holds no library"):
        latentscenes.create_library(tmp_path / "full", library.folder.info.parent)


def test_what_is_known_of_a_scene(library, solids):
    info = library["green_box"].metadata
    assert info in library.infos() and library.infos("g*") == [info] and library.infos("G*") == []
    assert (info.origin, info.split, info.dataset) == ("stage 1", "train", str(solids.path.resolve()))
    assert (
        info.precision == "float32"
        and info.bytes == 4 * (3 * 12 * 12 * 2 + 3)
        and info.psnr > 5
        and info.psnr_lost == 0
    )
    with Image.open(io.BytesIO(library["green_box"].thumbnail)) as image:
        assert image.format == "PNG" and image.size == (32, 32)


def test_nearest_is_by_distance_of_macro_planes(library, run):
    model, rows = run.load()
    macro = torch.einsum("nk,k...->n...", rows.weights, model.bases).flatten(1)
    expected = (macro[1] - macro).square().mean(1).sqrt()
    found = library.nearest("green_box", count=10)
    assert [name for name, _ in found] == [SOLIDS[k] for k in expected.argsort().tolist() if k != 1]
    assert all(abs(distance - float(expected[SOLIDS.index(name)])) < 1e-5 for name, distance in found)
    assert library.nearest(rows.weights[3].numpy(), count=1)[0].name == "brown_bar"


def test_removing_and_renaming(library):
    before = {name: library[name].rows for name in SOLIDS}
    scene = library["blue_egg"]
    library.rename("red_ball", "scarlet ball")
    library.remove("blue_egg", "green_box")
    assert (
        library.names == ["scarlet ball", "brown_bar"]
        and "red_ball" not in library
        and "scarlet ball" in library
    )
    with pytest.raises(UserError, match="removed or renamed"):
        scene.metadata  # noqa: B018
    for old, new, message in (
        ("brown_bar", "scarlet ball", "is there already"),
        ("brown_bar", " ", "it is empty"),
        ("green_box", "x", "no scene 'green_box'"),
    ):
        with pytest.raises(UserError, match=message):
            library.rename(old, new)
    assert library.compact() > 0 and library.verify() == []
    assert [file.name for file in (library.path / "shards").iterdir()] == ["000002.safetensors"]
    for name, old in (("scarlet ball", "red_ball"), ("brown_bar", "brown_bar")):
        assert all(
            torch.equal(value, before[old].tables()[table])
            for table, value in library[name].rows.tables().items()
        )
    library.compact()
    assert [file.name for file in (library.path / "shards").iterdir()] == ["000002.safetensors"]
    library.remove("scarlet ball", "brown_bar")
    library.compact()
    assert len(library) == 0 and not list((library.path / "shards").iterdir())
    with pytest.raises(UserError, match="it holds no scenes"):
        library["red_ball"]


@pytest.mark.parametrize("precision", ["float16", "int8", "int6", "int4"])
def test_precisions_lose_less_than_their_step(run, tmp_path, precision):
    library = latentscenes.create_library(tmp_path / "library", run.path, precision=precision, device="cpu")
    _, rows = run.load()
    stored = library["red_ball"].rows
    assert torch.equal(stored.weights[0], rows.weights[0])
    micro = rows.micro[0]
    step = (
        micro.abs().amax((1, 2), keepdim=True) / (2 ** (int(precision[3:]) - 1) - 1)
        if precision != "float16"
        else micro.abs() * 2**-10
    )
    assert ((stored.micro[0] - micro).abs() <= 0.5001 * step).all()
    info = library["red_ball"].metadata
    exact = 4 * micro.numel()
    assert info.bytes < exact * {"float16": 0.51, "int8": 0.29, "int6": 0.24, "int4": 0.16}[precision] + 12
    assert abs(info.psnr_lost) < 0.5 and library.verify() == []


def test_ultra_light_scenes_are_tiny(tmp_path, solids, tiny):
    light = dataclasses.replace(tiny, planes=dataclasses.replace(tiny.planes, micro=0))
    library = latentscenes.create_library(
        tmp_path / "library", made_run(tmp_path / "run", light, solids, "train").path, device="cpu"
    )
    assert {info.bytes for info in library.infos()} == {12} and library["red_ball"].render(
        library.orbit(1)
    ).rgb.shape == (1, 32, 32, 3)
    heavy = dataclasses.replace(tiny, planes=dataclasses.replace(tiny.planes, macro=0))
    alone = latentscenes.create_library(
        tmp_path / "alone", made_run(tmp_path / "heavy", heavy, solids, "train").path, device="cpu"
    )
    assert alone.weights().shape == (4, 0) and alone["red_ball"].render(alone.orbit(1)).rgb.shape == (
        1,
        32,
        32,
        3,
    )
    with pytest.raises(UserError, match="no base planes in common"):
        alone.nearest("red_ball")


@pytest.mark.parametrize("written", [{}, {"mixing": torch.zeros(1, 5, 5)}], ids=["nothing", "zeros"])
def test_scenes_own_a_mixing_only_where_the_settings_say_so(library, written):
    """Also if start.safetensors holds a mixing; files of earlier versions hold none."""
    file = library.path / "model" / "start.safetensors"
    tables = {name: table for name, table in load_file(file).items() if name != "mixing"}
    save_file(tables | written, file)
    library.folder.checksums = {}
    assert not library.config.planes.mixing and library.folder.starting_scene().mixing.shape == (1, 0, 0)
    settings = config_io.parse(TINY, "tiny", ["planes.mixing=true"])
    mixed = LibraryFolder(library.path, settings, library.folder.info, {})
    assert torch.equal(mixed.starting_scene().mixing, torch.zeros(1, 5, 5))  # 2 micro and 3 macro features
    assert "mixing" not in pack(library.folder.starting_scene(), "int8") and "mixing" in pack(
        mixed.starting_scene(), "int8"
    )


def test_verify_knows_where_new_scenes_start(library):
    file = library.path / "model" / "start.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert [(damage.name, damage.what) for damage in library.verify()] == [
        ("model/start.safetensors", "its bytes have changed; new scenes start from it")
    ]
    facts = json.loads((library.path / "library.json").read_text())
    facts["model_checksum"] = facts.pop("checksums")["shared.safetensors"]
    del facts["checksum"]
    (library.path / "library.json").write_text(json.dumps(facts))
    assert latentscenes.open_library(library.path, device="cpu").verify() == []
    file.unlink()
    assert library.verify()[0].what == "is absent; new scenes start from it"


def test_library_without_its_settings_says_what_to_do(library):
    (library.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml: absent, .* Restore it from a copy of this library"):
        latentscenes.open_library(library.path, device="cpu")


def test_verify_names_what_is_damaged(library):
    (shard,) = (library.path / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    place = content.index(library["brown_bar"].rows.weights.numpy().tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    opened = latentscenes.open_library(library.path, device="cpu")
    assert [
        (damage.name, "bytes in 000001.safetensors have changed" in damage.what) for damage in opened.verify()
    ] == [("brown_bar", True)]
    opened.remove("red_ball")
    with pytest.raises(UserError, match="scene 'brown_bar' is damaged"):
        opened.compact()
    shard.write_bytes(content[:-100])
    torn = latentscenes.open_library(library.path, device="cpu")
    assert len(torn.verify()) == 3
    with pytest.raises(UserError, match=r"000001.safetensors: cannot be read"):
        torn["brown_bar"].rows  # noqa: B018
    shard.unlink()
    lost = latentscenes.open_library(library.path, device="cpu")
    assert {damage.what for damage in lost.verify()} == {"its shard 000001.safetensors is absent"}
    with pytest.raises(UserError, match="absent, though the index lists it"):
        lost["brown_bar"].rows  # noqa: B018
    model = library.path / "model" / "shared.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert library.verify()[0].name == "model/shared.safetensors"
    for spoil in (lambda: model.write_bytes(b"torn"), model.unlink):
        spoil()
        assert library.verify()[0].name == "model/shared.safetensors"
        for ask in (library.folder.model, lambda: learned_costs(SceneSet.open_all(library.path))):
            with pytest.raises(
                UserError, match=r"shared.safetensors: .* Every scene needs it. Restore it from a copy"
            ):
                ask()
    for one in (library, opened, torn, lost):
        one.close()
    (library.path / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"index.sqlite: cannot be read"):
        latentscenes.open_library(library.path)


def test_a_reader_keeps_up_with_a_writer(library):
    reader = latentscenes.open_library(library.path, device="cpu")
    rows = reader["brown_bar"].rows
    library.remove("red_ball")
    library.compact()
    assert reader.names == SOLIDS[1:] and torch.equal(reader["brown_bar"].rows.micro, rows.micro)
    stranger = latentscenes.open_library(library.path, device="cpu")
    place = stranger.folder.index.place
    stale, stranger.folder.index.place = (
        place("brown_bar"),
        lambda name: stale if not asked.append(name) and len(asked) == 1 else place(name),
    )
    asked = []
    library.rename("green_box", "box")
    library.remove("box")
    library.compact()
    assert torch.equal(stranger.folder.parameters("brown_bar").micro, rows.micro) and len(asked) == 2


def test_two_writers_wait_or_are_refused(library):
    with library.folder.writing():
        script = "import sys, latentscenes; lib = latentscenes.open_library(sys.argv[1], device='cpu'); "
        script += "lib.folder.wait = sys.argv[2] == 'wait'; print(len(lib), flush=True); "
        script += "lib.rename('red_ball', 'ball'); print('done')"
        start = [sys.executable, "-c", script, str(library.path)]
        refused = subprocess.run([*start, "refuse"], capture_output=True, text=True)
        assert refused.returncode == 1
        assert "another process is writing to this library. Wait for it" in refused.stderr
        waiting = subprocess.Popen(
            [*start, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert waiting.stdout.readline() == "4\n"
        assert (
            "waiting for it" in waiting.stderr.readline() and waiting.poll() is None and "red_ball" in library
        )
    out, _ = waiting.communicate(timeout=120)
    assert out == "done\n" and "ball" in library


def test_a_killed_writer_frees_the_lock(library):
    script = "import sys, time; from latentscenes.storage.library import LibraryFolder\n"
    script += "with LibraryFolder.open(sys.argv[1]).writing(): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(library.path)]
    library.folder.wait = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing to this library. Wait for it"):
            library.rename("red_ball", "ball")
        process.kill()
    library.rename("red_ball", "ball")
    assert "ball" in library


def test_a_failed_append_leaves_nothing(library, monkeypatch):
    from latentscenes.storage.index import Index

    again = latentscenes.storage.library.NewScene(
        dataclasses.replace(library["red_ball"].metadata, name="new"), library.folder.payload("red_ball")
    )
    twice = [
        dataclasses.replace(again, info=dataclasses.replace(again.info, name=name)) for name in ("a", "a")
    ]
    with pytest.raises(UserError, match="scene 'a' is there already"):
        library.folder.append(twice)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Index, "add", crash)
        with pytest.raises(KeyboardInterrupt):
            library.folder.append([again])
    assert library.names == SOLIDS and (library.path / "shards" / "000002.safetensors").exists()
    library.folder.append([again])
    assert library.names == [*SOLIDS, "new"] and library.verify() == []


def test_a_hundred_thousand_scenes_are_listed_at_once(library):
    info = library["red_ball"].metadata
    index = library.folder.index
    with index.transaction():
        for shard in range(2, 102):
            index.add(
                shard,
                [
                    (dataclasses.replace(info, name=f"car-{shard}-{row}"), "0" * 64, b"png")
                    for row in range(1000)
                ],
            )
    index.close()
    opened = LibraryFolder.open(library.path)
    assert len(opened.index) == 100_004 and len(opened.index.names()) == 100_004
    assert opened.index.info("car-50-7").bytes == info.bytes
    connection = opened.index._connection
    for table, column in (("scenes", "name"), ("thumbnails", "scene")):
        (plan,) = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM {table} WHERE {column} = ?", ("a",))
        assert plan[-1].startswith("SEARCH"), plan  # not a scan of all rows


def test_scenes_of_a_shard_are_read_from_one_opened_file(library, monkeypatch):
    opened = []
    monkeypatch.setattr(shards, "open_tensors", lambda file: opened.append(file.name) or open_tensors(file))
    folder = LibraryFolder.open(library.path)
    for name in folder.index.names() * 2:
        folder.parameters(name)
    assert opened == ["000001.safetensors"]


def test_a_read_only_library_can_be_read(library, solids):
    assert PosedImages.open(library["red_ball"].metadata.dataset).path == solids.path.resolve()
    shown = library["red_ball"].render(library.orbit(1)).rgb
    library.close()
    for folder in (library.path, library.path / "shards", library.path / "model"):
        folder.chmod(0o555)
    try:
        assert np.array_equal(
            latentscenes.open_library(library.path, device="cpu")["red_ball"].render(library.orbit(1)).rgb,
            shown,
        )
    finally:
        for folder in (library.path, library.path / "shards", library.path / "model"):
            folder.chmod(0o755)


def test_repacking_makes_scenes_of_earlier_versions_smaller_and_keeps_their_values(tmp_path):
    model = random_model(COLORS)
    smooth = random_scene(model, 1)
    smooth.micro = torch.linspace(-1, 1, smooth.micro.numel()).reshape(smooth.micro.shape) ** 3
    library = library_of(tmp_path / "library", model, {"one": smooth}, "int8", packed=packed_before)
    before, payload = library.parameters("one").micro, library.payload("one")
    assert payload_precision(payload) == "int8" and CODES in payload
    assert repack(library, "int6") == 1 and payload_precision(library.payload("one")) == "int6"
    library = library_of(tmp_path / "again", model, {"one": smooth}, "int8", packed=packed_before)
    assert repack(library, "int8") == 1 and repack(library, "int8") == 0
    after = library.payload("one")
    assert payload_precision(after) == "int8" and after.keys() == payload.keys() - {CODES} | {DIFFERENCES}
    assert torch.equal(library.parameters("one").micro, before)
    assert after[DIFFERENCES].numel() < 0.9 * payload[CODES].numel()
    assert library.index.info("one").bytes == payload_bytes(after)
