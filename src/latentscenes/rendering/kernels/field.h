// The field (field.py) at a tile of points, forward and backward.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace latentscenes {

constexpr int64_t kTile = 48;  // points handled together; their activations fit into the first-level cache
constexpr int64_t kAhead = 6;  // texels are prefetched this many points ahead
constexpr int kOut = 8;        // network outputs are padded to a multiple of this

// Sizes, options and arrays of a rendering problem. Must match the ctypes structure in native.py.
struct Problem {
  int64_t scenes, rays, coarse, fine, resolution, features, directed, hidden, channels, product, networks, threads;
  int64_t column_axis[3], row_axis[3];
  float density_shift, feature_margin, blur_padding, skip, opaque;
  const float *planes, *hidden_w, *hidden_b, *out_w, *out_b;
  const float *origins, *directions, *near, *far, *u_coarse, *u_fine;

  // All scenes share one hidden layer, or each has its own (networks == scenes).
  int64_t network(int64_t scene) const { return networks > 1 ? scene : 0; }
  // The network's inputs are the planes' features and, if `directed`, the ray's unit direction.
  int64_t inputs() const { return features + 3 * directed; }
  int64_t outputs() const { return 1 + channels; }
  int64_t samples() const { return coarse + fine; }
  int64_t scene_size() const { return 3 * resolution * resolution * features; }
};

// Weights padded with zeros to whole registers, in both orders. Padding does not change any result.
struct Network {
  int64_t inputs, hidden, outputs;  // padded sizes
  Array hidden_w, hidden_wt, hidden_b, out_w, out_wt, out_b;

  Network(const Problem& p, int64_t which)
      : inputs(padded(p.inputs(), kWide)),
        hidden(padded(p.hidden, kWide)),
        outputs(padded(p.outputs(), kOut)),
        hidden_w(hidden * inputs),
        hidden_wt(inputs * hidden),
        hidden_b(hidden),
        out_w(outputs * hidden),
        out_wt(hidden * outputs),
        out_b(outputs) {
    std::copy(p.hidden_b, p.hidden_b + p.hidden, hidden_b.begin());
    std::copy(p.out_b, p.out_b + p.outputs(), out_b.begin());
    const float* weights = p.hidden_w + which * p.hidden * p.inputs();
    for (int64_t h = 0; h < p.hidden; ++h)
      for (int64_t f = 0; f < p.inputs(); ++f)
        hidden_w[h * inputs + f] = hidden_wt[f * hidden + h] = weights[h * p.inputs() + f];
    for (int64_t o = 0; o < p.outputs(); ++o)
      for (int64_t h = 0; h < p.hidden; ++h) out_w[o * hidden + h] = out_wt[h * outputs + o] = p.out_w[o * p.hidden + h];
  }
};

inline std::vector<Network> networks(const Problem& p) {
  std::vector<Network> all;
  for (int64_t which = 0; which < p.networks; ++which) all.emplace_back(p, which);
  return all;
}

// One thread's workspace for a tile of points.
struct Tile {
  int64_t count = 0;
  float point[3][kTile] = {};
  float direction[3][kTile] = {};  // unit directions, if they are inputs of the network
  int64_t ray[kTile];  // for gradients of rays: the ray of each point, and t
  float t[kTile];
  int32_t texel[12][kTile];  // index of each of 4 corners in each of 3 planes, in texels of the scene
  float weight[12][kTile];   // bilinear weight of each corner, 0 outside the plane
  Array x, parts, h, slope, raw, d_x, d_pre;

  Tile(const Problem& p, const Network& n, bool backward)
      : x(kTile * n.inputs),
        parts(p.product ? 3 * kTile * n.inputs : 0),
        h(kTile * n.hidden),
        slope(backward ? kTile * n.hidden : 0),
        raw(kTile * n.outputs),
        d_x(backward ? kTile * n.inputs : 0),
        d_pre(backward ? kTile * n.hidden : 0) {}
};

// One thread's gradients of a network, in the padded layout of `Network`.
struct NetworkGradient {
  Array hidden_wt, hidden_b, out_w, out_b;

  explicit NetworkGradient(const Network& n)
      : hidden_wt(n.inputs * n.hidden), hidden_b(n.hidden), out_w(n.outputs * n.hidden), out_b(n.outputs) {}
};

// Gradients of rays, (rays x 3) each. Each ray belongs to one thread.
struct RayGradient {
  float *origins, *directions;
};

inline float length(const float* v) { return std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]); }

// Sets the point of sample i, at t along a ray, and the ray's unit direction.
inline void place(const Problem& p, Tile& tile, int64_t i, int64_t ray, float t) {
  const float *origin = p.origins + 3 * ray, *direction = p.directions + 3 * ray;
  for (int axis = 0; axis < 3; ++axis) tile.point[axis][i] = origin[axis] + t * direction[axis];
  if (!p.directed) return;
  const float whole = length(direction);
  for (int axis = 0; axis < 3; ++axis) tile.direction[axis][i] = direction[axis] / whole;
}

