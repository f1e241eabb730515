"""Fits splats to pictures of their scene: places, sizes, opacities, colors follow gradients of the error.

Notable:
- Pictures of splats are computed as by Kerbl et al. (arXiv 2308.04079, section 4). Viewers widen small splats
  by different low-passes; each step draws one of them, so that no splat relies on a single viewer.
- A splat and a pixel that it touches are a pair. Pairs are sorted by pixel and distance, so the light that
  passes all splats before a pair is a difference of running sums of logarithms.
- Backgrounds change from step to step, so that no splat imitates one.
- Each step renders one picture of the scene; nothing grows with the number of pictures.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.export.splats import Splats
from latentscenes.export.video import scaled
from latentscenes.model.model import render_images
from latentscenes.model.pictures import with_alpha
from latentscenes.storage.scene_set import SceneSet

ROUNDS = 2
"""Rounds over all pictures where nothing else is asked for."""
MOST = 100_000
"""Most splats of a fit: a step holds some hundred bytes for each pair, and about 30 pairs for each splat."""
FINER, FINEST = (2, 3), 1024
"""A fit sees pictures with these multiples of the dataset's pixels on each side, up to so many."""
LOW_PASSES = (0.3, False), (0.3, True), (0.075, False)
"""Variances that viewers add in the picture, square pixels, and whether they lower opacities by as much as
a splat grows: first as published, then as in Mip-Splatting (arXiv 2311.16493) and Spark, then PlayCanvas."""
REACH = 3.0
"""Standard deviations at which a splat ends."""
FAINTEST = 1 / 255
"""Pairs of lower opacity are left out."""
DARK = 0.01
"""Pairs that less light reaches are left out."""
RATES = {"place": 0.1, "scale": 0.02, "opacity": 0.1, "color": 0.02}
"""Steps of Adam: of places in median standard deviations, of logarithms of scales, of opacities before the
sigmoid, and of sRGB values. They fall linearly to a twentieth."""


class ProjectedSplats(NamedTuple):
    """Splats as a camera sees them, n each; pixels."""

    middle: Float[Tensor, "n 2"]
    variance: Float[Tensor, "n 3"]
    """Along x, along y, and between both."""
    distance: Float[Tensor, "n"]
    """From the camera; infinite behind it."""
    share: Float[Tensor, "n"]
    """The share of opacity that the low-pass leaves."""


def project(
    positions: Float[Tensor, "n 3"],
    axes: Float[Tensor, "n 3 3"],
    camera: Cameras,
    size: tuple[int, int],
    low_pass: tuple[float, bool] = LOW_PASSES[0],
) -> ProjectedSplats:
    """Projects splats; `axes` are their ellipsoids' axes as columns, as long as the standard deviations.
    `low_pass` is one of LOW_PASSES."""
    matrix, lens = camera.cam2world[0].to(positions), camera.intrinsics[0].to(positions)
    height, width = size
    turn = matrix[:, :3].t()
    seen = (positions - matrix[:, 3]) @ turn.t()
    x, y, z = seen.t()
    fx, fy, ahead = lens[0] * width, lens[1] * height, z > 1e-3
    z = torch.where(ahead, z, 1.0)
    middle = torch.stack([fx * x / z + lens[2] * width, fy * y / z + lens[3] * height], 1)
    zero = torch.zeros_like(z)
    slopes = torch.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], 1)
    across, down = (slopes.view(-1, 2, 3) @ (turn @ axes)).unbind(1)
    wide, high, both = across.square().sum(1), down.square().sum(1), (across * down).sum(1)
    added, lowered = low_pass
    variance = torch.stack([wide + added, high + added, both], 1)
    grown = (variance[:, 0] * variance[:, 1] - both**2) / (wide * high - both**2).clamp_min(1e-9)
    share = grown.rsqrt() if lowered else torch.ones_like(z)
    return ProjectedSplats(middle, variance, torch.where(ahead, seen.norm(dim=1), torch.inf), share)


def opacity_at(
    flat: ProjectedSplats,
    opacities: Float[Tensor, "n"],
    splat: Int[Tensor, "p"],
    pixel: Int[Tensor, "p"],
    width: int,
) -> Float[Tensor, "p"]:
    """Returns the opacity of splats in pixels, numbered row by row."""
    x = pixel % width + 0.5 - flat.middle[splat, 0]
    y = pixel // width + 0.5 - flat.middle[splat, 1]
    a, c, b = flat.variance.t()
    a, b, c = ((part / (a * c - b * b))[splat] for part in (c, -b, a))
    power = a * x * x + 2 * b * x * y + c * y * y
    return torch.where(power < REACH**2, (opacities * flat.share)[splat] * torch.exp(-0.5 * power), 0.0)


def transmittance(opacity: Float[Tensor, "p"], pixel: Int[Tensor, "p"]) -> Float[Tensor, "p"]:
    """Returns the share of light that reaches each pair; pairs are sorted by pixel, then by distance."""
    passed = torch.log1p(-opacity.double())
    sums = torch.cumsum(passed, 0) - passed
    first = torch.ones_like(pixel, dtype=torch.bool)
    first[1:] = pixel[1:] != pixel[:-1]
    start = torch.cummax(torch.where(first, torch.arange(len(pixel)), 0), 0).values
    return torch.exp(sums - sums[start]).to(opacity)


