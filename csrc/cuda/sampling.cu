// A row of logits to a token without sorting: thresholds by the digits of the numbers' order, then the cumulative
// distribution, in order of the ids, inverted. Weights are integers, 2**40 for the likeliest's, so that the order in which
// threads add them up changes nothing.
#include "platform.cuh"

#include "sampling.h"

#include "errors.h"
#include "numbers.cuh"

namespace fastgpt {
namespace cuda {

struct SamplingArguments {
  const void* logits;
  float* work;
  int64_t logits_stride, work_stride;
  int V;
  Draws draws;
  int32_t* out;
};

namespace {

typedef unsigned long long Sum;

constexpr float kOne = 1099511627776.0f;  // the likeliest's weight: 2**40, of which 2**20 have room in 64 bits
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kFew = 256;            // ids that a warp goes over alone
constexpr int kOfPrompt = 1 << 30;   // of a count: the prompt has the id

// What the threads of a block share. A bin's sum is of two 32-bit halves, which have fast atomics.
struct Shared {
  unsigned low[kBins], high[kBins];
  Sum sums[32];  // of each warp

  __device__ __forceinline__ Sum bin(int i) const { return (Sum)high[i] << 32 | low[i]; }
  __device__ __forceinline__ void add(int i, Sum weight) {
    const unsigned part = (unsigned)weight, before = atomicAdd(&low[i], part);
    const unsigned carried = (unsigned)(weight >> 32) + (before + part < before);
    if (carried) atomicAdd(&high[i], carried);
  }
};

// Larger floats have larger keys.
__device__ __forceinline__ unsigned order_key(float a) {
  const unsigned u = bit_cast<unsigned>(a);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
// The order of weights, which lie in [0, 1]: a float's two highest bits are 0 there.
__device__ __forceinline__ unsigned weight_key(float weight) { return bit_cast<unsigned>(weight) << 2; }
__device__ __forceinline__ Sum integer(float weight) { return (Sum)(weight * kOne); }

// Digit 0 is the highest; the last one has 10 bits.
__device__ __forceinline__ int below(int d) { return d == 2 ? 0 : d == 1 ? 10 : 21; }
__device__ __forceinline__ int digit(unsigned key, int d) { return d == 2 ? key & 1023 : key >> below(d) & (kBins - 1); }

__device__ __forceinline__ Sum sum_of_warp(Sum a) {
#pragma unroll
  for (int o = 16; o; o /= 2) a += __shfl_xor_sync(dev::kAllLanes, a, o);
  return a;
}

// e**x for x <= 0, 0 below -87: csrc/cpu/vec.h's, so that both draw from the same weights.
__device__ __forceinline__ float exp_nonpositive(float x) {
  const float shifted = fmaf(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
  const float r = fmaf(n, 2.12194440e-4f, fmaf(-n, 0.693359375f, x)), r2 = r * r;
  const float high = fmaf(r, 1.9875691500e-4f, 1.3981999507e-3f), middle = fmaf(r, 8.3334519073e-3f, 4.1665795894e-2f);
  const float low = fmaf(r, 1.6666665459e-1f, 5.0000001201e-1f);
  const float p = fmaf(fmaf(fmaf(high, r2, middle), r2, low), r2, r + 1.0f);
  return x < -87.0f ? 0.0f : bit_cast<float>(bit_cast<unsigned>(p) + (bit_cast<unsigned>(shifted) << 23));
}

// The first of the largest of logit(id), for all threads. Where an entry is not a number it is one of these.
template <class Logit>
__device__ __forceinline__ int likeliest(int V, Logit logit, Shared& shared) {
  Sum top = 0;
#pragma unroll 4
  for (int id = threadIdx.x; id < V; id += blockDim.x) {
    const float a = logit(id);
    const unsigned key = a == a ? order_key(a + 0.0f) : ~0u;  // -0 becomes 0
    const Sum entry = (Sum)key << 32 | (~0u - (unsigned)id);
    if (entry > top) top = entry;
  }
#pragma unroll
  for (int o = 16; o; o /= 2) {
    const Sum other = __shfl_xor_sync(dev::kAllLanes, top, o);
    if (other > top) top = other;
  }
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = top;
  __syncthreads();
  for (int w = 0; w < (int)blockDim.x / 32; w++)
    if (shared.sums[w] > top) top = shared.sums[w];
  __syncthreads();
  return (int)(~0u - (unsigned)top);
}

// Which lane's part first lifts the running sum, `before` so far, above the goal; `before` grows by the parts before it.
__device__ __forceinline__ int choose(Sum part, Sum goal, Sum& before) {
  const int lane = threadIdx.x % 32;
  Sum running = part;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const Sum other = __shfl_up_sync(dev::kAllLanes, running, o);
    if (lane >= o) running += other;
  }
  const int chosen = __ffs(__ballot_sync(dev::kAllLanes, before + running > goal)) - 1;
  before += __shfl_sync(dev::kAllLanes, running - part, chosen);
  return chosen;
}

// Where the sum of weight(0), weight(1), ... first exceeds goal_of(the sum of all n), which is less: the index, and the sum
// before it. For all threads; ends without a barrier.
struct Place {
  int index;
  Sum before;
};
template <class Weight, class Goal>
__device__ __forceinline__ Place find_place(int n, Weight weight, Goal goal_of, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int first = 0, count = n;
  Sum before = 0, goal = 0;
  do {  // each warp goes over a part
    const int part = (count + warps - 1) / warps, end = min(part, count - warp * part);
    Sum sum = 0;
#pragma unroll 4
    for (int i = lane; i < end; i += 32) sum += weight(first + warp * part + i);
    sum = sum_of_warp(sum);
    if (lane == 0) shared.sums[warp] = sum;
    __syncthreads();
    sum = lane < warps ? shared.sums[lane] : 0;
    if (count == n) goal = goal_of(sum_of_warp(sum));
    const int chosen = choose(sum, goal, before);
    first += chosen * part, count = min(part, count - chosen * part);
    __syncthreads();
  } while (count > kFew);
  while (count > 1) {  // each warp does the same
    const int part = (count + 31) / 32, end = min(part, count - lane * part);
    Sum sum = 0;
    for (int i = 0; i < end; i++) sum += weight(first + lane * part + i);
    const int chosen = choose(sum, goal, before);
    first += chosen * part, count = min(part, count - chosen * part);
  }
  return {first, before};
}

// Of the ids 0 .. n - 1 from the largest key(id) down, where the sum of their weights reaches `least`, which is above 0
// and at most the sum of all: the key there, the sum of the weights with larger keys, and of those with this one.
struct Cut {
  unsigned key;
  Sum above, at;
};
template <class Key, class Weight>
__device__ __forceinline__ Cut find_cut(int n, Key key, Weight weight, Sum least, Shared& shared) {
  unsigned prefix = 0;
  Sum above = 0, at = 0;
  for (int d = 0; d < 3; d++) {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < n; id += blockDim.x) {
      const unsigned k = key(id);
      if (d == 0 || k >> below(d - 1) == prefix >> below(d - 1)) shared.add(digit(k, d), weight(id));
    }
    __syncthreads();
    const Place place = find_place(kBins, [&](int i) { return shared.bin(kBins - 1 - i); },
                                   [&](Sum) { return least - above - 1; }, shared);
    const int bin = kBins - 1 - place.index;
    prefix |= (unsigned)bin << below(d), above += place.before, at = shared.bin(bin);
    __syncthreads();
  }
  return {prefix, above, at};
}

// 52 bits of fastgpt/sampling.py's uniform.
__device__ __forceinline__ Sum random_bits(Sum seed, Sum sample, Sum position) {
  const Sum words[3] = {seed, sample, position};
  Sum state = 0;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    state = (state ^ words[i]) + 0x9E3779B97F4A7C15ull;
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ state >> 27) * 0x94D049BB133111EBull;
    state ^= state >> 31;
  }
  return state >> 12;
}

// A row's logits as penalties and biases leave them. Each id of the history is changed by the thread that takes its count.
__device__ __forceinline__ void adjust_row(float* x, int V, const Draws& draws, int64_t row) {
  if (draws.repetition) {
    const float repetition = draws.repetition[row], presence = draws.presence[row], frequency = draws.frequency[row];
    if (repetition != 1.0f || presence != 0.0f || frequency != 0.0f) {
      const int32_t* history = draws.history + row * draws.history_stride;
      int32_t* counts = draws.counts + row * V;
      const int length = draws.length[row], prompt = draws.prompt[row];
      for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const unsigned id = (unsigned)history[i];
        if (id >= (unsigned)V) continue;
        if (i < prompt)
          atomicOr(counts + id, kOfPrompt);
        else
          atomicAdd(counts + id, 1);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const unsigned id = (unsigned)history[i];
        const int count = id < (unsigned)V ? atomicExch(counts + id, 0) : 0, drawn = count & (kOfPrompt - 1);
        if (count == 0) continue;
        float a = x[id];
        a = a > 0.0f ? a / repetition : a * repetition;
        x[id] = drawn ? a - fmaf(frequency, (float)drawn, presence) : a;
      }
      __syncthreads();
    }
  }
  if (!draws.bias_starts) return;
  for (int i = draws.bias_starts[row] + threadIdx.x; i < draws.bias_starts[row + 1]; i += blockDim.x) {
    const unsigned id = (unsigned)draws.bias_ids[i];
    if (id < (unsigned)V) x[id] += draws.bias[i];
  }
  __syncthreads();
}

