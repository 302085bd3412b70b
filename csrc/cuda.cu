#include <cuda_runtime.h>

#include "dispatch.h"

namespace mgebm {

std::string cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mgebm
