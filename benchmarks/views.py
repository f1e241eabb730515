"""Views of learned scenes: all rays beside adaptive rays, from the cameras of held-out views. Run:

    python -m benchmarks.views --run libraries/chairs --data data/chairs --sizes 128 256 512

Notable:
- Every view is rendered both ways in turns. Times are CPU milliseconds of the process, medians over views.
- Models whose latents hold colors have a second line: these colors rendered at every pixel, not decoded.
- Agreement is the PSNR of one picture against the other. PSNR against held-out pictures is measured at the
  size of the dataset.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.cli.common import MACHINE, MachineOptions, run_program, set_up
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, spread_evenly
from latentscenes.model.metrics import psnr
from latentscenes.model.model import Model, render_images
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage.scene_set import SceneSet

VIEWS = 3
"""Views of each scene."""


class Compared(NamedTuple):
    """One view, rendered with all rays and with adaptive ones. Times in CPU seconds, PSNR in dB."""

    all_seconds: float
    adaptive_seconds: float
    rays: float
    """Fraction of the pixels that adaptive rays go through."""
    agreement: float
    all_psnr: float
    """Against the held-out picture; NaN at other sizes."""
    adaptive_psnr: float


def compare(
    model: Model,
    planes: FusedPlanes,
    camera: Cameras,
    size: int,
    truth: Float[Tensor, "1 3 h w"],
    decoded: bool = True,
) -> Compared:
    """Renders one square view both ways."""
    cast, render, pictures, seconds = [0], model.render, [], []

    def counting(*arguments, **options):
        if options.get("pixels") is not None:
            cast[0] += options["pixels"].numel()
        return render(*arguments, **options)

    model.render = counting
    try:
        for adaptive in (False, True):
            begun = process_time()
            shown = render_images(
                model, planes, camera, (size, size), geometry=False, adaptive=adaptive, decoded=decoded
            )
            seconds.append(process_time() - begun)
            pictures.append(shown.images)
    finally:
        del model.render
    whole = (size // (model.codec.downsampling if decoded else 1)) ** 2
    scores = [float(psnr(one, truth)) if one.shape == truth.shape else math.nan for one in pictures]
    return Compared(*seconds, cast[0] / whole, float(psnr(*pictures).clamp(max=99)), *scores)


def main(
    *,
    run: Path,
    data: Path,
    sizes: Sequence[int] = (128, 256, 512),
    limit: int | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Compares adaptive views with views of all rays.

    Args:
        run: library, or run folder of train.
        data: dataset with held-out views of its scenes.
        sizes: sides of square pictures, pixels.
        limit: number of scenes.
    """
    learned, dataset = SceneSet.open_all(run, set_up(machine)), PosedImages.open(data)
    scenes = [scene for scene in dataset.scenes if scene.name in learned.names][:limit]
    if not scenes or not all(scene.views("held_out") for scene in scenes):
        raise UserError(f"{data}: holds no scene of {run} with held-out views.")
    print(
        "| pixels | all rays, ms | adaptive, ms | ratio | rays | agreement | worst | PSNR, all rays "
        "| PSNR, adaptive |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    codec = learned.model.codec
    ways = (True, False) if codec.leading_colors and codec.downsampling > 1 else (True,)
    for size in sizes:
        for decoded in ways:
            found = []
            for scene in scenes:
                planes = learned.planes(scene.name)
                for view in spread_evenly(scene.views("held_out"), VIEWS):
                    index = torch.tensor([view])
                    truth, camera = dataset.images(index).float() / 255, dataset.cameras[index]
                    if not found:  # warm up
                        compare(learned.model, planes, camera, size, truth, decoded)
                    found.append(compare(learned.model, planes, camera, size, truth, decoded))
            print(line(str(size) if decoded else f"{size}, colors", found))


def line(name: str, found: Sequence[Compared]) -> str:
    """A line of the table."""
    columns = {name: [getattr(one, name) for one in found] for name in Compared._fields}
    before, after = (1e3 * statistics.median(columns[name]) for name in ("all_seconds", "adaptive_seconds"))
    ratio = statistics.median(one.all_seconds / one.adaptive_seconds for one in found)
    rays, agreement, *scores = (statistics.fmean(columns[name]) for name in Compared._fields[2:])
    marks = " | ".join("" if math.isnan(score) else f"{score:.2f}" for score in scores)
    return (
        f"| {name} | {before:.1f} | {after:.1f} | {ratio:.1f}x | {rays:.1%} "
        f"| {agreement:.1f} | {min(columns['agreement']):.1f} | {marks} |"
    )


if __name__ == "__main__":
    run_program(main)
