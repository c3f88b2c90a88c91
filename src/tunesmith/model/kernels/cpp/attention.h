// Attention over blocks of queries, whose scores stay in the cache of a core and are computed again in the
// backward pass (FlashAttention, arXiv 2205.14135). Products by the BLAS, one thread for each head.
#pragma once

#include "pointwise.h"

extern "C" void cblas_sgemm(
    int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
    const float* b, int ldb, float beta, float* c, int ldc);

namespace tunesmith {

constexpr int64_t kScores = 131072;  // scores of one block: 512 KiB
constexpr int64_t kQueries = 128;    // queries of one block at most

// c (m, n) = alpha a b + beta c, row-major; a transposed operand is stored (k, m) or (n, k).
inline void product(
    bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
    int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  constexpr int kRowMajor = 101, kAsStored = 111, kTransposed = 112;
  cblas_sgemm(kRowMajor, transpose_a ? kTransposed : kAsStored, transpose_b ? kTransposed : kAsStored,
              static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), alpha, a, static_cast<int>(lda), b,
              static_cast<int>(ldb), beta, c, static_cast<int>(ldc));
}

// queries (batches, heads, queries, width), keys (batches, groups, keys, width), values (…, value_width);
// query head h belongs to key head h / (heads / groups).
struct Heads {
  int64_t batches, heads, groups, queries, keys, width, value_width;
  float scale;

  int64_t sharing() const { return heads / groups; }
};

// Which keys each query attends to.
struct Mask {
  bool causal = false;
  // Ends of the rows that lie end to end in the sequence, each attending to itself; empty: one row.
  std::vector<int64_t> ends;
  // True where a query attends to a key; null: everywhere. Distances in elements, 0 along a repeated axis.
  const bool* allowed = nullptr;
  int64_t of_batch = 0, of_head = 0, of_query = 0, of_key = 0;

  bool at(int64_t batch, int64_t head, int64_t query, int64_t key) const {
    return allowed[batch * of_batch + head * of_head + query * of_query + key * of_key];
  }
};

// The keys [first, last) of one query; `gaps`: some of them are masked.
struct Span {
  int64_t first, last;
  bool gaps;
};

inline Span span(const Heads& shape, const Mask& mask, int64_t batch, int64_t head, int64_t query, int64_t row) {
  Span keys{row, shape.keys, false};
  if (mask.causal) keys.last = std::max<int64_t>(row, query + shape.keys - shape.queries + 1);
  if (mask.allowed == nullptr) return keys;
  while (keys.first < keys.last && !mask.at(batch, head, query, keys.first)) ++keys.first;
  while (keys.last > keys.first && !mask.at(batch, head, query, keys.last - 1)) --keys.last;
  int64_t allowed = 0;
  for (int64_t key = keys.first; key < keys.last; ++key) allowed += mask.at(batch, head, query, key);
  keys.gaps = allowed < keys.last - keys.first;
  return keys;
}

// The queries [begin, end) of one head, and all keys that any of them attends to.
struct Block {
  int64_t batch, head, begin, end, first, last;
  std::vector<Span> spans;

  int64_t rows() const { return end - begin; }
  int64_t keys() const { return last - first; }

  Block(
      const Heads& shape, const Mask& mask, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t row)
      : batch(batch), head(head), begin(begin), end(end), first(shape.keys), last(0) {
    for (int64_t query = begin; query < end; ++query) {
      spans.push_back(span(shape, mask, batch, head, query, row));
      if (spans.back().first == spans.back().last) continue;
      first = std::min(first, spans.back().first);
      last = std::max(last, spans.back().last);
    }
    if (last < first) first = last = 0;
  }
};

// (first, last) of the rows that lie end to end.
inline std::vector<std::pair<int64_t, int64_t>> rows_of(const Heads& shape, const Mask& mask) {
  std::vector<std::pair<int64_t, int64_t>> rows;
  int64_t start = 0;
  for (const int64_t end : mask.ends) {
    if (end > start) rows.emplace_back(start, end);
    start = std::max(start, end);
  }
  if (start < shape.queries) rows.emplace_back(start, shape.queries);
  return rows;
}

