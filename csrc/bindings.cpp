// The only file that knows Python. A function takes the fields of its params struct in their order (MGEBM_FIELDS), a
// struct or a list as a tuple or list, a pointer as an address (0: null), and then where it runs: (threads) or (device,
// stream). mgebm_fast/ops checks dtype, shape, layout and device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "mgebm/interrupt.h"
#include "op_table.h"

namespace py = pybind11;
using namespace mgebm;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("_C: " + what); }

Py_ssize_t size_of(PyObject* from) {
  if (!PyTuple_Check(from) && !PyList_Check(from)) refuse("a tuple or list was expected");
  return PySequence_Fast_GET_SIZE(from);
}

template <typename... Fields>
void read_all(PyObject* from, Fields&... fields);

template <typename T>
void read(PyObject* from, T& to) {
  if constexpr (std::is_pointer_v<T>) {
    to = reinterpret_cast<T>(PyLong_AsUnsignedLongLong(from));
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    to = PyLong_AsUnsignedLongLong(from);
  } else if constexpr (std::is_floating_point_v<T>) {
    to = static_cast<T>(PyFloat_AsDouble(from));
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    const long long value = PyLong_AsLongLong(from);
    to = static_cast<T>(value);
    if (static_cast<long long>(to) != value) refuse(std::to_string(value) + " is out of range");
  } else {
    to.fields([&](auto&... fields) { read_all(from, fields...); });
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

template <typename T, int kMost>
void read(PyObject* from, List<T, kMost>& to) {
  const Py_ssize_t size = size_of(from);
  if (size > kMost) refuse("at most " + std::to_string(kMost) + " may be given, got " + std::to_string(size));
  to.count = static_cast<int>(size);
  for (Py_ssize_t i = 0; i < size; ++i) read(PySequence_Fast_GET_ITEM(from, i), to.at[i]);
}

template <typename... Fields>
void read_all(PyObject* from, Fields&... fields) {
  constexpr Py_ssize_t kWanted = sizeof...(Fields);
  const Py_ssize_t size = size_of(from);
  if (size != kWanted) refuse(std::to_string(kWanted) + " values were expected, got " + std::to_string(size));
  Py_ssize_t i = 0;
  (read(PySequence_Fast_GET_ITEM(from, i++), fields), ...);
}

template <typename Params, typename... Place>
Params unpack(const py::args& arguments, Place&... place) {
  Params params{};
  params.fields([&](auto&... fields) { read_all(arguments.ptr(), fields..., place...); });
  return params;
}

template <typename Params>
void add_cpu(py::module_& m, const std::string& name, void (*run)(const Params&, int)) {
  m.def(name.c_str(), [run](const py::args& arguments) {
    int threads = 1;
    const Params params = unpack<Params>(arguments, threads);
    {
      py::gil_scoped_release release;
      run(params, threads);
    }
    if (PyErr_Occurred()) throw py::error_already_set();  // a signal handler raised
  });
}

#if defined(MGEBM_CUDA)
template <typename Params>
void add_cuda(py::module_& m, const std::string& name, int (*launch)(const Params&, int, void*)) {
  m.def((name + "_cuda").c_str(), [name, launch](const py::args& arguments) {
    int device = 0;
    void* stream = nullptr;
    const Params params = unpack<Params>(arguments, device, stream);
    const int error = launch(params, device, stream);
    if (error) throw std::runtime_error(name + ": CUDA kernel launch failed: " + cuda_error_text(error));
  });
}
#define MGEBM_ADD_CPU_AND_CUDA(op) add_cuda(m, #op, op##_cuda);
#else
#define MGEBM_ADD_CPU_AND_CUDA(op)
#endif
#define MGEBM_ADD_CPU(op)
#define MGEBM_ADD(op, Params, layers) \
  add_cpu(m, #op "_cpu", op##_cpu);   \
  MGEBM_ADD_##layers(op)

bool signal_handler_raised() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of mgebm_fast; call them through mgebm_fast.ops.";
  interrupted = signal_handler_raised;
  MGEBM_OPS(MGEBM_ADD)
#define MGEBM_ADD_RESIDENT(op, Params, layers) MGEBM_ADD_##layers(op)
  MGEBM_RESIDENT_OPS(MGEBM_ADD_RESIDENT)
  add_cpu(m, "conv_chain_pack", conv_chain_pack);
#define MGEBM_ADD_WORKSPACE(op, Params)                       \
  m.def(#op "_workspace", [](const py::args& arguments) {     \
    int threads = 1;                                          \
    const Params params = unpack<Params>(arguments, threads); \
    return op##_workspace(params, threads);                   \
  });
  MGEBM_WORKSPACES(MGEBM_ADD_WORKSPACE)
  // Whether all numbers are finite, of (address, count) each; which arrays differ, of (address, address, bytes) each.
  m.def("all_finite", [](const std::vector<std::pair<uintptr_t, int64_t>>& arrays) {
    for (const auto& [at, count] : arrays) {
      if (!all_finite(reinterpret_cast<const float*>(at), count)) return false;
    }
    return true;
  });
  m.def("differing", [](const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& arrays) {
    std::vector<int> found;
    for (size_t i = 0; i < arrays.size(); ++i) {
      const auto& [one, other, bytes] = arrays[i];
      if (!all_same(reinterpret_cast<const void*>(one), reinterpret_cast<const void*>(other), bytes)) {
        found.push_back(static_cast<int>(i));
      }
    }
    return found;
  });
  // The shared header's arithmetic on given words, (quads, 4) uint32 -> (quads, 4) float32: extremes that no seed
  // reaches.
  m.def("normals_of_words", [](uintptr_t words, uintptr_t out, int64_t quads) {
    const Words* const in = reinterpret_cast<const Words*>(words);
    for (int64_t i = 0; i < quads; ++i) reinterpret_cast<Quad*>(out)[i] = normals_of(in[i]);
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
  m.def("sources", [] { return std::string(MGEBM_SOURCES); });
  m.def("compiler", [] { return std::string(MGEBM_COMPILER); });
  m.def("cuda_archs", [] { return std::string(MGEBM_CUDA_ARCHS); });
  m.def("cuda_version", [] { return std::string(MGEBM_CUDA_VERSION); });
  m.def("cuda_note", [] { return std::string(MGEBM_CUDA_NOTE); });
}
