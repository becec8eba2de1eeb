// The module of the shim: the launchers, as the extension has them, and the simulator's controls.
#include <pybind11/pybind11.h>

#include "bindings_cuda.h"
#include "simulator.h"

namespace py = pybind11;

namespace {

py::tuple numbers(dim3 size) { return py::make_tuple(size.x, size.y, size.z); }

py::list bytes_of(const cusim::Launch& launch) {
  py::list all;
  for (int i = 0; i < launch.argument_count; i++) {
    const cusim::Argument& argument = launch.arguments[i];
    all.append(py::bytes(static_cast<const char*>(argument.data), argument.bytes));
  }
  return all;
}

void set_recorder(const py::object& callback) {
  if (callback.is_none()) return cusim::set_recorder({});
  cusim::set_recorder([callback](const std::string& symbol, const cusim::Launch& launch) {
    callback(symbol, numbers(launch.grid), numbers(launch.block), launch.shared_bytes, bytes_of(launch));
  });
}

}  // namespace

PYBIND11_MODULE(fastgpt_cusim, m) {
  define_cuda(m);
  m.def("set_order", &cusim::set_order, py::arg("random"), py::arg("seed"));
  m.def("set_copies_early", [](bool early) { cusim::copies_early = early; });
  m.def("copied_bytes", [] { return cusim::copied_bytes; }, "by asynchronous copies of 16 bytes so far");
  m.def("fail_next_launch", &cusim::fail_next_launch);
  m.def("set_recorder", &set_recorder);
  m.def("add_static_shared", &cusim::add_static_shared);
}
