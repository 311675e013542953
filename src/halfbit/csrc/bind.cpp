// The one extension, halfbit._C: what every format adds through HALFBIT_BINDINGS, and the choice of instructions.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "extension.h"
#include "isa.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_C, m) {
    halfbit::find_exchange();
    m.doc() = "CPU kernels of halfbit; use them through the formats' cpu.py";
    m.def("isa", [] { return halfbit::isa_names[static_cast<int>(halfbit::active_isa.load())]; },
          "The instructions in use: portable, avx2, avx512 or avx512vnni.");
    m.def("set_isa", halfbit::set_isa, "name"_a, "Use at most these instructions, for tests; \"best\" is the default.");
    for (const auto *part = halfbit::Bindings::first; part; part = part->next) part->define(m);
}
