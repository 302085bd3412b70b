// The resident chain on the host: the same source as on a GPU, its warps in an order drawn anew each phase, its shared
// memory checked. Built and called by resident_host.py, which gives the fields of ResidentParams as a flat list: a
// number each, of a float its bits, of a List its length and then its items.
#include <cstdio>
#include <exception>
#include <type_traits>

#include "ops/conv_chain/resident.h"

namespace {

using namespace mgebm;

struct Numbers {
  const int64_t* next;
};

template <typename T>
void read(Numbers& from, T& to) {
  if constexpr (std::is_pointer_v<T>) {
    to = reinterpret_cast<T>(*from.next++);
  } else if constexpr (std::is_floating_point_v<T>) {
    to = as_float(static_cast<uint32_t>(*from.next++));
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    to = static_cast<T>(*from.next++);
  } else {
    to.fields([&](auto&... fields) { (read(from, fields), ...); });
  }
}

template <typename T, int kMost>
void read(Numbers& from, List<T, kMost>& to) {
  to.count = static_cast<int>(*from.next++);
  if (to.count > kMost) throw std::invalid_argument("too many items");
  for (int i = 0; i < to.count; ++i) read(from, to.at[i]);
}

}  // namespace

extern "C" int conv_chain_host(const int64_t* words, unsigned seed, char* error, int error_size) {
  try {
    Numbers from{words};
    ResidentParams p{};
    read(from, p);
    for (int block = 0; block < p.blocks; ++block) {
      HostCta cta(block, p.warps, p.shared_bytes, seed + static_cast<unsigned>(block));
      Resident<HostCta>(cta, p).run();
    }
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, static_cast<size_t>(error_size), "%s", e.what());
    return 1;
  }
}
