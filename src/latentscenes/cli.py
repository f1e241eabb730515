"""The command line. Each command is a function whose docstring is its help; torch is imported late, so that
`--help` answers at once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

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


def data_cars(
    out: Path,
    train: int = 24,
    new: int = 8,
    views: int = 40,
    size: int = 128,
    held_out: int = 4,
    seed: int = 0,
) -> None:
    """Make a dataset of procedural cars. No download.

    Args:
        out: folder of the new dataset.
        train: cars to learn from in stage 1.
        new: cars kept for stage 2.
        views: pictures of each car.
        size: pixels along a side.
        held_out: views of each car kept for evaluation.
        seed: decides cars and cameras.
    """
    from latentscenes.datasets.embree import ViewOptions
    from latentscenes.datasets.shapes import make_cars

    make_cars(out, train=train, new=new, options=ViewOptions(views=views, size=size, held_out=held_out, seed=seed))


def data_meshes(
    folder: Path,
    out: Path,
    views: int = 40,
    size: int = 128,
    held_out: int = 4,
    split: Path | None = None,
    new: int = 0,
    up: Literal["auto", "y", "z"] = "auto",
    seed: int = 0,
    limit: int | None = None,
    strict: bool = False,
) -> None:
    """Photograph a folder of meshes (GLB, glTF, OBJ, PLY).

    Args:
        folder: searched with its subfolders; or one file.
        out: folder of the new dataset.
        views: pictures of each mesh.
        size: pixels along a side.
        held_out: views of each mesh kept for evaluation.
        split: JSON file {"train": [...], "new": [...]} with file names without their endings.
        new: without `split`: the last so many meshes, by name, are kept for stage 2.
        up: the axis that points up in the files.
        seed: decides the cameras.
        limit: at most so many meshes of each split.
        strict: stop at the first file that cannot be read.
    """
    from latentscenes.datasets.embree import ViewOptions
    from latentscenes.datasets.meshes import make_meshes

    options = ViewOptions(views=views, size=size, held_out=held_out, seed=seed)
    make_meshes(folder, out, options, split=split, new=new, up=up, limit=limit, strict=strict)


@dataclass(frozen=True)
class Import:
    """How existing pictures become a dataset."""

    size: int | None = None
    """Pixels along each side of the stored images, reached by averaging; unset: as they are."""
    box: str | None = None
    """The scene box: half side of a cube around the origin, or cx,cy,cz,hx,hy,hz; unset: fitted to the silhouettes."""
    background: Literal["auto", "alpha", "white", "unknown"] = "auto"
    """How silhouettes are known: the files' alpha, white pixels connected to the border, or not at all."""
    held_out: int = 4
    """Views of each scene kept for evaluation, where the source sets none apart itself."""
    split: Path | None = None
    """JSON file {"train": [...], "new": [...]} with names of scenes; the others are left out."""
    new: int = 0
    """Without `split`: the last so many scenes are kept for stage 2."""
    limit: int | None = None
    """Take at most the first so many scenes."""
    axes: Literal["auto", "opencv", "opengl"] = "auto"
    """Camera axes of the files, where they break the layout's custom."""


ImportOptions = Annotated[Import, tyro.conf.arg(name="")]


def data_srn(
    folder: Path, out: Path, above: bool = False, intrinsics_size: int | None = None, download: bool = False, options: ImportOptions = Import()
) -> None:
    """Import objects in the ShapeNet-SRN layout, or an EG3D export with dataset.json.

    Args:
        folder: a folder of objects, or one object.
        out: folder of the new dataset.
        above: keep only views whose camera height is above -0.5.
        intrinsics_size: the image size that intrinsics.txt is stated for, where its last line is wrong.
        download: first fetch the published SRN cars into `folder` (needs the network; ShapeNet's terms apply).
    """
    from latentscenes.datasets.srn import download_cars, make_srn

    if download:
        folder = download_cars(folder)
    _import(make_srn, folder, out, options, "opencv", above=above, intrinsics_size=intrinsics_size)


def data_transforms(
    folder: Path, out: Path, held_out_from: Literal["test", "val", "none"] | None = None, options: ImportOptions = Import()
) -> None:
    """Import nerfstudio or Blender transforms*.json: one scene or a folder of scenes.

    Args:
        folder: a folder with transforms*.json, or a folder of such folders.
        out: folder of the new dataset.
        held_out_from: whose frames become the held-out views; unset: test where there is such a file, else val.
    """
    from latentscenes.datasets.transforms import make_transforms

    _import(make_transforms, folder, out, options, "opengl", held_out_from=held_out_from)


def _import(make: Callable, folder: Path, out: Path, chosen: Import, custom: str, **more: object) -> None:
    from latentscenes.datasets.importing import Options
    from latentscenes.progress import console

    settings = {name: value for name, value in vars(chosen).items() if name != "axes"}
    axes = custom if chosen.axes == "auto" else chosen.axes
    imported = make(folder, out, axes=axes, options=Options(**settings), **more)
    console.print(imported, highlight=False)


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


DATA_COMMANDS = {"cars": data_cars, "meshes": data_meshes, "srn": data_srn, "transforms": data_transforms}
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
    from latentscenes.errors import UserError

    try:
        if sys.argv[1:2] == ["data"]:
            run_commands("latentscenes data", DATA_COMMANDS, "Make or import a packed dataset of posed images.", sys.argv[2:] or ["--help"])
        else:
            run_commands("latentscenes", COMMANDS, "Learn large collections of 3D objects from posed images.", _arguments())
    except UserError as error:
        print(f"latentscenes: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        print("latentscenes: stopped; everything is saved. The same command goes on.", file=sys.stderr)
        sys.exit(130)