inline int64_t queries_at_once(const Heads& shape, const Mask& mask) {
  int64_t keys = mask.ends.empty() ? shape.keys : 1;
  if (!mask.ends.empty())
    for (const auto& [first, last] : rows_of(shape, mask)) keys = std::max(keys, last - first);
  return std::clamp<int64_t>(kScores / std::max<int64_t>(1, keys), 16, kQueries);
}

// Scores outside a query's span become `empty`; those of masked keys inside it too.
inline void fill(const Block& block, const Mask& mask, int64_t row, float* scores, float empty) {
  const Span& keys = block.spans[row];
  const int64_t from = keys.first - block.first, to = keys.last - block.first;
  if (keys.first == keys.last) {
    std::fill(scores, scores + block.keys(), empty);
    return;
  }
  std::fill(scores, scores + from, empty);
  std::fill(scores + to, scores + block.keys(), empty);
  if (!keys.gaps) return;
  for (int64_t key = keys.first; key < keys.last; ++key)
    if (!mask.at(block.batch, block.head, block.begin + row, key)) scores[key - block.first] = empty;
}

struct Operand {
  const float* data;
  Rows distance;

  const float* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * distance.batch + head * distance.head + row * distance.row;
  }
};

struct Result {
  float* data;
  Rows distance;

  float* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * distance.batch + head * distance.head + row * distance.row;
  }
};

inline void scores_of(
    const Heads& shape, const Operand& queries, const Operand& keys, const Block& block, float* scores) {
  product(false, true, block.rows(), block.keys(), shape.width, shape.scale,
          queries.at(block.batch, block.head, block.begin), queries.distance.row,
          keys.at(block.batch, block.head / shape.sharing(), block.first), keys.distance.row, 0.0f, scores,
          block.keys());
}

// One query for each head, as in generation: its keys are read once for all heads that share them.
inline void attend_once(
    const Heads& shape, const Mask& mask, const Operand& queries, const Operand& keys, const Operand& values,
    const Result& out, float* normalisers) {
  const int64_t sharing = shape.sharing();
  threads().run(static_cast<int>(shape.batches * shape.groups), [&](int unit) {
    static thread_local std::vector<float> scratch;
    const int64_t batch = unit / shape.groups, group = unit % shape.groups;
    scratch.resize(sharing * shape.keys);
    for (int64_t member = 0; member < sharing; ++member) {
      const int64_t head = group * sharing + member;
      const Span range = span(shape, mask, batch, head, 0, 0);
      const float* query = queries.at(batch, head, 0);
      float* scores = scratch.data() + member * shape.keys;
      float* y = out.at(batch, head, 0);
      float& normaliser = normalisers[batch * shape.heads + head];
      std::fill(y, y + shape.value_width, 0.0f);
      normaliser = std::numeric_limits<float>::infinity();
      if (range.first == range.last) continue;
      for (int64_t key = range.first; key < range.last; ++key) {
        const float* k = keys.at(batch, group, key);
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < shape.width; ++j) dot += query[j] * k[j];
        scores[key] = dot * shape.scale;
      }
      if (range.gaps)
        for (int64_t key = range.first; key < range.last; ++key)
          if (!mask.at(batch, head, 0, key)) scores[key] = -std::numeric_limits<float>::infinity();
      float* part = scores + range.first;
      const int64_t size = range.last - range.first;
      const float most = highest(part, size);
      const double total = exponentials(part, part, size, most);
      normaliser = static_cast<float>(most + std::log(total));
      const float inverse = static_cast<float>(1.0 / total);
      for (int64_t key = range.first; key < range.last; ++key) {
        const float* v = values.at(batch, group, key);
        const float weight = scores[key] * inverse;
#pragma omp simd
        for (int64_t j = 0; j < shape.value_width; ++j) y[j] += weight * v[j];
      }
    }
  });
}

