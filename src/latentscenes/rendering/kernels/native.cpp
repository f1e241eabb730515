// `march_planes` of render.py, forward and backward, in one pass per ray.
//
// Notable:
// - Forward marches a few rays at a time. Only results and the samples that backward needs (sorted t, densities,
//   features) grow with the number of rays. It skips samples behind opaque ones.
// - Backward computes the gradient of each sample's raw outputs in closed form from the saved samples. It drops samples
//   with negligible gradients, collects the others of all rays in tiles and evaluates them again.
// - No atomics: each thread has a fixed range of rays, and its private sums are added in thread order. So results are
//   exactly reproducible for a fixed number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "field.h"

namespace latentscenes {
namespace {

constexpr int64_t kGroup = 16;  // rays marched together, to fill tiles although some samples are skipped
constexpr int64_t kSlab = 12;   // coarse samples between two checks whether a ray is opaque

// One ray's sorted samples, for compositing. Interval k lies between samples k and k + 1.
struct March {
  Array t, density, features, optical, before, alpha, weight, merged_t, merged_density, merged_features;
  float passed;  // optical thickness of the coarse samples so far
  float end;     // t from which samples are skipped

  explicit March(const Problem& p) {
    const int64_t size = padded(p.samples(), kWide);
    for (Array* array : {&t, &density, &optical, &before, &alpha, &weight, &merged_t, &merged_density}) array->resize(size);
    features.resize(size * p.channels), merged_features.resize(size * p.channels);
  }

  // All samples of a ray that misses the box are skipped.
  void clear(bool hits) {
    const float infinity = std::numeric_limits<float>::infinity();
    std::fill(density.begin(), density.end(), 0.0f), std::fill(features.begin(), features.end(), 0.0f);
    passed = hits ? 0 : infinity, end = hits ? infinity : -infinity;
  }

  bool missed() const { return end < 0; }

  // Whether the fraction of light that is left is below `skip`.
  bool over(const Problem& p) const { return passed > p.opaque; }

  // Adds the thickness of coarse samples [from, to).
  void pass(const Problem& p, int64_t from, int64_t to) {
    if (over(p)) return;
    for (int64_t k = std::max<int64_t>(from, 1); k < to; ++k) passed += 0.5f * (density[k - 1] + density[k]) * (t[k] - t[k - 1]);
    if (over(p)) end = t[to - 1];
  }
};

// Computes interval weights w = e^-before · (1 − e^-optical) from the mean density of both ends (march.composite).
void weigh(int64_t count, const float* t, const float* density, March& m) {
  float sum = 0;
  for (int64_t k = 0; k + 1 < count; ++k) {
    m.optical[k] = 0.5f * (density[k] + density[k + 1]) * (t[k + 1] - t[k]);
    m.before[k] = sum;
    sum += m.optical[k];
  }
  for (int64_t k = 0; k + 1 < count; k += kWide) {
    const auto optical = load<kWide>(&m.optical[k]);
    const auto alpha = one_minus_exp_minus<kWide>(optical);
    store<kWide>(&m.alpha[k], alpha);
    store<kWide>(&m.weight[k], exp_minus_abs<kWide>(load<kWide>(&m.before[k])) * alpha);
  }
}

// Places m sorted samples, distributed like the interval weights (march.importance).
void importance(const Problem& p, const float* t, const float* weight, const float* u, float* cumulative, float* found) {
  const int64_t n = p.coarse, intervals = n - 1;
  cumulative[0] = 0;
  for (int64_t k = 0; k < intervals; ++k) {
    const float here = weight[k], previous = weight[std::max<int64_t>(k - 1, 0)],
                next = weight[std::min(k + 1, intervals - 1)];
    cumulative[k + 1] = cumulative[k] + 0.5f * (std::max(previous, here) + std::max(here, next)) + p.blur_padding;
  }
  int64_t above = 1;
  for (int64_t k = 0; k < p.fine; ++k) {
    const float wanted = (k + u[k]) / p.fine * cumulative[intervals];
    while (above < intervals && cumulative[above] <= wanted) ++above;
    const float low = cumulative[above - 1], high = cumulative[above];
    const float fraction = std::min(std::max((wanted - low) / (high - low), 0.0f), 1.0f);
    found[k] = t[above - 1] + fraction * (t[above] - t[above - 1]);
  }
  for (int64_t k = 1; k < p.fine; ++k)  // rounding can swap neighbors
    for (int64_t j = k; j > 0 && found[j] < found[j - 1]; --j) std::swap(found[j], found[j - 1]);
}

// Evaluates samples of any rays of one scene by tiles, and writes each one's density and features to its slot.
class Evaluator {
 public:
  Evaluator(const Problem& p, const std::vector<Network>& networks) : p(p), networks(networks), tile(p, networks[0], false) {}

