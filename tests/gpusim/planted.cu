// Kernels for the tests of the CPU shim: one that is right, and beside it the same with a fault.
#include "cuda/platform.cuh"

#include "cuda/errors.h"
#include "planted.h"

namespace fastgpt {
namespace cuda {

constexpr int kThreads = 64;

// The numbers of a block in the opposite order, through shared memory.
template <bool kBarrier>
__global__ void reversed(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  const int first = blockIdx.x * kThreads, i = threadIdx.x;
  tile[i] = in[first + i];
  if (kBarrier) __syncthreads();
  out[first + i] = tile[kThreads - 1 - i];
}

// The sums of the columns of n tiles (4 kThreads numbers each), of which two are in shared memory at a time.
template <int kWait, bool kBarrier>
__global__ void streamed(const float* in, float* out, int n) {
  DYNAMIC_SHARED(float, tiles);
  float sum[4] = {};
  const auto fetch = [&](int t) {
    const int at = 4 * threadIdx.x;
    if (t < n) dev::cp_async<16>(tiles + t % 2 * 4 * kThreads + at, in + t * 4 * kThreads + at, true);
    dev::cp_commit();
  };
  fetch(0);
  for (int t = 0; t < n; t++) {
    fetch(t + 1);
    dev::cp_wait<kWait>();
    __syncthreads();
    for (int i = 0; i < 4; i++) sum[i] += tiles[t % 2 * 4 * kThreads + i * kThreads + kThreads - 1 - threadIdx.x];
    if (kBarrier) __syncthreads();
  }
  dev::cp_wait<0>();
  for (int i = 0; i < 4; i++) out[i * kThreads + kThreads - 1 - threadIdx.x] = sum[i];
}

// Copies a row of n numbers; kMore: one too many.
template <int kMore>
__global__ void copied(const float* in, float* out, int n) {
  for (int i = threadIdx.x; i < n + kMore; i += kThreads) out[i % n] = in[i];
}
__global__ void beyond_static_shared(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x + (n == 1)] = in[0];
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void beyond_dynamic_shared(const float* in, float* out, int n) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = in[0];
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

template <int kSize>
__global__ void unwritten_static(const float* in, float* out, int n) {
  __shared__ float tile[kSize];
  out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = in[threadIdx.x];
}
__global__ void unwritten_dynamic(const float* in, float* out, int n) {
  DYNAMIC_SHARED(float, tile);
  out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = in[threadIdx.x];
}

__global__ void divergent_barrier(const float* in, float* out, int n) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void half_a_warp_at_a_barrier(const float* in, float* out, int n) {
  if (threadIdx.x < 16) __syncthreads();
  __syncwarp();
}
__global__ void misaligned(const float* in, float* out, int n) { *(float4*)out = *(const float4*)(in + n); }

// Threads that have ended are not waited for.
__global__ void early_end(const float* in, float* out, int n) {
  if (threadIdx.x >= 40) return;
  out[threadIdx.x] = __syncthreads_count(threadIdx.x % 2 == 0);
}

__global__ void lanes_missing(const float* in, float* out, int n) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(dev::kAllLanes, in[threadIdx.x], 1);
}
__global__ void lane_outside_its_mask(const float* in, float* out, int n) {
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, in[threadIdx.x], 1);
}
__global__ void lane_outside_the_mask_read(const float* in, float* out, int n) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFFu, in[threadIdx.x], 16);
}
__global__ void masks_that_disagree(const float* in, float* out, int n) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 16 ? dev::kAllLanes : 0xFFFF0000u, in[threadIdx.x], 1);
}
__global__ void different_shuffles(const float* in, float* out, int n) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_xor_sync(dev::kAllLanes, in[threadIdx.x], 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(dev::kAllLanes, in[threadIdx.x], 3);
  }
}
// Both halves of a warp at once, each among itself.
__global__ void halves(const float* in, float* out, int n) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xFFFFu : 0xFFFF0000u;
  float x = in[threadIdx.x];
  for (int o = 8; o; o /= 2) x += __shfl_xor_sync(mask, x, o);
  __syncwarp(mask);
  out[threadIdx.x] = x;
}

template <int kOffset, bool kWaits>
__global__ void one_copy(const float* in, float* out, int n) {
  DYNAMIC_SHARED(float, tile);
  dev::cp_async<16>(tile + 4 * threadIdx.x + kOffset, in, true);
  dev::cp_commit();
  if (kWaits) dev::cp_wait<0>();
}
__global__ void zero_filled(const float* in, float* out, int n) {
  DYNAMIC_SHARED(float, tile);
  dev::cp_async<16>(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, (int)threadIdx.x < n);
  dev::cp_commit();
  dev::cp_wait<0>();
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

__global__ void trap(const float* in, float* out, int n) {
  __syncthreads();
  if (threadIdx.x == 40) __trap();
  __syncthreads();
}

// The thread that comes last.
__global__ void last_thread(const float* in, float* out, int n) {
  out[blockIdx.x] = (float)threadIdx.x;
  out[n] = (float)blockIdx.x;
}

template <bool kAtomic>
__global__ void counted(const float* in, float* out, int n) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(&count, 1);
  } else {
    count++;
  }
  __syncthreads();
  out[threadIdx.x] = (float)count;
}

