// The Python module distckpt._C: nothing but translation. distckpt/_C.pyi is its contract.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "block_io.h"
#include "checked.h"
#include "copy.h"
#include "crc32c.h"
#include "file.h"
#include "gather.h"
#include "memory.h"
#include "sample.h"
#include "shared_memory.h"
#include "stream.h"

namespace distckpt {
namespace {

// OSError(errno, message, filename), which Python makes the subclass for the errno.
void RaiseOSError(const std::system_error& error, const py::object& path) {
  const py::tuple arguments = py::make_tuple(error.code().value(), error.what(), path);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

void Translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const FileError& error) {
    RaiseOSError(error, FromPath(error.path()));
  } catch (const std::system_error& error) {
    RaiseOSError(error, py::none());
  }
}

uint32_t Checksum(const py::object& data, uint32_t value) {
  const Buffer buffer(data, false);
  const py::gil_scoped_release release;
  return Crc32c(value, buffer.data(), buffer.size());
}

uint32_t ChecksumBy(const std::string& name, const py::object& data, uint32_t value) {
  const Buffer buffer(data, false);
  for (const Crc32cKernel& kernel : Crc32cKernels()) {
    if (kernel.name == name) return Crc32cBy(kernel, value, buffer.data(), buffer.size());
  }
  throw std::invalid_argument("no kernel '" + name + "' here: CRC32C_KERNELS has those that there are");
}

py::tuple KernelNames() {
  py::list names;
  for (const Crc32cKernel& kernel : Crc32cKernels()) names.append(kernel.name);
  return py::tuple(names);
}

void CheckSumCount(const Buffer& sums, size_t expected) {
  const size_t bytes = sizeof(uint32_t);
  if (sums.item_size() == bytes && sums.size() % bytes == 0 && sums.size() / bytes == expected) return;
  throw std::invalid_argument("out must be " + std::to_string(expected) + " items of 4 bytes, not " +
                              std::to_string(sums.size()) + " bytes in items of " +
                              std::to_string(sums.item_size()));
}

void ChecksumBlocks(const py::object& data, const py::object& block_size, const py::object& out,
                    const py::object& threads) {
  const Buffer buffer(data, false);
  const Buffer sums(out, true);
  const size_t size = ToCount(block_size, "block_size", 1);
  const size_t thread_count = ToCount(threads, "threads", 1);
  CheckSumCount(sums, BlockCount(buffer.size(), size));
  const py::gil_scoped_release release;
  Crc32cBlocks(buffer.data(), buffer.size(), size, sums.data(), thread_count);
}

// One checksum of 4 bytes a block.
void CheckSums(const Buffer& sums, size_t size, size_t block_size) {
  const size_t expected = BlockCount(size, block_size);
  if (sums.size() % sizeof(uint32_t) == 0 && sums.size() / sizeof(uint32_t) == expected) return;
  throw std::invalid_argument("expected " + std::to_string(expected) + " checksums of 4 bytes, not " +
                              std::to_string(sums.size()) + " bytes");
}

// Then every request holds whole blocks.
size_t ToBlockSize(const py::object& object, const BlockIO& io) {
  const size_t block_size = ToCount(object, "block_size", 1);
  if (io.request_size() % block_size == 0) return block_size;
  throw std::invalid_argument("request_size, " + std::to_string(io.request_size()) +
                              ", must be a multiple of block_size, " + std::to_string(block_size));
}

void GatherParts(const py::sequence& parts, const py::object& target, const py::object& offsets,
                 const py::object& threads) {
  Buffers buffers;
  const std::vector<Part> from = ToParts(parts, buffers);
  const Buffer to(target, true);
  const std::vector<int64_t> places = ToManyInt64s(offsets);
  const size_t thread_count = ToCount(threads, "threads", 1);
  const py::gil_scoped_release release;
  Gather(from, places, to.data(), to.size(), thread_count);
}

void SampleChecksums(const py::sequence& parts, const py::object& item_bytes, const py::object& out) {
  Buffers buffers;
  const std::vector<Part> spans = ToParts(parts, buffers);
  const std::vector<int64_t> items = ToManyInt64s(item_bytes);
  if (items.size() != spans.size()) {
    throw std::invalid_argument(std::to_string(spans.size()) + " parts with " + std::to_string(items.size()) +
                                " item sizes");
  }
  const Buffer sums(out, true);
  CheckSumCount(sums, spans.size());
  const py::gil_scoped_release release;
  for (size_t i = 0; i < spans.size(); ++i) {
    const uint32_t sum = SampleChecksum(spans[i].data, spans[i].size, items[i]);
    std::memcpy(sums.data() + i * sizeof(sum), &sum, sizeof(sum));
  }
}

void WriteChecked(BlockIO& io, File& file, const py::sequence& parts, const py::object& block_size,
                  const py::object& sums, double max_bytes_per_s) {
  Buffers buffers;
  const std::vector<Part> spans = ToParts(parts, buffers);
  int64_t size = 0;
  for (const Part& part : spans) size = CheckedAdd(size, static_cast<int64_t>(part.size));
  const Buffer out(sums, true);
  const size_t block = ToBlockSize(block_size, io);
  CheckSums(out, static_cast<size_t>(size), block);
  const py::gil_scoped_release release;
  ChecksummedSource source(spans, block, out.data());
  io.WriteFrom(source, file, 0, source.size(), max_bytes_per_s);
}

// (chunk_start, target, target_start, shape, source_strides, target_strides, item_size)
RegionCopy ToTarget(py::handle object, Buffers& buffers) {
  const py::tuple item(py::reinterpret_borrow<py::object>(object));
  if (item.size() != 7) throw std::invalid_argument("a target has seven items");
  const Buffer& memory = buffers.emplace_back(py::object(item[1]), true);
  const CopyRegion region{ToInt64s(py::object(item[3])), ToInt64s(py::object(item[4])),
                          ToInt64s(py::object(item[5])), ToInt64(py::object(item[6])),
                          ToInt64(py::object(item[0])),  ToInt64(py::object(item[2]))};
  return RegionCopy(region, memory.data(), static_cast<int64_t>(memory.size()));
}

std::vector<RegionCopy> ToTargets(const py::sequence& sequence, Buffers& buffers) {
  std::vector<RegionCopy> targets;
  for (const py::handle item : sequence) targets.push_back(ToTarget(item, buffers));
  return targets;
}

// Targets with the buffers that they lie in.
class HeldTargets {
 public:
  explicit HeldTargets(const py::sequence& targets) : targets_(ToTargets(targets, buffers_)) {}