  void start(int64_t ray) {
    const int64_t scene = ray / p.rays;
    planes = p.planes + scene * p.scene_size(), network = &networks[p.network(scene)];
  }

  void add(int64_t ray, March& m, int64_t sample) {
    place(p, tile, tile.count, ray, m.t[sample]);
    density[tile.count] = &m.density[sample], features[tile.count] = &m.features[sample * p.channels];
    if (++tile.count == kTile) flush();
  }

  void flush() {
    if (!tile.count) return;
    evaluated += tile.count;
    const Network& n = *network;
    field_forward(p, n, planes, tile);
    float raw_density[kTile] = {};
    for (int64_t i = 0; i < tile.count; ++i) raw_density[i] = tile.raw[i * n.outputs] + p.density_shift;
    for (int64_t i = 0; i < kTile; i += kWide)
      store<kWide>(raw_density + i, softplus<kWide>(load<kWide>(raw_density + i)));
    const float scale = 2 + 4 * p.feature_margin, shift = -2 * p.feature_margin - 1;  // 2(s(1 + 2m) − m) − 1
    for (int64_t k = 0; k < tile.count * n.outputs; k += kOut) {
      const auto x = load<kOut>(&tile.raw[k]);
      store<kOut>(&tile.raw[k], scale * sigmoid_from<kOut>(x, exp_minus_abs<kOut>(x)) + shift);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      *density[i] = raw_density[i];
      std::copy_n(&tile.raw[i * n.outputs + 1], p.channels, features[i]);
    }
    tile.count = 0;
  }

 private:
  const Problem& p;
  const std::vector<Network>& networks;
  Tile tile;
  const float* planes = nullptr;
  const Network* network = nullptr;
  float *density[kTile], *features[kTile];

 public:
  int64_t evaluated = 0;
};

// Merges sorted coarse samples [0, coarse) and the sorted fine ones after them. Of equal ones, the coarse is first.
void merge(const Problem& p, March& m) {
  int64_t a = 0, b = p.coarse;
  for (int64_t k = 0; k < p.samples(); ++k) {
    const bool from_coarse = b == p.samples() || (a < p.coarse && m.t[a] <= m.t[b]);
    const int64_t from = from_coarse ? a++ : b++;
    m.merged_t[k] = m.t[from];
    m.merged_density[k] = m.density[from];
    for (int64_t c = 0; c < p.channels; ++c) m.merged_features[k * p.channels + c] = m.features[from * p.channels + c];
  }
  m.t.swap(m.merged_t), m.density.swap(m.merged_density), m.features.swap(m.merged_features);
}

// Evaluates the stratified samples of a group of rays front to back in slabs. Samples behind opaque ones are skipped
// and stay empty.
void coarse_samples(const Problem& p, int64_t first, std::vector<March>& rays, int64_t count, Evaluator& evaluator) {
  for (int64_t r = 0; r < count; ++r) {
    const float near = p.near[first + r], length = p.far[first + r] - near;
    const float* u = p.u_coarse + (first + r) * p.coarse;
    std::fill(rays[r].t.begin(), rays[r].t.end(), near);
    for (int64_t k = 0; k < p.coarse; ++k) rays[r].t[k] = near + length * ((k + u[k]) / p.coarse);
    rays[r].clear(length > 0);
  }
  for (int64_t from = 0; from < p.coarse; from += kSlab) {
    const int64_t to = std::min(from + kSlab, p.coarse);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = from; k < to && !rays[r].over(p); ++k) evaluator.add(first + r, rays[r], k);
    evaluator.flush();
    for (int64_t r = 0; r < count; ++r) rays[r].pass(p, from, to);
  }
}

void fine_samples(const Problem& p, int64_t first, std::vector<March>& rays, int64_t count, Evaluator& evaluator) {
  for (int64_t r = 0; r < count; ++r) {
    March& m = rays[r];
    if (m.missed()) continue;
    weigh(p.coarse, m.t.data(), m.density.data(), m);
    importance(p, m.t.data(), m.weight.data(), p.u_fine + (first + r) * p.fine, m.before.data(), &m.t[p.coarse]);
    for (int64_t k = p.coarse; k < p.samples() && m.t[k] < m.end; ++k) evaluator.add(first + r, m, k);
  }
  evaluator.flush();
  for (int64_t r = 0; r < count; ++r)
    if (!rays[r].missed()) merge(p, rays[r]);
}

void composite(const Problem& p, March& m, float* features, float* depth, float* opacity) {
  std::fill_n(features, p.channels, 0.0f);
  *depth = *opacity = 0;
  if (m.missed()) return;
  weigh(p.samples(), m.t.data(), m.density.data(), m);
  for (int64_t k = 0; k + 1 < p.samples(); ++k) {
    const float weight = m.weight[k], half = 0.5f * weight;
    *opacity += weight;
    *depth += half * (m.t[k] + m.t[k + 1]);
    const float* here = &m.features[k * p.channels];
    for (int64_t c = 0; c < p.channels; ++c) features[c] += half * (here[c] + here[c + p.channels]);
  }
}

// Upstream gradients of features, depth and opacity per ray. Each may be null.
struct Upstream {
  const float *features, *depth, *opacity;

