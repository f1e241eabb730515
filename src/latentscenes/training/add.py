"""Learns a scene from images in memory: checks and writes them, learns, and appends the scene."""

import dataclasses
import difflib
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import Config, frozen
from latentscenes.core.errors import UserError
from latentscenes.core.files import locked, writing_to
from latentscenes.core.options import StoragePrecision
from latentscenes.data.boxes import fit_box
from latentscenes.data.checks import check_cameras
from latentscenes.data.dataset import PosedImages
from latentscenes.data.images import white_background
from latentscenes.data.placing import SOLID
from latentscenes.data.writing import DatasetWriter
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.quantize import check_precision
from latentscenes.storage.run import Run, RunInfo
from latentscenes.storage.source import SceneSource
from latentscenes.training.batches import TrainingScenes
from latentscenes.training.groups import GroupLearner, starting_parameters
from latentscenes.training.loop import Trainer

QUICK_STEPS = 60
"""Steps for learning the weights of a scene that is searched for."""
WHITE = 250
"""Bytes from here on count as white."""
LEAST_WHITE = 0.1
"""Images without masks must be white on at least this share of their border."""


def learn_from_pictures(
    store: LibraryFolder,
    name: str,
    images: ArrayLike,
    cameras: Cameras,
    masks: ArrayLike | None,
    precision: StoragePrecision | None,
    tags: dict[str, Any] | None,
    device: torch.device,
) -> str:
    """Learns one scene and appends it. Returns its name. See Library.add."""
    config = frozen(store.config)
    if not config.exploit:
        raise UserError(
            f"{store.path}: its configuration lists no exploit stages, so no scene can be learned. "
            "Add some to config.yaml."
        )
    if not name.strip() or store.index.known([name]):
        reason = f"a scene {name!r} is there already" if name.strip() else "the name is empty"
        raise UserError(f"{store.path}: {reason}. Choose another name.")
    model = store.model(device)
    pictures, alpha = checked_pictures(images, masks, model.codec.downsampling)
    _check_cameras(store, cameras, len(pictures))
    with work_folder(store) as work:
        with DatasetWriter(
            work / "views", pictures.shape[1:3], alpha=alpha is not None, origin="pictures given in Python"
        ) as writer:
            own = _own_box(pictures, alpha, cameras, name) if store.has_boxes else None
            writer.add(name, pictures, cameras, "new", held_out=(), alpha=alpha, box=own)
            writer.finish(store.info.box)
        dataset = PosedImages.open(work / "views")
        chosen = check_precision(precision or store.info.precision)
        learner = GroupLearner(store, model, config, dataset, chosen)
        learner.learn(dataset.select("new"), f"Learning {name}", "add", work, tags)
    return name


@contextmanager
def work_folder(store: LibraryFolder) -> Iterator[Path]:
    """Makes a temporary folder in a library. It is locked against other processes, and removed at the end."""
    with writing_to(store.path):
        (store.path / "work").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="add-", dir=store.path / "work"))
    try:
        with locked(folder / "lock", False, str(folder)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checked_pictures(
    images: ArrayLike, masks: ArrayLike | None, step: int
) -> tuple[UInt8[np.ndarray, "v H W 3"], UInt8[np.ndarray, "v H W"] | None]:
    """Returns images as bytes over white, and masks as bytes. Raises UserError if sides are not multiples of
    `step`, numbers are out of range, or images without masks have no white border."""
    try:
        pictures = np.asarray(images)
    except ValueError:
        raise UserError("images: they have different sizes. Bring them to one size first.") from None
    if pictures.ndim != 4 or pictures.shape[3] != 3 or not len(pictures):
        raise UserError(f"images: must be (v, H, W, 3), RGB, at least one image; got {pictures.shape}.")
    height, width = pictures.shape[1:3]
    if height % step or width % step:
        raise UserError(
            f"images: {width}x{height} pixels, but sides must be multiples of the codec's downsampling, "
            f"{step}. Shrink or crop them."
        )
    pictures = _as_bytes(pictures, "images")
    if masks is not None:
        share = np.asarray(masks)
        if share.shape != pictures.shape[:3]:
            raise UserError(f"masks: must be {pictures.shape[:3]} like the images; got {share.shape}.")
        share = _as_bytes(share.astype(np.float32) if share.dtype == bool else share, "masks")
        solid = share[..., None].astype(np.float32) / 255
        return np.round(pictures * solid + 255 * (1 - solid)).astype(np.uint8), share
    edges = np.concatenate([pictures[:, [0, -1]].reshape(-1, 3), pictures[:, :, [0, -1]].reshape(-1, 3)])
    if (edges >= WHITE).all(1).mean() < LEAST_WHITE:
        raise UserError("images: their edges are not white, but scenes are learned over white. Give `masks`.")
    return np.ascontiguousarray(pictures), None


def _as_bytes(values: np.ndarray, name: str) -> UInt8[np.ndarray, "..."]:
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{name}: must be bytes (uint8) or numbers in [0, 1], not {values.dtype}.")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise UserError(
            f"{name}: numbers must lie in [0, 1], but reach from {values.min():.3g} to {values.max():.3g}. "
            "Bytes must be uint8."
        )
    return np.round(255 * values).astype(np.uint8)