// The weights x (V), 1 for the likeliest, as the filters leave them, and the id that a number of 52 bits draws.
__device__ __forceinline__ int draw(const float* x, int V, float top_p, float min_p, Sum number, Shared& shared) {
  unsigned cut_key = 0;
  int last = V;  // of the ids that have the cut's weight: the last that is kept
  if (top_p < 1.0f) {
    Sum total = 0;
    for (int id = threadIdx.x; id < V; id += blockDim.x) total += integer(x[id]);
    total = sum_of_warp(total);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) total += shared.sums[w];
    const Sum share = (Sum)ceil((double)top_p * (double)total), least = share ? share : 1;  // 0: a top_p below floats
    const Cut cut = find_cut(V, [&](int id) { return weight_key(x[id]); }, [&](int id) { return integer(x[id]); }, least,
                             shared);
    cut_key = cut.key;
    const Sum one = integer(bit_cast<float>(cut.key >> 2));
    if (cut.above + cut.at - one >= least)  // not all of them are needed
      last = find_place(V, [&](int id) { return weight_key(x[id]) == cut_key ? one : 0; },
                        [&](Sum) { return least - cut.above - 1; }, shared).index;
    __syncthreads();
  }
  const auto weight = [&](int id) {
    const float a = x[id];
    const unsigned key = weight_key(a);
    return a < min_p || key < cut_key || (key == cut_key && id > last) ? 0 : integer(a);
  };
  return find_place(V, weight, [&](Sum mass) { return __umul64hi(number << 12, mass); }, shared).index;
}

}  // namespace

