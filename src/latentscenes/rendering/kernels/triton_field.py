"""The field (field.py) at many points on a GPU, forward and backward, in Triton.

Notable:
- A program takes a block of points, reads their texels, and evaluates the network by matrix products. The
  network's inputs are never written to memory; backward computes them again.
- Gradients of planes are added atomically, so their last bits differ from run to run. For the network, each
  program sums its own gradients, and these sums are added in a fixed order. Planes and network have separate
  backward kernels, because one for both would run out of registers.
- Sizes in capitals are padded to powers of two, at least 16, with masked reads. Padded units have zero
  weights.
"""

import inspect
import os

import triton
import triton.language as tl

from latentscenes.rendering.field import DENSITY_SHIFT, FEATURE_MARGIN

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton interprets kernels on the CPU instead of compiling them, for tests without a GPU."""
SHIFT = tl.constexpr(DENSITY_SHIFT)
MARGIN = tl.constexpr(FEATURE_MARGIN)


def jit(function):
    """Applies triton.jit to the function without the type checks that tests wrap around all functions."""
    return triton.jit(inspect.unwrap(function))


@jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@jit
def density_from(raw):
    """Computes softplus(raw + shift). A series replaces log(1 + e) where rounding would lose digits."""
    x = raw + SHIFT
    e = tl.exp(-tl.abs(x))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6))))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.1, series, tl.log(1.0 + e))


@jit
def rounded(x, PRECISION: tl.constexpr):
    """Rounds to the numbers that a matrix product in `PRECISION` multiplies."""
    if PRECISION == "bfloat16":
        x = x.to(tl.bfloat16)
    if INTERPRETED:  # the interpreter has no products in bfloat16 or tf32 (float32 without its last 13 bits)
        if PRECISION == "bfloat16":
            x = x.to(tl.float32)
        if PRECISION == "tf32":
            x = ((x.to(tl.int32, bitcast=True) >> 13) << 13).to(tl.float32, bitcast=True)
    return x


@jit
def product(a, b, PRECISION: tl.constexpr):
    """Multiplies a · b, summing in float32."""
    a, b = rounded(a, PRECISION), rounded(b, PRECISION)
    return tl.dot(a, b, input_precision="tf32" if PRECISION == "tf32" else "ieee")


@jit
def load_matrix(pointer, row, column, rows, columns):
    """Loads a padded block of a contiguous (rows x columns) matrix."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@jit
def store_matrix(pointer, block, row, column, rows, columns):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + row[:, None] * columns + column[None, :], block, mask=mask)


@jit
def coordinate(origins, directions, ray, t, axis, valid):
    """Computes one coordinate of points at t along rays."""
    origin = tl.load(origins + 3 * ray + axis, mask=valid, other=0.0)
    return origin + t * tl.load(directions + 3 * ray + axis, mask=valid, other=0.0)


@jit
def place(origins, directions, ray, t, plane, valid, EG3D: tl.constexpr):
    """Computes the places of points at t along rays in a plane, along columns and rows (field.PLANE_AXES)."""
    column_axis = tl.where(plane == 2, 2 if EG3D else 1, 0)
    row_axis = tl.where(plane == 0, 1, tl.where(plane == 2, 0 if EG3D else 2, 2))
    column = coordinate(origins, directions, ray, t, column_axis, valid)
    return column, coordinate(origins, directions, ray, t, row_axis, valid)


@jit
def corner_of(column, row, plane, resolution, CORNER: tl.constexpr):
    """Returns one of the four texels around points of a plane: its number in the scene, its bilinear weight,
    and whether it is inside the plane (align_corners = False, zero outside)."""
    # Clamp to just outside the plane, so that texel numbers fit into integers.
    x = tl.minimum(tl.maximum(((column + 1) * resolution - 1) * 0.5, -2.0), resolution + 1.0)
    y = tl.minimum(tl.maximum(((row + 1) * resolution - 1) * 0.5, -2.0), resolution + 1.0)
    left, top = tl.floor(x), tl.floor(y)
    texel_x, texel_y = left.to(tl.int32) + CORNER % 2, top.to(tl.int32) + CORNER // 2
    weight_x = x - left if CORNER % 2 else 1 - (x - left)
    weight_y = y - top if CORNER // 2 else 1 - (y - top)
    inside = (texel_x >= 0) & (texel_x < resolution) & (texel_y >= 0) & (texel_y < resolution)
    return (plane * resolution + texel_y) * resolution + texel_x, weight_x * weight_y, inside


