// `fuse_in_torch` of planes.py and `total_variation_in_torch` of losses.py with their gradients, and `adam_in_torch` of
// optim.py, in few passes over memory. The order of every sum depends only on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace latentscenes {
namespace {

constexpr int64_t kTexels = 64;  // texels handled together; their macro features of all scenes stay in cache

// to_s += Σ_q w_s^q base_q over `size` features of kCount base planes, which lie `stride` apart. kCount is a few, so that
// sums are seldom stored and each plane is read as one stream.
template <int kCount>
void add_bases(int64_t scenes, int64_t size, const float* weights, ptrdiff_t weights_row, const float* bases, ptrdiff_t stride, float* to) {
  const int64_t whole = size / kWide * kWide;
  for (int64_t j = 0; j < whole; j += kWide) {
    Vec<kWide> base[kCount];
    for (int q = 0; q < kCount; ++q) base[q] = load<kWide>(bases + q * stride + j);
    for (int64_t s = 0; s < scenes; ++s) {
      auto sum = load<kWide>(to + s * size + j);
      for (int q = 0; q < kCount; ++q) sum += weights[s * weights_row + q] * base[q];
      store<kWide>(to + s * size + j, sum);
    }
  }
  for (int64_t s = 0; s < scenes; ++s)
    for (int64_t j = whole; j < size; ++j)
      for (int q = 0; q < kCount; ++q) to[s * size + j] += weights[s * weights_row + q] * bases[q * stride + j];
}

// d_base = Σ_s w_s d_s over `size` features of one base plane.
void combine(int64_t scenes, int64_t size, const float* weights, ptrdiff_t weights_row, const float* d_macro, float* d_base) {
  const int64_t whole = size / kWide * kWide;
  for (int64_t j = 0; j < whole; j += kWide) {
    Vec<kWide> sum{};
    for (int64_t s = 0; s < scenes; ++s) sum += weights[s * weights_row] * load<kWide>(d_macro + s * size + j);
    store<kWide>(d_base + j, sum);
  }
  for (int64_t j = whole; j < size; ++j) {
    float sum = 0;
    for (int64_t s = 0; s < scenes; ++s) sum += weights[s * weights_row] * d_macro[s * size + j];
    d_base[j] = sum;
  }
}

// to[i · to_row] += Σ_j a(i, j) b(j) for `rows` rows of a.
void add_dots(int64_t rows, int64_t size, const float* a, const float* b, float* to, ptrdiff_t to_row) {
  for (int64_t i = 0; i < rows; i += 4) {
    Vec<kWide> sums[4] = {};
    const float* row[4];
    for (int64_t r = 0; r < 4; ++r) row[r] = a + std::min(i + r, rows - 1) * size;
    int64_t j = 0;
    for (; j + kWide <= size; j += kWide) {
      const auto right = load<kWide>(b + j);
      for (int r = 0; r < 4; ++r) sums[r] += load<kWide>(row[r] + j) * right;
    }
    for (int64_t r = 0; r < 4 && i + r < rows; ++r) {
      float sum = 0;
      for (int lane = 0; lane < kWide; ++lane) sum += sums[r][lane];
      for (int64_t k = j; k < size; ++k) sum += row[r][k] * b[k];
      to[(i + r) * to_row] += sum;
    }
  }
}

// Σ (a − b)², in sixteen parallel sums.
float squared_distance(const float* a, const float* b, int64_t count) {
  float sums[16] = {}, sum = 0;
  int64_t j = 0;
  for (; j + 16 <= count; j += 16)
    for (int lane = 0; lane < 16; ++lane) sums[lane] += (a[j + lane] - b[j + lane]) * (a[j + lane] - b[j + lane]);
  for (; j < count; ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
  for (float lane : sums) sum += lane;
  return sum;
}

}  // namespace

// Sizes: `texels` texels per scene, with `micro` features of its own and `macro` features from `bases` base planes.
// Features are concatenated (width micro + macro) or added (`sum`; then micro == macro).
struct Fusion {
  int64_t scenes, texels, micro, macro, bases, sum, threads;

  int64_t width() const { return sum ? macro : micro + macro; }
  int64_t macro_at() const { return sum ? 0 : micro; }
  int64_t blocks() const { return (texels + kTexels - 1) / kTexels; }
};

}  // namespace latentscenes

using namespace latentscenes;

// Writes planes (s, x, width) from micro (s, x, m), weights (s, k) and bases (k, x, g); bias (s) may be null.
extern "C" void latentscenes_compose(const Fusion* fusion, const float* micro, const float* weights, const float* bias,
                                     const float* bases, float* planes) {
  const Fusion& f = *fusion;
#pragma omp parallel num_threads(f.threads)
  {
    Array macro(f.scenes * kTexels * f.macro);
    const int64_t stride = f.texels * f.macro;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < f.blocks(); ++block) {
      const int64_t first = block * kTexels, count = std::min(kTexels, f.texels - first), size = count * f.macro;
      for (int64_t s = 0; s < f.scenes; ++s) std::fill_n(&macro[s * size], size, bias ? bias[s] : 0.0f);
      const float* run = bases + first * f.macro;
      int64_t k = 0;
      for (; k + 4 <= f.bases; k += 4) add_bases<4>(f.scenes, size, weights + k, f.bases, run + k * stride, stride, macro.data());
      for (; k < f.bases; ++k) add_bases<1>(f.scenes, size, weights + k, f.bases, run + k * stride, stride, macro.data());
      for (int64_t s = 0; s < f.scenes; ++s)
        for (int64_t x = 0; x < count; ++x) {
          const int64_t texel = s * f.texels + first + x;
          const float *own = micro + texel * f.micro, *shared = &macro[s * size + x * f.macro];
          float* to = planes + texel * f.width();
          std::copy_n(shared, f.macro, to + f.macro_at());
          if (f.sum)
            for (int64_t j = 0; j < f.micro; ++j) to[j] += own[j];
          else
            std::copy_n(own, f.micro, to);
        }
    }
  }
}

