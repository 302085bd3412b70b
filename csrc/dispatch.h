// The instruction set in use, and the text of a CUDA error.
#pragma once

#include <string>

namespace mgebm {

// The instruction set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable".
const char* isa_name();
// The instruction sets of this build, fastest first; null past the last.
const char* isa_built(int index);
// Whether the set in use multiplies bfloat16, so that conv_chain can.
bool isa_has_bfloat();
// Whether its bfloat16 is faster than its float32.
bool isa_prefers_bfloat();
// `name` is "auto" or one of the sets; returns false and changes nothing when this CPU or this build has no such set.
bool set_isa(const char* name);

std::string cuda_error_text(int error);

}  // namespace mgebm
