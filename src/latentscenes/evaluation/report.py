"""A comparison as one HTML file that needs nothing else: no network, no scripts, pictures and curves inside."""

import base64
import html
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from latentscenes.core import config_io
from latentscenes.core.console import bytes_text, percent_text, seconds_text
from latentscenes.evaluation import cost
from latentscenes.evaluation.cost import Account
from latentscenes.evaluation.tables import (
    Comparison,
    is_exact,
    ledger_sentences,
    ledger_table,
    parts_table,
    scores_table,
    summary_table,
)
from latentscenes.export.sheets import (
    Picture,
    beside,
    captioned,
    comparison_sheet,
    dashboard_sheet,
    save_image,
)
from latentscenes.export.video import gif_bytes, orbit_frames
from latentscenes.storage.scene_set import SceneSet, StoredScenes

SHEET_SCENES, DASHBOARD_SCENES = 8, 4
ORBIT_FRAMES, ORBIT_FPS = 36, 12
MANY = 1000
"""The number of scenes that headlines speak of."""
TERMS = ("rgb", "latent", "autoencoder", "equivariance", "edges", "tv", "depth_tv", "preview")
"""Losses in the order of their colors."""


def write_report(path: str | Path, content: Comparison) -> Path:
    """Write the report as one file and return where it is. Beside it lie its summary as Markdown and its contact sheet
    as PNG, under the same name. Renders the pictures, so it takes some seconds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(summary_table(content).markdown())
    save_image(path.with_suffix(".png"), contact_sheet(content))
    ours = cost.account_learned(content.new)
    rgb = cost.account_learned(content.rgb) if content.rgb else cost.account(config_io.load("rgb"))
    sections = [
        _head(content, ours, rgb),
        _pictures(content),
        _orbits(content),
        _insides(content),
        _costs(ours, rgb),
        _curves(content),
    ]
    sections += [_falls_short(content, ours, rgb), _scores(content), _settings(content)]
    style = (resources.files("latentscenes.evaluation") / "report.css").read_text()
    title = html.escape(content.title)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )
    partial.replace(path)
    return path


# Sections


def _head(content: Comparison, ours: Account, rgb: Account) -> str:
    scores = content.mean(content.evaluation_new)
    baseline = content.mean(content.evaluation_rgb) if content.evaluation_rgb else None
    beside_rgb = f"RGB tri-planes {baseline.psnr:.1f} dB" if baseline else "no RGB baseline was learned"
    tiles = [(f"{scores.psnr:.1f} dB", "PSNR of new scenes", beside_rgb)]
    if not is_exact(scores):
        tiles[0] = (*tiles[0][:2], f"{beside_rgb}, codec ceiling {scores.codec_psnr:.1f} dB")
    if ours.time and ours.time.scene:
        against = (
            f"RGB {seconds_text(rgb.time.scene)}"
            if rgb.time and rgb.time.scene
            else f"stage 1: {seconds_text(ours.time.stage_one)}"
        )
        tiles.append((seconds_text(ours.time.scene), "to learn a new scene", against))
    mine, theirs = ours.memory.per_scene(MANY), rgb.memory.per_scene(MANY)
    tiles.append(
        (
            percent_text(cost.saving(mine, theirs)),
            f"memory a scene at N = {MANY}",
            f"{bytes_text(mine)} against {bytes_text(theirs)}",
        )
    )
    meeting = cost.memory_break_even(ours.memory, rgb.memory)
    tiles.append(
        (
            f"N = {math.floor(meeting) + 1}" if meeting is not None else "never",
            "break-even in memory",
            f"{bytes_text(ours.memory.shared)} are shared",
        )
    )
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span><small>{note}</small></div>'
        for value, name, note in tiles
    )
    lead = content.introduction or (
        f"{len(content.new.names)} new objects, learned in the latent space and with the base planes of {len(content.train.names)} earlier ones."
    )
    return f'<h1>{html.escape(content.title)}</h1><p class="lead">{html.escape(lead)}</p><div class="tiles">{shown}</div>{summary_table(content).html()}'


def _labeled(content: Comparison) -> tuple[SceneSet, list[SceneSet]]:
    return content.new.labeled("ours"), [content.rgb.labeled("RGB")] if content.rgb else []


def contact_sheet(content: Comparison) -> Picture:
    """truth | codec | ours | RGB of held-out views of the first new scenes."""
    ours, others = _labeled(content)
    return comparison_sheet(
        ours, content.views, content.new.scenes(content.views)[:SHEET_SCENES], others=others
    )


def _pictures(content: Comparison) -> str:
    """Contact sheets, one per scene or two, that stand side by side where there is room."""
    ours, others = _labeled(content)
    scenes = content.new.scenes(content.views)[:SHEET_SCENES]
    sheets = [comparison_sheet(ours, content.views, [scene], others=others, across=1) for scene in scenes]
    shown = "".join(
        f'<figure><div class="paper">{_image(sheet, scene.name)}</div></figure>'
        for sheet, scene in zip(sheets, scenes, strict=True)
    )
    codec = [] if is_exact(content.mean(content.evaluation_new)) else ["codec (the ceiling)"]
    told = " | ".join(["truth", *codec, "ours", *(["RGB tri-planes"] if others else [])])
    return f"<h2>New objects, views never learned from</h2><p>{told}. PSNR of each picture below it.</p><div class='row pairs'>{shown}</div>"


def _orbits(content: Comparison) -> str:
    """The best, the median and the worst scene, turning."""
    ordered = sorted((score for score in content.evaluation_new.scenes), key=lambda score: -score.psnr)
    chosen = {0: "best", len(ordered) // 2: "median", len(ordered) - 1: "worst"}
    figures, (ours, _) = [], _labeled(content)
    for place, word in sorted(chosen.items()):
        score = ordered[place]
        modes = ("rgb", "depth")
        orbits = [
            orbit_frames(ours, score.name, content.new.view, frames=ORBIT_FRAMES, mode=mode) for mode in modes
        ]
        frames = [
            beside([captioned(image, "image"), captioned(depth, "depth")])
            for image, depth in zip(*orbits, strict=True)
        ]
        label = f"{score.name}: {word} of {len(ordered)}, {score.psnr:.1f} dB"
        figures.append(
            f'<figure><div class="paper">{_animation(frames, label)}</div><figcaption>{html.escape(label)}</figcaption></figure>'
        )
    return f"<h2>All around</h2><p>Depth is gold where it is near, blue where it is far.</p><div class='row'>{''.join(figures)}</div>"


def _insides(content: Comparison) -> str:
    ours, _ = _labeled(content)
    sheet = dashboard_sheet(ours, content.views, content.new.scenes(content.views), limit=DASHBOARD_SCENES)
    return (
        "<h2>Inside the latent space</h2><p>Latent channels in gray: those the encoder makes of the true picture beside those rendered from "
        "the tri-planes. What the decoder gets is the rendered one. The colors are its first three principal components.</p>"
        f'<figure><div class="paper">{_image(sheet, "latent channels, decoded image, depth and opacity")}</div></figure>'
    )


def _costs(ours: Account, rgb: Account) -> str:
    counts = [round(10 ** (k / 8)) for k in range(8, 33)]
    memory = [
        Series(
            "ours", tuple(map(float, counts)), tuple(ours.memory.per_scene(n) / cost.MIB for n in counts), 0
        ),
        Series(
            "RGB tri-planes",
            tuple(map(float, counts)),
            tuple(rgb.memory.per_scene(n) / cost.MIB for n in counts),
            1,
        ),
    ]
    meeting = cost.memory_break_even(ours.memory, rgb.memory)
    charts = [
        line_chart(
            "Memory",
            memory,
            "scenes N",
            "MiB per scene",
            log_x=True,
            log_y=True,
            mark=meeting,
            mark_label="break-even",
        )
    ]
    if ours.time and ours.time.scene:
        lines = [
            Series("ours", tuple(map(float, counts)), tuple(ours.time.per_scene(n) or 0.0 for n in counts), 0)
        ]
        meeting = None
        if rgb.time and rgb.time.scene:
            lines.append(
                Series(
                    "RGB tri-planes",
                    tuple(map(float, counts)),
                    tuple(rgb.time.per_scene(n) or 0.0 for n in counts),
                    1,
                )
            )
            meeting = cost.time_break_even(ours.time, rgb.time)
        charts.append(
            line_chart(
                "Time to learn",
                lines,
                "scenes N",
                "seconds per scene",
                log_x=True,
                log_y=True,
                mark=meeting,
                mark_label="break-even",
            )
        )
    told = " ".join(html.escape(sentence) for sentence in ledger_sentences(ours, rgb))
    return (
        f"<h2>What a scene costs in a collection of N</h2><p>{told}</p><div class='row'>{''.join(charts)}</div>"
        f"{ledger_table(ours, rgb).html()}{parts_table(ours, rgb).html()}"
    )


def _curves(content: Comparison) -> str:
    found = ["<h2>How training went</h2>"]
    new = "New scenes, the group learned last" if content.new.stage_one else "New scenes"
    for title, learned in (("Stage 1", content.train), (new, content.new), ("RGB tri-planes", content.rgb)):
        charts = stage_charts(learned) if learned else []
        if learned and charts:
            found.append(
                f"<h3>{title}: {seconds_text(learned.seconds)}</h3><div class='row charts'>{''.join(charts)}</div>"
            )
    return "".join(found) if len(found) > 1 else ""


def stage_charts(learned: StoredScenes) -> list[str]:
    """Two charts per stage: its losses, and PSNR where pixels were compared."""
    entries = learned.metrics()
    pixels_are_latents = learned.config.codec.kind == "identity"
    charts = []
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        lines = [entry for entry in entries if entry["stage"] == stage]
        steps = smooth([float(entry["step"]) for entry in lines])
        losses, ratios = [], []
        for color, term in enumerate(TERMS):
            values = [float(entry[term]) for entry in lines if term in entry]
            if len(values) != len(lines):
                continue
            losses.append(Series(term, tuple(steps), tuple(smooth(values)), color))
            if term in ("rgb", "autoencoder") or (pixels_are_latents and term == "latent"):
                span = (
                    4.0 if term == "latent" else 1.0
                )  # squared range of the values compared: (−1, 1) or [0, 1]
                ratio = [10 * math.log10(span / max(value, 1e-10)) for value in values]
                ratios.append(
                    Series(
                        {"autoencoder": "codec alone"}.get(term, "renders"),
                        tuple(steps),
                        tuple(smooth(ratio)),
                        color,
                    )
                )
        took = f"; {seconds_text(learned.stage_seconds[stage])}" if stage in learned.stage_seconds else ""
        charts.append(line_chart(f"{stage}: losses", losses, "step", f"logarithmic{took}", log_y=True))
        if ratios:
            charts.append(line_chart(f"{stage}: PSNR", ratios, "step", "dB on training batches"))
    return charts


def shortcomings(content: Comparison, ours: Account, rgb: Account) -> list[str]:
    """What the figures themselves say against ours."""
    scores, found = content.mean(content.evaluation_new), []
    if content.evaluation_rgb:
        other = content.mean(content.evaluation_rgb)
        if other.psnr > scores.psnr:
            found.append(f"RGB tri-planes are {other.psnr - scores.psnr:.1f} dB ahead on new scenes.")
        if other.ssim > scores.ssim:
            found.append(f"RGB tri-planes are ahead in SSIM, {other.ssim:.3f} against {scores.ssim:.3f}.")
    if not is_exact(scores):
        found.append(
            f"The codec alone reaches {scores.codec_psnr:.1f} dB, and no render can be sharper; rendering its latents loses a further {scores.codec_psnr - scores.psnr:.1f} dB."
        )
    drop = content.evaluation_train.mean.psnr - content.evaluation_new.mean.psnr
    if drop > 0.3:
        found.append(
            f"New scenes are {drop:.1f} dB behind those of stage 1: what was learned does not carry over in full."
        )
    worst = min(content.evaluation_new.scenes, key=lambda score: score.psnr)
    found.append(f"The worst new scene, {worst.name}, stays at {worst.psnr:.1f} dB.")
    found += _cost_shortcomings(len(content.new.names), ours, rgb)
    return [*found, *content.shortcomings]


def _cost_shortcomings(learned: int, ours: Account, rgb: Account) -> list[str]:
    found = []
    pairs = [("memory", cost.memory_break_even(ours.memory, rgb.memory))]
    if ours.time and rgb.time and ours.time.scene is not None and rgb.time.scene is not None:
        pairs.append(("time", cost.time_break_even(ours.time, rgb.time)))
    for what, meeting in pairs:
        if meeting is None:
            found.append(f"In {what}, RGB tri-planes are cheaper at any number of scenes.")
        elif meeting >= learned:
            found.append(
                f"In {what}, the {learned} scenes learned here do not pay for what is shared; {math.floor(meeting) + 1} would."
            )
    return found


def _falls_short(content: Comparison, ours: Account, rgb: Account) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in shortcomings(content, ours, rgb))
    return f"<h2>What falls short</h2><ul>{items}</ul>"


def _scores(content: Comparison) -> str:
    tables = [
        ("New scenes", content.evaluation_new),
        ("RGB tri-planes", content.evaluation_rgb),
        ("Scenes of stage 1", content.evaluation_train),
    ]
    folds = [
        f"<details><summary>{title}</summary>{scores_table(evaluation).html()}</details>"
        for title, evaluation in tables
        if evaluation
    ]
    return f"<h2>Every scene</h2>{''.join(folds)}"


def _settings(content: Comparison) -> str:
    folders = [learned for learned in (content.train, content.new, content.rgb) if learned]
    notes = [learned.notes for learned in folders]
    commands = content.commands or tuple(dict.fromkeys(_command(note.get("command", [])) for note in notes))
    versions = ", ".join(f"{name} {version}" for name, version in notes[0].get("versions", {}).items())
    folds = "".join(
        f"<details><summary>Settings of {title}</summary><pre>{html.escape(config_io.dump(learned.config))}</pre></details>"
        for title, learned in zip(("stage 1", "the new scenes", "RGB tri-planes"), folders, strict=False)
    )
    data = f"{content.views.origin}: {len(content.views.scenes)} scenes, {len(content.views.cameras)} views of {content.views.size[1]}×{content.views.size[0]}"
    return (
        f"<h2>How to get this</h2><pre class='box'>{html.escape(chr(10).join(commands))}</pre>"
        f"<p class='meta'>Data: {html.escape(data)}. {html.escape(versions)}; {html.escape(str(notes[0].get('machine', '')))}.</p>{folds}"
    )


def _command(arguments: Sequence[str]) -> str:
    return shlex.join([Path(arguments[0]).name, *arguments[1:]]) if arguments else ""


# Pictures as text


def _image(picture: Picture, label: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", optimize=True)
    return _embedded("png", stream.getvalue(), label, picture)


def _animation(frames: Sequence[Picture], label: str) -> str:
    return _embedded("gif", gif_bytes(frames, ORBIT_FPS), label, frames[0])


def _embedded(kind: str, content: bytes, label: str, picture: Picture) -> str:
    height, width = picture.shape[:2]
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(label)}" width="{width}" height="{height}" src="data:image/{kind};base64,{data}">'


# Charts


WIDTH, HEIGHT = 420.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 24.0, 12.0, 36.0


@dataclass(frozen=True)
class Series:
    """One line; x rises."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: int = 0
    """0 … 7."""


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """A <figure> with the chart and its legend. Points that a logarithm cannot take are left out; `mark` is a
    vertical line at that x."""
    kept = [one for one in (_drawable(one, log_x, log_y) for one in series) if one.x]
    if not kept:
        return ""
    drawing = _drawing(kept, x_label, log_x, log_y, mark, mark_label)
    legend = "".join(f'<span><i class="b{one.color % 8}"></i>{html.escape(one.label)}</span>' for one in kept)
    return (
        f'<figure class="chart"><b>{html.escape(title)}</b><small>{html.escape(y_label)}</small>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{html.escape(title)}">{drawing}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _drawing(
    kept: list[Series],
    x_label: str,
    log_x: bool,
    log_y: bool,
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """Axes and lines, WIDTH by HEIGHT."""
    x_axis = _Axis.around([x for one in kept for x in one.x], log_x, LEFT, WIDTH - RIGHT, padded=False)
    y_axis = _Axis.around([y for one in kept for y in one.y], log_y, HEIGHT - BOTTOM, TOP, padded=True)
    parts = []
    for value in y_axis.ticks():
        at = y_axis.place(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_axis.ticks():
        at = x_axis.place(value)
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5:.0f}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    if mark is not None and x_axis.low <= mark <= x_axis.high:
        at = x_axis.place(mark)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side, shift = ("end", -5) if at > WIDTH / 2 else ("start", 5)
        parts.append(
            f'<text class="mark" x="{at + shift:.1f}" y="{TOP + 9}" text-anchor="{side}">{html.escape(mark_label)}</text>'
        )
    for one in kept:
        points = " ".join(
            f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in zip(one.x, one.y, strict=True)
        )
        parts.append(
            f'<polyline class="s{one.color % 8}" points="{points}"/>'
            if len(one.x) > 1
            else _dot(points, one.color)
        )
    return "".join(parts)


PALETTE = ("#2f6bd0", "#d2772a", "#2b9468", "#8455bd", "#c9463f", "#8a8f99", "#1792a4", "#a8841d")


def chart_file(
    title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_x: bool = False
) -> str:
    """The text of an SVG file: title above, legend below, on white."""
    kept = [one for one in (_drawable(one, log_x, False) for one in series) if one.x]
    style = "text{font:12px system-ui,sans-serif;fill:#555}.t{font-size:14px;font-weight:600;fill:#222}polyline{fill:none;stroke-width:2}.rule{stroke:#e3e3dd}.axis{stroke:#888}"
    style += "".join(f".s{k}{{stroke:{color}}}.b{k}{{fill:{color}}}" for k, color in enumerate(PALETTE))
    legend = "".join(
        f'<rect class="b{one.color % 8}" x="{LEFT}" y="{HEIGHT + 35 + 18 * k:.0f}" width="10" height="10"/>'
        f'<text x="{LEFT + 16}" y="{HEIGHT + 44 + 18 * k:.0f}">{html.escape(one.label)}</text>'
        for k, one in enumerate(kept)
        if one.label
    )
    drawing = _drawing(kept, x_label, log_x, False) if kept else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT + 40 + 18 * len(kept):.0f}" width="{1.5 * WIDTH:.0f}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="t" x="8" y="18">{html.escape(title)}</text><text x="8" y="34">{html.escape(y_label)}</text>'
        f'<g transform="translate(0 30)">{drawing}</g>{legend}</svg>\n'
    )