// Row r of out: what shuffle r brings to each lane, with a width of n lanes.
__global__ void shuffles(const float* in, float* out, int n) {
  const float x = in[threadIdx.x];
  float* to = out + threadIdx.x;
  to[0 * 32] = __shfl_sync(dev::kAllLanes, x, 3, n);
  to[1 * 32] = __shfl_up_sync(dev::kAllLanes, x, 2, n);
  to[2 * 32] = __shfl_down_sync(dev::kAllLanes, x, 2, n);
  to[3 * 32] = __shfl_xor_sync(dev::kAllLanes, x, 5, n);
  to[4 * 32] = (float)(__ballot_sync(dev::kAllLanes, x > 9.0f) >> 8);
  to[5 * 32] = (float)(__any_sync(dev::kAllLanes, x > 30.5f) * 2 + __all_sync(dev::kAllLanes, x > 30.5f));
  to[6 * 32] = (float)(__syncthreads_or(x > 30.5f) * 2 + __syncthreads_and(x > 30.5f));
}

__global__ void atomics(const float* in, float* out, int n) {
  __shared__ float sum;
  __shared__ int least, most, last;
  __shared__ unsigned long long bits;
  if (threadIdx.x == 0) sum = 0.0f, least = n, most = -n, last = -1, bits = 0;
  __syncthreads();
  atomicAdd(&sum, in[threadIdx.x]);
  atomicMin(&least, (int)threadIdx.x - 7);
  atomicMax(&most, threadIdx.x);
  atomicOr(&bits, 1ull << threadIdx.x % 8);
  if (atomicCAS(&last, -1, 5) == 5) atomicExch(&last, 9);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = sum, out[1] = least, out[2] = most, out[3] = last, out[4] = bits;
}

// in: a (16, 16) and b (16, 8), both row by row; out (16, 8).
template <class T>
__global__ void product(const float* in, float* out, int n) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  T a[4][2], b[2][2];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) a[i][j] = T(in[(g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8 + j]);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) b[i][j] = T(in[256 + (2 * q + i * 8 + j) * 8 + g]);
  unsigned left[4], right[2];
  memcpy(left, a, sizeof left);
  memcpy(right, b, sizeof right);
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  dev::mma_m16n8k16<T>(d, left, right);
  for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];
}

__global__ void numbers(const float* in, float* out, int n) {
  out[0] = dev::ex2(in[0]);
  out[1] = dev::ex2(-127.0f);
  out[2] = (float)dev::byte_perm(0x00332211u, 0x77665544u, 0x4012u);
  out[3] = (float)__umulhi(0x80000000u, 6u);
  out[4] = (float)(__clz(1) * 100 + __popc(0xF0F0u));
  out[5] = (float)(min(n, 5u) + max(2.5, 1.0));
}

const std::map<std::string, Planted> kPlanted = {
    {"reversed", {reversed<true>, kThreads, 0}},
    {"reversed, no barrier", {reversed<false>, kThreads, 0}},
    {"streamed", {streamed<1, true>, kThreads, 8 * kThreads * 4}},
    {"streamed, waits for too little", {streamed<2, true>, kThreads, 8 * kThreads * 4}},
    {"streamed, no barrier", {streamed<1, false>, kThreads, 8 * kThreads * 4}},
    {"copied", {copied<0>, kThreads, 0}},
    {"copied, one too many", {copied<1>, kThreads, 0}},
    {"beyond static shared", {beyond_static_shared, kThreads, 0}},
    {"beyond dynamic shared", {beyond_dynamic_shared, kThreads, kThreads * 4}},
    {"unwritten static", {unwritten_static<kThreads>, kThreads, 0}},
    {"unwritten dynamic", {unwritten_dynamic, kThreads, kThreads * 4}},
    {"no dynamic shared", {unwritten_dynamic, kThreads, 0}},
    {"misaligned", {misaligned, 1, 0}},
    {"divergent barrier", {divergent_barrier, kThreads, 0}},
    {"half a warp at a barrier", {half_a_warp_at_a_barrier, kThreads, 0}},
    {"early end", {early_end, kThreads, 0}},
    {"lanes missing", {lanes_missing, kThreads, 0}},
    {"lane outside its mask", {lane_outside_its_mask, kThreads, 0}},
    {"lane outside the mask read", {lane_outside_the_mask_read, kThreads, 0}},
    {"masks that disagree", {masks_that_disagree, kThreads, 0}},
    {"different shuffles", {different_shuffles, kThreads, 0}},
    {"halves", {halves, kThreads, 0}},
    {"misaligned copy", {one_copy<1, true>, 4, 128}},
    {"copy not waited for", {one_copy<0, false>, 4, 128}},
    {"zero filled", {zero_filled, kThreads, 16 * kThreads}},
    {"trap", {trap, kThreads, 0}},
    {"last thread", {last_thread, kThreads, 0}},
    {"counted", {counted<true>, kThreads, 0}},
    {"counted, not atomic", {counted<false>, kThreads, 0}},
    {"shuffles", {shuffles, 32, 0}},
    {"atomics", {atomics, kThreads, 0}},
    {"product of float16", {product<__half>, 32, 0}},
    {"product of bfloat16", {product<__nv_bfloat16>, 32, 0}},
    {"numbers", {numbers, 1, 0}},
    {"too many threads", {numbers, 1025, 0}},
    {"too much shared", {numbers, 1, 1 << 20}},
    {"too much with the static", {unwritten_static<8 * 1024>, kThreads, 40 * 1024}},
    {"more than is given unasked", {unwritten_static<5 * 1024>, kThreads, 32 * 1024}},
    {"all that is given unasked", {unwritten_static<4 * 1024>, kThreads, 32 * 1024}},
};

void planted(const std::string& name, const float* in, float* out, int n, unsigned blocks) {
  const Planted& of = kPlanted.at(name);
  LAUNCH(of.kernel, blocks, of.threads, of.shared_bytes, nullptr, in, out, n);
  check_launch("planted", "n", n, "blocks", blocks);
}

}  // namespace cuda
}  // namespace fastgpt
