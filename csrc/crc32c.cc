#include "crc32c.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "parallel.h"

namespace distckpt {
namespace {

struct Dispatch {
  internal::Crc32cKernel extend;
  const char* name;
};

Dispatch Choose() {
  if (const auto kernel = internal::Sse42Kernel()) return {kernel, "sse4.2"};
  if (const auto kernel = internal::Armv8Kernel()) return {kernel, "armv8"};
  return {internal::ExtendPortable, "portable"};
}

const Dispatch& Chosen() {
  static const Dispatch dispatch = Choose();
  return dispatch;
}

}  // namespace

uint32_t Crc32c(uint32_t value, const void* data, size_t size) {
  return ~Chosen().extend(~value, static_cast<const uint8_t*>(data), size);
}

uint32_t Crc32cPortable(uint32_t value, const void* data, size_t size) {
  return ~internal::ExtendPortable(~value, static_cast<const uint8_t*>(data), size);
}

const char* Crc32cKernelName() { return Chosen().name; }

size_t BlockCount(size_t size, size_t block_size) {
  if (block_size == 0) throw std::invalid_argument("block_size must be at least 1");
  return size / block_size + (size % block_size != 0);
}

void Crc32cBlocks(const void* data, size_t size, size_t block_size, void* out, size_t threads) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  auto* sums = static_cast<uint8_t*>(out);
  ParallelFor(BlockCount(size, block_size), threads, [=](size_t block) {
    const size_t begin = block * block_size;
    const uint32_t sum = Crc32c(0, bytes + begin, std::min(block_size, size - begin));
    std::memcpy(sums + block * sizeof(sum), &sum, sizeof(sum));
  });
}

}  // namespace distckpt
