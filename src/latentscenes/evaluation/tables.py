"""Tables of scores, of costs, and of ours against RGB tri-planes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from latentscenes.core import config_io
from latentscenes.core.console import Table, bytes_text, percent_text, seconds_text, show
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation import cost
from latentscenes.evaluation.cost import Costs, TimeCost
from latentscenes.evaluation.evaluate import Evaluation, SceneScore, mean_score
from latentscenes.model.metrics import PSNR_CAP
from latentscenes.storage.scene_set import SceneSet, StoredScenes

SHOWN_WORST, SHOWN_BEST = 8, 4
"""Number of scenes shown in a table of scores if there are too many to list."""


@dataclass(frozen=True)
class Variant:
    """The same new scenes learned in another way."""

    label: str
    """Names it in tables, after "latentscenes" or "…"."""
    scenes: StoredScenes
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """The content of a report: a finished stage 1, new scenes learned with it, and RGB tri-planes of these
    scenes."""

    train: StoredScenes
    new: StoredScenes
    evaluation_train: Evaluation
    evaluation_new: Evaluation
    views: PosedImages
    """The dataset of all scenes."""
    rgb: StoredScenes | None = None
    """RGB tri-planes of the same new scenes, or of some of them."""
    evaluation_rgb: Evaluation | None = None
    variants: tuple[Variant, ...] = ()
    """Further rows of the summary."""
    title: str = "latentscenes"
    introduction: str = ""
    """One or two sentences under the title."""
    commands: tuple[str, ...] = ()
    """Commands that reproduce the results. If empty, the commands noted in the runs."""
    shortcomings: tuple[str, ...] = ()
    """Known limitations, in addition to the limitations that follow from the figures."""

    @property
    def common(self) -> set[str]:
        """Names of the new scenes that both sides learned. Without RGB, names of all new scenes."""
        names = {score.name for score in self.evaluation_new.scenes}
        return names & {score.name for score in self.evaluation_rgb.scenes} if self.evaluation_rgb else names

    def mean(self, evaluation: Evaluation) -> SceneScore:
        """Mean over the scenes that both sides learned."""
        return mean_score([score for score in evaluation.scenes if score.name in self.common])


# Scores


def print_scores(evaluation: Evaluation) -> None:
    """Prints scores to the terminal."""
    show(scores_table(evaluation))


def scores_table(evaluation: Evaluation) -> Table:
    """Scenes from worst to best, and their mean. The codec's scores are added if they are a ceiling."""
    perceptual, ceiling = evaluation.mean.perceptual is not None, has_ceiling(evaluation.mean)
    latents = evaluation.mean.latent_error is not None
    ordered = sorted(evaluation.scenes, key=lambda score: score.psnr)
    left_out = len(ordered) - SHOWN_WORST - SHOWN_BEST
    shown = ordered if left_out <= 1 else [*ordered[:SHOWN_WORST], None, *ordered[-SHOWN_BEST:]]
    metrics = ["PSNR", "SSIM", *([str(evaluation.perceptual_metric)] if perceptual else [])]
    ceilings = [f"codec {name}" for name in metrics] if ceiling else []
    silhouettes = evaluation.mean.silhouette_error is not None
    columns = (
        "scene, worst first",
        *metrics,
        *ceilings,
        *(["latent error"] if latents else []),
        *(["silhouette error"] if silhouettes else []),
    )

    def line(score: SceneScore | None) -> tuple[str, ...]:
        if score is None:
            return (f"… {left_out} scenes …", *[""] * (len(columns) - 1))
        of_codec = _quality_cells(score, perceptual, codec=True) if ceiling else []
        error = [f"{score.latent_error:.5f}"] if latents else []
        outline = [f"{score.silhouette_error:.4f}"] if silhouettes else []
        quality = _quality_cells(score, perceptual)
        return (score.name, *quality, *of_codec, *error, *outline)

    part = {"held_out": "held-out views", "fit": "training views"}.get(evaluation.part, evaluation.part)
    note = f"Rendering and decoding a view took {evaluation.render_spent}."
    if ceiling:
        note += " Codec: the image encoded and decoded, which is the ceiling for renders."
    if silhouettes:
        note += " Silhouette error: mean |opacity − alpha|."
    if not perceptual:
        note += " No perceptual metric is installed."
    rows = tuple(line(score) for score in [*shown, evaluation.mean])
    return Table(
        f"{counted(len(ordered), 'scene')}, {evaluation.views} {part}", columns, rows, (len(rows) - 1,), note
    )


