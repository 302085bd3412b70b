// Where a draw's counter and key come from: numbers, or device memory that a replayed graph can see change.
#pragma once

#include "layout.h"
#include "normal.h"

namespace mgebm {

struct Counters {
  uint64_t seed;
  int64_t first_sample;
  int64_t step;
  uint32_t stream;
  const int64_t* seed_at;     // null: use `seed`
  const int64_t* step_at;     // null: use `step`
  const int64_t* samples_at;  // null: sample id = first_sample + index
  bool one_base;              // samples_at holds one base, not an id for each sample
  MGEBM_FIELDS(seed, first_sample, step, stream, seed_at, step_at, samples_at, one_base)
};

struct SampleKey {
  uint32_t k0, k1, sample, step, stream;
  bool valid;  // false where a counter from memory does not fit 32 bits: its noise is NaN (its words -1), never a
               // wrapped number
};

MG_HD SampleKey sample_key(const Counters& counters, int64_t index) {
  const uint64_t seed = counters.seed_at ? static_cast<uint64_t>(*counters.seed_at) : counters.seed;
  const int64_t step = counters.step_at ? *counters.step_at : counters.step;
  int64_t sample;
  if (!counters.samples_at) {
    sample = counters.first_sample + index;
  } else {
    sample = counters.one_base ? *counters.samples_at + index : counters.samples_at[index];
  }
  const bool valid = (static_cast<uint64_t>(sample) >> 32) == 0 && (static_cast<uint64_t>(step) >> 32) == 0;
  return {static_cast<uint32_t>(seed),
          static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(sample),
          static_cast<uint32_t>(step),
          counters.stream,
          valid};
}

MG_HD Words words_at(const SampleKey& key, uint32_t quad) {
  return philox(quad, key.sample, key.step, key.stream, key.k0, key.k1);
}

}  // namespace mgebm
