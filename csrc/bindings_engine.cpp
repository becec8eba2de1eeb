// The decode engine in the module fastgpt._C: pointers as integers, as in bindings.cpp.
#include "bindings_engine.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/pool.h"

namespace py = pybind11;
using namespace fastgpt;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (format, N, K, data, bias)
typedef std::tuple<int, int64_t, int64_t, uintptr_t, uintptr_t> PackedTuple;
Packed packed(const PackedTuple& t) {
  auto [format, N, K, data, bias] = t;
  return {format, N, K, at<uint8_t>(data), at<float>(bias)};
}
// (dtype, k, v, k_scale, v_scale, page_size, G, D, page_rows)
typedef std::tuple<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t> CacheTuple;
KvCache cache(const CacheTuple& t) {
  auto [dtype, k, v, k_scale, v_scale, page_size, G, D, page_rows] = t;
  return {dtype, at<void>(k), at<void>(v), at<float>(k_scale), at<float>(v_scale), page_size, G, D,
          page_rows};
}
typedef std::tuple<uintptr_t, uintptr_t> NormTuple;
Norm norm(const NormTuple& t) { return {at<float>(std::get<0>(t)), at<float>(std::get<1>(t))}; }
// (ln_1, qkv, proj, ln_2, fc, out, scale)
typedef std::tuple<NormTuple, PackedTuple, PackedTuple, NormTuple, PackedTuple, PackedTuple, float> LayerTuple;
Layer layer(const LayerTuple& t) {
  auto [ln_1, qkv, proj, ln_2, fc, out, scale] = t;
  return {norm(ln_1), norm(ln_2), packed(qkv), packed(proj), packed(fc), packed(out), scale};
}
// (C, H, inner, vocab, activation, eps)
typedef std::tuple<int64_t, int64_t, int64_t, int64_t, int, float> Sizes;

// A model and its caches; the memory behind the pointers is the caller's to keep.
struct Decoder {
  std::vector<Layer> layers;
  std::vector<KvCache> caches;
  Model model;

  Decoder(const Sizes& sizes, const std::vector<LayerTuple>& of_layers, const std::vector<CacheTuple>& of_caches,
          const NormTuple& ln_f, const PackedTuple& head, const PackedTuple& embedding, uintptr_t positions) {
    for (const auto& t : of_layers) layers.push_back(layer(t));
    for (const auto& t : of_caches) caches.push_back(cache(t));
    if (layers.size() != caches.size()) throw py::value_error("Decoder: a cache for each layer");
    auto [C, H, inner, vocab, activation, eps] = sizes;
    model = {C, H, inner, vocab, activation, eps, (int64_t)layers.size(), layers.data(), caches.data(), norm(ln_f),
             packed(head), packed(embedding), at<float>(positions)};
  }
  Decoder(const Decoder&) = delete;

  void step(int threads, uintptr_t tokens, int64_t M, uintptr_t sequences, int64_t count, uintptr_t wanted, int64_t L,
            uintptr_t logits) const {
    ThreadLimit limit(threads);
    active_engine().step(model, {at<int32_t>(tokens), M, at<PagedSequence>(sequences), count, at<int32_t>(wanted), L,
                                 at<float>(logits)});
  }
};

// (temperature, top_k, top_p, min_p, repetition, presence, frequency, uniform, history, prompt, length, bias ids, bias,
// biases)
typedef std::tuple<float, int64_t, float, float, float, float, float, double, uintptr_t, int64_t, int64_t, uintptr_t,
                   uintptr_t, int64_t>
    DrawTuple;
Draw draw(const DrawTuple& t) {
  auto [temperature, top_k, top_p, min_p, repetition, presence, frequency, uniform, history, prompt, length, ids, bias,
        biases] = t;
  return {temperature, top_k, top_p, min_p, repetition, presence, frequency, uniform,
          at<int32_t>(history), prompt, length, at<int32_t>(ids), at<float>(bias), biases};
}

void sample(uintptr_t logits, int64_t stride, int64_t V, const std::vector<DrawTuple>& draws, uintptr_t out) {
  std::vector<Draw> all;
  for (const auto& t : draws) all.push_back(draw(t));
  py::gil_scoped_release release;
  active_engine().sample(at<float>(logits), stride, V, all.data(), (int64_t)all.size(), at<int32_t>(out));
}

}  // namespace

void define_engine(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("engine_dots", [] { return active_engine().dots; });
  m.def("panel_columns", [] { return active_engine().panel_columns(); });
  m.def("panel_bytes", [](int format, int64_t K) { return active_engine().panel_bytes(format, K); });
  m.def(
      "pack_weight",
      [](int format, int dtype, uintptr_t weight, int64_t N, int64_t K, int64_t row, int64_t col, uintptr_t panels) {
        active_engine().pack_weight(format, {dtype, at<void>(weight), N, K, row, col}, at<uint8_t>(panels));
      },
      no_gil);
  m.def(
      "fingerprint", [](uintptr_t data, int64_t bytes) { return active_engine().fingerprint(at<uint8_t>(data), bytes); }, no_gil);
  m.def("unpack_column", [](const PackedTuple& weight, int64_t n, uintptr_t out) {
    active_engine().unpack_column(packed(weight), n, at<float>(out));
  });
  m.def(
      "packed_linear",
      [](const PackedTuple& weight, uintptr_t x, int64_t M, int activation, uintptr_t residual, uintptr_t out) {
        active_engine().packed_linear(packed(weight), at<float>(x), M, activation, at<float>(residual), at<float>(out));
      },
      no_gil);
  m.def(
      "store_kv",
      [](const CacheTuple& of, uintptr_t k, uintptr_t v, int64_t row, uintptr_t sequences, int64_t count) {
        active_engine().store_kv(cache(of), at<float>(k), at<float>(v), row, at<PagedSequence>(sequences), count);
      },
      no_gil);
  m.def(
      "paged_attention",
      [](const CacheTuple& of, uintptr_t q, int64_t q_row, int64_t H, float scale, uintptr_t sequences, int64_t count,
         uintptr_t out, int64_t out_row) {
        active_engine().paged_attention(cache(of), at<float>(q), q_row, H, scale, at<PagedSequence>(sequences), count,
                                        at<float>(out), out_row);
      },
      no_gil);
  m.def("sample", &sample);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<const Sizes&, const std::vector<LayerTuple>&, const std::vector<CacheTuple>&, const NormTuple&,
                    const PackedTuple&, const PackedTuple&, uintptr_t>())
      .def("step", &Decoder::step, no_gil);
}
