#include "device.h"

#include <stdio.h>
#include <string.h>

#include <cuda_runtime_api.h>

namespace fastgpt {
namespace cuda {
namespace {

constexpr int kReason = 256;

// The runtime reports a missing driver as an insufficient one; the versions tell the two apart.
void explain(cudaError_t error, char* reason) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) {
    snprintf(reason, kReason, "no NVIDIA driver");
  } else if (error == cudaErrorInsufficientDriver) {
    snprintf(reason, kReason, "the NVIDIA driver is for CUDA %d.%d, this build needs one for %d.%d or later",
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  } else {
    snprintf(reason, kReason, "%s", cudaGetErrorString(error));
  }
}

}  // namespace

int devices(Device* found, int capacity, char* reason) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();  // a later call must not see this error
    explain(error == cudaSuccess ? cudaErrorNoDevice : error, reason);
    return 0;
  }
  count = count < capacity ? count : capacity;
  for (int i = 0; i < count; i++) {
    cudaDeviceProp properties;
    if ((error = cudaGetDeviceProperties(&properties, i)) != cudaSuccess) {
      cudaGetLastError();
      explain(error, reason);
      return i;
    }
    memcpy(found[i].name, properties.name, sizeof found[i].name);
    found[i].major = properties.major;
    found[i].minor = properties.minor;
    found[i].memory = properties.totalGlobalMem;
  }
  return count;
}

}  // namespace cuda
}  // namespace fastgpt
