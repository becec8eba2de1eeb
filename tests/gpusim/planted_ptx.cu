// Small kernels for the tests of the PTX machine: what nvcc makes of CUDA C++ that Triton makes nothing of.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

struct Numbers {
  const float* x;
  int64_t count;
};
struct Arguments {
  Numbers from;
  float* to;
  int function;
  float scale;
};

__device__ float value(int function, float x) {
  switch (function) {
    case 0: return expf(x);
    case 1: return logf(x);
    case 2: return tanhf(x);
    case 3: return erff(x);
    case 4: return x / 3.0f;
    case 5: return sqrtf(x);
    case 6: return powf(x, 2.5f);
    case 7: return log1pf(x);
    case 8: return fmodf(x, 0.3f);
    case 9: return (float)(exp((double)x) / 3.0);
    default: return rintf(x);
  }
}

// A struct by value, and blocks of two dimensions.
__global__ void functions(Arguments a) {
  const int i = (blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  if (i < a.from.count) a.to[i] = value(a.function, a.from.x[i]) * a.scale;
}

// x (blocks, threads) -> counts (blocks, 5), largest and sums over all.
__global__ void reductions(const int* x, int* counts, unsigned long long* largest, float* sums) {
  extern __shared__ float dynamic[];
  __shared__ int total;
  __shared__ unsigned long long best;
  __shared__ uint8_t bytes[100];
  const int i = blockIdx.x * blockDim.x + threadIdx.x, mine = x[i];
  if (threadIdx.x == 0) total = 0, best = 0;
  dynamic[threadIdx.x] = (float)mine;
  if (threadIdx.x < 100) bytes[threadIdx.x] = (uint8_t)mine;
  const int some = __syncthreads_or(mine == 7), all = __syncthreads_and(mine < 90), few = __syncthreads_count(mine < 10);
  atomicAdd(&total, mine);
  atomicMax(&best, (unsigned long long)mine << 33);
  const float other = dynamic[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  atomicAdd(sums + threadIdx.x % 4, other);
  if (threadIdx.x) return;
  const int found[5] = {some, all, few, total, bytes[99]};
  for (int n = 0; n < 5; n++) counts[blockIdx.x * 5 + n] = found[n];
  atomicMax(largest, best);
}

__constant__ float squares[8] = {0, 1, 4, 9, 16, 25, 36};

__global__ void tables(float* y) {
  static const int primes[5] = {2, 3, 5, 7, 11};
  y[threadIdx.x] = squares[threadIdx.x % 8] + 100 * primes[threadIdx.x % 5];
}

__global__ void stack(const int* x, int* y) {
  int kept[32];
  for (int i = 0; i < 32; i++) kept[i] = x[i];
  y[threadIdx.x] = kept[x[threadIdx.x] & 31];
}

// Rows of 4 numbers: the float16, bfloat16 and float8 nearest to each, and a few of their operations.
__global__ void narrow(const float* x, __half* h, __nv_bfloat16* b, uint8_t* bytes, float* wide) {
  const int i = threadIdx.x;
  for (int n = 0; n < 4; n++) {
    const __nv_fp8_e4m3 eight(x[4 * i + n]);
    bytes[4 * i + n] = eight.__x;
    wide[4 * i + n] = float(eight);
  }
  const __half2 first = __floats2half2_rn(x[4 * i], x[4 * i + 1]), second = __floats2half2_rn(x[4 * i + 2], x[4 * i + 3]);
  ((__half2*)h)[2 * i] = __hfma2(first, second, second);
  ((__half2*)h)[2 * i + 1] = __hmax2(first, second);
  for (int n = 0; n < 4; n++) b[4 * i + n] = __hmul(__float2bfloat16(x[4 * i + n]), __float2bfloat16(1.5f));
  if (__hgt(b[4 * i], b[4 * i + 1])) b[4 * i] = __float2bfloat16(0.0f);
}

// y (12, threads)
__global__ void bits(const int* x, const long long* wide, long long* y) {
  const int i = threadIdx.x, n = blockDim.x, a = x[i], b = x[(i + 1) % n];
  const long long c = wide[i], d = wide[(i + 1) % n];
  y[i] = __ffs(a) + 100 * __popcll(c) + 10000 * __clzll(c);
  y[n + i] = (unsigned)__brev(a);
  y[2 * n + i] = __umulhi(a, b);
  y[3 * n + i] = __umul64hi(c, d);
  y[4 * n + i] = __dp4a(a, b, 5);
  y[5 * n + i] = (unsigned)__funnelshift_r(a, b, i % 32);
  y[6 * n + i] = (unsigned)__byte_perm(a, b, 0x5142);
  y[7 * n + i] = d ? c / d : 0;
  y[8 * n + i] = b ? a % b : 0;
  y[9 * n + i] = __match_any_sync(~0u, a & 3);
  y[10 * n + i] = __shfl_down_sync(~0u, a, 3, 8);
  y[11 * n + i] = __ballot_sync(~0u, a < 0);
}

// A loop that brings 16 bytes a thread, at places that are all of them 4 bytes; and a longer one that brings 4.
__global__ void stream(const uint4* x, const int* places, uint4* y, int n) {
  uint4 sum = {};
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const uint4 four = x[places[i] + threadIdx.x];
    sum.x ^= four.x, sum.y ^= four.y, sum.z ^= four.z, sum.w ^= four.w;
  }
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const unsigned a = places[i] * 0x9E3779B9u, b = (a ^ a >> 15) * 0x85EBCA6Bu, c = (b ^ b >> 13) * 0xC2B2AE35u;
    sum.x += (c ^ c >> 16) % 1000003u;
  }
  y[threadIdx.x] = sum;
}