  // Upper bound of the gradient by weight along the ray.
  float magnitude(const Problem& p, int64_t ray) const {
    float sum = 0;
    if (features)
      for (int64_t c = 0; c < p.channels; ++c) sum += std::fabs(features[ray * p.channels + c]);
    if (depth) sum += std::fabs(depth[ray]) * p.far[ray];
    if (opacity) sum += std::fabs(opacity[ray]);
    return sum;
  }
};

// The samples that forward saved, sorted along each ray.
struct Saved {
  const float *t, *density, *features;
};

// Computes one ray's gradients of raw outputs, (samples x outputs), into m.merged_features.
// With v_k the gradient by weight k: dL/d optical_k = e^-(before + optical) v_k − Σ_{j>k} w_j v_j.
void raw_gradients(const Problem& p, int64_t ray, const Upstream& up, const Saved& saved, March& m, float* d_raw) {
  const int64_t count = p.samples(), outputs = p.outputs();
  const float *t = saved.t + ray * count, *density = saved.density + ray * count;
  const float* features = saved.features + ray * count * p.channels;
  const float* d_features = up.features ? up.features + ray * p.channels : nullptr;
  const float d_depth = up.depth ? up.depth[ray] : 0, d_opacity = up.opacity ? up.opacity[ray] : 0;
  weigh(count, t, density, m);
  float* value = m.merged_t.data();  // half of v at a sample; v_k is the sum over both ends
  for (int64_t i = 0; i < count; ++i) {
    float sum = d_depth * t[i] + d_opacity;
    if (d_features)
      for (int64_t c = 0; c < p.channels; ++c) sum += d_features[c] * features[i * p.channels + c];
    value[i] = 0.5f * sum;
  }
  float behind = 0, d_density_next = 0;
  for (int64_t i = count - 1; i >= 0; --i) {  // interval i starts at sample i, interval i − 1 ends there
    float d_density = d_density_next;
    if (i > 0) {
      const int64_t k = i - 1;
      const float v = value[k] + value[k + 1], through = std::max(1.0f - m.alpha[k], 0.0f);
      const float transmittance = m.alpha[k] > 0 ? m.weight[k] / m.alpha[k] : 0.0f;
      const float d_optical = transmittance * through * v - behind;
      behind += m.weight[k] * v;
      d_density_next = 0.5f * (t[i] - t[k]) * d_optical;
      d_density += d_density_next;
    }
    d_raw[i * outputs] = d_density;
  }
  // Through the activations: the slope of softplus is 1 − e^-y at its value y, that of a sigmoid s (1 − s).
  for (int64_t i = 0; i < count; i += kWide) {
    for (int64_t j = 0; j < kWide; ++j) value[i + j] = i + j < count ? density[i + j] : 0.0f;
    store<kWide>(value + i, one_minus_exp_minus<kWide>(load<kWide>(value + i)));
  }
  const float widen = 1 + 2 * p.feature_margin;
  for (int64_t i = 0; i < count; ++i) {
    d_raw[i * outputs] *= value[i];
    const float weight = 0.5f * ((i > 0 ? m.weight[i - 1] : 0.0f) + (i + 1 < count ? m.weight[i] : 0.0f));
    for (int64_t c = 0; c < p.channels; ++c) {
      const float s = (0.5f * (features[i * p.channels + c] + 1) + p.feature_margin) / widen;
      d_raw[i * outputs + 1 + c] = d_features ? weight * d_features[c] * 2 * widen * s * (1 - s) : 0.0f;
    }
  }
}

// One thread's share of the backward pass: rays [first, last).
struct Share {
  int64_t first, last, evaluated = 0;
  Array planes;  // gradient of the range's first scene, if an earlier thread owns that scene
  std::vector<NetworkGradient> networks;  // of its scenes, beginning with the range's first
};

void backward_share(const Problem& p, const std::vector<Network>& networks, const Upstream& up, const Saved& saved,
                    const std::vector<float>& thresholds, Share& share, float* d_planes, RayGradient d_rays) {
  Tile tile(p, networks[0], true);
  March m(p);
  Array d_raw(p.samples() * p.outputs());
  int64_t scene = -1;
  float* d_scene = nullptr;
  NetworkGradient* gradient = nullptr;
  const int64_t outputs = networks[0].outputs;
  auto flush = [&] {
    share.evaluated += tile.count;
    if (tile.count) field_backward(p, networks[p.network(scene)], p.planes + scene * p.scene_size(), tile, gradient, d_scene, d_rays);
    tile.count = 0;
  };
  for (float* d : {d_rays.origins, d_rays.directions})
    if (d) std::fill(d + 3 * share.first, d + 3 * share.last, 0.0f);
  for (int64_t ray = share.first; ray < share.last; ++ray) {
    if (ray / p.rays != scene) {
      flush();
      scene = ray / p.rays;
      if (!share.networks.empty()) gradient = &share.networks[p.network(scene) - p.network(share.first / p.rays)];
      if (d_planes) {
        const bool shared = ray % p.rays;
        if (shared) share.planes.assign(p.scene_size(), 0.0f);
        d_scene = shared ? share.planes.data() : d_planes + scene * p.scene_size();
        if (!shared) std::fill_n(d_scene, p.scene_size(), 0.0f);
      }
    }
    if (!(p.far[ray] > p.near[ray]) || up.magnitude(p, ray) == 0) continue;
    raw_gradients(p, ray, up, saved, m, d_raw.data());
    for (int64_t i = 0; i < p.samples(); ++i) {
      const float* from = &d_raw[i * p.outputs()];
      float largest = 0;
      for (int64_t o = 0; o < p.outputs(); ++o) largest = std::max(largest, std::fabs(from[o]));
      if (largest <= thresholds[scene]) continue;
      const float t = saved.t[ray * p.samples() + i];
      place(p, tile, tile.count, ray, t);
      tile.ray[tile.count] = ray, tile.t[tile.count] = t;
      std::copy_n(from, p.outputs(), &tile.raw[tile.count * outputs]);
      if (++tile.count == kTile) flush();
    }
  }
  flush();
}

// Adds private gradients of planes and networks in thread order.
void add_shares(const Problem& p, const std::vector<Share>& shares, float* d_planes, float* d_hidden_w, float* d_hidden_b,
                float* d_out_w, float* d_out_b) {
  if (d_planes) {
    const int64_t block = 4096, blocks = (p.scene_size() + block - 1) / block;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      for (const Share& share : shares)
        if (!share.planes.empty()) {
          float* to = d_planes + share.first / p.rays * p.scene_size();
          for (int64_t k = b * block; k < std::min((b + 1) * block, p.scene_size()); ++k) to[k] += share.planes[k];
        }
  }
  if (!d_hidden_w) return;
  const int64_t layer = p.hidden * p.inputs(), hidden = padded(p.hidden, kWide);
  std::fill_n(d_hidden_w, p.networks * layer, 0.0f), std::fill_n(d_hidden_b, p.hidden, 0.0f);
  std::fill_n(d_out_w, p.outputs() * p.hidden, 0.0f), std::fill_n(d_out_b, p.outputs(), 0.0f);
  for (const Share& share : shares) {
    float* to = d_hidden_w + p.network(share.first / p.rays) * layer;
    for (const NetworkGradient& g : share.networks) {
      for (int64_t h = 0; h < p.hidden; ++h) {
        d_hidden_b[h] += g.hidden_b[h];
        for (int64_t f = 0; f < p.inputs(); ++f) to[h * p.inputs() + f] += g.hidden_wt[f * hidden + h];
      }
      for (int64_t o = 0; o < p.outputs(); ++o) {
        d_out_b[o] += g.out_b[o];
        for (int64_t h = 0; h < p.hidden; ++h) d_out_w[o * p.hidden + h] += g.out_w[o * hidden + h];
      }
      to += layer;
    }
  }
}

// Number of samples that the last passes evaluated.
int64_t evaluated_forward = 0, evaluated_backward = 0;

}  // namespace
}  // namespace latentscenes

