"""Steps of 4 to 256 scenes on a GPU: time, scenes a second, memory, and how near they come to the machine's
limits. Needs no data. On a machine with a GPU, this is the first command to run:

    python -m benchmarks.devices --out devices.json

It first compares the GPU's kernels with torch's. Then it times steps of the preset `small` on new scenes, in
each precision of the matrix products, and states where a step spends its time. With --data, the probe of
`exploit` runs as well, with real pictures. A size that fails, or for which the memory does not suffice, is
stated, and the others are measured.
"""

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.cases import Steps, fitting_text
from benchmarks.roofline import StepCost, step_cost
from benchmarks.speed import Result, save
from benchmarks.timing import interleave, wait_for
from latentscenes.cli.common import Machine, run_program, set_up
from latentscenes.core import config_io
from latentscenes.core.config import Config, MatmulPrecision
from latentscenes.core.console import bytes_text, say, show
from latentscenes.core.runtime import seeded
from latentscenes.data.dataset import PosedImages
from latentscenes.rendering.kernels import native
from latentscenes.storage.pretrained import open_parent
from latentscenes.training.probe import run_trials, smallest_sufficient

WARM_STEPS = 100
"""Steps before timing, after which most samples are negligible, as in most of a stage."""
VIEWS = 50
"""Views of an object, for the time that it takes as a whole."""
SHOWN = 14
"""Operations in the profile of a step."""
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def agreement(device: torch.device) -> Result:
    """Compares losses and gradients of a step by the kernel that `auto` takes with those by torch."""
    result, found = Result(f"agreement with torch on {device}", torch.get_num_threads()), {}
    steps = Steps(fitting_text(False), 4, device=device).warmed(3)
    for kernel in ("auto", "torch"):
        twin = steps.twin(kernel)
        leaves: list[torch.Tensor] = []
        twin.learner.own.step = lambda index, batch, *_, leaves=leaves: leaves.extend(batch.tables().values())
        errors = twin.learner.step(twin.batch(0), 1.0, seeded(device, "step", 0))[1]
        found[kernel] = [errors, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    for place, (ours, theirs) in enumerate(zip(*found.values(), strict=True)):
        difference = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        what = "errors of rays" if place == 0 else f"gradient {place}"
        result.figures[what] = difference
        result.add(what, f"{difference:.1e}", "relative difference; skipped samples make up to 1e-2")
    return result


def counted() -> float:
    """Returns which part of the samples a step evaluates backward, as the CPU's kernel counts them after
    WARM_STEPS steps; all, if there is none."""
    if not native.available():
        return 1.0
    return Steps(fitting_text(True), 4).warmed(WARM_STEPS).rendering_cost()[2]


def cost_of(config: Config, scenes: int, backward: float) -> StepCost:
    """Returns what rendering costs in a step of some scenes."""
    stage, render, planes = config.train[0], config.render, config.planes
    rays, samples = stage.views * stage.rays, render.coarse + render.fine
    sizes = (planes.resolution, planes.features, config.field.hidden, 3)
    return step_cost(scenes, rays, samples, *sizes, kept=backward)


def sized(precision: MatmulPrecision, scenes: int, at_rest: bool) -> str:
    """Returns the step of `small` on new scenes with another number of scenes and another precision."""
    config = config_io.parse(fitting_text(at_rest), "bench")
    stage = dataclasses.replace(config.train[0], scenes=scenes)
    render = dataclasses.replace(config.render, precision=precision)
    return config_io.dump(dataclasses.replace(config, train=(stage,), render=render))


def bench_steps(
    device: torch.device, precision: MatmulPrecision, scenes: tuple[int, ...], rounds: int, kept: float
) -> Result:
    """Times steps of growing numbers of scenes."""
    result = Result(f"new scenes, {precision}, on {device}", torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    flops, bandwidth = timing.peak_flops(5, device, DTYPES[precision]), timing.peak_bandwidth(5, device)
    result.add("peak", f"{flops / 1e12:.2f} TFLOP/s", f"matrix products; copies: {bandwidth / 1e9:.0f} GB/s")
    result.figures |= {"peak flops": flops, "peak bandwidth": bandwidth}
    epochs = config_io.load("small").exploit[0].epochs
    for count in scenes:
        try:
            _add_size(result, (device, precision, count, rounds), (flops, bandwidth, kept), epochs)
        except torch.OutOfMemoryError:
            result.add(f"{count} scenes", "memory ends")
            break
        except Exception as error:  # the other sizes may do
            traceback.print_exc()
            result.add(f"{count} scenes", "failed", " ".join(str(error).split())[:80])
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return result


def _add_size(
    result: Result,
    what: tuple[torch.device, MatmulPrecision, int, int],
    peaks: tuple[float, float, float],
    epochs: int,
) -> None:
    (device, precision, count, rounds), (flops, bandwidth, kept) = what, peaks
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = Steps(sized(precision, count, True), count, device=device).warmed(WARM_STEPS)
    wait_for(device)
    seconds = interleave({"step": lambda: (steps.step(), wait_for(device))}, rounds)["step"].median
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    cost = cost_of(steps.config, count, kept).total
    floor = cost.seconds(flops, bandwidth)
    whole = epochs * -(-VIEWS // steps.stage.views) * seconds / count
    name = f"{count} scenes"
    result.figures |= {
        f"{name}.seconds": seconds, f"{name}.memory": memory, f"{name}.floor": floor,
        f"{name}.flops": cost.flops, f"{name}.object": whole,
    }  # fmt: skip
    remark = (
        f"{count / seconds:.0f} steps of scenes a second; {1000 * whole:.0f} ms an object of {VIEWS} views"
    )
    remark += f", {whole * 1e5 / 3600:.2f} h for 100,000; {cost.flops / seconds / 1e12:.3f} TFLOP/s"
    remark += f", {seconds / floor:.1f}x the floor"
    result.add(name, f"{1000 * seconds:.1f} ms", remark + (f"; {bytes_text(memory)}" if memory else ""))


def profile(device: torch.device, precision: MatmulPrecision, count: int) -> str:
    """Returns where steps of some scenes spend their time, as a table of torch's profiler."""
    steps = Steps(sized(precision, count, True), count, device=device).warmed(10)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(5):
            steps.step()
        wait_for(device)
    key = f"self_{device.type}_time_total"
    return found.key_averages().table(sort_by=key, row_limit=SHOWN, max_name_column_width=50)


def probe(data: Path, run: str, device: torch.device) -> Result:
    """Runs the probe of `exploit` with a dataset and a model."""
    result = Result(f"probe with {data}", torch.get_num_threads())
    source, images = open_parent(Path(run)), PosedImages.open(data)
    stage, given = source.config.exploit[0], (images, images.select("new"))
    trials = list(run_trials(source.model(device), stage, given, source.starting_scene()))
    for trial in trials:
        result.figures[f"{trial.scenes} scenes.seconds"] = trial.seconds
        memory = f"; {bytes_text(trial.memory)}" if trial.memory else ""
        remark = f"{trial.rate:.0f} steps of scenes a second{memory}"
        result.add(f"{trial.scenes} scenes", f"{1000 * trial.seconds:.1f} ms", remark)
    result.add("chosen", f"{smallest_sufficient(trials)} scenes")
    return result


def main(
    scenes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256),
    precisions: tuple[MatmulPrecision, ...] = ("float32", "tf32", "bfloat16"),
    rounds: int = 15,
    data: Path | None = None,
    run: str = "cars",
    device: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
) -> None:
    """Measure steps of many scenes on a GPU (or CPU): times, memory, distance from the machine's limits.

    Args:
        scenes: numbers of scenes of a step.
        precisions: of the matrix products of the GPU's kernels; on a CPU, only float32.
        rounds: timed steps of each size.
        data: also run the probe of `exploit` with this dataset's new scenes …
        run: … and this library or packaged model.
        device: where to measure; `auto`: a GPU if there is one.
        threads: CPU threads.
        out: JSON file for all figures; tables and the profile are written beside it as Markdown.
    """
    chosen = set_up(Machine(threads=threads, device=device))
    if chosen.type == "cpu":
        precisions = ("float32",)
    results: list[Result] = []

    def attempt(what: str, call: Callable[[], Result]) -> None:
        try:
            results.append(call())
        except Exception:  # the other parts may do
            results.append(Result(f"{what}: failed", torch.get_num_threads()))
            results[-1].add("reason", traceback.format_exc().splitlines()[-1][:200])
            traceback.print_exc()
        show(results[-1].table())
        if out:
            save(results, out, shown=True)

    attempt("agreement with torch", lambda: agreement(chosen))
    kept = counted()
    say(f"Backward evaluates {100 * kept:.1f} % of the samples, as the CPU's kernel counts them.")
    for one in precisions:
        attempt(one, lambda one=one: bench_steps(chosen, one, scenes, rounds, kept))
    if data:
        attempt("probe", lambda: probe(data, run, chosen))
    table = profile(chosen, precisions[-1], scenes[len(scenes) // 2])
    print(table)
    if out:
        with open(out.with_suffix(".md"), "a") as stream:
            stream.write(f"\n```\n{table}\n```\n")


if __name__ == "__main__":
    run_program(main)
