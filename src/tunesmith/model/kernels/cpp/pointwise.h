// e^x, and what consists of it: SwiGLU, GELU, cross-entropy; RMSNorm; rotary embeddings. All float32.
//
// Loops are written so that the compiler makes vectors of them (-O3 -fopenmp-simd). Long sums are made of
// partial sums in float32, which are added in float64.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "threads.h"

namespace tunesmith {

constexpr int64_t kPart = 16384;  // elements of one unit: 64 KiB, which stays in the cache of a core
constexpr int64_t kSum = 1024;    // elements that are added up in float32

// a b + c in one instruction, or in two on a CPU that has no such instruction: there std::fma is a function.
inline float multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x, relative error under 2e-7; NaN stays NaN; about 1e-38 instead of less; infinity above 88.3.
inline float exponential(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 12582912.0f;    // 1.5 * 2^23: adding it leaves the rounded value in the low bits
  float y = x * kLog2e;
  y = y < -126.0f ? -126.0f : y;
  y = y > 128.0f ? 128.0f : y;
  const float shifted = y + kRound;
  const float whole = shifted - kRound;
  // Without the rounding error of the product, which would be |x| * 6e-8 of the result.
#if defined(__FP_FAST_FMAF)
  constexpr float kRest = 1.92596299e-8f;  // log2(e) - kLog2e
  float f = multiply_add(x, kRest, multiply_add(x, kLog2e, -whole));
#else
  constexpr float kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;  // `whole` times the first is exact
  float f = ((x - whole * kLn2) - whole * kLn2Rest) * kLog2e;
#endif
  f = f < -0.51f ? -0.51f : f;  // x beyond the range of y
  f = f > 0.51f ? 0.51f : f;
  // 2^f on [-1/2, 1/2], relative error 1.9e-9 in exact arithmetic (Remez).
  float power = 0.0001534581202f;
  power = multiply_add(power, f, 0.001339993122f);
  power = multiply_add(power, f, 0.009618488957f);
  power = multiply_add(power, f, 0.05550328777f);
  power = multiply_add(power, f, 0.2402264689f);
  power = multiply_add(power, f, 0.6931472057f);
  power = multiply_add(power, f, 1.0f);
  const uint32_t scale = (std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23);
  return power * std::bit_cast<float>(scale);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// sigmoid(x), and 1 - sigmoid(x) without the digits that the difference would lose where x is large.
struct Shares {
  float of, rest;
};

inline Shares sigmoids(float x) {
  const float e = exponential(-x);
  const float of = 1.0f / (1.0f + e);
  return {of, e < 1.0f ? e * of : 1.0f - of};
}

// Rows of a softmax ------------------------------------------

inline float highest(const float* x, int64_t size) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < size; ++i) most = most < x[i] ? x[i] : most;
  return most;
}

// y = e^(x - shift), and its sum. y may be x.
inline double exponentials(const float* x, float* y, int64_t size, float shift) {
  double total = 0;
  for (int64_t start = 0; start < size; start += kSum) {
    const int64_t end = std::min(size, start + kSum);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) {
      const float weight = exponential(x[i] - shift);
      y[i] = weight;
      part += weight;
    }
    total += part;
  }
  return total;
}

inline double sum_of_exponentials(const float* x, int64_t size, float shift) {
  double total = 0;
  for (int64_t start = 0; start < size; start += kSum) {
    const int64_t end = std::min(size, start + kSum);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) part += exponential(x[i] - shift);
    total += part;
  }
  return total;
}

inline bool any_nan(const float* x, int64_t size) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) count += x[i] != x[i];
  return count > 0;
}

// log of the sum of e^x over each row (float64: it is the difference of two numbers of its size that counts).
inline double log_sum(const float* row, int64_t width) {
  const float most = highest(row, width);
  if (!std::isfinite(most)) return any_nan(row, width) ? std::numeric_limits<double>::quiet_NaN() : most;
  return most + std::log(sum_of_exponentials(row, width, most));
}

