// The product of a few rows with a weight, as in generation. A BLAS first copies the weight into another order,
// which costs more than a product of few rows; here it is read once, as it lies.
//
// From two rows on, each output is summed over the inputs one after the other, so it does not depend on how many
// rows there are.
#pragma once

#include <cstring>
#include <utility>

#include "threads.h"

namespace tunesmith {

// A tile has up to kVectors vectors of rows and kSums vectors of sums, which with the operands fill the registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kSums = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2, kSums = 12;
#else
constexpr int kLanes = 4, kVectors = 2, kSums = 12;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(4 * kLanes)));

constexpr int kColumnsOfRow = 4;             // of a tile of a single row
constexpr int64_t kColumns = 48;             // a unit has a multiple of them, and with them only whole tiles
constexpr int64_t kWeightsOfUnit = 1 << 16;  // about
constexpr int64_t kMostColumns = 7 * kColumns;  // of a unit
constexpr int64_t kNumbersAtOnce = 6144;     // of the rows of a tile, so that they stay in the nearest cache

inline Vector loaded(const float* from) { return *reinterpret_cast<const Vector*>(from); }

// The first `count` lanes from memory, the others 0.
inline Vector loaded(const float* from, int64_t count) {
  if (count >= kLanes) return loaded(from);
  Vector lanes = {};
  std::memcpy(&lanes, from, count * sizeof(float));
  return lanes;
}

// Swaps one bit of the number of each vector with the same bit of the number of each lane.
template <int bit, size_t... lane>
void swap_bit(Vector (&square)[kLanes], std::index_sequence<lane...>) {
  constexpr Places low = {((lane & bit) ? kLanes + (lane ^ bit) : lane)...};
  constexpr Places high = {((lane & bit) ? kLanes + lane : lane ^ bit)...};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & bit) == 0) {
      const Vector a = square[i], b = square[i | bit];
      square[i] = __builtin_shuffle(a, b, low);
      square[i | bit] = __builtin_shuffle(a, b, high);
    }
}

template <int bit = kLanes / 2>
void transpose(Vector (&square)[kLanes]) {
  swap_bit<bit>(square, std::make_index_sequence<kLanes>());
  if constexpr (bit > 1) transpose<bit / 2>(square);
}

// Halves are added to each other, always in the same order.
inline float total(const Vector& lanes) {
  float parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(parts));
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  return parts[0];
}

// y (columns) = x (inputs) times the transposed weight (columns, inputs).
template <int columns>
void row_tile(const float* x, const float* weight, float* y, int64_t inputs) {
  Vector sums[columns] = {};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    const Vector a = loaded(x + k);
    for (int column = 0; column < columns; ++column) sums[column] += a * loaded(weight + column * inputs + k);
  }
  if (k < inputs) {
    const Vector a = loaded(x + k, inputs - k);
    for (int column = 0; column < columns; ++column)
      sums[column] += a * loaded(weight + column * inputs + k, inputs - k);
  }
  for (int column = 0; column < columns; ++column) y[column] = total(sums[column]);
}

// sums (columns, vectors) of `turned`, which is x as `turn` writes it, and the weight (columns, inputs), over `depth`
// of the inputs; onto what `sums` holds unless these are the first.
template <int vectors, int columns>
void wide_tile(const float* turned, const float* weight, Vector (*sums)[vectors], int64_t depth, int64_t inputs,
               bool first) {
  Vector own[columns][vectors] = {};
  if (!first) std::memcpy(own, sums, sizeof(own));
  for (int64_t k = 0; k < depth; ++k) {
    Vector a[vectors];
    for (int v = 0; v < vectors; ++v) a[v] = loaded(turned + (k * vectors + v) * kLanes);
    for (int column = 0; column < columns; ++column)
      for (int v = 0; v < vectors; ++v) own[column][v] += a[v] * weight[column * inputs + k];
  }
  std::memcpy(sums, own, sizeof(own));
}

