// The only file that knows Python. Addresses come as integers: mgebm_fast/ops checks dtype, shape, layout and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
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

LangevinStepCoefficients coefficients(const UpdateArguments& u) {
  const auto number = [&](int i) { return static_cast<float>(u[i]); };
  return {number(0), number(1), number(2), number(3), number(4), number(5), number(6)};
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
  p.update = coefficients(u);
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

// classes, outputs; addresses of first_tap, tap_pixel, tap_weight, first_output, base, output
using WindowArguments = std::tuple<int, int, Address, Address, Address, Address, Address, Address>;
// forward, backward; weights and rows of each; bias, gamma, beta; eps, slope; activation; pixels and channels, in and
// out
using StageArguments = std::tuple<WindowArguments, WindowArguments, Address, int, Address, int, Address, Address,
                                  Address, float, float, int, std::array<int, 4>>;

// The stages live as long as the call.
struct ConvChainCall : ConvChainParams {
  std::vector<ConvStage> stages_held;
};

Windows windows(const WindowArguments& a) {
  const auto [classes, outputs, first_tap, tap_pixel, tap_weight, first_output, base, output] = a;
  const auto table = [](Address address) { return at<const int32_t>(address); };
  return {classes,     outputs,      table(first_tap), table(tap_pixel), table(tap_weight), table(first_output),
          table(base), table(output)};
}

ConvChainCall conv_chain_params(const std::vector<StageArguments>& stages, bool bfloat, Address head, Address x,
                                Address gradient, Address mask, int64_t samples, int64_t steps,
                                const std::array<int, 3>& image, const UpdateArguments& u, const CounterArguments& c,
                                Address workspace) {
  ConvChainCall p{};
  for (const auto& [forward, backward, forward_weights, forward_rows, backward_weights, backward_rows, bias, gamma,
                    beta, eps, slope, activation, sizes] : stages) {
    p.stages_held.push_back({windows(forward), windows(backward), at<const void>(forward_weights),
                             at<const void>(backward_weights), forward_rows, backward_rows, at<const float>(bias),
                             at<const float>(gamma), at<const float>(beta), eps, slope,
                             static_cast<Activation>(activation), sizes[0], sizes[1], sizes[2], sizes[3]});
  }
  p.stage = p.stages_held.data();
  p.stages = static_cast<int>(stages.size());
  p.bfloat = bfloat;
  p.head = at<const float>(head);
  p.x = at<float>(x);
  p.gradient = at<float>(gradient);
  p.mask = at<const uint8_t>(mask);
  p.samples = samples;
  p.steps = steps;
  p.channels = image[0];
  p.pixels = image[1];
  p.row = image[2];
  p.update = coefficients(u);
  p.counters = counters(c);
  p.workspace = at<void>(workspace);
  return p;
}

void conv_chain_call(const ConvChainCall& call, int threads) {
  // Weights that were packed for a set that has it must not be read by one that has not.
  if (call.bfloat && !isa_has_bfloat()) {
    throw std::runtime_error("conv_chain: the weights are bfloat16, which this instruction set has not: " +
                             std::string(isa_name()));
  }
  conv_chain_cpu(call, threads);
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
  if constexpr (std::is_null_pointer_v<Cuda>) {
    return;
  } else {
    const std::string name = op;
    m.def((name + "_cuda").c_str(), [build, cuda, name](Arguments... arguments, int device, Address stream) {
      const Params params = build(arguments...);
      const int error = cuda(params, device, at<void>(stream));
      if (error) throw std::runtime_error(name + ": CUDA kernel launch failed: " + cuda_error_text(error));
    });
  }
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
  add_op(m, "conv_chain", conv_chain_params, conv_chain_call, nullptr);
  // The shared header's arithmetic on given words, (quads, 4) uint32 -> (quads, 4) float32: extremes that no seed
  // reaches.
  m.def("normals_of_words", [](Address words, Address out, int64_t quads) {
    const Words* const in = at<const Words>(words);
    for (int64_t i = 0; i < quads; ++i) at<Quad>(out)[i] = normals_of(in[i]);
  });
  m.def("conv_chain_workspace", [](const std::vector<StageArguments>& stages, bool bfloat, bool gradient, bool mask,
                                   int64_t samples, const std::array<int, 3>& image, int threads) {
    return conv_chain_workspace(conv_chain_params(stages, bfloat, 0, 0, gradient, mask, samples, 0, image, {}, {}, 0),
                                threads);
  });
  m.def("conv_chain_pack", [](Address from, Address to, bool bfloat, const std::vector<int64_t>& rows, int inputs,
                              int depth, int outputs, int64_t input_stride, int64_t output_stride, int threads) {
    py::gil_scoped_release release;
    conv_chain_pack({at<const float>(from), at<void>(to), bfloat, rows.data(), static_cast<int>(rows.size()), inputs,
                     depth, outputs, input_stride, output_stride},
                    threads);
  });
  m.def("isa_has_bfloat", isa_has_bfloat);
  m.def("isa_prefers_bfloat", isa_prefers_bfloat);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; isa_built(i); ++i) names.push_back(isa_built(i));
    return names;
  });
  m.def("isa", [] { return std::string(isa_name()); });
  m.def("set_isa", [](const std::string& name) { return set_isa(name.c_str()); });
  m.def("compiler", [] { return std::string(MGEBM_COMPILER); });
  m.def("cuda_archs", [] { return std::string(MGEBM_CUDA_ARCHS); });
  m.def("cuda_version", [] { return std::string(MGEBM_CUDA_VERSION); });
  m.def("cuda_note", [] { return std::string(MGEBM_CUDA_NOTE); });
}
