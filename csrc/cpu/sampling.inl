// A row of logits to a token, without sorting: thresholds by the digits of the numbers' order, then the cumulative
// distribution, in order of the ids, inverted. fastgpt/torch_sampling.py says the same in PyTorch.

namespace fastgpt {
namespace {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

// Larger floats have larger keys.
INLINE uint32_t order_key(float a) {
  uint32_t u;
  memcpy(&u, &a, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
// Digit 0 is the highest; the last one has 10 bits.
INLINE uint32_t digit(uint32_t key, int d) { return d == 2 ? key & 1023 : key >> (d ? 10 : 21) & (kDigits - 1); }
INLINE int below(int d) { return d == 2 ? 0 : d == 1 ? 10 : 21; }

// The key of the entry at which the weights of the entries from the largest down exceed `budget`, and the weight above
// it. weight(i) of entries that `weight` gives 0 do not count.
struct Cut {
  uint32_t key;
  double above;
};
template <class Weight>
INLINE Cut find_cut(const float* x, int64_t n, double budget, Weight weight) {
  double bins[kDigits];
  uint32_t prefix = 0;
  double above = 0.0;
  for (int d = 0; d < 3; d++) {
    memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < n; i++) {
      const uint32_t key = order_key(x[i]);
      if (d == 0 || key >> below(d - 1) == prefix >> below(d - 1)) bins[digit(key, d)] += weight(i);
    }
    int bin = kDigits - 1, last = -1;
    for (; bin >= 0; bin--) {
      if (bins[bin] == 0.0) continue;
      last = bin;
      if (above + bins[bin] > budget) break;
      above += bins[bin];
    }
    if (bin < 0) {  // rounding: the whole weight is within the budget
      if (last < 0) return {0, above};
      bin = last, above -= bins[last];
    }
    prefix |= (uint32_t)bin << below(d);
  }
  return {prefix, above};
}

// logits as the penalties and biases leave them.
void adjust_logits(float* x, int64_t V, const Draw& draw) {
  const bool penalised = draw.repetition != 1.0f || draw.presence != 0.0f || draw.frequency != 0.0f;
  if (penalised) {
    int32_t* counts = (int32_t*)scratch(kKernelScratch, sizeof(int32_t) * V);  // of new tokens; -1: in the prompt alone
    memset(counts, 0, sizeof(int32_t) * V);
    for (int64_t i = 0; i < draw.length; i++) {
      const int32_t id = draw.history[i];
      if (id < 0 || id >= V) continue;
      if (i < draw.prompt)
        counts[id] = -1;
      else
        counts[id] = counts[id] < 0 ? 1 : counts[id] + 1;
    }
    for (int64_t i = 0; i < V; i++) {
      if (counts[i] == 0) continue;
      x[i] = x[i] > 0.0f ? x[i] / draw.repetition : x[i] * draw.repetition;
      if (counts[i] > 0) x[i] -= draw.presence + draw.frequency * counts[i];
    }
  }
  for (int64_t i = 0; i < draw.biases; i++)
    if (draw.bias_ids[i] >= 0 && draw.bias_ids[i] < V) x[draw.bias_ids[i]] += draw.bias[i];
}

// The first of the largest entries; -1 when it is not finite or an entry is not a number.
int64_t argmax(const float* x, int64_t V) {
  Vec top = splat(-INFINITY);
  IntVec odd = {};  // lanes that saw a NaN
  for_columns(V, [&](int64_t j, int lanes) {
    Vec a = load_lanes(x + j, lanes);
    if (lanes < W)
      for (int i = lanes; i < W; i++) a[i] = -INFINITY;
    odd |= a != a;
    top = max(a, top);
  });
  for (int i = 0; i < W; i++)
    if (odd[i]) return -1;
  const float highest = reduce_max(top);
  if (!(highest < INFINITY && highest > -INFINITY)) return -1;
  int64_t i = 0;
  while (x[i] != highest) i++;
  return i;
}

// x: (V), overwritten. The token, or -1 where the logits are no distribution.
int64_t sample_row(float* x, int64_t V, const Draw& draw) {
  adjust_logits(x, V, draw);
  const int64_t likeliest = argmax(x, V);
  if (likeliest < 0 || draw.temperature == 0.0f) return likeliest;
  const float top = x[likeliest];
  if (draw.top_k > 0 && draw.top_k < V) {
    const uint32_t least = find_cut(x, V, (double)draw.top_k - 0.5, [](int64_t) { return 1.0; }).key;
    for (int64_t i = 0; i < V; i++)
      if (order_key(x[i]) < least) x[i] = -INFINITY;
  }
  // Weights relative to the likeliest's.
  double total = 0.0;
  for_columns(V, [&](int64_t j, int lanes) {
    Vec a = exp_nonpositive((load_lanes(x + j, lanes) - top) / draw.temperature);
    store_lanes(x + j, a, lanes);
    for (int i = 0; i < lanes; i++) total += a[i];
  });
  if (draw.top_p < 1.0f) {
    // Of equal weights the first ids are kept: a stable sort would give the same.
    const Cut cut = find_cut(x, V, nextafter(draw.top_p * total, -1.0), [&](int64_t i) { return (double)x[i]; });
    double kept = cut.above;
    for (int64_t i = 0; i < V; i++) {
      const uint32_t key = order_key(x[i]);
      if (key > cut.key) continue;
      if (key < cut.key || kept >= draw.top_p * total)
        x[i] = 0.0f;
      else
        kept += x[i];
    }
  }
  double mass = 0.0;
  for (int64_t i = 0; i < V; i++) mass += x[i] = x[i] < draw.min_p ? 0.0f : x[i];
  const double target = draw.uniform * mass;
  double sum = 0.0;
  int64_t last = likeliest;
  for (int64_t i = 0; i < V; i++) {
    if (x[i] == 0.0f) continue;
    sum += x[i], last = i;
    if (sum > target) return i;
  }
  return last;
}

void sample(float* logits, int64_t stride, int64_t V, const Draw* draws, int64_t rows, int32_t* out) {
  parallel(rows, [&](int64_t i) { out[i] = (int32_t)sample_row(logits + i * stride, V, draws[i]); });
}

}  // namespace
}  // namespace fastgpt
