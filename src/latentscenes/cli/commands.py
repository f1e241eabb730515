"""The commands train, exploit, eval, report, cost, verify, view and demo."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from latentscenes.cli.common import (
    FLAT,
    MACHINE,
    MachineOptions,
    require_dataset,
    require_folder,
    require_source,
    say,
    set_up,
)
from latentscenes.cli.machines import as_workers, learn_share
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line
from latentscenes.core.options import ExploitOptions, RankOptions, TrackerKind

if TYPE_CHECKING:
    from latentscenes.core.config import Config

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE …")]
EXPLOIT, RANKS = ExploitOptions(workers=0), RankOptions()


def train(
    data: Path,
    out: Path,
    config: str = "small",
    overrides: Overrides = (),
    split: Literal["train", "new"] = "train",
    limit: int | None = None,
    scenes: int | Literal["auto"] | None = None,
    track: TrackerKind = "none",
    print_config: bool = False,
    machine: MachineOptions = MACHINE,
) -> None:
    """Stage 1: learn a codec, base planes and the training scenes. The same command continues a stopped run.
    Several processes, also of several machines, share the work if torchrun starts them.

    Args:
        data: Dataset made by `latentscenes data`.
        out: Run folder.
        config: Preset or YAML file.
        overrides: Settings to change, for instance planes.resolution=32 train.joint.epochs=5.
        split: Split of the dataset to learn.
        limit: Learn at most this many scenes, in order.
        scenes: Scenes that are learned together in a step, in all stages; unset: as the settings say. With
            `auto`, a short probe finds how many fill the device, and a stopped run keeps the number. With
            another number, shared parts take another number of steps, so it is another run.
        track: Also send metrics to a tracker.
        print_config: Print every setting as YAML, as they are for this dataset if it exists, and stop.
    """
    if print_config and not (data / "views.json").is_file():
        _settings(config, overrides, print_config)
    require_dataset(data)
    device = set_up(machine)
    from latentscenes.core.config import with_scenes
    from latentscenes.data.dataset import PosedImages
    from latentscenes.training.distributed import joined
    from latentscenes.training.loop import train as run_training
    from latentscenes.training.probe import for_train

    views = PosedImages.open(data)
    settings = _settings(config, overrides, print_config, size=max(views.size))
    with joined(device) as (team, own):
        if isinstance(scenes, int):
            settings = with_scenes(settings, "train", scenes)
        elif scenes:
            settings = for_train(settings, views, out, (split, limit), own, team)
        run = run_training(settings, views, out, split=split, limit=limit, device=own, track=track, team=team)
        learned = f"{counted(len(run.info.scenes), 'scene')} learned in {run.spent}"
        say(f"{out}: {learned}. Score them: latentscenes eval --run {out}")


def exploit(
    data: Path,
    out: Path,
    run: Path | None = None,
    config: str | None = None,
    overrides: Overrides = (),
    finetune: bool = False,
    fit: bool = False,
    refine: bool = False,
    options: Annotated[ExploitOptions, FLAT] = EXPLOIT,
    ranks: Annotated[RankOptions, FLAT] = RANKS,
    print_config: bool = False,
    machine: MachineOptions = MACHINE,
) -> None:
    """Stage 2: learn the dataset's new scenes with the shared parts of stage 1, into a library. The same
    command continues a stopped run; another dataset adds its scenes to the same library. With --rank or
    --engine, several processes, also of several machines, share the work.

    Args:
        data: Dataset whose `new` scenes are learned, except scenes that the library holds already.
        out: Library folder, created if absent.
        run: Shared parts of a new library: a run, a library, or a model, `cars` or `objects` (`…_latent`).
        config: Preset or YAML file; unset: the configuration of the library or run.
        overrides: Settings to change, for instance exploit.latent.epochs=20.
        finetune: As published: also learn base planes, field and decoder, into a library of the new scenes.
        fit: For models with one box: find out, by learning a few objects for a few steps, how objects must be
            turned; learn them from a new dataset (DATA_fitted), in which they are turned and fill the box.
        refine: Also learn small corrections of each view, its color (gain and offset) and its camera, where
            a short trial finds that they help. Takes two to three times as long.
        print_config: Print every setting as YAML and stop.
    """
    from latentscenes.storage.description import find_model

    home = out if (out / "library.json").is_file() else run and find_model(run)
    if home is None and config is None:
        raise UserError(
            f"{out}: no library here yet. With --run, name the run that provides its shared parts."
        )
    settings = _settings(config or str(home / "config.yaml"), overrides, print_config, finetune, refine)
    require_dataset(data)
    if options.scenes is None and (config or any(".scenes=" in change for change in overrides)):
        options = replace(options, scenes="settings")
    if ranks.engine == "local":
        options = as_workers(options, ranks)
    elif ranks.rank is not None or ranks.engine is not None:
        alone = {"--finetune": finetune, "--fit": fit}
        learn_share(data, out, settings, run, alone, (options, ranks), machine)
        return
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.training.finetune import learn_new

    images = PosedImages.open(data)
    if fit and home:
        from latentscenes.storage.pretrained import open_parent
        from latentscenes.training.fit import fitted_dataset

        images = fitted_dataset(images, open_parent(home), settings, str(run or out), device)
    store = learn_new(out, images, settings, run, finetune, options, device)
    say(f"{out}: {counted(len(store.index), 'scene')}. Score the new ones: latentscenes eval --run {out}")


def evaluate(
    run: Path,
    data: Path | None = None,
    part: Literal["held_out", "fit"] = "held_out",
    views: int | None = None,
    split: Literal["train", "new"] | None = None,
    sheet: Path | None = None,
    machine: MachineOptions = MACHINE,
) -> None:
    """Score learned scenes on held-out views: codec ceiling, latent error, total.

    Args:
        run: Run folder of train, or library. For a library, scores the scenes of the dataset learned last.
        data: The dataset, if it has moved; for a library of several datasets, the one to score.
        part: Score held-out views, or the views that were fitted.
        views: At most this many views of each scene.
        split: Scenes of a library to score: `train` are those of stage 1; unset: the new scenes, if any.
        sheet: Also write a contact sheet truth | codec | render here (PNG).
    """
    require_folder(run)
    device = set_up(machine)
    from latentscenes.data.dataset import PosedImages
    from latentscenes.evaluation.evaluate import evaluate as score
    from latentscenes.evaluation.tables import print_scores
    from latentscenes.export.sheets import check_picture, comparison_sheet, save_image
    from latentscenes.storage.records import FIT_SCORES, SCORES
    from latentscenes.storage.scene_set import SceneSet

    if sheet:
        check_picture(sheet)
    learned = SceneSet.open(run, data, split, device)
    dataset = PosedImages.open(learned.data)
    scenes = learned.scenes(dataset)
    result = score(learned, dataset, scenes, part, views)
    result.save(run / (SCORES if part == "held_out" else FIT_SCORES))
    print_scores(result)
    if sheet:
        save_image(sheet, comparison_sheet(learned.labeled("render"), dataset, scenes))


def report(
    run: Path, out: Path, rgb: Path | None = None, data: Path | None = None, machine: MachineOptions = MACHINE
) -> None:
    """Write an HTML report on new scenes: scores, pictures, costs, training curves, and an RGB baseline.

    Args:
        run: Library made by exploit. The run that it is based on must not have moved.
        out: HTML file to write. The summary (Markdown) and the contact sheet (PNG) are written beside it.
        rgb: Run folder of RGB tri-planes of the same scenes.
        data: The dataset, if it has moved.
    """
    require_folder(run)
    device = set_up(machine)
    from latentscenes.core.files import check_place
    from latentscenes.data.dataset import PosedImages
    from latentscenes.evaluation.evaluate import evaluate_stored
    from latentscenes.evaluation.report import write_report
    from latentscenes.evaluation.tables import Comparison, print_summary
    from latentscenes.storage.scene_set import SceneSet

    check_place(out)
    new, baseline = SceneSet.open(run, data, device=device), rgb and SceneSet.open(rgb, device=device)
    if not new.parent.exists():
        raise UserError(
            f"{run}: the report also shows the scenes of stage 1, but {new.parent}, which it was made from, "
            f"is not here. Score the new ones: latentscenes eval --run {run} --sheet sheet.png"
        )
    if baseline:
        baseline.require_finished()
    views, trained = PosedImages.open(new.data), SceneSet.open(new.parent, device=device)
    content = Comparison(
        train=trained, new=new, rgb=baseline, views=views, title=run.name,
        evaluation_train=evaluate_stored(trained, views),
        evaluation_new=evaluate_stored(new, views),
        evaluation_rgb=evaluate_stored(baseline, views) if baseline else None,
    )  # fmt: skip
    print_summary(content)
    write_report(out, content)
    say(f"{out}: the report. Beside it: the table (.md) and the pictures (.png).")


def cost(
    run: Path | None = None, config: str | None = None, baseline: str = "rgb", overrides: Overrides = ()
) -> None:
    """Show memory and time per scene in a collection of N scenes, and the break-even against RGB tri-planes.

    Args:
        run: Run or library.
        config: Configuration, used without --run; shows memory only.
        baseline: RGB tri-planes to compare with: a configuration (memory only), or a finished run or a
            library (and time).
        overrides: Settings to change.
    """
    if run is not None:
        require_folder(run)
    from latentscenes.evaluation.tables import print_cost

    print_cost(run, config, baseline, overrides)


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Compare a run, library or dataset with its checksums. The exit status is 1 if something differs.

    Args:
        folder: Folder of a run, library or dataset, or the address of a published library.
    """
    if (folder / "views.json").is_file():
        from latentscenes.cli.data import data_verify

        return data_verify(folder)
    if not (folder / "run.json").is_file():
        from latentscenes.cli.library import library_verify

        return library_verify(folder)
    from latentscenes.storage.run import Run
    from latentscenes.storage.verifying import verify_run

    for damage in (damaged := verify_run(folder)):
        print(one_line(damage))
    if damaged:
        raise SystemExit(1)
    count = len(Run.open(folder).checkpoints())
    say(f"{folder}: {count} checkpoint{'s' * (count != 1)}, all intact.")


