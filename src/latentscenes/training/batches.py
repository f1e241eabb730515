"""Batches of training data: several views of each of a few scenes. Their order depends only on the seed."""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Cameras, box_corners
from latentscenes.core.config import StageConfig
from latentscenes.core.runtime import Numbers, SlicedGenerator, machine_memory, seeded, uniform
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.model.codec import COLORS
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.training.distributed import ALONE, Team
from latentscenes.training.hulls import Hulls
from latentscenes.training.losses import Batch, at_pixels, needs_images

ENCODE_CHUNK = 32
"""Images encoded together when latents are cached."""


@dataclass(frozen=True)
class TrainingScenes:
    """Scenes to learn. Row k of the parameters belongs to the k-th of the scenes in `entries`, of the dataset
    `images`, that this process of a team owns: usually to `entries[k]`."""

    parameters: SceneParameters
    images: PosedImages
    entries: Sequence[Scene]
    team: Team = ALONE


class BatchSource:
    """The batches of one stage. If the encoder is frozen, latents are computed once and cached."""

    def __init__(
        self, model: Model, scenes: TrainingScenes, stage: StageConfig, seed: int, scratch: Path,
        on_progress: Callable[[], None] | None = None,
    ):  # fmt: skip
        """Latents that would fill more than a quarter of the memory go to a temporary file in `scratch`.
        `on_progress` is called after each chunk of images that is encoded."""
        self.on_progress = on_progress or (lambda: None)
        images = scenes.images
        boxes = scenes.parameters.box
        self._corners = box_corners(boxes) if boxes.numel() else model.box.corners().expand(len(boxes), 8, 3)
        self.model, self.images, self.stage, self.seed = model, images, stage, seed
        self.team = scenes.team
        self.device, self.scratch = model.device, scratch
        self.fitted = [torch.tensor(scene.views("fit")) for scene in scenes.entries]
        owned = self.team.owned(len(self.fitted)).tolist()
        self._own = torch.cat([self.fitted[scene] for scene in owned])
        self._slot = torch.full((len(images.rgb),), -1)  # rank of each fitted view of own scenes among them
        self._slot[self._own] = torch.arange(len(self._own))
        self.focus = ErrorGuidedSampling(len(self._own), stage.focus, self.device) if stage.focus else None
        self._hulls = None
        if stage.hull and images.alpha is not None and not stage.rates.cameras:
            own = boxes if boxes.numel() else model.box.numbers.expand(len(boxes), 6)
            self._hulls = Hulls(images, [scenes.entries[scene] for scene in owned], own)
        self.images_needed = needs_images(stage.losses) or stage.losses.color and not stage.rays
        frozen = stage.rates.encoder == 0 or not model.codec.encoder_parameters()
        only_latents = stage.losses.latent and not (stage.losses.autoencoder or stage.losses.equivariance)
        self._latents = None
        self._frozen = frozen and only_latents
        if self._frozen and model.codec.encoder_parameters():
            self._cache()
        elif frozen and model.normalizer.has_no_statistics:
            chunks = torch.cat(self.fitted).split(ENCODE_CHUNK)
            self._set_statistics(chunks[:: 1 + len(chunks) // model.normalizer.window])
        self._pixelwise = bool(stage.rays and stage.losses.color)
        self._size = images.size
        if self._pixelwise:  # as many rays as pixels, though a codec has fewer latents
            self._size = tuple(side * model.codec.downsampling for side in images.size)
        self._background = model.background(*self._size) if frozen else None
        self.steps_per_epoch = len(self._order(0))
        self._epoch: tuple[int, list] = (-1, [])

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors, not copies, that later batches depend on."""
        return {"focus.errors": self.focus.errors} if self.focus else {}

    @property
    def steps(self) -> int:
        return self.stage.epochs * self.steps_per_epoch

    @torch.no_grad()
    def _encoded(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.model.codec.encode(self._images(index))

    def numbers(self, purpose: str, step: int, device: torch.device | str = "cpu") -> Numbers:
        """Returns the random numbers of a step, for the scenes that this process owns."""
        generator = seeded(device, self.seed, self.stage.name, purpose, step)
        if self.team.count == 1:
            return generator
        scenes, _ = self._at(step)
        return SlicedGenerator(generator, self.team.places(scenes), len(scenes))

    def _set_statistics(self, chunks: Iterable[Tensor]) -> None:
        """Sets the normalizer's statistics from views. Once is enough for a frozen codec."""
        for chunk in chunks:
            self.model.normalizer.update(self._encoded(chunk))
            self.on_progress()

    def _cache(self) -> None:
        if self.model.normalizer.has_no_statistics:
            self._set_statistics(torch.cat(self.fitted).split(ENCODE_CHUNK))
        index = self._own
        chunks = index.split(ENCODE_CHUNK)
        background = self.model.background(*self.images.size)
        self._latents = self._allocate(len(index), background[0].numel(), len(background))
        for chunk, place in zip(chunks, torch.arange(len(index)).split(ENCODE_CHUNK), strict=True):
            self._latents[place] = at_pixels(self.model.normalizer.normalize(self._encoded(chunk)))
            self.on_progress()

    def _allocate(self, *shape: int) -> Tensor:
        if 4 * math.prod(shape) <= machine_memory() // 4:
            return torch.empty(shape, device=self.device)
        file = tempfile.TemporaryFile(dir=self.scratch)  # the system removes it with the process
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))

    def _images(self, index: Int[Tensor, "n"]) -> Tensor:
        return self.images.images(index).to(self.device).float() / 255

    def _order(self, epoch: int) -> list[tuple[list[int], list[Tensor]]]:
        """Returns the scenes of every batch of an epoch, and the views of each. Every view comes once, but a
        scene's last chunk is filled up with the first views of its order."""
        # Views of each scene in random order, cut into chunks
        generator = seeded("cpu", self.seed, self.stage.name, "order", epoch)
        size = self.stage.views
        shuffled = [fitted[torch.randperm(len(fitted), generator=generator)] for fitted in self.fitted]
        chunked = [
            views.repeat(2 + size // len(views))[: size * math.ceil(len(views) / size)].split(size)
            for views in shuffled
        ]

        # Chunk after chunk, batches of scenes in random order
        batches = []
        for turn in range(max(map(len, chunked))):
            present = [scene for scene, chunks in enumerate(chunked) if turn < len(chunks)]
            mixed = [present[k] for k in torch.randperm(len(present), generator=generator).tolist()]
            for start in range(0, len(mixed), self.stage.scenes):
                group = mixed[start : start + self.stage.scenes]
                batches.append((group, [chunked[scene][turn] for scene in group]))
        return batches

    def _at(self, step: int) -> tuple[list[int], list[Tensor]]:
        """Returns the scenes of a step, and the views of each."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][place]

    def batch(self, step: int) -> Batch | None:
        """Returns the batch of a step (0 = first of the stage): its scenes that this process owns. None if it
        owns none of them."""
        # Scenes and views
        whole, chunks = self._at(step)
        places = self.team.places(whole)
        if not places:
            return None
        scenes = [self.team.row(whole[place]) for place in places]
        index = torch.cat([chunks[place] for place in places])
        background = self._background
        if background is None:
            background = self.model.background(*self._size)
        cameras = self.images.cameras[index].to(self.device)

        # Rays
        stage, views = self.stage, self._slot[index].to(self.device)
        pixels, cells, grid = None, None, None
        if stage.rays or stage.crop:
            corners, size = self._corners[scenes].repeat_interleave(stage.views, 0), background.shape[1:]
            edges = window(cameras, corners, *size)
            if stage.rays:
                pixels, cells = self._pixels(edges, tuple(size), step, views)
            else:
                pixels, cells, grid = self._crops(edges, tuple(size), step, views)

        # Targets
        images = latents = colors = behind = None
        if self._frozen and stage.losses.latent:
            latents = self._targets(index, pixels)
        if self._pixelwise:
            colors = self._colors(index, pixels)
        if self.images_needed or latents is None and stage.losses.latent:
            images = self._images(index) if grid is None else self._cropped(index, pixels, grid)
        if stage.random_background and self.images.alpha is not None:
            behind, change = self._recoloring(background, index, pixels, step)
            if self._pixelwise:
                colors = colors + change
            else:
                latents = latents + change
        return Batch(
            torch.tensor(scenes), cameras, background, images, latents, pixels, grid, colors, views, cells,
            behind, self._hulls and self._hulls.of(scenes).to(self.device), share=len(scenes) / len(whole),
        )  # fmt: skip

    def learn(self, batch: Batch, errors: Float[Tensor, "v p"] | None) -> None:
        """Updates the error map of error-guided sampling from the errors of a batch's rays."""
        if self.focus:
            self.focus.learn(batch.views, batch.cells, errors)

    def _pixels(
        self, edges: Float[Tensor, "v 4"], size: tuple[int, int], step: int, views: Int[Tensor, "v"]
    ) -> tuple[Int[Tensor, "v p"], Int[Tensor, "v p"] | None]:
        """Draws pixels of each view from the rectangle with these edges (see `window`), or from the whole
        view if rays do not end at the box. With error-guided sampling, also returns their cells."""
        height, width = size
        generator = self.numbers("rays", step)
        count = min(self.stage.rays, height * width)
        x, y, cells = *uniform(generator, 2, len(views), count, axis=1).to(self.device), None
        if self.focus:
            u = uniform(generator, len(views), count).to(self.device)
            x, y, cells = self.focus.draw(views, x, y, u)
        if self.model.config.render.near is not None:
            return (y * height).long() * width + (x * width).long(), cells
        left, right, top, bottom = edges[..., None].unbind(1)
        return (top + y * (bottom - top)).long() * width + (left + x * (right - left)).long(), cells

    def _crops(
        self, edges: Float[Tensor, "v 4"], size: tuple[int, int], step: int, views: Int[Tensor, "v"]
    ) -> tuple[Int[Tensor, "v p"], Int[Tensor, "v p"] | None, tuple[int, int]]:
        """Draws a square of each view inside the rectangle with these edges (see `window`), or over it where
        that is smaller. Returns its pixels, their cells with error-guided sampling, its rows and columns."""
        height, width = size
        generator = self.numbers("crops", step)
        x, y = uniform(generator, 2, len(views), 1, axis=1).to(self.device)
        if self.focus:
            u = uniform(generator, len(views), 1).to(self.device)
            x, y, _ = self.focus.draw(views, x, y, u)
        grid = (min(self.stage.crop, height), min(self.stage.crop, width))
        left, right, top, bottom = edges[..., None].unbind(1)

        def placed(low: Tensor, high: Tensor, place: Tensor, side: int, most: int) -> Tensor:
            middle = low + place * (high - low)
            least = low.minimum((low + high - side) / 2)
            start = (middle - side / 2).maximum(least).minimum((high - side).maximum(least))
            return start.round().long().clamp(0, most - side) + torch.arange(side, device=low.device)

        rows = placed(top, bottom, y, grid[0], height)
        columns = placed(left, right, x, grid[1], width)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        if not self.focus:
            return pixels, None, grid
        down, across = (
            ((places + 0.5 - low) / (high - low) * SIDE).long().clamp(0, SIDE - 1)
            for places, low, high in ((rows, top, bottom), (columns, left, right))
        )
        return pixels, (down[:, :, None] * SIDE + across[:, None, :]).flatten(1), grid

    def _cropped(
        self, index: Int[Tensor, "v"], pixels: Int[Tensor, "v p"], grid: tuple[int, int]
    ) -> Float[Tensor, "v 3 H W"]:
        """Returns the part of images that the latents of a crop stand for."""
        step, width = self.model.codec.downsampling, self.images.size[1]
        first = pixels[:, :1].cpu()
        top, left = first // (width // step) * step, first % (width // step) * step
        rows = top + torch.arange(grid[0] * step)
        columns = left + torch.arange(grid[1] * step)
        found = self.images.pixels(index, (rows[:, :, None] * width + columns[:, None, :]).flatten(1))
        sides = (grid[0] * step, grid[1] * step)
        return found.to(self.device).float().div(255).transpose(1, 2).unflatten(2, sides).contiguous()

    def _colors(self, index: Int[Tensor, "v"], pixels: Int[Tensor, "v p"]) -> Float[Tensor, "v p 3"]:
        """Returns 2 · color − 1 of some pixels of images."""
        return 2 * (self.images.pixels(index, pixels.cpu()).to(self.device).float() / 255) - 1

    def _recoloring(
        self,
        background: Float[Tensor, "c h w"],
        index: Int[Tensor, "v"],
        pixels: Int[Tensor, "v p"],
        step: int,
    ) -> tuple[Float[Tensor, "v p c"], Float[Tensor, "v p 3"]]:
        """Puts random colors, uniform in (−1, 1), behind some rays. Returns what is behind the rays, and by
        how much the colors of their pixels change.

        Stored images are over white: c + (1 − α). So the background can be replaced.
        """
        generator = self.numbers("behind", step)
        behind = background.flatten(1).t()[pixels]
        white = behind[..., :COLORS]
        colors = 2 * uniform(generator, *white.shape).to(self.device) - 1
        chosen = uniform(generator, *pixels.shape).to(self.device) < self.stage.random_background
        seen = torch.where(chosen[..., None], colors, white)
        clear = 1 - self.images.pixel_alpha(index, pixels.cpu()).to(self.device).float()[..., None] / 255
        return torch.cat([seen, behind[..., COLORS:]], -1), clear * (seen - white)

    @torch.no_grad()
    def _targets(self, index: Int[Tensor, "v"], pixels: Int[Tensor, "v p"] | None) -> Float[Tensor, "v p c"]:
        """Returns the normalized latents of some pixels, or of all."""
        if self._latents is not None:
            slot = self._slot[index]
            place = slot if pixels is None else (slot[:, None], pixels.to(slot.device))
            return self._latents[place].to(self.device)
        if pixels is None:
            return at_pixels(self.model.encode(self._images(index)))
        # A codec without encoder works pixel by pixel
        colors = self.images.pixels(index, pixels.cpu()).to(self.device).float() / 255
        return at_pixels(self.model.encode(colors.transpose(1, 2)[:, :, None]))


def window(
    cameras: Cameras, corners: Float[Tensor, "8 3"] | Float[Tensor, "v 8 3"], height: int, width: int
) -> Float[Tensor, "v 4"]:
    """Returns left, right, top and bottom of the rectangle of pixels around the corners of a box, the same
    for all views or one each; or of the whole view if a corner is behind the camera."""
    points, depth = cameras.project(corners.to(cameras.cam2world.device))
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
"""Power of errors in the sampling probabilities. With 1, regions with small errors would get too few rays."""
MEMORY = 0.5
"""Weight of a cell's old error when new rays hit the cell."""
LEAST = 1e-12
"""Lower bound of errors. A view without errors is sampled evenly."""


class ErrorGuidedSampling:
    """Error-guided sampling: draws more rays in cells of a view where earlier rays had larger errors. Its
    state is `errors`, the error map of n views."""

    def __init__(self, views: int, share: float, device: torch.device):
        """A `share` in [0, 1] of the rays is drawn by errors, the others uniformly."""
        self.share = share
        self.errors: Float[Tensor, "n c"] = torch.ones(views, SIDE * SIDE, device=device)

    def draw(
        self,
        views: Int[Tensor, "v"],
        x: Float[Tensor, "v p"],
        y: Float[Tensor, "v p"],
        u: Float[Tensor, "v p"],
    ) -> tuple[Float[Tensor, "v p"], Float[Tensor, "v p"], Int[Tensor, "v p"]]:
        """Draws p places per view from uniform numbers x, y, u in [0, 1). Returns them as fractions of the
        rectangle's sides, and their cells. Sampling is stratified: cell k lies at (k + u) / p of the
        cumulative probability."""
        # Probabilities of cells
        powers = self.errors[views].clamp(min=LEAST) ** EXPONENT
        chances = (1 - self.share) / powers.shape[1] + self.share * powers / powers.sum(1, keepdim=True)

        # Cells, then places in them
        upper = chances.cumsum(1)
        strata = (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1]
        cells = torch.searchsorted(upper, strata * upper[:, -1:], right=True).clamp_(max=powers.shape[1] - 1)
        return (cells % SIDE + x) / SIDE, (cells // SIDE + y) / SIDE, cells

    def learn(self, views: Int[Tensor, "v"], cells: Int[Tensor, "v p"], errors: Float[Tensor, "v p"]) -> None:
        """Updates the per-cell error map from the errors of rays through some cells of (different) views."""
        count = self.errors.shape[1]
        at = (torch.arange(len(views), device=cells.device)[:, None] * count + cells).flatten()
        rays = torch.bincount(at, minlength=len(views) * count).view(len(views), count)
        sums = torch.bincount(at, errors.flatten(), len(views) * count).view(len(views), count)
        old = self.errors[views]
        new = MEMORY * old + (1 - MEMORY) * sums / rays.clamp(min=1)
        self.errors[views] = torch.where(rays > 0, new, old)
