"""Benchmarks: they time the steps that training takes, and report correct figures. No test asserts a time."""

import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import cases as bench_cases
from benchmarks import devices
from benchmarks import speed as bench_module
from benchmarks.cases import LATENT, RGB, Steps, Viewer
from benchmarks.icon_light import icon_picture, read
from benchmarks.quality import Point, lengthened, many_scenes, nearly, time_to_quality
from benchmarks.speed import Result, main, save
from benchmarks.timing import interleave, machine
from latentscenes.core import config_io
from latentscenes.core.cameras import orbit
from latentscenes.core.errors import UserError
from latentscenes.rendering.kernels import build, native
from latentscenes.training.loop import train

needs_compiler = pytest.mark.skipif(build.load()[0] is None, reason=f"no native kernel: {build.load()[1]}")
SMALL = ["planes.resolution=8", "planes.bases=2", "render.coarse=4", "render.fine=4", "train.0.views=2"]


def small(text: str) -> str:
    return config_io.dump(
        config_io.parse(text, "test", SMALL if "macro: 22" in text else SMALL[:1] + SMALL[2:])
    )


def test_variants_take_turns_and_each_round_starts_with_another():
    order = []
    found = interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert order == list("abc" + "abc" + "bca" + "cab")
    assert all(len(timing.seconds) == 3 for timing in found.values())


