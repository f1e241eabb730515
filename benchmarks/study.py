"""Studies: the same new scenes learned in many ways, from one YAML file to one table and chart.

    title: What base planes are worth
    seeds: [0, 1, 2]
    rows:
      - {label: RGB tri-planes, config: rgb, alone: true}           # every new scene by itself: no stage 1
      - {label: ours, run: cars}                                    # on a run, a library, or a model that is shipped
      - {label: one base plane, config: small, set: [planes.bases=1]}  # its own stage 1

Rows that agree in stage 1 share it. What is done lies in the study's folder and is not done again, so a study goes on
after a stop, and grows by lines.
"""

import dataclasses
import hashlib
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from latentscenes.cli.common import MACHINE, MachineOptions, run_program, set_up
from latentscenes.core import config as configuration
from latentscenes.core import config_io
from latentscenes.core.config import Config, ExploitOptions
from latentscenes.core.config_io import build
from latentscenes.core.console import Table, bytes_text, console, seconds_text
from latentscenes.core.errors import UserError
from latentscenes.core.files import write_json
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation import cost
from latentscenes.evaluation.charts import Series, chart_file
from latentscenes.evaluation.evaluate import Evaluation, evaluate, evaluate_stored
from latentscenes.evaluation.tables import print_things
from latentscenes.storage import maintenance as care
from latentscenes.storage.library import SCORES, LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.storage.quantize import check_precision
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet, StoredScenes
from latentscenes.training.exploit import learn_new
from latentscenes.training.loop import train

COUNTED = ("seconds", "scene_bytes", "stored_bytes", "shared_bytes", "stage_one_seconds", "view_ms")
"""Figures that a chart can have along its x axis."""


@dataclass(frozen=True)
class Row:
    """One way of learning the new scenes."""

    label: str
    config: str = "small"
    """Preset or YAML file of stage 1 and 2; unused with `run`."""
    run: str | None = None
    """Learn on top of this run, library or shipped model, instead of a stage 1 of the row's own."""
    set: tuple[str, ...] = ()
    """Settings changed, as on the command line."""
    alone: bool = False
    """No stage 1: the new scenes are what `train` learns."""
    finetune: bool = False
    """Shared parts go on learning in stage 2."""
    learn_from: str | None = None
    """Dataset of stage 1, by its name on the command line; unset: that of the new scenes."""
    data: str | None = None
    """Dataset of the new scenes; unset: the first named."""
    train_limit: int | None = None
    """Scenes of stage 1; unset: as the study says."""
    precisions: tuple[str, ...] = ("float32",)
    """Scored at each of these."""


@dataclass(frozen=True)
class Chart:
    """A line through the rows of each series."""

    x: str
    """A figure of the table by its name in study.json, for instance stored_bytes."""
    label: str
    """What x is, in words."""
    series: tuple[str, ...] = ()
    """Beginnings of labels that make a line each; unset: one line through all."""
    log: bool = True


@dataclass(frozen=True)
class Study:
    """What to compare."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    seeds: tuple[int, ...] = (0,)
    train_limit: int | None = None
    """Scenes of stage 1; unset: all."""
    limit: int | None = None
    """New scenes; unset: all."""
    old_scenes: bool = False
    """Also score the scenes of stage 1, with what stage 2 made of the shared parts."""
    chart: Chart | None = None

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"study: two rows are labeled {label!r}; labels must differ.")
        if self.chart and self.chart.x not in COUNTED:
            raise UserError(f"study: chart.x: no figure {self.chart.x!r}; there are {', '.join(COUNTED)}.")
        for row in self.rows:
            for precision in row.precisions:
                check_precision(precision)
            if row.alone and (row.run or row.finetune or row.precisions != ("float32",)):
                raise UserError(
                    f"study: row {row.label!r} learns alone, so it has no run, no finetune and no precisions."
                )


@dataclass(frozen=True)
class Figures:
    """What one row came to, with one seed."""

    label: str
    seed: int
    psnr: float
    ssim: float
    perceptual: float | None
    seconds: float
    """Of one new scene."""
    scene_bytes: int
    """Of one new scene, float32."""
    stored_bytes: float
    """Of one new scene as stored."""
    shared_bytes: int
    stage_one_seconds: float
    view_ms: float
    """Render and decode one view."""
    codec_psnr: float | None
    """Encode and decode alone; None where the codec is exact."""
    perceptual_metric: str | None
    old_psnr: float | None = None
    """Scenes of stage 1."""


def read_study(path: Path) -> Study:
    """A study from YAML, read as strictly as configurations are."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Name a YAML file with `title` and `rows`.")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return build(Study, tree, str(path))


