"""One interface to learned scenes, whether they lie in a run folder, in a library, or in memory.

Scores, pictures, reports, costs and exports all read scenes through a SceneSet:

    scenes = SceneSet.open("libraries/chairs")
    model.render(scenes.planes("chair_007"), …)
"""

import copy
import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.run import Run


class SceneSet(ABC):
    """Learned scenes by name, and the model that renders them."""

    names: tuple[str, ...]
    label: str = ""
    """How pictures and charts call these scenes."""
    model: Model
    """The shared parts, on the set's device."""

    @abstractmethod
    def parameters(self, name: str) -> SceneParameters:
        """What one scene owns (n = 1), on the model's device."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def planes(self, name: str) -> FusedPlanes:
        """The tri-planes of one scene, ready to render."""
        return self.model.compose(self.parameters(name))

    def labeled(self, label: str) -> "SceneSet":
        """The same scenes under another label."""
        other = copy.copy(self)
        other.label = label
        return other

    @staticmethod
    def of_table(
        model: Model, parameters: SceneParameters, names: Sequence[str], label: str = ""
    ) -> "SceneSet":
        """Scenes in memory: row k of the parameters is the scene names[k]."""
        return _ScenesInMemory(model, parameters, names, label)

    @staticmethod
    def open(
        path: str | Path,
        data: str | Path | None = None,
        split: Split | None = None,
        device: torch.device | str = "cpu",
    ) -> "StoredScenes":
        """Opens the scenes of a run folder, or those scenes of a library that were learned from one dataset and split:
        from the given ones, otherwise from those of its newest scene (scenes of stage 1 only if there are no others).

        Raises:
            UserError: there is neither a run nor a library, or it holds no scenes of that split.
        """
        path = Path(path)
        if LibraryFolder.exists(path):
            return LibraryScenes.learned_from(LibraryFolder.open(path), data, split, device)
        if not (path / "run.json").is_file():
            raise UserError(
                f"{path}: no run and no library here (neither run.json nor library.json). Start with `latentscenes train`."
            )
        run = Run.open(path)
        if split not in (None, run.info.split):
            raise UserError(f"{path}: this run learned the split {run.info.split!r}, not {split!r}.")
        return RunScenes(run, data, device)

    @staticmethod
    def open_all(path: str | Path, device: torch.device | str = "cpu") -> "StoredScenes":
        """Opens all scenes of a folder, whatever they were learned from: to render them, not to score them."""
        if not LibraryFolder.exists(path):
            return SceneSet.open(path, device=device)
        library = LibraryFolder.open(path)
        names = tuple(library.index.names())
        return LibraryScenes(library, "", "new", names, names, device)

    @staticmethod
    def of_run(
        run: Run, data: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> "StoredScenes":
        """The scenes of an opened run."""
        return RunScenes(run, data, device)


class _ScenesInMemory(SceneSet):
    def __init__(self, model: Model, parameters: SceneParameters, names: Sequence[str], label: str):
        self.model, self.names, self.label = model, tuple(names), label
        self._table, self._rows = parameters, {name: row for row, name in enumerate(names)}

    def parameters(self, name: str) -> SceneParameters:
        return self._table.gather(torch.tensor([self._rows[name]]))


class StoredScenes(SceneSet):
    """Scenes of one dataset in a folder. The model and the scenes are read when first used."""

    def __init__(
        self,
        folder: Run | LibraryFolder,
        data: str,
        split: Split,
        names: tuple[str, ...],
        sources: tuple[str, ...],
        device: torch.device | str,
    ):
        self.path, self.config, self.box = folder.path, folder.config, folder.info.box
        self.data, self.split, self.names = data, split, names
        self._sources, self._device = sources, device

    path: Path
    config: Config
    box: Box
    data: str
    """The dataset that the scenes were learned from."""
    split: Split
    """Their split in that dataset."""

    def scenes(self, images: PosedImages) -> list[Scene]:
        """Their views in the dataset, under the names that they have here."""
        found = images.select(self.split, list(self._sources))
        return [replace(scene, name=name) for scene, name in zip(found, self.names, strict=True)]

    def check(self, name: str) -> None:
        """Refuses an unknown name and states the nearest one."""
        if not self.names:
            raise UserError(f"{self.path}: no scene {name!r} here; it holds no scenes.")
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1, cutoff=0)[0]
            raise UserError(f"{self.path}: no scene {name!r} here; the nearest name is {near!r}.")

    @property
    @abstractmethod
    def view(self) -> Viewpoint:
        """How the dataset's cameras look at its scenes."""

    # Costs

    @property
    @abstractmethod
    def shared_file(self) -> Path:
        """The file with the weights of the shared parts.

        Raises:
            UserError: a run has learned nothing yet, or a library's file is absent or damaged.
        """

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Time spent on these scenes; for a run, including the shared parts."""

    @property
    @abstractmethod
    def stage_one(self) -> tuple[float, int] | None:
        """Seconds and scenes of the run that taught the shared parts; None for such a run itself."""

    @property
    @abstractmethod
    def scene_bytes(self) -> float:
        """Bytes per scene as stored."""

    @property
    @abstractmethod
    def stored(self) -> str:
        """How a library stores the scenes, in words; empty for a run."""

    # History

    @property
    @abstractmethod
    def parent(self) -> Path:
        """The run whose shared parts these scenes were learned with."""

    @abstractmethod
    def metrics(self) -> list[dict[str, Any]]:
        """Logged steps of a run, or of the group that a library learned last."""

    @property
    @abstractmethod
    def stage_seconds(self) -> dict[str, float]:
        """Time by stage; empty for a library."""

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """Command, versions and machine."""


class RunScenes(StoredScenes):
    """The scenes of a run folder."""

    def __init__(self, run: Run, data: str | Path | None, device: torch.device | str):
        names = tuple(run.info.scenes)
        super().__init__(run, str(data or run.info.data), run.info.split, names, names, device)
        self._run = run

    @cached_property
    def _loaded(self) -> tuple[Model, SceneParameters]:
        return self._run.load(self._device)

    @property
    def model(self) -> Model:
        return self._loaded[0]

    def parameters(self, name: str) -> SceneParameters:
        return self._loaded[1].gather(torch.tensor([self.names.index(name)]))

    @cached_property
    def view(self) -> Viewpoint:
        images = PosedImages.open(self.data)
        return Viewpoint.of(images.cameras, images.size, self.box)

    @property
    def shared_file(self) -> Path:
        return self._run.shared_file

    @property
    def seconds(self) -> float:
        return self._run.seconds

    stage_one = None
    stored = ""

    @property
    def scene_bytes(self) -> float:
        return self._run.rows_file.stat().st_size / len(self.names)

    @property
    def parent(self) -> Path:
        raise UserError(
            f"{self.path}: this is a run of `latentscenes train`. Name the library that `latentscenes exploit` made."
        )

    def metrics(self) -> list[dict[str, Any]]:
        return self._run.metrics()

    @property
    def stage_seconds(self) -> dict[str, float]:
        return self._run.position.seconds

    @property
    def notes(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())


class LibraryScenes(StoredScenes):
    """Some scenes of a library."""

    def __init__(
        self,
        library: LibraryFolder,
        data: str,
        split: Split,
        names: tuple[str, ...],
        sources: tuple[str, ...],
        device: torch.device | str,
    ):
        super().__init__(library, data, split, names, sources, device)
        self._library = library

    @classmethod
    def learned_from(
        cls, library: LibraryFolder, data: str | Path | None, split: Split | None, device: torch.device | str
    ) -> "LibraryScenes":
        """See SceneSet.open."""
        known = [info for info in library.index.infos() if info.dataset and split in (None, info.split)]
        if not known:
            of_split = f" of the split {split!r}" if split else ""
            raise UserError(f"{library.path}: holds no scenes{of_split} that were learned from a dataset.")
        given = str(Path(data).resolve()) if data else None
        candidates = [info for info in known if info.dataset == given] or known
        newest = next((info for info in reversed(candidates) if info.origin != "stage 1"), candidates[-1])
        chosen = [info for info in candidates if (info.dataset, info.split) == (newest.dataset, newest.split)]
        names, sources = zip(*((info.name, info.source) for info in chosen), strict=True)
        return cls(library, given or newest.dataset, newest.split, names, sources, device)

    @cached_property
    def model(self) -> Model:
        return self._library.model(self._device)

    def parameters(self, name: str) -> SceneParameters:
        return self._library.parameters(name).to(self._device)

    @property
    def view(self) -> Viewpoint:
        return self._library.info.view

    @property
    def shared_file(self) -> Path:
        self._library.check_model()
        return self._library.shared_file

    @cached_property
    def seconds(self) -> float:
        if self.stage_one is None:
            return self._library.info.parent_seconds
        return sum(info.seconds or 0.0 for info in self._infos)

    @property
    def stage_one(self) -> tuple[float, int] | None:
        if self._infos[0].origin == "stage 1":
            return None
        return self._library.info.parent_seconds, self._library.info.parent_scenes

    @cached_property
    def scene_bytes(self) -> float:
        return sum(info.bytes for info in self._infos) / len(self.names)

    @property
    def stored(self) -> str:
        kinds = sorted({info.precision for info in self._infos})
        lost = [info.psnr_lost for info in self._infos if info.psnr_lost is not None]
        return f"{', '.join(kinds)}, {sum(lost) / max(len(lost), 1):.3f} dB lost"

    @cached_property
    def _infos(self) -> list[SceneInfo]:
        wanted = set(self.names)
        return [info for info in self._library.index.infos() if info.name in wanted]

    @property
    def parent(self) -> Path:
        return Path(self._library.info.parent)

    def metrics(self) -> list[dict[str, Any]]:
        return self._library.metrics()

    stage_seconds: dict[str, float] = {}

    @property
    def notes(self) -> dict[str, Any]:
        return json.loads((self.path / "library.json").read_text())
