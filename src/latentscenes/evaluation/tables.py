"""Results as tables: scores, the ledger of costs, and ours against RGB tri-planes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from latentscenes.core import config_io
from latentscenes.core.console import Table, bytes_text, percent_text, seconds_text
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.evaluation import cost
from latentscenes.evaluation.cost import Account
from latentscenes.evaluation.evaluate import Evaluation, SceneScore, mean_score
from latentscenes.model.metrics import PSNR_CAP
from latentscenes.storage.scene_set import SceneSet, StoredScenes

SHOWN_WORST, SHOWN_BEST = 8, 4
"""Scenes in a table of scores where there are too many to list."""


@dataclass(frozen=True)
class Comparison:
    """Everything a report is about: a finished stage 1, new scenes learned with it, and RGB tri-planes of
    them."""

    train: StoredScenes
    new: StoredScenes
    evaluation_train: Evaluation
    evaluation_new: Evaluation
    views: PosedImages
    """The dataset of all of them."""
    rgb: StoredScenes | None = None
    """RGB tri-planes of the same new scenes, or of some of them."""
    evaluation_rgb: Evaluation | None = None
    pretrained: StoredScenes | None = None
    """The same new scenes on a model that comes with the package, without this stage 1."""
    evaluation_pretrained: Evaluation | None = None
    title: str = "latentscenes"
    introduction: str = ""
    """A sentence or two under the title."""
    commands: tuple[str, ...] = ()
    """Commands that give all this; if empty, those noted in the runs."""
    shortcomings: tuple[str, ...] = ()
    """What falls short, beside what the figures say by themselves."""

    @property
    def common(self) -> set[str]:
        """Names of new scenes that both sides learned; without RGB, all new ones."""
        names = {score.name for score in self.evaluation_new.scenes}
        return names & {score.name for score in self.evaluation_rgb.scenes} if self.evaluation_rgb else names

    def mean(self, evaluation: Evaluation) -> SceneScore:
        """Mean over the scenes that both sides learned."""
        return mean_score([score for score in evaluation.scenes if score.name in self.common])


# Scores


def print_scores(evaluation: Evaluation) -> None:
    """Scores to the terminal."""
    print_things(scores_table(evaluation))


def scores_table(evaluation: Evaluation) -> Table:
    """Scenes from worst to best, and their mean; beside every score, the codec's, which is its ceiling."""
    perceptual, exact = evaluation.mean.perceptual is not None, is_exact(evaluation.mean)
    ordered = sorted(evaluation.scenes, key=lambda score: score.psnr)
    left_out = len(ordered) - SHOWN_WORST - SHOWN_BEST
    shown = ordered if left_out <= 1 else [*ordered[:SHOWN_WORST], None, *ordered[-SHOWN_BEST:]]
    columns = [
        "scene, worst first",
        "PSNR",
        "SSIM",
        *([str(evaluation.perceptual_metric)] if perceptual else []),
    ]
    if not exact:
        columns += [f"codec {name}" for name in columns[1:]]
    columns.append("latent error")

    def line(score: SceneScore | None) -> tuple[str, ...]:
        if score is None:
            return (f"… {left_out} scenes …", *[""] * (len(columns) - 1))
        cells = [
            score.name,
            f"{score.psnr:.2f}",
            f"{score.ssim:.4f}",
            *([f"{score.perceptual:.4f}"] if perceptual else []),
        ]
        if not exact:
            cells += [
                f"{score.codec_psnr:.2f}",
                f"{score.codec_ssim:.4f}",
                *([f"{score.codec_perceptual:.4f}"] if perceptual else []),
            ]
        return (*cells, f"{score.latent_error:.5f}")

    part = {"held_out": "held-out views", "fit": "views learned from"}.get(evaluation.part, evaluation.part)
    note = f"Rendering and decoding took {1000 * evaluation.render_seconds:.1f} ms a view."
    if not exact:
        note += " Codec: the image encoded and decoded again, the ceiling of any render."
    if not perceptual:
        note += " No perceptual metric is installed."
    rows = tuple(line(score) for score in [*shown, evaluation.mean])
    return Table(
        f"{len(ordered)} scenes, {evaluation.views} {part}", tuple(columns), rows, (len(rows) - 1,), note
    )


