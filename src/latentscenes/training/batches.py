"""From a dataset to batches: several views of each of a few scenes, in an order that depends on the seed alone."""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import StageConfig
from latentscenes.core.runtime import machine_memory, seeded
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.training.losses import Batch, at_pixels, needs_images

ENCODE_CHUNK = 32
"""Images encoded at once when latents are cached."""


@dataclass(frozen=True)
class TrainingScenes:
    """n scenes to learn: row k of the parameters belongs to the images of `entries[k]`."""

    parameters: SceneParameters
    images: PosedImages
    entries: Sequence[Scene]


class BatchSource:
    """The batches of one stage. Where the encoder is frozen, latents are encoded once and cached."""

    def __init__(self, model: Model, scenes: TrainingScenes, stage: StageConfig, seed: int, scratch: Path):
        """Latents that would fill more than a quarter of the memory go to a file in the folder `scratch`, which vanishes
        with the process."""
        views = scenes.images
        self.model, self.views, self.stage, self.seed, self.device = model, views, stage, seed, model.device
        self.scratch = scratch
        self.fitted = [torch.tensor(scene.views("fit")) for scene in scenes.entries]
        every = torch.cat(self.fitted)
        self._slot = torch.full((len(views.rgb),), -1)  # of each fitted view among all fitted ones
        self._slot[every] = torch.arange(len(every))
        self.focus = ErrorGuidedSampling(len(every), stage.focus, self.device) if stage.focus else None
        self.images_needed = needs_images(stage.losses)
        frozen = stage.rates.encoder == 0 or not model.codec.encoder_parameters()
        encodings_only = stage.losses.latent and not (stage.losses.autoencoder or stage.losses.equivariance)
        self._latents = None
        self._frozen = frozen and encodings_only
        if self._frozen and model.codec.encoder_parameters():
            self._cache()
        elif frozen and model.normalizer.untouched:
            chunks = torch.cat(self.fitted).split(ENCODE_CHUNK)
            self._settle(
                self._encoded(chunk) for chunk in chunks[:: 1 + len(chunks) // model.normalizer.window]
            )
        self._background = model.background(*views.size) if frozen else None
        self.steps_per_epoch = len(self._order(0))
        self._epoch: tuple[int, list] = (-1, [])

    def state(self) -> dict[str, Tensor]:
        """Tensors themselves, by name: what the source remembers of earlier steps."""
        return {"focus.errors": self.focus.errors} if self.focus else {}

    @property
    def steps(self) -> int:
        return self.stage.epochs * self.steps_per_epoch

    @torch.no_grad()
    def _encoded(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.model.codec.encode(self._images(index))

    def _settle(self, encoded: Iterable[Tensor]) -> None:
        """A frozen codec's latents do not change, so its normalizer need not either: statistics are taken once."""
        for chunk in encoded:
            self.model.normalizer.update(chunk)

    def _cache(self) -> None:
        index = torch.cat(self.fitted)
        chunks = index.split(ENCODE_CHUNK)
        if self.model.normalizer.untouched:
            self._settle(self._encoded(chunk) for chunk in chunks)
        background = self.model.background(*self.views.size)
        self._latents = self._allocate(len(index), background[0].numel(), len(background))
        for chunk, place in zip(chunks, torch.arange(len(index)).split(ENCODE_CHUNK), strict=True):
            self._latents[place] = at_pixels(self.model.normalizer.normalize(self._encoded(chunk)))

    def _allocate(self, *shape: int) -> Tensor:
        if 4 * math.prod(shape) <= machine_memory() // 4:
            return torch.empty(shape, device=self.device)
        return torch.from_numpy(
            np.memmap(tempfile.TemporaryFile(dir=self.scratch), np.float32, "w+", shape=shape)
        )

    def _images(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.views.images(index).to(self.device).float() / 255

    def _order(self, epoch: int) -> list[tuple[list[int], list[Tensor]]]:
        """(scenes, their views) of every batch of an epoch: each view of each scene comes once, in chunks; a last
        chunk is filled up with the scene's first views."""
        generator = seeded("cpu", self.seed, self.stage.name, "order", epoch)
        size = self.stage.views
        shuffled = [fitted[torch.randperm(len(fitted), generator=generator)] for fitted in self.fitted]
        chunked = [
            views.repeat(2 + size // len(views))[: size * math.ceil(len(views) / size)].split(size)
            for views in shuffled
        ]
        batches = []
        for turn in range(max(map(len, chunked))):
            present = [scene for scene, chunks in enumerate(chunked) if turn < len(chunks)]
            mixed = [present[k] for k in torch.randperm(len(present), generator=generator).tolist()]
            for start in range(0, len(mixed), self.stage.scenes):
                group = mixed[start : start + self.stage.scenes]
                batches.append((group, [chunked[scene][turn] for scene in group]))
        return batches

    def batch(self, step: int) -> Batch:
        """The batch of a step (0 = first of the stage)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        scenes, chunks = self._epoch[1][place]
        index = torch.cat(chunks)
        background = (
            self._background if self._background is not None else self.model.background(*self.views.size)
        )
        cameras = self.views.cameras[index].to(self.device)
        views = self._slot[index].to(self.device) if self.focus else None
        pixels, cells = (
            self._pixels(cameras, *background.shape[1:], step, views) if self.stage.rays else (None, None)
        )
        latents = self._targets(index, pixels) if self._frozen and self.stage.losses.latent else None
        missing = latents is None and bool(self.stage.losses.latent)
        images = self._images(index) if self.images_needed or missing else None
        return Batch(torch.tensor(scenes), cameras, background, images, latents, pixels, views, cells)

    def learn(self, batch: Batch, errors: Float[Tensor, "v p"] | None) -> None:
        """Take in what the rays of a batch were wrong by."""
        if self.focus:
            self.focus.learn(batch.views, batch.cells, errors)

    def _pixels(
        self, cameras: Cameras, height: int, width: int, step: int, views: Int[Tensor, "v"] | None
    ) -> tuple[Int[Tensor, "v p"], Int[Tensor, "v p"] | None]:
        """Random pixels of each view, among those that can see the scene box: within the rectangle around it, or of the
        whole view where rays do not end at the box. Where the source has a focus, also their cells."""
        generator = seeded("cpu", self.seed, self.stage.name, "rays", step)
        count = min(self.stage.rays, height * width)
        x, y, cells = *torch.rand(2, len(cameras), count, generator=generator).to(self.device), None
        if self.focus:
            u = torch.rand(len(cameras), count, generator=generator).to(self.device)
            x, y, cells = self.focus.draw(views, x, y, u)
        if self.model.config.render.near is not None:
            return (y * height).long() * width + (x * width).long(), cells
        left, right, top, bottom = window(cameras, self.model.box, height, width)[..., None].unbind(1)
        return (top + y * (bottom - top)).long() * width + (left + x * (right - left)).long(), cells

    @torch.no_grad()
    def _targets(self, index: Int[Tensor, "v"], pixels: Int[Tensor, "v p"] | None) -> Float[Tensor, "v p c"]:
        """Normalized latents of some pixels; all without."""
        if self._latents is not None:
            slot = self._slot[index]
            found = (
                self._latents[slot]
                if pixels is None
                else self._latents[slot[:, None], pixels.to(slot.device)]
            )
            return found.to(self.device)
        if pixels is None:
            return at_pixels(self.model.encode(self._images(index)))
        colors = (
            self.views.pixels(index, pixels.cpu()).to(self.device).float() / 255
        )  # no encoder: latents are pixels
        return at_pixels(self.model.encode(colors.transpose(1, 2)[:, :, None]))


def window(cameras: Cameras, box: Box, height: int, width: int) -> Float[Tensor, "v 4"]:
    """Left, right, top and bottom of the rectangle of pixels that the box appears in; the whole view where the camera is
    in the box or beside it."""
    points, depth = cameras.project(box.corners().to(cameras.cam2world.device))
    size = torch.tensor([float(width), float(height)], device=points.device)
    seen = points.nan_to_num() * size
    low = seen.amin(1).floor().clamp(min=torch.zeros_like(size), max=size - 1)
    high = seen.amax(1).ceil().clamp(min=low + 1, max=size.expand_as(low))
    around = (depth <= 0).any(1)[:, None]
    low, high = torch.where(around, 0, low), torch.where(around, size, high)
    return torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)


SIDE = 8
"""Cells along each side of the rectangle in which rays are drawn."""
EXPONENT = 0.7
"""What errors are raised to. In proportion to errors themselves, too few rays are left for what is nearly right."""
MEMORY = 0.5
"""How much of a cell's old error stays when new rays went through it."""

LEAST = 1e-12
"""Errors below this count as this: where all of a view is right, its cells are alike."""


class ErrorGuidedSampling:
    """The cells of n views. `errors` is its state."""

    def __init__(self, views: int, share: float, device: torch.device):
        """`share` in [0, 1] of the rays goes by errors."""
        self.share = share
        self.errors: Float[Tensor, "n c"] = torch.ones(views, SIDE * SIDE, device=device)

    def draw(
        self,
        views: Int[Tensor, "v"],
        x: Float[Tensor, "v p"],
        y: Float[Tensor, "v p"],
        u: Float[Tensor, "v p"],
    ) -> tuple[Float[Tensor, "v p"], Float[Tensor, "v p"], Int[Tensor, "v p"]]:
        """From uniform numbers in [0, 1): places in the rectangle, as fractions of its sides, and their cells. Each view's
        cells come in order, one from each p-th of their chances, so that chance leaves none of them out."""
        wrong = self.errors[views].clamp(min=LEAST) ** EXPONENT
        chances = (1 - self.share) / wrong.shape[1] + self.share * wrong / wrong.sum(1, keepdim=True)
        upper = chances.cumsum(1)
        strata = (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1]
        cells = torch.searchsorted(upper, strata * upper[:, -1:], right=True).clamp_(max=wrong.shape[1] - 1)
        return (cells % SIDE + x) / SIDE, (cells // SIDE + y) / SIDE, cells

    def learn(self, views: Int[Tensor, "v"], cells: Int[Tensor, "v p"], errors: Float[Tensor, "v p"]) -> None:
        """What rays through some cells of (different) views were wrong by."""
        count = self.errors.shape[1]
        at = (torch.arange(len(views), device=cells.device)[:, None] * count + cells).flatten()
        rays = torch.bincount(at, minlength=len(views) * count).view(len(views), count)
        sums = torch.bincount(at, errors.flatten(), len(views) * count).view(len(views), count)
        old = self.errors[views]
        self.errors[views] = torch.where(
            rays > 0, MEMORY * old + (1 - MEMORY) * sums / rays.clamp(min=1), old
        )
