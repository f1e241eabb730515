"""Files of earlier versions still open.

tests/formats holds a dataset, a run and a library of each version that changed a format, made by the command
line of that version: `data cars`, `train`, `exploit` at three precisions. `views.npy` holds two renders of
every scene of the library by that version.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

import latentscenes
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet

VERSIONS = sorted((Path(__file__).parent / "formats").iterdir())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def kept(request, tmp_path) -> Path:
    """Returns a copy of one version's files."""
    return Path(shutil.copytree(request.param, tmp_path / "kept"))


def test_datasets_open(kept):
    views = PosedImages.open(kept / "cars")
    assert [scene.split for scene in views.scenes] == ["train", "train", "new", "new", "new"]
    assert views.rgb.shape == (20, 16, 16, 3) and views.alpha is not None and views.alpha.max() == 255
    assert views.images([0]).float().mean() < 255


def test_runs_open_and_are_finished(kept):
    run = Run.open(kept / "run")
    model, rows = run.load()
    assert run.finished and len(rows) == 2 and rows.micro.abs().sum() > 0
    assert model.bases.shape == (2, 3, 8, 8, 4)
    assert SceneSet.open(kept / "run").names == ("car_0000", "car_0001")


def test_libraries_open_and_look_the_same_up_to_rounding(kept):
    library = latentscenes.open_library(kept / "library", device="cpu")
    assert library.verify() == []
    assert [info.precision for info in library.infos()] == ["int8", "int8", "int8", "int4", "float16"]
    shown = np.stack([scene.render(library.orbit(2)).images for scene in library])
    assert np.abs(shown.astype(int) - np.load(kept / "views.npy")).max() <= 1


def test_libraries_grow(kept):
    library = latentscenes.open_library(kept / "library", device="cpu")
    views = PosedImages.open(kept / "cars")
    index = views.select("new")[0].views("all")
    library.add("again", views.rgb[index], views.cameras[index])
    assert library.names[-1] == "again" and library.verify() == []
    *old, new = (info.cpu_seconds for info in library.infos())  # the first change adds them to the index
    assert old == [None] * 5 and new > 0
    assert [info.silhouettes for info in library.infos()] == [None] * 5 + [False]
