// Exercises the C++ core without Python, for the sanitizers. Usage: native_test DIRECTORY

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "block_io.h"
#include "copy.h"
#include "crc32c.h"
#include "file.h"
#include "gather.h"
#include "memory.h"
#include "sample.h"
#include "testing.h"

namespace {

void TestChecksumKernelsAgreeAndStayInBounds() {
  CHECK(distckpt::Crc32c(0, nullptr, 0) == 0);
  const distckpt::Crc32cKernel portable = distckpt::Crc32cKernels().back();
  for (const distckpt::Crc32cKernel& kernel : distckpt::Crc32cKernels()) {
    CHECK(distckpt::Crc32cBy(kernel, 0, "123456789", 9) == 0xE3069283);
    InThreads(4, [&](int seed) {
      for (const size_t size :
           {0, 1, 7, 8, 9, 255, 256, 320, 321, 511, 767, 768, 769, 24576, 24583, 100000}) {
        const Bytes exact = Random(size, static_cast<uint64_t>(seed));  // The sanitizer guards both ends.
        const uint32_t expected = distckpt::Crc32cBy(portable, 5, exact.data(), size);
        CHECK(distckpt::Crc32cBy(kernel, 5, exact.data(), size) == expected);
        if (size == 0) continue;
        const uint32_t first = distckpt::Crc32cBy(kernel, 5, exact.data(), 1);
        CHECK(distckpt::Crc32cBy(kernel, first, exact.data() + 1, size - 1) == expected);
      }
    });
  }
}

void TestJoinedChecksums() {
  const Bytes data = Random(5000, 2);
  const uint32_t whole = distckpt::Crc32c(0, data.data(), data.size());
  for (const size_t cut : {0, 1, 7, 4096, 4999, 5000}) {
    const uint32_t first = distckpt::Crc32c(0, data.data(), cut);
    const uint32_t second = distckpt::Crc32c(0, data.data() + cut, data.size() - cut);
    CHECK(distckpt::JoinCrc32c(first, second, data.size() - cut) == whole);
  }
}

void TestBlockChecksums() {
  const Bytes data = Random(100001, 1);
  Bytes out(1 + 4 * distckpt::BlockCount(data.size(), 4096));
  distckpt::Crc32cBlocks(data.data(), data.size(), 4096, out.data() + 1, 3);  // Unaligned on purpose.
  for (size_t block = 0; block * 4096 < data.size(); ++block) {
    uint32_t sum;
    std::memcpy(&sum, out.data() + 1 + 4 * block, sizeof(sum));
    const size_t size = std::min<size_t>(4096, data.size() - block * 4096);
    CHECK(sum == distckpt::Crc32c(0, data.data() + block * 4096, size));
  }
  distckpt::Crc32cBlocks(nullptr, 0, 4096, nullptr, 2);
}

struct CopyCase {
  distckpt::CopyRegion region;
  Bytes file;
  Bytes target;
};

CopyCase RandomCopyCase(std::mt19937_64& random) {
  const auto below = [&](int64_t limit) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(limit));
  };
  CopyCase c;
  auto& region = c.region;
  region.item_size = int64_t{1} << below(5);
  const auto dimensions = static_cast<size_t>(below(4));
  region.shape.resize(dimensions);
  region.source_strides.resize(dimensions);
  region.target_strides.resize(dimensions);
  int64_t extent = region.item_size;
  int64_t reach = region.item_size;
  region.target_start = 0;
  std::vector<size_t> order(dimensions);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t d = dimensions; d-- > 0;) {
    region.shape[d] = 1 + below(5);
    region.source_strides[d] = extent + below(3) * below(9);
    extent += (region.shape[d] - 1) * region.source_strides[d];
  }
  if (below(2) == 0) std::shuffle(order.begin(), order.end(), random);
  for (size_t i = dimensions; i-- > 0;) {
    const size_t d = order[i];
    const int64_t stride = reach + below(2) * below(5);
    const int64_t length = (region.shape[d] - 1) * stride;
    const bool reversed = below(3) == 0;
    region.target_strides[d] = reversed ? -stride : stride;
    if (reversed) region.target_start += length;
    reach += length;
  }
  region.chunk_start = below(30);
  c.file = Random(static_cast<size_t>(region.chunk_start + extent), random());
  c.target = Random(static_cast<size_t>(reach), random());
  return c;
}