@jit
def scene_start(ray, rays, resolution, features):
    """Returns the offset of the planes of each ray's scene."""
    return (ray // rays).to(tl.int64) * (3 * resolution * resolution * features)


@jit
def read_plane(planes, start, column, row, plane, valid, resolution, features, feature):
    """Reads the features (points x inputs) of one plane at points of the scenes at offset `start`."""
    total = tl.zeros((start.shape[0], feature.shape[0]), tl.float32)
    for CORNER in tl.static_range(4):
        texel, weight, inside = corner_of(column, row, plane, resolution, CORNER)
        at = planes + start[:, None] + (texel * features)[:, None] + feature[None, :]
        read = tl.load(at, mask=(inside & valid)[:, None] & (feature < features)[None, :], other=0.0)
        total += weight[:, None] * read.to(tl.float32)
    return total


@jit
def add_to_plane(planes, start, column, row, plane, valid, resolution, features, feature, gradient):
    """Adds points' gradients to the texels that `read_plane` reads."""
    for CORNER in tl.static_range(4):
        texel, weight, inside = corner_of(column, row, plane, resolution, CORNER)
        at = planes + start[:, None] + (texel * features)[:, None] + feature[None, :]
        mask = (inside & valid)[:, None] & (feature < features)[None, :]
        tl.atomic_add(at, weight[:, None] * gradient, mask=mask, sem="relaxed")


@jit
def with_direction(x, directions, ray, valid, features, feature):
    """Writes the ray's unit direction to the three columns after the features."""
    dx = tl.load(directions + 3 * ray, mask=valid, other=1.0)
    dy = tl.load(directions + 3 * ray + 1, mask=valid, other=0.0)
    dz = tl.load(directions + 3 * ray + 2, mask=valid, other=0.0)
    scale = 1 / tl.sqrt(dx * dx + dy * dy + dz * dz)
    axis = (feature - features)[None, :]
    component = tl.where(axis == 0, dx[:, None], tl.where(axis == 1, dy[:, None], dz[:, None]))
    return tl.where((axis >= 0) & (axis < 3), component * scale[:, None], x)


@jit
def network_inputs(
    planes, start, origins, directions, ray, t, valid, resolution, features, feature,
    EG3D: tl.constexpr, PRODUCT: tl.constexpr, DIRECTED: tl.constexpr,
):  # fmt: skip
    """Computes the network's inputs at points at t along rays: planes' sum or product, then direction."""
    column, row = place(origins, directions, ray, t, 0, valid, EG3D)
    x = read_plane(planes, start, column, row, 0, valid, resolution, features, feature)
    for plane in range(1, 3):  # not unrolled: it would need too many registers
        column, row = place(origins, directions, ray, t, plane, valid, EG3D)
        read = read_plane(planes, start, column, row, plane, valid, resolution, features, feature)
        x = x * read if PRODUCT else x + read
    if DIRECTED:
        x = with_direction(x, directions, ray, valid, features, feature)
    return x


@jit
def field_forward(
    planes, hidden_w, hidden_b, out_w, out_b, origins, directions, near, far, t, density, features, points,
    first, count, rays, samples, resolution, plane_features, inputs, hidden, channels, EG3D: tl.constexpr,
    PRODUCT: tl.constexpr, DIRECTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    INPUTS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Writes density and features of samples `first` to `first + count` of each ray, which has `samples`;
    each scene has `rays` rays. Skips rays that miss the box."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = point < points
    ray = point // count
    valid &= tl.load(far + ray, mask=valid, other=0.0) > tl.load(near + ray, mask=valid, other=0.0)
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    slot = ray * samples + first + point % count
    distance = tl.load(t + slot, mask=valid, other=0.0)
    start = scene_start(ray, rays, resolution, plane_features)
    feature, unit, output = tl.arange(0, INPUTS), tl.arange(0, HIDDEN), tl.arange(0, OUTPUTS)
    x = network_inputs(
        planes, start, origins, directions, ray, distance, valid, resolution, plane_features, feature, EG3D,
        PRODUCT, DIRECTED,
    )  # fmt: skip

    weights = load_matrix(hidden_w, unit, feature, hidden, inputs)
    bias = tl.load(hidden_b + unit, mask=unit < hidden, other=0.0)
    activation = softplus(product(x, tl.trans(weights), PRECISION) + bias[None, :])
    weights = load_matrix(out_w, output, unit, 1 + channels, hidden)
    bias = tl.load(out_b + output, mask=output <= channels, other=0.0)
    raw = product(activation, tl.trans(weights), PRECISION) + bias[None, :]

    is_density = (output == 0)[None, :]
    tl.store(
        density + slot[:, None] + 0 * output[None, :], density_from(raw), mask=valid[:, None] & is_density
    )
    value = (2 + 4 * MARGIN) * tl.sigmoid(raw) - (1 + 2 * MARGIN)  # 2 (s (1 + 2m) − m) − 1
    at = features + (slot.to(tl.int64) * channels)[:, None] + (output - 1)[None, :]
    tl.store(at, value, mask=valid[:, None] & ((output > 0) & (output <= channels))[None, :])


@jit
def evaluate_again(
    slot, distance, valid, planes, hidden_w, hidden_b, out_w, origins, directions, d_raw, rays, samples,
    resolution, plane_features, inputs, hidden, channels, EG3D: tl.constexpr, PRODUCT: tl.constexpr,
    DIRECTED: tl.constexpr, PRECISION: tl.constexpr, INPUTS: tl.constexpr, HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Returns for samples the network's inputs, the hidden units before their activation, and the gradients
    of raw outputs and of those units."""
    feature, unit, output = tl.arange(0, INPUTS), tl.arange(0, HIDDEN), tl.arange(0, OUTPUTS)
    ray = slot // samples
    start = scene_start(ray, rays, resolution, plane_features)
    x = network_inputs(
        planes, start, origins, directions, ray, distance, valid, resolution, plane_features, feature, EG3D,
        PRODUCT, DIRECTED,
    )  # fmt: skip
    bias = tl.load(hidden_b + unit, mask=unit < hidden, other=0.0)
    pre = (
        product(x, tl.trans(load_matrix(hidden_w, unit, feature, hidden, inputs)), PRECISION) + bias[None, :]
    )
    at = d_raw + (slot.to(tl.int64) * (1 + channels))[:, None] + output[None, :]
    d_output = tl.load(at, mask=valid[:, None] & (output <= channels)[None, :], other=0.0)
    d_pre = product(d_output, load_matrix(out_w, output, unit, 1 + channels, hidden), PRECISION) * tl.sigmoid(
        pre
    )
    return x, pre, d_output, d_pre


@jit
def field_backward_planes(
    planes, hidden_w, hidden_b, out_w, origins, directions, t, d_raw, kept, d_planes, count, rays, samples,
    resolution, plane_features, inputs, hidden, channels, EG3D: tl.constexpr, PRODUCT: tl.constexpr,
    DIRECTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of the `count` samples numbered in `kept` to `d_planes`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < count
    slot = tl.load(kept + index, mask=valid, other=0).to(tl.int32)
    distance = tl.load(t + slot, mask=valid, other=0.0)
    _, _, _, d_pre = evaluate_again(
        slot, distance, valid, planes, hidden_w, hidden_b, out_w, origins, directions, d_raw, rays, samples,
        resolution, plane_features, inputs, hidden, channels, EG3D, PRODUCT, DIRECTED, PRECISION, INPUTS,
        HIDDEN, OUTPUTS,
    )  # fmt: skip
    feature, unit = tl.arange(0, INPUTS), tl.arange(0, HIDDEN)
    d_x = product(d_pre, load_matrix(hidden_w, unit, feature, hidden, inputs), PRECISION)

    ray = slot // samples
    start = scene_start(ray, rays, resolution, plane_features)
    for plane in range(3):
        gradient = d_x
        if PRODUCT:  # times the features of the other two planes
            for step in range(1, 3):
                other = (plane + step) % 3
                column, row = place(origins, directions, ray, distance, other, valid, EG3D)
                gradient *= read_plane(
                    planes, start, column, row, other, valid, resolution, plane_features, feature
                )
        column, row = place(origins, directions, ray, distance, plane, valid, EG3D)
        add_to_plane(
            d_planes, start, column, row, plane, valid, resolution, plane_features, feature, gradient
        )


@jit
def field_backward_network(
    planes, hidden_w, hidden_b, out_w, origins, directions, t, d_raw, kept, d_hidden_w, d_hidden_b, d_out_w,
    d_out_b, count, rays, samples, resolution, plane_features, inputs, hidden, channels, EG3D: tl.constexpr,
    PRODUCT: tl.constexpr, DIRECTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    INPUTS: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Sums the network's gradients over each program's share of `kept` and writes them to its row."""
    feature, unit, output = tl.arange(0, INPUTS), tl.arange(0, HIDDEN), tl.arange(0, OUTPUTS)
    sum_hidden_w, sum_hidden_b = tl.zeros((HIDDEN, INPUTS), tl.float32), tl.zeros((HIDDEN,), tl.float32)
    sum_out_w, sum_out_b = tl.zeros((OUTPUTS, HIDDEN), tl.float32), tl.zeros((OUTPUTS,), tl.float32)
    program = tl.program_id(0)
    for begin in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        index = begin + tl.arange(0, BLOCK)
        valid = index < count
        slot = tl.load(kept + index, mask=valid, other=0).to(tl.int32)
        distance = tl.load(t + slot, mask=valid, other=0.0)
        x, pre, d_output, d_pre = evaluate_again(
            slot, distance, valid, planes, hidden_w, hidden_b, out_w, origins, directions, d_raw, rays,
            samples, resolution, plane_features, inputs, hidden, channels, EG3D, PRODUCT, DIRECTED, PRECISION,
            INPUTS, HIDDEN, OUTPUTS,
        )  # fmt: skip
        sum_hidden_w += product(tl.trans(d_pre), x, PRECISION)
        sum_hidden_b += tl.sum(d_pre, 0)
        sum_out_w += product(tl.trans(d_output), softplus(pre), PRECISION)
        sum_out_b += tl.sum(d_output, 0)

    store_matrix(d_hidden_w + program * hidden * inputs, sum_hidden_w, unit, feature, hidden, inputs)
    tl.store(d_hidden_b + program * hidden + unit, sum_hidden_b, mask=unit < hidden)
    store_matrix(d_out_w + program * (1 + channels) * hidden, sum_out_w, output, unit, 1 + channels, hidden)
    tl.store(d_out_b + program * (1 + channels) + output, sum_out_b, mask=output <= channels)
