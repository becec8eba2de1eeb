// The CUDA kernels' launchers in Python: pointers and streams as integers, structs as tuples, as in bindings.cpp.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cuda/kernels.h"
#include "cuda/launch_rules.h"
#include "cuda/sampling.h"
#include "cuda/weight_only.h"

namespace py = pybind11;
using namespace fastgpt::cuda;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (dtype, data, stride)
typedef std::tuple<int, uintptr_t, int64_t> RowsTuple;
Rows rows(const RowsTuple& t) {
  auto [dtype, data, stride] = t;
  return {dtype, at<void>(data), stride};
}
// (dtype, k, v, k_scale, v_scale, pages, page_size, G, D, row)
typedef std::tuple<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t> CacheTuple;
PagedCache cache(const CacheTuple& t) {
  auto [dtype, k, v, k_scale, v_scale, pages, page_size, G, D, row] = t;
  return {dtype, at<void>(k), at<void>(v), at<float>(k_scale), at<float>(v_scale), pages, page_size, G, D, row};
}
// (tables, query_starts, context_lens, table_stride, count, max_query, max_context)
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t> SequencesTuple;
Sequences sequences(const SequencesTuple& t) {
  auto [tables, query_starts, context_lens, table_stride, count, max_query, max_context] = t;
  return {at<int32_t>(tables), at<int32_t>(query_starts), at<int32_t>(context_lens), table_stride, count, max_query,
          max_context};
}

void define_cache(py::module_& m) {
  m.attr("CHUNK") = kChunk;
  m.def("store_kv", [](const CacheTuple& of, const RowsTuple& k, const RowsTuple& v, uintptr_t slots, int64_t N,
                       uintptr_t stream) { store_kv(cache(of), rows(k), rows(v), at<int64_t>(slots), N, at<void>(stream)); });
  m.def("partial_floats", &partial_floats);
  m.def("rows_of_block", &rows_of_block);
  m.def("chunks_of_block", &chunks_of_block);
  m.def("reciprocal", &reciprocal);
  m.def("paged_attention",
        [](const CacheTuple& of, const RowsTuple& q, const RowsTuple& out, const SequencesTuple& of_sequences, int64_t H,
           float scale, int64_t window, uintptr_t partial, int64_t processors, uintptr_t stream) {
          paged_attention(cache(of), rows(q), rows(out), sequences(of_sequences), H, scale, window, at<float>(partial),
                          processors, at<void>(stream));
        });
  m.def("copy_pages", [](uintptr_t data, int64_t count, int64_t stride, int64_t page_bytes, uintptr_t pairs, int64_t copies,
                         uintptr_t stream) {
    copy_pages(at<void>(data), count, stride, page_bytes, at<int32_t>(pairs), copies, at<void>(stream));
  });
}

// (bits, data, scales, bias, N, K)
typedef std::tuple<int, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t> WeightTuple;
WeightOnly weight_only(const WeightTuple& t) {
  auto [bits, data, scales, bias, N, K] = t;
  return {bits, at<void>(data), at<void>(scales), at<float>(bias), N, K};
}

void define_weight_only(py::module_& m) {
  m.def("weight_only_warps", &weight_only_warps);
  m.def("weight_only_linear", [](const WeightTuple& weight, const RowsTuple& x, const RowsTuple& out, int64_t M,
                                 int activation, const RowsTuple& residual, uintptr_t stream) {
    weight_only_linear(weight_only(weight), rows(x), rows(out), M, activation, rows(residual), at<void>(stream));
  });
}

// Draws in three parts: (temperature, top_k, top_p, min_p, seed, sample, position), (repetition, presence, frequency,
// history, history_stride, prompt, length, counts), (bias_starts, bias_ids, bias)
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t> FiltersTuple;
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t> PenaltiesTuple;
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t> BiasesTuple;
Draws draws(const FiltersTuple& filters, const PenaltiesTuple& penalties, const BiasesTuple& biases) {
  auto [temperature, top_k, top_p, min_p, seed, sample, position] = filters;
  auto [repetition, presence, frequency, history, history_stride, prompt, length, counts] = penalties;
  auto [bias_starts, bias_ids, bias] = biases;
  return {at<float>(temperature), at<int32_t>(top_k),  at<float>(top_p),         at<float>(min_p),
          at<int64_t>(seed),      at<int32_t>(sample), at<int32_t>(position),    at<float>(repetition),
          at<float>(presence),    at<float>(frequency), at<int32_t>(history),    history_stride,
          at<int32_t>(prompt),    at<int32_t>(length), at<int32_t>(counts),      at<int32_t>(bias_starts),
          at<int32_t>(bias_ids),  at<float>(bias)};
}

void define_sampling(py::module_& m) {
  m.def("sampling_threads", &sampling_threads);
  m.def("sample", [](const RowsTuple& logits, const RowsTuple& work, int64_t R, int64_t V, const FiltersTuple& filters,
                     const PenaltiesTuple& penalties, const BiasesTuple& biases, uintptr_t out, uintptr_t stream) {
    sample(rows(logits), rows(work), R, V, draws(filters, penalties, biases), at<int32_t>(out), at<void>(stream));
  });
}

}  // namespace

void define_cuda(py::module_& m) {
  define_cache(m);
  define_weight_only(m);
  define_sampling(m);
}