// normalisers (batches, heads, queries): log of the sum of e^score, for the backward pass.
inline void attend(
    const Heads& shape, const Mask& mask, const Operand& queries, const Operand& keys, const Operand& values,
    const Result& out, float* normalisers) {
  OneThreadPerProduct guard;
  struct Place {
    int64_t row, begin, end;
  };
  std::vector<Place> places;
  const int64_t step = queries_at_once(shape, mask);
  for (const auto& [first, last] : rows_of(shape, mask))
    for (int64_t begin = first; begin < last; begin += step)
      places.push_back({mask.ends.empty() ? 0 : first, begin, std::min(begin + step, last)});
  const int64_t heads = shape.batches * shape.heads;
  threads().run(static_cast<int>(heads * places.size()), [&](int unit) {
    static thread_local std::vector<float> scratch;
    const int64_t batch = unit % heads / shape.heads, head = unit % heads % shape.heads;
    const Place& place = places[places.size() - 1 - unit / heads];  // the longest first
    const Block block(shape, mask, batch, head, place.begin, place.end, place.row);
    float* normaliser = normalisers + (batch * shape.heads + head) * shape.queries + block.begin;
    scratch.resize(block.rows() * block.keys());
    float inverses[kQueries];
    if (block.keys() > 0) scores_of(shape, queries, keys, block, scratch.data());
    for (int64_t row = 0; row < block.rows(); ++row) {
      const Span& range = block.spans[row];
      float* scores = scratch.data() + row * block.keys();
      if (range.gaps) fill(block, mask, row, scores, -std::numeric_limits<float>::infinity());
      inverses[row] = 0;
      normaliser[row] = std::numeric_limits<float>::infinity();  // e^(score - infinity) = 0: no gradient
      if (range.first < range.last) {
        float* part = scores + range.first - block.first;
        const int64_t size = range.last - range.first;
        const float most = highest(part, size);
        const double total = exponentials(part, part, size, most);
        inverses[row] = static_cast<float>(1.0 / total);
        normaliser[row] = static_cast<float>(most + std::log(total));
      }
      fill(block, mask, row, scores, 0.0f);
    }
    float* y = out.at(batch, head, block.begin);
    if (block.keys() > 0)
      product(false, false, block.rows(), shape.value_width, block.keys(), 1.0f, scratch.data(), block.keys(),
              values.at(batch, head / shape.sharing(), block.first), values.distance.row, 0.0f, y,
              out.distance.row);
    for (int64_t row = 0; row < block.rows(); ++row) {
      float* mixed = y + row * out.distance.row;
      for (int64_t j = 0; j < shape.value_width; ++j)
        mixed[j] = inverses[row] == 0 ? 0.0f : mixed[j] * inverses[row];
    }
  });
}

struct Gradients {
  Result queries, keys, values;
};

