// WriteFrom and ReadInto with what sums and checks, over queues that work and queues that fail.

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "crc32c.h"
#include "stream.h"
#include "testing.h"

namespace {

using distckpt::ByteRange;
using distckpt::ChecksummedSource;
using distckpt::Part;
using distckpt::Sink;
using distckpt::Source;
using distckpt::VerifyingSink;

constexpr size_t kRequest = 65536;
constexpr size_t kBlock = 8192;
constexpr uint64_t kNoEnd = std::numeric_limits<uint64_t>::max();

Bytes Sums(const Bytes& data) {
  Bytes sums(4 * distckpt::BlockCount(data.size(), kBlock));
  distckpt::Crc32cBlocks(data.data(), data.size(), kBlock, sums.data(), 1);
  return sums;
}

distckpt::RegionCopy Target(uint64_t begin, Bytes* memory) {
  const auto size = static_cast<int64_t>(memory->size());
  return {{{size}, {1}, {1}, 1, static_cast<int64_t>(begin), 0}, memory->data(), size};
}

// Writes `data`, which lies at `memory`, in that many parts; reads it in two ranges; checks all of it.
void RoundTrip(BlockIO* io, const std::string& name, bool direct, const Bytes& data, const uint8_t* memory,
               size_t part_count) {
  std::vector<Part> parts;
  for (size_t i = 0; i < part_count; ++i) {
    const size_t begin = data.size() * i / part_count;
    parts.push_back({memory + begin, data.size() * (i + 1) / part_count - begin});
  }
  const Bytes expected = Sums(data);
  Bytes sums(expected.size() + 1);  // Unaligned on purpose.
  ChecksummedSource source(parts, kBlock, sums.data() + 1);
  CHECK(source.size() == data.size() + expected.size());
  const auto file = File::Create(FreshPath(name), direct, 0644);
  io->WriteFrom(source, *file, 0, source.size(), 0);
  CHECK(std::equal(expected.begin(), expected.end(), sums.begin() + 1));
  file->Truncate(static_cast<int64_t>(source.size()));
  Bytes table(expected.size());
  CHECK(io->Read(*file, static_cast<int64_t>(data.size()), table.data(), table.size()) == table.size());
  CHECK(table == expected);

  Bytes whole(data.size());
  Bytes inside(std::min<size_t>(data.size(), 1000));
  VerifyingSink sink({Target(0, &whole), Target(data.size() - inside.size(), &inside)}, kBlock, data.size(),
                     table.data());
  const uint64_t cut = data.size() / kBlock / 2 * kBlock;
  CHECK(io->ReadInto(sink, *file, {{0, cut}, {cut, data.size()}}) >= data.size());
  CHECK(!sink.failed() && whole == data);
  CHECK(std::equal(inside.begin(), inside.end(), data.end() - static_cast<ptrdiff_t>(inside.size())));
}

void RoundTrips(BlockIO* io, const std::string& name, bool direct, uint64_t seed) {
  for (const size_t size : {size_t{1}, kBlock, kRequest - 4, 5 * kRequest, 7 * kRequest + 4097}) {
    const Bytes data = Random(size, seed + size);
    const Memory memory(size + 1);
    for (const size_t misaligned_by : {0, 1}) {
      std::copy(data.begin(), data.end(), memory.data() + misaligned_by);
      for (const size_t parts : {1, 2, 7}) {
        RoundTrip(io, name, direct, data, memory.data() + misaligned_by, parts);
      }
    }
  }
}

void TestBackendsInThreads() {
  const auto& backends = BlockIO::Backends();
  InThreads(2 * static_cast<int>(backends.size()), [&](int i) {
    BlockIO io(backends[static_cast<size_t>(i / 2)], kRequest, 3);
    RoundTrips(&io, "checked-" + std::to_string(i), i % 2 == 0, static_cast<uint64_t>(i));
  });
}

void TestFaultyTransfersAreRepeated() {
  for (const bool refuse_direct : {false, true}) {
    for (const int64_t missing_bytes : {0, 1000}) {
      for (const bool direct : {false, true}) {
        std::atomic<int> in_flight{0};
        Faults faults;
        faults.refuse_direct = refuse_direct;
        faults.missing_bytes = missing_bytes;
        faults.short_transfers = missing_bytes == 0;
        faults.interrupted = true;
        RoundTrips(FaultyIO(faults, &in_flight).get(), "checked-faulty", direct, 3);
        CHECK(in_flight == 0);
      }
    }
  }
}

void TestFailedWriteLeavesNothingInFlight() {
  Memory memory(1 << 20);
  Bytes sums(4 * (memory.size() / kBlock));
  for (const int fail_after : {0, 1, 5, 15}) {
    for (const size_t part_count : {1, 2}) {
      std::atomic<int> in_flight{0};
      Faults faults;
      faults.fail_after = fail_after;
      faults.error = ENOSPC;
      const auto io = FaultyIO(faults, &in_flight);
      const size_t size = memory.size() / part_count;
      std::vector<Part> parts;
      for (size_t i = 0; i < part_count; ++i) parts.push_back({memory.data() + i * size, size});
      ChecksummedSource source(parts, kBlock, sums.data());
      const std::string path = FreshPath("checked-failing");
      const auto file = File::Create(path, true, 0644);
      const auto error =
          Caught<distckpt::FileError>([&] { io->WriteFrom(source, *file, 0, source.size(), 0); });
      CHECK(in_flight == 0 && error.code().value() == ENOSPC && error.path() == path);
      std::memset(memory.data(), 0, memory.size());  // A race with a transfer that still ran.
    }
  }
}

void TestFailedReadLeavesNothingInFlight() {
  const Bytes data = Random(1 << 20, 4);
  const Bytes sums = Sums(data);
  const auto file = File::Create(FreshPath("checked-failing-read"), true, 0644);
  BlockIO("", kRequest, 2).Write(*file, 0, data.data(), data.size());
  for (const int fail_after : {0, 1, 5, 15}) {
    std::atomic<int> in_flight{0};
    Faults faults;
    faults.fail_after = fail_after;
    const auto io = FaultyIO(faults, &in_flight);
    Bytes memory(data.size());
    VerifyingSink sink({Target(0, &memory)}, kBlock, data.size(), sums.data());
    const auto error = Caught<distckpt::FileError>([&] { io->ReadInto(sink, *file, {{0, data.size()}}); });
    CHECK(in_flight == 0 && error.code().value() == EIO && !sink.failed());
  }
}

void TestWrongBlockStopsTheReadAndIsNotCopied() {
  const Bytes data = Random(10 * kRequest + 5, 6);
  const Bytes sums = Sums(data);
  const size_t last = sums.size() / 4 - 1;
  for (const size_t block : {size_t{0}, last / 2, last}) {
    std::atomic<int> in_flight{0};
    Faults faults;
    faults.short_transfers = true;
    const auto io = FaultyIO(faults, &in_flight);
    Bytes damaged = data;
    damaged[block * kBlock] ^= 1;
    const auto file = File::Create(FreshPath("damaged"), false, 0644);
    io->Write(*file, 0, damaged.data(), damaged.size());
    Bytes memory(data.size());
    VerifyingSink sink({Target(0, &memory)}, kBlock, data.size(), sums.data());
    io->ReadInto(sink, *file, {{0, data.size()}});
    const size_t begin = block * kBlock;
    const size_t end = std::min(begin + kBlock, data.size());
    CHECK(in_flight == 0 && sink.failed() && sink.bad_block() == block);
    CHECK(sink.found() == distckpt::Crc32c(0, damaged.data() + begin, end - begin));
    CHECK(std::all_of(memory.data() + begin, memory.data() + end, [](uint8_t byte) { return byte == 0; }));
  }
}

void TestFileThatEndsInABlock() {
  const Bytes data = Random(3 * kRequest, 7);
  const Bytes sums = Sums(data);
  for (const bool direct : {false, true}) {
    for (const size_t size : {size_t{0}, kBlock - 1, kRequest, 2 * kRequest + kBlock + 1}) {
      for (const std::string& backend : BlockIO::Backends()) {
        BlockIO io(backend, kRequest, 2);
        const auto file = File::Create(FreshPath("ending"), direct, 0644);
        io.Write(*file, 0, data.data(), data.size());
        file->Truncate(static_cast<int64_t>(size));
        Bytes memory(data.size());
        VerifyingSink sink({Target(0, &memory)}, kBlock, data.size(), sums.data());
        CHECK(io.ReadInto(sink, *file, {{0, data.size()}}) == size && !sink.failed());
        Bytes expected = data;
        std::fill(expected.begin() + static_cast<ptrdiff_t>(size / kBlock * kBlock), expected.end(), 0);
        CHECK(memory == expected);
      }
    }
  }
}

// Counts what it is asked for, and throws when told to.
class StubbornSource : public Source {
 public:
  explicit StubbornSource(uint64_t throw_at, bool find) : throw_at_(throw_at), find_(find) {}