@torch.no_grad()
def pairs(
    flat: ProjectedSplats, opacities: Float[Tensor, "n"], size: tuple[int, int]
) -> tuple[Int[Tensor, "p"], Int[Tensor, "p"]]:
    """Returns the splats and pixels of all pairs that are seen, sorted by pixel, then by distance."""
    height, width = size
    order = flat.distance.argsort()
    order = order[flat.distance[order].isfinite()]
    middle, reach = flat.middle[order], REACH * flat.variance[order, :2].sqrt()
    least, most = torch.zeros(2), torch.tensor([width, height])
    low = torch.minimum(torch.maximum((middle - reach - 0.5).ceil(), least), most).long()
    high = torch.minimum(torch.maximum((middle + reach + 0.5).floor(), least), most).long()
    sides = (high - low).clamp_min(0)
    count = sides.prod(1)
    row = torch.repeat_interleave(torch.arange(len(order)), count)
    within = torch.arange(len(row)) - (torch.cumsum(count, 0) - count)[row]
    x, y = low[row, 0] + within % sides[row, 0], low[row, 1] + within // sides[row, 0]
    splat, pixel = order[row], y * width + x
    opacity = opacity_at(flat, opacities, splat, pixel, width)
    kept = (opacity > FAINTEST).nonzero()[:, 0]
    kept = kept[pixel[kept].argsort(stable=True)]
    kept = kept[transmittance(opacity[kept], pixel[kept]) > DARK]
    return splat[kept], pixel[kept]


def picture(
    flat: ProjectedSplats,
    opacities: Float[Tensor, "n"],
    colors: Float[Tensor, "n 3"],
    background: Float[Tensor, "3"],
    size: tuple[int, int],
) -> Float[Tensor, "H W 3"]:
    """Renders splats over a color. Gradients reach all arguments."""
    splat, pixel = pairs(flat, opacities, size)
    opacity = opacity_at(flat, opacities, splat, pixel, size[1])
    weight = transmittance(opacity, pixel) * opacity
    shown = torch.zeros(size[0] * size[1], 3)
    shown = shown.index_add(0, pixel, weight[:, None] * (colors[splat] - background))
    return (shown + background).view(*size, 3)


def check_fit(
    view: Viewpoint, count: int, rounds: int = ROUNDS, side: int | None = None, downsampling: int = 1
) -> list[tuple[int, int]]:
    """Returns the sizes (height, width) of the pictures that a fit sees: that with `side` pixels along the
    wider side, or several multiples of the dataset's.

    Raises:
        UserError: there are too many splats for a fit, `rounds` is negative, or the size does not suit the
            codec or is given without a fit.
    """
    if rounds < 0:
        raise UserError(f"--rounds {rounds}: at least 0.")
    if rounds and count > MOST:
        raise UserError(f"--count {count}: up to {MOST} splats are fitted. Give fewer, or --rounds 0.")
    if side is not None and not rounds:
        raise UserError(
            f"--size {side}: is of the pictures of a fit, but --rounds is 0. Leave one of both out."
        )
    if side is not None:
        return [scaled(view.size, side, downsampling)]
    fine = [factor for factor in FINER if factor * max(view.size) <= FINEST]
    return [(factor * view.size[0], factor * view.size[1]) for factor in fine or (1,)]


def fitted(
    splats: Splats,
    loaded: SceneSet,
    scene: str,
    cameras: Cameras,
    sizes: list[tuple[int, int]],
    rounds: int = ROUNDS,
) -> Splats:
    """Fits splats to the scene's pictures, without haze. Axes keep their directions.

    Args:
        cameras: of the pictures.
        sizes: of the pictures (`check_fit`); each step draws one of them.
        rounds: how often each camera is used; 0 returns the same splats.
    """
    if not rounds:
        return splats
    planes, known, random = loaded.planes(scene), loaded.silhouettes(scene), torch.Generator().manual_seed(0)
    start, axes, scales, opacities, colors = (
        torch.tensor(values, dtype=torch.float32) for values in vars(splats).values()
    )
    unit = float(scales[:, 1].median())
    free = {
        "place": torch.zeros_like(start), "scale": scales.log(), "opacity": opacities.logit(),
        "color": colors,
    }  # fmt: skip
    groups = [{"params": [value.requires_grad_()], "lr": RATES[name]} for name, value in free.items()]
    adam, steps = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15), rounds * len(cameras)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - 0.95 * step / steps)
    for step in tracked(range(steps), "fitting splats"):
        if step % len(cameras) == 0:
            turn = torch.randperm(len(cameras), generator=random).tolist()
        camera = cameras[turn[step % len(cameras)] : turn[step % len(cameras)] + 1]
        size = sizes[int(torch.randint(len(sizes), (1,), generator=random))]
        background = torch.rand(3, generator=random)
        shown = render_images(loaded.model, planes, camera, size)
        seen = torch.from_numpy(with_alpha(shown, known)[0]) / 255
        truth = background + seen[..., 3:] * (seen[..., :3] - background)
        low_pass = LOW_PASSES[int(torch.randint(len(LOW_PASSES), (1,), generator=random))]
        places, widths = start + unit * free["place"], axes * free["scale"].exp()[:, None]
        flat = project(places, widths, camera, size, low_pass)
        shown = picture(flat, free["opacity"].sigmoid(), free["color"], background, size)
        adam.zero_grad()
        (shown - truth).square().mean().backward()
        adam.step()
        falling.step()
        free["color"].data.clamp_(0, 1)
    place, scale, opacity, color = (value.detach().double().numpy() for value in free.values())
    opacity = (1 / (1 + np.exp(-opacity))).clip(FAINTEST, 1 - 1e-4)
    return Splats(splats.positions + unit * place, splats.rotations, np.exp(scale), opacity, color)