  int64_t CopyFrom(const py::object& source, const py::object& source_start) const {
    const Buffer from(source, false);
    const size_t begin = ToCount(source_start, "source_start", 0);
    const int64_t end = CheckedAdd(static_cast<int64_t>(begin), static_cast<int64_t>(from.size()));
    const py::gil_scoped_release release;
    return targets_.CopyFrom(begin, static_cast<uint64_t>(end), from.data());
  }

 private:
  Buffers buffers_;
  const Targets targets_;
};

std::vector<ByteRange> ToBlockRanges(const py::sequence& ranges, size_t block_size, size_t end) {
  std::vector<ByteRange> wanted;
  for (const py::handle range : ranges) {
    const py::tuple pair(py::reinterpret_borrow<py::object>(range));
    if (pair.size() != 2) throw std::invalid_argument("a range has two items");
    wanted.push_back({ToCount(py::object(pair[0]), "a range's begin", 0),
                      ToCount(py::object(pair[1]), "a range's end", 0)});
    const ByteRange& last = wanted.back();
    if (last.begin % block_size == 0 && last.end <= end && (last.end % block_size == 0 || last.end == end)) {
      continue;
    }
    throw std::invalid_argument("a range must be of whole blocks before " + std::to_string(end) + ": " +
                                std::to_string(last.begin) + " to " + std::to_string(last.end));
  }
  return wanted;
}

// None, or (block, its checksum) for one that is wrong; its checksum is None if the file ends in it.
py::object ReadChecked(BlockIO& io, File& file, const py::sequence& ranges, const py::object& block_size,
                       const py::object& end, const py::object& expected, const py::sequence& targets) {
  const size_t block = ToBlockSize(block_size, io);
  const size_t size = ToCount(end, "end", 0);
  const std::vector<ByteRange> wanted = ToBlockRanges(ranges, block, size);
  Buffers buffers;
  const Buffer table(expected, false);
  CheckSums(table, size, block);
  VerifyingSink sink(ToTargets(targets, buffers), block, size, table.data());
  auto release = std::make_unique<py::gil_scoped_release>();
  const uint64_t file_end = io.ReadInto(sink, file, wanted);
  release.reset();
  if (sink.failed()) return py::make_tuple(sink.bad_block(), sink.found());
  for (const ByteRange& range : wanted) {
    if (range.begin == range.end || range.end <= file_end) continue;
    return py::make_tuple(std::max(file_end, range.begin) / block, py::none());
  }
  return py::none();
}

void BindChecksums(py::module_& m) {
  m.attr("CRC32C_KERNELS") = KernelNames();
  m.def("crc32c", &Checksum, py::arg("data"), py::arg("value") = 0);
  m.def("crc32c_by", &ChecksumBy, py::arg("kernel"), py::arg("data"), py::arg("value") = 0);
  m.def("join_crc32c", &JoinCrc32c, py::arg("first"), py::arg("second"), py::arg("size"));
  m.def("crc32c_blocks", &ChecksumBlocks, py::arg("data"), py::arg("block_size"), py::arg("out"),
        py::kw_only(), py::arg("threads") = 1);
  m.def("sample_checksums", &SampleChecksums, py::arg("parts"), py::arg("item_bytes"), py::arg("out"));
}

void BindMemory(py::module_& m) {
  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(
          py::init([](const py::object& size) { return std::make_unique<Memory>(ToCount(size, "size", 0)); }),
          py::arg("size"))
      .def(
          "populate",
          [](Memory& self, const py::object& threads) {
            const size_t thread_count = ToCount(threads, "threads", 1);
            const py::gil_scoped_release release;
            self.Populate(thread_count);
          },
          py::kw_only(), py::arg("threads") = 1)
      .def_property_readonly("huge_pages", &Memory::huge_pages)
      .def("__len__", &Memory::size)
      .def_buffer(
          [](Memory& self) { return py::buffer_info(self.data(), static_cast<py::ssize_t>(self.size())); });
}

void BindSharedMemory(py::module_& m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<SharedMemory>(m, "SharedMemory", py::buffer_protocol())
      .def(py::init<const std::string&, size_t>(), py::arg("path"), py::arg("size"))
      .def("reserve", &SharedMemory::Reserve, py::arg("begin"), py::arg("size"), without_gil)
      .def("populate", &SharedMemory::Populate, py::arg("begin"), py::arg("size"), without_gil)
      .def("load", &SharedMemory::Load, py::arg("word"))
      .def("store", &SharedMemory::Store, py::arg("word"), py::arg("value"))
      .def("exchange", &SharedMemory::Exchange, py::arg("word"), py::arg("expected"), py::arg("desired"))
      .def_buffer([](SharedMemory& self) {
        return py::buffer_info(self.data(), static_cast<py::ssize_t>(self.size()));
      });
}

void BindFile(py::module_& m) {
  py::class_<File>(m, "File")
      .def_static(
          "create",
          [](const py::object& path, bool direct, mode_t mode) {
            const std::string name = ToPath(path);
            const py::gil_scoped_release release;
            return File::Create(name, direct, mode);
          },
          py::arg("path"), py::kw_only(), py::arg("direct") = true, py::arg("mode") = 0666)
      .def_static(
          "reopen",
          [](const py::object& path, bool direct) {
            const std::string name = ToPath(path);
            const py::gil_scoped_release release;
            return File::Reopen(name, direct);
          },
          py::arg("path"), py::kw_only(), py::arg("direct") = true)
      .def_static(
          "open",
          [](const py::object& path, bool direct) {
            const std::string name = ToPath(path);
            const py::gil_scoped_release release;
            return File::Open(name, direct);
          },
          py::arg("path"), py::kw_only(), py::arg("direct") = false)
      .def_property_readonly("path", [](const File& self) { return FromPath(self.path()); })
      .def_property_readonly("direct", &File::direct)
      .def_property_readonly("size",
                             [](const File& self) {
                               const py::gil_scoped_release release;
                               return self.Size();
                             })
      .def(
          "truncate",
          [](File& self, const py::object& size) {
            const int64_t bytes = ToInt64(size);
            const py::gil_scoped_release release;
            self.Truncate(bytes);
          },
          py::arg("size"))
      .def("sync", &File::Sync, py::call_guard<py::gil_scoped_release>())
      .def(
          "is_named",
          [](const File& self, const py::object& path) {
            const std::string name = ToPath(path);
            const py::gil_scoped_release release;
            return self.IsNamed(name);
          },
          py::arg("path"))
      .def("set_access", &File::SetAccess, py::call_guard<py::gil_scoped_release>(), py::arg("mode"),
           py::arg("group"))
      .def("close", &File::Close, py::call_guard<py::gil_scoped_release>());
  m.def(
      "sync_directory",
      [](const py::object& path) {
        const std::string name = ToPath(path);
        const py::gil_scoped_release release;
        SyncDirectory(name);
      },
      py::arg("path"));
}

void BindBlockIO(py::module_& m) {
  py::class_<BlockIO>(m, "BlockIO")
      .def(py::init(
               [](const std::string& backend, const py::object& request_size, const py::object& queue_depth) {
                 return std::make_unique<BlockIO>(backend, ToInt64(request_size), ToInt64(queue_depth));
               }),
           py::arg("backend") = "", py::kw_only(), py::arg("request_size") = 4194304,
           py::arg("queue_depth") = 8)
      .def_property_readonly("backend", &BlockIO::backend)
      .def(
          "write",
          [](BlockIO& self, File& file, const py::object& offset, const py::object& data) {
            const Buffer buffer(data, false);
            const int64_t start = ToInt64(offset);
            const py::gil_scoped_release release;
            self.Write(file, start, buffer.data(), buffer.size());
          },
          py::arg("file").none(false), py::arg("offset"), py::arg("data"))
      .def(
          "read",
          [](BlockIO& self, File& file, const py::object& offset, const py::object& data) {
            const Buffer buffer(data, true);
            const int64_t start = ToInt64(offset);
            const py::gil_scoped_release release;
            return self.Read(file, start, buffer.data(), buffer.size());
          },
          py::arg("file").none(false), py::arg("offset"), py::arg("data"))
      .def("write_checked", &WriteChecked, py::arg("file").none(false), py::arg("parts"),
           py::arg("block_size"), py::arg("sums"), py::kw_only(), py::arg("max_bytes_per_s") = 0.0)
      .def("read_checked", &ReadChecked, py::arg("file").none(false), py::arg("ranges"),
           py::arg("block_size"), py::arg("end"), py::arg("expected"), py::arg("targets"))
      .def("close", &BlockIO::Close, py::call_guard<py::gil_scoped_release>());
  py::list backends;
  for (const std::string& backend : BlockIO::Backends()) backends.append(backend);
  m.attr("BLOCK_IO_BACKENDS") = py::tuple(backends);
}

}  // namespace
}  // namespace distckpt

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The C++ core of distckpt.";
  py::register_local_exception_translator(&distckpt::Translate);
  distckpt::BindChecksums(m);
  distckpt::BindMemory(m);
  distckpt::BindSharedMemory(m);
  distckpt::BindFile(m);
  distckpt::BindBlockIO(m);
  m.def("gather", &distckpt::GatherParts, py::arg("parts"), py::arg("target"), py::arg("offsets"),
        py::kw_only(), py::arg("threads") = 1);
  py::class_<distckpt::HeldTargets>(m, "Targets")
      .def(py::init<const py::sequence&>(), py::arg("targets"))
      .def("copy_from", &distckpt::HeldTargets::CopyFrom, py::arg("source"), py::arg("source_start"));
}
