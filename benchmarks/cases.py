"""Steps and views that `benchmarks.speed` times, in the published sizes, on synthetic targets."""

import copy
import dataclasses
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.roofline import StepCost, step_cost
from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, orbit, upper_hemisphere
from latentscenes.core.config import Config, Kernel
from latentscenes.core.runtime import seeded, set_up
from latentscenes.model.model import Model
from latentscenes.model.planes import random_parameters
from latentscenes.rendering.kernels import native
from latentscenes.storage.row_files import rows_on_disk
from latentscenes.training.loop import StageLearner
from latentscenes.training.losses import Batch, needs_images

LATENT = """
codec: {kind: convolutional, downsampling: 8, channels: 4}
planes: {resolution: 64, micro: 10, macro: 22, bases: 50}
render: {coarse: 48, fine: 48}
train:
  - name: scenes
    epochs: 1
    scenes: 4
    views: 8
    losses: {latent: 1, tv: 1e-4}
    rates: {micro: 1e-2, weights: 1e-2, bases: 1e-2, field: 1e-2}
"""
"""Step 1a as published: 32 views of 16x16x4 latents, 48 + 48 samples, R = 64, 10 + 22 features, M = 50."""

RGB = """
codec: {kind: identity}
planes: {resolution: 64, micro: 32, macro: 0}
render: {coarse: 48, fine: 48}
train:
  - name: fit
    epochs: 1
    scenes: 1
    views: 1
    losses: {latent: 1, tv: 1e-4}
    rates: {micro: 1e-2, field: 1e-2}
"""
"""RGB tri-planes: one view of 128x128 rays a step."""

STAGES = {
    "codec": "losses: {autoencoder: 1, equivariance: 1}\n    rates: {encoder: 1e-3, decoder: 1e-3}",
    "1b, joint": "losses: {latent: 1, rgb: 1, autoencoder: 0.1, tv: 1e-4}\n"
    "    rates: {encoder: 1e-4, decoder: 1e-4, micro: 1e-3, weights: 1e-2, bases: 1e-2, field: 1e-3}",
    "2a, latent fit, as published": "losses: {latent: 1}\n"
    "    rates: {micro: 1e-2, weights: 1e-2, bases: 1e-2, field: 1e-2}",
    "2a, latent fit, shared parts frozen": "losses: {latent: 1}\n    rates: {micro: 1e-2, weights: 1e-2}",
    "2b, RGB alignment, as published": "losses: {rgb: 1}\n"
    "    rates: {decoder: 1e-4, micro: 1e-3, weights: 1e-2, bases: 1e-2, field: 1e-3}",
    "2b, RGB alignment, shared parts frozen": "losses: {rgb: 1}\n    rates: {micro: 1e-3, weights: 1e-2}",
}
"""The other stages, in the sizes of step 1a."""

