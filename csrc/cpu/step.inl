// One step of the model for some tokens of some sequences: from ids to logits in one call. A product's input is made
// by whole rows (norm, then 16-bit integers where the weights are integers), its epilogue adds bias, activation and
// residual: five jobs for the threads in a layer, and of many rows one more for each input.

namespace fastgpt {
namespace {

// The activations of M tokens, all in one scratch buffer.
struct Activations {
  float *x, *qkv;  // the residual stream (M, C); queries, keys and values (M, 3C)
  RowBuffer narrow, wide;  // inputs of products with K = C and K = inner
  static int64_t floats(const Model& m, int64_t M) {
    return 4 * M * m.C + 2 * 16 + row_buffer_floats(M, m.C) + row_buffer_floats(M, m.inner);
  }
};

INLINE Activations take_activations(const Model& m, int64_t M) {
  Arena arena{(float*)scratch(kStepScratch, sizeof(float) * Activations::floats(m, M))};
  Activations a;
  a.x = arena.take(M * m.C);
  a.qkv = arena.take(3 * M * m.C);
  a.narrow = take_rows(arena, M, m.C);
  a.wide = take_rows(arena, M, m.inner);
  return a;
}

void embed(const Model& m, const StepInput& in, float* x) {
  for (int64_t s = 0; s < in.count; s++) {
    const PagedSequence& sequence = in.sequences[s];
    for_rows(sequence.rows, m.C, [&](int64_t i) {
      float* row = x + (sequence.row + i) * m.C;
      const float* position = m.positions + (sequence.position + i) * m.C;
      unpack_column(m.embedding, in.tokens[sequence.row + i], row);
      for_columns(m.C, [&](int64_t j, int lanes) {
        store_lanes(row + j, load_lanes(row + j, lanes) + load_lanes(position + j, lanes), lanes);
      });
    });
  }
}

// Rows of x (those that `wanted` names, or all) through a norm into a product's input.
void norm_rows(const Norm& norm, float eps, const float* x, int64_t C, int64_t M, const int32_t* wanted, int format,
               const RowBuffer& to) {
  for_rows(M, C, [&](int64_t i) {
    const float* row = x + (wanted ? wanted[i] : i) * C;
    NormForward<float, float> p = {row, nullptr, norm.weight, norm.bias, to.floats + i * to.stride, nullptr, nullptr,
                                   nullptr, C, eps, false};
    layer_norm_rows<1>(p, 0);
    convert_row(format, to, i);
  });
}

void attend(const Model& m, const Layer& layer, const KvCache& cache, const StepInput& in, const float* qkv,
            const RowBuffer& to) {
  const PagedQueries queries = {qkv, to.floats, 3 * m.C, to.stride, m.H, layer.scale};
  const NewKeys kv = {qkv + m.C, qkv + 2 * m.C, 3 * m.C};
  BY_CACHE(cache.dtype, paged_attention, cache, queries, in.sequences, in.count, &kv);
}

void run_layer(const Model& m, const Layer& layer, const KvCache& cache, const StepInput& in, const Activations& a) {
  norm_rows(layer.ln_1, m.eps, a.x, m.C, in.M, nullptr, layer.qkv.format, a.narrow);
  packed_product(layer.qkv, a.narrow, in.M, {a.qkv, 3 * m.C, kNoActivation, nullptr});
  attend(m, layer, cache, in, a.qkv, a.narrow);
  convert_rows(layer.proj, a.narrow, in.M);
  packed_product(layer.proj, a.narrow, in.M, {a.x, m.C, kNoActivation, a.x});
  norm_rows(layer.ln_2, m.eps, a.x, m.C, in.M, nullptr, layer.fc.format, a.narrow);
  packed_product(layer.fc, a.narrow, in.M, {a.wide.floats, a.wide.stride, m.activation, nullptr});
  convert_rows(layer.out, a.wide, in.M);
  packed_product(layer.out, a.wide, in.M, {a.x, m.C, kNoActivation, a.x});
}

void step(const Model& m, const StepInput& in) {
  if (in.M == 0) return;
  Activations a = take_activations(m, in.M);
  embed(m, in, a.x);
  for (int64_t l = 0; l < m.layers; l++) run_layer(m, m.layer[l], m.cache[l], in, a);
  if (in.L == 0) return;
  norm_rows(m.ln_f, m.eps, a.x, m.C, in.L, in.wanted, m.head.format, a.narrow);
  packed_product(m.head, a.narrow, in.L, {in.logits, m.vocab, kNoActivation, nullptr});
}

}  // namespace
}  // namespace fastgpt
