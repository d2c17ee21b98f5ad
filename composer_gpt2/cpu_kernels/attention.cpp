// Causal attention in bfloat16, forward and backward, without ever storing T x T scores.
//
// Dao et al., 2022, "FlashAttention", https://arxiv.org/abs/2205.14135, algorithms 2 and 4, laid out
// for a CPU: the keys and values of one head stay in its core's cache, so a few queries at a time see
// all their keys at once and the softmax needs no rescaling.
//
// Every product is  C (M x N, float32) [+]= A (M x K, rows) * B (K x N, pairs)  where "pairs" is the
// layout of AVX512-BF16: element (k, n) is at [k / 2][n][k % 2], two bfloat16 in one 32-bit lane.
//
// Letters: B batch, T tokens, H heads, D width of a head (a multiple of 16).

#include "lanes.h"

namespace {

constexpr int64_t kRows = 48;    // queries (forward) or keys (backward) at a time; 8 tiles of 6
constexpr int64_t kTile = 6;     // rows of a tile: 6 x 4 accumulators leave 8 of 32 registers
constexpr int64_t kColumns = 64; // columns of a tile, 4 registers
constexpr int64_t kChunk = 256;  // queries at a time in the backward pass

inline __m512i load_pairs(const void* p) { return _mm512_loadu_si512(p); }

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// One tile of C: R rows, V registers of columns.
template <int R, int V>
inline void multiply_tile(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                          int64_t ldc, int64_t n_pairs, bool accumulate) {
  __m512 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      sum[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < n_pairs; ++k) {
    __m512bh columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = as_bf16(load_pairs(b + k * ldb + v * 2 * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * k, 4);
      const __m512bh row = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
}

template <int V>
inline void multiply_rows(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c,
                          int64_t ldc, int64_t m, int64_t n_pairs, bool accumulate) {
  int64_t i = 0;
  for (; i + kTile <= m; i += kTile)
    multiply_tile<kTile, V>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, n_pairs, accumulate);
  for (; i + 4 <= m; i += 4)
    multiply_tile<4, V>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, n_pairs, accumulate);
  for (; i < m; ++i)
    multiply_tile<1, V>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, n_pairs, accumulate);
}

// C[m x n] [+]= A[m x k] * B[k x n in pairs]; n is a multiple of 16, k of 2; ldb counts bfloat16 in
// a pair of rows (2 x the width of B).
void multiply(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* c, int64_t ldc,
              int64_t m, int64_t n, int64_t k, bool accumulate) {
  int64_t j = 0;
  for (; j + kColumns <= n; j += kColumns)
    multiply_rows<4>(a, lda, b + 2 * j, ldb, c + j, ldc, m, k / 2, accumulate);
  for (; j < n; j += kLanes)
    multiply_rows<1>(a, lda, b + 2 * j, ldb, c + j, ldc, m, k / 2, accumulate);
}

// Rows (n x width, leading dimension ld) as the right operand whose rows they are: [n/2][width][2].
void pack_rows(const bf16* rows, int64_t ld, int64_t n, int64_t width, bf16* out) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 2) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const auto* p = rows + i * ld + j;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
      const __m512i odd =
          i + 1 < n ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + ld))) : zero;
      _mm512_storeu_si512(out + i * width + 2 * j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// Rows as the right operand whose columns they are: [width/2][n_padded][2], zeros beyond n.
void pack_columns(const bf16* rows, int64_t ld, int64_t n, int64_t n_padded, int64_t width, bf16* out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < width / 2; ++j) {
      uint32_t pair;
      std::memcpy(&pair, rows + i * ld + 2 * j, 4);
      pairs[j * n_padded + i] = pair;
    }
  for (int64_t j = 0; j < width / 2; ++j)
    for (int64_t i = n; i < n_padded; ++i) pairs[j * n_padded + i] = 0;
}

