// The kernels as lazy operations of MLX, each with its gradient.
#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "attention.h"
#include "dropout.h"
#include "linear.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

using Arrays = std::vector<mx::array>;
using Work = std::function<void()>;
// Allocates the results and returns what computes them, which runs later on the thread of the stream.
using Prepare = std::function<Work(const Arrays& inputs, Arrays& results, mx::cpu::CommandEncoder& encoder)>;

// The gradient of each differentiable input, in their order; those that nobody asks for are never computed.
using Gradient = std::function<Arrays(const Arrays& inputs, const Arrays& results, const Arrays& cotangents)>;

class Kernel : public mx::Primitive {
 public:
  Kernel(mx::Stream stream, const char* name, Prepare prepare, Gradient gradient)
      : mx::Primitive(stream), name_(name), prepare_(std::move(prepare)), gradient_(std::move(gradient)) {}

  void eval_cpu(const Arrays& inputs, Arrays& results) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch(prepare_(inputs, results, encoder));
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string("[") + name_ + "] is a kernel for the CPU");
  }
  Arrays vjp(
      const Arrays& inputs, const Arrays& cotangents, const std::vector<int>& wanted,
      const Arrays& results) override {
    if (!gradient_) throw std::invalid_argument(std::string("[") + name_ + "] has no gradient");
    const Arrays all = gradient_(inputs, results, cotangents);
    Arrays chosen;
    for (const int input : wanted)  // masks, positions and targets have none
      chosen.push_back(input < static_cast<int>(all.size()) ? all[input] : mx::zeros_like(inputs[input], stream()));
    return chosen;
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  Prepare prepare_;
  Gradient gradient_;
};

Arrays make(
    const char* name, std::vector<mx::Shape> shapes, const Arrays& inputs, Prepare prepare,
    Gradient gradient = nullptr) {
  const std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  auto kernel = std::make_shared<Kernel>(mx::default_stream(mx::Device::cpu), name, std::move(prepare),
                                         std::move(gradient));
  return mx::array::make_arrays(std::move(shapes), dtypes, kernel, inputs);
}

// Row-contiguous float32.
mx::array plain(const mx::array& x) {
  if (x.dtype() != mx::float32) throw std::invalid_argument("the kernels for the CPU compute in float32");
  return mx::contiguous(x, false, mx::Device::cpu);
}

// MLX's allocator for the CPU returns null where there is no memory left.
mx::allocator::Data memory(size_t bytes) {
  mx::allocator::Data data = mx::allocator::malloc(bytes);
  if (data.buffer().ptr() == nullptr)
    throw std::runtime_error("[malloc] Unable to allocate " + std::to_string(bytes) + " bytes.");
  return data;
}

float* allocate(mx::array& result) {
  result.set_data(memory(result.nbytes()));
  return result.data<float>();
}

// Memory of (rows, width) for one kernel, which counts as MLX's and is given back when the kernel has run.
float* allocate(int64_t rows, int64_t width, mx::cpu::CommandEncoder& encoder) {
  mx::array numbers({static_cast<int>(rows), static_cast<int>(width)}, mx::float32, nullptr, {});
  float* data = allocate(numbers);
  encoder.add_temporary(numbers);
  return data;
}

tunesmith::Scratch scratch(int64_t each, mx::cpu::CommandEncoder& encoder) {
  return {allocate(tunesmith::threads().count(), each, encoder), each};
}

int64_t width_of(const mx::array& x) { return x.shape(-1); }
int64_t rows_of(const mx::array& x) { return x.size() / std::max<int64_t>(1, x.shape(-1)); }

// Pointwise --------------------------------------------------