using namespace latentscenes;

// For measurements: returns how many samples the last forward or backward pass evaluated.
extern "C" int64_t latentscenes_evaluated(int backward) { return backward ? evaluated_backward : evaluated_forward; }

// Writes features, depth and opacity. Unless null, also writes t, density and sample_features for backward.
extern "C" void latentscenes_forward(const Problem* problem, float* features, float* depth, float* opacity, float* t,
                                     float* density, float* sample_features) {
  const Problem& p = *problem;
  const std::vector<Network> all = networks(p);
  const int64_t count = p.samples();
  int64_t evaluated = 0;
#pragma omp parallel num_threads(p.threads)
  {
    Evaluator evaluator(p, all);
    std::vector<March> group(kGroup, March(p));
    const int64_t groups = (p.rays + kGroup - 1) / kGroup;  // of each scene
#pragma omp for schedule(dynamic, 2)
    for (int64_t g = 0; g < p.scenes * groups; ++g) {
      const int64_t first = g / groups * p.rays + g % groups * kGroup;
      const int64_t size = std::min(kGroup, (g / groups + 1) * p.rays - first);
      evaluator.start(first);
      coarse_samples(p, first, group, size, evaluator);
      if (p.fine) fine_samples(p, first, group, size, evaluator);
      for (int64_t r = 0; r < size; ++r) {
        const int64_t ray = first + r;
        March& m = group[r];
        composite(p, m, features + ray * p.channels, depth + ray, opacity + ray);
        if (!t) continue;
        std::copy_n(m.t.data(), count, t + ray * count);
        std::copy_n(m.density.data(), count, density + ray * count);
        std::copy_n(m.features.data(), count * p.channels, sample_features + ray * count * p.channels);
      }
    }
#pragma omp atomic
    evaluated += evaluator.evaluated;
  }
  evaluated_forward = evaluated;
}