// From the gradient of planes, writes those of micro, weights, bias and bases. Each may be null.
extern "C" void latentscenes_compose_backward(const Fusion* fusion, const float* weights, const float* bases,
                                              const float* d_planes, float* d_micro, float* d_weights, float* d_bias,
                                              float* d_bases) {
  const Fusion& f = *fusion;
  std::vector<Array> shares(f.threads);  // each thread's sums of weights' and biases' gradients
#pragma omp parallel for num_threads(f.threads) schedule(static, 1)
  for (int64_t thread = 0; thread < f.threads; ++thread) {
    Array& share = shares[thread];
    share.resize(f.scenes * (f.bases + 1));
    Array macro(f.scenes * kTexels * f.macro);
    for (int64_t block = f.blocks() * thread / f.threads; block < f.blocks() * (thread + 1) / f.threads; ++block) {
      const int64_t first = block * kTexels, count = std::min(kTexels, f.texels - first), size = count * f.macro;
      for (int64_t s = 0; s < f.scenes; ++s)
        for (int64_t x = 0; x < count; ++x) {
          const int64_t texel = s * f.texels + first + x;
          const float* from = d_planes + texel * f.width();
          if (d_micro) std::copy_n(from, f.micro, d_micro + texel * f.micro);
          std::copy_n(from + f.macro_at(), f.macro, &macro[s * size + x * f.macro]);
        }
      const int64_t at = first * f.macro, stride = f.texels * f.macro;
      for (int64_t k = 0; k < f.bases; ++k) {
        if (d_weights) add_dots(f.scenes, size, macro.data(), bases + at + k * stride, &share[k], f.bases + 1);
        if (d_bases) combine(f.scenes, size, weights + k, f.bases, macro.data(), d_bases + at + k * stride);
      }
      for (int64_t s = 0; s < f.scenes && d_bias; ++s)
        for (int64_t j = 0; j < size; ++j) share[s * (f.bases + 1) + f.bases] += macro[s * size + j];
    }
  }
  for (int64_t s = 0; s < f.scenes; ++s) {
    if (d_bias) d_bias[s] = 0;
    if (d_weights) std::fill_n(d_weights + s * f.bases, f.bases, 0.0f);
    for (const Array& share : shares) {
      const float* from = &share[s * (f.bases + 1)];
      if (d_bias) d_bias[s] += from[f.bases];
      for (int64_t k = 0; k < f.bases && d_weights; ++k) d_weights[s * f.bases + k] += from[k];
    }
  }
}

// Writes the mean squared difference of neighboring texels of planes (r x r x f), rows plus columns, and its gradient.
extern "C" void latentscenes_total_variation(int64_t planes, int64_t r, int64_t f, int64_t threads, const float* texels,
                                             float* value, float* gradient) {
  const int64_t row = r * f;
  const float scale = 2.0f / static_cast<float>(planes * (r - 1) * row);
  std::vector<double> sums(planes * r);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t line = 0; line < planes * r; ++line) {
    const int64_t y = line % r;
    const float* here = texels + line * row;
    float* __restrict to = gradient + line * row;
    const float *above = y > 0 ? here - row : here, *below = y + 1 < r ? here + row : here;
    const int64_t last = row - f;
    for (int64_t j = 0; j < f; ++j) to[j] = scale * (3 * here[j] - above[j] - below[j] - here[j + f]);
    for (int64_t j = f; j < last; ++j) to[j] = scale * (4 * here[j] - above[j] - below[j] - here[j - f] - here[j + f]);
    for (int64_t j = last; j < row; ++j) to[j] = scale * (3 * here[j] - above[j] - below[j] - here[j - f]);
    sums[line] = squared_distance(here, below, row) + squared_distance(here + f, here, row - f);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  *value = static_cast<float>(0.5 * scale * total);
}

// One step of Adam for `count` rows of a table (`size` numbers each) at `index`. `rates` and `corrections` are each row's
// rate / (1 − β₁^t) and 1 / √(1 − β₂^t). Gradients lie row after row.
extern "C" void latentscenes_adam(int64_t count, int64_t size, int64_t threads, double beta1, double beta2, float epsilon,
                                  const int64_t* index, const float* rates, const float* corrections, const float* gradients,
                                  float* table, float* first, float* second) {
  const int64_t block = 4096, blocks = (size + block - 1) / block;
  const float keep1 = beta1, new1 = 1 - beta1, keep2 = beta2, new2 = 1 - beta2;  // in double: 1 − 0.999f is off by 1e-5
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < count * blocks; ++b) {
    const int64_t row = b / blocks, from = b % blocks * block, length = std::min(block, size - from);
    const int64_t at = index[row] * size + from;
    const float rate = rates[row], correction = corrections[row];
    const float* __restrict gradient = gradients + row * size + from;
    float *__restrict value = table + at, *__restrict m = first + at, *__restrict v = second + at;
    for (int64_t j = 0; j < length; ++j) {
      const float g = gradient[j];
      m[j] = keep1 * m[j] + new1 * g;
      v[j] = keep2 * v[j] + new2 * g * g;
      value[j] -= rate * m[j] / (std::sqrt(v[j]) * correction + epsilon);
    }
  }
}
