"""Odd views of a capture: they disagree with the others, their cameras miss, or their masks do not match.

A learned scene is compared with its fitted views at a grid of pixels around the box. A view is out of line if
its error exceeds both OUTLIER times the median over the scene's views and a floor. If colors are in line
where mask and scene overlap, it is the mask that does not match; otherwise the view disagrees with the
others.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.console import Spent
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.model.codec import COLORS
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.render import camera_rays
from latentscenes.training.batches import window
from latentscenes.training.corrections import ViewCorrections, summary
from latentscenes.training.losses import at_pixels

SIDE = 24
"""Pixels compared along each side of a view."""
OUTLIER = 4.0
"""Times the median error (6 dB) from which a view is out of line."""
COLOR_FLOOR, MASK_FLOOR = 0.04, 0.05
"""Smaller errors are never out of line: mean square of latents (20 dB in pixels), mean |opacity − alpha|."""
CHUNK = 8
"""Views rendered together."""


@dataclass(frozen=True)
class Findings:
    """Numbers of a scene's views (0: its first) with which something is wrong."""

    missing: list[int] = field(default_factory=list)
    """No ray of the object's silhouette (without silhouettes: of the view) meets the box."""
    disagreeing: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    """The mask does not match the learned object, but the colors do."""

    @property
    def views(self) -> list[int]:
        return sorted({*self.missing, *self.disagreeing, *self.masks})


@dataclass(frozen=True)
class FittedScene:
    """A learned scene."""

    scene: Scene
    """Its entry; its `fit` views are those that it was learned from."""
    parameters: SceneParameters
    """n = 1."""
    corrections: ViewCorrections | None
    """Those of its fitted views."""
    spent: Spent
    left_out: tuple[str, ...] = ()
    """Kinds of corrections that a trial found to bring nothing."""


def view_tags(fit: FittedScene, findings: Findings, left_out: bool, images: PosedImages) -> dict[str, Any]:
    """Returns a scene's tags `odd_views` and `view_corrections`, where there are any."""
    tags = {}
    if findings.views:
        tags["odd_views"] = {kind: views for kind, views in asdict(findings).items() if views}
        tags["odd_views"] |= {"left_out": True} if left_out else {}
    if fit.corrections is not None:
        cameras = images.cameras[torch.tensor(fit.scene.views("fit"))]
        tags["view_corrections"] = summary(fit.corrections, cameras)
    if fit.left_out:
        tags.setdefault("view_corrections", {})["left_out"] = list(fit.left_out)
    return tags


def diagnose(model: Model, images: PosedImages, fit: FittedScene) -> Findings:
    """Compares a learned scene with its fitted views."""
    index = torch.tensor(fit.scene.views("fit"))
    whole, inside, masks = view_errors(model, images, fit)
    color, odd = _out_of_line(inside, COLOR_FLOOR), _out_of_line(whole, COLOR_FLOOR)
    mask = torch.zeros_like(odd) if masks is None else _out_of_line(masks, MASK_FLOOR)
    missing = _missing(images, index, model.box_of(model.compose(fit.parameters))).to(odd.device)
    numbers = index - fit.scene.first
    kinds = (missing, ~missing & (color | odd & ~mask), ~missing & ~color & mask)
    return Findings(*(numbers[kind.cpu()].tolist() for kind in kinds))


@torch.no_grad()
def view_errors(
    model: Model, images: PosedImages, fit: FittedScene
) -> tuple[Float[Tensor, "v"], Float[Tensor, "v"], Float[Tensor, "v"] | None]:
    """Compares a learned scene with its v fitted views, corrected. Returns mean squared errors of latents
    over all compared pixels, and over those where mask and scene overlap; and the mean |opacity − alpha| if
    silhouettes are known."""
    index, corrections = torch.tensor(fit.scene.views("fit")), fit.corrections
    planes, background = model.compose(fit.parameters, bounded=True), model.background(*images.size)
    box, codec = model.box_of(planes), model.codec
    compared = codec.channels if codec.encodes_all else COLORS
    errors = []
    for rows in torch.arange(len(index)).split(CHUNK):
        some = index[rows]
        cameras = images.cameras[some].to(model.device)
        if corrections is not None:
            cameras = corrections.move(cameras, rows)
        pixels = _grid(cameras, box, *background.shape[1:])
        shown = model.render(planes, cameras, background, None, pixels)
        if corrections is not None:
            behind = at_pixels(background.expand(len(some), -1, -1, -1), pixels)
            shown = corrections.recolor(rows, shown, behind)
        truth = at_pixels(model.encode(images.images(some).to(model.device).float() / 255), pixels)
        alpha = _alpha(images, some, background.shape[1:], pixels)
        square = (shown.latents - truth)[..., :compared].square().mean(-1)
        inside = torch.ones_like(square)
        if alpha is not None:
            inside = ((alpha > 0.5) & (shown.opacity > 0.5)).float()
            alpha = (shown.opacity - alpha).abs().mean(1)
        errors.append([square.mean(1), (square * inside).sum(1) / inside.sum(1).clamp(min=1), alpha])
    whole, inside, masks = zip(*errors, strict=True)
    return torch.cat(whole), torch.cat(inside), None if masks[0] is None else torch.cat(masks)


def _out_of_line(errors: Float[Tensor, "v"], floor: float) -> Bool[Tensor, "v"]:
    return errors > (OUTLIER * errors.median()).clamp(min=floor)


def _grid(cameras: Cameras, box: Box, height: int, width: int) -> Int[Tensor, "v p"]:
    """Returns SIDE² pixels of each view, evenly in the rectangle around the box."""
    left, right, top, bottom = window(cameras, box.corners(), height, width)[..., None].unbind(1)
    places = (torch.arange(SIDE, device=left.device) + 0.5) / SIDE
    x, y = (left + places * (right - left)).long(), (top + places * (bottom - top)).long()
    return (y[:, :, None] * width + x[:, None]).flatten(1)


def _alpha(
    images: PosedImages, index: Int[Tensor, "v"], size: torch.Size, pixels: Int[Tensor, "v p"]
) -> Float[Tensor, "v p"] | None:
    """Returns the share of latent pixels that the silhouette covers; None if silhouettes are not known."""
    if images.alpha is None:
        return None
    alpha = torch.from_numpy(images.alpha[index.numpy()]).to(pixels.device).float()[:, None] / 255
    return torch.nn.functional.adaptive_avg_pool2d(alpha, size).flatten(1).gather(1, pixels)


def _missing(images: PosedImages, index: Int[Tensor, "v"], box: Box) -> Bool[Tensor, "v"]:
    """Returns for each view whether no ray of its silhouette, or without silhouettes of the view, meets the
    box."""
    found = []
    for view in index.split(1):
        rays = camera_rays(images.cameras[view], box.numbers[None], *images.size)
        meets = rays.far[0] > rays.near[0]
        if images.alpha is not None:
            meets &= torch.from_numpy(images.alpha[view.numpy()] > 127).flatten()
        found.append(~meets.any())
    return torch.stack(found)