inline void log_sums(const float* logits, float* out, int64_t rows, int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    out[row] = static_cast<float>(log_sum(logits + row * width, width));
  });
}

// y = factor * softmax(x)
inline void softmax(const float* x, float* y, int64_t width, float factor) {
  const double total = exponentials(x, y, width, highest(x, width));
  const float share = static_cast<float>(factor / total);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) y[i] *= share;
}

inline void log_sums_gradient(const float* logits, const float* cotangents, float* out, int64_t rows, int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    softmax(logits + row * width, out + row * width, width, cotangents[row]);
  });
}

// Cross-entropy: log p of each row's target -----------------------------------------------------------------

inline void logprobs(
    const float* logits, const int32_t* targets, float* logps, int64_t rows, int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    const float* x = logits + row * width;
    const double normaliser = log_sum(x, width);
    logps[row] = targets[row] >= 0 && targets[row] < width ? static_cast<float>(x[targets[row]] - normaliser)
                                                           : std::numeric_limits<float>::quiet_NaN();
  });
}

// cotangent * (one-hot - softmax)
inline void logprobs_gradient(
    const float* logits, const int32_t* targets, const float* cotangents, float* out, int64_t rows,
    int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    float* y = out + row * width;
    softmax(logits + row * width, y, width, -cotangents[row]);
    if (targets[row] >= 0 && targets[row] < width) y[targets[row]] += cotangents[row];
  });
}

// Divergence: KL(base‖model) of each row, in nats ------------------------------------------------------------

inline void divergences(const float* base, const float* logits, float* out, int64_t rows, int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    const float *b = base + row * width, *x = logits + row * width;
    const float most = highest(b, width);
    double total = 0, across = 0;
    for (int64_t start = 0; start < width; start += kSum) {
      const int64_t end = std::min(width, start + kSum);
      float weights = 0, part = 0;
#pragma omp simd reduction(+ : weights, part)
      for (int64_t i = start; i < end; ++i) {
        const float weight = exponential(b[i] - most);
        weights += weight;
        part += weight * (b[i] - x[i]);
      }
      total += weights;
      across += part;
    }
    out[row] = static_cast<float>(across / total - log_sum(b, width) + log_sum(x, width));
  });
}

// Of the model: cotangent * (softmax - softmax of the base), 0 where they are equal.
inline void divergences_gradient(
    const float* base, const float* logits, const float* cotangents, float* out, int64_t rows, int64_t width) {
  in_parts(rows, 1, [=](int64_t row, int64_t) {
    const float *b = base + row * width, *x = logits + row * width;
    float* y = out + row * width;
    const float most_b = highest(b, width), most_x = highest(x, width);
    const double total_b = sum_of_exponentials(b, width, most_b), total_x = sum_of_exponentials(x, width, most_x);
    // One product of two rounded numbers less another would leave the rounding of one of them.
    const float share = static_cast<float>(cotangents[row] / total_x), ratio = static_cast<float>(total_x / total_b);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      y[i] = share * (exponential(x[i] - most_x) - ratio * exponential(b[i] - most_b));
  });
}

// SwiGLU and GELU --------------------------------------------

inline void swiglu(const float* gate, const float* up, float* out, int64_t size) {
  in_parts(size, kPart, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  });
}

inline void swiglu_gradient(
    const float* gate, const float* up, const float* cotangent, float* of_gate, float* of_up, int64_t size) {
  in_parts(size, kPart, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const Shares share = sigmoids(gate[i]);
      const float silu = gate[i] * share.of;
      of_gate[i] = cotangent[i] * up[i] * (share.of + silu * share.rest);
      of_up[i] = cotangent[i] * silu;
    }
  });
}

// GELU by its tanh approximation (arXiv 1606.08415), of the gate: x/2 (1 + tanh z) = x sigmoid(2z).
constexpr float kGelu = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

