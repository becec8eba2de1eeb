// Launches, and the shared memory that they ask for.
#pragma once
#include <array>
#include <tuple>

#include "simulator.h"

#define LAUNCH(...) ::dev::launch(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::cusim::dynamic_shared())

namespace dev {

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, const A&... given) {
  const std::tuple<P...> arguments(given...);
  const auto call = [&] { std::apply(kernel, arguments); };
  const auto bytes_of = [](const auto&... a) { return std::array<cusim::Argument, sizeof...(P)>{{{&a, sizeof a}...}}; };
  const auto bytes = std::apply(bytes_of, arguments);
  cusim::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, shared_bytes > kSharedUnasked, bytes.data(),
              (int)bytes.size()},
             [](const void* of) { (*static_cast<const decltype(call)*>(of))(); }, &call);
}

inline const char* launch_error() { return cusim::launch_error(); }

}  // namespace dev
