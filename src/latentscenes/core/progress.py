"""The bar that a person watches: stage, steps, loss, PSNR, time left."""

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class StageProgress:
    """Progress of one stage. Where the output is no terminal, one line every tenth of the way. With a label, it is one
    of many: the bar bears the label and vanishes at the end, and there are no lines."""

    def __init__(self, name: str, index: int, count: int, steps: int, done: int, label: str = ""):
        self.title = f"{label}{'  ' if label else ''}[{index + 1}/{count}] {name}"
        self.steps, self.next_line = steps, done
        self.lines = not label and not console.is_terminal
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn()]
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=bool(label))
        self.task = self.bar.add_task(self.title, total=steps, completed=done, note="")

    def __enter__(self) -> "StageProgress":
        self.bar.start()
        return self

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the current terms of the loss."""
        note = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        pixels = values.get("rgb", values.get("autoencoder"))
        if pixels:
            note += f"  {-10 * math.log10(pixels):.2f} dB"
        self.bar.update(self.task, completed=step, note=note)
        if self.lines and step >= self.next_line:
            self.next_line += max(1, self.steps // 10)
            console.print(f"{self.title}: step {step} of {self.steps}  {note}", highlight=False)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
