"""Corrections of views, learned with their scenes: exposures differ, and cameras are a little off.

Each fitted view has

    colors    c ↦ g ∘ c + o of the object's colors c in [0, 1], by channel: exposure and white balance
    camera    x ↦ b + exp(ω) (x − b) + ρ τ of its pose, b the center of the scene's box, ρ half its diagonal

All start at the identity. Few rays of a view are seen at a step, and a view only once per epoch, so both are
learned by second order. Colors are the least squares fit of the object's colors to the view's, over its rays
of all steps with fading weights. Cameras take parts of damped Gauss-Newton steps: with r the error of a ray
in c channels and J its derivative by (ω, τ), the kernel gives Jᵀr for each ray, and E[JᵀJ] ≈ c E[(Jᵀr)(Jᵀr)ᵀ
/ |r|²] for errors of random direction. Both are pulled to the identity.

A common part of all views would only move or recolor the scene. So the mean over a scene's views is
subtracted after each step.

Where nothing is wrong, corrections still lower the error of the views that they are learned from, a little,
and the scene gets worse. So short trials decide which kinds a scene keeps: those that lower this error
clearly.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Cameras
from latentscenes.core.config import Config, StageConfig
from latentscenes.core.config_checks import allows_corrections
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import Scene
from latentscenes.model.codec import COLORS
from latentscenes.model.model import LatentView
from latentscenes.training.losses import Batch, at_pixels

TRIAL = 0.3
"""Share of the epochs that a trial takes."""
HELPS = 0.8
"""A kind of corrections is kept if the error falls below this share of the error without it."""
REFINED = {"colors": 0.1, "cameras": 0.5}
"""Rates of corrections in `refining`."""
FEW_GAINS, FEW_OFFSETS = 0.001, 0.05
"""Pulls of colors to the identity: added to the mean squares of colors and of opacity."""
STAY = 3.0
"""Pull of cameras to where they were given: the curvature at which they go half the way."""
DAMPING = 0.2
"""Added to the curvature of cameras, for where a scene has no texture yet."""
REST = 0.1
"""Share of a stage at whose beginning cameras rest, so that the scene takes shape."""
MEMORY = 0.8
"""Weight of a camera's curvature from earlier steps."""
LONGEST = 0.02
"""Longest step of a camera, radians and halves of the box's diagonal."""


def refining(config: Config) -> Config:
    """Returns the configuration in which exploit stages also learn corrections of views, where their losses
    allow it: cameras, and where latents begin with colors also colors. If any exploit stage learns
    corrections already, the configuration is returned unchanged.

    Raises:
        UserError: the losses of no exploit stage allow it.
    """
    if corrects(config.exploit):
        return config
    if not any(map(allows_corrections, config.exploit)):
        raise UserError(
            "--refine: corrections of views are learned from losses.latent, or from losses.color with rays, "
            "but no exploit stage of this configuration has these losses without rgb, preview and depth_tv."
        )
    rates = {name: rate for name, rate in REFINED.items() if name != "colors" or config.codec.has_colors}
    stages = [
        dataclasses.replace(stage, rates=dataclasses.replace(stage.rates, **rates))
        if allows_corrections(stage)
        else stage
        for stage in config.exploit
    ]
    return dataclasses.replace(config, exploit=tuple(stages))


def corrects(stages: Sequence[StageConfig]) -> bool:
    """Whether any of these stages learns corrections."""
    return any(stage.rates.colors or stage.rates.cameras for stage in stages)


def kinds_of(stages: Sequence[StageConfig]) -> list[str]:
    """Returns the kinds of corrections that these stages learn."""
    return [kind for kind in REFINED if any(getattr(stage.rates, kind) for stage in stages)]


def limited(config: Config, kinds: Iterable[str], trial: bool = False) -> Config:
    """Returns the configuration whose exploit stages learn no other kinds of corrections. For a `trial`,
    stages are short and use no hulls, which moved cameras exclude, so that trials differ by corrections only;
    stages after the last that learns corrections are absent."""
    stages, none = config.exploit, {kind: 0.0 for kind in REFINED if kind not in kinds}
    if trial:
        last = max(k for k, stage in enumerate(stages) if corrects([stage]))
        stages = [_shortened(stage) for stage in stages[: last + 1]]
    stages = [dataclasses.replace(stage, rates=dataclasses.replace(stage.rates, **none)) for stage in stages]
    return dataclasses.replace(config, exploit=tuple(stages))


def _shortened(stage: StageConfig) -> StageConfig:
    names = ("epochs", "field_epochs", "weights_epochs")
    whole = {name: getattr(stage, name) for name in names}
    short = {name: max(1, round(TRIAL * epochs)) if epochs else epochs for name, epochs in whole.items()}
    return dataclasses.replace(stage, **short, hull=False)


def view_ranges(scenes: Sequence[Scene]) -> list[slice]:
    """Returns the rows of each scene's fitted views among the fitted views of all these scenes."""
    ends = torch.tensor([0] + [len(scene.views("fit")) for scene in scenes]).cumsum(0).tolist()
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


