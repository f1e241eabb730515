"""Compares new scenes with RGB tri-planes in one HTML file with pictures and charts inside: no network, no
scripts. report.html holds the markup."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentscenes.core import config_io
from latentscenes.core.console import bytes_text, percent_text, seconds_text
from latentscenes.core.files import write_files
from latentscenes.core.names import counted
from latentscenes.evaluation import cost
from latentscenes.evaluation.charts import Series, line_chart, smooth, templates
from latentscenes.evaluation.cost import Costs
from latentscenes.evaluation.tables import (
    Comparison,
    break_even_sentences,
    cost_tables,
    has_ceiling,
    is_exact,
    scores_table,
    summary_table,
)
from latentscenes.export.sheets import (
    Picture,
    captioned,
    comparison_sheet,
    dashboard_sheet,
    image_bytes,
    in_row,
    short_names,
)
from latentscenes.export.video import camera_frames, gif_bytes
from latentscenes.storage.records import command_text
from latentscenes.storage.scene_set import SceneSet, StoredScenes

SHEET_SCENES, DASHBOARD_SCENES = 8, 4
ORBIT_FRAMES, ORBIT_FPS, ORBIT_ELEVATION = 36, 12, 25.0
MANY = 1000
"""Number of scenes N for which the tiles at the top give memory."""
TERMS = ("rgb", "latent", "autoencoder", "equivariance", "edges", "tv", "depth_tv", "preview", "color")
"""Losses in the order of their colors."""


def write_report(path: str | Path, content: Comparison) -> Path:
    """Writes the report and returns its path. Also writes the summary as Markdown (.md) and the contact sheet
    (.png) beside it. Rendering the pictures takes some seconds."""
    path = Path(path)
    sheet = path.with_suffix(".png")
    others = {
        path.with_suffix(".md"): summary_table(content).markdown().encode(),
        sheet: image_bytes(sheet, contact_sheet(content)),
    }
    ours = cost.learned_costs(content.new)
    rgb = cost.learned_costs(content.rgb) if content.rgb else cost.config_costs(config_io.load("rgb"))
    in_pixels = is_exact(content.mean(content.evaluation_new))
    page = templates.get_template("report.html").render(
        title=content.title,
        lead=content.introduction
        or f"{counted(len(content.new.names), 'new object')}, learned "
        f"{'' if in_pixels else 'in the latent space and '}with the base planes of "
        f"{counted(len(content.train.names), 'earlier object')}.",
        tiles=_tiles(content, ours, rgb),
        summary=summary_table(content),
        orbits=_orbits(content),
        trainings=_trainings(content),
        shortcomings=shortcomings(content, ours, rgb),
        **_pictures(content),
        **_costs(ours, rgb),
        **_details(content),
    )
    write_files(others | {path: page.encode()})
    return path


# Sections


def _tiles(content: Comparison, ours: Costs, rgb: Costs) -> list[tuple[str, str, str]]:
    """Value, name and remark of the figures at the top."""
    scores = content.mean(content.evaluation_new)
    baseline = content.mean(content.evaluation_rgb) if content.evaluation_rgb else None
    note = f"RGB tri-planes {baseline.psnr:.1f} dB" if baseline else "no RGB baseline was learned"
    if has_ceiling(scores):
        note += f", codec ceiling {scores.codec_psnr:.1f} dB"
    tiles = [(f"{scores.psnr:.1f} dB", "PSNR of new scenes", note)]
    if ours.time and ours.time.scene:
        compared = [ours.time, rgb.time] if rgb.time and rgb.time.scene else [ours.time]
        clock = cost.clock(*compared)
        mine = seconds_text(getattr(ours.time.scene, clock))
        note = f"RGB {rgb.time.scene}" if len(compared) == 2 else f"stage 1: {ours.time.stage_one}"
        name = {"cpu": "of CPU time", "wall": "by the clock"}[clock]
        tiles.append((mine, f"{name} to learn a new scene", f"ours {ours.time.scene}; {note}"))
    mine, theirs = ours.memory.per_scene(MANY), rgb.memory.per_scene(MANY)
    change = percent_text(cost.saving(mine, theirs))
    note = f"{bytes_text(mine)} against {bytes_text(theirs)}"
    tiles.append((change, f"memory per scene at N = {MANY}", note))
    meeting = cost.memory_break_even(ours.memory, rgb.memory)
    count = "never" if meeting is None else f"N = {math.floor(meeting) + 1}"
    tiles.append((count, "break-even in memory", f"{bytes_text(ours.memory.shared)} are shared"))
    return tiles


def _labeled(content: Comparison) -> tuple[SceneSet, list[SceneSet]]:
    return content.new.labeled("ours"), [content.rgb.labeled("RGB")] if content.rgb else []


def contact_sheet(content: Comparison) -> Picture:
    """Held-out views of the first new scenes: truth | codec | ours | RGB."""
    ours, others = _labeled(content)
    scenes = content.new.scenes(content.views)
    return comparison_sheet(ours, content.views, scenes, others=others, limit=SHEET_SCENES)


def _pictures(content: Comparison) -> dict[str, Any]:
    """A contact sheet for each of the first new scenes, and the latent channels of some."""
    (ours, others), scenes = _labeled(content), content.new.scenes(content.views)
    codec = ["codec (the ceiling)"] if has_ceiling(content.mean(content.evaluation_new)) else []
    latent = [other for other in content.variants if other.scenes.config.codec.kind != "identity"]
    inside = [("", ours), *((f", new scenes {other.label}", other.scenes) for other in latent)]
    return {
        "columns": ["truth", *codec, "ours", *(["RGB tri-planes"] if others else [])],
        "shown": f"{min(SHEET_SCENES, len(scenes))} of {len(scenes)} new objects are shown. "
        if len(scenes) > SHEET_SCENES
        else "",
        "sheets": [
            _image(comparison_sheet(ours, content.views, [scene], others=others, across=1), scene.name)
            for scene in scenes[:SHEET_SCENES]
        ],
        "inside": [
            (of, shown.config.codec.kind, _image(_inside(shown, content), f"channels and depth{of}"))
            for of, shown in inside
        ],
    }


def _inside(learned: SceneSet, content: Comparison) -> Picture:
    return dashboard_sheet(learned, content.views, content.new.scenes(content.views), limit=DASHBOARD_SCENES)


def _orbits(content: Comparison) -> list[dict[str, Any]]:
    """Animations of the best, the median and the worst scene."""
    ordered = sorted(content.evaluation_new.scenes, key=lambda score: -score.psnr)
    chosen = {0: "best", len(ordered) // 2: "median", len(ordered) - 1: "worst"}
    found, (ours, _), names = [], _labeled(content), short_names(content.new.names)
    for place, word in sorted(chosen.items()):
        score = ordered[place]
        view = content.new.view_of(score.name)
        cameras = view.orbit(ORBIT_FRAMES, ORBIT_ELEVATION)
        orbits = [camera_frames(ours, score.name, cameras, view.size, mode) for mode in ("rgb", "depth")]
        frames = [
            in_row([captioned(image, "image"), captioned(depth, "depth")])
            for image, depth in zip(*orbits, strict=True)
        ]
        label = f"{names[score.name]}: {word} of {len(ordered)}, {score.psnr:.1f} dB"
        found.append(_embedded("gif", gif_bytes(frames, ORBIT_FPS), label, frames[0]))
    return found


def _costs(ours: Costs, rgb: Costs) -> dict[str, Any]:
    """Memory and time per scene over the number of scenes."""
    counts = [round(10 ** (k / 8)) for k in range(8, 33)]
    sides = [("ours", ours), ("RGB tri-planes", rgb)]

    def chart(title: str, unit: str, series: dict[str, list[float]], meeting: float | None) -> str:
        lines = [
            Series(name, tuple(map(float, counts)), tuple(values), color)
            for color, (name, values) in enumerate(series.items())
        ]
        labels = {"x_label": "scenes N", "y_label": f"{unit} per scene", "mark_label": "break-even"}
        return line_chart(title, lines, log_x=True, log_y=True, mark=meeting, **labels)

    memory = {name: [side.memory.per_scene(n) / cost.MIB for n in counts] for name, side in sides}
    charts = [chart("Memory", "MiB", memory, cost.memory_break_even(ours.memory, rgb.memory))]
    if ours.time and ours.time.scene:
        timed = {name: side.time for name, side in sides if side.time and side.time.scene}
        clock = cost.clock(*timed.values())
        seconds = {name: [getattr(time.per_scene(n), clock) for n in counts] for name, time in timed.items()}
        meeting = cost.time_break_even(*timed.values()) if len(timed) == 2 else None
        unit = {"cpu": "CPU seconds", "wall": "seconds"}[clock]
        charts.append(chart("Time to learn", unit, seconds, meeting))
    return {
        "cost_sentences": break_even_sentences(ours, rgb),
        "cost_charts": charts,
        "cost_tables": cost_tables(ours, rgb),
    }


def _trainings(content: Comparison) -> list[tuple[str, list[str]]]:
    """Headings and charts of each training."""
    new = "New scenes, the group learned last" if content.new.stage_one else "New scenes"
    trainings = {"Stage 1": content.train, new: content.new, "RGB tri-planes": content.rgb}
    charts = {title: (learned, stage_charts(learned)) for title, learned in trainings.items() if learned}
    return [(f"{title}: {learned.spent}", drawn) for title, (learned, drawn) in charts.items() if drawn]


def stage_charts(learned: StoredScenes) -> list[str]:
    """One chart of the losses of each stage, and one of PSNR if the stage compared pixels."""
    entries = learned.metrics()
    charts = []
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        lines = [entry for entry in entries if entry["stage"] == stage]
        steps = tuple(smooth([float(entry["step"]) for entry in lines]))
        losses, ratios = [], []
        for color, term in enumerate(TERMS):
            values = [float(entry[term]) for entry in lines if term in entry]
            if len(values) != len(lines):
                continue
            losses.append(Series(term, steps, tuple(smooth(values)), color))
            if term in ("rgb", "autoencoder", "color") or (
                term == "latent" and learned.config.codec.kind == "identity"
            ):
                label = {"autoencoder": "codec alone", "color": "colors"}.get(term, "renders")
                ratios.append(Series(label, steps, tuple(smooth(_psnr(values, term))), color))
        took = f"; {learned.stage_spent[stage]}" if stage in learned.stage_spent else ""
        charts.append(line_chart(f"{stage}: losses", losses, "step", f"logarithmic{took}", log_y=True))
        if ratios:
            charts.append(line_chart(f"{stage}: PSNR", ratios, "step", "dB on training batches"))
    return charts


def _psnr(errors: Sequence[float], term: str) -> list[float]:
    """PSNR from mean squared errors of values in (−1, 1) for `latent` and `color`, in [0, 1] for
    other terms."""
    squared_range = 4.0 if term in ("latent", "color") else 1.0
    return [10 * math.log10(squared_range / max(error, 1e-10)) for error in errors]


def shortcomings(content: Comparison, ours: Costs, rgb: Costs) -> list[str]:
    """Sentences on every figure in which ours is behind."""
    scores, found = content.mean(content.evaluation_new), []
    if content.evaluation_rgb:
        other = content.mean(content.evaluation_rgb)
        if other.psnr > scores.psnr:
            found.append(f"RGB tri-planes are {other.psnr - scores.psnr:.1f} dB ahead on new scenes.")
        if other.ssim > scores.ssim:
            found.append(f"RGB tri-planes are ahead in SSIM, {other.ssim:.3f} against {scores.ssim:.3f}.")
    if has_ceiling(scores):
        found.append(
            f"The codec alone reaches {scores.codec_psnr:.1f} dB, and no render can be sharper; "
            f"rendering its latents loses a further {scores.codec_psnr - scores.psnr:.1f} dB."
        )
    drop = content.evaluation_train.mean.psnr - content.evaluation_new.mean.psnr
    if drop > 0.3:
        found.append(
            f"New scenes are {drop:.1f} dB behind the scenes of stage 1: "
            "the shared parts do not fully carry over."
        )
    worst = min(content.evaluation_new.scenes, key=lambda score: score.psnr)
    found.append(f"The worst new scene, {worst.name}, stays at {worst.psnr:.1f} dB.")
    found += _cost_shortcomings(len(content.new.names), ours, rgb)
    return [*found, *content.shortcomings]


def _cost_shortcomings(learned: int, ours: Costs, rgb: Costs) -> list[str]:
    found = []
    pairs = [("memory", cost.memory_break_even(ours.memory, rgb.memory))]
    if ours.time and rgb.time and ours.time.scene is not None and rgb.time.scene is not None:
        pairs.append(("time", cost.time_break_even(ours.time, rgb.time)))
    for quantity, meeting in pairs:
        if meeting is None:
            found.append(f"In {quantity}, RGB tri-planes are cheaper at any number of scenes.")
        elif meeting >= learned:
            found.append(
                f"In {quantity}, the {learned} scenes learned here do not pay for the shared parts; "
                f"{math.floor(meeting) + 1} scenes would."
            )
    return found


def _details(content: Comparison) -> dict[str, Any]:
    """Scores of every scene, and the commands, versions and settings that led to them."""
    evaluations = {
        "New scenes": content.evaluation_new,
        "RGB tri-planes": content.evaluation_rgb,
        "Scenes of stage 1": content.evaluation_train,
        **{f"New scenes {other.label}": other.evaluation for other in content.variants},
    }
    trainings = {"stage 1": content.train, "the new scenes": content.new, "RGB tri-planes": content.rgb}
    trainings |= {f"the new scenes {other.label}": other.scenes for other in content.variants}
    notes = [learned.notes for learned in trainings.values() if learned]
    views, (height, width) = content.views, content.views.size
    return {
        "scores": [(name, scores_table(found)) for name, found in evaluations.items() if found],
        "commands": content.commands
        or dict.fromkeys(command_text(note.get("command", [])) for note in notes),
        "data": f"{views.origin}: {counted(len(views.scenes), 'scene')}, "
        f"{counted(len(views.cameras), 'view')} of {width}×{height}",
        "versions": ", ".join(f"{name} {version}" for name, version in notes[0].get("versions", {}).items()),
        "machine": notes[0].get("machine", ""),
        "settings": [
            (name, config_io.dump(learned.config)) for name, learned in trainings.items() if learned
        ],
    }


# Pictures as text


def _image(picture: Picture, label: str) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return _embedded("png", stream.getvalue(), label, picture)


def _embedded(kind: str, content: bytes, label: str, picture: Picture) -> dict[str, Any]:
    height, width = picture.shape[:2]
    data = base64.b64encode(content).decode()
    return {"kind": kind, "data": data, "label": label, "width": width, "height": height}