// The definition of RegionCopy, an item at a time.
int64_t CopySlowly(const distckpt::CopyRegion& r, const Bytes& file, int64_t begin, int64_t end,
                   Bytes* target) {
  std::vector<int64_t> index(r.shape.size(), 0);
  int64_t copied = 0;
  while (true) {
    int64_t from = r.chunk_start;
    int64_t to = r.target_start;
    for (size_t d = 0; d < index.size(); ++d) {
      from += index[d] * r.source_strides[d];
      to += index[d] * r.target_strides[d];
    }
    if (from >= begin && from + r.item_size <= end) {
      std::copy_n(file.begin() + from, r.item_size, target->begin() + to);
      copied += r.item_size;
    }
    size_t d = index.size();
    while (d > 0 && ++index[d - 1] == r.shape[d - 1]) index[--d] = 0;
    if (d == 0) return copied;
  }
}

void TestCopyEqualsItsDefinition() {
  std::mt19937_64 random(3);
  for (int round = 0; round < 4000; ++round) {
    CopyCase c = RandomCopyCase(random);
    const auto file_size = static_cast<int64_t>(c.file.size());
    const auto begin = static_cast<int64_t>(random() % (c.file.size() + 1));
    const auto end = begin + static_cast<int64_t>(random() % static_cast<uint64_t>(file_size - begin + 1));
    const Bytes window(c.file.begin() + begin, c.file.begin() + end);
    Bytes expected = c.target;
    const int64_t bytes = CopySlowly(c.region, c.file, begin, end, &expected);
    const auto size = static_cast<int64_t>(c.target.size());
    const distckpt::RegionCopy copy(c.region, c.target.data(), size);
    CHECK(copy.begin() == c.region.chunk_start && copy.end() == file_size);
    CHECK(copy.CopyFrom(window.data(), begin, end - begin) == bytes);
    CHECK(c.target == expected);
    Caught<std::invalid_argument>([&] { distckpt::RegionCopy(c.region, c.target.data(), size - 1); });
  }
}

// Parts in allocations of their own, so that the sanitizer guards both ends of each, as of the target.
void TestGatherEqualsItsDefinition() {
  for (const size_t threads : {1, 3}) {
    std::vector<Bytes> memories;
    Bytes expected;
    for (const size_t size : {0, 1, 70, 8191, 8192, 8321, 100000, 3 << 20, 5}) {
      memories.push_back(Random(size, size));
      expected.insert(expected.end(), memories.back().begin(), memories.back().end());
    }
    std::vector<distckpt::Part> parts;
    std::vector<int64_t> offsets;
    auto end = static_cast<int64_t>(expected.size());
    for (size_t i = memories.size(); i-- > 0;) {  // Offsets descend.
      parts.push_back({memories[i].data(), memories[i].size()});
      offsets.push_back(end -= static_cast<int64_t>(memories[i].size()));
    }
    Bytes target(expected.size());
    distckpt::Gather(parts, offsets, target.data(), target.size(), threads);
    CHECK(target == expected);
    const auto refused = [&](size_t target_size) {
      Caught<std::invalid_argument>(
          [&] { distckpt::Gather(parts, offsets, target.data(), target_size, threads); });
    };
    refused(target.size() - 1);
    parts.front() = {target.data(), 1};
    refused(target.size());
    offsets.pop_back();
    refused(target.size());
  }
  distckpt::Gather({}, {}, nullptr, 0, 2);
}

void TestSamplesStayInBounds() {
  for (const int64_t item : {1, 3, 16}) {
    for (const size_t count : {0, 1, 4096, 70001}) {
      const Bytes data = Random(count * static_cast<size_t>(item), 8);
      Bytes sampled = data;
      if (data.size() > 65536) {
        sampled.clear();
        for (size_t i = 0; i <= 64; ++i) {  // 64 at equal distances from the first on, and the last.
          const size_t number = i < 64 ? i * ((count - 1) / 63) : count - 1;
          const auto* const first = data.data() + number * static_cast<size_t>(item);
          sampled.insert(sampled.end(), first, first + item);
        }
      }
      const uint32_t sum = distckpt::Crc32c(0, sampled.data(), sampled.size());
      CHECK(distckpt::SampleChecksum(data.data(), data.size(), item) == sum);
    }
  }
}

void TestMemoryIsPopulatedWhileItIsWritten() {
  Memory memory((size_t{8} << 20) + 5);
  CHECK(reinterpret_cast<uintptr_t>(memory.data()) % (size_t{2} << 20) == 0);
  InThreads(3, [&](int part) {
    if (part == 0) memory.Populate(2);
    const size_t half = memory.size() / 2;
    if (part > 0) std::memset(memory.data() + (part == 1 ? 0 : half), part, half);
  });
  CHECK(memory.data()[0] == 1 && memory.data()[memory.size() - 2] == 2 &&
        memory.data()[memory.size() - 1] == 0);
  Memory(0).Populate(1);
}

