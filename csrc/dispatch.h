// The instruction set in use, and the text of a CUDA error.
#pragma once

#include <string>

namespace mgebm {

// The set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable".
const char* isa_name();
// The sets of this build, fastest first; null past the last.
const char* isa_built(int index);
// Whether it multiplies bfloat16, as conv_chain can then.
bool isa_has_bfloat();
// Whether it then is faster than float32.
bool isa_prefers_bfloat();
// Takes "auto" or a name; returns false and changes nothing when this CPU or this build has no such set.
bool set_isa(const char* name);

std::string cuda_error_text(int error);

}  // namespace mgebm
