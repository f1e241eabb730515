"""Prepares learned scenes for a library: quantizes them, measures their loss, and renders thumbnails."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from latentscenes.core.cameras import Viewpoint
from latentscenes.core.config import Config
from latentscenes.core.console import Spent, console
from latentscenes.core.errors import UserError
from latentscenes.core.options import StoragePrecision
from latentscenes.data.dataset import PosedImages, Scene, Split, spread_evenly
from latentscenes.model import metrics
from latentscenes.model.model import Model, render_images
from latentscenes.model.pictures import thumbnail
from latentscenes.model.planes import SceneParameters, mean_parameters
from latentscenes.storage.entries import Origin, SceneInfo
from latentscenes.storage.library import LibraryFolder, LibraryInfo, NewScene, now
from latentscenes.storage.quantize import check_precision, pack, payload_bytes, unpack
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import shows_silhouettes

MEASURED_VIEWS = 4
"""Views per scene for measuring its PSNR."""


def library_from_run(
    out: str | Path, run: Run, images: PosedImages, config: Config, precision: str, scenes: bool,
    device: torch.device | str,
) -> LibraryFolder:  # fmt: skip
    """Makes a library from a finished run of stage 1: its model and, with `scenes`, its scenes, whose dataset
    is `images`. `config` is for new scenes; its model settings must be the run's.

    Raises:
        UserError: the run is not finished, or `out` already holds a library.
    """
    chosen = check_precision(precision)
    run.require_finished()
    if LibraryFolder.exists(out):
        raise UserError(f"{out}: holds a library already. Name another folder.")
    model, rows = run.load(device)
    info = library_info(run, images, chosen)
    found = []
    if scenes:
        known = images.select(run.info.split, run.info.scenes)
        shown = track(known, "Scenes of stage 1", console=console, disable=not console.is_terminal)
        known_edges = shows_silhouettes(run.config.train, images)
        provenance = Provenance("stage 1", run.info.split, silhouettes=known_edges)
        found = new_scenes(model, rows, info.view, images, shown, chosen, provenance)
    return LibraryFolder.create(out, config, info, model, mean_parameters(1, rows), found)


def library_info(run: Run, images: PosedImages, precision: StoragePrecision) -> LibraryInfo:
    """Describes a library with a run's model."""
    view = Viewpoint.of(images.cameras, images.size, run.info.box)
    return LibraryInfo(
        run.info.box, view, precision, str(run.path.resolve()), run.spent.wall, len(run.info.scenes),
        parent_cpu_seconds=run.spent.cpu,
    )  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """The origin of a scene, for the library's index."""

    origin: Origin
    split: Split | None
    """Its split in the dataset; None if the dataset is not kept."""
    spent: Spent | None = None
    """Learning time; None for scenes of stage 1."""
    tags: dict[str, Any] | None = None
    silhouettes: bool = False
    """Whether it was learned with silhouettes over random backgrounds."""


def new_scenes(
    model: Model, parameters: SceneParameters, view: Viewpoint, images: PosedImages, scenes: Iterable[Scene],
    precision: StoragePrecision, provenance: Provenance,
) -> list[NewScene]:  # fmt: skip
    """Prepares learned scenes for storage, one by one (see `new_scene`)."""
    return [
        new_scene(model, one, view, images, scene, precision, provenance)
        for one, scene in zip(parameters.one_by_one(), scenes, strict=True)
    ]


def new_scene(
    model: Model, parameters: SceneParameters, view: Viewpoint, images: PosedImages, scene: Scene,
    precision: StoragePrecision, provenance: Provenance,
) -> NewScene:  # fmt: skip
    """Prepares a learned scene (n = 1) for storage. Measures its PSNR as learned and as stored on up to
    MEASURED_VIEWS held-out views (fitted ones if none is held out), and renders its thumbnail from `view`."""
    payload = pack(parameters, precision)
    stored = unpack(payload, model.config.planes).to(model.device)
    index = spread_evenly(scene.views("held_out") or scene.views("fit"), MEASURED_VIEWS)
    before = measure(model, parameters, images, index)
    lost = 0.0 if precision == "float32" else before - measure(model, stored, images, index)
    dataset = str(images.path.resolve()) if provenance.split else None
    spent = provenance.spent
    info = SceneInfo(
        scene.name, precision, payload_bytes(payload), provenance.origin, dataset, provenance.split,
        scene.name, now(), spent and spent.wall, spent and spent.cpu, round(before, 3), round(lost, 4),
        provenance.silhouettes, scene.tags | (provenance.tags or {}),
    )  # fmt: skip
    return NewScene(info, payload, thumbnail(model, stored, view, provenance.silhouettes))


def draw_thumbnails(library: LibraryFolder, device: torch.device | str) -> None:
    """Renders the thumbnails of scenes that have none, after the index was made from the shards."""
    names = library.index.without_thumbnail()
    if not names:
        return
    model = library.model(device)
    with library.writing():
        for name in track(names, "Thumbnails", console=console, disable=not console.is_terminal):
            known = bool(library.index.info(name).silhouettes)
            picture = thumbnail(model, library.parameters(name).to(device), library.info.view, known)
            with library.index.transaction():
                library.index.set_thumbnail(name, picture)


@torch.no_grad()
def measure(model: Model, rows: SceneParameters, images: PosedImages, index: Sequence[int]) -> float:
    """Returns the mean PSNR (dB) of a scene's decoded renders on some views of a dataset."""
    cameras = images.cameras[torch.tensor(index)].to(rows.weights.device)
    shown = render_images(model, model.compose(rows, bounded=True), cameras, images.size, geometry=False)
    return metrics.psnr(shown.images, images.images(list(index)).float() / 255).mean().item()