def test_a_ratio_is_the_median_over_rounds():
    found = interleave({"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.2)}, 3)
    assert found["short"].ratio(found["long"]) > 3
    assert found["long"].median == sorted(found["long"].seconds)[1]


def test_steps_of_both_kernels_learn_the_same(monkeypatch):
    # Adam makes full steps of tiny gradients, so none may be skipped
    monkeypatch.setattr(native, "SKIP", 0.0)
    steps = Steps(small(LATENT), 6).warmed(3)
    twins = [
        steps.twin(kernel) for kernel in (("torch", "native") if native.available() else ("torch", "torch"))
    ]
    for twin in twins:
        twin.step()
    for a, b in zip(*(twin.rows.tables().values() for twin in twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert twins[0].count == twins[1].count == 4 and steps.count == 3
    changed = (twins[0].rows.micro != steps.rows.micro).flatten(1).any(1)
    assert changed.sum() == steps.stage.scenes


@pytest.mark.parametrize("stage", bench_cases.STAGES)
def test_every_stage_takes_steps(stage):
    steps = Steps(small(bench_cases.stage_text(stage)), 5)
    before = {name: value.clone() for name, value in steps.model.state_dict().items()}
    rows = steps.rows.micro.clone()
    steps.warmed(2)
    rates = steps.stage.rates
    assert torch.equal(rows, steps.rows.micro) == (not rates.micro)
    for part, rate in (
        ("codec.encoder", rates.encoder),
        ("codec.decoder", rates.decoder),
        ("field", rates.field),
        ("bases", rates.bases),
    ):
        names = [name for name in before if name.startswith(part)]
        assert names and any(
            not torch.equal(before[name], steps.model.state_dict()[name]) for name in names
        ) == bool(rate), part


def test_timed_fits_have_the_settings_of_the_preset():
    preset = config_io.load("small").exploit[0]
    for resting in (False, True):
        stage = config_io.parse(bench_cases.fitting_text(resting), "test").train[0]
        assert (stage.scenes, stage.views, stage.rays, stage.losses) == (
            preset.scenes,
            preset.views,
            preset.rays,
            preset.losses,
        )
        assert (stage.rates.weights == 0) == resting and stage.rates.micro == preset.rates.micro
    steps = Steps(bench_cases.fitting_text(True), 4)
    batch = steps.batch(0)
    every = steps.latents[(batch.scenes[:, None] * 4 + torch.arange(4)).flatten()]
    for view in range(16):
        assert torch.equal(batch.latents[view], every[view][batch.pixels[view]])


def test_synthetic_objects_can_be_learned():
    steps = Steps(small(RGB), 1)
    batch = steps.batch(0)
    first = float(steps.learner.step(batch, 1.0, torch.Generator())[0]["latent"].detach())
    assert batch.latents.std() > 0.1
    for k in range(30):
        last = float(steps.learner.step(batch, 1.0, torch.Generator().manual_seed(k))[0]["latent"].detach())
    assert last < 0.8 * first


@needs_compiler
def test_floor_counts_what_was_evaluated():
    cost, forward, backward = Steps(small(LATENT), 6).rendering_cost()
    assert 0 < backward <= forward <= 1
    assert cost.total.flops > 0 and Steps(small(LATENT), 6).other_bytes() > 0


@pytest.mark.parametrize("name", ["paper", "small", "rgb"])
def test_timed_views_are_images(name):
    assert Viewer(name, 1).view().shape == (1, 3, 128, 128)


def test_results_are_saved_with_the_machine(tmp_path, capsys):
    result = Result("case", 1)
    result.add("something", "1.0 ms", "a remark")
    result.figures["x"] = 2.5
    save([result], tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["results"][0]["figures"] == {"x": 2.5} and saved["machine"]["torch"] == torch.__version__
    assert "| something | 1.0 ms | a remark |" in (tmp_path / "bench.md").read_text()
    assert set(machine()) >= {"processor", "cores", "load"}


def test_an_unknown_case_is_refused():
    with pytest.raises(UserError, match="no such case. There are: step, stages, options"):
        main(("stpe",), (1,), 1, None)


def test_cases_run_in_order_with_their_threads(tmp_path, monkeypatch):
    seen = []

    def case(threads, rounds):
        seen.append((threads, rounds, torch.get_num_threads()))
        yield Result("case", threads)

    monkeypatch.setattr(bench_module, "CASES", {"case": case})
    before = torch.get_num_threads()
    main((), (1, 2), 4, tmp_path / "out.json")
    torch.set_num_threads(before)
    assert seen == [(1, 4, 1), (2, 4, 2)]
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2


def test_the_fastest_training_near_the_level_counts():
    points = [
        Point(10, 1.0, 1.0, 25.0, 0.9),
        Point(40, 4.0, 1.5, 29.8, 0.9),  # on more cores
        Point(20, 2.0, 2.0, 29.75, 0.9),
        Point(80, 8.0, 8.0, 30.0, 0.9),
    ]
    assert nearly(points, 30.0).epochs == 20
    assert nearly(points, 31.0) is None


def test_many_scenes_are_learned_in_one_process_and_in_several(solids, tiny, tmp_path):
    parent = train(tiny, solids, tmp_path / "run", device=torch.device("cpu"))
    result = many_scenes(parent, solids, 1, torch.device("cpu"))
    assert [row[0] for row in result.rows] == ["one process", "a process per thread"]
    assert result.figures["several.speedup"] == pytest.approx(
        result.figures["one.seconds"] / result.figures["several.seconds"]
    )


def test_time_to_quality_learns_both_with_each_number_of_epochs(solids, tiny, tmp_path):
    parent = train(tiny, solids, tmp_path / "run", device=torch.device("cpu"))
    assert lengthened(tiny, "exploit", 7).exploit[0].epochs == 7
    result = time_to_quality(parent, solids, 2, (1, 2), (1,), torch.device("cpu"))
    assert {"ours.1.psnr", "ours.2.psnr", "RGB.1.psnr"} <= set(result.figures)
    assert result.figures["ours.2.seconds"] > 0 and result.figures["speedup to own convergence"] > 0


def test_scenes_in_files_learn_the_same_as_in_memory(tmp_path):
    text = small(LATENT)
    on_disk, in_memory = Steps(text, 6, folder=tmp_path / "rows"), Steps(text, 6)
    in_memory.rows.micro.copy_(on_disk.rows.micro)
    in_memory.rows.weights.copy_(on_disk.rows.weights)
    for a, b in zip(
        on_disk.warmed(3).rows.tables().values(), in_memory.warmed(3).rows.tables().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_scaling_compares_all_numbers_of_scenes(monkeypatch):
    monkeypatch.setattr(bench_module, "LATENT", small(LATENT))
    (result,) = bench_module.bench_scaling(1, 1, (4, 8), 16)
    assert [row[0] for row in result.rows] == ["N = 4", "N = 8", "N = 16, rows in files"]
    assert result.figures["N = 16, rows in files.seconds"] > 0


def test_steps_of_many_scenes(tmp_path, monkeypatch, capsys):
    """The benchmark of devices, as it runs unattended on a GPU."""
    monkeypatch.setattr(devices, "WARM_STEPS", 1)
    whole, sizes = devices._add_size, []

    def fails_at_two(result, what, *rest):
        sizes.append(what[2])
        if what[2] == 2:
            raise RuntimeError("no such kernel")
        whole(result, what, *rest)

    monkeypatch.setattr(devices, "_add_size", fails_at_two)
    devices.main(scenes=(1, 2, 3), rounds=1, device="cpu", threads=1, out=tmp_path / "found.json")
    capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert [one["case"] for one in found] == ["agreement with torch on cpu", "new scenes, float32, on cpu"]
    assert len(found[0]["figures"]) > 3 and max(found[0]["figures"].values()) < 0.05
    rows = {name: value for name, value, _ in found[1]["rows"]}
    assert sizes == [1, 2, 3] and rows["2 scenes"] == "failed" and rows["3 scenes"].endswith("ms")
    assert found[1]["figures"]["3 scenes.flops"] > 2.9 * found[1]["figures"]["1 scenes.flops"]
    assert "aten::" in (tmp_path / "found.md").read_text()


@pytest.mark.parametrize(
    "material, expected",
    [
        ("Ka 1 1 1\nKd 0.5 0.5 0.5\nillum 1", 0.2 + 0.5 * 0.8357),  # lamps at 62° on both sides of the front
        ("Kd 0.5 0.5 0.5\nKs 0 0 0\nillum 2", 0.04 + 0.5 * 0.8357),  # Ka 0.2 where nothing is said
        ("Kd 0.1 0.1 0.1\nmap_Kd paint.png\nillum 1", (0.04 + 0.8357) * 100 / 255),
        ("Kd 0.5 0.5 0.5\nillum 0", 0.5),
        ("Ka 0 0 0\nKd 0 0 0\nKs 1 1 1\nNs 1\nillum 2", 1.0),
    ],
)
def test_light_of_the_icons(material, expected, tmp_path):
    Image.new("RGB", (2, 2), (100, 100, 100)).save(tmp_path / "paint.png")
    (tmp_path / "m.mtl").write_text(f"newmtl m\n{material}\n")
    points = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nv 0 0 -1\n"
    (tmp_path / "m.obj").write_text(
        f"mtllib m.mtl\n{points}vt 0 0\nusemtl m\nf 1/1 2/1 3/1 4/1\nf 1/1 3/1 5/1\n"
    )
    view = orbit(1, 2.0, 2.0, 0.0, start=-math.pi / 2)
    picture, shown = icon_picture(*read(tmp_path / "m.obj", None), view, 16)
    assert shown[8, 8] == 255 and abs(picture[8, 8, 0] - 255 * expected) < 1.5


def test_the_light_of_the_icons_shows_fronts_and_a_lamp_from_below(tmp_path):
    (tmp_path / "m.mtl").write_text(
        "newmtl red\nKa 1 0 0\nKd 0.5 0 0\nillum 1\nnewmtl blue\nKa 0 0 1\nKd 0 0 0.5\nillum 1\n"
    )
    square = "v -1 0 -1\nv 1 0 -1\nv 1 0 1\nv -1 0 1\n"  # one square in two directions; y is up in OBJ
    (tmp_path / "m.obj").write_text(
        f"mtllib m.mtl\n{square}usemtl red\nf 1 2 3 4\nusemtl blue\nf 4 3 2 1\nusemtl red\nf 1 2 3 4\n"
    )
    soup, shines = read(tmp_path / "m.obj", None)
    below, above = (
        icon_picture(soup, shines, orbit(1, 2.0, 2.0, math.radians(angle)), 16)[0][8, 8]
        for angle in (-89, 89)
    )
    assert np.abs(below - 255 * np.array([0.2 + 0.5 * 0.66, 0, 0])).max() < 1.5
    assert above[2] > 150 and above[:2].max() < 1.5
