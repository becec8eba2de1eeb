// CUDA's names for a host compiler: kernels become functions that the simulator calls once for each thread. Included by
// csrc/cuda/platform.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __shared__ static
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(holds) ((void)0)

#include "async_copy.h"
#include "atomics.h"
#include "intrinsics.h"
#include "launch.h"
#include "matrix.h"
#include "simulator.h"
#include "warp.h"

#define threadIdx (::cusim::self->thread)
#define blockIdx (::cusim::block_index)
#define blockDim (::cusim::block_size)
#define gridDim (::cusim::grid_size)
#define warpSize (::cusim::kWarp)
