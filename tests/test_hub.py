"""Libraries pushed to and pulled from a stand-in of the Hugging Face hub."""

import os
import subprocess
import sys

import pytest
from hub import hub_served
from publications import add, made_library

from latentscenes.storage.library import LibraryFolder

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def test_a_library_is_pushed_again_and_pulled(solids, tmp_path):
    path = made_library(tmp_path, solids)
    with hub_served() as hub:

        def call(*words, token="hf_test") -> subprocess.CompletedProcess:
            program = [sys.executable, "-m", "latentscenes", "library", *map(str, words)]
            hidden = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
            return subprocess.run(
                program, env=os.environ | hidden, capture_output=True, text=True, check=False
            )

        done = call("push", path, "maker/cars", token="hf_wrong")
        assert done.returncode == 2 and "the hub refuses" in done.stderr and "Traceback" not in done.stderr
        done = call("push", path, "maker/cars", "--private")
        assert done.returncode == 0 and "4 scenes" in done.stderr + done.stdout, done.stderr
        assert hub.repository["name"] == "cars" and hub.repository["type"] == "dataset"
        assert [len(commit) for commit in hub.commits] == [8, 1] and hub.commits[-1] == ["published.json"]
        library = LibraryFolder.open(path)
        add(library, "a chair")
        for _ in range(2):
            done = call("push", path, "maker/cars")
            assert done.returncode == 0, done.stderr
        sizes = [len(commit) for commit in hub.commits[2:]]
        assert sizes == [5, 1, 1, 3]  # new files, description; description, outdated page, weights and bucket
        hub.files["notes/large.bin"] = b"of somebody else"
        done = call("pull", "maker/cars", tmp_path / "pulled")
        assert done.returncode == 0 and "5 scenes copied" in done.stderr + done.stdout, done.stderr
        pulled = LibraryFolder.open(tmp_path / "pulled")
        ours, theirs = (
            {name: place.checksum for name, place in one.index.places().items()} for one in (library, pulled)
        )
        assert ours == theirs and not list((tmp_path / "home").rglob("large.bin"))
        done = call("pull", "maker/planes", tmp_path / "planes")
        assert done.returncode == 2 and "the hub refuses" in done.stderr and "Traceback" not in done.stderr
        hub.files.clear()
        hub.files["thesis.tex"] = b"years of work"
        done = call("push", path, "maker/cars")
        assert done.returncode == 2 and "holds no published library, but 'thesis.tex'" in done.stderr