inline void gelu(const float* x, float* out, int64_t size) {
  in_parts(size, kPart, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      out[i] = x[i] * sigmoid(kGelu * (x[i] + kCubic * x[i] * x[i] * x[i]));
  });
}

inline void gelu_gradient(const float* x, const float* cotangent, float* out, int64_t size) {
  in_parts(size, kPart, [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float square = x[i] * x[i];
      const Shares share = sigmoids(kGelu * x[i] * (1.0f + kCubic * square));
      const float slope = kGelu * (1.0f + 3.0f * kCubic * square);
      out[i] = cotangent[i] * share.of * (1.0f + x[i] * slope * share.rest);
    }
  });
}

// RMSNorm (arXiv 1910.07467) ---------------------------------

template <typename Term>
double row_sum(int64_t width, const Term& term) {
  double total = 0;
  for (int64_t start = 0; start < width; start += kSum) {
    const int64_t end = std::min(width, start + kSum);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) part += term(i);
    total += part;
  }
  return total;
}

inline float inverse_length(const float* x, int64_t width, float eps) {
  const double squares = row_sum(width, [=](int64_t i) { return x[i] * x[i]; });
  return static_cast<float>(1.0 / std::sqrt(squares / width + eps));
}

inline int64_t rows_at_once(int64_t width) { return std::max<int64_t>(1, kPart / std::max<int64_t>(1, width)); }

// `weight` may be null: all ones.
inline void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps) {
  in_parts(rows, rows_at_once(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a = x + row * width;
      float* y = out + row * width;
      const float inverse = inverse_length(a, width, eps);
      if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = weight[i] * (a[i] * inverse);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = a[i] * inverse;
      }
    }
  });
}

inline void rms_norm_gradient(
    const float* x, const float* weight, const float* cotangent, float* out, int64_t rows, int64_t width,
    float eps) {
  in_parts(rows, rows_at_once(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a = x + row * width;
      const float* c = cotangent + row * width;
      float* y = out + row * width;
      const float inverse = inverse_length(a, width, eps);
      const double across = weight ? row_sum(width, [=](int64_t i) { return c[i] * weight[i] * a[i]; })
                                   : row_sum(width, [=](int64_t i) { return c[i] * a[i]; });
      const float along = static_cast<float>(across / width * inverse * inverse * inverse);
      if (weight) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = inverse * (c[i] * weight[i]) - along * a[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = inverse * c[i] - along * a[i];
      }
    }
  });
}

constexpr int64_t kRowsOfSum = 64;

inline int64_t row_groups(int64_t rows) { return (rows + kRowsOfSum - 1) / kRowsOfSum; }

