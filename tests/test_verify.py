"""`latentscenes verify` names every damage of a run, and hostile files of tensors make no command wait."""

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentscenes.cli.main import main
from latentscenes.core import config_io
from latentscenes.core.errors import Damaged, UserError
from latentscenes.core.files import CHECKSUM, check_file, file_checksum, reading_from, write_json
from latentscenes.data import dataset
from latentscenes.evaluation.cost import stored_codec_parameters
from latentscenes.model.model import build_codec
from latentscenes.storage import verifying
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import export_model
from latentscenes.storage.run import Run
from latentscenes.storage.shards import STATED
from latentscenes.storage.tensors import read_tensors, write_tensors
from latentscenes.storage.verifying import verify_run
from latentscenes.training import loop
from latentscenes.training.loop import train

KEPT = sorted((Path(__file__).parent / "formats").iterdir())[-1]
SETTINGS = """
codec: {kind: identity}
planes: {resolution: 6, micro: 2, macro: 2, bases: 2}
field: {hidden: 8}
render: {coarse: 4, fine: 4}
train: [{name: all, epochs: 1, scenes: 2, views: 2, losses: {latent: 1}, rates: {micro: 1e-2, field: 1e-2}}]
"""


@pytest.fixture(scope="module", params=["memory", "disk"])
def learned(request, solids, tmp_path_factory) -> Path:
    """A run of two checkpoints, or of one with rows in files."""
    config = config_io.parse(f"{SETTINGS}storage: {request.param}", "small")
    out = tmp_path_factory.mktemp("verify") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        train(config, solids, out, device=torch.device("cpu"))
    return out


def test_flipped_bits_of_a_run_are_named(learned, tmp_path, capsys):
    """Settings may be edited: opening notes it."""
    run, draw, missed = shutil.copytree(learned, tmp_path / "run"), random.Random(3), []
    assert verify_run(run) == []
    for file in sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size):
        content = file.read_bytes()
        exact = file.name in ("state.json", "run.json")
        places = draw.sample(range(len(content)), min(100 if exact else 5, len(content)))
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            if exact and _same(bytes(changed), content):
                continue
            file.write_bytes(changed)
            capsys.readouterr()
            try:
                named = bool(verify_run(run))
            except UserError:
                named = True
            if not named and "was edited, or damaged" not in capsys.readouterr().err:
                missed.append((str(file.relative_to(run)), place))
        file.write_bytes(content)
    assert missed == []


