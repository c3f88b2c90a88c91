// Dropout whose mask is drawn where it is used, so that nothing of it is kept for the backward pass.
//
// The mask is that of mlx.core.random.bernoulli, bit for bit: threefry2x32 in 20 rounds (Salmon et al., "Parallel
// Random Numbers: As Easy as 1, 2, 3", SC 2011). One hash makes the bits of two elements, half an array apart.
#pragma once

#include "threads.h"

namespace tunesmith {

constexpr int64_t kHashes = 8192;  // of one unit: 16,384 elements

struct Bits {
  uint32_t first, second;
};

inline uint32_t rotated_left(uint32_t value, int by) { return (value << by) | (value >> (32 - by)); }

inline Bits threefry(uint32_t key0, uint32_t key1, uint32_t count0, uint32_t count1) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key0, key1, key0 ^ key1 ^ 0x1BD11BDAu};
  uint32_t a = count0 + keys[0], b = count1 + keys[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      a += b;
      b = rotated_left(b, kRotations[i % 2][j]) ^ a;
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + i + 1;
  }
  return {a, b};
}

// The highest bits that keep an element if each is kept with this probability; -1: none does. MLX compares the
// bits, rounded to float32, with the probability times the float32 after 2^32.
inline int64_t highest_kept(float probability) {
  const float bound = probability * std::nextafter(4294967296.0f, std::numeric_limits<float>::max());
  int64_t low = -1, high = 4294967295;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (static_cast<float>(static_cast<uint32_t>(middle)) < bound)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

struct Dropout {
  float keep;  // the probability
  float scale;  // of what is kept
};

// y = x · scale where it is kept, else 0; plus `onto` unless that is null. y may be `onto`.
inline void dropout(
    const float* x, const float* onto, float* y, int64_t size, const uint32_t* key, Dropout options) {
  const int64_t highest = highest_kept(options.keep);
  const uint32_t limit = static_cast<uint32_t>(highest);
  const float scale = highest < 0 ? 0.0f : options.scale;
  const uint32_t key0 = key[0], key1 = key[1];
  const int64_t half = size / 2, second = half + size % 2;
  in_parts(half, kHashes, [=](int64_t begin, int64_t end) {
    if (onto != nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const Bits bits = threefry(key0, key1, static_cast<uint32_t>(i), static_cast<uint32_t>(i + second));
        y[i] = onto[i] + (bits.first <= limit ? x[i] * scale : 0.0f);
        y[i + second] = onto[i + second] + (bits.second <= limit ? x[i + second] * scale : 0.0f);
      }
      return;
    }
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const Bits bits = threefry(key0, key1, static_cast<uint32_t>(i), static_cast<uint32_t>(i + second));
      y[i] = bits.first <= limit ? x[i] * scale : 0.0f;
      y[i + second] = bits.second <= limit ? x[i + second] * scale : 0.0f;
    }
  });
  if (size % 2 == 0) return;
  const Bits bits = threefry(key0, key1, static_cast<uint32_t>(half), 0);
  const float kept = bits.first <= limit ? x[half] * scale : 0.0f;
  y[half] = onto == nullptr ? kept : onto[half] + kept;
}

}  // namespace tunesmith
