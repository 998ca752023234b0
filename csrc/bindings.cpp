// The Python module. Its launchers take raw addresses and a stream, so that no version of torch is
// built in. It is compiled into msf_kernels._C and, with emulated kernels, into a module of the
// tests.
#include <pybind11/pybind11.h>

#if MSF_HAVE_KERNELS
#include <pybind11/stl.h>

#include "kernels/adaln.hpp"
#include "kernels/attention.hpp"
#include "kernels/bias_gelu.hpp"
#include "kernels/euler.hpp"
#include "kernels/interpolation.hpp"
#include "kernels/pyramid.hpp"
#include "kernels/qk_norm_rope.hpp"
#include "kernels/tokens.hpp"
#include "recording.hpp"
#endif
#if MSF_HAVE_CUDA
#include <cuda_runtime_api.h>
#elif MSF_HAVE_KERNELS
#include "emulation/matrix_flops.hpp"
#endif

namespace py = pybind11;

// Every MSF_* macro comes from the build.
static py::dict build_config() {
  py::dict config;
  config["version"] = MSF_VERSION;
  config["cxx_compiler"] = MSF_CXX_COMPILER;
  config["cuda"] = bool(MSF_HAVE_CUDA);
  config["cuda_compiler"] = MSF_HAVE_CUDA ? py::object(py::str(MSF_CUDA_COMPILER)) : py::none();
  config["cuda_architectures"] = py::str(MSF_CUDA_ARCHITECTURES).attr("split")();
  return config;
}

// Returns why the kernels cannot run here, or None. The CUDA runtime is linked statically and looks
// for the driver when asked, so this works on a machine without one.
static py::object unsupported_reason() {
#if MSF_HAVE_CUDA
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return py::str("no NVIDIA driver on this machine");
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? py::object(py::none()) : py::str(cudaGetErrorString(error));
#elif MSF_HAVE_KERNELS
  return py::none();
#else
  return py::str("this installation was built without nvcc");
#endif
}

#if MSF_HAVE_KERNELS
// Returns how many bytes of shared memory a block may have on a GPU. The emulation has those of
// sm_90.
static int shared_memory(int device) {
  int bytes = 227 << 10;
#if MSF_HAVE_CUDA
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
#else
  static_cast<void>(device);
#endif
  return bytes;
}

// Calls it, and returns its launches, none of which starts, as tuples (text that names the kernel,
// grid, block, dynamic bytes of shared memory).
static std::vector<msf::LaunchRecord> launches_of(const py::function& call) {
  struct Recording {
    std::vector<msf::LaunchRecord> launches;
    Recording() { msf::recorded_launches = &launches; }
    ~Recording() { msf::recorded_launches = nullptr; }
  } recording;
  call();
  return recording.launches;
}

namespace pybind11::detail {

// Makes an aggregate from a tuple of its fields, or its default from None.
template <class T, class... Fields>
struct AggregateCaster {
  PYBIND11_TYPE_CASTER(T, const_name("tuple"));

  bool load(handle source, bool convert) {
    if (source.is_none()) return true;
    make_caster<std::tuple<Fields...>> fields;
    if (!fields.load(source, convert)) return false;
    value = std::apply([](auto... field) { return T{field...}; },
                       cast_op<std::tuple<Fields...>>(fields));
    return true;
  }
};

template <>
struct type_caster<msf::Address> {
  PYBIND11_TYPE_CASTER(msf::Address, const_name("int"));

  bool load(handle source, bool convert) {
    make_caster<uintptr_t> number;
    if (source.is_none()) return true;
    if (!number.load(source, convert)) return false;
    value = {reinterpret_cast<void*>(static_cast<uintptr_t>(number))};
    return true;
  }
};

template <>
struct type_caster<msf::DType> {
  PYBIND11_TYPE_CASTER(msf::DType, const_name("int"));

