"""Measures quality, time and memory of many ways to learn the same new scenes, into one table and chart. Run:

    python -m benchmarks.study --study study.yaml --data data/cars --out studies

A study is a YAML file:

    title: The value of base planes
    seeds: [0, 1, 2]
    rows:
      - {label: RGB tri-planes, config: rgb, alone: true}              # no stage 1
      - {label: ours, run: cars}                                       # on a run, a library or a pretrained
        model
      - {label: one base plane, config: small, set: [planes.bases=1]}  # its own stage 1

Rows with the same stage 1 share it. The study's folder keeps finished parts, so the same command continues a
stopped study and learns only new rows.
"""

import dataclasses
import hashlib
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from latentscenes.cli.common import MACHINE, MachineOptions, run_program, say, set_up
from latentscenes.core import config as configuration
from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.config_io import build
from latentscenes.core.console import Spent, Table, bytes_text, seconds_text, show
from latentscenes.core.errors import UserError
from latentscenes.core.files import write_json
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation import cost
from latentscenes.evaluation.charts import Series, chart_file
from latentscenes.evaluation.evaluate import Evaluation, evaluate, evaluate_stored
from latentscenes.evaluation.tables import has_ceiling
from latentscenes.storage import maintenance
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import open_parent
from latentscenes.storage.quantize import check_precision
from latentscenes.storage.records import SCORES
from latentscenes.storage.run import Run
from latentscenes.storage.scene_set import SceneSet, StoredScenes
from latentscenes.training.finetune import learn_new
from latentscenes.training.loop import train

COUNTED = (
    "cpu_seconds", "seconds", "scene_bytes", "stored_bytes", "shared_bytes", "stage_one_cpu_seconds",
    "view_cpu_ms",
)  # fmt: skip
"""Figures that a chart can have on its x axis."""


@dataclass(frozen=True)
class Row:
    """One way of learning the new scenes."""

    label: str
    config: str = "small"
    """Preset or YAML file of stage 1 and 2; unused with `run`."""
    run: str | None = None
    """Learn on top of this run, library or pretrained model. Unset: the row has its own stage 1."""
    set: tuple[str, ...] = ()
    """Changed settings, as on the command line."""
    alone: bool = False
    """No stage 1: `train` learns the new scenes."""
    finetune: bool = False
    """Shared parts continue to learn in stage 2."""
    learn_from: str | None = None
    """Dataset of stage 1, by its name on the command line. Unset: the dataset of the new scenes."""
    data: str | None = None
    """Dataset of the new scenes. Unset: the first dataset on the command line."""
    train_limit: int | None = None
    """Number of scenes of stage 1. Unset: as in the study."""
    precisions: tuple[str, ...] = ("float32",)
    """The library is stored and scored at each of these."""


@dataclass(frozen=True)
class Chart:
    """A line through the rows of each series."""

    x: str
    """A figure of the table by its name in study.json, for instance stored_bytes."""
    label: str
    """Label of the x axis."""
    series: tuple[str, ...] = ()
    """Prefixes of labels; rows with the same prefix form a line. Unset: one line through all rows."""
    log: bool = True


