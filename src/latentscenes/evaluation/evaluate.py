"""Scores on held-out views. They are deterministic: samples at the middles of their intervals, latent means,
clamped images.

Every score is computed per view, then averaged per scene, then over scenes. The error has three parts:
`codec` compares D(E(x)) with x, which is the ceiling; the total compares D(render) with x; `latent` is the
mean squared error between rendered and encoded latents.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.console import Spent
from latentscenes.core.files import CHECKSUM, read_object, write_with_checksum
from latentscenes.data.dataset import PosedImages, Scene, spread_evenly
from latentscenes.model import metrics
from latentscenes.model.model import LatentView, Model
from latentscenes.storage.records import SCORES
from latentscenes.storage.scene_set import SceneSet, StoredScenes

CHUNK = 16
"""Number of views rendered and decoded at once."""


@dataclass(frozen=True)
class SceneScore:
    """Means over one scene's views, or over scenes. PSNR in dB. Perceptual distances are None if the
    metric is not installed."""

    name: str
    psnr: float
    ssim: float
    perceptual: float | None
    codec_psnr: float | None
    """Of images encoded and decoded, as are the next two and the latent error. None if the codec does not
    encode all channels."""
    codec_ssim: float | None
    codec_perceptual: float | None
    latent_error: float | None
    silhouette_error: float | None = None
    """Mean |opacity − alpha| over the pixels, where the dataset has silhouettes."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of scenes."""

    data: str
    part: str
    """`held_out` views or `fit` views."""
    views: int
    perceptual_metric: str | None
    """Name of the perceptual metric."""
    render_seconds: float
    """Wall time to render and decode one view."""
    scenes: list[SceneScore]
    mean: SceneScore
    render_cpu_seconds: float | None = None
    """CPU time to render and decode one view; None in files of earlier versions."""

    @property
    def render_spent(self) -> Spent:
        """Time to render and decode one view."""
        return Spent(self.render_seconds, self.render_cpu_seconds)

    def save(self, path: Path) -> None:
        write_with_checksum(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        content = read_object(path, "Remove it: it is computed again.")
        content.pop(CHECKSUM, None)  # files of earlier versions have none
        return config_io.build(cls, content, path)


@torch.no_grad()
def evaluate(
    loaded: SceneSet,
    views: PosedImages,
    scenes: Sequence[Scene],
    part: str = "held_out",
    limit: int | None = None,
) -> Evaluation:
    """Scores learned scenes on their held-out views, or with part "fit" on the views they were fitted to.
    With `limit`, uses at most that many views of each scene, evenly spread."""
    perceptual = metrics.Perceptual.find()
    model, device = loaded.model, loaded.device
    background = model.background(*views.size)
    scores, spent, count = [], Spent(0.0, 0.0), 0
    for scene in scenes:
        index = scene.views(part)
        if limit is not None and limit < len(index):
            index = spread_evenly(index, limit)
        planes = loaded.planes(scene.name)
        table: list[list[Tensor]] = []
        for chunk in torch.tensor(index).split(CHUNK):
            images, cameras = views.images(chunk).to(device).float() / 255, views.cameras[chunk].to(device)
            if not count:  # warm up before the first timing
                model.decode(model.render(planes, cameras, background).image(*background.shape[1:]))
            begun = _now(device)
            shown = model.render(planes, cameras, background)
            latents = shown.image(*background.shape[1:])
            rendered = model.decode(latents)
            spent += _now(device) - begun
            # Scores of each view: total, codec, silhouette
            missing = torch.full((len(chunk),), math.nan)
            table.append([
                metrics.psnr(rendered, images), metrics.ssim(rendered, images),
                perceptual(rendered, images) if perceptual else missing,
                *(_of_codec(model, images, latents, perceptual) or [missing] * 4),
                missing if views.alpha is None else _silhouette_error(shown, views, chunk),
            ])  # fmt: skip
        columns = [torch.cat([part.cpu() for part in parts]) for parts in zip(*table, strict=True)]
        means = [float(column.double().mean()) for column in columns]
        scores.append(SceneScore(scene.name, *(None if math.isnan(value) else value for value in means)))
        count += len(index)
    kind = perceptual.name if perceptual else None
    view = spent.times(1 / max(count, 1))
    return Evaluation(str(views.path), part, count, kind, view.wall, scores, mean_score(scores), view.cpu)


def _of_codec(
    model: Model,
    images: Float[Tensor, "v 3 H W"],
    latents: Float[Tensor, "v c h w"],
    perceptual: metrics.Perceptual | None,
) -> list[Tensor] | None:
    """PSNR, SSIM and perceptual distance of images encoded and decoded, and the squared error of rendered
    latents, of each view; None if the codec does not encode all channels."""
    if not model.codec.encodes_all:
        return None
    encoded = model.encode(images)
    decoded = model.decode(encoded)
    distance = perceptual(decoded, images) if perceptual else torch.full((len(images),), math.nan)
    error = (latents - encoded).square().mean((1, 2, 3))
    return [metrics.psnr(decoded, images), metrics.ssim(decoded, images), distance, error]


def _silhouette_error(shown: LatentView, views: PosedImages, index: Int[Tensor, "v"]) -> Float[Tensor, "v"]:
    """Mean |opacity − alpha| of each view, alpha averaged over each latent pixel."""
    alpha = torch.from_numpy(views.alpha[index.numpy()]).float() / 255
    step = round((alpha[0].numel() / shown.opacity.shape[1]) ** 0.5)
    alpha = torch.nn.functional.avg_pool2d(alpha[:, None], step).flatten(1)
    return (shown.opacity.cpu() - alpha).abs().mean(1)


def _now(device: torch.device) -> Spent:
    """Both clocks after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent.so_far()


def evaluate_stored(learned: StoredScenes, views: PosedImages) -> Evaluation:
    """Scores learned scenes on held-out views. Reads the scores from the folder's evaluation.json instead if
    they cover the same scenes."""
    path = learned.path / SCORES
    if path.exists():
        known = Evaluation.read(path)
        if [score.name for score in known.scenes] == list(learned.names):
            return known
    found = evaluate(learned, views, learned.scenes(views))
    found.save(path)
    return found


def mean_score(scores: Sequence[SceneScore]) -> SceneScore:
    """Mean over scenes."""
    names = [entry.name for entry in fields(SceneScore)][1:]
    columns = {name: [getattr(score, name) for score in scores] for name in names}
    return SceneScore(
        "mean",
        **{name: None if None in values else statistics.fmean(values) for name, values in columns.items()},
    )