def _same(one: bytes, other: bytes) -> bool:
    """Whether two texts are the same JSON, such as 1e5 and 1E5."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_files_of_earlier_versions_open_and_verify(tmp_path):
    assert verify_run(shutil.copytree(KEPT / "run", tmp_path / "run")) == []
    assert verifying.verify(LibraryFolder.open(shutil.copytree(KEPT / "library", tmp_path / "lib"))) == []


def test_a_lost_checksum_is_not_taken_for_an_earlier_version(learned, solids_path, tmp_path):
    run = shutil.copytree(learned, tmp_path / "run")
    for file in (run / "run.json", Run.open(run).newest() / "state.json"):
        whole = file.read_text()
        file.write_text(whole.replace(f'"{CHECKSUM}"', '"checksuM"'))
        with pytest.raises(Damaged, match="its checksum is absent"):
            Run.open(run).position  # noqa: B018
        file.write_text(whole)
    joined = shutil.copytree(solids_path, tmp_path / "cars") / "views.json"
    joined.write_text(joined.read_text().replace(f'"{CHECKSUM}"', '"checksuM"'))
    (found,) = dataset.verify(joined.parent)
    assert "views.json: was edited, or damaged" in found
    library = shutil.copytree(KEPT / "library", tmp_path / "library")
    opened = LibraryFolder.open(library)
    new = LibraryFolder.create(
        tmp_path / "new", opened.config, opened.info, opened.model(), opened.starting_scene()
    ).path / "library.json"  # fmt: skip
    new.write_text(new.read_text().replace(f'"{CHECKSUM}"', '"checksuM"'))
    with pytest.raises(Damaged, match="its checksum is absent"):
        LibraryFolder.open(new.parent)


def test_a_dataset_that_lists_no_checksums_is_told(solids_path, tmp_path):
    place = shutil.copytree(solids_path, tmp_path / "cars")
    stated = json.loads((place / "views.json").read_text())
    del stated["checksums"]
    write_json(place / "views.json", stated)
    assert ["was edited" in found for found in dataset.verify(place)] == [True]
    write_json(place / "views.json", stated | {"checksums": 5})
    with pytest.raises(UserError, match="checksums"):
        dataset.verify(place)


def test_a_shard_whose_seal_has_another_name_is_damaged(tmp_path):
    path = shutil.copytree(KEPT / "library", tmp_path / "library")
    opened = LibraryFolder.open(path)
    place = opened.index.place(opened.index.names()[0])
    file = opened.shards.file(place.shard)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file, "").items()}
    file.unlink()
    write_tensors(file, tensors, {STATED: "[]", "seAl": "0"})
    again = LibraryFolder.open(path)
    assert {damage.what for damage in verifying.verify(again)} == {
        "its shard is damaged; what it states of its scenes is damaged"
    }


def test_the_command_tells_what_differs(learned, tmp_path, monkeypatch):
    run = shutil.copytree(learned, tmp_path / "run")
    oldest = Run.open(run).checkpoints()[-1]
    assert _verify(run, monkeypatch) == (0, "")
    (oldest / "optimizer.safetensors").write_bytes(b"")
    status, told = _verify(run, monkeypatch)
    assert status == 1 and told.count("\n") == 1 and "optimizer.safetensors: cannot be read" in told
    assert _verify(KEPT / "library", monkeypatch) == _verify(KEPT / "cars", monkeypatch) == (0, "")


def _verify(folder: Path, monkeypatch) -> tuple[int, str]:
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["latentscenes", "verify", str(folder)])
    monkeypatch.setattr(sys, "stdout", out)
    try:
        main()
    except SystemExit as stop:
        return stop.code, out.getvalue()
    return 0, out.getvalue()


# Files of tensors that are none


def _sparse(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), _sparse])
def test_no_reader_of_tensors_waits_or_reads_without_end(tmp_path, make: Callable[[Path], object]):
    path = shutil.copytree(KEPT / "library", tmp_path / "library")
    opened = LibraryFolder.open(path)
    run = Run.open(shutil.copytree(KEPT / "run", tmp_path / "run"))
    shared, start = path / "model" / "shared.safetensors", path / "model" / "start.safetensors"
    for file in (shared, start, run.shared_file):
        file.unlink()
        make(file)
    codec = config_io.parse(f"{SETTINGS}codec: {{path: {run.path}}}".replace(
        "codec: {kind: identity}\n", ""), "run").codec  # fmt: skip
    for read in (
        opened.model, opened.check_start, opened.starting_scene, run.load,
        lambda: opened.has_boxes, lambda: stored_codec_parameters(shared),
        lambda: export_model(opened, tmp_path / "out"), lambda: build_codec(codec),
    ):  # fmt: skip
        with pytest.raises(UserError, match="cannot be read"):
            read()
    damage = {found.name: found.what for found in verifying.verify(opened)}
    assert damage.keys() == {"model/shared.safetensors", "model/start.safetensors"}


def test_a_fault_of_the_program_is_no_damage_of_a_file(tmp_path):
    with pytest.raises(RuntimeError, match="a fault"), reading_from(tmp_path, "Restore it."):
        raise RuntimeError("a fault")


def test_a_file_that_was_cut_is_not_read_whole(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.zeros(3)})
    checksum = file_checksum(file)
    check_file(file, checksum, "Restore it.")
    with open(file, "ab") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(Damaged, match="Restore it"):
        check_file(file, checksum, "Restore it.")
