// The choice of instruction set, made when the module loads and changeable by name (MGEBM_SIMD, tests).
#include <cstring>

#include "mgebm/cpu.h"

namespace mgebm {
namespace {

struct Table {
  const char* name;
  void (*noise)(const NoiseParams&, int);
  void (*langevin_step)(const LangevinStepParams&, int);
  void (*pyramid)(const PyramidParams&, int);
  void (*upsample)(const UpsampleParams&, int);
};

#define MGEBM_TABLE(isa) {#isa, isa::noise_cpu, isa::langevin_step_cpu, isa::pyramid_cpu, isa::upsample_cpu}
// Fastest first.
constexpr Table kTables[] = {
#if defined(MGEBM_X86)
    MGEBM_TABLE(avx512),
    MGEBM_TABLE(avx2),
#endif
    MGEBM_TABLE(portable),
};
#undef MGEBM_TABLE

bool supported(const char* name) {
#if defined(MGEBM_X86)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "portable");
}

const Table* find(const char* name) {
  for (const Table& table : kTables) {
    const bool wanted = !std::strcmp(name, "auto") || !std::strcmp(name, table.name);
    if (wanted && supported(table.name)) return &table;
  }
  return nullptr;
}

const Table* current = find("auto");

}  // namespace

const char* isa_name() { return current->name; }

bool set_isa(const char* name) {
  const Table* table = find(name);
  if (table) current = table;
  return table != nullptr;
}

void noise_cpu(const NoiseParams& params, int threads) { current->noise(params, threads); }
void langevin_step_cpu(const LangevinStepParams& params, int threads) { current->langevin_step(params, threads); }
void pyramid_cpu(const PyramidParams& params, int threads) { current->pyramid(params, threads); }
void upsample_cpu(const UpsampleParams& params, int threads) { current->upsample(params, threads); }

}  // namespace mgebm
