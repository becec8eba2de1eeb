// The table of CPU kernels: one instance per instruction set, chosen once at load (isa.cpp), called from bindings.cpp.
// Raw pointers and sizes only. Matrices are row-major; a null pointer stands for an optional tensor that is absent.
#pragma once
#include <stdint.h>

namespace fastgpt {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };
enum Arithmetic : int { kMultiplyAdds = 0, kBFloat16Dots = 1, kInt8Dots = 2 };
enum Activation : int { kNoActivation = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// A matrix of any strides: element (i, j) is number i * row + j * col of data.
struct Matrix {
  int dtype;
  void* data;
  int64_t rows, cols, row, col;
};

// What follows a matrix product: C = activation(bias + product) + residual; pre is bias + product, kept for backward.
// bias: (cols); residual and pre: of C's dtype and strides. All may be null.
struct Epilogue {
  int bias_dtype;
  const void* bias;
  int activation;
  void* pre;
  const void* residual;
};

// A (B, heads, length, D) tensor: strides in elements; that of D is 1.
struct Heads {
  void* data;
  int64_t batch, head, position;
};

// H query heads share G key heads; T queries, S keys.
struct AttentionShape {
  int64_t B, H, G, T, S, D;
};

// scale: of the scores. seed: of the dropout mask.
struct AttentionOptions {
  bool causal;
  float scale;
  double dropout_p;
  int64_t seed;
};

// The chosen heads, numbers below H, and rows, numbers below T.
struct Queries {
  const int64_t* heads;
  int64_t head_count;
  const int64_t* rows;
  int64_t row_count;
};

// A target equal to `ignored` has loss and gradient 0. The loss of any other is (1 - smoothing) times its cross entropy
// plus smoothing times the mean over all classes', plus z_loss times the square of the log of the sum of e**logit.
struct LossOptions {
  int64_t ignored;
  double smoothing, z_loss;
};

struct Kernels {
  const char* name;
  int width;  // floats in a vector

  // x, residual, y, total: (rows, cols) of dtype; weight, bias: (cols) of wdtype; mean, rstd: (rows), null when not wanted.
  // total = x + residual, when residual is given.
  void (*layer_norm_forward)(int dtype, int wdtype, const void* x, const void* residual, const void* weight,
                             const void* bias, void* y, void* total, float* mean, float* rstd, int64_t rows,
                             int64_t cols, float eps);
  // dx = (gradient through the norm) + dtotal; dtotal, dweight and dbias may be null. dweight, dbias: float32 (cols).
  void (*layer_norm_backward)(int dtype, int wdtype, const void* dy, const void* dtotal, const void* x,
                              const void* weight, const float* mean, const float* rstd, void* dx, float* dweight,
                              float* dbias, int64_t rows, int64_t cols);

  // For the benchmarks (ceilings.inl). sink: (tasks). `steps` times 12 vector instructions of a kind in each task; the dots
  // only where cpu_has_bf16() or cpu_has_vnni() says so and the level is avx512.
  void (*arithmetic)(int kind, float* sink, int64_t tasks, int64_t steps);
  // Each task reads its part of the data `repeats` times.
  void (*read_memory)(const float* data, int64_t floats, int64_t repeats, float* sink, int64_t tasks);

  // C (M, N) = A (M, K) B (K, N), of any dtypes, summed in float32; C's columns are contiguous. accumulate adds to what
  // C holds, which must be float32 then, instead of to a bias.
  void (*gemm)(const Matrix& a, const Matrix& b, const Matrix& c, bool accumulate, const Epilogue& epilogue);
  // dz = dy activation'(pre), all (rows, cols) of dtype; dbias, float32 (cols) or null, is dz's sum over the rows. With no
  // activation dz is dy: pre and dz may be null.
  void (*activation_backward)(int dtype, int activation, const void* dy, const void* pre, void* dz, float* dbias,
                              int64_t rows, int64_t cols);
  // y = gelu(x + bias), x and y (rows, cols), bias (cols) or null, all of dtype; exact, or by tanh if `tanh`.
  void (*gelu_forward)(int dtype, int tanh, const void* x, const void* bias, void* y, int64_t rows, int64_t cols);
  // dx = dy gelu'(x + bias); dbias, float32 (cols) or null, is dx's sum over the rows.
  void (*gelu_backward)(int dtype, int tanh, const void* dy, const void* x, const void* bias, void* dx, float* dbias,
                        int64_t rows, int64_t cols);

  // q, out: (B, H, T, D); k, v: (B, G, S, D), all of dtype; key_mask: (B, S) bytes or null, 0 where a key takes no
  // part; lse: (B, H, T), the log of each row's sum of e**score, null when not wanted.
  void (*attention_forward)(int dtype, Heads q, Heads k, Heads v, const uint8_t* key_mask, AttentionShape shape,
                            AttentionOptions options, Heads out, float* lse);
  // dout, out, dq as q; dk as k; dv as v. out and lse: what forward gave for the same arguments.
  void (*attention_backward)(int dtype, Heads dout, Heads q, Heads k, Heads v, Heads out, const float* lse,
                             const uint8_t* key_mask, AttentionShape shape, AttentionOptions options, Heads dq,
                             Heads dk, Heads dv);
  // weights (B, chosen heads, chosen rows, S) of dtype, from forward's lse. window: how many keys a query sees at most, or 0.
  void (*attention_weights)(int dtype, Heads q, Heads k, const float* lse, const uint8_t* key_mask, Queries queries,
                            AttentionShape shape, AttentionOptions options, int64_t window, void* weights);

  // Of each row of logits (rows, cols), of dtype: its loss; with scales, one for all or, if scale_of_row, one each, the
  // gradient of scale * losses[i] takes the row's place.
  void (*cross_entropy)(int dtype, void* logits, const int64_t* targets, const float* scales, bool scale_of_row,
                        float* losses, int64_t rows, int64_t cols, LossOptions options);
  // result (2): the number of targets other than `ignored`, and the index of the first one outside [0, cols), or -1.
  void (*check_targets)(const int64_t* targets, int64_t count, int64_t cols, int64_t ignored, int64_t* result);
  // sums (cols) += the rows of x (rows, cols) of dtype, in order.
  void (*add_rows)(int dtype, const void* x, float* sums, int64_t rows, int64_t cols);
  // out = dropout of x, both (rows, cols) of dtype (dropout.inl).
  void (*dropout)(int dtype, const void* x, void* out, int64_t rows, int64_t cols, int64_t seed, double dropout_p);
};

// Null where this build has no such level (another architecture).
extern const Kernels* const kBaseline;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx512;

}  // namespace fastgpt