// The first of the two texels around a place along one side of a plane, their weights, and the weights' slopes by texels.
// Texels outside the plane have weight and slope 0.
struct Pair {
  int32_t first;
  float weight[2], slope[2];
};

inline Pair around(float place, int32_t r) {
  // Clamped to just outside the plane, where all weights are zero. The comparisons also catch NaN.
  const float size = static_cast<float>(r);
  float x = ((place + 1.0f) * size - 1.0f) * 0.5f;
  x = x > -2.0f ? x : -2.0f;
  x = x < size + 1.0f ? x : size + 1.0f;
  const int32_t left = static_cast<int32_t>(x + 2.0f) - 2;
  const float fraction = x - static_cast<float>(left);
  const bool first = (left >= 0) & (left < r), second = (left >= -1) & (left < r - 1);
  return {left, {first ? 1.0f - fraction : 0.0f, second ? fraction : 0.0f}, {first ? -1.0f : 0.0f, second ? 1.0f : 0.0f}};
}

// Finds the texels around each point and their weights (align_corners = False, zero outside).
inline void locate(const Problem& p, Tile& tile) {
  const int32_t r = static_cast<int32_t>(p.resolution);
  for (int k = 0; k < 3; ++k) {
    const float* column = tile.point[p.column_axis[k]];
    const float* row = tile.point[p.row_axis[k]];
    int32_t(*texel)[kTile] = tile.texel + 4 * k;
    float(*weight)[kTile] = tile.weight + 4 * k;
    const int32_t plane = k * r * r;
    for (int64_t i = 0; i < kTile; ++i) {
      const Pair x = around(column[i], r), y = around(row[i], r);
      const int32_t x0 = std::min(std::max(x.first, 0), r - 1), x1 = std::min(std::max(x.first + 1, 0), r - 1);
      const int32_t y0 = plane + r * std::min(std::max(y.first, 0), r - 1);
      const int32_t y1 = plane + r * std::min(std::max(y.first + 1, 0), r - 1);
      texel[0][i] = y0 + x0, texel[1][i] = y0 + x1, texel[2][i] = y1 + x0, texel[3][i] = y1 + x1;
      weight[0][i] = y.weight[0] * x.weight[0], weight[1][i] = y.weight[0] * x.weight[1];
      weight[2][i] = y.weight[1] * x.weight[0], weight[3][i] = y.weight[1] * x.weight[1];
    }
  }
}

// Reads N features of point i from plane k, beginning with feature f.
template <int N>
inline Vec<N> read_plane(const Problem& p, const Tile& tile, const float* planes, int k, int64_t i, int64_t f) {
  Vec<N> sum{};
  for (int c = 4 * k; c < 4 * k + 4; ++c) sum += tile.weight[c][i] * load<N>(planes + tile.texel[c][i] * p.features + f);
  return sum;
}

template <int N>
inline void gather_features(const Problem& p, const Network& n, const float* planes, Tile& tile, int64_t i, int64_t f) {
  const Vec<N> a = read_plane<N>(p, tile, planes, 0, i, f), b = read_plane<N>(p, tile, planes, 1, i, f),
               c = read_plane<N>(p, tile, planes, 2, i, f);
  const int64_t at = i * n.inputs + f, step = kTile * n.inputs;
  store<N>(&tile.x[at], p.product ? a * b * c : a + b + c);
  if (p.product) store<N>(&tile.parts[at], a), store<N>(&tile.parts[at + step], b), store<N>(&tile.parts[at + 2 * step], c);
}

// Prefetches the texels around point i for reading or (kWrite) writing.
template <int kWrite>
inline void prefetch(const Problem& p, const Tile& tile, const float* planes, int64_t i) {
  if (i >= tile.count) return;
  for (int c = 0; c < 12; ++c)
    for (int64_t f = 0; f < p.features; f += 16) __builtin_prefetch(planes + tile.texel[c][i] * p.features + f, kWrite);
}

// Computes tile.x from tile.point and tile.direction, and tile.parts (features per plane) if planes are multiplied.
inline void gather(const Problem& p, const Network& n, const float* planes, Tile& tile) {
  locate(p, tile);
  for (int64_t i = 0; i < kAhead; ++i) prefetch<0>(p, tile, planes, i);
  for (int64_t i = 0; i < tile.count; ++i) {
    int64_t f = 0;
    prefetch<0>(p, tile, planes, i + kAhead);
    for (; f + kWide <= p.features; f += kWide) gather_features<kWide>(p, n, planes, tile, i, f);
    for (; f + 4 <= p.features; f += 4) gather_features<4>(p, n, planes, tile, i, f);
    for (; f < p.features; ++f) gather_features<1>(p, n, planes, tile, i, f);
  }
  if (p.directed)
    for (int64_t i = 0; i < tile.count; ++i)
      for (int axis = 0; axis < 3; ++axis) tile.x[i * n.inputs + p.features + axis] = tile.direction[axis][i];
}