// Gradient of the weight: sums over rows, in groups of a fixed size and then over the groups. `parts`:
// (row_groups(rows), width), for the sums of each group.
inline void rms_norm_weight_gradient(
    const float* x, const float* cotangent, float* out, float* parts, int64_t rows, int64_t width, float eps) {
  const int64_t groups = row_groups(rows);
  in_parts(rows, kRowsOfSum, [=](int64_t begin, int64_t end) {
    float* part = parts + begin / kRowsOfSum * width;
    std::fill(part, part + width, 0.0f);
    for (int64_t row = begin; row < end; ++row) {
      const float* a = x + row * width;
      const float* c = cotangent + row * width;
      const float inverse = inverse_length(a, width, eps);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) part[i] += c[i] * (a[i] * inverse);
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double total = 0;
    for (int64_t group = 0; group < groups; ++group) total += parts[group * width + i];
    out[i] = static_cast<float>(total);
  }
}

// Rotary embeddings (arXiv 2104.09864) -----------------------

// cos and sin of position * frequency. As in MLX and torch the angle is rounded to float32.
struct Angles {
  std::vector<float> frequencies;
  float scale;
  int64_t positions;
  std::vector<float> cos, sin;  // positions x frequencies

  Angles(std::vector<float> frequencies_, float scale, int64_t positions)
      : frequencies(std::move(frequencies_)), scale(scale), positions(positions) {
    const int64_t half = static_cast<int64_t>(frequencies.size());
    cos.resize(positions * half);
    sin.resize(positions * half);
    in_parts(positions, 64, [&](int64_t begin, int64_t end) {
      for (int64_t position = begin; position < end; ++position) {
        const float place = static_cast<float>(position) * this->scale;
        for (int64_t j = 0; j < half; ++j) {
          const double angle = place * frequencies[j];
          cos[position * half + j] = static_cast<float>(std::cos(angle));
          sin[position * half + j] = static_cast<float>(std::sin(angle));
        }
      }
    });
  }
};

// The table of these frequencies, long enough for `positions`; it is kept for the next layer. A table that is
// too short is replaced, never changed: another stream may be reading it.
inline std::shared_ptr<const Angles> angles(std::vector<float> frequencies, float scale, int64_t positions) {
  using Tables = std::vector<std::shared_ptr<const Angles>>;
  constexpr size_t kTables = 16;
  static std::mutex lock;
  static Tables& tables = *new Tables;  // never destroyed: a stream may use it until the process ends
  std::lock_guard<std::mutex> guard(lock);
  const auto known = std::find_if(tables.begin(), tables.end(), [&](const auto& table) {
    return table->scale == scale && table->frequencies == frequencies;
  });
  int64_t least = 256;
  if (known != tables.end()) {
    if ((*known)->positions >= positions) return *known;
    least = 2 * (*known)->positions;
  }
  auto table = std::make_shared<const Angles>(std::move(frequencies), scale, std::max(positions, least));
  if (known != tables.end())
    tables.erase(known);
  else if (tables.size() >= kTables)
    tables.pop_back();
  tables.insert(tables.begin(), table);
  return table;
}

struct Rows {  // (batch, heads, rows, width), the last dimension without gaps
  int64_t batch, head, row;  // distances in elements
};

struct Rotation {
  int64_t batches, heads, rows, width, dims;
  bool traditional, inverse;
};

inline void rotate_row(
    const float* x, float* y, const float* cos, const float* sin, const Rotation& of, float sign) {
  const int64_t half = of.dims / 2;
  if (of.traditional) {
    for (int64_t j = 0; j < half; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      y[2 * j] = a * cos[j] - sign * b * sin[j];
      y[2 * j + 1] = b * cos[j] + sign * a * sin[j];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float a = x[j], b = x[half + j];
      y[j] = a * cos[j] - sign * b * sin[j];
      y[half + j] = b * cos[j] + sign * a * sin[j];
    }
  }
  for (int64_t j = of.dims; j < of.width; ++j) y[j] = x[j];
}

// offsets: the position of the first row, one for each batch.
inline void rotate(
    const float* x, Rows in, float* y, Rows out, const Rotation& of, const std::vector<int64_t>& offsets,
    const std::vector<float>& frequencies, float scale) {
  if (offsets.empty() || of.rows == 0) return;
  const auto [least, most] = std::minmax_element(offsets.begin(), offsets.end());
  // A position before the first turns as far as one behind it, the other way.
  const auto table = angles(frequencies, scale, std::max(*most + of.rows, 1 - *least));
  const int64_t half = of.dims / 2;
  const float sign = of.inverse ? -1.0f : 1.0f;
  const int64_t all = of.batches * of.rows;
  const int64_t part = std::max<int64_t>(1, kPart / std::max<int64_t>(1, of.heads * of.width));
  in_parts(all, part, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / of.rows, row = index % of.rows;
      const int64_t position = offsets[batch] + row;
      const float* cos = table->cos.data() + std::abs(position) * half;
      const float* sin = table->sin.data() + std::abs(position) * half;
      for (int64_t head = 0; head < of.heads; ++head)
        rotate_row(x + batch * in.batch + head * in.head + row * in.row,
                   y + batch * out.batch + head * out.head + row * out.row, cos, sin, of, position < 0 ? -sign : sign);
    }
  });
}

}  // namespace tunesmith
