"""From a dataset to batches: several views of each of a few scenes, in an order that depends on the seed alone."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from latentscenes.config import StageConfig
from latentscenes.losses import Batch, needs_images
from latentscenes.model import Model
from latentscenes.runtime import seeded
from latentscenes.views import Scene, Views

ENCODE_CHUNK = 32
"""Images encoded at once when latents are cached."""


class BatchSource:
    """The batches of one stage. Where the encoder is frozen, latents are encoded once and cached."""

    def __init__(self, model: Model, views: Views, scenes: Sequence[Scene], stage: StageConfig, seed: int, device: torch.device):
        self.model, self.views, self.stage, self.seed, self.device = model, views, stage, seed, device
        self.fitted = [torch.tensor(scene.views("fit")) for scene in scenes]
        self.images_needed = needs_images(stage.losses)
        frozen = stage.rates.encoder == 0 or not model.codec.encoder_parameters()
        encodings_only = stage.losses.latent and not (stage.losses.autoencoder or stage.losses.equivariance)
        self._latents, self._slot = None, None
        if frozen and encodings_only and model.codec.encoder_parameters():
            self._cache()
        elif frozen and model.normalizer.untouched:
            chunks = torch.cat(self.fitted).split(ENCODE_CHUNK)
            self._settle(self._encoded(chunk) for chunk in chunks[:: 1 + len(chunks) // model.normalizer.window])
        self._background = model.background(*views.size) if frozen else None
        self.steps_per_epoch = len(self._order(0))
        self._epoch: tuple[int, list] = (-1, [])

    @property
    def steps(self) -> int:
        return self.stage.epochs * self.steps_per_epoch

    @torch.no_grad()
    def _encoded(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.model.codec.encode(self._images(index))

    def _settle(self, encoded: Iterable[Tensor]) -> None:
        """A frozen codec's latents do not change, so its normaliser need not either: statistics are taken once."""
        for chunk in encoded:
            self.model.normalizer.update(chunk)

    def _cache(self) -> None:
        index = torch.cat(self.fitted)
        self._slot = torch.full((len(self.views.rgb),), -1)
        self._slot[index] = torch.arange(len(index))
        raw = [self._encoded(chunk) for chunk in index.split(ENCODE_CHUNK)]
        if self.model.normalizer.untouched:
            self._settle(raw)
        self._latents = torch.cat([self.model.normalizer.normalize(chunk) for chunk in raw])

    def _images(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.views.images(index).to(self.device).float() / 255

    def _order(self, epoch: int) -> list[tuple[list[int], list[Tensor]]]:
        """(scenes, their views) of every batch of an epoch: each view of each scene comes once, in chunks; a last
        chunk is filled up with the scene's first views."""
        generator = seeded("cpu", self.seed, self.stage.name, "order", epoch)
        size = self.stage.views
        shuffled = [fitted[torch.randperm(len(fitted), generator=generator)] for fitted in self.fitted]
        chunked = [views.repeat(2 + size // len(views))[: size * math.ceil(len(views) / size)].split(size) for views in shuffled]
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
        background = self._background if self._background is not None else self.model.background(*self.views.size)
        pixels = None
        if self.stage.rays:
            count = background.shape[1] * background.shape[2]
            generator = seeded("cpu", self.seed, self.stage.name, "rays", step)
            pixels = torch.randint(count, (len(index), min(self.stage.rays, count)), generator=generator).to(self.device)
        latents = self._latents[self._slot[index]] if self._latents is not None else None
        uncached = latents is None and bool(self.stage.losses.latent)
        return Batch(
            scenes=torch.tensor(scenes),
            cameras=self.views.cameras[index].to(self.device),
            background=background,
            images=self._images(index) if self.images_needed or uncached else None,
            latents=latents,
            pixels=pixels,
        )