def is_exact(score: SceneScore) -> bool:
    """Whether the codec gives every image back as it was: then its score says nothing."""
    return score.codec_psnr >= PSNR_CAP - 0.5


# Costs


def print_cost(
    run_path: Path | None, config_name: str | None, baseline: str, overrides: Sequence[str] = ()
) -> None:
    """The ledger to the terminal: of a run or else of a configuration, against a baseline, which is a preset,
    a YAML file, or a folder of learned scenes (then its seconds count too). Overrides change the
    configuration of the first."""
    if run_path is None and config_name is None:
        raise UserError(
            f"cost: name a run with --run or a configuration with --config. Presets: {', '.join(config_io.presets())}."
        )
    if run_path is not None:
        learned = SceneSet.open(run_path)
        ours = cost.account_learned(
            learned, config_io.load(run_path / "config.yaml", overrides) if overrides else None
        )
    else:
        ours = cost.account(config_io.load(str(config_name), overrides))
    other = (
        cost.account_learned(SceneSet.open(baseline))
        if Path(baseline).is_dir()
        else cost.account(config_io.load(baseline))
    )
    print_things(parts_table(ours, other), ledger_table(ours, other))
    for sentence in ledger_sentences(ours, other):
        print_things(sentence)


def parts_table(ours: Account, other: Account) -> Table:
    """Where the bytes are."""
    names = (
        ("codec", "codec"),
        ("base planes", "bases"),
        ("field", "field"),
        ("all that is shared", "shared"),
        ("one scene", "scene"),
    )
    columns = ["bytes, float32", "ours", "RGB"]
    stored: dict[str, str] = {}
    if ours.stored:
        columns.append("ours as stored")
        stored = {"shared": bytes_text(ours.stored[0]), "scene": bytes_text(ours.stored[1])}
    rows = tuple(
        (
            title,
            bytes_text(getattr(ours.memory, name)),
            bytes_text(getattr(other.memory, name)),
            *([stored.get(name, "")] if stored else []),
        )
        for title, name in names
    )
    return Table("Memory", tuple(columns), rows, (3, 4))


def ledger_table(ours: Account, other: Account, counts: Sequence[int] = cost.COUNTS) -> Table:
    """Cost of a scene in a collection of N."""
    columns, times = ["scenes N", "bytes, ours", "RGB", "change"], _comparable_time(ours, other)
    if ours.time is not None and ours.time.scene is not None:
        columns += ["time, ours", *(["RGB", "change"] if times else []), "counting"]
    rows = []
    for count in counts:
        mine, theirs = ours.memory.per_scene(count), other.memory.per_scene(count)
        cells = [
            f"{count:,}".replace(",", " "),
            bytes_text(mine),
            bytes_text(theirs),
            percent_text(cost.saving(mine, theirs)),
        ]
        if ours.time is not None and ours.time.scene is not None:
            cells.append(seconds_text(ours.time.per_scene(count)))
            if times:
                cells += [
                    seconds_text(times[1].per_scene(count)),
                    percent_text(cost.saving(times[0].per_scene(count), times[1].per_scene(count))),
                ]
            cells.append(
                seconds_text(ours.time.per_scene_counting(count)) if ours.time.stage_one_scenes else "–"
            )
        rows.append(tuple(cells))
    note = "Amortized: shared / N + own."
    if len(columns) > 4 and ours.time is not None:
        note += f" Counting: the {ours.time.stage_one_scenes} scenes of stage 1 are among the N, (t₁ + (N − N₁) τ) / N."
    return Table("Cost per scene", tuple(columns), tuple(rows), (), note)


def ledger_sentences(ours: Account, other: Account) -> list[str]:
    """Break-even and what the times rest on, in words."""
    found = [f"Memory: {_break_even_text(cost.memory_break_even(ours.memory, other.memory))}."]
    if ours.time is not None:
        each = (
            f" ({seconds_text(ours.time.stage_one / ours.time.stage_one_scenes)} each)"
            if ours.time.stage_one_scenes
            else ""
        )
        if ours.time.stage_one:
            found.append(
                f"Stage 1 took {seconds_text(ours.time.stage_one)} for {ours.time.stage_one_scenes or 'its'} scenes{each}."
            )
        if ours.time.scene is None:
            found.append("How long a new scene takes is known once `latentscenes exploit` has learned some.")
        else:
            found.append(f"A scene by itself took {seconds_text(ours.time.scene)}.")
    times = _comparable_time(ours, other)
    if times:
        found.append(f"Time: {_break_even_text(cost.time_break_even(*times))}.")
    elif ours.time is not None and other.time is None:
        found.append("Name a run of RGB tri-planes as the baseline to compare times.")
    return found


