"""Terminal output: the console, progress bars, tables, times, and numbers with three digits."""

import html
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from latentscenes.core.names import one_line, printable

Item = TypeVar("Item")
console = Console(stderr=True, markup=False, highlight=False)
PLAIN = TextColumn("{task.description}", markup=False)
LINE_EVERY = 30.0
"""Seconds between lines about progress where the output is not a terminal."""


def say(text: str) -> None:
    """Prints lines to the terminal, beside results on the standard output."""
    console.print(printable(text), soft_wrap=True)


def tracked(items: Iterable[Item], doing: str, count: int | None = None) -> Iterator[Item]:
    """Yields the items. Meanwhile shows a bar with the time left in a terminal, else a line every LINE_EVERY
    seconds.

    `doing` is what happens to each item, such as "rendering meshes"; `count` their number if they have no
    length.
    """
    count = len(items) if count is None else count
    if console.is_terminal:
        columns = PLAIN, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, count, description=doing)
        return
    begun = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - shown >= LINE_EVERY:
            left = f"; about {seconds_text((now - begun) / done * (count - done))} left" if done else ""
            say(f"{doing}: {done} of {count} done{left}")
            shown = now
        yield item


class StageProgress:
    """Shows the progress of one stage: a bar in a terminal, else a line after every tenth of the steps.

    `label` marks one of several stages that run side by side: its bar is labeled and removed at the end, and
    no lines are printed.
    """

    def __init__(self, name: str, index: int, count: int, steps: int, done: int, label: str = ""):
        self.title = one_line(f"{label}{'  ' if label else ''}[{index + 1}/{count}] {name}")
        self.steps, self.next_line = steps, done
        self.lines = not label and not console.is_terminal
        columns = [
            PLAIN,
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=bool(label))
        self.task = self.bar.add_task(self.title, total=steps, completed=done, note="")

    def __enter__(self) -> "StageProgress":
        self.bar.start()
        return self

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the step and the current loss terms."""
        note = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        pixels = values.get("rgb", values.get("autoencoder"))
        if pixels:
            note += f"  {-10 * math.log10(pixels):.2f} dB"
        self.bar.update(self.task, completed=step, note=note)
        if self.lines and step >= self.next_line:
            self.next_line += max(1, self.steps // 10)
            console.print(f"{self.title}: step {step} of {self.steps}  {note}")

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


@dataclass(frozen=True)
class Spent:
    """Time that some work took, in seconds."""

    wall: float
    """By the clock. On a busy machine, it says little about the work."""
    cpu: float | None
    """Of the processor: over all threads of the process that did the work. None where an earlier version did
    the work, which did not record it."""

    @classmethod
    def so_far(cls) -> "Spent":
        """Reads both clocks of this process. Only the difference of two readings means anything."""
        return cls(time.monotonic(), time.process_time())

    def __add__(self, other: "Spent") -> "Spent":
        unknown = self.cpu is None or other.cpu is None
        return Spent(self.wall + other.wall, None if unknown else self.cpu + other.cpu)

    def __sub__(self, other: "Spent") -> "Spent":
        return self + other.times(-1)

    def times(self, factor: float | int) -> "Spent":
        """Returns the time of `factor` such works."""
        return Spent(factor * self.wall, None if self.cpu is None else factor * self.cpu)

    def __str__(self) -> str:
        return f"{seconds_text(self.cpu)} CPU, {seconds_text(self.wall)} wall"


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column holds names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[int, ...] = ()
    """Rows to highlight."""
    note: str = ""
    """Explanation below the table."""

    def rich(self) -> RichTable:
        """Returns the table for a terminal."""
        title, note = Text(one_line(self.title), "table.title"), Text(one_line(self.note))
        table = RichTable(
            title=title, title_justify="left", caption=note if self.note else None, caption_justify="left",
            box=box.SIMPLE_HEAD,
        )  # fmt: skip
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for index, row in enumerate(self.rows):
            cells = (Text(one_line(cell)) for cell in row)
            table.add_row(*cells, style="bold" if index in self.strong else None)
        return table

    def markdown(self) -> str:
        """Returns the table in GitHub's Markdown."""

        def line(cells: tuple[str, ...], stress: bool = False) -> str:
            shown = (one_line(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            return "| " + " | ".join(f"**{cell}**" if stress and cell else cell for cell in shown) + " |"

        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        body = [line(row, index in self.strong) for index, row in enumerate(self.rows)]
        return "\n".join([line(self.columns), rule, *body, ""])

    def html(self) -> str:
        """Returns a <figure> with a <table> that scrolls sideways if it is too wide."""

        def line(cells: tuple[str, ...], kind: str, style: str = "") -> str:
            return f"<tr{style}>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"

        styles = (' class="strong"' if index in self.strong else "" for index in range(len(self.rows)))
        body = "".join(line(row, "td", style) for row, style in zip(self.rows, styles))
        table = f"<table><thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"
        note = f"<figcaption>{html.escape(self.note)}</figcaption>" if self.note else ""
        return f'<figure><div class="wide">{table}</div>{note}</figure>'


def show(*things: Table | str) -> None:
    """Prints tables and sentences to the standard output, 150 columns wide where that is no terminal. An
    empty line follows the note below a table."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(width=150, markup=False, highlight=False)  # no line breaks in a file or a pipe
    for place, thing in enumerate(things):
        console.print(thing.rich() if isinstance(thing, Table) else printable(thing))
        if isinstance(thing, Table) and thing.note and place + 1 < len(things):
            console.print()


def bytes_text(count: float | int) -> str:
    """Formats bytes with three digits in binary units: 0.469 MiB, 1.50 MiB, 319 MiB."""
    for unit, size, least in (("GiB", 1 << 30, 1.0), ("MiB", 1 << 20, 0.1), ("KiB", 1 << 10, 0.1)):
        if count >= least * size:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def lost_text(decibels: float) -> str:
    """Formats the loss by rounding, in dB of PSNR. Where it helps by chance, nothing is lost."""
    return f"{max(decibels, 0.0) + 0.0:.3f} dB lost"


def seconds_text(seconds: float | None) -> str:
    """Formats a duration with three digits: 12.3 ms, 0.412 s, 35.0 s, 2.23 min, 4.10 h; a dash for None."""
    if seconds is None:
        return "–"
    if 0 < seconds < 0.0995:
        return f"{_three_digits(1000 * seconds)} ms"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds)} s"


def percent_text(change: float) -> str:
    """Formats a change in percent with a true minus sign: −44 %."""
    return f"{change:+.0f} %".replace("-", "−")


ODD_VIEWS = {
    "missing": "miss the object",
    "disagreeing": "disagree with the others",
    "masks": "have masks that do not match",
}
"""Kinds of odd views in a scene's tag `odd_views`, and their effects."""


def capture_lines(tags: dict[str, Any]) -> list[str]:
    """Returns the findings of learning on a scene's views, from its tags `view_corrections` and
    `odd_views`. Tags of these names that a user wrote for something else say nothing."""
    try:
        return list(_capture_lines(tags.get("view_corrections", {}), tags.get("odd_views", {})))
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _capture_lines(found: dict[str, list], odd: dict[str, Any]) -> Iterator[str]:
    if "turned_degrees" in found:
        (turn, most), (way, longest) = found["turned_degrees"], found["moved_percent"]
        yield (
            f"cameras corrected by {turn:.2f}° and {way:.2f} % of the box's diagonal (medians; at most "
            f"{most:.2f}° and {longest:.2f} %)"
        )
    if "gains" in found:
        (low, high), (least, most) = found["gains"], found["offsets"]
        yield f"colors corrected by gains {low:.2f} to {high:.2f}, offsets {least:+.3f} to {most:+.3f}"
    for kind in found.get("left_out", []):
        if kind in ("colors", "cameras"):
            yield f"corrections of {kind} brought too little in a trial and were left out"
    for kind, what in ODD_VIEWS.items():
        if views := odd.get(kind):
            fate = "left out" if odd.get("left_out") else "--drop-views learns without them"
            yield f"views {', '.join(map(str, views))} {what} ({fate})"


def _three_digits(value: float) -> str:
    return f"{value:.{sum(value < limit for limit in (99.95, 9.995, 0.9995))}f}"
