"""The command line: help loads no torch, user errors print one line, printed settings can be read back."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from latentscenes.cli import main as cli
from latentscenes.cli.common import errors_in_one_line
from latentscenes.core import config_io
from latentscenes.core.console import lost_text
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.core.options import StoragePrecision
from latentscenes.data import raycast
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.quantize import PRECISIONS

GROUPS = {group: cli.load_commands(group) for group in cli.GROUPS}
COMMANDS = [
    [],
    *([name] for name in cli.COMMANDS),
    *([group, name] for group, commands in GROUPS.items() for name in commands),
]


def call(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of `latentscenes …`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["latentscenes", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_help_of_every_command_loads_no_torch():
    # All in one process, which must not have loaded torch at its end.
    script = f"""
import sys
import tempfile
import time
from latentscenes.cli.main import main
for command in {COMMANDS!r}:
    sys.argv = ["latentscenes", *command, "--help"]
    try:
        main()
        print("no exit:", command)
    except SystemExit as stop:
        if stop.code not in (0, None):
            print("exit", stop.code, command)
heavy = {{"torch", "numpy", "trimesh", "safetensors"}} & set(sys.modules)
print("imported:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "imported: []" and not [
        line for line in lines if line.startswith(("no exit", "exit "))
    ]
    assert sum(line.startswith("usage: latentscenes") for line in lines) == len(COMMANDS)


