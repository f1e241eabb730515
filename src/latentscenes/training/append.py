"""From learned rows to scenes of a library: quantized, what that costs measured, a thumbnail taken, all noted."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.config import Config, StoragePrecision
from latentscenes.core.console import console
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene, Split, spread_evenly
from latentscenes.model import metrics
from latentscenes.model.model import Model, render_images, to_uint8
from latentscenes.model.planes import SceneParameters, mean_parameters
from latentscenes.storage.index import Origin, SceneInfo
from latentscenes.storage.library import LibraryFolder, LibraryInfo, NewScene, now
from latentscenes.storage.quantize import check_precision, pack, payload_bytes, unpack
from latentscenes.storage.run import Run

MEASURED_VIEWS = 4
"""Views of a scene that its loss is measured on."""
THUMBNAIL = 96
"""Pixels along a thumbnail's longer side."""
THUMBNAIL_ANGLES = 25.0, 40.0
"""Elevation and azimuth of its camera, degrees."""


def library_from_run(
    out: str | Path,
    run: Run,
    views: PosedImages,
    config: Config,
    precision: str,
    scenes: bool,
    device: torch.device | str,
) -> LibraryFolder:
    """Make a library of what a finished run of stage 1 learned: the model and, with `scenes`, its scenes, which
    `views` shows. `config` says how further ones will be learned; its model must be that of the run."""
    chosen = check_precision(precision)
    if not run.finished:
        raise UserError(
            f"{run.path}: this run is not finished. Run its `latentscenes train` command again; it goes on where it stopped."
        )
    if LibraryFolder.exists(out):
        raise UserError(f"{out}: holds a library already. Name another folder.")
    model, rows = run.load(device)
    info = library_info(run, views, chosen)
    found = []
    if scenes:
        known = views.select(run.info.split, run.info.scenes)
        provenance = Provenance("stage 1", run.info.split)
        shown = track(known, "Scenes of stage 1", console=console, disable=not console.is_terminal)
        for one, scene in zip(rows.one_by_one(), shown, strict=True):
            found.append(new_scene(model, one, info.view, views, scene, chosen, provenance))
    return LibraryFolder.create(out, config, info, model, mean_parameters(1, rows), found)


def library_info(run: Run, views: PosedImages, precision: StoragePrecision) -> LibraryInfo:
    """What a library of a run's model is."""
    view = Viewpoint.of(views.cameras, views.size, run.info.box)
    return LibraryInfo(
        run.info.box, view, precision, str(run.path.resolve()), run.seconds, len(run.info.scenes)
    )


@dataclass(frozen=True)
class Provenance:
    """Where a scene comes from, as the index will state it."""

    origin: Origin
    split: Split | None
    """Its split in the dataset; None if the dataset is not kept."""
    seconds: float | None = None
    """Time it took to learn."""
    tags: dict[str, Any] | None = None


def new_scene(
    model: Model, parameters: SceneParameters, view: Viewpoint, images: PosedImages, scene: Scene,
    precision: StoragePrecision, provenance: Provenance,
) -> NewScene:  # fmt: skip
    """Prepares a learned scene (n = 1) for storage. Measures its PSNR as learned and as stored, on up to MEASURED_VIEWS
    held-out views (on fitted ones if none is held out), and takes its thumbnail from `view`."""
    payload = pack(parameters, precision)
    stored = unpack(payload, model.config.planes).to(model.device)
    index = spread_evenly(scene.views("held_out") or scene.views("fit"), MEASURED_VIEWS)
    before = measure(model, parameters, images, index)
    lost = 0.0 if precision == "float32" else before - measure(model, stored, images, index)
    dataset = str(images.path.resolve()) if provenance.split else None
    info = SceneInfo(
        scene.name,
        precision,
        payload_bytes(payload),
        provenance.origin,
        dataset,
        provenance.split,
        scene.name,
        now(),
        provenance.seconds,
        round(before, 3),
        round(lost, 4),
        provenance.tags or {},
    )
    return NewScene(info, payload, thumbnail(model, stored, view))


@torch.no_grad()
def measure(model: Model, rows: SceneParameters, views: PosedImages, index: Sequence[int]) -> float:
    """Mean PSNR (dB) of a scene's decoded renders on views of a dataset."""
    device = rows.weights.device
    shown = render_images(
        model, model.compose(rows), views.cameras[torch.tensor(index)].to(device), views.size, geometry=False
    )
    return metrics.psnr(shown.images, views.images(list(index)).float() / 255).mean().item()


def thumbnail(model: Model, rows: SceneParameters, view: Viewpoint) -> bytes:
    """A small picture of a scene, as PNG: from the same camera for all, so near that the scene box just fits."""
    camera = view.orbit(1, *THUMBNAIL_ANGLES)
    corners = torch.tensor(model.box.center) + torch.cartesian_prod(
        *(torch.tensor([-half, half]) for half in model.box.half)
    )
    reach = (camera.project(corners)[0] - 0.5).abs().max()
    near = Cameras(
        camera.cam2world,
        camera.intrinsics * torch.tensor([1, 1, 0, 0]) * (0.48 / reach) + torch.tensor([0, 0, 0.5, 0.5]),
    )
    picture = to_uint8(render_images(model, model.compose(rows), near, view.size, geometry=False).images)[0]
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