Arrays swiglu_gradient(const Arrays& in, const Arrays&, const Arrays& cotangents) {
  return make("SwiGLUGradient", {in[0].shape(), in[1].shape()}, {in[0], in[1], plain(cotangents[0])},
              [](const Arrays& in, Arrays& out, auto&) {
                return [g = in[0].data<float>(), u = in[1].data<float>(), c = in[2].data<float>(),
                        of_gate = allocate(out[0]), of_up = allocate(out[1]), size = in[0].size()] {
                  tunesmith::swiglu_gradient(g, u, c, of_gate, of_up, size);
                };
              });
}

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  if (gate.shape() != up.shape()) throw std::invalid_argument("gate and up must have the same shape");
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    return [g = in[0].data<float>(), u = in[1].data<float>(), y = allocate(out[0]), size = in[0].size()] {
      tunesmith::swiglu(g, u, y, size);
    };
  };
  return make("SwiGLU", {gate.shape()}, {plain(gate), plain(up)}, prepare, swiglu_gradient)[0];
}

Arrays gelu_gradient(const Arrays& in, const Arrays&, const Arrays& cotangents) {
  return make("GELUGradient", {in[0].shape()}, {in[0], plain(cotangents[0])},
              [](const Arrays& in, Arrays& out, auto&) {
                return [x = in[0].data<float>(), c = in[1].data<float>(), y = allocate(out[0]),
                        size = in[0].size()] { tunesmith::gelu_gradient(x, c, y, size); };
              });
}

mx::array gelu(const mx::array& x) {
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    return [x = in[0].data<float>(), y = allocate(out[0]), size = in[0].size()] { tunesmith::gelu(x, y, size); };
  };
  return make("GELU", {x.shape()}, {plain(x)}, prepare, gelu_gradient)[0];
}

// Products of few rows --------------------

// (..., inputs), weight (outputs, inputs) -> (..., outputs)
mx::array linear(const mx::array& x, const mx::array& weight) {
  if (x.ndim() == 0 || weight.ndim() != 2 || x.shape(-1) != weight.shape(1))
    throw std::invalid_argument("x must be as wide as the weight");
  const auto prepare = [](const Arrays& in, Arrays& out, auto& encoder) {
    const int64_t rows = rows_of(in[0]), inputs = width_of(in[0]);
    return [x = in[0].data<float>(), w = in[1].data<float>(), y = allocate(out[0]), rows, inputs,
            turned = allocate(tunesmith::turned_rows(rows), inputs, encoder), outputs = in[1].shape(0)] {
      tunesmith::linear(x, turned, w, y, rows, inputs, outputs);
    };
  };
  const auto gradient = [](const Arrays& in, const Arrays&, const Arrays& cotangents) {
    const mx::Device cpu = mx::Device::cpu;
    const mx::array &w = in[1], c = cotangents[0];
    const mx::array rows = mx::reshape(c, {-1, w.shape(0)}, cpu), x = mx::reshape(in[0], {-1, w.shape(1)}, cpu);
    return Arrays{mx::matmul(c, w, cpu), mx::matmul(mx::transpose(rows, cpu), x, cpu)};
  };
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  return make("Linear", {shape}, {plain(x), plain(weight)}, prepare, gradient)[0];
}

// y (..., outputs) + h (..., rank) · b (rank, outputs), in the memory of y if nothing else needs it.
mx::array add_product(const mx::array& y, const mx::array& h, const mx::array& b) {
  const bool fit = y.ndim() > 0 && h.ndim() > 0 && b.ndim() == 2 && h.shape(-1) == b.shape(0) &&
      y.shape(-1) == b.shape(1) && rows_of(y) == rows_of(h);
  if (!fit) throw std::invalid_argument("the shapes of y, h and b do not fit each other");
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    const mx::array &y = in[0], &h = in[1], &b = in[2];
    const bool shared = y.is_donatable() && y.flags().row_contiguous;
    if (shared)
      out[0].copy_shared_buffer(y);
    else
      allocate(out[0]);
    return [from = shared ? nullptr : y.data<float>(), to = out[0].data<float>(), h = h.data<float>(),
            b = b.data<float>(), rows = rows_of(y), rank = width_of(h), width = width_of(y)] {
      if (from != nullptr) std::copy(from, from + rows * width, to);
      if (rows * width * rank > 0) tunesmith::product(false, false, rows, width, rank, 1, h, rank, b, width, 1, to, width);
    };
  };
  const auto gradient = [](const Arrays& in, const Arrays&, const Arrays& cotangents) {
    const mx::Device cpu = mx::Device::cpu;
    const mx::array &h = in[1], &b = in[2], &c = cotangents[0];
    const mx::array rows = mx::reshape(c, {-1, b.shape(1)}, cpu), inner = mx::reshape(h, {-1, b.shape(0)}, cpu);
    return Arrays{c, mx::matmul(c, mx::transpose(b, cpu), cpu), mx::matmul(mx::transpose(inner, cpu), rows, cpu)};
  };
  return make("AddProduct", {y.shape()}, {plain(y), plain(h), plain(b)}, prepare, gradient)[0];
}