// Returns the gradient of N features that point i read from plane k, beginning with feature f.
template <int N>
inline Vec<N> part_gradient(const Problem& p, const Network& n, const Tile& tile, int k, int64_t i, int64_t f) {
  const int64_t at = i * n.inputs + f, step = kTile * n.inputs;
  const Vec<N> whole = load<N>(&tile.d_x[at]);
  if (!p.product) return whole;
  return whole * (load<N>(&tile.parts[at + (k + 1) % 3 * step]) * load<N>(&tile.parts[at + (k + 2) % 3 * step]));
}

template <int N>
inline void scatter_features(const Problem& p, const Network& n, float* gradient, const Tile& tile, int64_t i, int64_t f) {
  for (int k = 0; k < 3; ++k) {
    const Vec<N> d = part_gradient<N>(p, n, tile, k, i, f);
    for (int c = 4 * k; c < 4 * k + 4; ++c) {
      float* to = gradient + tile.texel[c][i] * p.features + f;
      store<N>(to, load<N>(to) + tile.weight[c][i] * d);
    }
  }
}

// Adds tile.d_x to the gradient of one scene's planes.
inline void scatter(const Problem& p, const Network& n, float* gradient, const Tile& tile) {
  for (int64_t i = 0; i < kAhead; ++i) prefetch<1>(p, tile, gradient, i);
  for (int64_t i = 0; i < tile.count; ++i) {
    int64_t f = 0;
    prefetch<1>(p, tile, gradient, i + kAhead);
    for (; f + kWide <= p.features; f += kWide) scatter_features<kWide>(p, n, gradient, tile, i, f);
    for (; f + 4 <= p.features; f += 4) scatter_features<4>(p, n, gradient, tile, i, f);
    for (; f < p.features; ++f) scatter_features<1>(p, n, gradient, tile, i, f);
  }
}

// Adds the gradients of point i by its column and row in plane k, in texels, through N features beginning with feature f,
// to N sums each.
template <int N>
inline void slope_features(const Problem& p, const Network& n, const float* planes, const Tile& tile, int k, int64_t i,
                           int64_t f, const Pair& x, const Pair& y, float* column, float* row) {
  const int32_t(*texel)[kTile] = tile.texel + 4 * k;
  Vec<N> corner[4];
  for (int c = 0; c < 4; ++c) corner[c] = load<N>(planes + texel[c][i] * p.features + f);
  const Vec<N> top = x.weight[0] * corner[0] + x.weight[1] * corner[1], below = x.weight[0] * corner[2] + x.weight[1] * corner[3];
  const Vec<N> d = part_gradient<N>(p, n, tile, k, i, f), by_row = d * (y.slope[0] * top + y.slope[1] * below);
  const Vec<N> by_column = d * (y.weight[0] * (x.slope[0] * corner[0] + x.slope[1] * corner[1]) +
                                y.weight[1] * (x.slope[0] * corner[2] + x.slope[1] * corner[3]));
  store<N>(column, load<N>(column) + by_column), store<N>(row, load<N>(row) + by_row);
}

// Adds to the gradients of rays through the points and, if `directed`, the unit directions. Places t are constants.
inline void differentiate_rays(const Problem& p, const Network& n, const float* planes, const Tile& tile, RayGradient d_rays) {
  const int32_t r = static_cast<int32_t>(p.resolution);
  for (int64_t i = 0; i < tile.count; ++i) {
    float sums[3][kWide] = {}, d_point[3] = {};
    for (int k = 0; k < 3; ++k) {
      const Pair x = around(tile.point[p.column_axis[k]][i], r), y = around(tile.point[p.row_axis[k]][i], r);
      float *column = sums[p.column_axis[k]], *row = sums[p.row_axis[k]];
      int64_t f = 0;
      for (; f + kWide <= p.features; f += kWide) slope_features<kWide>(p, n, planes, tile, k, i, f, x, y, column, row);
      for (; f + 4 <= p.features; f += 4) slope_features<4>(p, n, planes, tile, k, i, f, x, y, column, row);
      for (; f < p.features; ++f) slope_features<1>(p, n, planes, tile, k, i, f, x, y, column, row);
    }
    for (int axis = 0; axis < 3; ++axis)
      for (int j = 0; j < kWide; ++j) d_point[axis] += 0.5f * r * sums[axis][j];
    float *origin = d_rays.origins + 3 * tile.ray[i], *direction = d_rays.directions + 3 * tile.ray[i];
    for (int axis = 0; axis < 3; ++axis) origin[axis] += d_point[axis], direction[axis] += tile.t[i] * d_point[axis];
    if (!p.directed) continue;
    const float *d_unit = &tile.d_x[i * n.inputs + p.features], whole = length(p.directions + 3 * tile.ray[i]);
    float along = 0;  // a unit vector cannot become longer
    for (int axis = 0; axis < 3; ++axis) along += d_unit[axis] * tile.direction[axis][i];
    for (int axis = 0; axis < 3; ++axis) direction[axis] += (d_unit[axis] - along * tile.direction[axis][i]) / whole;
  }
}