template <class T>
__global__ void __launch_bounds__(1024, 1) sampling_kernel(SamplingArguments a) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  const Draws& draws = a.draws;
  const int V = a.V;
  const T* logits = (const T*)a.logits + row * a.logits_stride;
  float* x = a.work + row * a.work_stride;
  const bool copied = (const void*)x != (const void*)logits;
  const auto copy = [&](int id) {
    const float logit = to_float(logits[id]);
    if (copied) x[id] = logit;
    return logit;
  };
  int token;
  if (draws.repetition || draws.bias_starts) {
    for (int id = threadIdx.x; id < V; id += blockDim.x) copy(id);
    __syncthreads();
    adjust_row(x, V, draws, row);
    token = likeliest(V, [&](int id) { return x[id]; }, shared);
  } else {
    token = likeliest(V, copy, shared);
  }
  const float top = x[token], temperature = draws.temperature[row];
  __syncthreads();
  if (!(fabsf(top) < INFINITY)) {
    token = -1;
  } else if (temperature != 0.0f) {
    const int top_k = draws.top_k[row];
    unsigned least = 0;
    if (top_k > 0 && top_k < V)
      least = find_cut(V, [&](int id) { return order_key(x[id]); }, [](int) { return (Sum)1; }, (Sum)top_k, shared).key;
#pragma unroll 4
    for (int id = threadIdx.x; id < V; id += blockDim.x) {
      const float logit = x[id];
      x[id] = order_key(logit) < least ? 0.0f : exp_nonpositive((logit - top) / temperature);
    }
    __syncthreads();
    const Sum number = random_bits((Sum)draws.seed[row], (Sum)draws.sample[row], (Sum)draws.position[row]);
    token = draw(x, V, draws.top_p[row], draws.min_p[row], number, shared);
  }
  if (threadIdx.x == 0) a.out[row] = token;
}

void sample(const Rows& logits, const Rows& work, int64_t R, int64_t V, const Draws& draws, int32_t* out, Stream stream) {
  if (R == 0) return;
  const SamplingArguments a = {logits.data, (float*)work.data, logits.stride, work.stride, (int)V, draws, out};
  const dim3 grid((unsigned)R), block((unsigned)sampling_threads(V));
  if (logits.dtype == kFloat32)
    LAUNCH((sampling_kernel<float>), grid, block, 0, stream, a);
  else if (logits.dtype == kFloat16)
    LAUNCH((sampling_kernel<__half>), grid, block, 0, stream, a);
  else
    LAUNCH((sampling_kernel<__nv_bfloat16>), grid, block, 0, stream, a);
  check_launch("sample", "dtype", logits.dtype, "R", R, "V", V);
}

}  // namespace cuda
}  // namespace fastgpt