  bool load(handle source, bool convert) {
    make_caster<int> number;
    if (!number.load(source, convert)) return false;
    value = static_cast<msf::DType>(static_cast<int>(number));
    return true;
  }
};

using msf::Address;
template <>
struct type_caster<msf::ImageView>
    : AggregateCaster<msf::ImageView, Address, int64_t, int64_t, int64_t, int64_t> {};
template <>
struct type_caster<msf::Extent> : AggregateCaster<msf::Extent, int, int, int, int> {};
template <>
struct type_caster<msf::TokensView> : AggregateCaster<msf::TokensView, Address, int64_t> {};
template <>
struct type_caster<msf::TokenGrid> : AggregateCaster<msf::TokenGrid, int, int, int, int> {};
template <>
struct type_caster<msf::Statistics> : AggregateCaster<msf::Statistics, Address, Address> {};
template <>
struct type_caster<msf::Clamp> : AggregateCaster<msf::Clamp, double, double> {};
template <>
struct type_caster<msf::Scalar> : AggregateCaster<msf::Scalar, double, Address> {};
template <>
struct type_caster<msf::EulerStep>
    : AggregateCaster<msf::EulerStep, msf::DType, msf::ImageView, msf::ImageView, msf::Scalar,
                      msf::Scalar, Address, int> {};
template <>
struct type_caster<msf::AdalnTypes>
    : AggregateCaster<msf::AdalnTypes, msf::DType, msf::DType, msf::DType> {};
template <>
struct type_caster<msf::TokenSlices> : AggregateCaster<msf::TokenSlices, int, int, int, int> {};
template <>
struct type_caster<msf::Modulation> : AggregateCaster<msf::Modulation, Address, int64_t> {};
template <>
struct type_caster<msf::ModulationGradient>
    : AggregateCaster<msf::ModulationGradient, Address, bool> {};
template <>
struct type_caster<msf::HeadsView>
    : AggregateCaster<msf::HeadsView, Address, int64_t, int64_t, int64_t> {};
template <>
struct type_caster<msf::HeadGrid> : AggregateCaster<msf::HeadGrid, int, int, int, int> {};
template <>
struct type_caster<msf::Parameter> : AggregateCaster<msf::Parameter, Address, msf::DType> {};
template <>
struct type_caster<msf::Preparation>
    : AggregateCaster<msf::Preparation, msf::Parameter, msf::Parameter, msf::Parameter,
                      msf::Parameter, msf::Parameter, Address, double, bool> {};
template <>
struct type_caster<msf::PreparationGradient>
    : AggregateCaster<msf::PreparationGradient, msf::Parameter, msf::Parameter, msf::Parameter,
                      msf::Parameter, msf::Parameter> {};

}  // namespace pybind11::detail
#endif

PYBIND11_MODULE(MSF_MODULE, m) {
  m.def("build_config", &build_config, "What this extension was built with.");
  m.def("unsupported_reason", &unsupported_reason,
        "Why its kernels cannot run on this machine, or None.");
#if MSF_HAVE_KERNELS
  m.def("pyramid_split", &msf::pyramid_split);
  m.def("pyramid_split_backward", &msf::pyramid_split_backward);
  m.def("pyramid_merge", &msf::pyramid_merge);
  m.def("pyramid_merge_backward", &msf::pyramid_merge_backward);
  m.def("merge_tokens", &msf::merge_tokens);
  m.def("merge_tokens_backward", &msf::merge_tokens_backward);
  m.def("flow_interpolate", &msf::flow_interpolate);
  m.def("guided_euler_step", &msf::guided_euler_step);
  m.def("guided_euler_step_of_tokens", &msf::guided_euler_step_of_tokens);
  m.def("guided_euler_merge", &msf::guided_euler_merge);
  m.def("gate_residual_adaln", &msf::gate_residual_adaln);
  m.def("gate_residual_adaln_backward", &msf::gate_residual_adaln_backward);
  m.def("bias_gelu", &msf::bias_gelu);
  m.def("bias_gelu_backward", &msf::bias_gelu_backward);
  m.def("shared_memory", &shared_memory, "How many bytes of it a block may have on a GPU.");
  m.def("launches_of", &launches_of, "What a call launches, which does not start.");
  m.def("attention_fits", &msf::attention_fits);
  m.def("attention", &msf::attention);
  m.def("attention_backward_fits", &msf::attention_backward_fits);
  m.def("attention_backward", &msf::attention_backward);
  m.def("qk_norm_rope", &msf::qk_norm_rope);
  m.def("qk_norm_rope_backward", &msf::qk_norm_rope_backward);
#if !MSF_HAVE_CUDA
  m.def(
      "matrix_flops", [] { return msf::emulation::matrix_flops.exchange(0); },
      "The FLOPs of products of matrices since the last call.");
#endif
#endif
}