void TestFileIsUsedAndClosedConcurrently() {
  const std::string path = FreshPath("file");
  const auto file = File::Create(path, true, 0644);
  CHECK(file->IsNamed(path) && !file->IsNamed(path + "-other") && file->Size() == 0);
  file->Truncate(12345);
  file->Sync();
  struct stat status;
  file->SetAccess(0640, -1);
  CHECK(stat(path.c_str(), &status) == 0 && (status.st_mode & 07777) == 0640);
  file->SetAccess(-1, getgid());
  CHECK(stat(path.c_str(), &status) == 0 && (status.st_mode & 07777) == 0640 && status.st_gid == getgid());
  distckpt::SyncDirectory(directory);
  CHECK(Caught<distckpt::FileError>([&] { File::Create(path, false, 0644); }).code().value() == EEXIST);
  CHECK(Caught<distckpt::FileError>([&] { File::Open(path + "-other", true); }).path() == path + "-other");
  InThreads(4, [&](int i) {
    try {
      while (i > 0) CHECK(file->Size() == 12345 && file->IsNamed(path));
    } catch (const std::invalid_argument&) {
    }
    file->Close();
  });
}

void RoundTrip(BlockIO* io, const std::string& name, bool direct, uint64_t seed) {
  const Bytes data = Random(700000 + seed, seed);
  const auto file = File::Create(FreshPath(name), direct, 0644);
  io->Write(*file, 0, data.data(), data.size());
  file->Truncate(static_cast<int64_t>(data.size()));
  for (const size_t offset :
       {size_t{0}, size_t{1}, size_t{4096}, size_t{65536 + 17}, data.size(), data.size() + 9}) {
    const size_t expected = offset < data.size() ? data.size() - offset : 0;
    for (const size_t misaligned_by : {size_t{0}, size_t{1}, offset % 4096}) {
      Memory memory(data.size() + 4096);
      uint8_t* target = memory.data() + misaligned_by;
      CHECK(io->Read(*file, static_cast<int64_t>(offset), target, data.size()) == expected);
      CHECK(std::equal(target, target + expected,
                       data.begin() + static_cast<ptrdiff_t>(data.size() - expected)));
    }
    Bytes exact(100);
    const size_t read = io->Read(*file, static_cast<int64_t>(offset), exact.data(), exact.size());
    CHECK(read == std::min<size_t>(100, expected));
  }
}

void TestBackendsFromSeveralThreads() {
  const auto backends = BlockIO::Backends();
  const auto count = static_cast<int>(backends.size());
  InThreads(2 * count, [&](int i) {
    BlockIO io(backends[static_cast<size_t>(i / 2)], 65536, 3);
    RoundTrip(&io, "parallel-" + std::to_string(i), i % 2 == 0, static_cast<uint64_t>(i));
  });
  for (const std::string& backend : backends) {
    BlockIO shared(backend, 65536, 4);
    InThreads(3, [&](int i) {
      RoundTrip(&shared, "shared-" + std::to_string(i), i % 2 == 0, static_cast<uint64_t>(i));
    });
    shared.Close();
  }
}

void TestShortInterruptedAndRefusedTransfersAreRepeated() {
  for (const bool refuse_direct : {false, true}) {
    for (const bool short_transfers : {false, true}) {
      for (const bool direct : {false, true}) {
        std::atomic<int> in_flight{0};
        Faults faults;
        faults.refuse_direct = refuse_direct;
        faults.short_transfers = short_transfers;
        faults.interrupted = true;
        RoundTrip(FaultyIO(faults, &in_flight).get(), "faulty", direct, 5);
        CHECK(in_flight == 0);
      }
    }
  }
}

void TestShortDirectTransferGoesOnFromItsLastWholeBlock() {
  std::atomic<int> in_flight{0};
  Faults faults;
  faults.missing_bytes = 1000;
  const auto io = FaultyIO(faults, &in_flight);
  const auto file = File::Create(FreshPath("short"), true, 0644);
  const bool direct = file->direct();
  const Bytes data = Random(1 << 20, 2);
  io->Write(*file, 0, data.data(), data.size());
  Bytes read(data.size());
  CHECK(io->Read(*file, 0, read.data(), read.size()) == data.size());
  CHECK(read == data && file->direct() == direct);
}

void TestRefusedDirectTransferTurnsDirectOff() {
  std::atomic<int> in_flight{0};
  Faults faults;
  faults.refuse_direct = true;
  const auto file = File::Create(FreshPath("refused"), true, 0644);
  const Memory memory(1 << 20);
  FaultyIO(faults, &in_flight)->Write(*file, 0, memory.data(), memory.size());
  CHECK(!file->direct() && file->Size() == 1 << 20);
}

