// The errors of launches; included behind platform.cuh.
#pragma once
#include <stdexcept>
#include <string>

namespace fastgpt {
namespace cuda {

inline std::string named() { return ""; }
template <class T, class... More>
std::string named(const char* name, T value, More... more) {
  return std::string(name) + "=" + std::to_string(value) + (sizeof...(more) ? ", " : "") + named(more...);
}

// Behind a launch: check_launch("store_kv", "N", N, "D", D) throws "store_kv(N=3, D=64): <what the CUDA runtime says>".
template <class... Named>
void check_launch(const char* launcher, Named... arguments) {
  if (const char* error = dev::launch_error()) {
    throw std::runtime_error(std::string(launcher) + "(" + named(arguments...) + "): " + error);
  }
}

}  // namespace cuda
}  // namespace fastgpt