def _comparable_time(ours: Account, other: Account) -> tuple[cost.Time, cost.Time] | None:
    if ours.time is None or other.time is None or ours.time.scene is None or other.time.scene is None:
        return None
    return ours.time, other.time


def _break_even_text(count: float | None) -> str:
    if count is None:
        return "RGB tri-planes stay cheaper at any number of scenes"
    return (
        "cheaper than RGB tri-planes from the first scene on"
        if count < 1
        else f"cheaper than RGB tri-planes from N = {math.floor(count) + 1} scenes on"
    )


# Ours against RGB tri-planes


def summary_table(content: Comparison, count: int = 1000) -> Table:
    """Quality and cost of both sides on the scenes that both learned, shared parts divided over `count`
    scenes."""
    ours, scores = cost.account_learned(content.new), content.mean(content.evaluation_new)
    rgb = content.mean(content.evaluation_rgb) if content.evaluation_rgb else None
    perceptual = scores.perceptual is not None and (rgb is None or rgb.perceptual is not None)
    at = f"at N = {count}"
    columns = [
        "",
        "PSNR",
        "SSIM",
        *([str(content.evaluation_new.perceptual_metric)] if perceptual else []),
        "time / scene",
        at,
        "bytes / scene",
        at,
        "ms / view",
    ]

    def quality(score: SceneScore) -> list[str]:
        return [
            f"{score.psnr:.2f}",
            f"{score.ssim:.4f}",
            *([f"{score.perceptual:.4f}"] if perceptual else []),
        ]

    def line(label: str, score: SceneScore, of: Account, evaluation: Evaluation) -> tuple[str, ...]:
        time = of.time or cost.Time(0.0, 0, None)
        costs = [
            seconds_text(time.scene),
            seconds_text(time.per_scene(count)),
            bytes_text(of.memory.scene),
            bytes_text(of.memory.per_scene(count)),
        ]
        return (label, *quality(score), *costs, f"{1000 * evaluation.render_seconds:.1f}")

    rows = []
    if rgb and content.rgb and content.evaluation_rgb:
        rows.append(line("RGB tri-planes", rgb, cost.account_learned(content.rgb), content.evaluation_rgb))
    rows.append(line("latentscenes, new scenes", scores, ours, content.evaluation_new))
    stressed = len(rows) - 1
    if content.pretrained and content.evaluation_pretrained:
        rows.append(
            line(
                "… on the shipped model",
                content.mean(content.evaluation_pretrained),
                cost.account_learned(content.pretrained),
                content.evaluation_pretrained,
            )
        )
    trained, empty = content.evaluation_train.mean, [""] * 4
    train_quality = (
        quality(trained) if not perceptual or trained.perceptual is not None else [*quality(trained)[:2], "–"]
    )
    rows.append(
        (
            "… scenes of stage 1",
            *train_quality,
            *empty,
            f"{1000 * content.evaluation_train.render_seconds:.1f}",
        )
    )
    if not is_exact(scores):
        ceiling = [
            f"{scores.codec_psnr:.2f}",
            f"{scores.codec_ssim:.4f}",
            *([f"{scores.codec_perceptual:.4f}"] if perceptual else []),
        ]
        rows.append(("… codec alone (ceiling)", *ceiling, *empty, ""))
    shown, learned = len(content.common), len(content.evaluation_new.scenes)
    note = f"Means over {shown}{f' of {learned}' if shown < learned else ''} new scenes, held-out views."
    if content.new.stored:
        note += f" Bytes are of float32; ours are stored in {bytes_text(content.new.scene_bytes)} a scene ({content.new.stored})."
    return Table("Ours against RGB tri-planes", tuple(columns), tuple(rows), (stressed,), note)


def print_summary(content: Comparison) -> None:
    """The summary to the terminal."""
    print_things(summary_table(content))


def print_things(*things: Table | str) -> None:
    """Tables and sentences to the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # into a file or a pipe: do not fold
    for thing in things:
        console.print(thing.rich() if isinstance(thing, Table) else thing, highlight=False)
