// The choice of instruction set, made when the module loads and changeable by name (MGEBM_SIMD, tests).
#include "dispatch.h"

#include <cstring>

#include "mgebm/interrupt.h"
#include "op_table.h"

#if defined(MGEBM_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mgebm {

bool (*interrupted)() = nullptr;

namespace {

#define MGEBM_POINTER(op, Params, layers) void (*op)(const Params&, int);
#define MGEBM_ADDRESS(op, Params, layers) set::op##_cpu,
#define MGEBM_WORKSPACE_POINTER(op, Params) int64_t (*op##_workspace)(const Params&, int);
#define MGEBM_WORKSPACE_ADDRESS(op, Params) set::op##_workspace,
struct Table {
  const char* name;
  bool bfloat;
  MGEBM_OPS(MGEBM_POINTER)
  MGEBM_WORKSPACES(MGEBM_WORKSPACE_POINTER)
};

// Instruction sets, fastest first.
#define MGEBM_TABLE(isa, bfloat)                                                                    \
  [] {                                                                                              \
    namespace set = isa;                                                                            \
    return Table{#isa, bfloat, MGEBM_OPS(MGEBM_ADDRESS) MGEBM_WORKSPACES(MGEBM_WORKSPACE_ADDRESS)}; \
  }()
constexpr Table kTables[] = {
#if defined(MGEBM_BFLOAT)
    MGEBM_TABLE(amx, true),       MGEBM_TABLE(avx512bf16, true),
#endif
#if defined(MGEBM_X86)
    MGEBM_TABLE(avx512, false),   MGEBM_TABLE(avx2, false),
#endif
    MGEBM_TABLE(portable, false),
};
#undef MGEBM_TABLE
#undef MGEBM_WORKSPACE_ADDRESS
#undef MGEBM_WORKSPACE_POINTER
#undef MGEBM_ADDRESS
#undef MGEBM_POINTER
#if defined(MGEBM_X86)

struct Leaf {
  unsigned eax, ebx, ecx, edx;
};
Leaf features(unsigned part) {
  Leaf leaf{};
  if (!__get_cpuid_count(7, part, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx)) return {};
  return leaf;
}

bool has_bfloat() { return features(1).eax >> 5 & 1; }

// Linux grants the use of AMX tile registers on request, once a process.
bool has_tiles() {
  const unsigned flags = features(0).edx;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (flags >> 22 & 1) && (flags >> 24 & 1) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

bool supported(const char* name) {
#if defined(MGEBM_X86)
  __builtin_cpu_init();
  if (!std::strcmp(name, "amx")) return supported("avx512bf16") && has_tiles();
  if (!std::strcmp(name, "avx512bf16")) return supported("avx512") && has_bfloat();
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
const char* isa_built(int index) {
  return index < static_cast<int>(sizeof(kTables) / sizeof(kTables[0])) ? kTables[index].name : nullptr;
}
bool isa_has_bfloat() { return current->bfloat; }

bool isa_prefers_bfloat() {
#if defined(MGEBM_X86)
  // Intel's cores multiply bfloat16 vectors no faster than float32 ones; their tile registers do, and AMD's vectors.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kGenu = 0x756E6547;  // of "GenuineIntel"
  const bool intel = __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == kGenu;
  return current->bfloat && (!intel || !std::strcmp(current->name, "amx"));
#else
  return false;
#endif
}

bool set_isa(const char* name) {
  const Table* table = find(name);
  if (table) current = table;
  return table != nullptr;
}

#define MGEBM_CALL(op, Params, layers) \
  void op##_cpu(const Params& params, int threads) { current->op(params, threads); }
MGEBM_OPS(MGEBM_CALL)
#undef MGEBM_CALL
#define MGEBM_CALL_WORKSPACE(op, Params) \
  int64_t op##_workspace(const Params& params, int threads) { return current->op##_workspace(params, threads); }
MGEBM_WORKSPACES(MGEBM_CALL_WORKSPACE)
#undef MGEBM_CALL_WORKSPACE

}  // namespace mgebm
