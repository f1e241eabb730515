"""Learned scenes in a folder, be it a run's or a library's: which they are, how to load them, what they cost.

Scores, pictures, reports and the ledger all go through here.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run


@dataclass(frozen=True)
class Loaded:
    """A model on a device, and its scenes by name, each read when asked for."""

    label: str
    """What to call them beside others."""
    model: Model
    names: tuple[str, ...]
    rows: Callable[[str], SceneParameters]
    """A scene's own part (n = 1), on the model's device."""

    @classmethod
    def of_table(cls, model: Model, rows: SceneParameters, names: tuple[str, ...] | list[str], label: str = "") -> "Loaded":
        """Row k of a table is the scene names[k]."""
        place = {name: k for k, name in enumerate(names)}
        return cls(label, model, tuple(names), lambda name: rows.gather(torch.tensor([place[name]])))

    @property
    def device(self) -> torch.device:
        return self.model.bases.device

    @torch.no_grad()
    def planes(self, name: str) -> Float[Tensor, "1 3 r r f"]:
        """Fused tri-planes of the scene of that name."""
        return self.model.compose(self.rows(name))


@dataclass(frozen=True)
class Learned:
    """Learned scenes of one dataset, not loaded yet."""

    path: Path
    source: Run | LibraryFolder
    data: str
    """The dataset they were learned from."""
    split: Split
    """Their split in it."""
    names: tuple[str, ...]
    sources: tuple[str, ...]
    """What the dataset calls them; otherwise than `names` where a library renamed them."""

    @classmethod
    def open(cls, path: str | Path, data: str | Path | None = None, split: Split | None = None) -> "Learned":
        """What a run folder holds; or what a library holds of one dataset and split: of those given, else of those that
        its newest scene was learned from (stage 1 not counted, unless there is nothing else).

        Raises:
            UserError: nothing learned lies there, or nothing of that split.
        """
        path = Path(path)
        if LibraryFolder.exists(path):
            return cls._of_library(LibraryFolder.open(path), data, split)
        if not (path / "run.json").is_file():
            raise UserError(f"{path}: no run here, and no library (neither run.json nor library.json). Start one with `latentscenes train`.")
        run = Run.open(path)
        if split not in (None, run.info.split):
            raise UserError(f"{path}: this run learned the split {run.info.split!r}, not {split!r}.")
        return cls.of_run(run, data)

    @classmethod
    def open_all(cls, path: str | Path) -> "Learned":
        """All scenes of a folder, whatever a library's were learned from: to be looked at, not to be scored."""
        path = Path(path)
        if not LibraryFolder.exists(path):
            return cls.open(path)
        store = LibraryFolder.open(path)
        names = tuple(store.index.names())
        return cls(path, store, "", "new", names, names)

    @classmethod
    def of_run(cls, run: Run, data: str | Path | None = None) -> "Learned":
        names = tuple(run.info.scenes)
        return cls(run.path, run, str(data or run.info.data), run.info.split, names, names)

    @classmethod
    def _of_library(cls, store: LibraryFolder, data: str | Path | None, split: Split | None) -> "Learned":
        known = [info for info in store.index.infos() if info.dataset and split in (None, info.split)]
        if not known:
            raise UserError(f"{store.path}: holds no scenes{f' of the split {split!r}' if split else ''} that were learned from a dataset.")
        given = str(Path(data).resolve()) if data else None
        candidates = [info for info in known if info.dataset == given] or known
        newest = next((info for info in reversed(candidates) if info.origin != "stage 1"), candidates[-1])
        chosen = [info for info in candidates if (info.dataset, info.split) == (newest.dataset, newest.split)]
        names, sources = zip(*((info.name, info.source) for info in chosen), strict=True)
        return cls(store.path, store, given or newest.dataset, newest.split, names, sources)

    def load(self, device: torch.device | str = "cpu", label: str = "") -> Loaded:
        """The model on a device. A library's scenes are read one by one, those of a run at once."""
        if isinstance(self.source, Run):
            return Loaded.of_table(*self.source.load(device), self.names, label)
        store = self.source
        return Loaded(label, store.model(device), self.names, lambda name: store.rows(name).to(device))

    def scenes(self, views: PosedImages) -> list[Scene]:
        """Their views in the dataset, under the names they have here."""
        found = views.select(self.split, list(self.sources))
        return [replace(scene, name=name) for scene, name in zip(found, self.names, strict=True)]

    def check(self, name: str) -> None:
        """Refuse the name of no scene, with the nearest one."""
        if not self.names:
            raise UserError(f"{self.path}: no scene {name!r} here; it holds none.")
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0)[0]
            raise UserError(f"{self.path}: no scene {name!r} here; the nearest name is {near!r}.")

    @property
    def config(self) -> Config:
        return self.source.config

    @property
    def box(self) -> Box:
        return self.source.info.box

    @cached_property
    def view(self) -> Viewpoint:
        """How the dataset looks at its scenes."""
        if isinstance(self.source, LibraryFolder):
            return self.source.info.view
        views = PosedImages.open(self.data)
        return Viewpoint.of(views.cameras, views.size, self.box)

    # What they cost

    @property
    def shared_file(self) -> Path:
        """Where the weights of what they share lie.

        Raises:
            UserError: a run that has learned nothing yet, or a library whose file is absent or torn.
        """
        if isinstance(self.source, LibraryFolder):
            self.source.check_model()
        return self.source.shared_file

    @cached_property
    def seconds(self) -> float:
        """Time spent on these scenes, of a run also on what they share."""
        if isinstance(self.source, Run):
            return self.source.seconds
        return sum(info.seconds or 0.0 for info in self._infos) if self.stage_one else self.source.info.parent_seconds

    @property
    def stage_one(self) -> tuple[float, int] | None:
        """Seconds and scenes of the run that these were learned on top of; None for a run, and for stage 1 itself."""
        if isinstance(self.source, Run) or self._infos[0].origin == "stage 1":
            return None
        return self.source.info.parent_seconds, self.source.info.parent_scenes

    @cached_property
    def scene_bytes(self) -> float:
        """Of files, per scene."""
        if isinstance(self.source, Run):
            return self.source.rows_file.stat().st_size / len(self.names)
        return sum(info.bytes for info in self._infos) / len(self.names)

    @property
    def stored(self) -> str:
        """How a library stores them, in words; empty for a run."""
        if isinstance(self.source, Run):
            return ""
        kinds = sorted({info.precision for info in self._infos})
        lost = [info.psnr_lost for info in self._infos if info.psnr_lost is not None]
        return f"{', '.join(kinds)}, {sum(lost) / max(len(lost), 1):.3f} dB lost"

    @cached_property
    def _infos(self) -> list[SceneInfo]:
        wanted = set(self.names)
        return [info for info in self.source.index.infos() if info.name in wanted]

    # How it went

    @property
    def parent(self) -> Path:
        """The run whose shared parts these scenes were learned with."""
        if isinstance(self.source, Run):
            raise UserError(f"{self.path}: this is a run of `latentscenes train`. Name the library of the new scenes that `latentscenes exploit` made.")
        return Path(self.source.info.parent)

    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps: of a run; of the group of scenes that a library learned last."""
        return self.source.metrics()

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Time by stage, of a run."""
        return self.source.position.seconds if isinstance(self.source, Run) else {}

    @property
    def notes(self) -> dict[str, Any]:
        """Command, versions and machine."""
        return json.loads((self.path / ("run.json" if isinstance(self.source, Run) else "library.json")).read_text())
