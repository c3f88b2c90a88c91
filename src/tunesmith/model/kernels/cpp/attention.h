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

// The keys [first, last) of one query; `gaps`: some of them are masked.
struct Span {
  int32_t first, last, gaps;
};

// Which keys each query attends to.
struct Mask {
  bool causal = false;
  // Ends of the rows that lie end to end in the sequence, each attending to itself; empty: one row.
  std::vector<int64_t> ends;
  // True where a query attends to a key; null: everywhere. Distances in elements, 0 along a repeated axis.
  const bool* allowed = nullptr;
  int64_t of_batch = 0, of_head = 0, of_query = 0, of_key = 0;
  // (batches, heads, queries), of the batch rows and heads that `allowed` tells apart: see find_spans.
  Span* spans = nullptr;
  int64_t batches = 0, heads = 0;

  const bool* keys_of(int64_t batch, int64_t head, int64_t query) const {
    return allowed + batch * of_batch + head * of_head + query * of_query;
  }
};

// `row`: the first key of the row that the query lies in.
inline Span span(const Heads& shape, const Mask& mask, int64_t batch, int64_t head, int64_t query, int64_t row) {
  if (mask.allowed)
    return mask.spans[((mask.batches > 1 ? batch : 0) * mask.heads + (mask.heads > 1 ? head : 0)) * shape.queries +
                      query];
  const int64_t last = mask.causal ? std::max(row, query + shape.keys - shape.queries + 1) : shape.keys;
  return {static_cast<int32_t>(row), static_cast<int32_t>(last), 0};
}

inline Span span_of_allowed(const bool* allowed, int64_t distance, int64_t last) {
  int64_t first = 0, count = 0;
  while (first < last && !allowed[first * distance]) ++first;
  while (last > first && !allowed[(last - 1) * distance]) --last;
  if (distance == 1) {
#pragma omp simd reduction(+ : count)
    for (int64_t key = first; key < last; ++key) count += allowed[key];
  } else {
    for (int64_t key = first; key < last; ++key) count += allowed[key * distance];
  }
  return {static_cast<int32_t>(first), static_cast<int32_t>(last), count < last - first};
}

// Fills `mask.spans`, if there is a boolean mask: once for all heads that share it.
inline void find_spans(const Heads& shape, const Mask& mask) {
  if (!mask.allowed) return;
  in_parts(mask.batches * mask.heads * shape.queries, 64, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t query = index % shape.queries, head = index / shape.queries % mask.heads;
      const bool* allowed = mask.keys_of(index / shape.queries / mask.heads, head, query);
      const int64_t last = query + shape.keys - shape.queries + 1;
      mask.spans[index] =
          span_of_allowed(allowed, mask.of_key, mask.causal ? std::max<int64_t>(0, last) : shape.keys);
    }
  });
}

// The queries [begin, end) of one head, at most kQueries, and all keys that any of them attends to.
struct Block {
  int64_t batch, head, begin, end, first, last;
  Span spans[kQueries];

  int64_t rows() const { return end - begin; }
  int64_t keys() const { return last - first; }