// Dropout ----------------------------------------------------

// x · scale where the mask of `key` (2,) uint32 keeps it, else 0; plus `onto`.
mx::array dropout(
    const mx::array& x, const mx::array& key, float keep, float scale, const std::optional<mx::array>& onto) {
  if (key.size() != 2 || key.dtype() != mx::uint32) throw std::invalid_argument("the key must be (2,) uint32");
  if (onto && onto->shape() != x.shape()) throw std::invalid_argument("onto must have the shape of x");
  const tunesmith::Dropout options{keep, scale};
  const auto prepare = [options](const Arrays& in, Arrays& out, auto&) {
    const bool added = in.size() > 2;
    const bool shared = added && in[2].is_donatable() && in[2].flags().row_contiguous;
    if (shared)
      out[0].copy_shared_buffer(in[2]);
    else
      allocate(out[0]);
    return [x = in[0].data<float>(), key = in[1].data<uint32_t>(), onto = added ? in[2].data<float>() : nullptr,
            y = out[0].data<float>(), size = in[0].size(),
            options] { tunesmith::dropout(x, onto, y, size, key, options); };
  };
  const auto gradient = [options](const Arrays& in, const Arrays&, const Arrays& cotangents) {
    const mx::array of_x = dropout(cotangents[0], in[1], options.keep, options.scale, std::nullopt);
    if (in.size() == 2) return Arrays{of_x};
    return Arrays{of_x, mx::zeros_like(in[1], mx::Device::cpu), cotangents[0]};
  };
  Arrays inputs{plain(x), mx::contiguous(key, false, mx::Device::cpu)};
  if (onto) inputs.push_back(plain(*onto));
  return make("Dropout", {x.shape()}, inputs, prepare, gradient)[0];
}

// Cross-entropy ----------------------------------------------

Arrays logprobs_gradient(const Arrays& in, const Arrays&, const Arrays& cotangents) {
  return make("LogProbsGradient", {in[0].shape()}, {in[0], in[1], plain(cotangents[0])},
              [](const Arrays& in, Arrays& out, auto&) {
                return [x = in[0].data<float>(), t = in[1].data<int32_t>(), c = in[2].data<float>(),
                        y = allocate(out[0]), rows = rows_of(in[0]), width = width_of(in[0])] {
                  tunesmith::logprobs_gradient(x, t, c, y, rows, width);
                };
              });
}

// (K, V), (K,) -> (K,) log p of each target; NaN where the target is not one of the V.
mx::array logprobs(const mx::array& logits, const mx::array& targets) {
  if (logits.ndim() != 2 || targets.ndim() != 1 || logits.shape(0) != targets.shape(0))
    throw std::invalid_argument("logits must be (K, V) and targets (K,)");
  const mx::array ids =
      mx::contiguous(mx::astype(targets, mx::int32, mx::Device::cpu), false, mx::Device::cpu);
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    return [x = in[0].data<float>(), t = in[1].data<int32_t>(), y = allocate(out[0]), rows = rows_of(in[0]),
            width = width_of(in[0])] { tunesmith::logprobs(x, t, y, rows, width); };
  };
  return make("LogProbs", {{logits.shape(0)}}, {plain(logits), ids}, prepare, logprobs_gradient)[0];
}

