// The Python module railwire._native: the engine as Python sees it. Only conversion, checks of arguments and the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "python/bindings.h"

NB_MODULE(_native, m) {
  m.doc() = "Native core of Railwire. Not a public interface: use the railwire package.";
  railwire::bind_operations(m);
  railwire::bind_engine(m);
  railwire::bind_submissions(m);
  railwire::bind_prepared(m);
  railwire::bind_regions(m);
  railwire::bind_gpu(m);
  railwire::bind_nics(m);
  railwire::bind_simulated(m);
}