// Computes tile.raw, the network's outputs before their activations, from tile.point.
inline void field_forward(const Problem& p, const Network& n, const float* planes, Tile& tile) {
  gather(p, n, planes, tile);
  float *h = tile.h.data(), *raw = tile.raw.data();
  product<kWide>(tile.count, n.hidden, p.inputs(), {tile.x.data(), n.inputs, 1}, n.hidden_wt.data(), n.hidden,
                 n.hidden_b.data(), 0,
                 [=, &n](int64_t i, int64_t j, Vec<kWide> pre) { store<kWide>(h + i * n.hidden + j, softplus<kWide>(pre)); });
  product<kOut>(tile.count, n.outputs, p.hidden, {h, n.hidden, 1}, n.out_wt.data(), n.outputs, n.out_b.data(), 0,
                [=, &n](int64_t i, int64_t j, Vec<kOut> sum) { store<kOut>(raw + i * n.outputs + j, sum); });
}

// Given the gradient of raw outputs in tile.raw, adds to the gradients of network, planes and rays, where not null.
inline void field_backward(const Problem& p, const Network& n, const float* planes, Tile& tile, NetworkGradient* network,
                           float* d_planes, RayGradient d_rays) {
  gather(p, n, planes, tile);
  float *h = tile.h.data(), *slope = tile.slope.data(), *d_pre = tile.d_pre.data(), *d_x = tile.d_x.data();
  const float *x = tile.x.data(), *d_raw = tile.raw.data();
  const int64_t hidden = n.hidden, inputs = n.inputs;
  product<kWide>(tile.count, hidden, p.inputs(), {x, inputs, 1}, n.hidden_wt.data(), hidden, n.hidden_b.data(), 0,
                 [=](int64_t i, int64_t j, Vec<kWide> pre) {
                   const Vec<kWide> e = exp_minus_abs<kWide>(pre);
                   store<kWide>(h + i * hidden + j, softplus_from<kWide>(pre, e));
                   store<kWide>(slope + i * hidden + j, sigmoid_from<kWide>(pre, e));
                 });
  product<kWide>(tile.count, hidden, p.outputs(), {d_raw, n.outputs, 1}, n.out_w.data(), hidden, nullptr, 0,
                 [=](int64_t i, int64_t j, Vec<kWide> d_h) {
                   store<kWide>(d_pre + i * hidden + j, d_h * load<kWide>(slope + i * hidden + j));
                 });
  if (network) {
    float *d_out_w = network->out_w.data(), *d_hidden_wt = network->hidden_wt.data();
    product<kWide>(p.outputs(), hidden, tile.count, {d_raw, 1, n.outputs}, h, hidden, d_out_w, hidden,
                   [=](int64_t i, int64_t j, Vec<kWide> sum) { store<kWide>(d_out_w + i * hidden + j, sum); });
    product<kWide>(p.inputs(), hidden, tile.count, {x, 1, inputs}, d_pre, hidden, d_hidden_wt, hidden,
                   [=](int64_t i, int64_t j, Vec<kWide> sum) { store<kWide>(d_hidden_wt + i * hidden + j, sum); });
    for (int64_t i = 0; i < tile.count; ++i) {
      for (int64_t o = 0; o < p.outputs(); ++o) network->out_b[o] += d_raw[i * n.outputs + o];
      for (int64_t j = 0; j < hidden; ++j) network->hidden_b[j] += d_pre[i * hidden + j];
    }
  }
  if (d_planes || d_rays.origins) {
    const int64_t wanted = d_rays.origins ? inputs : padded(p.features, kWide);
    product<kWide>(tile.count, wanted, p.hidden, {d_pre, hidden, 1}, n.hidden_w.data(), inputs, nullptr, 0,
                   [=](int64_t i, int64_t j, Vec<kWide> sum) { store<kWide>(d_x + i * inputs + j, sum); });
  }
  if (d_planes) scatter(p, n, d_planes, tile);
  if (d_rays.origins) differentiate_rays(p, n, planes, tile, d_rays);
}

}  // namespace latentscenes
