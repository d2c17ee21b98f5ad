// What stands between the matrix products of a block of GPT-2 and in its loss, each in one pass.
//
// `A` is the type of activations, bfloat16 or float32; arithmetic is in float32. Sums over rows are
// taken a part of the rows to a thread and then in the order of threads, so that a run repeats to the
// bit on the same number of threads.
//
// Letters: N rows (tokens of a batch), D model width (a multiple of 16), V vocabulary.

#include <omp.h>

#include "lanes.h"

namespace {

// Sums over rows, of `n_sums` quantities with `width` columns each.
class ColumnSums {
 public:
  ColumnSums(int64_t n_sums, int64_t width)
      : size_(n_sums * width), data_(omp_get_max_threads() * n_sums * width) {
    std::memset(data_, 0, omp_get_max_threads() * size_ * sizeof(float));
  }
  float* mine() const { return data_ + omp_get_thread_num() * size_; }
  // Columns `first` to `first + n` of all threads, into `out`; skipped if that is null.
  void finish(int64_t first, int64_t n, float* out) const {
    if (!out) return;
    std::memset(out, 0, n * sizeof(float));
    for (int64_t t = 0; t < omp_get_max_threads(); ++t)
      for (int64_t j = 0; j < n; ++j) out[j] += data_[t * size_ + first + j];
  }

 private:
  int64_t size_;
  Buffer<float> data_;
};

inline void add_to(float* p, __m512 x) { store(p, _mm512_add_ps(load(p), x)); }

// The row x + y (y may be null) in `row`, its mean and the inverse of its deviation.
template <typename A>
inline void standardize(const float* x, const A* y, int64_t D, float eps, float* row, __m512* mean,
                        __m512* inverse) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < D; j += kLanes) {
    __m512 v = load(x + j);
    if (y) v = _mm512_add_ps(v, load(y + j));
    store(row + j, v);
    sum = _mm512_add_ps(sum, v);
  }
  const float mu = _mm512_reduce_add_ps(sum) / D;
  *mean = _mm512_set1_ps(mu);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < D; j += kLanes) {
    const __m512 v = _mm512_sub_ps(load(row + j), *mean);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  *inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps));
}

// out = layer_norm(x + y); the sum goes into `total`. y and total may be null.
template <typename A>
void add_layer_norm(const float* x, const A* y, const float* weight, const float* bias, float eps,
                    float* total, A* out, int64_t N, int64_t D) {
#pragma omp parallel
  {
    Buffer<float> row(D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      __m512 mean, inverse;
      standardize(x + i * D, y ? y + i * D : nullptr, D, eps, row, &mean, &inverse);
      for (int64_t j = 0; j < D; j += kLanes) {
        const __m512 v = load(row + j);
        if (total) store(total + i * D + j, v);
        const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(v, mean), inverse);
        store(out + i * D + j, _mm512_fmadd_ps(unit, load(weight + j), load(bias + j)));
      }
    }
  }
}

// Of z = layer_norm(x + y) and a residual stream that goes past it:
// grad = grad_stream + (gradient of x + y by grad_z), also rounded into `rounded` (may be null).
// The gradients of weight and bias and the sum of `grad` over rows (may be null: the bias of the
// projection that made y) come with it.
template <typename A>
void add_layer_norm_backward(const float* x, const A* y, const float* weight, float eps,
                             const A* grad_z, const float* grad_stream, float* grad, A* rounded,
                             float* grad_weight, float* grad_bias, float* grad_sum, int64_t N,
                             int64_t D) {
  ColumnSums sums(3, D);
#pragma omp parallel
  {
    Buffer<float> row(D);
    float* mine = sums.mine();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      __m512 mean, inverse;
      standardize(x + i * D, y ? y + i * D : nullptr, D, eps, row, &mean, &inverse);
      __m512 dot = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < D; j += kLanes) {
        const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(row + j), mean), inverse);
        const __m512 gz = load(grad_z + i * D + j), g = _mm512_mul_ps(gz, load(weight + j));
        store(row + j, unit);
        add_to(mine + j, _mm512_mul_ps(gz, unit));
        add_to(mine + D + j, gz);
        dot = _mm512_fmadd_ps(g, unit, dot);
        sum = _mm512_add_ps(sum, g);
      }
      const __m512 projection = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
      const __m512 average = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
      for (int64_t j = 0; j < D; j += kLanes) {
        const __m512 g = _mm512_mul_ps(load(grad_z + i * D + j), load(weight + j));
        __m512 d = _mm512_fnmadd_ps(load(row + j), projection, _mm512_sub_ps(g, average));
        d = _mm512_fmadd_ps(d, inverse, load(grad_stream + i * D + j));
        store(grad + i * D + j, d);
        if (rounded) store(rounded + i * D + j, d);
        if (grad_sum) add_to(mine + 2 * D + j, d);
      }
    }
  }
  sums.finish(0, D, grad_weight);
  sums.finish(D, D, grad_bias);
  sums.finish(2 * D, D, grad_sum);
}