SIZE = 128
BOX = Box((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
POOL = 20
"""Number of scenes that have targets; scene s uses the targets of s mod POOL."""


class Steps:
    """Training steps over N scenes of synthetic ellipsoids, seen at the resolution of the latents."""

    def __init__(
        self, text: str, scenes: int, kernel: Kernel = "auto", folder: Path | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        """With a folder, micro planes and their Adam moments lie in files there, as for more scenes than
        memory holds."""
        self.config = config_io.parse(text, "bench", [f"render.kernel={kernel}"])
        self.stage, self.device = self.config.train[0], device
        self.model = Model(self.config, BOX).to(device)
        self.model.train()
        if folder is None:
            self.rows, files = random_parameters(scenes, self.config.planes, seeded("cpu", "rows")), None
        else:
            self.rows, files = rows_on_disk(folder, scenes, self.config.planes, seeded("cpu", "rows"))
        self.rows = self.rows if folder else self.rows.to(device)
        self.learner = StageLearner(self.model, self.rows, self.stage, files)
        self.background = self.model.background(SIZE, SIZE)
        made = [_made_views(self.stage.views, scene, self.background.cpu()) for scene in range(POOL)]
        self.cameras = Cameras(
            torch.cat([views.cam2world for views, _ in made]),
            torch.cat([views.intrinsics for views, _ in made]),
        )
        self.latents = torch.cat([latents for _, latents in made]).to(device)
        self.images = None
        if needs_images(self.stage.losses) or self.stage.rates.encoder:
            white = torch.ones(3, SIZE, SIZE)
            seen = torch.cat([_made_views(self.stage.views, scene, white)[1] for scene in range(POOL)])
            self.images = (seen.to(device).transpose(1, 2).unflatten(2, (SIZE, SIZE)) + 1) / 2
        self.count = 0

    def batch(self, step: int) -> Batch:
        """A random batch of scenes and their views, with as many rays of each view as the stage uses."""
        generator = seeded("cpu", "order", step)
        index = torch.randperm(len(self.rows), generator=generator)[: self.stage.scenes]
        views = (index[:, None] % POOL * self.stage.views + torch.arange(self.stage.views)).flatten()
        images = None if self.images is None else self.images[views]
        latents, pixels = None if self.stage.rates.encoder else self.latents[views], None
        if self.stage.rays:
            pixels = torch.randint(self.latents.shape[1], (len(views), self.stage.rays), generator=generator)
            pixels = pixels.to(self.device)
            latents = latents.gather(1, pixels[..., None].expand(-1, -1, latents.shape[2]))
        return Batch(index, self.cameras[views].to(self.device), self.background, images, latents, pixels)

    def step(self) -> None:
        self.learner.step(self.batch(self.count), 1.0, seeded(self.device, "step", self.count))
        self.count += 1

    def warmed(self, steps: int) -> "Steps":
        """Takes some steps, so that densities have formed, as during most of a training."""
        for _ in range(steps):
            self.step()
        return self

    def twin(self, kernel: Kernel, shortcuts: bool = True) -> "Steps":
        """Copies the state to continue with another kernel, or without the shortcuts of StageLearner."""
        other = copy.copy(self)
        other.model, other.rows = copy.deepcopy(self.model), copy.deepcopy(self.rows)
        other.model.config = with_kernel(self.config, kernel)
        other.learner = StageLearner(other.model, other.rows, self.stage, shortcuts=shortcuts)
        return other

    def switched(self, switch: tuple[object, str, object]) -> Callable[[], None]:
        """Returns a step with an attribute (owner, name, value) replaced, which turns one fast part off."""
        twin = self.twin("native")

        def step() -> None:
            with patch.object(*switch):
                twin.step()

        return step

    def rendering_cost(self) -> tuple[StepCost, float, float]:
        """Returns the cost of rendering in a step, and the fractions of samples that forward and backward
        evaluate."""
        self.twin("native").step()
        settings, planes = self.config.render, self.config.planes
        each, samples = self.stage.rays or self.background[0].numel(), settings.coarse + settings.fine
        rays = self.stage.views * each
        points = self.stage.scenes * rays * samples
        forward, backward = (native.evaluated(backward) / points for backward in (False, True))
        sizes = (planes.resolution, planes.features, self.config.field.hidden, self.model.codec.channels)
        return step_cost(self.stage.scenes, rays, samples, *sizes, kept=backward), forward, backward

    def other_bytes(self) -> int:
        """Memory traffic besides rendering, with one transfer per array: fusion and its gradient, total
        variation, Adam."""
        shared, scene = self.model.bases.numel(), self.rows.micro[0].numel()
        fused = self.stage.scenes * 3 * self.config.planes.resolution**2 * self.config.planes.features
        adam = 7 * (shared + self.stage.scenes * scene)  # 4 reads, 3 writes per value
        return 4 * (3 * shared + 2 * self.stage.scenes * scene + 5 * fused + adam)


def stage_text(stage: str) -> str:
    """LATENT with another stage."""
    return LATENT[: LATENT.index("    losses:")] + f"    {STAGES[stage]}\n"


def fitting_text(resting: bool) -> str:
    """The stage in which preset `small` fits new scenes, with weights that learn or (as in most of the stage)
    rest."""
    config = config_io.load("small")
    stage = config.exploit[0]
    rates = dataclasses.replace(stage.rates, weights=0.0 if resting else stage.rates.weights)
    return config_io.dump(
        dataclasses.replace(config, train=(dataclasses.replace(stage, rates=rates),), exploit=())
    )


class Viewer:
    """A partly learned scene in the sizes of a preset, rendered from changing cameras."""

    def __init__(self, preset: str, steps: int = 60):
        own = ["codec.kind=convolutional", "codec.path=null", "codec.downsampling=8", "codec.channels=4"]
        config = config_io.load(preset, own if preset == "paper" else [])
        stage = config_io.parse(LATENT, "bench").train[0]
        stage = dataclasses.replace(
            stage, scenes=1, views=2, rates=dataclasses.replace(stage.rates, micro=0.3)
        )
        alone = dataclasses.replace(config, train=(stage,), exploit=(), exploit_fresh_field=False)
        learned = Steps(config_io.dump(alone), 1).warmed(steps)
        self.config, self.background = config, learned.background
        self.model = learned.model.eval().requires_grad_(False)
        self.planes = self.model.compose(learned.rows)
        self.cameras, self.count = orbit(24), 0

    @torch.inference_mode()
    def view(self) -> Float[Tensor, "1 3 H W"]:
        """Renders the next view around the object."""
        self.count = (self.count + 1) % len(self.cameras)
        view = self.model.render(self.planes, self.cameras[self.count : self.count + 1], self.background)
        return self.model.decode(view.image(*self.background.shape[1:]))

    def describe(self) -> str:
        channels, height, width = self.background.shape
        samples = f"{self.config.render.coarse} + {self.config.render.fine} samples"
        return f"{height}x{width}x{channels} latents, {samples}"


def report_memory(threads: int, count: int) -> None:
    """Takes some steps of 1a and prints as JSON the bytes of rows and their moments and the peak of this
    process."""
    set_up(threads)
    steps = Steps(LATENT, count).warmed(30)
    tables = [*steps.rows.tables().values(), *steps.learner.own.state().values()]
    rows = sum(table.numel() * table.element_size() for table in tables)
    print(json.dumps({"rows": rows, "peak": peak_memory()}))


def peak_memory() -> int:
    """Peak memory of this process in bytes. On Linux it is read from /proc, since getrusage may report the
    peak of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def with_kernel(config: Config, kernel: Kernel) -> Config:
    return dataclasses.replace(config, render=dataclasses.replace(config.render, kernel=kernel))


def _made_views(
    count: int, scene: int, background: Float[Tensor, "c h w"]
) -> tuple[Cameras, Float[Tensor, "v p c"]]:
    """Views of an ellipsoid whose latent is a smooth function of position on its surface, over the
    background."""
    generator = seeded("cpu", "object", scene)
    cameras = upper_hemisphere(count, generator)
    radii = 0.12 + 0.25 * torch.rand(3, generator=generator)
    channels, height, width = background.shape
    colors = 0.8 * torch.randn(channels, 3, generator=generator) / math.sqrt(3)
    origins, directions = cameras.rays(height, width)
    o, d = origins / radii, directions / radii
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    inside = b * b - a * c
    t = (-b - inside.clamp(min=0).sqrt()) / a
    surface = o + t[..., None] * d
    latents = torch.where(
        (inside > 0)[..., None], torch.sin(2 * surface @ colors.t()), background.flatten(1).t()
    )
    return cameras, latents
