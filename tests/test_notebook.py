"""The notebook runs from top to bottom, with a shorter training."""

import json
import tempfile
from pathlib import Path

from latentscenes.core import config_io
from latentscenes.storage import description

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebook.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    shorter = ["exploit.fit.epochs=2"]
    true_load = config_io.load
    monkeypatch.setattr(
        config_io,
        "load",
        lambda path, overrides=(): true_load(
            path, shorter if description.MODELS in Path(path).parents else overrides
        ),
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for cell in cells:
        assert not cell.get("outputs")  # a page of text, not of pictures
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["library"]) == 2 and names["psnr"].shape == (4,) and names["psnr"].min() > 14
    assert names["seen"].rgb.shape == (6, 128, 128, 3)
    assert "bytes" in capsys.readouterr().out
