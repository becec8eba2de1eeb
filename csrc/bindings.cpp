// The Python module fastgpt._C. Pointers come as integers (tensor.data_ptr()), 0 for an absent tensor; shapes and dtypes
// have been checked by then. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "bindings_engine.h"
#include "cpu/pool.h"
#include "kernels.h"
#ifdef FASTGPT_CUDA  // set by setup.py, as is FASTGPT_BUILD_RECORD
#include "bindings_cuda.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace fastgpt;

namespace {

// How an argument of a kernel looks from Python: a pointer as an integer, the rest as it is.
template <class A>
struct Argument {
  using Python = A;
  static A cast(A a) { return a; }
};
template <class T>
struct Argument<T*> {
  using Python = uintptr_t;
  static T* cast(uintptr_t a) { return reinterpret_cast<T*>(a); }
};
// (dtype, pointer, rows, cols, row stride, column stride)
template <>
struct Argument<const Matrix&> {
  using Python = const std::tuple<int, uintptr_t, int64_t, int64_t, int64_t, int64_t>&;
  static Matrix cast(Python a) {
    auto [dtype, data, rows, cols, row, col] = a;
    return {dtype, reinterpret_cast<void*>(data), rows, cols, row, col};
  }
};
// (bias's dtype, bias, activation, pre, residual)
template <>
struct Argument<const Epilogue&> {
  using Python = const std::tuple<int, uintptr_t, int, uintptr_t, uintptr_t>&;
  static Epilogue cast(Python a) {
    auto [dtype, bias, activation, pre, residual] = a;
    return {dtype, reinterpret_cast<const void*>(bias), activation, reinterpret_cast<void*>(pre),
            reinterpret_cast<const void*>(residual)};
  }
};

// (pointer, batch stride, head stride, position stride)
template <>
struct Argument<Heads> {
  using Python = const std::tuple<uintptr_t, int64_t, int64_t, int64_t>&;
  static Heads cast(Python a) {
    auto [data, batch, head, position] = a;
    return {reinterpret_cast<void*>(data), batch, head, position};
  }
};
template <>
struct Argument<AttentionShape> {
  using Python = const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>&;
  static AttentionShape cast(Python a) {
    auto [B, H, G, T, S, D] = a;
    return {B, H, G, T, S, D};
  }
};
// (causal, scale, dropout_p, seed)
template <>
struct Argument<AttentionOptions> {
  using Python = const std::tuple<bool, float, double, int64_t>&;
  static AttentionOptions cast(Python a) {
    auto [causal, scale, dropout_p, seed] = a;
    return {causal, scale, dropout_p, seed};
  }
};

// (heads, how many, rows, how many)
template <>
struct Argument<Queries> {
  using Python = const std::tuple<uintptr_t, int64_t, uintptr_t, int64_t>&;
  static Queries cast(Python a) {
    auto [heads, head_count, rows, row_count] = a;
    return {reinterpret_cast<const int64_t*>(heads), head_count, reinterpret_cast<const int64_t*>(rows), row_count};
  }
};

// (ignored, smoothing, z_loss)
template <>
struct Argument<LossOptions> {
  using Python = const std::tuple<int64_t, double, double>&;
  static LossOptions cast(Python a) {
    auto [ignored, smoothing, z_loss] = a;
    return {ignored, smoothing, z_loss};
  }
};

template <class... A>
void define(py::module_& m, const char* name, void (*Kernels::*kernel)(A...)) {
  m.def(
      name, [kernel](typename Argument<A>::Python... a) { (active().*kernel)(Argument<A>::cast(a)...); },
      py::call_guard<py::gil_scoped_release>());
}

py::list level_list() {
  py::list all;
  for (int i = 0; i < kLevels; i++) {
    const Level& level = levels()[i];
    all.append(py::make_tuple(level.name, level.kernels != nullptr, level.lacking));
  }
  return all;
}

py::tuple cuda_devices() {
  py::list all;
#ifdef FASTGPT_CUDA
  constexpr int kCapacity = 64;
  static cuda::Device found[kCapacity];  // guarded by the GIL
  char reason[256] = "";
  int count = cuda::devices(found, kCapacity, reason);
  for (int i = 0; i < count; i++)
    all.append(py::make_tuple(found[i].name, found[i].major, found[i].minor, found[i].memory));
  return py::make_tuple(all, count ? py::object(py::none()) : py::object(py::str(reason)));
#else
  return py::make_tuple(all, "this build has no CUDA part");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of fastgpt, by raw pointers.";
  m.attr("BUILD") = FASTGPT_BUILD_RECORD;
  m.def("levels", &level_list, "(name, in this build, what the processor lacks for it), from the least capable");
  m.def("select_level", &select_level);
  m.def("active_level", [] { return active().name; });
  m.def("vector_width", [] { return active().width; });
  m.def("cpu_has_bf16", &cpu_has_bf16);
  m.def("cpu_has_vnni", &cpu_has_vnni);
  m.def("cuda_devices", &cuda_devices,
        "([(name, compute capability's major and minor, bytes of memory)], why there is none or None)");
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, py::call_guard<py::gil_scoped_release>());

  define(m, "layer_norm_forward", &Kernels::layer_norm_forward);
  define(m, "layer_norm_backward", &Kernels::layer_norm_backward);
  define(m, "arithmetic", &Kernels::arithmetic);
  define(m, "read_memory", &Kernels::read_memory);
  define(m, "gemm", &Kernels::gemm);
  define(m, "activation_backward", &Kernels::activation_backward);
  define(m, "gelu_forward", &Kernels::gelu_forward);
  define(m, "gelu_backward", &Kernels::gelu_backward);
  define(m, "attention_forward", &Kernels::attention_forward);
  define(m, "attention_backward", &Kernels::attention_backward);
  define(m, "attention_weights", &Kernels::attention_weights);
  define(m, "cross_entropy", &Kernels::cross_entropy);
  define(m, "dropout", &Kernels::dropout);
  define(m, "check_targets", &Kernels::check_targets);
  define(m, "add_rows", &Kernels::add_rows);
  define_engine(m);
#ifdef FASTGPT_CUDA
  py::module_ kernels = m.def_submodule("cuda", "The CUDA kernels' launchers.");
  define_cuda(kernels);
#endif
}
