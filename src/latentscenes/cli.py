"""The command line. Each command is a function whose docstring is its help; torch is imported late, so that
`--help` answers at once."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from latentscenes.cli_data import DATA_COMMANDS

if TYPE_CHECKING:
    from latentscenes.config import Config

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE …")]
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class Machine:
    """Where to compute."""

    threads: int | None = None
    """CPU threads; unset: all cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""


def train(
    data: Path,
    out: Path,
    config: str = "small",
    overrides: Overrides = (),
    split: Literal["train", "new"] = "train",
    limit: int | None = None,
    track: TrackerName = "none",
    print_config: bool = False,
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
) -> None:
    """Stage 1: learn a codec, base planes and the training scenes. The same command again goes on where it stopped.

    Args:
        data: dataset made by `latentscenes data`.
        out: run folder.
        config: preset or YAML file.
        overrides: settings to change, for instance planes.resolution=32 train.joint.epochs=5.
        split: which scenes of the dataset.
        limit: learn only the first so many scenes.
        track: also send metrics to a tracker.
        print_config: print every setting as YAML and stop.
    """
    settings = _settings(config, overrides, print_config)
    device = _start(machine)
    from latentscenes.train import train as run_training
    from latentscenes.views import Views

    run = run_training(settings, Views.open(data), out, split=split, limit=limit, device=device, track=track)
    _say_done(out, run.seconds, len(run.info.scenes))


def exploit(
    run: Path,
    data: Path,
    out: Path,
    config: str | None = None,
    overrides: Overrides = (),
    limit: int | None = None,
    track: TrackerName = "none",
    print_config: bool = False,
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
) -> None:
    """Stage 2: learn the dataset's new scenes with what stage 1 learned.

    Args:
        run: finished run of `latentscenes train`.
        data: dataset whose `new` scenes are learned.
        out: run folder for them.
        config: preset or YAML file; unset: the configuration of the run.
        overrides: settings to change, for instance exploit.latent.epochs=20.
        limit: learn only the first so many scenes.
        track: also send metrics to a tracker.
        print_config: print every setting as YAML and stop.
    """
    settings = _settings(config or str(run / "config.yaml"), overrides, print_config)
    device = _start(machine)
    from latentscenes.exploit import exploit as run_exploit
    from latentscenes.run import Run
    from latentscenes.views import Views

    learned = run_exploit(Run.open(run), settings, Views.open(data), out, limit=limit, device=device, track=track)
    _say_done(out, learned.seconds, len(learned.info.scenes))


def evaluate(
    run: Path,
    data: Path | None = None,
    part: Literal["held_out", "fit"] = "held_out",
    views: int | None = None,
    sheet: Path | None = None,
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
) -> None:
    """Score a run on the views held out of its scenes: codec ceiling, latent error, total.

    Args:
        run: run folder of train or exploit.
        data: the dataset, if it has moved.
        part: views kept for evaluation, or those learned from.
        views: at most so many views of each scene.
        sheet: also write a contact sheet truth | codec | render here (PNG).
    """
    device = _start(machine)
    from latentscenes.evaluate import evaluate as score
    from latentscenes.report import print_scores
    from latentscenes.run import Run
    from latentscenes.views import Views

    opened = Run.open(run)
    model, rows = opened.load(device)
    dataset = Views.open(data or opened.info.data)
    scenes = dataset.select(opened.info.split, opened.info.scenes)
    result = score(model, rows, dataset, scenes, part, views)
    result.save(run / ("evaluation.json" if part == "held_out" else "evaluation_fit.json"))
    print_scores(result)
    if sheet:
        from latentscenes.pictures import comparison_sheet, save_image

        save_image(sheet, comparison_sheet(model, rows, dataset, scenes))


def report(
    run: Path,
    out: Path,
    rgb: Path | None = None,
    data: Path | None = None,
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
) -> None:
    """Write one HTML file about new scenes: scores, pictures, orbits, costs, curves, beside RGB tri-planes of the same.

    Args:
        run: run folder of exploit; its stage 1 must still lie where it was.
        out: HTML file to write; beside it the summary as Markdown and the contact sheet as PNG.
        rgb: run folder of RGB tri-planes of the same scenes.
        data: the dataset, if it has moved.
    """
    device = _start(machine)
    from latentscenes.evaluate import evaluate_run
    from latentscenes.report import Comparison, print_summary
    from latentscenes.report_html import write_report
    from latentscenes.run import Run
    from latentscenes.views import Views

    new, baseline = Run.open(run), Run.open(rgb) if rgb else None
    views, trained = Views.open(data or new.info.data), Run.open(new.parent)
    content = Comparison(
        train=trained, new=new, rgb=baseline, views=views, title=run.name, device=device,
        evaluation_train=evaluate_run(trained, views, device),
        evaluation_new=evaluate_run(new, views, device),
        evaluation_rgb=evaluate_run(baseline, views, device) if baseline else None,
    )  # fmt: skip
    print_summary(content)
    write_report(out, content)


