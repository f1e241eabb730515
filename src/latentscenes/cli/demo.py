"""The whole pipeline on made cars: data, stage 1, stage 2, the same new cars in a latent space, with the
pretrained model and as RGB tri-planes, and a report."""

from pathlib import Path

import torch

from latentscenes.cli.common import say
from latentscenes.core import config_io
from latentscenes.core.console import Spent, console
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages
from latentscenes.data.raycast import ViewOptions
from latentscenes.data.synthetic.cars import make_cars
from latentscenes.evaluation.evaluate import evaluate_stored
from latentscenes.evaluation.report import write_report
from latentscenes.evaluation.tables import Comparison, Variant, print_summary
from latentscenes.storage.pretrained import open_parent
from latentscenes.storage.scene_set import SceneSet
from latentscenes.training.exploit import exploit
from latentscenes.training.loop import train

TRAIN_CARS, NEW_CARS = 24, 8


def run_demo(out: Path, device: torch.device) -> None:
    """Makes cars, learns them, learns new cars, in pixels and in a latent space, compares them with RGB
    tri-planes and writes a report. Keeps everything in `out` and skips the parts that are already there."""
    begun = Spent.so_far()
    _announce(f"Making {TRAIN_CARS + NEW_CARS} cars")
    cars = out / "cars"
    if not cars.exists():
        make_cars(cars, ViewOptions(), train=TRAIN_CARS, new=NEW_CARS)
    views = PosedImages.open(cars)

    _announce(f"Stage 1: base planes and the field from {TRAIN_CARS} cars")
    trained = train(config_io.load("demo"), views, out / "train", device=device)
    _announce(f"Stage 2: {NEW_CARS} new cars")
    exploit(out / "library", views, trained.config, trained, ExploitOptions(), device)
    _announce(f"The same in a latent space: stage 1 with a codec, then the {NEW_CARS} new cars")
    latent = train(config_io.load("demo_latent"), views, out / "latent_train", device=device)
    exploit(out / "latent", views, latent.config, latent, ExploitOptions(), device)
    _announce("The same new cars with the pretrained model, without a stage 1")
    pretrained = open_parent(Path("cars"))
    exploit(out / "pretrained", views, pretrained.config, pretrained, ExploitOptions(), device)
    _announce("Baseline: RGB tri-planes of the new cars")
    rgb = train(config_io.load("demo_rgb"), views, out / "rgb", split="new", device=device)

    _announce("Scores on held-out views")
    old, baseline = (SceneSet.of_run(run, device=device) for run in (trained, rgb))
    new = SceneSet.open(out / "library", device=device)
    variants = {"with latents": "latent", "on the shipped model": "pretrained"}
    others = {label: SceneSet.open(out / name, device=device) for label, name in variants.items()}
    content = Comparison(
        train=old, new=new, rgb=baseline, views=views,
        evaluation_train=evaluate_stored(old, views),
        evaluation_new=evaluate_stored(new, views),
        evaluation_rgb=evaluate_stored(baseline, views),
        variants=tuple(Variant(name, one, evaluate_stored(one, views)) for name, one in others.items()),
        title="Procedural cars",
        introduction=f"Base planes and the field were learned from {TRAIN_CARS} procedural cars, and then "
        f"{NEW_CARS} new cars were learned with them, in pixels and in a latent space. The baseline is RGB "
        "tri-planes of the new cars.",
        commands=(f"latentscenes demo --out {out}",),
    )  # fmt: skip
    report = write_report(out / "report.html", content)
    print_summary(content)
    say(f"\n{report}: open it in a browser. The demo took {Spent.so_far() - begun}.")


def _announce(text: str) -> None:
    console.print(f"\n{text}", style="bold")
