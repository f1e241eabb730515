"""One interface to learned scenes in a run folder, in a library, or in memory.

Evaluation, reports, costs and exports read scenes through a SceneSet:

    scenes = SceneSet.open("libraries/chairs")
    model.render(scenes.planes("chair_007"), …)
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config, StageConfig
from latentscenes.core.console import Spent, lost_text
from latentscenes.core.errors import UserError
from latentscenes.core.names import nothing_learned, unknown_scene
from latentscenes.core.reading import read_json
from latentscenes.data.dataset import PosedImages, Scene, Split
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published.addresses import address_of
from latentscenes.storage.published.index import is_published
from latentscenes.storage.published.reader import open_source
from latentscenes.storage.run import Run
from latentscenes.storage.source import SceneSource


def shows_silhouettes(stages: Sequence[StageConfig], images: PosedImages) -> bool:
    """Returns whether the opacity of scenes that these stages learn says where the object is: random
    backgrounds leave no white matter around it."""
    return images.alpha is not None and any(stage.random_background for stage in stages)


class SceneSet(ABC):
    """Named learned scenes and the model that renders them."""

    names: tuple[str, ...]
    label: str = ""
    """Name of the set in images and charts."""
    model: Model
    """The shared parts, on the set's device."""

    @abstractmethod
    def parameters(self, name: str) -> SceneParameters:
        """Returns the parameters of one scene (n = 1) on the model's device."""

    def tags(self, name: str) -> dict[str, Any]:
        """Returns a scene's row of a catalog; empty if there is none."""
        return {}

    def silhouettes(self, name: str) -> bool:
        """Returns whether a scene's opacity says where the object is (see SceneInfo)."""
        return False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def planes(self, name: str) -> FusedPlanes:
        """Returns the fused tri-planes of one scene."""
        return self.model.compose(self.parameters(name), bounded=True)

    def labeled(self, label: str) -> "SceneSet":
        """Returns the same scenes under another label."""
        other = copy.copy(self)
        other.label = label
        return other

    @staticmethod
    def of_table(
        model: Model, parameters: SceneParameters, names: Sequence[str], label: str = ""
    ) -> "SceneSet":
        """Returns scenes in memory; row k of the parameters is the scene names[k]."""
        return _ScenesInMemory(model, parameters, names, label)

    @staticmethod
    def open(
        path: str | Path,
        data: str | Path | None = None,
        split: Split | None = None,
        device: torch.device | str = "cpu",
    ) -> "StoredScenes":
        """Opens the scenes of a run, or the scenes of a library that were learned from one dataset and split.

        Args:
            path: run or library folder.
            data: dataset folder; None: the run's dataset, or the dataset of the library's newest scene, where
                scenes of stage 1 count only if there are no others.
            split: None: the split of the run or of that scene.

        Raises:
            UserError: there is neither a run nor a library, or it holds no scenes of that split.
        """
        if is_published(path):
            raise UserError(
                f"{address_of(path) or path}: a published library names no datasets. Name the library that "
                "it was published from."
            )
        path = Path(path)
        if LibraryFolder.exists(path):
            return LibraryScenes.learned_from(LibraryFolder.open(path), data, split, device)
        if not (path / "run.json").is_file():
            raise nothing_learned(path)
        run = Run.open(path)
        if split not in (None, run.info.split):
            raise UserError(f"{path}: this run learned the split {run.info.split!r}, not {split!r}.")
        return RunScenes(run, data, device)

    @staticmethod
    def open_all(path: str | Path, device: torch.device | str = "cpu") -> "StoredScenes":
        """Opens all scenes of a folder, of any dataset: to render them, not to score them."""
        if not (is_published(path) or LibraryFolder.exists(path)):
            return SceneSet.open(path, device=device)
        library = open_source(path)
        names = tuple(library.index.names())
        return LibraryScenes(library, "", "new", names, names, device)

    @staticmethod
    def of_run(
        run: Run, data: str | Path | None = None, device: torch.device | str = "cpu"
    ) -> "StoredScenes":
        """Returns the scenes of an opened run."""
        return RunScenes(run, data, device)


class _ScenesInMemory(SceneSet):
    def __init__(self, model: Model, parameters: SceneParameters, names: Sequence[str], label: str):
        self.model, self.names, self.label = model, tuple(names), label
        self._table, self._rows = parameters, {name: row for row, name in enumerate(names)}

    def parameters(self, name: str) -> SceneParameters:
        return self._table.gather(torch.tensor([self._rows[name]]))