def _check_cameras(store: LibraryFolder, cameras: Cameras, count: int) -> None:
    if not isinstance(cameras, Cameras):
        raise UserError(
            f"cameras: must be latentscenes.Cameras, not {type(cameras).__name__}. "
            "Cameras.from_matrices takes camera-to-world matrices."
        )
    if len(cameras) != count:
        raise UserError(f"cameras: {len(cameras)} of them for {count} images. Give one per image.")
    box = None if store.has_boxes else store.info.box
    check_cameras(cameras, [f"camera {place}" for place in range(count)], box)


def _own_box(
    pictures: UInt8[np.ndarray, "v H W 3"], alpha: UInt8[np.ndarray, "v H W"] | None, cameras: Cameras,
    name: str,
) -> Box:  # fmt: skip
    masks = ~white_background(pictures) if alpha is None else alpha >= SOLID
    return fit_box([(name, masks, cameras)])


def quick(config: Config, views: int, steps: int | None = None) -> Config:
    """Keeps only the first exploit stage that learns weights from latents, with `steps` (unset: QUICK_STEPS)
    steps over `views` views of one scene.

    Raises:
        UserError: there is no such stage.
    """
    stages = [stage for stage in frozen(config).exploit if stage.rates.weights and stage.losses.latent]
    if not stages:
        raise UserError(
            "search: no exploit stage of this library's configuration learns weights from latents."
        )
    epochs = math.ceil((steps or QUICK_STEPS) / math.ceil(views / stages[0].views))
    rates = dataclasses.replace(stages[0].rates, colors=0.0, cameras=0.0)
    stage = dataclasses.replace(stages[0], epochs=epochs, rates=rates)
    return dataclasses.replace(frozen(config), exploit=(stage,), exploit_start="mean")


def quick_weights(
    store: SceneSource, images: PosedImages, name: str, device: torch.device
) -> Float[np.ndarray, "M"]:
    """Learns the base-plane weights of a dataset's scene for a second or two. Stores nothing."""
    found = [scene for scene in images.scenes if scene.name == name]
    if not found:
        near = difflib.get_close_matches(name, [scene.name for scene in images.scenes], n=1, cutoff=0)
        raise UserError(f"{images.path}: no scene {name!r} here; the nearest name is {near[0]!r}.")
    config = quick(store.config, len(found[0].views("fit")))
    model = store.model(device)
    with tempfile.TemporaryDirectory(prefix="latentscenes-") as work:  # the library may be read-only
        info = RunInfo("exploit", str(images.path), found[0].split, [name], store.info.box)
        run = Run.create(Path(work) / "run", config, info)
        rows = starting_parameters(config, store.starting_scene(), images, found).to(device)
        Trainer(run, model, TrainingScenes(rows, images, found), label=f"Fitting {name}").fit(config.exploit)
    return rows.weights[0].cpu().numpy()
