"""Measures the time and memory of training steps, views and the codec, as ratios of variants that run in
turns. Run:

python -m benchmarks.speed --only step view --threads 1 2
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.cases import LATENT, RGB, SIZE, STAGES, Steps, Viewer, fitting_text, stage_text
from benchmarks.timing import Timing, interleave
from latentscenes.cli.common import Machine, run_program, set_up
from latentscenes.core.console import Table, bytes_text, console, show
from latentscenes.core.errors import UserError
from latentscenes.model.planes import fuse_in_torch
from latentscenes.rendering.kernels import native
from latentscenes.training.losses import total_variation_in_torch
from latentscenes.training.optim import adam_in_torch

WARM_STEPS = 200
"""Number of steps before timing. By then most samples are negligible, as in most of a training."""
FUNCTION_FLOPS = 20
"""Operations of one softplus or sigmoid in the floor: those of the polynomials for e^x and log(1 + x) in
simd.h."""
MILLISECOND = 1e-3
FILE_BYTES = 1_500_000
"""Size of a scene in step 1a: micro planes and two moments."""


@dataclass
class Result:
    """Result of one case: rows for the table and figures for the JSON."""

    case: str
    threads: int
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(name, median, ratio to the first variant or a remark)."""
    figures: dict[str, float] = field(default_factory=dict)

    def table(self) -> Table:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return Table(f"{self.case}, {threads}", ("", "median", ""), tuple(self.rows))

    def add(self, name: str, value: str, remark: str = "") -> None:
        self.rows.append((name, value, remark))

    def compare(self, timings: dict[str, Timing], baseline: str, unit: str = "ms") -> None:
        """Adds a row per variant, with the median over rounds of the baseline's time over the variant's."""
        for name, found in timings.items():
            ratio = found.ratio(timings[baseline])
            self.figures |= {f"{name}.seconds": found.median, f"{name}.speedup": ratio}
            remark = "" if name == baseline else f"{ratio:.2f}x as fast as {baseline}"
            self.add(name, f"{found.median / MILLISECOND:.2f} {unit}", remark)


def bench_steps(threads: int, rounds: int) -> Iterator[Result]:
    """Step 1a as published and the RGB step: native against torch, and against the floor."""
    for case, text in (("step 1a", LATENT), ("RGB step", RGB)):
        result = Result(case, threads)
        ours = Steps(text, 20).warmed(WARM_STEPS)
        variants = {"torch": ours.twin("torch").step}
        if native.available():
            variants["native"] = ours.twin("native").step
        timings = interleave(variants, rounds)
        result.compare(timings, "torch")
        if "native" in timings:
            _compare_with_floor(result, ours, timings["native"].median)
        yield result


def _compare_with_floor(result: Result, steps: Steps, seconds: float) -> None:
    """Adds the step's time over max(operations / peak, bytes / bandwidth), with both peaks measured here."""
    counted, forward, backward = steps.rendering_cost()
    cost, other = counted.total, steps.other_bytes()
    flops, bandwidth = timing.peak_flops(), timing.peak_bandwidth()
    moved = (cost.bytes + other) / bandwidth
    floors = {
        "matrix products": max(cost.flops / flops, moved),
        "and activations": max((cost.flops + FUNCTION_FLOPS * cost.functions) / flops, moved),
    }
    remark = f"backward {100 * backward:.0f} %; operations and bytes count all forward"
    result.add("samples evaluated", f"{100 * forward:.0f} %", remark)
    remark = f"peak {flops / 1e9:.0f} G/s; and {cost.functions / 1e6:.0f} M softplus, sigmoid, exp"
    result.add("operations", f"{cost.flops / 1e9:.2f} G", remark)
    remark = f"bandwidth {bandwidth / 1e9:.0f} GB/s; {bytes_text(other)} of these besides rendering"
    result.add("bytes", bytes_text(cost.bytes + other), remark)
    for name, floor in floors.items():
        remark = f"native takes {seconds / floor:.2f}x as long"
        result.add(f"floor, {name}", f"{floor / MILLISECOND:.1f} ms", remark)
        result.figures[f"over floor, {name}"] = seconds / floor


