"""The command line. Each command is a function whose docstring is its help; torch is imported late, so that
`--help` answers at once."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from latentscenes.cli.common import MACHINE, MachineOptions, errors_in_one_line, set_up
from latentscenes.cli.data import DATA_COMMANDS
from latentscenes.cli.export import EXPORT_COMMANDS, render
from latentscenes.cli.library import LIBRARY_COMMANDS, search
from latentscenes.core.config import StoragePrecision
from latentscenes.core.errors import UserError

if TYPE_CHECKING:
    from latentscenes.core.config import Config

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE …")]
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]


def train(
    data: Path,
    out: Path,
    config: str = "small",
    overrides: Overrides = (),
    split: Literal["train", "new"] = "train",
    limit: int | None = None,
    track: TrackerName = "none",
    print_config: bool = False,
    machine: MachineOptions = MACHINE,
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
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.training.loop import train as run_training

    run = run_training(
        settings, PosedImages.open(data), out, split=split, limit=limit, device=device, track=track
    )
    _say_done(out, run.seconds, len(run.info.scenes))


def exploit(
    data: Path,
    out: Path,
    run: Path | None = None,
    config: str | None = None,
    overrides: Overrides = (),
    group: int | None = None,
    precision: StoragePrecision | None = None,
    stage_one: bool = True,
    finetune: bool = False,
    limit: int | None = None,
    workers: int = 0,
    wait: bool = True,
    track: TrackerName = "none",
    print_config: bool = False,
    machine: MachineOptions = MACHINE,
) -> None:
    """Stage 2: learn the dataset's new scenes with what stage 1 learned, into a library. The same command again goes on
    where it stopped; another dataset adds its scenes to the same library.

    Args:
        data: dataset whose `new` scenes are learned; those that the library holds already are left out.
        out: library folder, made if absent.
        run: what a new library is made of: a finished run of `latentscenes train`, another library's model, or `cars`, which comes with the package.
        config: preset or YAML file; unset: the configuration of the library or run.
        overrides: settings to change, for instance exploit.latent.epochs=20.
        group: scenes learned together and committed together; unset: as many as a batch holds.
        precision: how scenes are stored; unset: as the library was made with, int8 for a new one.
        stage_one: a new library starts with the scenes of the run.
        finetune: as published: go on learning base planes, field and decoder with the new scenes, into a new library of these alone.
        limit: learn only the first so many scenes.
        workers: processes that learn groups side by side, each on its share of the threads; 0: one per thread, as far as groups and memory go.
        wait: wait for another process that learns into this library; --no-wait: stop instead.
        track: also send metrics to a tracker.
        print_config: print every setting as YAML and stop.
    """
    from latentscenes.storage.pretrained import open_parent

    home = out if (out / "library.json").is_file() else run and open_parent(run).path
    if home is None and config is None:
        raise UserError(f"{out}: no library here yet. Name the run that it is to be made of, with --run.")
    settings = _settings(config or str(home / "config.yaml"), overrides, print_config, finetune)
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.training.exploit import ExploitOptions, learn_new

    store = learn_new(
        out,
        PosedImages.open(data),
        settings,
        run,
        finetune,
        ExploitOptions(group, precision, stage_one, limit, wait, workers, track),
        device,
    )
    _say(f"{out}: {len(store.index)} scenes. Score the new ones: latentscenes eval --run {out}")


def evaluate(
    run: Path,
    data: Path | None = None,
    part: Literal["held_out", "fit"] = "held_out",
    views: int | None = None,
    split: Literal["train", "new"] | None = None,
    sheet: Path | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Score learned scenes on the views held out of them: codec ceiling, latent error, total.

    Args:
        run: run folder of train, or library: then the scenes of the dataset that its newest one came from.
        data: the dataset, if it has moved; of a library of several datasets, which.
        part: views kept for evaluation, or those learned from.
        views: at most so many views of each scene.
        split: of a library, which scenes: `train` are those of stage 1; unset: the new ones, if there are any.
        sheet: also write a contact sheet truth | codec | render here (PNG).
    """
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.evaluation.evaluate import evaluate as score
    from latentscenes.evaluation.tables import print_scores
    from latentscenes.storage.library import FIT_SCORES, SCORES
    from latentscenes.storage.scene_set import SceneSet

    learned = SceneSet.open(run, data, split, device)
    dataset = PosedImages.open(learned.data)
    scenes = learned.scenes(dataset)
    result = score(learned, dataset, scenes, part, views)
    result.save(run / (SCORES if part == "held_out" else FIT_SCORES))
    print_scores(result)
    if sheet:
        from latentscenes.export.sheets import comparison_sheet, save_image

        save_image(sheet, comparison_sheet(learned.labeled("render"), dataset, scenes))


