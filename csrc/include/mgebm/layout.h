// How tensors lie in memory, and how a params struct takes its arguments.
#pragma once

#include "macros.h"

namespace mgebm {

// A params struct names its fields in the order in which Python passes them; bindings.cpp alone reads them.
#define MGEBM_FIELDS(...)      \
  template <typename Visit>    \
  auto fields(Visit&& visit) { \
    return visit(__VA_ARGS__); \
  }

// Element (sample n, channel c, spatial index s) stands at n * sample + c * channel + s * spatial.
struct Strides {
  int64_t sample, channel, spatial;
  MGEBM_FIELDS(sample, channel, spatial)
};

// Up to three spatial dimensions; missing ones are 1.
struct Extent {
  int64_t depth, height, width;
  MGEBM_FIELDS(depth, height, width)
};

MG_HD int64_t volume(const Extent& e) { return e.depth * e.height * e.width; }

// A sequence of at most kMost items, without the standard library.
template <typename T, int kMost>
struct List {
  static constexpr int kCapacity = kMost;
  int count;
  T at[kMost];
};

}  // namespace mgebm
