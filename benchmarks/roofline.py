"""Counts the arithmetic and the memory traffic of one rendering step from its sizes. `benchmarks.speed`
compares its measured times with these counts; this file is not a program.

A step renders s scenes of p rays with n samples each (coarse and fine together) and computes gradients.
Counts are per sample point, with f plane features, h hidden units, c channels and o = 1 + c outputs. A
multiply-add is two operations:

| part | forward | backward |
|---|---|---|
| place the point, find its texels and their weights | 54 | 54 k |
| read, or add to, 12 texels | 24 f | 48 f k: read again, then add |
| hidden layer | 2 f h + h | (6 f h + 3 h) k: again, then the gradients of its weights and inputs |
| output layer | 2 h o + o | (4 h o + o) k: the gradients of its weights and inputs |
| activations' shifts and scales, compositing | 6 c + 12 | 11 c + 24 |
| softplus, sigmoid, exp | h + c + 3 | 2 h k + 3 |

k is the fraction of samples that backward keeps; it skips samples with a negligible gradient. The last row
counts evaluations. One evaluation takes some tens of operations on a CPU, or a few instructions of the
special function units on a GPU.

Importance sampling, the sorting of samples and the view direction's three inputs are not counted. They add a
percent or less.
"""

from dataclasses import dataclass

FLOAT = 4
"""Bytes of a number in memory."""
CORNERS = 12
"""Texels around a point: four in each of three planes."""


@dataclass(frozen=True)
class Cost:
    """Operations and memory traffic of a pass."""

    flops: int
    """Additions, subtractions and multiplications."""
    functions: int
    """Evaluations of softplus, sigmoid, exp and expm1; not in `flops`."""
    bytes: int
    """Memory traffic if every array is transferred once and caches serve the rest: a lower bound."""
    texel_bytes: int
    """Traffic of texels, mostly between caches and registers: 12 texels per point, and as many reads and
    writes where gradients are added."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.functions + other.functions,
            self.bytes + other.bytes, self.texel_bytes + other.texel_bytes,
        )  # fmt: skip

    def seconds(
        self, flops_per_second: float, bytes_per_second: float, flops_per_function: float = 0.0
    ) -> float:
        """Lower bound on the time on a machine with these peaks (roofline: Williams, Waterman and Patterson,
        CACM 52(4), 2009). `flops_per_function` converts evaluations to operations; 0 if separate units
        evaluate functions."""
        operations = self.flops + flops_per_function * self.functions
        return max(operations / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class StepCost:
    """Both passes of a step."""

    forward: Cost
    backward: Cost

    @property
    def total(self) -> Cost:
        return self.forward + self.backward


def step_cost(
    scenes: int,
    rays: int,
    samples: int,
    resolution: int,
    features: int,
    hidden: int,
    channels: int,
    kept: float = 1.0,
) -> StepCost:
    """Cost of rendering `rays` rays in each of `scenes` scenes with `samples` samples per ray, and of its
    gradient.

    Tri-planes are 3 x resolution x resolution x features; the network has one layer of `hidden` units and 1 +
    `channels` outputs. `kept` in [0, 1] is the fraction of samples that backward evaluates again. Forward
    writes the position, density and features of each sample for backward.
    """
    all_rays, outputs = scenes * rays, 1 + channels
    points, back = all_rays * samples, round(kept * all_rays * samples)
    hidden_layer, output_layer = 2 * features * hidden, 2 * hidden * outputs  # without biases
    read = 54 + 2 * CORNERS * features

    planes = scenes * 3 * resolution**2 * features
    network = features * hidden + hidden + hidden * outputs + outputs
    given = all_rays * 8  # origin, direction, near, far
    results = all_rays * (channels + 2)
    saved = points * (channels + 2)

    forward = Cost(
        flops=points * (read + hidden_layer + hidden + output_layer + outputs + 6 * channels + 12),
        functions=points * (hidden + channels + 3),
        bytes=FLOAT * (planes + network + given + points + results + saved),  # a random number per point
        texel_bytes=FLOAT * points * CORNERS * features,
    )
    per_kept = read + 2 * CORNERS * features + 3 * hidden_layer + 3 * hidden + 2 * output_layer + outputs
    backward = Cost(
        flops=back * per_kept + points * (11 * channels + 24),
        functions=back * 2 * hidden + points * 3,
        bytes=FLOAT * (2 * (planes + network) + given + results + saved),
        texel_bytes=FLOAT * back * 3 * CORNERS * features,
    )
    return StepCost(forward, backward)
