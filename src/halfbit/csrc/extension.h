// How a format's C++ file joins the one extension: it writes HALFBIT_BINDINGS(qmoe) { m.def("qmoe_product", ...); }
//
// The list fills itself before the module starts, so that adding a file to the build is all it takes.
#pragma once

#include <nanobind/nanobind.h>

namespace halfbit {

struct Bindings {
    using Define = void (*)(nanobind::module_ &);

    explicit Bindings(Define define) : define(define), next(first) { first = this; }

    static inline Bindings *first = nullptr;
    Define define;
    Bindings *next;
};

}  // namespace halfbit

#define HALFBIT_BINDINGS(format)                                           \
    static void define_##format(nanobind::module_ &m);                     \
    static halfbit::Bindings bindings_##format(define_##format);           \
    static void define_##format([[maybe_unused]] nanobind::module_ &m)