def render(
    run: Path,
    scene: str,
    out: Path,
    frames: int = 60,
    size: int | None = None,
    mode: Literal["rgb", "depth", "opacity", "latent", "dashboard"] = "rgb",
    elevation: float = 25.0,
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
) -> None:
    """Render an orbit around a learned scene.

    Args:
        run: run folder of train or exploit.
        scene: name of the scene.
        out: file to write: .mp4 (needs the export extra), .gif, or .png for a strip of frames.
        frames: cameras around the object.
        size: pixels along a side; unset: as in the data.
        mode: what to show; `dashboard` puts image, latent channels, depth and opacity side by side.
        elevation: of the cameras, in degrees.
    """
    device = _start(machine)
    from latentscenes.pictures import orbit_frames, save_frames
    from latentscenes.run import Run

    opened = Run.open(run)
    save_frames(out, orbit_frames(opened, scene, frames=frames, size=size, mode=mode, elevation=elevation, device=device))


def cost(
    run: Path | None = None,
    config: str | None = None,
    baseline: str = "rgb",
    overrides: Overrides = (),
) -> None:
    """The ledger: bytes and seconds per scene at N scenes, shared parts included, and break-even against RGB tri-planes.

    Args:
        run: finished run to account for …
        config: … or a configuration alone (bytes only).
        baseline: configuration of the RGB tri-planes to compare with, or a run of it (then seconds are compared too).
        overrides: settings to change.
    """
    from latentscenes.report import print_cost

    print_cost(run, config, baseline, overrides)


def demo(out: Path = Path("demo"), machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()) -> None:
    """Everything on made cars: data, stages 1 and 2, the RGB baseline, a table and a report to look at.

    Args:
        out: folder for all of it; begun work there is gone on with.
    """
    device = _start(machine)
    from latentscenes.demo import run_demo

    run_demo(out, device)


def _settings(source: str, overrides: tuple[str, ...], print_and_stop: bool) -> "Config":
    from latentscenes import config

    settings = config.load(source, overrides)
    if print_and_stop:
        print(config.dump(settings), end="")
        sys.exit(0)
    return settings


def _start(machine: Machine):
    from latentscenes import runtime

    return runtime.start(machine.threads, machine.device)


def _say_done(out: Path, seconds: float, scenes: int) -> None:
    from latentscenes.progress import console

    console.print(f"{out}: {scenes} scenes learned in {seconds:.0f} s. Score them: latentscenes eval --run {out}", highlight=False, soft_wrap=True)


def data() -> None:
    """Make or import a dataset: data cars | meshes | srn | transforms."""


COMMANDS = {
    "data": data,
    "train": train,
    "exploit": exploit,
    "eval": evaluate,
    "report": report,
    "render": render,
    "cost": cost,
    "demo": demo,
}


def _arguments() -> list[str]:
    """Of the command line; to print a configuration, no folders need be named."""
    given = sys.argv[1:]
    if "--print-config" in given:
        required = {"train": ("--data", "--out"), "exploit": ("--run", "--data", "--out")}.get(given[0], ())
        given += [word for flag in required if flag not in given for word in (flag, "unused")]
    return given or ["--help"]


def run_commands(prog: str, commands: dict, description: str, arguments: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, args=arguments)


def main() -> None:
    """Entry point of `latentscenes`."""
    from latentscenes.errors import Interrupted, UserError

    try:
        if sys.argv[1:2] == ["data"]:
            run_commands("latentscenes data", DATA_COMMANDS, "Make or import a packed dataset of posed images.", sys.argv[2:] or ["--help"])
        else:
            run_commands("latentscenes", COMMANDS, "Learn large collections of 3D objects from posed images.", _arguments())
    except UserError as error:
        print(f"latentscenes: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print("latentscenes: stopped; everything is saved. The same command goes on.", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