Arrays divergences_gradient(const Arrays& in, const Arrays&, const Arrays& cotangents) {
  const mx::array of_model = make("DivergencesGradient", {in[0].shape()}, {in[0], in[1], plain(cotangents[0])},
                                  [](const Arrays& in, Arrays& out, auto&) {
                                    return [b = in[0].data<float>(), x = in[1].data<float>(),
                                            c = in[2].data<float>(), y = allocate(out[0]), rows = rows_of(in[0]),
                                            width = width_of(in[0])] {
                                      tunesmith::divergences_gradient(b, x, c, y, rows, width);
                                    };
                                  })[0];
  return {mx::zeros_like(in[0], mx::Device::cpu), of_model};
}

// (K, V), (K, V) -> (K,) KL(base‖model) in nats. The base gets no gradient.
mx::array divergences(const mx::array& base, const mx::array& logits) {
  if (logits.ndim() != 2 || base.shape() != logits.shape())
    throw std::invalid_argument("base and logits must be (K, V)");
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    return [b = in[0].data<float>(), x = in[1].data<float>(), y = allocate(out[0]), rows = rows_of(in[0]),
            width = width_of(in[0])] { tunesmith::divergences(b, x, y, rows, width); };
  };
  return make("Divergences", {{logits.shape(0)}}, {plain(base), plain(logits)}, prepare, divergences_gradient)[0];
}

Arrays log_sums_gradient(const Arrays& in, const Arrays&, const Arrays& cotangents) {
  return make("LogSumsGradient", {in[0].shape()}, {in[0], plain(cotangents[0])},
              [](const Arrays& in, Arrays& out, auto&) {
                return [x = in[0].data<float>(), c = in[1].data<float>(), y = allocate(out[0]),
                        rows = rows_of(in[0]), width = width_of(in[0])] {
                  tunesmith::log_sums_gradient(x, c, y, rows, width);
                };
              });
}

// (..., V) -> (...) log of the sum of e^x.
mx::array log_sums(const mx::array& logits) {
  if (logits.ndim() == 0) throw std::invalid_argument("logits must be (..., V)");
  mx::Shape rows = logits.shape();
  rows.pop_back();
  const auto prepare = [](const Arrays& in, Arrays& out, auto&) {
    return [x = in[0].data<float>(), y = allocate(out[0]), rows = rows_of(in[0]), width = width_of(in[0])] {
      tunesmith::log_sums(x, y, rows, width);
    };
  };
  return make("LogSums", {rows}, {plain(logits)}, prepare, log_sums_gradient)[0];
}

// RMSNorm ----------------------------------------------------

// in: x, then the weight if there is one.
Arrays rms_norm_gradient(const Arrays& in, const mx::array& cotangent, float eps) {
  const bool weighted = in.size() > 1;
  const mx::array c = plain(cotangent);
  Arrays inputs = in;
  inputs.push_back(c);
  const auto of_x = [eps, weighted](const Arrays& in, Arrays& out, auto&) {
    return [x = in[0].data<float>(), w = weighted ? in[1].data<float>() : nullptr, c = in.back().data<float>(),
            y = allocate(out[0]), rows = rows_of(in[0]), width = width_of(in[0]),
            eps] { tunesmith::rms_norm_gradient(x, w, c, y, rows, width, eps); };
  };
  const auto of_weight = [eps](const Arrays& in, Arrays& out, auto& encoder) {
    const int64_t rows = rows_of(in[0]), width = width_of(in[0]);
    return [x = in[0].data<float>(), c = in[1].data<float>(), y = allocate(out[0]),
            parts = allocate(tunesmith::row_groups(rows), width, encoder), rows, width,
            eps] { tunesmith::rms_norm_weight_gradient(x, c, y, parts, rows, width, eps); };
  };
  Arrays slopes = make("RMSNormGradient", {in[0].shape()}, inputs, of_x);
  if (weighted) slopes.push_back(make("RMSNormWeightGradient", {in[1].shape()}, {in[0], c}, of_weight)[0]);
  return slopes;
}

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps) {
  if (x.ndim() == 0 || (weight && (weight->ndim() != 1 || static_cast<int>(weight->size()) != x.shape(-1))))
    throw std::invalid_argument("the weight must be as long as a row of x");
  const Arrays inputs = weight ? Arrays{plain(x), plain(*weight)} : Arrays{plain(x)};
  const auto prepare = [eps](const Arrays& in, Arrays& out, auto&) {
    return [x = in[0].data<float>(), w = in.size() > 1 ? in[1].data<float>() : nullptr, y = allocate(out[0]),
            rows = rows_of(in[0]), width = width_of(in[0]), eps] {
      tunesmith::rms_norm(x, w, y, rows, width, eps);
    };
  };
  const auto gradient = [eps](const Arrays& in, const Arrays&, const Arrays& cotangents) {
    return rms_norm_gradient(in, cotangents[0], eps);
  };
  return make("RMSNorm", {x.shape()}, inputs, prepare, gradient)[0];
}