// From the gradients of features, depth and opacity (each may be null) and the saved samples, writes d_planes (unless
// null), the gradients of the network (all four or none; hidden weights for each network), and those of rays (both or
// none).
extern "C" void latentscenes_backward(const Problem* problem, const float* up_features, const float* up_depth,
                                      const float* up_opacity, const float* t, const float* density,
                                      const float* sample_features, float* d_planes, float* d_hidden_w, float* d_hidden_b,
                                      float* d_out_w, float* d_out_b, float* d_origins, float* d_directions) {
  const Problem& p = *problem;
  const std::vector<Network> all = networks(p);
  const Upstream up{up_features, up_depth, up_opacity};
  const Saved saved{t, density, sample_features};
  const int64_t rays = p.scenes * p.rays;
  std::vector<float> thresholds(p.scenes);  // each scene's own, so that its gradients do not depend on other scenes
  for (int64_t scene = 0; scene < p.scenes; ++scene) {
    double total = 0;
    for (int64_t ray = scene * p.rays; ray < (scene + 1) * p.rays; ++ray) total += up.magnitude(p, ray);
    thresholds[scene] = static_cast<float>(p.skip * total / p.rays);
  }
  std::vector<Share> shares(p.threads);
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
  for (int64_t thread = 0; thread < p.threads; ++thread) {
    Share& share = shares[thread];
    share.first = rays * thread / p.threads, share.last = rays * (thread + 1) / p.threads;
    if (d_hidden_w && share.first < share.last) {
      const int64_t touched = p.network((share.last - 1) / p.rays) - p.network(share.first / p.rays) + 1;
      share.networks.assign(touched, NetworkGradient(all[0]));
    }
    backward_share(p, all, up, saved, thresholds, share, d_planes, {d_origins, d_directions});
  }
  evaluated_backward = 0;
  for (const Share& share : shares) evaluated_backward += share.evaluated;
  add_shares(p, shares, d_planes, d_hidden_w, d_hidden_b, d_out_w, d_out_b);
}