def bench_stages(threads: int, rounds: int) -> Iterator[Result]:
    """Steps of the other stages in the sizes of step 1a, and of `small` on new scenes: native against
    torch."""
    texts = {f"step {name}": stage_text(name) for name in STAGES}
    for word in ("learning", "at rest"):
        texts[f"step of `small`, new scenes, weights {word}"] = fitting_text(word == "at rest")
    for case, text in texts.items():
        result = Result(case, threads)
        steps = Steps(text, 20).warmed(20)
        kernels = ("torch", "native") if native.available() else ("torch",)
        result.compare(interleave({kernel: steps.twin(kernel).step for kernel in kernels}, rounds), "torch")
        yield result


def bench_options(threads: int, rounds: int) -> Iterator[Result]:
    """A step with and without each fast part."""
    if not native.available():
        return
    small = ("the step of `small`, new scenes", fitting_text(True), 20)
    for case, text, warm in (("step 1a", LATENT, WARM_STEPS), small):
        result = Result(f"options of {case}", threads)
        steps = Steps(text, 20).warmed(warm)
        variants = {f"without {name}": steps.switched(switch) for name, switch in SWITCHES.items()}
        if text != LATENT:
            plain = steps.twin("native", shortcuts=False)
            variants["without mixing by weights and macro planes kept"] = plain.step
        result.compare(interleave({"all on": steps.twin("native").step, **variants}, rounds), "all on")
        yield result


SWITCHES = {
    "skipping": (native, "SKIP", 0.0),
    "native fusion": (native, "compose", fuse_in_torch),
    "native total variation": (native, "total_variation", total_variation_in_torch),
    "native Adam by rows": (native, "adam", adam_in_torch),
}
"""Replacements that turn off one fast part of a step each."""


def bench_views(threads: int, rounds: int) -> Iterator[Result]:
    """A new 128x128 view, rendered and decoded from fused planes, as in a viewer."""
    result = Result("new view", threads)
    viewers = {name: Viewer(name) for name in ("paper", "latent", "small", "rgb")}
    timings = interleave({name: viewer.view for name, viewer in viewers.items()}, 4 * rounds)
    for name, found in timings.items():
        result.figures[f"{name}.views_per_second"] = 1 / found.median
        median, rate = f"{found.median / MILLISECOND:.1f} ms", f"{1 / found.median:.0f} views per second"
        result.add(f"{name}: {viewers[name].describe()}", median, rate)
    yield result


def bench_codec(threads: int, rounds: int) -> Iterator[Result]:
    """Our codec on one 128x128 image and on a batch of 32, in bfloat16 and float32."""
    for count in (1, 32):
        result = Result(f"codec, {count} image{'s' * (count > 1)}", threads)
        images = torch.rand(count, 3, SIZE, SIZE)
        for name in ("paper", "latent"):
            codec = Viewer(name, 0).model.codec
            plain = copy.deepcopy(codec)
            plain.bfloat16 = False
            with torch.inference_mode():
                latents = codec.encode(images)
                for verb, given in (("encode", images), ("decode", latents)):
                    fast, slow = getattr(codec, verb), getattr(plain, verb)
                    variants = {"float32": partial(slow, given), "bfloat16": partial(fast, given)}
                    reference, found = interleave(variants, rounds).values()
                    label = f"f = {codec.downsampling}, {codec.channels} channels: {verb}"
                    ratio = f"{found.ratio(reference):.2f}x as fast as float32"
                    result.add(label, f"{found.median / MILLISECOND:.2f} ms", ratio)
                    result.figures[f"{label}.seconds"] = found.median
        yield result