// Arrays (B, H, T, D) ----------------------------------------

// A result (B, H, T, D) that lies in memory as (B, T, H, D): the model puts the heads beside each other next.
tunesmith::Result allocate_by_row(mx::array& result) {
  const int64_t heads = result.shape(1), rows = result.shape(2), width = result.shape(3);
  const mx::Strides strides{rows * heads * width, width, heads * width, 1};
  const mx::array::Flags flags{true, heads == 1 || rows == 1, false};
  result.set_data(memory(result.nbytes()), result.size(), strides, flags);
  return {result.data<float>(), {strides[0], strides[1], strides[2]}};
}

// `x` (B, H, T, D) as it lies, or a copy if a BLAS cannot read its rows: gaps in the last dimension, or rows
// that overlap, repeat or run backwards.
tunesmith::Operand operand(const mx::array& x, mx::cpu::CommandEncoder& encoder) {
  const int64_t row = x.strides(-2);
  if (x.strides(-1) == 1 && row >= std::max<int64_t>(1, x.shape(-1)) && row <= std::numeric_limits<int>::max())
    return {x.data<float>(), {x.strides(0), x.strides(1), x.strides(2)}};
  mx::array copy(x.shape(), mx::float32, nullptr, {});
  float* to = allocate(copy);
  encoder.add_temporary(copy);
  encoder.dispatch([from = x.data<float>(), to, shape = x.shape(), strides = x.strides()] {
    int64_t place = 0;
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h)
        for (int64_t t = 0; t < shape[2]; ++t)
          for (int64_t d = 0; d < shape[3]; ++d)
            to[place++] = from[b * strides[0] + h * strides[1] + t * strides[2] + d * strides[3]];
  });
  const int64_t width = x.shape(3), rows = x.shape(2), heads = x.shape(1);
  return {to, {heads * rows * width, rows * width, width}};
}

void check_heads(const mx::array& x, const char* name) {
  if (x.ndim() != 4 || x.dtype() != mx::float32)
    throw std::invalid_argument(std::string(name) + " must be (B, H, T, D) float32");
}

struct AttentionOptions {
  float scale;
  bool causal;
  std::vector<int64_t> ends;
  bool masked;
};

tunesmith::Heads heads_of(const Arrays& in, float scale) {
  const auto &q = in[0], &k = in[1], &v = in[2];
  return {q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3), scale};
}

tunesmith::Mask mask_of(
    const Arrays& in, const AttentionOptions& options, mx::cpu::CommandEncoder& encoder) {
  tunesmith::Mask mask{options.causal, options.ends};
  if (options.masked) {
    static_assert(sizeof(tunesmith::Span) == 3 * sizeof(float));
    const mx::array& allowed = in[3];
    mask.allowed = allowed.data<bool>();
    mask.of_batch = allowed.strides(0), mask.of_head = allowed.strides(1);
    mask.of_query = allowed.strides(2), mask.of_key = allowed.strides(3);
    mask.batches = mask.of_batch == 0 ? 1 : allowed.shape(0);
    mask.heads = mask.of_head == 0 ? 1 : allowed.shape(1);
    float* spans = allocate(mask.batches * mask.heads * allowed.shape(2), 3, encoder);
    mask.spans = reinterpret_cast<tunesmith::Span*>(spans);
  }
  return mask;
}