@dataclass
class ViewCorrections:
    """The corrections of v views. a and b are v, or 0 where no stage learns a table."""

    ranges: list[slice]
    """Rows of each scene."""
    boxes: Float[Tensor, "v 6"]
    """Center and half sides of the box of each view's scene."""
    colors: Float[Tensor, "a 2 3"]
    """g − 1 and o."""
    evidence: Float[Tensor, "a 5 3"]
    """Fading means over rays: products of color and opacity (three), and of both with what is missing."""
    cameras: Float[Tensor, "b 6"]
    """ω (radians) and τ (in halves of the box's diagonal), in world axes."""
    curvature: Float[Tensor, "b 6 6"]
    """Fading means of JᵀJ."""

    TABLES = ("colors", "evidence", "cameras", "curvature")

    @classmethod
    def none(
        cls, ranges: list[slice], boxes: Float[Tensor, "n 6"], stages: Sequence[StageConfig]
    ) -> "ViewCorrections":
        """Returns corrections that change nothing, of what the stages learn, for n scenes and their boxes."""
        count = ranges[-1].stop
        colors = count if any(stage.rates.colors for stage in stages) else 0
        cameras = count if any(stage.rates.cameras for stage in stages) else 0
        shapes = ((colors, 2, 3), (colors, 5, 3), (cameras, 6), (cameras, 6, 6))
        sizes = torch.tensor([rows.stop - rows.start for rows in ranges], device=boxes.device)
        tables = (torch.zeros(shape, device=boxes.device) for shape in shapes)
        return cls(ranges, boxes.repeat_interleave(sizes, 0), *tables)

    def of_scene(self, scene: int) -> "ViewCorrections":
        """Returns those of one scene."""
        rows = self.ranges[scene]
        tables = (getattr(self, name)[rows] for name in ("boxes", *self.TABLES))
        return ViewCorrections([slice(0, rows.stop - rows.start)], *tables)

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors, not copies, that every checkpoint holds."""
        return {f"views.{name}": getattr(self, name) for name in self.TABLES}

    def move(self, cameras: Cameras, rows: Int[Tensor, "v"]) -> Cameras:
        """Returns the cameras of the views at `rows`, corrected."""
        return moved(cameras, self.cameras[rows], self.boxes[rows]) if len(self.cameras) else cameras

    def recolor(
        self, rows: Int[Tensor, "v"], view: LatentView, behind: Float[Tensor, "#v p c"]
    ) -> LatentView:
        """Returns rendered views in corrected colors."""
        if not len(self.colors):
            return view
        gains, offsets = self.colors[rows].unbind(1)
        change = gains[:, None] * object_colors(view, behind) + offsets[:, None] * view.opacity[..., None]
        first, others = view.latents[..., :COLORS], view.latents[..., COLORS:]
        return view._replace(latents=torch.cat([first + 2 * change, others], -1))


def object_colors(view: LatentView, behind: Float[Tensor, "#v p c"]) -> Float[Tensor, "v p 3"]:
    """Returns the object's part Σ w c of the colors of rays, in [0, 1]."""
    opacity = view.opacity[..., None]
    return (view.latents[..., :COLORS] - (1 - opacity) * behind[..., :COLORS] + opacity) / 2