def view(
    library: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8080,
    data: Path | None = None,
    moving: int = 128,
    still: int = 384,
    machine: MachineOptions = MACHINE,
) -> None:
    """View a library in a browser: gallery, orbits, depth, latents, blends of scenes, photographs, cameras.

    Args:
        library: Library folder, or address of a published library.
        host: Address to serve at; the default admits this machine only, 0.0.0.0 every machine on the network.
        port: Port to serve at; 0: any free port.
        data: Dataset that the scenes were learned from, if it has moved.
        moving: Pixels along the shorter side of pictures while the camera moves.
        still: Pixels along the shorter side of pictures while the camera rests.
    """
    require_source(library)
    device = set_up(machine)
    from latentscenes.api import Library
    from latentscenes.storage.published.reader import open_source

    try:
        from latentscenes.viewer.server import view as serve
    except ModuleNotFoundError as error:
        if error.name != "viser":
            raise
        raise UserError("view needs viser. Run: pip install latentscenes[viewer]") from None

    serve(Library(open_source(library), device), host, port, data, moving, still)


def demo(out: Path = Path("demo"), machine: MachineOptions = MACHINE) -> None:
    """Run the whole pipeline on procedural cars: data, both stages, the RGB baseline, a table and a report.

    Args:
        out: Folder for all results. The same command continues a stopped demo.
    """
    device = set_up(machine)
    from latentscenes.cli.demo import run_demo

    run_demo(out, device)


def _settings(
    source: str,
    overrides: tuple[str, ...],
    print_and_stop: bool,
    finetune: bool = False,
    refine: bool = False,
    size: int = 0,
) -> "Config":
    from latentscenes.core import config, config_io

    settings = config_io.load(source, overrides, size)
    if finetune:
        settings = config.learning_shared(settings)
    if refine:
        from latentscenes.training.corrections import refining

        settings = refining(settings)
    if print_and_stop:
        print(config_io.dump(settings), end="")
        sys.exit(0)
    return settings
