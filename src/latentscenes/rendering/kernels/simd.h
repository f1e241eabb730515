// Vectors of N floats, the functions of a tiny network, and a register-blocked matrix product.
//
// The vector extensions of GCC and Clang compile for any CPU. Polynomials are near-minimax fits with a relative error
// below 2e-7; the functions' relative error is below 1e-6.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

namespace latentscenes {

// Floats per register, and the block of the result (rows x columns of registers) that a product keeps in registers.
#if defined(__AVX512F__)
constexpr int kWide = 16, kRows = 6, kColumns = 4;
#elif defined(__AVX__)
constexpr int kWide = 8, kRows = 6, kColumns = 2;
#elif defined(__aarch64__)
constexpr int kWide = 4, kRows = 6, kColumns = 4;
#else
constexpr int kWide = 4, kRows = 6, kColumns = 2;
#endif

template <int N>
struct Vectors {
  typedef float Floats __attribute__((vector_size(N * 4)));
  typedef int32_t Ints __attribute__((vector_size(N * 4)));
};
template <int N>
using Vec = typename Vectors<N>::Floats;

// Arrays aligned to cache lines, so that rows of whole registers are aligned too.
template <class T>
struct CacheLines {
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t(64)); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }
};
using Array = std::vector<float, CacheLines<float>>;

constexpr int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <int N>
inline Vec<N> load(const float* from) {
  Vec<N> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <int N>
inline void store(float* to, Vec<N> value) {
  std::memcpy(to, &value, sizeof value);
}

// e^x for x in [-87, 87]: 2^n · 2^r with n = round(x / ln 2); adding 1.5·2^23 leaves n in the lowest bits.
template <int N>
inline Vec<N> exp_of(Vec<N> x) {
  using Ints = typename Vectors<N>::Ints;
  const float shift = 12582912.0f;
  const Vec<N> shifted = x * 1.44269504f + shift;
  const Vec<N> r = x * 1.44269504f - (shifted - shift);
  Vec<N> y = 0.00132764666f * r + 0.00967554096f;
  y = y * r + 0.0555071346f;
  y = y * r + 0.240221202f;
  y = y * r + 0.693146944f;
  y = y * r + 1.0f;
  return (Vec<N>)((Ints)y + ((Ints)shifted << 23));
}

// e^-|x|, at least e^-87 so that exp_of stays in range.
template <int N>
inline Vec<N> exp_minus_abs(Vec<N> x) {
  Vec<N> minus = x < 0.0f ? x : -x;
  minus = minus > -87.0f ? minus : Vec<N>{} - 87.0f;
  return exp_of<N>(minus);
}

// log(1 + e^x) from x and e = e^-|x|: max(x, 0) + log(1 + e).
template <int N>
inline Vec<N> softplus_from(Vec<N> x, Vec<N> e) {
  Vec<N> y = -0.00853909645f * e + 0.0440892391f;
  y = y * e - 0.10768117f;
  y = y * e + 0.177452043f;
  y = y * e - 0.244954497f;
  y = y * e + 0.332754761f;
  y = y * e - 0.499974042f;
  y = y * e + 0.999999821f;
  return y * e + (x > 0.0f ? x : Vec<N>{});
}

// 1 / (1 + e^-x) from x and e = e^-|x|; also the derivative of softplus.
template <int N>
inline Vec<N> sigmoid_from(Vec<N> x, Vec<N> e) {
  return (x < 0.0f ? e : Vec<N>{} + 1.0f) / (e + 1.0f);
}

template <int N>
inline Vec<N> softplus(Vec<N> x) {
  return softplus_from<N>(x, exp_minus_abs<N>(x));
}

// 1 − e^-x for x ≥ 0, accurate for small x too.
template <int N>
inline Vec<N> one_minus_exp_minus(Vec<N> x) {
  Vec<N> small = -0.00112163462f * x + 0.00818738528f;
  small = small * x - 0.0416290872f;
  small = small * x + 0.166662246f;
  small = small * x - 0.499999821f;
  small = (small * x + 1.0f) * x;
  return x < 0.5f ? small : 1.0f - exp_minus_abs<N>(x);
}

// A matrix with element (i, k) at data[i · row + k · column].
struct Strided {
  const float* data;
  ptrdiff_t row, column;
};

// Computes R rows and C registers of initial + a·b and passes each register to finish(row, column, register).
template <int N, int R, int C, class Finish>
inline __attribute__((always_inline)) void product_block(int64_t inner, const float* a, ptrdiff_t a_row, ptrdiff_t a_column,
                                                         const float* b, ptrdiff_t b_row, const float* initial,
                                                         ptrdiff_t initial_row, int64_t row, int64_t column, Finish finish) {
  Vec<N> sum[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) sum[i][j] = initial ? load<N>(initial + i * initial_row + j * N) : Vec<N>{};
  for (int64_t k = 0; k < inner; ++k) {
    Vec<N> right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = load<N>(b + k * b_row + j * N);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const float left = a[i * a_row + k * a_column];
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) finish(row + i, column + j * N, sum[i][j]);
}

template <int N, int C, class Finish>
inline void product_columns(int64_t rows, int64_t inner, Strided a, const float* b, ptrdiff_t b_row, const float* initial,
                            ptrdiff_t initial_row, int64_t column, Finish finish) {
  int64_t row = 0;
  auto step = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; row + R <= rows; row += R)
      product_block<N, R, C>(inner, a.data + row * a.row, a.row, a.column, b + column, b_row,
                             initial ? initial + row * initial_row + column : nullptr, initial_row, row, column, finish);
  };
  step(std::integral_constant<int, kRows>());
  step(std::integral_constant<int, 3>());
  step(std::integral_constant<int, 1>());
}

// Computes initial + a·b for a (rows x inner) and b (inner x columns, rows `b_row` apart); `columns` is a multiple of N.
// `initial` may be null (zero) or have row stride 0 (a bias). finish(row, column, value) gets each register of the
// result once, so activations need no second pass over memory.
template <int N, class Finish>
inline void product(int64_t rows, int64_t columns, int64_t inner, Strided a, const float* b, ptrdiff_t b_row,
                    const float* initial, ptrdiff_t initial_row, Finish finish) {
  int64_t column = 0;
  for (; column + kColumns * N <= columns; column += kColumns * N)
    product_columns<N, kColumns>(rows, inner, a, b, b_row, initial, initial_row, column, finish);
  if (kColumns > 2 && column + 2 * N <= columns) {
    product_columns<N, 2>(rows, inner, a, b, b_row, initial, initial_row, column, finish);
    column += 2 * N;
  }
  if (column + N <= columns) product_columns<N, 1>(rows, inner, a, b, b_row, initial, initial_row, column, finish);
}

}  // namespace latentscenes