  void Fill(uint64_t begin, uint64_t end, uint8_t* out) override {
    CHECK(begin == next_);
    if (begin >= throw_at_) throw std::runtime_error("Fill");
    std::memset(out, 1, end - begin);
    next_ = end;
  }
  const uint8_t* Find(uint64_t begin, uint64_t, size_t) override {
    if (find_ && begin >= throw_at_) throw std::runtime_error("Find");
    return nullptr;
  }
  uint64_t next() const { return next_; }

 private:
  const uint64_t throw_at_;
  const bool find_;
  uint64_t next_ = 0;
};

class StubbornSink : public Sink {
 public:
  bool Take(uint64_t, uint64_t, const uint8_t*) override { throw std::runtime_error("Take"); }
};

void TestExceptionOfSourceOrSinkLeavesNothingInFlight() {
  const auto file = File::Create(FreshPath("stubborn"), true, 0644);
  for (const bool find : {false, true}) {
    for (const uint64_t throw_at : {uint64_t{0}, uint64_t{3 * kRequest}, kNoEnd}) {
      std::atomic<int> in_flight{0};
      const auto io = FaultyIO(Faults(), &in_flight);
      StubbornSource source(throw_at, find);
      const auto write = [&] { io->WriteFrom(source, *file, 0, 9 * kRequest + 1, 0); };
      if (throw_at == kNoEnd) {
        write();
        CHECK(source.next() == 9 * kRequest + 1);
      } else {
        Caught<std::runtime_error>(write);
      }
      CHECK(in_flight == 0);
      StubbornSink sink;
      if (throw_at != kNoEnd) continue;
      Caught<std::runtime_error>([&] { io->ReadInto(sink, *file, {{0, 9 * kRequest}}); });
      CHECK(in_flight == 0);
    }
  }
}

void TestMemoryIsFoundWhereItIsAligned() {
  const Memory memory(kRequest);
  uint8_t sums[4 * (kRequest / kBlock)];
  ChecksummedSource source({{nullptr, 0}, {memory.data(), kRequest}, {memory.data(), 0}}, kBlock, sums);
  CHECK(source.Find(0, kRequest, 4096) == memory.data());
  CHECK(source.Find(kRequest, kRequest + 4, 1) == nullptr);
  ChecksummedSource unaligned({{memory.data() + 1, kBlock}}, kBlock, sums);
  const uint8_t untouched = sums[0] = 0x55;
  CHECK(unaligned.Find(0, kBlock, 4096) == nullptr && sums[0] == untouched);
  CHECK(unaligned.Find(0, kBlock, 1) == memory.data() + 1);
}

// As an image in memory is written: in pieces, behind a header of its own, in front of a tail.
void TestRangesInsideAPartAreFoundBetweenThoseThatAreFilled() {
  constexpr size_t kHead = 4096;
  constexpr size_t kImage = 3 * kRequest;
  const Bytes data = Random(kHead + kImage + 77, 11);
  const Memory memory(kHead + kImage);  // The image lies where its offset in the file is, modulo 4096.
  std::copy_n(data.begin() + kHead, kImage, memory.data() + kHead);
  const Bytes expected = Sums(data);
  Bytes sums(expected.size());
  ChecksummedSource source({{data.data(), kHead},
                            {memory.data() + kHead, kRequest / 2},
                            {memory.data() + kHead + kRequest / 2, kImage - kRequest / 2},
                            {data.data() + kHead + kImage, 77}},
                           kBlock, sums.data());
  Bytes written;
  std::vector<bool> found;
  for (uint64_t begin = 0; begin < source.size(); begin += kRequest) {
    const uint64_t end = std::min<uint64_t>(begin + kRequest, source.size());
    const uint8_t* place = source.Find(begin, end, 4096);
    found.push_back(place != nullptr);
    CHECK(place == nullptr || place == memory.data() + begin);
    Bytes filled(end - begin);
    if (place == nullptr) source.Fill(begin, end, filled.data());
    if (place == nullptr) place = filled.data();
    written.insert(written.end(), place, place + (end - begin));
  }
  CHECK((found == std::vector<bool>{false, true, true, false}));
  CHECK(sums == expected);
  Bytes file = data;
  file.insert(file.end(), expected.begin(), expected.end());
  CHECK(written == file);
}

void TestWrongArgumentsAreRefused() {
  BlockIO io("", kRequest, 1);
  const auto file = File::Create(FreshPath("checked-arguments"), false, 0644);
  StubbornSource source(0, false);
  StubbornSink sink;
  const auto write = [&](int64_t offset, size_t size, double rate) {
    Caught<std::invalid_argument>([&] { io.WriteFrom(source, *file, offset, size, rate); });
  };
  write(-1, 1, 0);
  write(0, SIZE_MAX, 0);
  write(0, 1, -1);
  write(0, 1, std::numeric_limits<double>::quiet_NaN());
  const auto read = [&](const std::vector<ByteRange>& ranges) {
    Caught<std::invalid_argument>([&] { io.ReadInto(sink, *file, ranges); });
  };
  read({{1, 0}});
  read({{5, 6}, {0, 1}});
  read({{0, 2}, {1, 3}});
  read({{0, kNoEnd}});
  Bytes memory(10);
  uint8_t sums[8] = {};
  Caught<std::invalid_argument>(
      [&] { VerifyingSink({Target(2, &memory), Target(1, &memory)}, kBlock, 2 * kBlock, sums); });
  io.Close();
  write(0, 1, 0);
  read({});
}

}  // namespace

void TestCheckedTransfers() {
  TestBackendsInThreads();
  TestFaultyTransfersAreRepeated();
  TestFailedWriteLeavesNothingInFlight();
  TestFailedReadLeavesNothingInFlight();
  TestWrongBlockStopsTheReadAndIsNotCopied();
  TestFileThatEndsInABlock();
  TestExceptionOfSourceOrSinkLeavesNothingInFlight();
  TestMemoryIsFoundWhereItIsAligned();
  TestRangesInsideAPartAreFoundBetweenThoseThatAreFilled();
  TestWrongArgumentsAreRefused();
}