// The tanh approximation of GELU is x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline __m512 gelu_gate(__m512 x, __m512 squared) {
  const __m512 cubic = _mm512_fmadd_ps(squared, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const float factor = -2 * 0.7978845608028654f * kLog2E;
  __m512 z = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(factor));
  z = _mm512_min_ps(_mm512_set1_ps(126.0f), z);  // NaN stays, as in exp2
  return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(_mm512_set1_ps(1.0f), exp2(z)));
}

// size: a multiple of 16.
template <typename A>
void gelu(const A* x, A* out, int64_t size) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < size; i += kLanes) {
    const __m512 v = load(x + i);
    store(out + i, _mm512_mul_ps(v, gelu_gate(v, _mm512_mul_ps(v, v))));
  }
}

// out = gelu(x) once more; grad *= gelu'(x); grad_sum: grad summed over rows, the bias's gradient.
template <typename A>
void gelu_backward(const A* x, A* grad, A* out, float* grad_sum, int64_t N, int64_t width) {
  ColumnSums sums(1, width);
#pragma omp parallel
  {
    float* mine = sums.mine();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t at = i * width + j;
        const __m512 v = load(x + at), squared = _mm512_mul_ps(v, v), gate = gelu_gate(v, squared);
        const __m512 value = _mm512_mul_ps(v, gate);
        // gelu' = gate + value * (1 - gate) * 2 u'
        const float factor = 2 * 0.7978845608028654f;
        const __m512 slope = _mm512_fmadd_ps(squared, _mm512_set1_ps(3 * 0.044715f * factor),
                                             _mm512_set1_ps(factor));
        const __m512 rest = _mm512_fnmadd_ps(value, gate, value);
        const __m512 derivative = _mm512_fmadd_ps(rest, slope, gate);
        const __m512 g = _mm512_mul_ps(load(grad + at), derivative);
        store(grad + at, g);
        store(out + at, value);
        add_to(mine + j, g);
      }
  }
  sums.finish(0, width, grad_sum);
}

// out = x rounded (may be null); sum: x summed over rows.
template <typename X, typename A>
void sum_rows(const X* x, A* out, float* sum, int64_t N, int64_t width) {
  ColumnSums sums(1, width);
#pragma omp parallel
  {
    float* mine = sums.mine();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < width; j += kLanes) {
        const __m512 v = load(x + i * width + j);
        if (out) store(out + i * width + j, v);
        add_to(mine + j, v);
      }
  }
  sums.finish(0, width, sum);
}

template <typename A>
inline __m512 load_masked(const A* p, __mmask16 lanes, __m512 otherwise);
template <>
inline __m512 load_masked(const float* p, __mmask16 lanes, __m512 otherwise) {
  return _mm512_mask_loadu_ps(otherwise, lanes, p);
}
template <>
inline __m512 load_masked(const bf16* p, __mmask16 lanes, __m512 otherwise) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return _mm512_mask_mov_ps(otherwise, lanes, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}
inline void store_masked(float* p, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(p, lanes, x); }
inline void store_masked(bf16* p, __mmask16 lanes, __m512 x) {
  _mm256_mask_storeu_epi16(p, lanes, to_bf16(x));
}

