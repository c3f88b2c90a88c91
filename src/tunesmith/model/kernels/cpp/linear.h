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

constexpr int64_t kTermsOfUnit = 65536;  // products of numbers: about 10 microseconds

// y (kRows, kColumns) = x (kRows, inputs) times the transposed weight (kColumns, inputs).
template <int kRows, int kColumns>
void tile(const float* x, const float* weight, float* y, int64_t inputs, int64_t outputs) {
  Vector sums[kRows][kColumns] = {};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    Vector a[kRows];
    for (int row = 0; row < kRows; ++row) a[row] = *reinterpret_cast<const Vector*>(x + row * inputs + k);
    for (int column = 0; column < kColumns; ++column) {
      const Vector b = *reinterpret_cast<const Vector*>(weight + column * inputs + k);
      for (int row = 0; row < kRows; ++row) sums[row][column] += a[row] * b;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[row][column][lane];
      for (int64_t rest = k; rest < inputs; ++rest)
        total += x[row * inputs + rest] * weight[column * inputs + rest];
      y[row * outputs + column] = total;
    }
  }
}

template <int kColumns>
void columns(const float* x, const float* weight, float* y, int64_t rows, int64_t inputs, int64_t outputs) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    tile<4, kColumns>(x + row * inputs, weight, y + row * outputs, inputs, outputs);
  for (; row < rows; ++row) tile<1, kColumns>(x + row * inputs, weight, y + row * outputs, inputs, outputs);
}

// y (rows, outputs) = x (rows, inputs) times the transposed weight (outputs, inputs).
inline void linear(
    const float* x, const float* weight, float* y, int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t part = kTermsOfUnit / std::max<int64_t>(1, rows * inputs) / kOutputs * kOutputs;
  in_parts(outputs, std::max<int64_t>(kOutputs, part), [=](int64_t begin, int64_t end) {
    int64_t column = begin;
    for (; column + kOutputs <= end; column += kOutputs)
      columns<kOutputs>(x, weight + column * inputs, y + column, rows, inputs, outputs);
    for (; column < end; ++column) columns<1>(x, weight + column * inputs, y + column, rows, inputs, outputs);
  });
}

}  // namespace tunesmith
