"""Groups of new scenes, which are learned, stored and committed together.

A group depends on nothing but the frozen shared parts, the dataset and the seed. So its scenes have the same
bits whichever process learns it, and whenever.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.console import Spent, bytes_text, capture_lines, lost_text, say
from latentscenes.core.errors import Damaged, UserError
from latentscenes.core.files import locked, open_tensors
from latentscenes.core.options import StoragePrecision
from latentscenes.core.runtime import seeded
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, mean_parameters, random_parameters
from latentscenes.storage.entries import Origin, SceneInfo
from latentscenes.storage.index import Index
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.records import keep_log
from latentscenes.storage.run import Run, RunInfo
from latentscenes.storage.scene_set import shows_silhouettes
from latentscenes.training.append import Provenance, new_scene
from latentscenes.training.batches import TrainingScenes
from latentscenes.training.corrections import HELPS, kinds_of, limited
from latentscenes.training.diagnosis import FittedScene, diagnose, view_errors, view_tags
from latentscenes.training.loop import Trainer

NAMED = 8
"""Scenes of a group that are named while they are learned."""


@dataclass(frozen=True)
class GroupLearner:
    """Learns groups of scenes with frozen shared parts and appends them to a library."""

    library: LibraryFolder
    model: Model
    config: Config
    images: PosedImages
    precision: StoragePrecision
    drop_views: bool = False
    """Learn scenes again without odd views."""
    on_progress: Callable[[], None] | None = None
    """Called after each step, and between the other parts of the work."""

    def learn(
        self, scenes: Sequence[Scene], label: str = "", origin: Origin = "exploit", work: Path | None = None,
        tags: dict[str, Any] | None = None,
    ) -> list[NewScene]:  # fmt: skip
        """Learns some scenes and appends them. Continues a run begun in `work` (default: the library's)."""
        library, images, model = self.library, self.images, self.model
        fits, runs = self._fits(scenes, label, work)
        odd = []
        for fit in fits:
            odd.append(diagnose(model, images, fit))
            self._progressed()
        fewer = {k: scene.without(odd[k].views) for k, scene in enumerate(scenes) if odd[k].views}
        again = {k: scene for k, scene in fewer.items() if self.drop_views and scene.views("fit")}
        if again:
            better, more = self._fits(list(again.values()), f"{label} again", work)
            runs += more
            for k, fit in zip(again, better, strict=True):
                fits[k] = dataclasses.replace(fit, spent=fits[k].spent + fit.spent)
        found, split = [], "new" if origin == "exploit" else None
        known = shows_silhouettes(self.config.exploit, images)
        for k, (scene, fit) in enumerate(zip(scenes, fits, strict=True)):
            self._progressed()
            learned = (tags or {}) | view_tags(fit, odd[k], k in again, images)
            ready = (fit.parameters, library.info.view, images, scene, self.precision)
            found.append(new_scene(model, *ready, Provenance(origin, split, fit.spent, learned, known)))
        library.append(found)
        finish(runs[-1], library)
        for path in {other.path for other in runs} - {runs[-1].path}:
            shutil.rmtree(path)
        return found

    def _progressed(self) -> None:
        if self.on_progress:
            self.on_progress()

    def _fits(
        self, scenes: Sequence[Scene], label: str, work: Path | None
    ) -> tuple[list[FittedScene], list[Run]]:
        """Learns some scenes, each with the kinds of corrections that help it. Returns also all runs."""
        asked, spent = kinds_of(self.config.exploit), [Spent(0.0, 0.0)] * len(scenes)
        kept, runs = [()] * len(scenes), []
        if asked:
            kept, spent, runs = self._tried(asked, scenes, label, work)
        fits: dict[int, FittedScene] = {}
        for kinds in sorted(set(kept)):
            rows = [k for k, found in enumerate(kept) if found == kinds]
            config = limited(self.config, kinds) if asked else self.config
            learned, run = self._fit([scenes[k] for k in rows], label, work, config)
            runs.append(run)
            left_out = tuple(kind for kind in asked if kind not in kinds)
            for k, fit in zip(rows, learned, strict=True):
                fits[k] = dataclasses.replace(fit, spent=spent[k] + fit.spent, left_out=left_out)
        return [fits[k] for k in range(len(scenes))], runs

    def _tried(
        self, asked: Sequence[str], scenes: Sequence[Scene], label: str, work: Path | None
    ) -> tuple[list[tuple[str, ...]], list[Spent], list[Run]]:
        """Learns scenes for a short time with and without corrections. Returns the kinds that help each
        scene, the time spent on it, and the runs."""
        spent, runs = [Spent(0.0, 0.0)] * len(scenes), []

        def errors(rows: Sequence[int], *kinds: str) -> dict[int, float]:
            config = limited(self.config, kinds, trial=True)
            fits, run = self._fit([scenes[k] for k in rows], f"{label} trial", work, config)
            runs.append(run)
            for k, fit in zip(rows, fits, strict=True):
                spent[k] = spent[k] + fit.spent
            found = [view_errors(self.model, self.images, fit)[0].mean().item() for fit in fits]
            self._progressed()
            return dict(zip(rows, found, strict=True))

        every = range(len(scenes))
        without, single = errors(every), {kind: errors(every, kind) for kind in asked}
        best = [min(asked, key=lambda kind: single[kind][k]) for k in every]
        helped = [k for k in every if single[best[k]][k] < HELPS * without[k]]
        kept = [(best[k],) if k in helped else () for k in every]
        if len(asked) > 1 and helped:
            for k, error in errors(helped, *asked).items():
                if error < HELPS * single[best[k]][k]:
                    kept[k] = tuple(asked)
        return kept, spent, runs

    def _fit(
        self, scenes: Sequence[Scene], label: str, work: Path | None, config: Config
    ) -> tuple[list[FittedScene], Run]:
        """Learns some scenes from their views `fit`, in a run of their own."""
        library, images, model = self.library, self.images, self.model
        names, data = [scene.name for scene in scenes], str(images.path.resolve())
        dropped = [scene.held_out for scene in scenes if scene not in images.scenes]
        recipe = f"{data} {names} {config_io.dump(config)}{dropped or ''}"
        key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        info = RunInfo("exploit", data, "new", names, library.info.box, str(library.path.resolve()))
        run = Run.create((work or library.path / "work") / key, config, info)
        parameters = starting_parameters(config, library.starting_scene(), images, scenes).to(model.device)
        learning = TrainingScenes(parameters, images, scenes)
        trainer = Trainer(run, model, learning, label=label, on_progress=self.on_progress)
        trainer.fit(config.exploit)
        model.eval().requires_grad_(False)
        _check_unchanged(model, library)
        found, spent = trainer.corrections, run.spent.times(1 / len(scenes))
        rows = enumerate(zip(scenes, parameters.one_by_one(), strict=True))
        return [FittedScene(scene, row, found and found.of_scene(k), spent) for k, (scene, row) in rows], run


def starting_parameters(
    config: Config, mean: SceneParameters, images: PosedImages, scenes: Sequence[Scene]
) -> SceneParameters:
    """Where scenes start: at the mean of stage 1, or at random numbers that depend only on seed and name. If
    scenes of stage 1 have boxes of their own, these have too."""
    if config.exploit_start == "mean":
        start = mean_parameters(len(scenes), mean)
    else:
        seeds = (seeded("cpu", config.seed, "new rows", scene.name) for scene in scenes)
        random = [random_parameters(1, config.planes, seed) for seed in seeds]
        start = SceneParameters(
            **{table: torch.cat([getattr(one, table) for one in random]) for table in SceneParameters.NAMES}
        )
    return dataclasses.replace(start, box=images.boxes(scenes) if mean.box.numel() else None)


def missing_scenes(library: LibraryFolder, images: PosedImages, scenes: Sequence[Scene]) -> list[Scene]:
    """Returns the scenes that the library does not hold, by name or (if renamed) by their dataset."""
    known = library.index.known([scene.name for scene in scenes])
    known |= library.index.sources(str(images.path.resolve()), "new")
    return [scene for scene in scenes if scene.name not in known]


def remove_stale_runs(work: Path, index: Index | None) -> None:
    """Removes runs that cannot go on from a folder `work`, unless a process is at work on them: runs whose
    scenes are in the index already, broken runs, and remains of scenes that were added in Python."""
    for folder in work.iterdir() if work.is_dir() else ():
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        try:
            with locked(folder / "lock", False, str(folder)):
                done = _is_broken(folder) or index is not None and _is_known(folder, index)
        except UserError:  # at work
            continue
        if done:
            shutil.rmtree(folder)


def _is_broken(folder: Path) -> bool:
    if not (folder / "run.json").is_file():
        return True
    try:
        Run.open(folder).check()
    except Damaged as error:
        if any(folder.glob("checkpoints/*")):
            say(f"{error} Here, the folder is removed, and its scenes are learned again.")
        return True
    return False


def _is_known(folder: Path, index: Index) -> bool:
    names = Run.open(folder).info.scenes
    return len(index.known(names)) == len(names)


def finish(run: Run, library: LibraryFolder) -> None:
    """Removes the run of scenes that are in the library now. Its metrics stay."""
    keep_log(run.path, library.path)
    shutil.rmtree(run.path)


def _check_unchanged(model: Model, library: LibraryFolder) -> None:
    """Checks that frozen parts kept every bit; otherwise the library's scenes would look different."""
    with open_tensors(library.shared_file) as stored:
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor.cpu(), stored.get_tensor(name)):
                raise RuntimeError(
                    f"{library.path}: {name} is frozen, but changed while new scenes were learned."
                )


def means(infos: Sequence[SceneInfo]) -> dict[str, float]:
    """Returns the means of a group's measured quality, size and times."""
    names = ("psnr", "psnr_lost", "bytes", "seconds", "cpu_seconds")
    return {name: sum(getattr(info, name) for info in infos) / len(infos) for name in names}


def group_line(infos: Sequence[SceneInfo]) -> str:
    """Returns a line on the scenes of a group."""
    mean, names = means(infos), [info.name for info in infos]
    if len(names) > NAMED:
        names[NAMED:] = [f"… ({len(names)} scenes)"]
    return (
        f"{', '.join(names)}: {mean['psnr']:.2f} dB, "
        f"{Spent(mean['seconds'], mean['cpu_seconds'])}, {bytes_text(mean['bytes'])} a scene "
        f"({infos[0].precision}, {lost_text(mean['psnr_lost'])})"
    )


def remarks(infos: Sequence[SceneInfo]) -> list[str]:
    """Returns the findings on the views of a group's scenes, one line each."""
    return [f"{info.name}: {line}" for info in infos for line in capture_lines(info.tags)]
