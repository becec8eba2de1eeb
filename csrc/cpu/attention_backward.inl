// The gradients of attention: the weights P are computed again from the saved log-sum-exp, a block of queries and a
// block of keys at a time, in one pass that serves dq, dk and dv. With dP = dO V^T, five products a block:
//   dV = P^T dO    dS = P (dP - rowsum(dO * O))    dQ = dS K    dK = dS^T Q
// A task is one key head, so that its sums stay with it. Where those are few, they are cut into runs of keys, each with
// a dq of its own: the runs depend on the shape alone and are added in order, so the bits are the same on any number of
// threads.

namespace fastgpt {
namespace {

constexpr int64_t kGradQueries = 96, kGradKeys = 64;  // of a block
constexpr int64_t kWantedTasks = 32;                       // enough to balance a dozen threads
constexpr int64_t kRunKeys = 256;                          // the shortest run of keys worth a dq of its own
constexpr int64_t kRunBytes = 64 << 20;                    // the most for all the runs' dq together

struct AttentionGradients {
  Heads dout, out;
  const float* lse;
  Heads dq, dk, dv;
};

constexpr int64_t kGradRow = kGradKeys + 16;  // in memory: rows a power of two apart would share cache sets

// What a task works on. Of one query head: Q (scaled), dO and dQ (T, Dp), lse, delta = rowsum(dO * O) and the dropout's
// keys (T). Of its run of keys, which begins at `begin`: dK and dV. Of the key block from `key` on: K, its transpose
// and V's; and P and dS of that and a block of queries.
struct BackwardState {
  View Q, dO, dQ, dK, dV, K, Kt, Vt, P, dS, K_copy, V_copy;
  float *lse, *delta;
  uint32_t* dropout_key;
  int64_t begin, key, keys;
  const float* limits;
  float limits_buffer[kGradKeys];
};

// One row of a block: its first n keys are seen. Beyond, up to `end`, weights and dS are to be 0.
struct BackwardRow {
  float *weights, *dS;  // come as the scores and dP
  int64_t n, end;
  float lse, delta;
  uint32_t dropout_key;
};

template <bool kDrop>
INLINE void weights_backward(const BackwardRow& row, const float* limits, const Attention& a, int64_t first_key) {
  int64_t j = 0;
  for (; j < row.n; j += W) {
    const IntVec seen = lane_index() < (int32_t)(row.n - j);
    Vec s = load(row.weights + j), dp = load(row.dS + j);
    if (limits) s = min(s, load(limits + j));
    Vec p = exp_nonpositive(s - row.lse), kept_p = p;
    if (kDrop) {
      const IntVec keep = kept(row.dropout_key, first_key + j, a.drop_below);
      kept_p = as_float(as_int(p) & keep);
      dp = as_float(as_int(dp) & keep) * a.keep_scale;
    }
    store(row.weights + j, as_float(as_int(kept_p) & seen));
    store(row.dS + j, as_float(as_int(p * (dp - row.delta)) & seen));
  }
  for (; j < row.end; j += W) store(row.weights + j, Vec{}), store(row.dS + j, Vec{});
}

// rowsum(dO * O) of W rows, dO as float32: the sums in the same order as dP's, so that dS is exactly 0 in a row with
// one key, whose O is that key's V.
template <class T>
INLINE Vec row_products(const float* const (&dO)[W], const T* const (&out)[W], int64_t D) {
  Vec total = {};
  for (int64_t start = 0; start < D; start += kScoreChain) {
    Vec sum = {};
    for_columns(min(kScoreChain, D - start), [&](int64_t j, int lanes) {
      Vec a[W], b[W];
      UNROLL for (int i = 0; i < W; i++) a[i] = load(dO[i] + start + j), b[i] = load_lanes(out[i] + start + j, lanes);
      transpose(a);
      transpose(b);
      UNROLL for (int k = 0; k < W; k++) sum = sum + a[k] * b[k];
    });
    total = start ? total + sum : sum;
  }
  return total;
}

template <class T>
void widen_query_head(const BackwardState& s, const Attention& a, const AttentionGradients& grads, int64_t b,
                      int64_t h) {
  const int64_t length = a.shape.T, D = a.shape.D;
  for (int64_t i = 0; i < length; i++) {
    widen_row(s.Q.from(i).data, row_of<T>(a.q, b, h, i), D, a.options.scale);
    widen_row(s.dO.from(i).data, row_of<T>(grads.dout, b, h, i), D, 1.0f);
    const float lse = grads.lse[(b * a.shape.H + h) * length + i];
    s.lse[i] = lse == -INFINITY ? INFINITY : lse;  // no key seen: every weight is e**-infinity
    s.dropout_key[i] = a.drop_below ? dropout_row_key(a.options.seed, b, h, i) : 0;
  }
  for (int64_t i = 0; i < length; i += W) {
    const float* dO[W];
    const T* out[W];
    for (int n = 0; n < W; n++) {
      const int64_t row = min(i + n, length - 1);
      dO[n] = s.dO.from(row).data, out[n] = row_of<T>(grads.out, b, h, row);
    }
    store(s.delta + i, row_products(dO, out, D));
  }
}

// Adds what queries first .. first + rows and the state's key block give to dQ, dK and dV. Each query sees the first
// key.
INLINE void backward_block(const BackwardState& s, const Attention& a, int64_t first, int64_t rows) {
  const View Q = s.Q.from(first), dO = s.dO.from(first);
  for (int64_t n = 0; n < rows; n += kTileRows) {
    const int64_t count = min(kTileRows, rows - n), most = min(s.keys, a.visible(first + n + count - 1) - s.key);
    scores_of_rows(count, s.P.from(n), Q.from(n), s.Kt, most, a.shape.D);
    scores_of_rows(count, s.dS.from(n), dO.from(n), s.Vt, most, a.shape.D);
    for (int64_t i = n; i < n + count; i++) {
      const int64_t t = first + i;
      BackwardRow row{s.P.from(i).data, s.dS.from(i).data, min(s.keys, a.visible(t) - s.key), ceil_div(s.keys, W) * W,
                      s.lse[t], s.delta[t], s.dropout_key[t]};
      a.drop_below ? weights_backward<true>(row, s.limits, a, s.key) : weights_backward<false>(row, s.limits, a, s.key);
    }
    product(count, s.dQ.from(first + n), s.dS.from(n), s.K, a.Dp, most, kAdd);
  }
  const View dK = s.dK.from(s.key - s.begin), dV = s.dV.from(s.key - s.begin);
  for (int64_t j = 0; j < s.keys; j += kTileRows) {
    // The queries before `skip` do not see these keys.
    const int64_t count = min(kTileRows, s.keys - j), skip = min(rows, max(0, a.first_query(s.key + j) - first));
    product(count, dV.from(j), s.P.from(skip, j).transposed(), dO.from(skip), a.Dp, rows - skip, kAdd);
    product(count, dK.from(j), s.dS.from(skip, j).transposed(), Q.from(skip), a.Dp, rows - skip, kAdd);
  }
}

// dQ, dK and dV of one query head of key head g, and the keys up to `end`.
template <class T>
void backward_head(BackwardState& s, const Attention& a, int64_t b, int64_t g, int64_t end) {
  const int64_t D = a.shape.D;
  for (s.key = s.begin; s.key < end; s.key += kGradKeys) {
    s.keys = min(kGradKeys, end - s.key);
    const uint8_t* mask = a.mask_from(b, s.key);
    s.limits = key_limits(s.limits_buffer, mask, s.keys);
    s.K = key_rows(row_of<T>(a.k, b, g, s.key), a.k.position, s.keys, D, mask, s.K_copy);
    const View V = key_rows(row_of<T>(a.v, b, g, s.key), a.v.position, s.keys, D, mask, s.V_copy);
    transpose_rows<kGradRow>(s.Kt.data, s.K.data, s.K.row, s.keys, D);
    transpose_rows<kGradRow>(s.Vt.data, V.data, V.row, s.keys, D);
    for (int64_t first = a.first_query(s.key); first < a.shape.T; first += kGradQueries)
      backward_block(s, a, first, min(kGradQueries, a.shape.T - first));
  }
}

// The run of keys begin .. end of key head g. dq: where its part goes, (group, T, Dp) unscaled; null: it is the whole.
template <class T>
void attention_backward_run(const Attention& a, const AttentionGradients& grads, int64_t b, int64_t g, int64_t begin,
                            int64_t end, float* dq) {
  const int64_t length = a.shape.T, D = a.shape.D, Dp = a.Dp, keys = end - begin;
  const int64_t floats = 3 * length * Dp + 2 * (keys + kGradKeys) * Dp + 2 * (kGradQueries + D) * kGradRow;
  Arena arena{(float*)scratch(kAttentionScratch, sizeof(float) * (floats + 3 * length + W + 14 * 16))};
  BackwardState s;
  s.begin = begin;
  s.Q = arena.view(length, Dp), s.dO = arena.view(length, Dp), s.dQ = arena.view(length, Dp);
  s.dK = arena.view(keys, Dp), s.dV = arena.view(keys, Dp);
  s.Kt = arena.view(D, kGradRow), s.Vt = arena.view(D, kGradRow);
  s.P = arena.view(kGradQueries, kGradRow), s.dS = arena.view(kGradQueries, kGradRow);
  s.K_copy = arena.view(kGradKeys, Dp), s.V_copy = arena.view(kGradKeys, Dp);
  s.lse = arena.take(length), s.delta = arena.take(length + W), s.dropout_key = (uint32_t*)arena.take(length);
  memset(s.dK.data, 0, sizeof(float) * keys * Dp);
  memset(s.dV.data, 0, sizeof(float) * keys * Dp);
  for (int64_t r = 0; r < a.group; r++) {
    const int64_t h = g * a.group + r;
    if (dq) s.dQ.data = dq + r * length * Dp;
    memset(s.dQ.data, 0, sizeof(float) * length * Dp);
    widen_query_head<T>(s, a, grads, b, h);
    backward_head<T>(s, a, b, g, end);
    for (int64_t i = 0; i < length && !dq; i++)
      narrow_row(row_of<T>(grads.dq, b, h, i), s.dQ.from(i).data, D, a.options.scale);
  }
  for (int64_t j = 0; j < keys; j++) {
    narrow_row(row_of<T>(grads.dk, b, g, begin + j), s.dK.from(j).data, D, 1.0f);
    narrow_row(row_of<T>(grads.dv, b, g, begin + j), s.dV.from(j).data, D, a.keep_scale);
  }
}

template <class T>
void attention_backward(const Attention& a, const AttentionGradients& grads) {
  const int64_t B = a.shape.B, G = a.shape.G, length = a.shape.T, S = a.shape.S;
  if (B * G == 0) return;
  const int64_t head = a.group * length * a.Dp;  // floats of one run's dq
  int64_t runs = min(ceil_div(kWantedTasks, B * G), S / kRunKeys);
  runs = max(1, min(runs, kRunBytes / (int64_t)sizeof(float) / max(1, B * G * head)));
  const int64_t run_keys = ceil_div(ceil_div(S, runs), kGradKeys) * kGradKeys;
  float* parts = runs > 1 ? (float*)scratch(kKernelScratch, sizeof(float) * runs * B * G * head) : nullptr;
  // The first runs first: more queries see them.
  parallel(runs * B * G, [&](int64_t t) {
    const int64_t run = t / (B * G), b = t / G % B, g = t % G;
    attention_backward_run<T>(a, grads, b, g, min(S, run * run_keys), min(S, (run + 1) * run_keys),
                              parts ? parts + t * head : nullptr);
  });
  if (!parts) return;
  parallel(B * a.shape.H, [&](int64_t t) {
    const int64_t b = t / a.shape.H, h = t % a.shape.H;
    for (int64_t i = 0; i < length; i++) {
      float* sum = parts + (t * length + i) * a.Dp;
      for (int64_t run = 1; run < runs; run++)
        for (int64_t j = 0; j < a.Dp; j += W) store(sum + j, load(sum + j) + load(sum + run * B * G * head + j));
      narrow_row(row_of<T>(grads.dq, b, h, i), sum, a.shape.D, a.options.scale);
    }
  });
}

}  // namespace
}  // namespace fastgpt