def run_study(
    study: Study, data: dict[str, Path], out: Path, device: torch.device, name: str = "study"
) -> list[Figures]:
    """Learn and score every row with every seed; write NAME.json, NAME.md and (if there is a chart) NAME.svg. Studies may
    share a folder, and with it what they have in common.

    Raises:
        UserError: a row names a dataset that is not in `data`, or its settings are wrong.
        Interrupted: a signal asked to stop; everything is saved, and the same call goes on.
    """
    views = {key: PosedImages.open(path) for key, path in data.items()}
    for row in study.rows:
        for needed in (row.data, row.learn_from):
            if needed is not None and needed not in views:
                raise UserError(
                    f"study: row {row.label!r} needs the dataset {needed!r}; give it with --data {needed}=FOLDER."
                )
        _settings(row, 0)  # mistakes show before anything is learned
    found = []
    for seed in study.seeds:
        for row in study.rows:
            for figures in _figures(study, row, seed, views, out, device):
                console.print(
                    f"{figures.label}, seed {seed}: {figures.psnr:.2f} dB, {seconds_text(figures.seconds)} a scene",
                    highlight=False,
                    soft_wrap=True,
                )
                found.append(figures)
    write_json(
        out / f"{name}.json",
        {"title": study.title, "rows": [dataclasses.asdict(figures) for figures in found]},
    )
    (out / f"{name}.md").write_text(table(study, found).markdown())
    if study.chart:
        (out / f"{name}.svg").write_text(chart(study, found))
    return found


def _settings(row: Row, seed: int) -> Config:
    source = str(open_parent(Path(row.run)).path / "config.yaml") if row.run else row.config
    settings = config_io.load(source, (*row.set, f"seed={seed}"))
    return configuration.learning_shared(settings) if row.finetune else settings


def _place(out: Path, kind: str, *parts: object) -> Path:
    return out / f"{kind}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def _figures(
    study: Study, row: Row, seed: int, views: dict[str, PosedImages], out: Path, device: torch.device
) -> Iterator[Figures]:
    settings, fresh = _settings(row, seed), views[row.data or next(iter(views))]
    if row.alone:
        run = train(
            settings,
            fresh,
            _place(out, "alone", settings, fresh.path, study.limit),
            split="new",
            limit=study.limit,
            device=device,
        )
        yield _measured(row.label, seed, SceneSet.of_run(run, device=device), fresh)
        return
    parent = (
        open_parent(Path(row.run)) if row.run else _stage_one(study, row, settings, views, fresh, out, device)
    )
    folder = _place(out, "library", settings, parent.path, fresh.path, study.limit, row.finetune)
    options = ExploitOptions(precision="float32", stage_one=False, limit=study.limit)
    learn_new(folder, fresh, settings, parent.path, row.finetune, options, device)
    old = (
        _old_psnr(parent, LibraryFolder.open(folder), device)
        if study.old_scenes and isinstance(parent, Run)
        else None
    )
    for precision in row.precisions:
        label = row.label if len(row.precisions) == 1 else f"{row.label}, {precision}"
        learned = SceneSet.open(_stored_as(folder, precision, device), device=device)
        yield dataclasses.replace(_measured(label, seed, learned, fresh), old_psnr=old)


def _stage_one(
    study: Study,
    row: Row,
    settings: Config,
    views: dict[str, PosedImages],
    fresh: PosedImages,
    out: Path,
    device: torch.device,
) -> Run:
    taught = views[row.learn_from] if row.learn_from else fresh
    limit = row.train_limit or study.train_limit
    own = dataclasses.replace(settings, exploit=())  # rows that differ in stage 2 alone share stage 1
    return train(own, taught, _place(out, "stage-one", own, taught.path, limit), limit=limit, device=device)


def _stored_as(folder: Path, precision: str, device: torch.device) -> Path:
    """The library itself, or a copy of it that is stored more coarsely."""
    if precision == "float32":
        return folder
    coarse = folder.with_name(f"{folder.name}-{precision}")
    if not (coarse / "complete").exists():
        shutil.rmtree(coarse, ignore_errors=True)
        shutil.copytree(folder, coarse)
        (coarse / SCORES).unlink(missing_ok=True)
        care.repack(LibraryFolder.open(coarse), precision, device)
        (coarse / "complete").touch()
    return coarse


def _measured(label: str, seed: int, learned: StoredScenes, views: PosedImages) -> Figures:
    evaluation, account = evaluate_stored(learned, views), cost.account_learned(learned)
    mean, time = evaluation.mean, account.time
    return Figures(
        label,
        seed,
        mean.psnr,
        mean.ssim,
        mean.perceptual,
        time.scene or 0.0,
        account.memory.scene,
        learned.scene_bytes,
        account.memory.shared,
        time.stage_one,
        1000 * evaluation.render_seconds,
        mean.codec_psnr if mean.codec_psnr < 99 else None,
        evaluation.perceptual_metric,
    )