inline __m512 lane_numbers(int64_t first) {
  return _mm512_add_ps(_mm512_set1_ps(static_cast<float>(first)),
                       _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

}  // namespace

// qkv: (B, T, 3, H, D); out: (B, T, H, D); log_sums: (B, H, T), base-2 logarithms of the softmax's
// denominators; slopes: (H), of ALiBi, or null.
extern "C" void attention_forward(const bf16* qkv, bf16* out, float* log_sums, const float* slopes,
                                  int64_t B, int64_t T, int64_t H, int64_t D, float scale) {
  const int64_t ld = 3 * H * D, padded = round_up(T, kColumns);
#pragma omp parallel
  {
    Buffer<bf16> keys(D * padded), values(padded * D), weights(kRows * padded);
    Buffer<float> scores(kRows * padded), sums(kRows * D);
#pragma omp for schedule(dynamic)
    for (int64_t bh = 0; bh < B * H; ++bh) {
      const int64_t b = bh / H, h = bh % H;
      const bf16* q = qkv + b * T * ld + h * D;
      const bf16* k = q + H * D;
      const bf16* v = k + H * D;
      const float slope = slopes ? slopes[h] * kLog2E : 0.0f;
      pack_columns(k, ld, T, padded, D, keys);
      pack_rows(v, ld, T, D, values);
      for (int64_t first = 0; first < T; first += kRows) {
        const int64_t n_rows = std::min(kRows, T - first);
        const int64_t n_keys = std::min(round_up(first + n_rows, kColumns), padded);
        multiply(q + first * ld, ld, keys, 2 * padded, scores, padded, n_rows, n_keys, D, false);
        // Pairs of keys go into the second product; an odd last key has a zero beside it.
        const int64_t n_summed = round_up(first + n_rows, 2);
        for (int64_t r = 0; r < n_rows; ++r) {
          const int64_t query = first + r, end = query + 1;
          float* s = scores + r * padded;
          bf16* w = weights + r * padded;
          const __m512 factor = _mm512_set1_ps(scale * kLog2E), minus = _mm512_set1_ps(-INFINITY);
          const __m512 bias = _mm512_set1_ps(slope);
          __m512 largest = minus;
          for (int64_t j = 0; j < end; j += kLanes) {
            __m512 x = _mm512_mul_ps(load(s + j), factor);
            if (slopes) x = _mm512_fmadd_ps(bias, lane_numbers(j - query), x);
            x = _mm512_mask_mov_ps(minus, lanes_below(j, end), x);
            store(s + j, x);
            largest = _mm512_max_ps(largest, x);
          }
          const float top = _mm512_reduce_max_ps(largest);
          const __m512 shift = _mm512_set1_ps(top);
          __m512 total = _mm512_setzero_ps();
          int64_t j = 0;
          for (; j < end; j += kLanes) {
            const __m512 x = _mm512_sub_ps(load(s + j), shift);
            const __m512 e = _mm512_maskz_mov_ps(lanes_below(j, end), exp2(x));
            total = _mm512_add_ps(total, e);
            store(w + j, e);
          }
          for (; j < n_summed; j += kLanes)
            store(w + j, _mm512_setzero_ps());
          const float sum = _mm512_reduce_add_ps(total);
          log_sums[bh * T + query] = top + std::log2(sum);
          s[0] = 1.0f / sum;  // the scores of this row are done with
        }
        multiply(weights, padded, values, 2 * D, sums, D, n_rows, D, n_summed, false);
        for (int64_t r = 0; r < n_rows; ++r) {
          const __m512 inverse = _mm512_set1_ps(scores[r * padded]);
          bf16* o = out + ((b * T + first + r) * H + h) * D;
          for (int64_t d = 0; d < D; d += kLanes) {
            const __m512 x = _mm512_mul_ps(load(sums + r * D + d), inverse);
            store(o + d, x);
          }
        }
      }
    }
  }
}

// grad_out: as out; grad_qkv: as qkv, written in full.
extern "C" void attention_backward(const bf16* qkv, const bf16* out, const float* log_sums,
                                   const bf16* grad_out, bf16* grad_qkv, const float* slopes,
                                   int64_t B, int64_t T, int64_t H, int64_t D, float scale) {
  const int64_t ld = 3 * H * D, ldo = H * D, padded = round_up(T, kChunk);
#pragma omp parallel
  {
    // Of one head: right operands, and the gradient of the queries, transposed.
    Buffer<bf16> queries_t(D * padded), queries(padded * D), grads_t(D * padded), grads(padded * D);
    Buffer<float> grad_queries_t(D * padded), log_sum(padded), delta(padded);
    // Of one block of keys and one chunk of queries.
    Buffer<float> scores(kRows * kChunk), grad_weights(kRows * kChunk);
    Buffer<bf16> weights(kRows * kChunk), grad_scores(kRows * kChunk), grad_pairs(kRows * kChunk);
    Buffer<bf16> keys_t(D * kRows);
    Buffer<float> grad_keys(kRows * D), grad_values(kRows * D);
    const __m512 factor = _mm512_set1_ps(scale * kLog2E), scales = _mm512_set1_ps(scale);
#pragma omp for schedule(dynamic)
    for (int64_t bh = 0; bh < B * H; ++bh) {
      const int64_t b = bh / H, h = bh % H;
      const bf16* q = qkv + b * T * ld + h * D;
      const bf16* k = q + H * D;
      const bf16* v = k + H * D;
      const bf16* o = out + b * T * ldo + h * D;
      const bf16* g = grad_out + b * T * ldo + h * D;
      bf16* dq = grad_qkv + b * T * ld + h * D;
      bf16* dk = dq + H * D;
      bf16* dv = dk + H * D;
      const float slope = slopes ? slopes[h] * kLog2E : 0.0f;
      pack_columns(q, ld, T, padded, D, queries_t);
      pack_columns(g, ldo, T, padded, D, grads_t);
      std::memset(queries, 0, padded * D * sizeof(bf16));
      std::memset(grads, 0, padded * D * sizeof(bf16));
      pack_rows(q, ld, T, D, queries);
      pack_rows(g, ldo, T, D, grads);
      std::memset(grad_queries_t, 0, D * padded * sizeof(float));
      for (int64_t i = 0; i < padded; ++i) {
        log_sum[i] = i < T ? log_sums[bh * T + i] : INFINITY;  // weight 0
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; i < T && d < D; d += kLanes)
          sum = _mm512_fmadd_ps(load(o + i * ldo + d), load(g + i * ldo + d), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
      }
      for (int64_t first = 0; first < T; first += kRows) {
        const int64_t n_keys = std::min(kRows, T - first), n_even = round_up(n_keys, 2);
        for (int64_t d = 0; d < D; ++d)  // rows of the left operand: D x keys
          for (int64_t j = 0; j < n_even; ++j)
            keys_t[d * kRows + j] = j < n_keys ? k[(first + j) * ld + d] : 0;
        bool accumulate = false;
        for (int64_t chunk = first / kChunk * kChunk; chunk < T; chunk += kChunk) {
          // The first queries of the first chunk do not see these keys.
          const int64_t begin = std::max(chunk, first / kColumns * kColumns);
          const int64_t width = std::min(chunk + kChunk, round_up(T, kColumns)) - begin;
          multiply(k + first * ld, ld, queries_t + 2 * begin, 2 * padded, scores, kChunk, n_keys,
                   width, D, false);
          multiply(v + first * ld, ld, grads_t + 2 * begin, 2 * padded, grad_weights, kChunk, n_keys,
                   width, D, false);
          for (int64_t r = 0; r < n_even; r += 2) {
            for (int64_t i = 0; i < width; i += kLanes) {
              __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
              for (int64_t half = 0; half < 2 && r + half < n_keys; ++half) {
                const int64_t row = r + half, key = first + row, query = begin + i;
                // Where the query stands before the key, the weight is 0.
                const __mmask16 seen = ~lanes_below(query, key);
                __m512 x = _mm512_mul_ps(load(scores + row * kChunk + i), factor);
                if (slopes)
                  x = _mm512_fnmadd_ps(_mm512_set1_ps(slope), lane_numbers(query - key), x);
                x = _mm512_sub_ps(x, load(log_sum + query));
                const __m512 w = _mm512_maskz_mov_ps(seen, exp2(x));
                const __m512 dw = _mm512_sub_ps(load(grad_weights + row * kChunk + i),
                                                load(delta + query));
                const __m512 ds = _mm512_mul_ps(_mm512_mul_ps(w, dw), scales);
                store(weights + row * kChunk + i, w);
                const __m256i rounded = to_bf16(ds);
                _mm256_storeu_si256((__m256i*)(grad_scores + row * kChunk + i), rounded);
                halves[half] = _mm512_cvtepu16_epi32(rounded);
              }
              _mm512_storeu_si512(grad_pairs + r * kChunk + 2 * i,
                                  _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
            }
          }
          multiply(weights, kChunk, grads + begin * D, 2 * D, grad_values, D, n_keys, D, width,
                   accumulate);
          multiply(grad_scores, kChunk, queries + begin * D, 2 * D, grad_keys, D, n_keys, D, width,
                   accumulate);
          multiply(keys_t, kRows, grad_pairs, 2 * kChunk, grad_queries_t + begin, padded, D, width,
                   n_even, true);
          accumulate = true;
        }
        for (int64_t r = 0; r < n_keys; ++r)
          for (int64_t d = 0; d < D; d += kLanes) {
            const int64_t to = (first + r) * ld + d;
            store(dk + to, load(grad_keys + r * D + d));
            store(dv + to, load(grad_values + r * D + d));
          }
      }
      const __m512i steps = _mm512_mullo_epi32(
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
          _mm512_set1_epi32(static_cast<int32_t>(padded)));
      for (int64_t i = 0; i < T; ++i)
        for (int64_t d = 0; d < D; d += kLanes) {
          const __m512 x = _mm512_i32gather_ps(steps, grad_queries_t + d * padded + i, 4);
          store(dq + i * ld + d, x);
        }
    }
  }
}
