// Dropout by a counter: the mask is a pure function of a seed and an element's place, the same in forward, in backward and
// on every device.

namespace fastgpt {
namespace {

// The hashes below this are dropped.
INLINE uint32_t dropout_threshold(double dropout_p) { return (uint32_t)(dropout_p * 4294967296.0); }

// The dropout mask of fastgpt.reference.dropout_keep_mask: a pure function of (seed, b, h, i, j).
template <class U>
INLINE U mix32(U x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
constexpr uint32_t kGolden = 0x9E3779B9u;

INLINE uint32_t dropout_row_key(int64_t seed, int64_t b, int64_t h, int64_t i) {
  uint32_t key = kGolden;
  const uint32_t words[] = {(uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)b, (uint32_t)h, (uint32_t)i};
  for (uint32_t word : words) key = mix32(key ^ word);
  return key;
}
// Which of the keys j .. j + W - 1 of a row are kept: all bits set, or none.
INLINE IntVec kept(uint32_t row_key, int64_t j, uint32_t drop_below) {
  UintVec hash = mix32(((UintVec)lane_index() + (uint32_t)j) * kGolden + row_key);
  return (IntVec)(hash >= drop_below);
}

// out = x with each element dropped or multiplied by 1 / (1 - dropout_p), by the mask of batch 0 and head 0.
template <class T>
void dropout(const void* x, void* out, int64_t rows, int64_t cols, int64_t seed, double dropout_p) {
  const uint32_t drop_below = dropout_threshold(dropout_p);
  const float factor = (float)(1.0 / (1.0 - dropout_p));
  parallel(rows, [=](int64_t i) {
    const uint32_t key = dropout_row_key(seed, 0, 0, i);
    for_columns(cols, [&](int64_t j, int lanes) {
      Vec value = load_lanes((const T*)x + i * cols + j, lanes) * factor;
      store_lanes((T*)out + i * cols + j, as_float(as_int(value) & kept(key, j, drop_below)), lanes);
    });
  });
}

}  // namespace
}  // namespace fastgpt
