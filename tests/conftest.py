"""Shared by all tests: a tiny dataset of analytic solids, a configuration for it, the shared data."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from latentscenes.core import config as configuration
from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, orbit
from latentscenes.data.dataset import PosedImages
from latentscenes.data.writing import DatasetWriter
from latentscenes.training.sharing import claims

SHARED = Path(os.environ.get("LATENTSCENES_SHARED", Path(__file__).resolve().parents[2] / "shared"))
"""Data and weights that are too large for the repository."""

torch.set_num_threads(1)

HALF = 0.45
"""Half the side of the box around the solids."""
LIGHT = np.array([0.36, -0.48, 0.8])

TINY = """
seed: 5
codec: {kind: convolutional, downsampling: 4, channels: 4, width: 8, bfloat16: false}
planes: {resolution: 12, micro: 2, macro: 3, bases: 3}
field: {hidden: 16}
render: {coarse: 6, fine: 6}
train:
  - name: codec
    epochs: 1
    scenes: 2
    views: 2
    losses: {autoencoder: 1, equivariance: 0.5}
    rates: {encoder: 2e-3, decoder: 2e-3}
    schedule: cosine
    decay: 0.1
  - name: scenes
    epochs: 2
    scenes: 2
    views: 2
    losses: {latent: 1, tv: 1e-4}
    rates: {micro: 1e-2, weights: 1e-2, bases: 1e-2, field: 1e-2}
    field_epochs: 1
  - name: joint
    epochs: 1
    scenes: 2
    views: 2
    losses: {latent: 1, rgb: 1, autoencoder: 0.1, tv: 1e-4}
    rates: {encoder: 1e-4, decoder: 1e-4, micro: 1e-3, weights: 1e-2, bases: 1e-2, field: 1e-3}
exploit:
  - name: latent fit
    epochs: 1
    scenes: 2
    views: 2
    losses: {latent: 1}
    rates: {micro: 1e-2, weights: 1e-2}
    schedule: exponential
    decay: 0.9
  - name: alignment
    epochs: 1
    scenes: 1
    views: 2
    losses: {rgb: 1}
    rates: {micro: 1e-3, weights: 1e-3}
"""
"""Every kind of stage, one or two epochs each."""


def solid_hits(
    kind: str, size: np.ndarray, origins: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (inf where missed) and outward normal at which rays meet an axis-aligned ellipsoid or box with
    half axes `size` at the origin."""
    o, d = origins / size, directions / size
    if kind == "ellipsoid":
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
        root = b * b - a * c
        t = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
        place = o + np.where(np.isfinite(t), t, 0)[..., None] * d
        normal = place / size
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            entry, leave = np.fmin((-1 - o) / d, (1 - o) / d), np.fmax((-1 - o) / d, (1 - o) / d)
        near, far = entry.max(-1), leave.min(-1)
        t = np.where((near < far) & (near > 0), near, np.inf)
        normal = -np.sign(d) * (entry == near[..., None])
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)


def photograph(
    kind: str,
    size: tuple[float, float, float],
    color: tuple[float, float, float],
    cameras: Cameras,
    pixels: int,
):
    """Images (v, h, w, 3) and silhouettes (v, h, w) of one shaded solid over white, four rays per pixel."""
    origins, directions = (rays.double().numpy() for rays in cameras.rays(2 * pixels, 2 * pixels))
    t, normal = solid_hits(kind, np.array(size), origins, directions)
    hit = np.isfinite(t)
    shade = 0.4 + 0.6 * np.maximum(normal @ LIGHT, 0)
    fine = np.where(hit[..., None], np.array(color) * shade[..., None], 1.0)
    image = fine.reshape(-1, pixels, 2, pixels, 2, 3).mean((2, 4))
    alpha = hit.reshape(-1, pixels, 2, pixels, 2).mean((2, 4))
    return (255 * image).round().astype(np.uint8), (255 * alpha).round().astype(np.uint8)


SOLIDS = {
    "red_ball": ("ellipsoid", (0.35, 0.35, 0.35), (0.9, 0.2, 0.1), "train"),
    "green_box": ("box", (0.3, 0.2, 0.25), (0.2, 0.8, 0.3), "train"),
    "blue_egg": ("ellipsoid", (0.4, 0.25, 0.2), (0.1, 0.3, 0.9), "train"),
    "brown_bar": ("box", (0.4, 0.12, 0.12), (0.5, 0.3, 0.1), "train"),
    "pink_disc": ("ellipsoid", (0.35, 0.35, 0.12), (0.9, 0.4, 0.7), "new"),
    "gray_cube": ("box", (0.24, 0.24, 0.24), (0.5, 0.5, 0.5), "new"),
}


def write_solids(path: Path, pixels: int = 32, views: int = 6, held_out: tuple[int, ...] = (2,)) -> Path:
    """A dataset of all SOLIDS, seen from an orbit."""
    cameras = orbit(views)
    with DatasetWriter(path, size=(pixels, pixels), alpha=True, origin="solids") as writer:
        for name, (kind, size, color, split) in SOLIDS.items():
            images, alpha = photograph(kind, size, color, cameras, pixels)
            writer.add(name, images, cameras, split, held_out=held_out, alpha=alpha)
        writer.finish(Box((0.0, 0.0, 0.0), (HALF, HALF, HALF)))
    return path


class Clock:
    """A clock that tests move on."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Replaces the clock by which leases lapse."""
    found = Clock()
    monkeypatch.setattr(claims, "time", found)
    return found


@pytest.fixture(scope="session")
def solids_path(tmp_path_factory) -> Path:
    """Folder of the tiny dataset: 4 training and 2 new scenes, 6 views of 32 pixels, view 2 held out."""
    return write_solids(tmp_path_factory.mktemp("data") / "solids")


@pytest.fixture(scope="session")
def solids(solids_path) -> PosedImages:
    return PosedImages.open(solids_path)


@pytest.fixture
def tiny() -> configuration.Config:
    """A configuration with every kind of stage that is learned in a few seconds."""
    return config_io.parse(TINY, "tiny")