def _old_psnr(parent: Run, store: LibraryFolder, device: torch.device) -> float:
    """Of the scenes of stage 1, rendered with the shared parts that a library has."""
    learned, views = SceneSet.of_run(parent), PosedImages.open(parent.info.data)
    _, rows = parent.load(device)
    loaded = SceneSet.of_table(store.model(device), rows, learned.names)
    found: Evaluation = evaluate(loaded, views, learned.scenes(views))
    return found.mean.psnr


# Table and chart


def _mean(found: list[Figures], label: str, name: str) -> tuple[float | None, float]:
    """Mean over seeds and standard deviation."""
    values = [getattr(figures, name) for figures in found if figures.label == label]
    if None in values:
        return None, 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(study: Study, found: list[Figures]) -> Table:
    """A line per row; where there are several seeds, PSNR with its standard deviation over them."""
    labels = list(dict.fromkeys(figures.label for figures in found))
    several, metric = (
        len(study.seeds) > 1,
        next((figures.perceptual_metric for figures in found if figures.perceptual_metric), "perceptual"),
    )
    columns = {
        "PSNR": lambda label: f"{{:.2f}}{' ± {:.2f}' if several else ''}".format(
            *_mean(found, label, "psnr")
        ),
        "SSIM": lambda label: f"{_mean(found, label, 'ssim')[0]:.4f}",
        metric: lambda label: _text(_mean(found, label, "perceptual")[0], ".4f"),
        "codec alone": lambda label: _text(_mean(found, label, "codec_psnr")[0], ".2f"),
        "old scenes": lambda label: _text(_mean(found, label, "old_psnr")[0], ".2f"),
        "time / scene": lambda label: seconds_text(_mean(found, label, "seconds")[0]),
        "stage 1": lambda label: seconds_text(_mean(found, label, "stage_one_seconds")[0] or None),
        "bytes / scene": lambda label: bytes_text(_mean(found, label, "scene_bytes")[0]),
        "as stored": lambda label: bytes_text(_mean(found, label, "stored_bytes")[0]),
        "shared": lambda label: bytes_text(_mean(found, label, "shared_bytes")[0]),
        "ms / view": lambda label: f"{_mean(found, label, 'view_ms')[0]:.1f}",
    }
    unused = {metric: "perceptual", "codec alone": "codec_psnr", "old scenes": "old_psnr"}
    kept = {
        name: cell
        for name, cell in columns.items()
        if name not in unused or any(getattr(figures, unused[name]) is not None for figures in found)
    }
    rows = tuple((label, *(cell(label) for cell in kept.values())) for label in labels)
    return Table(study.title, ("", *kept), rows, note=study.note)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def chart(study: Study, found: list[Figures]) -> str:
    """PSNR over the figure that the study names, as an SVG file's text."""
    wanted, lines = study.chart, []
    for color, prefix in enumerate(wanted.series or ("",)):
        labels = list(dict.fromkeys(figures.label for figures in found if figures.label.startswith(prefix)))
        points = sorted(
            (_mean(found, label, wanted.x)[0], _mean(found, label, "psnr")[0]) for label in labels
        )
        lines.append(
            Series(prefix.rstrip(" ,"), tuple(x for x, _ in points), tuple(y for _, y in points), color)
        )
    return chart_file(study.title, lines, wanted.label, "PSNR, dB", log_x=wanted.log)


def main(study: Path, data: tuple[str, ...], out: Path, machine: MachineOptions = MACHINE) -> None:
    """Learn the same new scenes in many ways, as a YAML file lists them, into one table and chart. The same command again
    goes on where it stopped.

    Args:
        study: YAML file with `title` and `rows`; docs/results/claims holds some.
        data: datasets: a folder, or NAME=FOLDER where rows name several; the first is that of rows that name none.
        out: folder for runs and libraries, the figures as JSON, the table as Markdown, the chart as SVG; several studies may share it.
    """
    wanted, folders = read_study(study), {}
    for given in data:
        name, _, folder = given.rpartition("=")
        if (name or "data") in folders:
            raise UserError(
                f"--data {given}: the second of its name. Name datasets apart, for instance cars={folder}."
            )
        folders[name or "data"] = Path(folder)
    print_things(table(wanted, run_study(wanted, folders, out, set_up(machine), study.stem)))


if __name__ == "__main__":
    run_program(main)
