// In front of isa.cpp: the tables of the avx512 level become ones whose every kernel runs on the processor of processor.py,
// whose entry is the number in FASTGPT_MACHINE. It finds the arguments where they are: it has this process's memory.
#include <stdlib.h>

#include <type_traits>

#include "cpu/isa.h"
#include "cpu/pool.h"

extern "C" unsigned __cpu_model[4];  // libgcc's: what __builtin_cpu_supports reads, not looked up again while it isn't 0

namespace fastgpt {
namespace {

template <class F>
void on_machine(F& f) {
  typedef void (*Entry)(void (*)(void*), void*);
  static const Entry entry = (Entry)strtoull(getenv("FASTGPT_MACHINE"), nullptr, 16);
  ThreadLimit one(1);  // the pool's other threads are native
  for (int slot = 0; slot < kScratchSlots; slot++) scratch((ScratchSlot)slot, 1 << 26);  // no kernel has to allocate
  entry([](void* f) { (*(F*)f)(); }, &f);
}

template <auto Table, auto Kernel, class R, class... A>
R forward(A... a) {
  if constexpr (std::is_void_v<R>) {
    auto call = [&] { ((*Table)->*Kernel)(a...); };
    on_machine(call);
  } else {
    R result;
    auto call = [&] { result = ((*Table)->*Kernel)(a...); };
    on_machine(call);
    return result;
  }
}
template <auto Table, auto Kernel, class R, class... A>
void replace(R (*&kernel)(A...)) {
  kernel = forward<Table, Kernel, R, A...>;
}
template <auto Table, auto... Kernel>
auto forwarding() {
  auto table = **Table;
  (replace<Table, Kernel>(table.*Kernel), ...);
  return table;
}

const int detected = [] {
  auto detect = [] {
    __cpu_model[0] = __cpu_model[3] = 0;
    __builtin_cpu_init();
  };
  on_machine(detect);
  return 0;
}();

typedef Kernels K;
typedef EngineKernels E;
const K ops = forwarding<&kAvx512, &K::layer_norm_forward, &K::layer_norm_backward, &K::arithmetic, &K::read_memory, &K::gemm,
                         &K::activation_backward, &K::gelu_forward, &K::gelu_backward, &K::attention_forward,
                         &K::attention_backward, &K::attention_weights, &K::cross_entropy, &K::check_targets, &K::add_rows,
                         &K::dropout>();
template <auto Table>
const E engine = forwarding<Table, &E::panel_columns, &E::panel_bytes, &E::pack_weight, &E::fingerprint, &E::unpack_column,
                            &E::packed_linear, &E::store_kv, &E::paged_attention, &E::step, &E::sample>();
const K* const machine_ops = &ops;
const E* const machine_engine = &engine<&kEngineAvx512>;
const E* const machine_engine_vnni = &engine<&kEngineAvx512Vnni>;
const E* const machine_engine_bf16 = &engine<&kEngineAvx512Bf16>;

}  // namespace
}  // namespace fastgpt

#define kAvx512 machine_ops
#define kEngineAvx512 machine_engine
#define kEngineAvx512Vnni machine_engine_vnni
#define kEngineAvx512Bf16 machine_engine_bf16