// losses[i] = -log softmax(logits[i] + bias)[targets[i]]; over the logits, its gradient. A row of
// 50,257 logits stays in a core's cache, so memory is read once and written once.
template <typename A>
void cross_entropy(A* logits, const float* bias, const int64_t* targets, float* losses, int64_t N,
                   int64_t V) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY), log2e = _mm512_set1_ps(kLog2E);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    A* row = logits + i * V;
    const auto score = [&](int64_t j, __mmask16 lanes) {
      const __m512 x = load_masked(row + j, lanes, lowest);
      return bias ? _mm512_add_ps(x, load_masked(bias + j, lanes, _mm512_setzero_ps())) : x;
    };
    __m512 largest = lowest;
    for (int64_t j = 0; j < V; j += kLanes)  // max returns its second operand if one is NaN
      largest = _mm512_max_ps(largest, score(j, lanes_below(j, V)));
    const float top = _mm512_reduce_max_ps(largest);
    const __m512 shift = _mm512_set1_ps(-top * kLog2E);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < V; j += kLanes)
      total = _mm512_add_ps(total, exp2(_mm512_fmadd_ps(score(j, lanes_below(j, V)), log2e, shift)));
    const float sum = _mm512_reduce_add_ps(total);
    const int64_t target = targets[i];
    float target_score = _mm512_cvtss_f32(score(target, 1));
    losses[i] = std::log(sum) + top - target_score;
    const __m512 inverse = _mm512_set1_ps(1.0f / sum);
    for (int64_t j = 0; j < V; j += kLanes) {
      const __mmask16 lanes = lanes_below(j, V);
      __m512 p = exp2(_mm512_fmadd_ps(score(j, lanes), log2e, shift));
      p = _mm512_mul_ps(p, inverse);
      if (target >= j && target < j + kLanes) {
        const __mmask16 lane = static_cast<__mmask16>(1u << (target - j));
        p = _mm512_mask_sub_ps(p, lane, p, _mm512_set1_ps(1.0f));
      }
      store_masked(row + j, lanes, p);
    }
  }
}

}  // namespace

#define KERNELS(A, SUFFIX)                                                                           \
  extern "C" void add_layer_norm_##SUFFIX(const float* x, const A* y, const float* weight,           \
                                          const float* bias, float* total, A* out, int64_t N,        \
                                          int64_t D, float eps) {                                    \
    add_layer_norm(x, y, weight, bias, eps, total, out, N, D);                                       \
  }                                                                                                  \
  extern "C" void add_layer_norm_backward_##SUFFIX(                                                  \
      const float* x, const A* y, const float* weight, const A* grad_z, const float* grad_stream,    \
      float* grad, A* rounded, float* grad_weight, float* grad_bias, float* grad_sum, int64_t N,     \
      int64_t D, float eps) {                                                                        \
    add_layer_norm_backward(x, y, weight, eps, grad_z, grad_stream, grad, rounded, grad_weight,      \
                            grad_bias, grad_sum, N, D);                                              \
  }                                                                                                  \
  extern "C" void gelu_##SUFFIX(const A* x, A* out, int64_t size) { gelu(x, out, size); }            \
  extern "C" void gelu_backward_##SUFFIX(const A* x, A* grad, A* out, float* grad_sum, int64_t N,    \
                                         int64_t width) {                                            \
    gelu_backward(x, grad, out, grad_sum, N, width);                                                 \
  }                                                                                                  \
  extern "C" void round_and_sum_rows_##SUFFIX(const float* x, A* out, float* sum, int64_t N,         \
                                              int64_t width) {                                       \
    sum_rows(x, out, sum, N, width);                                                                 \
  }                                                                                                  \
  extern "C" void sum_rows_##SUFFIX(const A* x, float* sum, int64_t N, int64_t width) {              \
    sum_rows(x, static_cast<A*>(nullptr), sum, N, width);                                            \
  }                                                                                                  \
  extern "C" void cross_entropy_##SUFFIX(A* logits, const float* bias, const int64_t* targets,       \
                                         float* losses, int64_t N, int64_t V) {                      \
    cross_entropy(logits, bias, targets, losses, N, V);                                              \
  }

KERNELS(float, float32)
KERNELS(bf16, bfloat16)
