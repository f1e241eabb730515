"""The commands of the README run, with smaller numbers, from meshes to a scored library."""

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from trimesh.creation import box

from latentscenes.cli import main as cli

README = Path(__file__).resolve().parents[1] / "README.md"
SMALLER = {
    "data": ["--views", "5", "--held-out", "1", "--workers", "1"],
    "train": ["--set", "train.scenes.epochs=1", "planes.resolution=16", "planes.bases=2"],
    "exploit": ["--workers", "1", "--set", "exploit.fit.epochs=1"],
    "eval": [],
}
"""Options added to each command."""
OTHERS = {"--new 20": "--new 2", "--size 256": "--size 16"}
"""Options of the README and those that take their place."""


def commands() -> list[str]:
    text = README.read_text().split("## Your own data")[1].split("\n## ")[0]
    for long, short in OTHERS.items():
        assert long in text
        text = text.replace(long, short)
    return [line for line in text.splitlines() if line.startswith("latentscenes ")]


def test_commands_for_own_data_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for folder in ("chairs", "shop"):
        Path(folder).mkdir()
        for name in "abcd":
            box(random.uniform(0.5, 1, 3)).export(f"{folder}/{name}.glb")
    lines = commands()
    assert [line.split()[1] for line in lines] == ["data", "train", "exploit", "eval", "data", "exploit"]
    for line in lines:
        words = shlex.split(line)
        small = [*words, *SMALLER[words[1]]]
        if words[1] == "data":
            small += ["--size", "16"] if "--size" not in line else []
        monkeypatch.setattr(sys, "argv", small + ["--threads", "1"])
        try:
            cli.main()
        except SystemExit as stop:
            pytest.fail(f"{line}: {stop.code}\n{''.join(capsys.readouterr())}")
    said = "".join(capsys.readouterr())
    assert "libraries/chairs: 4 scenes" in said and "libraries/shop: 4 scenes" in said
    assert Path("sheet.png").stat().st_size > 1000