// y (rows, columns) = sums (columns, vectors) transposed.
template <int vectors>
void written(const Vector (*sums)[vectors], float* y, int64_t columns, int64_t rows, int64_t outputs) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, columns - column);
    for (int64_t v = 0; v * kLanes < rows; ++v) {
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < width; ++i) square[i] = sums[column + i][v];
      transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - v * kLanes); ++i)
        std::memcpy(y + (v * kLanes + i) * outputs + column, &square[i], width * sizeof(float));
    }
  }
}

// The columns [begin, end) of y.
inline void single(const float* x, const float* weight, float* y, int64_t begin, int64_t end, int64_t inputs) {
  int64_t column = begin;
  for (; column + kColumnsOfRow <= end; column += kColumnsOfRow)
    row_tile<kColumnsOfRow>(x, weight + column * inputs, y + column, inputs);
  for (; column < end; ++column) row_tile<1>(x, weight + column * inputs, y + column, inputs);
}
template <int vectors>
void wide(const float* turned, const float* weight, float* y, int64_t begin, int64_t end, int64_t rows,
          int64_t inputs, int64_t outputs) {
  constexpr int columns = kSums / vectors;
  constexpr int64_t most = kNumbersAtOnce / (vectors * kLanes);
  const int64_t blocks = std::max<int64_t>(1, (inputs + most - 1) / most);
  const int64_t depth = std::max<int64_t>(1, (inputs + blocks - 1) / blocks);
  Vector sums[kMostColumns][vectors];
  for (int64_t k = 0; k == 0 || k < inputs; k += depth) {
    const int64_t deep = std::min(depth, inputs - k);
    const float *from = turned + k * vectors * kLanes, *w = weight + k;
    int64_t column = begin;
    for (; column + columns <= end; column += columns)
      wide_tile<vectors, columns>(from, w + column * inputs, sums + (column - begin), deep, inputs, k == 0);
    for (; column < end; ++column)
      wide_tile<vectors, 1>(from, w + column * inputs, sums + (column - begin), deep, inputs, k == 0);
  }
  written(sums, y + begin, end - begin, rows, outputs);
}

// turned (inputs, vectors, kLanes) = x (rows, inputs) transposed, with zeros for the rows that fill the last vector.
inline void turn(const float* x, float* turned, int64_t rows, int64_t inputs) {
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < inputs; k += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, inputs - k), first = v * kLanes;
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - first); ++i)
        square[i] = loaded(x + (first + i) * inputs + k, width);
      transpose(square);
      for (int64_t i = 0; i < width; ++i)
        std::memcpy(turned + ((k + i) * vectors + v) * kLanes, &square[i], sizeof(Vector));
    }
}

// Rows of numbers that `linear` needs to turn `rows` rows.
inline int64_t turned_rows(int64_t rows) { return rows > 1 ? (rows + kLanes - 1) / kLanes * kLanes : 0; }

// y (rows, outputs) = x (rows, inputs) times the transposed weight (outputs, inputs). `turned`: memory of
// (turned_rows(rows), inputs).
inline void linear(const float* x, float* turned, const float* weight, float* y, int64_t rows, int64_t inputs,
                   int64_t outputs) {
  constexpr int64_t group = kVectors * kLanes;
  if (rows > 1)
    in_parts(rows, group, [=](int64_t row, int64_t end) {
      turn(x + row * inputs, turned + row * inputs, end - row, inputs);
    });
  const int64_t part = kWeightsOfUnit / std::max<int64_t>(1, inputs) / kColumns * kColumns;
  in_parts(outputs, std::clamp(part, kColumns, kMostColumns), [=](int64_t begin, int64_t end) {
    if (rows == 1) return single(x, weight, y, begin, end, inputs);
    for (int64_t row = 0; row < rows; row += group) {
      const int64_t count = std::min(group, rows - row);
      const float* from = turned + row * inputs;
      float* to = y + row * outputs;
      switch ((count + kLanes - 1) / kLanes) {
        case 1: wide<1>(from, weight, to, begin, end, count, inputs, outputs); break;
        default: wide<kVectors>(from, weight, to, begin, end, count, inputs, outputs);
      }
    }
  });
}

}  // namespace tunesmith
