// The weights of chosen heads and rows, e**(score - lse): each is made once and written once. The scores are those of the
// forward to the last bit, and a row has the same weights whatever is chosen beside it.

namespace fastgpt {
namespace {

constexpr int64_t kWeightRows = 48;  // of a task: what the packing of a key block is spread over

struct AttentionWeights {
  Queries queries;
  const float* lse;
  int64_t window;
  void* out;

  // Of the keys that the mask leaves, query i sees those from here on.
  int64_t first_key(const Attention& a, int64_t i) const { return window ? max(0, i + 1 + a.shape.S - a.shape.T - window) : 0; }
};

// The weights of a block's keys, 0 but for from .. to - 1, out of their scores.
template <class T>
INLINE void store_weights(T* out, const float* scores, const float* limits, int64_t keys, int64_t from, int64_t to,
                          float lse) {
  for_columns(keys, [&](int64_t j, int lanes) {
    const IntVec key = lane_index() + (int32_t)j;
    Vec s = load(scores + j);
    if (limits) s = min(s, load(limits + j));
    const Vec p = exp_nonpositive(s - lse);
    store_lanes(out + j, as_float(as_int(p) & (key >= (int32_t)from) & (key < (int32_t)to)), lanes);
  });
}

// kWeightRows of the chosen rows from number `first` on, for the head chosen as number n.
template <class T>
void attention_weights_block(const Attention& a, const AttentionWeights& w, int64_t b, int64_t n, int64_t first) {
  const int64_t S = a.shape.S, D = a.shape.D, h = w.queries.heads[n];
  const int64_t* query = w.queries.rows + first;
  const int64_t rows = min(kWeightRows, w.queries.row_count - first);
  Arena arena{(float*)scratch(kAttentionScratch, sizeof(float) * (rows * a.Dp + (kTileRows + D) * kKeys + 3 * 16))};
  View Q = arena.view(rows, a.Dp), P = arena.view(kTileRows, kKeys), Kt = arena.view(D, kKeys);
  float limits_buffer[kKeys];
  T* out = (T*)w.out + ((b * w.queries.head_count + n) * w.queries.row_count + first) * S;
  int64_t begin = S, end = 0;  // the keys that some row sees
  for (int64_t i = 0; i < rows; i++) {
    widen_row(Q.from(i).data, row_of<T>(a.q, b, h, query[i]), D, a.options.scale);
    begin = min(begin, w.first_key(a, query[i])), end = max(end, a.visible(query[i]));
  }
  for (int64_t key = 0; key < S; key += kKeys) {
    const int64_t keys = min(kKeys, S - key);
    if (key >= end || key + keys <= begin) {
      for (int64_t i = 0; i < rows; i++) memset(out + i * S + key, 0, sizeof(T) * keys);
      continue;
    }
    const float* limits = key_limits(limits_buffer, a.mask_from(b, key), keys);
    transpose_rows<kKeys>(Kt.data, row_of<T>(a.k, b, h / a.group, key), a.k.position, keys, D);
    for (int64_t i = 0; i < rows; i++) {
      if (i % kTileRows == 0) scores_of_rows(min(kTileRows, rows - i), P, Q.from(i), Kt, keys, D);
      const float lse = w.lse[(b * a.shape.H + h) * a.shape.T + query[i]];
      // No key seen: every weight is e**-infinity
      store_weights(out + i * S + key, P.from(i % kTileRows).data, limits, keys, max(0, w.first_key(a, query[i]) - key),
                    max(0, min(keys, a.visible(query[i]) - key)), lse == -INFINITY ? INFINITY : lse);
    }
  }
}

template <class T>
void attention_weights(const Attention& a, const AttentionWeights& w) {
  const int64_t heads = w.queries.head_count, blocks = ceil_div(w.queries.row_count, kWeightRows);
  const int64_t tasks = a.shape.B * heads * blocks;
  auto task = [&](int64_t t) {
    attention_weights_block<T>(a, w, t / blocks / heads, t / blocks % heads, t % blocks * kWeightRows);
  };
  parallel_if_worth(2 * a.shape.B * heads * w.queries.row_count * a.shape.S * a.shape.D, tasks, task);
}

}  // namespace
}  // namespace fastgpt