@dataclass(frozen=True)
class Study:
    """A study as read from YAML."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    seeds: tuple[int, ...] = (0,)
    train_limit: int | None = None
    """Number of scenes of stage 1. Unset: all."""
    limit: int | None = None
    """Number of new scenes. Unset: all."""
    old_scenes: bool = False
    """Also score the scenes of stage 1 with the shared parts after stage 2."""
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
    """Results of one row with one seed."""

    label: str
    seed: int
    psnr: float
    ssim: float
    perceptual: float | None
    cpu_seconds: float | None
    """CPU time to learn one new scene."""
    seconds: float
    """Wall time to learn one new scene."""
    scene_bytes: int
    """Memory of one new scene as float32."""
    stored_bytes: float
    """Size of one new scene on disk."""
    shared_bytes: int
    stage_one_cpu_seconds: float | None
    """None if an earlier version learned the shared parts."""
    view_cpu_ms: float
    """CPU time to render and decode one view, in milliseconds."""
    codec_psnr: float | None
    """PSNR of encoding and decoding alone. None if the codec is exact."""
    perceptual_metric: str | None
    old_psnr: float | None = None
    """PSNR of the scenes of stage 1."""


def read_study(path: Path) -> Study:
    """Reads a study from YAML, as strictly as a configuration."""
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
    """Learns and scores every row with every seed. Writes NAME.json, NAME.md and (if there is a chart)
    NAME.svg. Studies in one folder share their common parts.

    Raises:
        UserError: a row names a dataset that is not in `data`, or its settings are wrong.
        Interrupted: a signal asked to stop. Everything is saved, and the same call continues.
    """
    views = {key: PosedImages.open(path) for key, path in data.items()}
    for row in study.rows:
        for needed in (row.data, row.learn_from):
            if needed is not None and needed not in views:
                raise UserError(
                    f"study: row {row.label!r} needs the dataset {needed!r}: --data {needed}=FOLDER."
                )
        _settings(row, 0)  # raises on errors before anything is learned
    found = []
    for seed in study.seeds:
        for row in study.rows:
            for figures in _figures(study, row, seed, views, out, device):
                spent = Spent(figures.seconds, figures.cpu_seconds)
                result = f"{figures.psnr:.2f} dB, {spent} per scene"
                say(f"{figures.label}, seed {seed}: {result}")
                found.append(figures)
    rows = [dataclasses.asdict(figures) for figures in found]
    write_json(out / f"{name}.json", {"title": study.title, "rows": rows})
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
        place = _place(out, "alone", settings, fresh.path, study.limit)
        run = train(settings, fresh, place, split="new", limit=study.limit, device=device)
        yield _measured(row.label, seed, SceneSet.of_run(run, device=device), fresh)
        return
    if row.run:
        parent = open_parent(Path(row.run))
    else:
        source = views[row.learn_from] if row.learn_from else fresh
        limit = row.train_limit or study.train_limit
        own = dataclasses.replace(settings, exploit=())  # rows that differ only in stage 2 share stage 1
        place = _place(out, "stage-one", own, source.path, limit)
        parent = train(own, source, place, limit=limit, device=device)
    folder = _place(out, "library", settings, parent.path, fresh.path, study.limit, row.finetune)
    options = ExploitOptions(precision="float32", stage_one=False, limit=study.limit)
    learn_new(folder, fresh, settings, parent.path, row.finetune, options, device)
    scored = study.old_scenes and isinstance(parent, Run)
    old = _old_psnr(parent, LibraryFolder.open(folder), device) if scored else None
    for precision in row.precisions:
        label = row.label if len(row.precisions) == 1 else f"{row.label}, {precision}"
        learned = SceneSet.open(_stored_as(folder, precision, device), device=device)
        yield dataclasses.replace(_measured(label, seed, learned, fresh), old_psnr=old)


def _stored_as(folder: Path, precision: str, device: torch.device) -> Path:
    """Returns the library itself, or a copy of it at lower precision."""
    if precision == "float32":
        return folder
    coarse = folder.with_name(f"{folder.name}-{precision}")
    if not (coarse / "complete").exists():
        shutil.rmtree(coarse, ignore_errors=True)
        shutil.copytree(folder, coarse)
        (coarse / SCORES).unlink(missing_ok=True)
        maintenance.repack(LibraryFolder.open(coarse), precision, device)
        (coarse / "complete").touch()
    return coarse


def _measured(label: str, seed: int, learned: StoredScenes, views: PosedImages) -> Figures:
    evaluation, account = evaluate_stored(learned, views), cost.learned_costs(learned)
    mean, time = evaluation.mean, account.time
    spent = time.scene or Spent(0.0, 0.0)
    return Figures(
        label, seed,
        psnr=mean.psnr, ssim=mean.ssim, perceptual=mean.perceptual,
        cpu_seconds=spent.cpu, seconds=spent.wall, stage_one_cpu_seconds=time.stage_one.cpu,
        scene_bytes=account.memory.scene, stored_bytes=learned.scene_bytes,
        shared_bytes=account.memory.shared, view_cpu_ms=1000 * evaluation.render_cpu_seconds,
        codec_psnr=mean.codec_psnr if has_ceiling(mean) else None,
        perceptual_metric=evaluation.perceptual_metric,
    )  # fmt: skip


def _old_psnr(parent: Run, store: LibraryFolder, device: torch.device) -> float:
    """PSNR of the scenes of stage 1 with the shared parts of a library."""
    learned, views = SceneSet.of_run(parent), PosedImages.open(parent.info.data)
    _, rows = parent.load(device)
    loaded = SceneSet.of_table(store.model(device), rows, learned.names)
    found: Evaluation = evaluate(loaded, views, learned.scenes(views))
    return found.mean.psnr


# Table and chart


def _mean(found: list[Figures], label: str, name: str) -> tuple[float | None, float]:
    """Mean and standard deviation over seeds."""
    values = [getattr(figures, name) for figures in found if figures.label == label]
    if None in values:
        return None, 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(study: Study, found: list[Figures]) -> Table:
    """A line per row. With several seeds, PSNR has its standard deviation over them."""
    metric = next((figures.perceptual_metric for figures in found if figures.perceptual_metric), "perceptual")
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "PSNR": ("psnr", "{:.2f}".format),
        "SSIM": ("ssim", "{:.4f}".format),
        metric: ("perceptual", "{:.4f}".format),
        "codec alone": ("codec_psnr", "{:.2f}".format),
        "old scenes": ("old_psnr", "{:.2f}".format),
        "CPU / scene": ("cpu_seconds", seconds_text),
        "wall / scene": ("seconds", seconds_text),
        "stage 1, CPU": ("stage_one_cpu_seconds", lambda seconds: seconds_text(seconds or None)),
        "bytes / scene": ("scene_bytes", bytes_text),
        "as stored": ("stored_bytes", bytes_text),
        "shared": ("shared_bytes", bytes_text),
        "CPU ms / view": ("view_cpu_ms", "{:.1f}".format),
    }

    def cell(label: str, figure: str, text: Callable[[float], str]) -> str:
        mean, deviation = _mean(found, label, figure)
        shown = figure == "psnr" and len(study.seeds) > 1
        return "" if mean is None else text(mean) + (f" ± {deviation:.2f}" if shown else "")

    used = {
        name: column
        for name, column in columns.items()
        if any(getattr(figures, column[0]) is not None for figures in found)
    }
    labels = dict.fromkeys(figures.label for figures in found)
    rows = tuple((label, *(cell(label, *column) for column in used.values())) for label in labels)
    return Table(study.title, ("", *used), rows, note=study.note)


def chart(study: Study, found: list[Figures]) -> str:
    """SVG text of PSNR over the figure on the study's x axis."""
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
    """Learn the same new scenes in the ways that a YAML file lists. The same command continues a stopped
    study.

    Args:
        study: YAML file with `title` and `rows`; docs/results/claims holds some.
        data: folders of datasets, as NAME=FOLDER if rows name several; the first is the default of rows.
        out: folder for runs, libraries, figures (JSON), table (Markdown) and chart (SVG); studies may share
            it.
    """
    wanted, folders = read_study(study), {}
    for given in data:
        name, _, folder = given.rpartition("=")
        if (name or "data") in folders:
            raise UserError(
                f"--data {given}: this name is taken. Name each dataset, for instance cars={folder}."
            )
        folders[name or "data"] = Path(folder)
    show(table(wanted, run_study(wanted, folders, out, set_up(machine), study.stem)))


if __name__ == "__main__":
    run_program(main)
