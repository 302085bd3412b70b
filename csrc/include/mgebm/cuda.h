// Host side of the CUDA launchers, with no CUDA header: bindings.cpp includes it too.
#pragma once

#include <string>

#include "ops/langevin_step.h"
#include "ops/noise.h"
#include "ops/pyramid.h"
#include "ops/upsample.h"

namespace mgebm {

constexpr int kThreads = 256;

std::string cuda_error_text(int error);

}  // namespace mgebm