class Corrected:
    """The corrections of one batch's views at one step."""

    def __init__(self, all_views: ViewCorrections, batch: Batch, stage: StageConfig):
        self.all, self.rows, self.rates = all_views, batch.views, stage.rates
        self.weight = stage.losses.latent or stage.losses.color
        self.moves = stage.rates.cameras > 0
        cameras = all_views.move(batch.cameras, batch.views)
        self.batch = dataclasses.replace(batch, cameras=cameras, corrected=self)

    def recolored(self, view: LatentView, batch: Batch) -> LatentView:
        """Returns the rendered views in corrected colors. Keeps what `learn` needs."""
        self.view, self.behind = view, batch.behind
        if self.behind is None:
            self.behind = at_pixels(batch.background.expand(len(self.rows), -1, -1, -1), batch.pixels)
        return self.all.recolor(self.rows, view, self.behind)

    def compare(self, target: Float[Tensor, "v p c"]) -> None:
        """Keeps the target of the rendered latents, or of their first channels."""
        self.target = target

    @torch.no_grad()
    def learn(
        self, scenes: Int[Tensor, "s"], errors: Float[Tensor, "v p"], factor: float, progress: float
    ) -> None:
        """Updates the corrections from a step's rays, whose gradients are known, and their errors, at
        `factor` times the rates and a `progress` of the stage in [0, 1)."""
        rows = self.rows.tolist()  # a view may be twice in a batch
        first = torch.tensor(
            [k for k, row in enumerate(rows) if row not in rows[:k]], device=self.rows.device
        )
        if self.rates.colors:
            self._learn_colors(first)
        if self.rates.cameras and progress >= REST:
            self._learn_cameras(first, errors, factor)
        for scene in scenes.tolist():
            for table in (self.all.colors, self.all.cameras):
                if len(table):
                    table[self.all.ranges[scene]] -= table[self.all.ranges[scene]].mean(0)

    def _learn_colors(self, first: Int[Tensor, "n"]) -> None:
        colors = object_colors(self.view, self.behind)[first]
        missing = (self.target[..., :COLORS] - self.view.latents[..., :COLORS])[first] / 2
        rows, opacity = self.rows[first], self.view.opacity[first, :, None].expand_as(colors)
        pairs = (colors, colors), (colors, opacity), (opacity, opacity), (colors, missing), (opacity, missing)
        newest = torch.stack([(a * b).mean(1) for a, b in pairs], 1)
        self.all.evidence[rows] = torch.lerp(self.all.evidence[rows], newest, self.rates.colors)
        cc, co, oo, cm, om = self.all.evidence[rows].unbind(1)
        cc, oo = cc + FEW_GAINS, oo + FEW_OFFSETS
        determinant = cc * oo - co * co
        gains, offsets = (oo * cm - co * om) / determinant, (cc * om - co * cm) / determinant
        self.all.colors[rows] = torch.stack([gains, offsets], 1)

    def _learn_cameras(self, first: Int[Tensor, "n"], errors: Float[Tensor, "v p"], factor: float) -> None:
        rows, channels = self.rows[first], self.target.shape[-1]
        slopes = self._slopes()[first] / self.weight  # of the mean square of errors
        slopes = slopes * (errors.numel() * channels / 2)
        length = (channels * errors[first]).sqrt().clamp(min=1e-4)[..., None]
        unit = slopes / length
        newest = channels * (unit.mT @ unit) / errors.shape[1]
        old = self.all.curvature[rows]
        fresh = (old.abs().amax((1, 2)) == 0)[:, None, None]
        self.all.curvature[rows] = torch.where(fresh, newest, torch.lerp(newest, old, MEMORY))
        pulled = slopes.mean(1) + STAY * self.all.cameras[rows]
        damped = self.all.curvature[rows] + DAMPING * torch.eye(6, device=rows.device)
        step = self.rates.cameras * factor**2 * torch.linalg.solve(damped, pulled)
        self.all.cameras[rows] -= step * (LONGEST / step.norm(dim=1, keepdim=True).clamp(min=LONGEST))

    def _slopes(self) -> Float[Tensor, "v p 6"]:
        """Returns the loss's gradient by ω and τ of each ray of the batch.

        Rays are in box coordinates: the origin from the center by half sides, the direction times a scene's
        unit by half sides. The gradient by the direction divides by this unit again, so it cancels out.
        """
        half, rays = self.all.boxes[self.rows, None, 3:], self.view.rays
        leaves = rays.origins, rays.directions
        place, toward = (leaf.view(len(half), -1, 3) * half for leaf in leaves)
        by_place, by_toward = (leaf.grad.view(len(half), -1, 3) / half for leaf in leaves)
        turn = torch.linalg.cross(place, by_place) + torch.linalg.cross(toward, by_toward)
        return torch.cat([turn, half.norm(dim=-1, keepdim=True) * by_place], -1)


def moved(cameras: Cameras, motion: Float[Tensor, "v 6"], boxes: Float[Tensor, "v 6"]) -> Cameras:
    """Returns cameras after their motions ω, τ in the boxes of their scenes."""
    x, y, z = motion[:, :3].unbind(1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    turn, center, half = torch.linalg.matrix_exp(skew), boxes[:, :3], boxes[:, 3:]
    offset = (turn @ (cameras.positions - center)[:, :, None])[:, :, 0]
    position = center + offset + half.norm(dim=1, keepdim=True) * motion[:, 3:]
    return Cameras(
        torch.cat([turn @ cameras.cam2world[:, :, :3], position[:, :, None]], 2), cameras.intrinsics
    )


def summary(corrections: ViewCorrections, cameras: Cameras) -> dict[str, list[float]]:
    """Returns how strong the corrections of a scene's views are, by their given cameras: median and maximum
    of the cameras' turns (degrees) and ways (percent of the box's diagonal); least and largest gain and
    offset over views and channels."""
    spread = {}
    if len(corrections.cameras):
        turns = corrections.cameras[:, :3].norm(dim=1).rad2deg()
        ways = moved(cameras, corrections.cameras, corrections.boxes).positions - cameras.positions
        ways = 100 * ways.norm(dim=1) / (2 * corrections.boxes[:, 3:].norm(dim=1))
        spread |= {"turned_degrees": (turns.median(), turns.max())}
        spread |= {"moved_percent": (ways.median(), ways.max())}
    if len(corrections.colors):
        gains, offsets = 1 + corrections.colors[:, 0], corrections.colors[:, 1]
        spread |= {"gains": (gains.min(), gains.max()), "offsets": (offsets.min(), offsets.max())}
    return {name: [round(value.item(), 3) for value in pair] for name, pair in spread.items()}