def _quality_cells(score: SceneScore, perceptual: bool, codec: bool = False) -> list[str]:
    """PSNR, SSIM and (if wanted) the perceptual distance, of renders or of the codec."""
    psnr, ssim, distance = score.psnr, score.ssim, score.perceptual
    if codec:
        psnr, ssim, distance = score.codec_psnr, score.codec_ssim, score.codec_perceptual
    return [
        f"{psnr:.2f}",
        f"{ssim:.4f}",
        *(["–" if distance is None else f"{distance:.4f}"] if perceptual else []),
    ]


def is_exact(score: SceneScore) -> bool:
    """Whether the codec reproduces every image exactly: latents are the pixels."""
    return score.codec_psnr is not None and score.codec_psnr >= PSNR_CAP - 0.5


def has_ceiling(score: SceneScore) -> bool:
    """Whether the codec bounds the quality of renders: it encodes all channels, but not exactly."""
    return score.codec_psnr is not None and not is_exact(score)


# Costs


def print_cost(
    run_path: Path | None, config_name: str | None, baseline: str, overrides: Sequence[str] = ()
) -> None:
    """Prints the cost of a run or of a configuration against a baseline.

    Args:
        run_path: run or library.
        config_name: preset or YAML file, used without `run_path`.
        baseline: preset, YAML file, or a folder of learned scenes; only with a folder are times compared.
        overrides: settings changed in the configuration of the run, or in `config_name`.
    """
    if run_path is None and config_name is None:
        raise UserError(
            "cost: name a run with --run or a configuration with --config. "
            f"Presets: {', '.join(config_io.presets())}."
        )
    if run_path is not None:
        changed = config_io.load(run_path / "config.yaml", overrides) if overrides else None
        ours = cost.learned_costs(SceneSet.open(run_path), changed)
    else:
        ours = cost.config_costs(config_io.load(str(config_name), overrides))
    if Path(baseline).is_dir():
        other = cost.learned_costs(SceneSet.open(baseline))
    else:
        other = cost.config_costs(config_io.load(baseline))
    show(*cost_tables(ours, other), *break_even_sentences(ours, other))


def parts_table(ours: Costs, other: Costs) -> Table:
    """Memory of each part of the model."""
    names = {
        "codec": "codec",
        "base planes": "bases",
        "field": "field",
        "all shared parts": "shared",
        "one scene": "scene",
    }
    columns, stored = ("bytes, float32", "ours", "RGB"), {}
    if ours.stored:
        columns += ("ours as stored",)
        stored = {"shared": bytes_text(ours.stored[0]), "scene": bytes_text(ours.stored[1])}
    rows = tuple(
        (title, *(bytes_text(getattr(side.memory, name)) for side in (ours, other)), stored.get(name, ""))
        for title, name in names.items()
    )
    return Table("Memory", columns, tuple(row[: len(columns)] for row in rows), (3, 4))


def cost_tables(ours: Costs, other: Costs) -> list[Table]:
    """Bytes of each part, and bytes and time per scene in collections of several sizes. Without a learned new
    scene, there is no table of times."""
    tables = [parts_table(ours, other), bytes_table(ours, other)]
    if ours.time is not None and ours.time.scene is not None:
        tables.append(time_table(ours.time, other.time))
    return tables


def bytes_table(ours: Costs, other: Costs) -> Table:
    """Bytes per scene in collections of several sizes."""
    rows = []
    for count in cost.COUNTS:
        mine, theirs = ours.memory.per_scene(count), other.memory.per_scene(count)
        change = percent_text(cost.saving(mine, theirs))
        rows.append((_with_spaces(count), bytes_text(mine), bytes_text(theirs), change))
    columns, note = ("scenes N", "ours", "RGB", "change"), "Amortized: shared / N + own."
    return Table("Bytes per scene", columns, tuple(rows), (), note)


def time_table(ours: TimeCost, other: TimeCost | None) -> Table:
    """Time per scene in collections of several sizes. Without times of the other side, there is one side."""
    sides = [ours] if other is None or other.scene is None else [ours, other]
    columns = ["scenes N", "CPU, ours"]
    columns += ["RGB", "change"] if len(sides) == 2 else []
    columns += ["CPU, counting", "wall, ours", "RGB"][: 1 + len(sides)]
    clock, rows = attrgetter(cost.clock(*sides)), []
    for count in cost.COUNTS:
        spent = [side.per_scene(count) for side in sides]
        cpu, wall = ([seconds_text(getattr(one, name)) for one in spent] for name in ("cpu", "wall"))
        change = [percent_text(cost.saving(*map(clock, spent)))] if len(spent) == 2 else []
        counting = seconds_text(ours.per_scene_counting(count).cpu) if ours.stage_one_scenes else "–"
        rows.append((_with_spaces(count), *cpu, *change, counting, *wall))
    note = (
        "Amortized: stage 1 / N + own. Counting: the N scenes include the "
        f"{ours.stage_one_scenes} of stage 1, (t₁ + (N − N₁) τ) / N."
    )
    return Table("Time per scene", tuple(columns), tuple(rows), (), note)