Arrays attention_gradient(
    const Arrays& in, const Arrays& results, const mx::array& cotangent, const AttentionOptions& options) {
  Arrays inputs = in;
  inputs.insert(inputs.end(), {results[0], results[1], cotangent});
  const auto prepare = [options](const Arrays& in, Arrays& out, auto& encoder) {
    const mx::array *output = &in[in.size() - 3], *normalisers = &in[in.size() - 2], *cotangent = &in.back();
    const tunesmith::Heads shape = heads_of(in, options.scale);
    const tunesmith::Mask mask = mask_of(in, options, encoder);
    const tunesmith::GradientPlan plan(shape, mask);
    const tunesmith::Gradients slopes{allocate_by_row(out[0]), allocate_by_row(out[1]), allocate_by_row(out[2])};
    const tunesmith::Forward forward{operand(in[0], encoder),      operand(in[1], encoder),
                                     operand(in[2], encoder),      operand(*output, encoder),
                                     operand(*cotangent, encoder), normalisers->data<float>()};
    return [shape, mask, plan, slopes, forward, own = scratch(plan.scratch(shape), encoder),
            parts = allocate(shape.batches * shape.heads, plan.part(shape), encoder)] {
      tunesmith::attend_gradient(shape, mask, plan, forward, slopes, own, parts);
    };
  };
  return make("AttentionGradient", {in[0].shape(), in[1].shape(), in[2].shape()}, inputs, prepare);
}

// queries (B, H, T, D), keys (B, K, S, D), values (B, K, S, E) -> (B, H, T, E). `causal`: the last query is that
// of the last key. `ends`: rows end to end, T = S, without a mask. `allowed`: boolean, broadcast to (B, H, T, S).
mx::array attention(
    const mx::array& q, const mx::array& k, const mx::array& v, float scale, bool causal,
    std::vector<int64_t> ends, const std::optional<mx::array>& allowed) {
  check_heads(q, "queries"), check_heads(k, "keys"), check_heads(v, "values");
  const bool fit = k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) && k.shape(1) == v.shape(1) &&
      k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0 && k.shape(2) == v.shape(2) && k.shape(3) == q.shape(3) &&
      (ends.empty() || (causal && !allowed && k.shape(2) == q.shape(2) &&
                        *std::max_element(ends.begin(), ends.end()) <= q.shape(2)));
  if (!fit) throw std::invalid_argument("the shapes of queries, keys and values do not fit each other");
  Arrays inputs{q, k, v};
  if (allowed) {
    if (allowed->dtype() != mx::bool_) throw std::invalid_argument("the mask must be boolean");
    inputs.push_back(
        mx::broadcast_to(*allowed, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, mx::Device::cpu));
  }
  const AttentionOptions options{scale, causal, std::move(ends), allowed.has_value()};
  mx::Shape mixed = q.shape(), rows{q.shape(0), q.shape(1), q.shape(2)};
  mixed.back() = v.shape(3);
  const auto prepare = [options](const Arrays& in, Arrays& out, auto& encoder) {
    const tunesmith::Heads shape = heads_of(in, options.scale);
    const tunesmith::Mask mask = mask_of(in, options, encoder);
    return [shape, mask, q = operand(in[0], encoder), k = operand(in[1], encoder), v = operand(in[2], encoder),
            y = allocate_by_row(out[0]), normalisers = allocate(out[1]),
            own = scratch(tunesmith::attend_scratch(shape, mask), encoder)] {
      tunesmith::attend(shape, mask, q, k, v, y, normalisers, own);
    };
  };
  const auto gradient = [options](const Arrays& in, const Arrays& results, const Arrays& cotangents) {
    return attention_gradient(in, results, cotangents[0], options);
  };
  return make("Attention", {mixed, rows}, inputs, prepare, gradient)[0];
}