def bench_scaling(
    threads: int, rounds: int, counts: tuple[int, ...] = (20, 200, 1000), on_disk: int = 10_000
) -> Iterator[Result]:
    """Step 1a with growing numbers of scenes. The largest number lies in memory-mapped files (5 GB for
    10,000)."""
    result = Result("scaling with N", threads)
    with tempfile.TemporaryDirectory() as folder:
        made = {f"N = {count}": Steps(LATENT, count) for count in counts}
        if shutil.disk_usage(folder).free > 3 * FILE_BYTES * on_disk:
            made[f"N = {on_disk}, rows in files"] = Steps(LATENT, on_disk, folder=Path(folder))
        else:
            result.add(f"N = {on_disk}, rows in files", "", f"not measured: {folder} has too little space")
        first = next(iter(made))
        for steps in made.values():
            steps.warmed(20)
        timings = interleave({name: steps.step for name, steps in made.items()}, 3 * rounds)
    for name, found in timings.items():
        ratio = timings[first].ratio(found)
        result.figures |= {f"{name}.seconds": found.median, f"{name}.ratio": ratio}
        remark = "" if name == first else f"{ratio:.3f}x the time of {first}"
        result.add(name, f"{found.median / MILLISECOND:.1f} ms", remark)
    yield result


def bench_memory(threads: int, rounds: int, count: int = 1000) -> Iterator[Result]:
    """Peak memory of step 1a in a process of its own."""
    result = Result(f"peak memory, N = {count}", threads)
    script = f"from benchmarks.cases import report_memory; report_memory({threads}, {count})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"memory: the measuring process failed: {ran.stderr.strip().splitlines()[-1]}")
    found = json.loads(ran.stdout)
    result.figures |= found
    result.add("rows and their Adam moments", bytes_text(found["rows"]))
    remark = f"{bytes_text(found['peak'] - found['rows'])} besides the rows"
    result.add("peak", bytes_text(found["peak"]), remark)
    yield result


CASES: dict[str, Callable[[int, int], Iterator[Result]]] = {
    "step": bench_steps,
    "stages": bench_stages,
    "options": bench_options,
    "view": bench_views,
    "codec": bench_codec,
    "scaling": bench_scaling,
    "memory": bench_memory,
}


def main(
    only: tuple[str, ...] = (), threads: tuple[int, ...] = (), rounds: int = 7, out: Path | None = None
) -> None:
    """Measure steps, views, codec, scaling and memory: medians, and ratios of variants that run in turns.

    Args:
        only: cases to run: step, stages, options, view, codec, scaling, memory; unset: all.
        threads: numbers of CPU threads to run the cases with; unset: one, and all cores.
        rounds: number of rounds of each variant.
        out: JSON file for all figures and the machine's description; tables are written beside it as
            Markdown.
    """
    set_up(Machine(threads=threads[-1] if threads else None))
    if unknown := [name for name in only if name not in CASES]:
        raise UserError(f"--only {unknown[0]}: no such case. There are: {', '.join(CASES)}.")
    results = []
    for count in threads or sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(count)
        for name in only or CASES:
            for result in CASES[name](count, rounds):
                results.append(result)
                show(result.table())
    save(results, out, shown=True)


def save(results: list[Result], out: Path | None, shown: bool = False) -> None:
    """Prints results, and writes all figures with the machine's description to `out` (JSON) and the tables
    beside it."""
    machine = timing.machine()
    if not shown:
        show(*(result.table() for result in results))
    where = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    where += f"; load {machine['load']:.1f} at the end"
    console.print(where, highlight=False)
    if out is None:
        return
    figures = {"machine": machine, "results": [asdict(result) for result in results]}
    out.write_text(json.dumps(figures, indent=1) + "\n")
    tables = (f"**{result.table().title}**\n\n{result.table().markdown()}" for result in results)
    out.with_suffix(".md").write_text("\n".join([*tables, where + ".\n"]))
    console.print(f"{out} and {out.with_suffix('.md').name} written.", highlight=False)


if __name__ == "__main__":
    run_program(main)