def report(
    run: Path, out: Path, rgb: Path | None = None, data: Path | None = None, machine: MachineOptions = MACHINE
) -> None:
    """Write one HTML file about new scenes: scores, pictures, orbits, costs, curves, beside RGB tri-planes of the same.

    Args:
        run: library made by exploit; the run it was made of must still lie where it was.
        out: HTML file to write; beside it the summary as Markdown and the contact sheet as PNG.
        rgb: run folder of RGB tri-planes of the same scenes.
        data: the dataset, if it has moved.
    """
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.evaluation.evaluate import evaluate_stored
    from latentscenes.evaluation.report import write_report
    from latentscenes.evaluation.tables import Comparison, print_summary
    from latentscenes.storage.scene_set import SceneSet

    new, baseline = (
        SceneSet.open(run, data, device=device),
        SceneSet.open(rgb, device=device) if rgb else None,
    )
    views, trained = PosedImages.open(new.data), SceneSet.open(new.parent, device=device)
    content = Comparison(
        train=trained, new=new, rgb=baseline, views=views, title=run.name,
        evaluation_train=evaluate_stored(trained, views),
        evaluation_new=evaluate_stored(new, views),
        evaluation_rgb=evaluate_stored(baseline, views) if baseline else None,
    )  # fmt: skip
    print_summary(content)
    write_report(out, content)


def cost(
    run: Path | None = None, config: str | None = None, baseline: str = "rgb", overrides: Overrides = ()
) -> None:
    """The ledger: bytes and seconds per scene at N scenes, shared parts included, and break-even against RGB tri-planes.

    Args:
        run: run or library to account for …
        config: … or a configuration alone (bytes only).
        baseline: configuration of the RGB tri-planes to compare with, or a run or library of it (then seconds are compared too).
        overrides: settings to change.
    """
    from latentscenes.evaluation.tables import print_cost

    print_cost(run, config, baseline, overrides)


def view(
    library: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8080,
    data: Path | None = None,
    moving: int = 128,
    still: int = 384,
    machine: MachineOptions = MACHINE,
) -> None:
    """Look at a library in a browser: gallery, orbits, depth and latents, blends of two scenes, photographs and their cameras.

    Args:
        library: its folder.
        host: address to serve at; as it is, only this machine can look. 0.0.0.0: everybody who can reach this machine.
        port: to serve at; 0 for any free one.
        data: dataset that the scenes were learned from, if it has moved.
        moving: pixels along the shorter side of pictures while the camera moves …
        still: … and when it has stopped.
    """
    device = set_up(machine)
    from latentscenes.api import Library
    from latentscenes.storage.library import LibraryFolder

    try:
        from latentscenes.viewer.server import view as serve
    except ModuleNotFoundError as error:
        if error.name != "viser":
            raise
        raise UserError("view needs viser. Run: pip install latentscenes[viewer]") from None

    serve(Library(LibraryFolder.open(library), device), host, port, data, moving, still)


def demo(out: Path = Path("demo"), machine: MachineOptions = MACHINE) -> None:
    """Everything on made cars: data, stages 1 and 2, the RGB baseline, a table and a report to look at.

    Args:
        out: folder for all of it; begun work there is gone on with.
    """
    device = set_up(machine)
    from latentscenes.cli.demo import run_demo

    run_demo(out, device)


def _settings(
    source: str, overrides: tuple[str, ...], print_and_stop: bool, finetune: bool = False
) -> "Config":
    from latentscenes.core import config, config_io

    settings = config_io.load(source, overrides)
    if finetune:
        settings = config.learning_shared(settings)
    if print_and_stop:
        print(config_io.dump(settings), end="")
        sys.exit(0)
    return settings


def _say_done(out: Path, seconds: float, scenes: int) -> None:
    _say(f"{out}: {scenes} scenes learned in {seconds:.0f} s. Score them: latentscenes eval --run {out}")


def _say(text: str) -> None:
    from latentscenes.core.console import console

    console.print(text, highlight=False, soft_wrap=True)


def export() -> None:
    """Take scenes elsewhere: export mesh | points | images | page."""


def data() -> None:
    """Make, import or join datasets: data cars | meshes | srn | transforms | photos | join."""


def library() -> None:
    """Look into a library and look after it: library list | show | remove | rename | export | verify | compact | repack."""


COMMANDS = {
    "data": data,
    "train": train,
    "exploit": exploit,
    "eval": evaluate,
    "report": report,
    "render": render,
    "export": export,
    "cost": cost,
    "library": library,
    "search": search,
    "view": view,
    "demo": demo,
}


GROUPS = {
    "data": (DATA_COMMANDS, "Make or import a packed dataset of posed images."),
    "export": (
        EXPORT_COMMANDS,
        "Take learned scenes elsewhere: meshes, points, posed pictures, a page that turns them.",
    ),
    "library": (LIBRARY_COMMANDS, "Look into a library of learned scenes, and look after it."),
}
"""Commands of two words, and what each group is for."""


def _arguments() -> list[str]:
    """Of the command line; to print a configuration, no folders need be named."""
    given = sys.argv[1:]
    if "--print-config" in given:
        required = {"train": ("--data", "--out"), "exploit": ("--data", "--out")}.get(given[0], ())
        given += [word for flag in required if flag not in given for word in (flag, "unused")]
    return given or ["--help"]


def run_commands(prog: str, commands: dict, description: str, arguments: list[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, args=arguments)


def main() -> None:
    """Entry point of `latentscenes`."""
    with errors_in_one_line():
        if group := GROUPS.get("".join(sys.argv[1:2])):
            run_commands(f"latentscenes {sys.argv[1]}", *group, sys.argv[2:] or ["--help"])
        else:
            run_commands(
                "latentscenes",
                COMMANDS,
                "Learn large collections of 3D objects from posed images.",
                _arguments(),
            )