void TestErrorIsToldOnceNothingIsInFlight() {
  Memory memory(1 << 20);
  for (const int fail_after : {0, 1, 5, 15}) {
    for (const bool write : {false, true}) {
      std::atomic<int> in_flight{0};
      Faults faults;
      faults.fail_after = fail_after;
      faults.error = write ? ENOSPC : EIO;
      const auto io = FaultyIO(faults, &in_flight);
      const std::string path = FreshPath("failing");
      const auto file = File::Create(path, true, 0644);
      file->Truncate(1 << 20);
      const auto error = Caught<distckpt::FileError>([&] {
        write ? io->Write(*file, 0, memory.data(), memory.size())
              : static_cast<void>(io->Read(*file, 0, memory.data(), memory.size()));
      });
      CHECK(in_flight == 0 && error.code().value() == faults.error && error.path() == path);
      std::memset(memory.data(), 0, memory.size());  // A race with a transfer that still ran.
    }
  }
}

void TestWriteWithoutProgressFails() {
  std::atomic<int> in_flight{0};
  Faults faults;
  faults.no_progress = true;
  const auto io = FaultyIO(faults, &in_flight);
  const auto file = File::Create(FreshPath("stuck"), false, 0644);
  const Bytes data(100);
  const auto error = Caught<distckpt::FileError>([&] { io->Write(*file, 0, data.data(), data.size()); });
  CHECK(error.code().value() == EIO);
}

// One page in the middle cannot be written: the request that meets it fails while others are in flight.
void TestMemoryIsLeftAloneAfterAFailedRead() {
  constexpr size_t kSize = 1 << 20;
  for (const std::string& backend : BlockIO::Backends()) {
    const auto file = File::Create(FreshPath("fault-" + backend), true, 0644);
    const Bytes data = Random(kSize, 9);
    BlockIO io(backend, 65536, 8);
    io.Write(*file, 0, data.data(), kSize);
    void* memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    auto* bytes = static_cast<uint8_t*>(memory);
    CHECK(::mprotect(bytes + kSize / 2, 4096, PROT_NONE) == 0);
    const auto error = Caught<distckpt::FileError>([&] { io.Read(*file, 0, bytes, kSize); });
    CHECK(error.code().value() == EFAULT);
    CHECK(::mprotect(bytes + kSize / 2, 4096, PROT_READ | PROT_WRITE) == 0);
    std::memset(bytes, 0x5A, kSize);
    ::usleep(20000);
    CHECK(std::all_of(bytes, bytes + kSize, [](uint8_t byte) { return byte == 0x5A; }));
    CHECK(io.Read(*file, 0, bytes, kSize) == kSize && std::memcmp(bytes, data.data(), kSize) == 0);
    ::munmap(memory, kSize);
  }
}

void TestWrongArgumentsAreRefused() {
  Caught<std::invalid_argument>([] { BlockIO("pigeon", 4096, 1); });
  Caught<std::invalid_argument>([] { BlockIO("threads", 4097, 1); });
  Caught<std::invalid_argument>([] { BlockIO("threads", 4096, 0); });
  BlockIO io("", 4096, 1);
  const auto file = File::Create(FreshPath("arguments"), false, 0644);
  uint8_t byte = 0;
  Caught<std::invalid_argument>([&] { io.Read(*file, -1, &byte, 1); });
  Caught<std::invalid_argument>([&] { io.Write(*file, INT64_MAX - 100, &byte, 1); });
  Caught<std::invalid_argument>([&] { io.Read(*file, 0, &byte, SIZE_MAX); });
  io.Close();
  Caught<std::invalid_argument>([&] { io.Read(*file, 0, &byte, 1); });
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2);
  directory = argv[1];
  TestChecksumKernelsAgreeAndStayInBounds();
  TestJoinedChecksums();
  TestBlockChecksums();
  TestCopyEqualsItsDefinition();
  TestGatherEqualsItsDefinition();
  TestSamplesStayInBounds();
  TestMemoryIsPopulatedWhileItIsWritten();
  TestFileIsUsedAndClosedConcurrently();
  TestBackendsFromSeveralThreads();
  TestShortInterruptedAndRefusedTransfersAreRepeated();
  TestShortDirectTransferGoesOnFromItsLastWholeBlock();
  TestRefusedDirectTransferTurnsDirectOff();
  TestErrorIsToldOnceNothingIsInFlight();
  TestWriteWithoutProgressFails();
  TestMemoryIsLeftAloneAfterAFailedRead();
  TestWrongArgumentsAreRefused();
  TestCheckedTransfers();
  std::printf("native tests passed: %s, backends", distckpt::Crc32cKernels().front().name);
  for (const std::string& backend : BlockIO::Backends()) std::printf(" %s", backend.c_str());
  std::printf("\n");
}