def _with_spaces(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def break_even_sentences(ours: Costs, other: Costs) -> list[str]:
    """Sentences on the break-even and on the measured times."""
    found = [f"Memory: {_break_even_text(cost.memory_break_even(ours.memory, other.memory))}."]
    if (time := ours.time) is not None:
        if time.stage_one.wall:
            count = time.stage_one_scenes
            each = (
                f"{counted(count, 'scene')} (each {time.stage_one.times(1 / count)})"
                if count
                else "its scenes"
            )
            found.append(f"Stage 1 took {time.stage_one} for {each}.")
        if time.scene is None:
            found.append("The time of a new scene is known once `latentscenes exploit` has learned some.")
        else:
            found.append(f"One new scene took {time.scene}.")
    times = _comparable_times(ours, other)
    if times:
        found.append(f"{_clock_text(*times)}: {_break_even_text(cost.time_break_even(*times))}.")
    elif ours.time is not None and other.time is None:
        found.append("Name a run of RGB tri-planes as the baseline to compare times.")
    return found


def _clock_text(*times: TimeCost) -> str:
    if cost.clock(*times) == "cpu":
        return "CPU time"
    return "Wall time (the CPU time of a side was not recorded)"


def _comparable_times(ours: Costs, other: Costs) -> tuple[TimeCost, TimeCost] | None:
    if ours.time is None or other.time is None or ours.time.scene is None or other.time.scene is None:
        return None
    return ours.time, other.time


def _break_even_text(count: float | None) -> str:
    if count is None:
        return "RGB tri-planes stay cheaper at any number of scenes"
    start = "from the first scene on" if count < 1 else f"from N = {math.floor(count) + 1} scenes on"
    return f"cheaper than RGB tri-planes {start}"


# Ours against RGB tri-planes


def summary_table(content: Comparison, count: int = 1000) -> Table:
    """Quality and cost of both sides on the scenes that both learned. `count` scenes share the cost of shared
    parts."""
    scores = content.mean(content.evaluation_new)
    rgb = content.mean(content.evaluation_rgb) if content.evaluation_rgb else None
    perceptual = scores.perceptual is not None and (rgb is None or rgb.perceptual is not None)
    metrics = ["PSNR", "SSIM", *([str(content.evaluation_new.perceptual_metric)] if perceptual else [])]
    at = f"at N = {count}"
    columns = (
        "", *metrics, "CPU / scene", at, "wall / scene", "bytes / scene", at, "CPU / view", "wall / view",
    )  # fmt: skip

    def line(label: str, learned: StoredScenes, evaluation: Evaluation) -> tuple[str, ...]:
        account = cost.learned_costs(learned)
        own, amortized = account.time.scene, account.time.per_scene(count)
        seconds = (own.cpu, amortized.cpu, own.wall) if own else (None, None, None)
        sizes = (account.memory.scene, account.memory.per_scene(count))
        quality = _quality_cells(content.mean(evaluation), perceptual)
        costs = [*map(seconds_text, seconds), *map(bytes_text, sizes)]
        return (label, *quality, *costs, *_view_cells(evaluation))

    rows = []
    if content.rgb and content.evaluation_rgb:
        rows.append(line("RGB tri-planes", content.rgb, content.evaluation_rgb))
    rows.append(line("latentscenes, new scenes", content.new, content.evaluation_new))
    stressed, empty = len(rows) - 1, [""] * 5
    rows += [line(f"… {other.label}", other.scenes, other.evaluation) for other in content.variants]
    trained = content.evaluation_train
    cells = _quality_cells(trained.mean, perceptual)
    rows.append(("… scenes of stage 1", *cells, *empty, *_view_cells(trained)))
    if has_ceiling(scores):
        rows.append(
            ("… codec alone (ceiling)", *_quality_cells(scores, perceptual, codec=True), *empty, "", "")
        )
    shown, learned = len(content.common), len(content.evaluation_new.scenes)
    note = f"Means over {shown}{f' of {learned}' if shown < learned else ''} new scenes, held-out views."
    if content.new.stored:
        size = bytes_text(content.new.scene_bytes)
        note += f" Bytes are for float32; on disk, ours takes {size} per scene ({content.new.stored})."
    return Table("Ours against RGB tri-planes", columns, tuple(rows), (stressed,), note)


def _view_cells(evaluation: Evaluation) -> list[str]:
    """CPU and wall time of a view."""
    return [seconds_text(evaluation.render_spent.cpu), seconds_text(evaluation.render_spent.wall)]


def print_summary(content: Comparison) -> None:
    """Prints the summary to the terminal."""
    show(summary_table(content))
