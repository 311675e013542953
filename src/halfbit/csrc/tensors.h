// Torch's tensors on the CPU as they come from Python: address and sizes, no copy.
//
// DLPack 1.3 puts a table of C functions on the class Tensor (https://dmlc.github.io/dlpack/latest/python_spec.html); one of
// them says all about a tensor at once. Asking in Python, or for DLPack's capsules, lasts as long as a product with a small
// matrix.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace halfbit {

// DLPackExchangeAPI of dlpack.h, as far as it is used.
struct Exchange {
    uint32_t major, minor;
    void *older;
    void *allocate, *managed_from, *to;
    int (*describe)(void *object, nanobind::dlpack::dltensor *out);  // 0, or a Python error is set
};
inline const Exchange *exchange = nullptr;

// When the extension is loaded, before any tensor comes.
inline void find_exchange() {
    const nanobind::object capsule = nanobind::module_::import_("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    exchange = static_cast<const Exchange *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!exchange) throw nanobind::python_error();
    if (exchange->major != 1) throw nanobind::import_error("halfbit: this torch has another DLPack than 1.3");
}

// A contiguous tensor of N dimensions.
template <class T, size_t N>
struct Array {
    T *start;
    std::array<int64_t, N> sizes;

    T *data() const { return start; }
    int64_t shape(size_t i) const { return sizes[i]; }
};

// Signs of whole numbers are not looked at. uint16_t takes float16 and bfloat16, char anything.
template <class T>
bool holds(nanobind::dlpack::dtype dtype) {
    using Plain = std::remove_const_t<T>;
    using Code = nanobind::dlpack::dtype_code;
    const auto is = [&](Code code) { return dtype.code == static_cast<uint8_t>(code); };
    if (std::is_same_v<Plain, char>) return true;
    if (dtype.lanes != 1 || dtype.bits != 8 * sizeof(T)) return false;
    if (std::is_same_v<Plain, uint16_t>) return is(Code::Float) || is(Code::Bfloat);
    return std::is_floating_point_v<Plain> ? is(Code::Float) : is(Code::Int) || is(Code::UInt);
}

inline nanobind::dlpack::dltensor described(nanobind::handle tensor) {
    nanobind::dlpack::dltensor t{};
    if (exchange->describe(tensor.ptr(), &t)) throw nanobind::python_error();
    return t;
}

// Throws std::invalid_argument, a ValueError in Python, where the tensor is another.
template <class T, size_t N>
Array<T, N> array(nanobind::handle tensor) {
    const nanobind::dlpack::dltensor t = described(tensor);
    Array<T, N> a{reinterpret_cast<T *>(static_cast<char *>(t.data) + t.byte_offset), {}};
    bool fits = t.ndim == N && t.device.device_type == nanobind::device::cpu::value && holds<T>(t.dtype), empty = false;
    for (size_t i = 0; fits && i < N; ++i) a.sizes[i] = t.shape[i], empty |= !t.shape[i];
    int64_t stride = 1;
    for (size_t i = N; fits && !empty && i-- > 0; stride *= t.shape[i]) fits = t.shape[i] == 1 || t.strides[i] == stride;
    if (!fits) {
        std::string of = std::to_string(t.dtype.bits) + " bits, DLPack's kind " + std::to_string(t.dtype.code) + ", (size, stride):";
        for (int i = 0; i < t.ndim; ++i) of += " (" + std::to_string(t.shape[i]) + ", " + std::to_string(t.strides[i]) + ")";
        throw std::invalid_argument(
            "expected a contiguous tensor of " + std::to_string(N) + " dimensions on the CPU, " +
            std::to_string(8 * sizeof(T)) + (std::is_floating_point_v<T> ? " bits, floating point" : " bits") + "; got " + of +
            ", device " + std::to_string(t.device.device_type));
    }
    return a;
}

}  // namespace halfbit