def test_a_command_loads_no_module_of_other_commands():
    script = """
import sys
from latentscenes.cli.main import main
sys.argv = ["latentscenes", "cost", "--help"]
try:
    main()
except SystemExit:
    pass
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "latentscenes.cli.commands" in loaded
    assert not loaded & {
        "latentscenes.cli.data",
        "latentscenes.cli.export",
        "latentscenes.cli.library",
        "yaml",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_is_explained(command, monkeypatch, capsys):
    known = GROUPS[command[0]] if len(command) == 2 else cli.load_commands()
    function = known[command[-1]] if command else None
    status, out, _ = call(monkeypatch, capsys, *command, "--help")
    assert status == 0
    if function is not None and command not in [[group] for group in GROUPS]:
        assert inspect.getdoc(function).split("\n")[0][:40] in " ".join(out.split())
        explained = inspect.getdoc(function).split("Args:")[-1]
        for name in inspect.signature(function).parameters:
            groups = (
                "machine",
                "ranks",
                "cores",
                "options",
                "choice",
                "reading",
                "placing",
            )  # dataclasses with help of their own
            assert name in groups or f"{name}:" in explained, name


def test_threads_hold_for_data_commands_too(monkeypatch, capsys, tmp_path):
    pools, pool = [], raycast.ThreadPoolExecutor
    monkeypatch.setattr(raycast, "ThreadPoolExecutor", lambda count: pools.append(count) or pool(count))
    small = ["--train", 1, "--new", 0, "--views", 4, "--held-out", 1, "--size", 16]
    before = torch.get_num_threads()
    try:
        status, _, err = call(
            monkeypatch, capsys, "data", "cars", "--out", tmp_path / "a", *small, "--threads", 3
        )
    finally:
        torch.set_num_threads(before)
    assert status == 0 and pools == [3], err
    status, _, err = call(monkeypatch, capsys, "data", "cars", "--out", tmp_path / "b", "--threads", 0)
    assert status == 2 and "--threads 0: at least 1." in err


def test_no_arguments_show_the_help(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys)
    assert status == 0 and all(name in out for name in cli.COMMANDS)
    for group, commands in GROUPS.items():
        status, out, _ = call(monkeypatch, capsys, group)
        assert status == 0 and all(name in out for name in commands)


def test_command_line_offers_all_precisions():
    assert get_args(StoragePrecision) == PRECISIONS


def test_default_configurations_exist():
    for command in map(cli.load_commands().get, ("train", "exploit", "cost")):
        for name, parameter in inspect.signature(command).parameters.items():
            assert name not in ("config", "baseline") or parameter.default in (None, *config_io.presets())


MISTAKES = {
    "no data": (
        ["train", "--data", "{tmp}/absent", "--out", "{tmp}/run", "--config", "rgb"],
        "{tmp}/absent: no dataset here",
    ),
    "no configuration": (
        ["train", "--data", "{data}", "--out", "{tmp}/run", "--config", "{tmp}/my.yaml"],
        "{tmp}/my.yaml: no such",
    ),
    "unknown setting": (
        ["train", "--data", "{data}", "--out", "{tmp}/run", "--config", "rgb", "--set", "planes.micr=3"],
        "the nearest known is 'micro'",
    ),
    "torn configuration": (
        ["train", "--data", "{data}", "--out", "{tmp}/run", "--config", "{tmp}/torn.yaml"],
        "{tmp}/torn.yaml: ",
    ),
    "foreign folder": (
        ["train", "--data", "{data}", "--out", "{tmp}/full", "--config", "rgb"],
        "{tmp}/full: exists and holds no run",
    ),
    "no run to score": (["eval", "--run", "{tmp}/absent"], "{tmp}/absent: no run and no library here"),
    "no run to build on": (
        ["exploit", "--run", "{tmp}/absent", "--data", "{data}", "--out", "{tmp}/new"],
        "{tmp}/absent",
    ),
    "no run to render": (
        ["render", "--run", "{tmp}/absent", "--scene", "a", "--out", "{tmp}/a.gif"],
        "{tmp}/absent: no run and no library here",
    ),
    "a FIFO for a picture": (
        ["eval", "--run", "{tmp}/full", "--sheet", "{tmp}/fifo.png"],
        "{tmp}/fifo.png: no regular file",
    ),
    "no scenes": (
        ["exploit", "--run", "cars", "--data", "{data}", "--out", "{tmp}/new", "--limit", "0"],
        "--limit 0: must be at least 1",
    ),
    "no GPU": (["eval", "--run", "{tmp}/full", "--device", "cuda:7"], "--device"),
    "no run to account for": (["cost", "--run", "{tmp}/absent"], "{tmp}/absent: no run and no library here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_take_one_line(name, monkeypatch, capsys, tmp_path, solids_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, message = MISTAKES[name]
    (tmp_path / "torn.yaml").write_text("planes: {")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    os.mkfifo(tmp_path / "fifo.png")
    places = {"tmp": tmp_path, "data": solids_path}
    status, out, err = call(monkeypatch, capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2 and out == ""
    assert err.startswith("latentscenes: ") and message.format(**places) in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "cars", "--out", ""], ["data", "join", "--out", "x", "--folders", "a", ""],
        ["train", "--data", "a", "--out", " "], ["exploit", "--data", "a", "--out", "b", "--parts", ""],
        ["eval", "--run", "a", "--sheet="], ["export", "page", "--run", "a", "--out", ""], ["verify", ""],
        ["library", "join", "", "a"], ["library", "publish", "a", "--out", ""], ["demo", "--out", ""],
    ],
    ids=" ".join,
)  # fmt: skip
def test_empty_paths_are_refused(arguments, monkeypatch, capsys, tmp_path):
    """They would mean the current folder."""
    monkeypatch.chdir(tmp_path)
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert status == 2 and out == "" and "an empty path. Name a file or a folder" in err
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_misspelled_options_are_refused(monkeypatch, capsys):
    status, _, err = call(monkeypatch, capsys, "train", "--dta", "x")
    assert status == 2 and "--data" in err and "Traceback" not in err
    status, _, err = call(monkeypatch, capsys, "trian")
    assert status == 2 and "trian" in err


def test_repeated_options_are_refused(monkeypatch, capsys):
    words = ["train", "--print-config", "--config", "small", "--set", "seed=1", "--set", "storage=disk"]
    status, out, err = call(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert err == "latentscenes: --set: given 2 times. Write it once, with all its values.\n"
    assert call(monkeypatch, capsys, *words[:6], "storage=disk")[0] == 0


@pytest.mark.parametrize("preset", config_io.presets())
def test_printed_settings_read_back(preset, monkeypatch, capsys, tmp_path):
    base = ["train", "--data", tmp_path, "--out", tmp_path / "run", "--print-config"]
    status, out, _ = call(
        monkeypatch, capsys, *base, "--config", preset, "--set", "seed=7", "planes.resolution=33"
    )
    assert status == 0
    printed = config_io.parse(out, "printed")
    assert printed == config_io.load(preset, ["seed=7", "planes.resolution=33"])
    (tmp_path / "mine.yaml").write_text(out)
    _, again, _ = call(monkeypatch, capsys, *base, "--config", tmp_path / "mine.yaml")
    assert again == out and not (tmp_path / "run").exists()


def test_train_and_exploit_from_the_command_line(monkeypatch, capsys, tmp_path, solids_path, tiny):
    settings = tmp_path / "tiny.yaml"
    settings.write_text(config_io.dump(tiny))
    one, two = tmp_path / "one", tmp_path / "two"
    train = [
        "train",
        "--data",
        solids_path,
        "--out",
        one,
        "--config",
        settings,
        "--limit",
        2,
        "--device",
        "cpu",
        "--threads",
        1,
    ]
    status, _, err = call(monkeypatch, capsys, *train)
    assert status == 0 and f"{one}: 2 scenes learned" in err
    exploit = [
        "exploit",
        "--run",
        one,
        "--data",
        solids_path,
        "--out",
        two,
        "--set",
        "exploit.alignment.epochs=2",
        "--device",
        "cpu",
    ]
    status, _, err = call(monkeypatch, capsys, *exploit, "--threads", 1)
    assert status == 0 and f"{two}: 4 scenes." in err
    store = LibraryFolder.open(two)
    assert store.config.exploit[1].epochs == 2 and store.config.planes == tiny.planes


def test_a_stop_on_request_is_no_error(monkeypatch, capsys, tmp_path):
    from latentscenes.training.loop import Interrupted

    def stopped(*_, **__):
        raise Interrupted

    (tmp_path / "views.json").touch()
    monkeypatch.setattr("latentscenes.training.loop.train", stopped)
    monkeypatch.setattr(
        "latentscenes.data.dataset.PosedImages.open", lambda path: SimpleNamespace(size=(8, 8))
    )
    status, _, err = call(
        monkeypatch, capsys, "train", "--data", tmp_path, "--out", tmp_path / "run", "--config", "rgb"
    )
    assert (
        status == 130 and err == "latentscenes: stopped; everything is saved. The same command continues.\n"
    )


def test_system_errors_take_one_line(monkeypatch, capsys, tmp_path):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    (tmp_path / "views.json").touch()
    monkeypatch.setattr("latentscenes.data.dataset.PosedImages.open", full)
    status, _, err = call(
        monkeypatch, capsys, "train", "--data", tmp_path, "--out", tmp_path / "run", "--config", "rgb"
    )
    assert status == 2 and err == f"latentscenes: {tmp_path}: No space left on device.\n"


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("Cannot allocate memory"),
    ],
)
def test_full_memory_ends_in_one_line(failure, capsys):
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise failure
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith("latentscenes: out of memory. ")


MISTYPED = [
    ("train --data nix --out run", "nix: no dataset here"),
    ("exploit --run nix --data nix --out lib", "nix: neither a run, nor a library, nor a model"),
    ("exploit --run cars --data nix --out lib", "nix: no dataset here"),
    ("view nix", "nix: no library here"),
    ("view ftp://a.b/c", "ftp://a.b/c: ftp addresses cannot be used"),
    ("library list file:///nix", "file:///nix: give the path without file://"),
    ("library join lib https://a.b/c", "https://a.b/c: a published library cannot be used here"),
    ("library rebuild nix", "nix: no library here"),
    ("library model nix out", "nix: no library here"),
    ("library publish nix --out out", "nix: no library here"),
    ("data verify nix", "nix: no dataset here"),
    ("data place --folder nix --out out", "nix: no dataset here"),
    ("data meshes --folder nix --out out", "nix: no such folder"),
    ("data transforms --folder . --out out --fit-to nix", "nix: neither a run"),
]
"""Commands with a mistyped path, and what is said."""


def test_mistyped_paths_are_refused_before_torch_loads(tmp_path):
    """All in one process, which must not have loaded torch at its end: loading takes seconds."""
    script = f"""
import contextlib, io, sys
from latentscenes.cli.main import main
for words, message in {MISTYPED!r}:
    sys.argv = ["latentscenes", *words.split()]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        main()
    assert message in told.getvalue(), (words, told.getvalue())
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_numbers_with_nouns_and_losses():
    assert (counted(1, "scene"), counted(0, "scene"), counted(2, "mesh", "meshes")) == (
        "1 scene",
        "0 scenes",
        "2 meshes",
    )
    assert (lost_text(-0.003), lost_text(0.0124)) == ("0.000 dB lost", "0.012 dB lost")


def test_other_failures_of_torch_are_not_taken_for_full_memory():
    with pytest.raises(RuntimeError, match="shapes"), errors_in_one_line():
        raise RuntimeError("shapes cannot be multiplied")


def test_a_closed_output_is_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with errors_in_one_line():
        print("to nobody")
        sys.stderr.write("to nobody")
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise UserError("told to nobody")
    assert stop.value.code == 2
