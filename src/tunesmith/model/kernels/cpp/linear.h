// The product of a few rows with a weight, as in generation. A BLAS first copies the weight into another order,
// which costs more than a product of few rows; here it is read once, as it lies.
#pragma once

#include "threads.h"

namespace tunesmith {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kOutputs = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kOutputs = 2;
#else
constexpr int kLanes = 4, kOutputs = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int kRows = 4;                 // of a tile at most, which with kOutputs fills the registers
constexpr int64_t kTermsOfRow = 65536;   // products of numbers in a unit, for each of up to four rows

// Halves are added to each other, always in the same order.
inline float total(const Vector& lanes) {
  float parts[kLanes];
  __builtin_memcpy(parts, &lanes, sizeof(parts));
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  return parts[0];
}

// The first `count` lanes from memory, the others 0.
inline Vector loaded(const float* from, int64_t count) {
  Vector lanes = {};
  __builtin_memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// y (rows, columns) = x (rows, inputs) times the transposed weight (columns, inputs).
template <int rows, int columns>
void tile(const float* x, const float* weight, float* y, int64_t inputs, int64_t outputs) {
  Vector sums[rows][columns] = {};
  const auto add = [&](const auto& load, int64_t k) {
    Vector a[rows];
    for (int row = 0; row < rows; ++row) a[row] = load(x + row * inputs + k);
    for (int column = 0; column < columns; ++column) {
      const Vector b = load(weight + column * inputs + k);
      for (int row = 0; row < rows; ++row) sums[row][column] += a[row] * b;
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes)
    add([](const float* from) { return *reinterpret_cast<const Vector*>(from); }, k);
  if (k < inputs) add([rest = inputs - k](const float* from) { return loaded(from, rest); }, k);
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) y[row * outputs + column] = total(sums[row][column]);
}

// The columns [begin, end) of y for one group of rows, which stays in the nearest cache.
template <int rows>
void columns(
    const float* x, const float* weight, float* y, int64_t begin, int64_t end, int64_t inputs, int64_t outputs) {
  int64_t column = begin;
  for (; column + kOutputs <= end; column += kOutputs)
    tile<rows, kOutputs>(x, weight + column * inputs, y + column, inputs, outputs);
  for (; column < end; ++column) tile<rows, 1>(x, weight + column * inputs, y + column, inputs, outputs);
}

// y (rows, outputs) = x (rows, inputs) times the transposed weight (outputs, inputs). Each sum is made in the
// same order whatever the other rows are.
inline void linear(
    const float* x, const float* weight, float* y, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t terms = std::max<int64_t>(1, rows * inputs);
  const int64_t part = kTermsOfRow * std::min<int64_t>(rows, kRows) / terms / kOutputs * kOutputs;
  in_parts(outputs, std::max<int64_t>(kOutputs, part), [=](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kRows) {
      const float* from = x + row * inputs;
      float* to = y + row * outputs;
      switch (std::min<int64_t>(kRows, rows - row)) {
        case 1: columns<1>(from, weight, to, begin, end, inputs, outputs); break;
        case 2: columns<2>(from, weight, to, begin, end, inputs, outputs); break;
        case 3: columns<3>(from, weight, to, begin, end, inputs, outputs); break;
        default: columns<4>(from, weight, to, begin, end, inputs, outputs);
      }
    }
  });
}

}  // namespace tunesmith