class StoredScenes(SceneSet):
    """Scenes of one dataset in a folder. Model and scenes are read at first use."""

    def __init__(
        self,
        folder: Run | SceneSource,
        data: str,
        split: Split,
        names: tuple[str, ...],
        sources: tuple[str, ...],
        device: torch.device | str,
    ):
        """`sources` are the scenes' names in the dataset."""
        self.path, self.config, self.box = folder.path, folder.config, folder.info.box
        self.data, self.split, self.names = data, split, names
        self._folder, self._sources, self._device = folder, sources, device

    path: Path | str
    config: Config
    box: Box
    data: str
    """Folder of the dataset that the scenes were learned from."""
    split: Split
    """Split of that dataset."""
    view: Viewpoint
    """Typical camera of the dataset."""
    shared_file: Path
    """File with the weights of the shared parts. Reading this raises a UserError if it is absent."""
    spent: Spent
    """Learning time of these scenes; for a run, including the shared parts."""
    stage_one: tuple[Spent, int] | None = None
    """Time and scenes of the run that learned the shared parts; None for such a run itself."""
    scene_bytes: float
    """Mean size of a stored scene."""
    stored: str = ""
    """Precision and loss of the stored scenes, in words; empty for a run."""
    parent: Path
    """The run that the shared parts come from. Reading this raises a UserError for a run."""
    stage_spent: dict[str, Spent]
    """Learning time by stage; empty for a library."""
    _facts: str

    def scenes(self, images: PosedImages) -> list[Scene]:
        """Returns the scenes' views in the dataset, under their names in this set."""
        found = images.select(self.split, list(self._sources))
        return [replace(scene, name=name) for scene, name in zip(found, self.names, strict=True)]

    def view_of(self, name: str) -> Viewpoint:
        """Returns the typical camera, around the scene's own box if it has one."""
        return self.view.around(self.parameters(name).own_box)

    def check(self, name: str) -> None:
        """Raises a UserError that states the nearest names if `name` is unknown."""
        if name not in self.names:
            raise unknown_scene(self.path, name, self.names)

    def require_finished(self) -> None:
        """Raises a UserError for a run whose stages are not all done. Libraries hold finished scenes only."""

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the logged steps of a run, or of the last group that a library learned."""
        return self._folder.metrics()

    @property
    def notes(self) -> dict[str, Any]:
        """Command, versions and machine of the run or library."""
        return read_json(self.path / self._facts, "Restore it from a copy.")


class RunScenes(StoredScenes):
    """The scenes of a run folder."""

    _facts = "run.json"

    def __init__(self, run: Run, data: str | Path | None, device: torch.device | str):
        names = tuple(run.info.scenes)
        super().__init__(run, str(data or run.info.data), run.info.split, names, names, device)

    @cached_property
    def _loaded(self) -> tuple[Model, SceneParameters]:
        return self._folder.load(self._device)

    @property
    def model(self) -> Model:
        return self._loaded[0]

    def parameters(self, name: str) -> SceneParameters:
        return self._loaded[1].gather(torch.tensor([self.names.index(name)]))

    @cached_property
    def _images(self) -> PosedImages:
        return PosedImages.open(self.data)

    @cached_property
    def view(self) -> Viewpoint:
        return Viewpoint.of(self._images.cameras, self._images.size, self.box)

    def tags(self, name: str) -> dict[str, Any]:
        return next((scene.tags for scene in self._images.scenes if scene.name == name), {})

    def silhouettes(self, name: str) -> bool:
        learned = self.config.exploit if self._folder.info.kind == "exploit" else self.config.train
        return shows_silhouettes(learned, self._images)

    def require_finished(self) -> None:
        self._folder.require_finished()

    @property
    def shared_file(self) -> Path:
        return self._folder.shared_file

    @property
    def spent(self) -> Spent:
        return self._folder.spent

    @property
    def scene_bytes(self) -> float:
        return self._folder.rows_file.stat().st_size / len(self.names)

    @property
    def parent(self) -> Path:
        raise UserError(
            f"{self.path}: this is a run of `latentscenes train`. "
            "Name the library that `latentscenes exploit` made."
        )

    @property
    def stage_spent(self) -> dict[str, Spent]:
        position = self._folder.position
        return {stage: position.spent(stage) for stage in position.seconds}


class LibraryScenes(StoredScenes):
    """Some scenes of a library."""

    _facts = "library.json"
    stage_spent: dict[str, Spent] = {}

    @classmethod
    def learned_from(
        cls, library: LibraryFolder, data: str | Path | None, split: Split | None, device: torch.device | str
    ) -> "LibraryScenes":
        """Chooses the scenes as `SceneSet.open` describes."""
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
        return self._folder.model(self._device)

    def parameters(self, name: str) -> SceneParameters:
        return self._folder.parameters(name).to(self._device)

    @property
    def view(self) -> Viewpoint:
        return self._folder.info.view

    def tags(self, name: str) -> dict[str, Any]:
        info = self._folder.index.info(name)
        return info.tags if info else {}

    def silhouettes(self, name: str) -> bool:
        info = self._folder.index.info(name)
        return bool(info and info.silhouettes)

    @property
    def shared_file(self) -> Path:
        self._folder.check_model()
        return self._folder.shared_file

    @cached_property
    def spent(self) -> Spent:
        if self.stage_one is None:
            return self._folder.info.parent_spent
        return sum((info.spent for info in self._infos if info.spent), Spent(0.0, 0.0))

    @property
    def stage_one(self) -> tuple[Spent, int] | None:
        if self._infos[0].origin == "stage 1":
            return None
        return self._folder.info.parent_spent, self._folder.info.parent_scenes

    @cached_property
    def scene_bytes(self) -> float:
        return sum(info.bytes for info in self._infos) / len(self.names)

    @property
    def stored(self) -> str:
        kinds = sorted({info.precision for info in self._infos})
        lost = [info.psnr_lost for info in self._infos if info.psnr_lost is not None]
        return f"{', '.join(kinds)}, {lost_text(sum(lost) / max(len(lost), 1))}"

    @cached_property
    def _infos(self) -> list[SceneInfo]:
        wanted = set(self.names)
        return [info for info in self._folder.index.infos() if info.name in wanted]

    @property
    def parent(self) -> Path:
        return Path(self._folder.info.parent)