  Block(
      const Heads& shape, const Mask& mask, int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t row)
      : batch(batch), head(head), begin(begin), end(end), first(shape.keys), last(0) {
    for (int64_t query = begin; query < end; ++query) {
      const Span& keys = spans[query - begin] = span(shape, mask, batch, head, query, row);
      if (keys.first == keys.last) continue;
      first = std::min<int64_t>(first, keys.first);
      last = std::max<int64_t>(last, keys.last);
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

// Most keys of one row.
inline int64_t longest(const Heads& shape, const Mask& mask) {
  if (mask.ends.empty()) return shape.keys;
  int64_t keys = 0;
  for (const auto& [first, last] : rows_of(shape, mask)) keys = std::max(keys, last - first);
  return keys;
}

inline int64_t queries_at_once(const Heads& shape, const Mask& mask) {
  return std::clamp<int64_t>(kScores / std::max<int64_t>(1, longest(shape, mask)), 16, kQueries);
}

// Most scores of one block.
inline int64_t scores_at_once(const Heads& shape, const Mask& mask) {
  return std::min(queries_at_once(shape, mask), shape.queries) * longest(shape, mask);
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
  const bool* allowed = mask.keys_of(block.batch, block.head, block.begin + row);
  for (int64_t key = keys.first; key < keys.last; ++key)
    if (!allowed[key * mask.of_key]) scores[key - block.first] = empty;
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

// Numbers of scratch for each thread of `attend`.
inline int64_t attend_scratch(const Heads& shape, const Mask& mask) {
  return shape.queries == 1 ? shape.sharing() * shape.keys : scores_at_once(shape, mask);
}

// One query for each head, as in generation: its keys are read once for all heads that share them.
inline void attend_once(
    const Heads& shape, const Mask& mask, const Operand& queries, const Operand& keys, const Operand& values,
    const Result& out, float* normalisers, const Scratch& scratch) {
  const int64_t sharing = shape.sharing();
  threads().run(shape.batches * shape.groups, [&](int64_t unit, int thread) {
    const int64_t batch = unit / shape.groups, group = unit % shape.groups;
    for (int64_t member = 0; member < sharing; ++member) {
      const int64_t head = group * sharing + member;
      const Span range = span(shape, mask, batch, head, 0, 0);
      const float* query = queries.at(batch, head, 0);
      float* scores = scratch.of(thread) + member * shape.keys;
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
      if (range.gaps) {
        const bool* allowed = mask.keys_of(batch, head, 0);
        for (int64_t key = range.first; key < range.last; ++key)
          if (!allowed[key * mask.of_key]) scores[key] = -std::numeric_limits<float>::infinity();
      }
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
    const Result& out, float* normalisers, const Scratch& scratch) {
  find_spans(shape, mask);
  if (shape.queries == 1) return attend_once(shape, mask, queries, keys, values, out, normalisers, scratch);
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
  threads().run(heads * static_cast<int64_t>(places.size()), [&](int64_t unit, int thread) {
    const int64_t batch = unit % heads / shape.heads, head = unit % heads % shape.heads;
    const Place& place = places[places.size() - 1 - unit / heads];  // the longest first
    const Block block(shape, mask, batch, head, place.begin, place.end, place.row);
    float* normaliser = normalisers + (batch * shape.heads + head) * shape.queries + block.begin;
    float* all_scores = scratch.of(thread);
    float inverses[kQueries];
    if (block.keys() > 0) scores_of(shape, queries, keys, block, all_scores);
    for (int64_t row = 0; row < block.rows(); ++row) {
      const Span& range = block.spans[row];
      float* scores = all_scores + row * block.keys();
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
      product(false, false, block.rows(), shape.value_width, block.keys(), 1.0f, all_scores, block.keys(),
              values.at(batch, head / shape.sharing(), block.first), values.distance.row, 0.0f, y,
              out.distance.row);
    for (int64_t row = 0; row < block.rows(); ++row) {
      float* mixed = y + row * out.distance.row;
      for (int64_t j = 0; j < shape.value_width; ++j)
        mixed[j] = inverses[row] == 0 ? 0.0f : mixed[j] * inverses[row];
    }
  });
}

// What the backward pass reads.
struct Forward {
  Operand queries, keys, values, output, cotangent;
  const float* normalisers;
};

struct Gradients {
  Result queries, keys, values;
};

// Where the gradients of the keys and values of one head are added up, from key `first` on.
struct Sums {
  float *keys, *values;
  int64_t keys_distance, values_distance, first;
};

// The rows that lie end to end, and how their gradients are shared among the threads. Query heads that share a
// key head are added up in their order, whichever thread comes first: by one thread, or, if that leaves threads
// without work, from `parts` of their own when all heads are done.
struct GradientPlan {
  std::vector<std::pair<int64_t, int64_t>> rows;
  int64_t scores, keys;  // at most, of one block and of one row
  bool by_key_head;

  GradientPlan(const Heads& shape, const Mask& mask)
      : rows(rows_of(shape, mask)), scores(scores_at_once(shape, mask)), keys(longest(shape, mask)) {
    const int64_t units = shape.batches * shape.groups * static_cast<int64_t>(rows.size());
    by_key_head = shape.sharing() == 1 || units >= 4 * threads().count();
  }

  // Numbers of scratch for each thread: scores, their gradients, and sums of one head.
  int64_t scratch(const Heads& shape) const {
    const bool sums = by_key_head && shape.sharing() > 1;
    return 2 * scores + (sums ? keys * (shape.width + shape.value_width) : 0);
  }

  // Numbers of one head's part, of keys and of values.
  int64_t part(const Heads& shape) const {
    return by_key_head ? 0 : shape.keys * (shape.width + shape.value_width);
  }
};

// `scratch`: room for 2 plan.scores.
inline void attend_gradient_of_head(
    const Heads& shape, const Mask& mask, const GradientPlan& plan, const Forward& of, const Result& of_queries,
    const Sums& sums, int64_t batch, int64_t head, std::pair<int64_t, int64_t> row, float* scratch) {
  const int64_t group = head / shape.sharing(), step = queries_at_once(shape, mask);
  float *all_weights = scratch, *all_changes = scratch + plan.scores;
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
    scores_of(shape, of.queries, of.keys, block, all_weights);
    const float* c = of.cotangent.at(batch, head, begin);
    product(false, true, rows, width, shape.value_width, 1.0f, c, of.cotangent.distance.row,
            of.values.at(batch, group, block.first), of.values.distance.row, 0.0f, all_changes, width);
    for (int64_t i = 0; i < rows; ++i) {
      const float* y = of.output.at(batch, head, begin + i);
      const float* of_y = of.cotangent.at(batch, head, begin + i);
      float inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t j = 0; j < shape.value_width; ++j) inner += y[j] * of_y[j];
      const float normaliser = of.normalisers[(batch * shape.heads + head) * shape.queries + begin + i];
      float* weights = all_weights + i * width;
      float* change = all_changes + i * width;
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
    product(false, false, rows, shape.width, width, 1.0f, all_changes, width, of.keys.at(batch, group, block.first),
            of.keys.distance.row, 0.0f, slope, of_queries.distance.row);
    const int64_t key = block.first - sums.first;
    product(true, false, width, shape.width, rows, 1.0f, all_changes, width, of.queries.at(batch, head, begin),
            of.queries.distance.row, 1.0f, sums.keys + key * sums.keys_distance, sums.keys_distance);
    product(true, false, width, shape.value_width, rows, 1.0f, all_weights, width, c, of.cotangent.distance.row,
            1.0f, sums.values + key * sums.values_distance, sums.values_distance);
  }
}

inline void clear(float* rows, int64_t count, int64_t width, int64_t distance) {
  for (int64_t row = 0; row < count; ++row) std::fill_n(rows + row * distance, width, 0.0f);
}

// `rows` += `more`, whose rows lie without gaps.
inline void add(float* rows, int64_t distance, const float* more, int64_t count, int64_t width) {
  for (int64_t row = 0; row < count; ++row) {
    float* y = rows + row * distance;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) y[j] += more[row * width + j];
  }
}

// One unit for each key head and row. Its first query head adds to the result, each other to sums of the thread.
inline void attend_gradient_by_key_head(
    const Heads& shape, const Mask& mask, const GradientPlan& plan, const Forward& of, const Gradients& out,
    const Scratch& scratch) {
  const int64_t groups = shape.batches * shape.groups, sharing = shape.sharing();
  threads().run(groups * static_cast<int64_t>(plan.rows.size()), [&](int64_t unit, int thread) {
    const int64_t batch = unit % groups / shape.groups, group = unit % groups % shape.groups;
    const std::pair<int64_t, int64_t> row = plan.rows[unit / groups];
    const int64_t first = mask.ends.empty() ? 0 : row.first;
    const int64_t keys = mask.ends.empty() ? shape.keys : row.second - row.first;
    const Sums result{out.keys.at(batch, group, first), out.values.at(batch, group, first), out.keys.distance.row,
                      out.values.distance.row, first};
    float* beyond = scratch.of(thread) + 2 * plan.scores;
    const Sums own{beyond, beyond + keys * shape.width, shape.width, shape.value_width, first};
    for (int64_t member = 0; member < sharing; ++member) {
      const Sums& sums = member == 0 ? result : own;
      clear(sums.keys, keys, shape.width, sums.keys_distance);
      clear(sums.values, keys, shape.value_width, sums.values_distance);
      attend_gradient_of_head(shape, mask, plan, of, out.queries, sums, batch, group * sharing + member, row,
                              scratch.of(thread));
      if (member == 0) continue;
      add(result.keys, result.keys_distance, own.keys, keys, shape.width);
      add(result.values, result.values_distance, own.values, keys, shape.value_width);
    }
  });
}

// One unit for each query head and row. `parts`: plan.part(shape) numbers for each head.
inline void attend_gradient_by_query_head(
    const Heads& shape, const Mask& mask, const GradientPlan& plan, const Forward& of, const Gradients& out,
    const Scratch& scratch, float* parts) {
  const int64_t heads = shape.batches * shape.heads, sharing = shape.sharing();
  const auto part = [&](int64_t head) -> Sums {
    float* keys = parts + head * plan.part(shape);
    return {keys, keys + shape.keys * shape.width, shape.width, shape.value_width, 0};
  };
  threads().run(heads, [&](int64_t head, int) { std::fill_n(part(head).keys, plan.part(shape), 0.0f); });
  threads().run(heads * static_cast<int64_t>(plan.rows.size()), [&](int64_t unit, int thread) {
    const int64_t head = unit % heads;
    attend_gradient_of_head(shape, mask, plan, of, out.queries, part(head), head / shape.heads, head % shape.heads,
                            plan.rows[unit / heads], scratch.of(thread));
  });
  in_parts(shape.batches * shape.groups * shape.keys, 64, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t key = index % shape.keys, group = index / shape.keys % shape.groups;
      const int64_t batch = index / shape.keys / shape.groups, head = batch * shape.heads + group * sharing;
      float *of_key = out.keys.at(batch, group, key), *of_value = out.values.at(batch, group, key);
      std::copy_n(part(head).keys + key * shape.width, shape.width, of_key);
      std::copy_n(part(head).values + key * shape.value_width, shape.value_width, of_value);
      for (int64_t member = 1; member < sharing; ++member) {
        add(of_key, 0, part(head + member).keys + key * shape.width, 1, shape.width);
        add(of_value, 0, part(head + member).values + key * shape.value_width, 1, shape.value_width);
      }
    }
  });
}

inline void attend_gradient(
    const Heads& shape, const Mask& mask, const GradientPlan& plan, const Forward& of, const Gradients& out,
    const Scratch& scratch, float* parts) {
  find_spans(shape, mask);
  OneThreadPerProduct guard;
  if (plan.by_key_head)
    attend_gradient_by_key_head(shape, mask, plan, of, out, scratch);
  else
    attend_gradient_by_query_head(shape, mask, plan, of, out, scratch, parts);
}

}  // namespace tunesmith
