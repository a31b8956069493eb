// What Python passes to the core, as C++ values. Only bindings.cc includes this.

#ifndef DISTCKPT_ARGUMENTS_H_
#define DISTCKPT_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.h"

namespace distckpt {

namespace py = pybind11;

// A C-contiguous buffer, held as long as this object lives. TypeError for what is no buffer, ValueError for
// one that is not contiguous or, if it must be, not writable.
class Buffer {
 public:
  Buffer(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_ND | (writable ? PyBUF_WRITABLE : 0)) == 0) return;
    if (!PyErr_ExceptionMatches(PyExc_BufferError)) throw py::error_already_set();
    py::error_already_set error;
    py::raise_from(error, PyExc_ValueError,
                   writable ? "expected a writable, C-contiguous buffer" : "expected a C-contiguous buffer");
    throw py::error_already_set();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }
  size_t item_size() const { return static_cast<size_t>(view_.itemsize); }

 private:
  Py_buffer view_;
};

// ValueError, not TypeError or OverflowError, for an integer that is too large.
inline int64_t ToInt64(py::handle object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) throw std::invalid_argument("an integer overflows 63 bits");
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline size_t ToCount(py::handle object, const char* name, int64_t least) {
  const int64_t value = ToInt64(object);
  if (value < least) throw std::invalid_argument(name + (" must be at least " + std::to_string(least)));
  return static_cast<size_t>(value);
}

inline std::vector<int64_t> ToInt64s(const py::sequence& sequence) {
  std::vector<int64_t> values;
  values.reserve(sequence.size());
  for (const py::handle item : sequence) values.push_back(ToInt64(item));
  return values;
}

// A sequence of integers, or, faster, an array of signed 64-bit ones.
inline std::vector<int64_t> ToManyInt64s(const py::object& object) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) return ToInt64s(object);
  const py::buffer_info info = py::buffer(object).request();
  const bool is_dense = info.ndim == 1 && (info.size <= 1 || info.strides[0] == info.itemsize);
  if (!is_dense || !info.item_type_is_equivalent_to<int64_t>()) {
    throw std::invalid_argument("expected integers, or an array of int64 of one dimension, contiguous");
  }
  const auto* const first = static_cast<const int64_t*>(info.ptr);
  return std::vector<int64_t>(first, first + info.size);
}

// As os.fsencode: any str, bytes or os.PathLike; ValueError for one with a null character.
inline std::string ToPath(const py::object& object) {
  PyObject* encoded = nullptr;
  if (!PyUnicode_FSConverter(object.ptr(), &encoded)) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(encoded);
}

inline py::object FromPath(const std::string& path) {
  auto* decoded = PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size()));
  if (decoded == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(decoded);
}

using Buffers = std::deque<Buffer>;  // They do not move.

inline std::vector<Part> ToParts(const py::sequence& objects, Buffers& buffers) {
  std::vector<Part> parts;
  parts.reserve(objects.size());
  for (const py::handle object : objects) {
    const Buffer& buffer = buffers.emplace_back(py::reinterpret_borrow<py::object>(object), false);
    parts.push_back({buffer.data(), buffer.size()});
  }
  return parts;
}

}  // namespace distckpt

#endif  // DISTCKPT_ARGUMENTS_H_