struct RotaryOptions {
  int dims;
  bool traditional;
  std::optional<double> base;
  float scale;
  bool inverse;
};

// in: x (B, H, T, D), the first positions (1,) or (B,), and the wavelengths (dims / 2,) unless there is a base.
mx::array rotated(const Arrays& inputs, const RotaryOptions& options) {
  const auto prepare = [options](const Arrays& in, Arrays& out, auto& encoder) {
    const mx::array &x = in[0], &first = in[1];
    const tunesmith::Rotation of{x.shape(0),   x.shape(1),          x.shape(2),     x.shape(3),
                                 options.dims, options.traditional, options.inverse};
    return [options, of, from = operand(x, encoder), to = allocate_by_row(out[0]), first = first.data<int32_t>(),
            firsts = first.size(), waves = in.size() > 2 ? in[2].data<float>() : nullptr] {
      std::vector<int64_t> offsets(of.batches);
      for (int64_t batch = 0; batch < of.batches; ++batch) offsets[batch] = first[firsts == 1 ? 0 : batch];
      std::vector<float> frequencies(of.dims / 2);
      for (int64_t j = 0; j < of.dims / 2; ++j)
        frequencies[j] =
            waves ? 1.0f / waves[j] : static_cast<float>(std::pow(*options.base, -2.0 * j / of.dims));
      tunesmith::rotate(from.data, from.distance, to.data, to.distance, of, offsets, frequencies, options.scale);
    };
  };
  const auto gradient = [options](const Arrays& in, const Arrays&, const Arrays& cotangents) {
    RotaryOptions back = options;
    back.inverse = !options.inverse;
    Arrays inputs = in;
    inputs[0] = cotangents[0];
    return Arrays{rotated(inputs, back)};
  };
  return make("Rotary", {inputs[0].shape()}, inputs, prepare, gradient)[0];
}

mx::array rotary(
    const mx::array& x, int dims, bool traditional, std::optional<double> base, float scale,
    const mx::array& offset, const std::optional<mx::array>& wavelengths) {
  check_heads(x, "x");
  const auto offsets = static_cast<int64_t>(offset.size());
  const bool fit = dims > 0 && dims <= x.shape(3) && dims % 2 == 0 &&
      base.has_value() != wavelengths.has_value() && (offsets == 1 || offsets == x.shape(0)) &&
      (!wavelengths || static_cast<int64_t>(wavelengths->size()) == dims / 2);
  if (!fit) throw std::invalid_argument("the arguments of the rotary embeddings do not fit each other");
  const mx::Device cpu = mx::Device::cpu;
  Arrays inputs{x, mx::contiguous(mx::astype(offset, mx::int32, cpu), false, cpu)};
  if (wavelengths) inputs.push_back(plain(mx::astype(*wavelengths, mx::float32, cpu)));
  return rotated(inputs, {dims, traditional, base, scale, false});
}

}  // namespace

NB_MODULE(tunesmith_cpu, module) {
  module.def("set_threads", [](int count) { tunesmith::thread_count() = std::max(1, count); });
  module.def("swiglu", &swiglu);
  module.def("gelu", &gelu);
  module.def("logprobs", &logprobs);
  module.def("log_sums", &log_sums);
  module.def("divergences", &divergences);
  module.def("linear", &linear);
  module.def("add_product", &add_product);
  module.def("dropout", &dropout, "x"_a, "key"_a, "keep"_a, "scale"_a, "onto"_a.none());
  module.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
  module.def("attention", &attention, "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a, "ends"_a,
             "allowed"_a.none());
  module.def("rotary", &rotary, "x"_a, "dims"_a, "traditional"_a, "base"_a.none(), "scale"_a, "offset"_a,
             "wavelengths"_a.none());
}
