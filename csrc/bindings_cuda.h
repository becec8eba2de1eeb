#pragma once
#include <pybind11/pybind11.h>

// Adds the CUDA kernels' launchers to a module: to fastgpt._C.cuda, and in tests to a module that runs them on the CPU.
void define_cuda(pybind11::module_& m);
