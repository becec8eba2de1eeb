// One instruction set's table of kernels. Included by level_*.cpp, each compiled with its own flags and LEVEL set.
// Everything but the table has internal linkage, and no C++ header is included: code compiled for AVX under a shared
// name could be picked by the linker for a processor without it.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"
#include "pool.h"
#include "vec.h"

#include "ceilings.inl"
#include "tile.inl"
#include "rows.inl"
#include "gelu.inl"
#include "dropout.inl"
#include "layer_norm.inl"
#include "cross_entropy.inl"
#include "pack.inl"
#include "gemm.inl"
#include "attention.inl"
#include "attention_backward.inl"
#include "attention_weights.inl"
#include "linear.inl"

namespace fastgpt {
namespace {

// Calls FUNCTION<T>(...) or FUNCTION<T, P>(...) for the element types that the dtypes name.
#define BY_DTYPE(dtype, FUNCTION, ...) \
  ((dtype) == kFloat32 ? FUNCTION<float>(__VA_ARGS__) : FUNCTION<bf16>(__VA_ARGS__))
#define BY_DTYPES(dtype, wdtype, FUNCTION, ...)                                                        \
  ((dtype) == kFloat32   ? FUNCTION<float, float>(__VA_ARGS__)                                         \
   : (wdtype) == kFloat32 ? FUNCTION<bf16, float>(__VA_ARGS__)                                         \
                          : FUNCTION<bf16, bf16>(__VA_ARGS__))

// Calls FUNCTION<T, Form>(...) for the element type and GELU's form.
#define BY_GELU(dtype, tanh, FUNCTION, ...)                                                                     \
  ((dtype) == kFloat32 ? ((tanh) ? FUNCTION<float, Tanh>(__VA_ARGS__) : FUNCTION<float, Erf>(__VA_ARGS__))      \
                       : ((tanh) ? FUNCTION<bf16, Tanh>(__VA_ARGS__) : FUNCTION<bf16, Erf>(__VA_ARGS__)))

const Kernels table = {
    LEVEL,
    W,
    [](int dtype, int wdtype, const void* x, const void* residual, const void* weight, const void* bias, void* y,
       void* total, float* mean, float* rstd, int64_t rows, int64_t cols, float eps) {
      BY_DTYPES(dtype, wdtype, layer_norm_forward, x, residual, weight, bias, y, total, mean, rstd, rows, cols, eps);
    },
    [](int dtype, int wdtype, const void* dy, const void* dtotal, const void* x, const void* weight, const float* mean,
       const float* rstd, void* dx, float* dweight, float* dbias, int64_t rows, int64_t cols) {
      BY_DTYPES(dtype, wdtype, layer_norm_backward, dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias, rows, cols);
    },
    arithmetic,
    read_memory,
    gemm,
    [](int dtype, int activation, const void* dy, const void* pre, void* dz, float* dbias, int64_t rows,
       int64_t cols) { BY_DTYPE(dtype, activation_backward, activation, dy, pre, dz, dbias, rows, cols); },
    [](int dtype, int tanh, const void* x, const void* bias, void* y, int64_t rows, int64_t cols) {
      BY_GELU(dtype, tanh, gelu_forward, x, bias, y, rows, cols);
    },
    [](int dtype, int tanh, const void* dy, const void* x, const void* bias, void* dx, float* dbias, int64_t rows,
       int64_t cols) { BY_GELU(dtype, tanh, gelu_backward, dy, x, bias, dx, dbias, rows, cols); },
    [](int dtype, Heads q, Heads k, Heads v, const uint8_t* key_mask, AttentionShape shape, AttentionOptions options,
       Heads out, float* lse) {
      BY_DTYPE(dtype, attention_forward, {q, k, v, key_mask, shape, options}, out, lse);
    },
    [](int dtype, Heads dout, Heads q, Heads k, Heads v, Heads out, const float* lse, const uint8_t* key_mask,
       AttentionShape shape, AttentionOptions options, Heads dq, Heads dk, Heads dv) {
      BY_DTYPE(dtype, attention_backward, {q, k, v, key_mask, shape, options}, {dout, out, lse, dq, dk, dv});
    },
    [](int dtype, Heads q, Heads k, const float* lse, const uint8_t* key_mask, Queries queries, AttentionShape shape,
       AttentionOptions options, int64_t window, void* weights) {
      BY_DTYPE(dtype, attention_weights, {q, k, {}, key_mask, shape, options}, {queries, lse, window, weights});
    },
    [](int dtype, void* logits, const int64_t* targets, const float* scales, bool scale_of_row, float* losses,
       int64_t rows, int64_t cols, LossOptions options) {
      BY_DTYPE(dtype, cross_entropy, logits, targets, scales, scale_of_row, losses, rows, cols, options);
    },
    check_targets,
    [](int dtype, const void* x, float* sums, int64_t rows, int64_t cols) {
      BY_DTYPE(dtype, add_rows, x, sums, rows, cols);
    },
    [](int dtype, const void* x, void* out, int64_t rows, int64_t cols, int64_t seed, double dropout_p) {
      BY_DTYPE(dtype, dropout, x, out, rows, cols, seed, dropout_p);
    },
};

}  // namespace
}  // namespace fastgpt