def smooth(values: Sequence[float], most: int = 160) -> list[float]:
    """At most so many means of neighbors: noise down, course kept."""
    width = math.ceil(len(values) / most)
    return [sum(values[k : k + width]) / len(values[k : k + width]) for k in range(0, len(values), width)]


def _dot(point: str, color: int) -> str:
    x, y = point.split(",")
    return f'<circle class="b{color % 8}" cx="{x}" cy="{y}" r="3"/>'


def _drawable(series: Series, log_x: bool, log_y: bool) -> Series:
    points = [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]
    return Series(series.label, tuple(x for x, _ in points), tuple(y for _, y in points), series.color)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def around(cls, values: list[float], log: bool, start: float, end: float, padded: bool) -> "_Axis":
        low, high = float(min(values)), float(max(values))
        if log:
            if padded:
                low, high = low / 1.15, high * 1.15
            return cls(low, max(high, low * 1.5), True, start, end)
        air = 0.06 * (high - low) if padded else 0.0
        return cls(low - air, max(high + air, low + 1e-9), False, start, end)

    def place(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                found = [
                    step * 10.0**decade
                    for decade in decades
                    for step in steps
                    if self.low <= step * 10.0**decade <= self.high
                ]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / 6)]
            # less than a third of a decade: as if it were linear
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.10g}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", " ")
