// The only file that knows Python. Addresses come as integers: mgebm_fast/ops checks dtype, shape, layout and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mgebm/cpu.h"
#if defined(MGEBM_CUDA)
#include "mgebm/cuda.h"
#endif

namespace py = pybind11;
using namespace mgebm;

namespace {

using Address = uintptr_t;
using Triple = std::array<int64_t, 3>;
// seed, first sample, step, stream, addresses of seed, step and samples (0: none), one base
using CounterArguments = std::tuple<uint64_t, int64_t, int64_t, uint32_t, Address, Address, Address, bool>;
using UpdateArguments = std::array<double, 7>;
using Level = std::pair<Triple, Address>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Counters counters(const CounterArguments& a) {
  const auto [seed, first_sample, step, stream, seed_at, step_at, samples_at, one_base] = a;
  return {seed,
          first_sample,
          step,
          stream,
          at<const int64_t>(seed_at),
          at<const int64_t>(step_at),
          at<const int64_t>(samples_at),
          one_base};
}

Strides strides(const Triple& t) { return {t[0], t[1], t[2]}; }
Extent extent(const Triple& t) { return {t[0], t[1], t[2]}; }

NoiseParams noise_params(Address out, int64_t samples, int64_t elements, uint32_t first_quad, int distribution,
                         const CounterArguments& c) {
  return {at<void>(out), samples, elements, first_quad, static_cast<Distribution>(distribution), counters(c)};
}

LangevinStepParams langevin_step_params(Address x, Address grad, Address mask, const Triple& size,
                                        const Triple& x_strides, const Triple& grad_strides, const Triple& mask_strides,
                                        int grad_type, const UpdateArguments& u, const CounterArguments& c) {
  LangevinStepParams p{};
  p.x = at<float>(x);
  p.grad = at<const void>(grad);
  p.mask = at<const uint8_t>(mask);
  p.samples = size[0];
  p.channels = size[1];
  p.spatial = size[2];
  p.x_strides = strides(x_strides);
  p.grad_strides = strides(grad_strides);
  p.mask_strides = strides(mask_strides);
  p.drift = static_cast<float>(u[0]);
  p.noise_std = static_cast<float>(u[1]);
  p.inverse_variance = static_cast<float>(u[2]);
  p.reference_mean = static_cast<float>(u[3]);
  p.grad_clamp = static_cast<float>(u[4]);
  p.low = static_cast<float>(u[5]);
  p.high = static_cast<float>(u[6]);
  p.grad_type = static_cast<GradType>(grad_type);
  p.counters = counters(c);
  return p;
}

PyramidParams pyramid_params(Address input, bool bytes, int64_t planes, const Triple& size,
                             const std::vector<Level>& levels) {
  if (levels.size() > kMaxLevels) {
    throw std::invalid_argument("pyramid: sizes must be at most " + std::to_string(kMaxLevels) + " a chain, got " +
                                std::to_string(levels.size()));
  }
  PyramidParams p{};
  p.input = at<const void>(input);
  p.input_is_bytes = bytes;
  p.planes = planes;
  p.extent = extent(size);
  p.levels = static_cast<int>(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    p.level_extent[i] = extent(levels[i].first);
    p.level_output[i] = at<float>(levels[i].second);
  }
  return p;
}

UpsampleParams upsample_params(Address input, Address output, int64_t planes, const Triple& size,
                               const Triple& factor) {
  return {at<const float>(input), at<float>(output), planes, extent(size), extent(factor)};
}

// (Not named bind: the tuple arguments would find std::bind.) Binds op_cpu(arguments..., threads) and, where built,
// op_cuda(arguments..., device, stream) for one params builder.
template <typename Params, typename Cuda, typename... Arguments>
void add_op(py::module_& m, const char* op, Params (*build)(Arguments...), void (*cpu)(const Params&, int),
            [[maybe_unused]] Cuda cuda) {
  m.def((std::string(op) + "_cpu").c_str(), [build, cpu](Arguments... arguments, int threads) {
    const Params params = build(arguments...);
    py::gil_scoped_release release;
    cpu(params, threads);
  });
#if defined(MGEBM_CUDA)
  const std::string name = op;
  m.def((name + "_cuda").c_str(), [build, cuda, name](Arguments... arguments, int device, Address stream) {
    const Params params = build(arguments...);
    const int error = cuda(params, device, at<void>(stream));
    if (error) throw std::runtime_error(name + ": CUDA kernel launch failed: " + cuda_error_text(error));
  });
#endif
}

}  // namespace

#if defined(MGEBM_CUDA)
#define MGEBM_LAUNCHERS(op) mgebm::op##_cpu, mgebm::op##_cuda
#else
#define MGEBM_LAUNCHERS(op) mgebm::op##_cpu, nullptr
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of mgebm_fast; call them through mgebm_fast.ops.";
  add_op(m, "noise", noise_params, MGEBM_LAUNCHERS(noise));
  add_op(m, "langevin_step", langevin_step_params, MGEBM_LAUNCHERS(langevin_step));
  add_op(m, "pyramid", pyramid_params, MGEBM_LAUNCHERS(pyramid));
  add_op(m, "upsample", upsample_params, MGEBM_LAUNCHERS(upsample));
  // The shared header's arithmetic on given words, (quads, 4) uint32 -> (quads, 4) float32: extremes that no seed
  // reaches.
  m.def("normals_of_words", [](Address words, Address out, int64_t quads) {
    const Words* const in = at<const Words>(words);
    for (int64_t i = 0; i < quads; ++i) at<Quad>(out)[i] = normals_of(in[i]);
  });
  m.def("isa", [] { return std::string(isa_name()); });
  m.def("set_isa", [](const std::string& name) { return set_isa(name.c_str()); });
  m.def("compiler", [] { return std::string(MGEBM_COMPILER); });
  m.def("cuda_archs", [] { return std::string(MGEBM_CUDA_ARCHS); });
  m.def("cuda_version", [] { return std::string(MGEBM_CUDA_VERSION); });
  m.def("cuda_note", [] { return std::string(MGEBM_CUDA_NOTE); });
}
