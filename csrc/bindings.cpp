#include <pybind11/pybind11.h>

namespace py = pybind11;

// Every MSF_* macro comes from CMakeLists.txt.
static py::dict build_config() {
  py::dict config;
  config["version"] = MSF_VERSION;
  config["cxx_compiler"] = MSF_CXX_COMPILER;
  config["cuda"] = bool(MSF_HAVE_CUDA);
  config["cuda_compiler"] = MSF_HAVE_CUDA ? py::object(py::str(MSF_CUDA_COMPILER)) : py::none();
  config["cuda_architectures"] = py::str(MSF_CUDA_ARCHITECTURES).attr("split")();
  return config;
}

PYBIND11_MODULE(_C, m) {
  m.def("build_config", &build_config, "What this extension was built with.");
}