// The gradient of the keys and values of one head and row, added to `of_keys` and `of_values` (keys, width).
inline void attend_gradient_of_head(
    const Heads& shape, const Mask& mask, const Operand& queries, const Operand& keys, const Operand& values,
    const Operand& output, const Operand& cotangent, const float* normalisers, const Result& of_queries,
    float* of_keys, int64_t keys_distance, float* of_values, int64_t values_distance, int64_t batch,
    int64_t head, std::pair<int64_t, int64_t> row) {
  static thread_local std::vector<float> scratch, changes;
  const int64_t group = head / shape.sharing(), step = queries_at_once(shape, mask);
  for (int64_t begin = row.first; begin < row.second; begin += step) {
    const Block block(shape, mask, batch, head, begin, std::min(begin + step, row.second),
                      mask.ends.empty() ? 0 : row.first);
    const int64_t rows = block.rows(), width = block.keys();
    float* slope = of_queries.at(batch, head, begin);
    if (width == 0) {
      for (int64_t i = 0; i < rows; ++i)
        std::fill(slope + i * of_queries.distance.row, slope + i * of_queries.distance.row + shape.width, 0.0f);
      continue;
    }
    scratch.resize(rows * width);
    changes.resize(rows * width);
    scores_of(shape, queries, keys, block, scratch.data());
    const float* c = cotangent.at(batch, head, begin);
    product(false, true, rows, width, shape.value_width, 1.0f, c, cotangent.distance.row,
            values.at(batch, group, block.first), values.distance.row, 0.0f, changes.data(), width);
    for (int64_t i = 0; i < rows; ++i) {
      const float* y = output.at(batch, head, begin + i);
      const float* of_y = cotangent.at(batch, head, begin + i);
      float inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t j = 0; j < shape.value_width; ++j) inner += y[j] * of_y[j];
      const float normaliser = normalisers[(batch * shape.heads + head) * shape.queries + begin + i];
      float* weights = scratch.data() + i * width;
      float* change = changes.data() + i * width;
      const Span& range = block.spans[i];
      const int64_t from = range.first - block.first, to = range.last - block.first;
#pragma omp simd
      for (int64_t j = from; j < to; ++j) {
        const float weight = exponential(weights[j] - normaliser);
        weights[j] = weight;
        change[j] = weight * (change[j] - inner) * shape.scale;
      }
      fill(block, mask, i, weights, 0.0f);
      fill(block, mask, i, change, 0.0f);
    }
    product(false, false, rows, shape.width, width, 1.0f, changes.data(), width,
            keys.at(batch, group, block.first), keys.distance.row, 0.0f, slope, of_queries.distance.row);
    product(true, false, width, shape.width, rows, 1.0f, changes.data(), width, queries.at(batch, head, begin),
            queries.distance.row, 1.0f, of_keys + block.first * keys_distance, keys_distance);
    product(true, false, width, shape.value_width, rows, 1.0f, scratch.data(), width, c, cotangent.distance.row,
            1.0f, of_values + block.first * values_distance, values_distance);
  }
}

inline void attend_gradient(
    const Heads& shape, const Mask& mask, const Operand& queries, const Operand& keys, const Operand& values,
    const Operand& output, const Operand& cotangent, const float* normalisers, const Gradients& of) {
  OneThreadPerProduct guard;
  const auto rows = rows_of(shape, mask);
  const int64_t heads = shape.batches * shape.heads, sharing = shape.sharing();
  // Each query head adds to keys and values of its own, which are then added up over those that share a key
  // head: in this order, whichever thread comes first.
  std::vector<float> key_parts(heads * shape.keys * shape.width);
  std::vector<float> value_parts(heads * shape.keys * shape.value_width);
  threads().run(static_cast<int>(heads * rows.size()), [&](int unit) {
    const int64_t index = unit % heads;
    attend_gradient_of_head(shape, mask, queries, keys, values, output, cotangent, normalisers, of.queries,
                            key_parts.data() + index * shape.keys * shape.width, shape.width,
                            value_parts.data() + index * shape.keys * shape.value_width, shape.value_width,
                            index / shape.heads, index % shape.heads, rows[unit / heads]);
  });
  const auto add_up = [&](const std::vector<float>& parts, int64_t width, const Result& out) {
    in_parts(shape.batches * shape.groups * shape.keys, 64, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t key = index % shape.keys, group = index / shape.keys % shape.groups;
        const int64_t batch = index / shape.keys / shape.groups;
        float* y = out.at(batch, group, key);
        for (int64_t member = 0; member < sharing; ++member) {
          const float* part =
              parts.data() + ((batch * shape.heads + group * sharing + member) * shape.keys + key) * width;
          if (member == 0)
            std::copy(part, part + width, y);
          else
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) y[j] += part[j];
        }
      }
    });
  };
  add_up(key_parts, shape.width, of.keys);
  add_up(value_parts, shape.value_width, of.values);
}

}  // namespace tunesmith
