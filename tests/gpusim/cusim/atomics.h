// CUDA's atomic functions. They are relaxed, as on a GPU: they order no other accesses.
#pragma once
#include <string.h>

#include <type_traits>

namespace cusim {

template <class T>
struct Same {
  typedef T type;
};
template <class T>
using Value = typename Same<T>::type;  // the pointer alone says the type, so that a plain 1 will do

template <class T>
constexpr bool is_word = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <class T>
constexpr bool is_ordered = is_word<T> || std::is_same_v<T, long long>;

// Puts make(old) in the place of *p -> old.
template <class T, class Make>
T update(T* p, Make make) {
  T old, made;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do made = make(old);
  while (!__atomic_compare_exchange(p, &old, &made, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cusim

template <class T>
T atomicAdd(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_word<T> || std::is_floating_point_v<T>, "CUDA has no atomicAdd of this type");
  return cusim::update(p, [=](T old) { return old + v; });
}
template <class T>
T atomicSub(T* p, cusim::Value<T> v) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "CUDA has no atomicSub of this type");
  return cusim::update(p, [=](T old) { return old - v; });
}
template <class T>
T atomicMin(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_ordered<T>, "CUDA has no atomicMin of this type");
  return cusim::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_ordered<T>, "CUDA has no atomicMax of this type");
  return cusim::update(p, [=](T old) { return v > old ? v : old; });
}
template <class T>
T atomicExch(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_word<T> || std::is_same_v<T, float>, "CUDA has no atomicExch of this type");
  return cusim::update(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, cusim::Value<T> expected, cusim::Value<T> v) {
  static_assert(cusim::is_word<T>, "CUDA has no atomicCAS of this type");
  __atomic_compare_exchange(p, &expected, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicAnd(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_ordered<T>, "CUDA has no atomicAnd of this type");
  return cusim::update(p, [=](T old) { return old & v; });
}
template <class T>
T atomicOr(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_ordered<T>, "CUDA has no atomicOr of this type");
  return cusim::update(p, [=](T old) { return old | v; });
}
template <class T>
T atomicXor(T* p, cusim::Value<T> v) {
  static_assert(cusim::is_ordered<T>, "CUDA has no atomicXor of this type");
  return cusim::update(p, [=](T old) { return old ^ v; });
}

// Blocks run one after another, and within one the sanitizers see barriers alone.
inline void __threadfence() {}
inline void __threadfence_block() {}
