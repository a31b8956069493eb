#include "crc32c.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crc32c_polynomial.h"
#include "parallel.h"

namespace distckpt {
namespace {

std::vector<Crc32cKernel> FindKernels() {
  std::vector<Crc32cKernel> kernels;
  const auto add = [&](const char* name, Crc32cExtend extend) {
    if (extend != nullptr) kernels.push_back({name, extend});
  };
  add("avx512", internal::Avx512Kernel());
  add("sse4.2", internal::Sse42Kernel());
  add("armv8", internal::Armv8Kernel());
  add("portable", internal::ExtendPortable);
  return kernels;
}

}  // namespace

const std::vector<Crc32cKernel>& Crc32cKernels() {
  static const std::vector<Crc32cKernel> kernels = FindKernels();
  return kernels;
}

uint32_t Crc32cBy(const Crc32cKernel& kernel, uint32_t value, const void* data, size_t size) {
  return ~kernel.extend(~value, static_cast<const uint8_t*>(data), size);
}

uint32_t Crc32c(uint32_t value, const void* data, size_t size) {
  static const Crc32cKernel fastest = Crc32cKernels().front();
  return Crc32cBy(fastest, value, data, size);
}

// The complements at both ends of a sum cancel out, so that sums are joined as registers are.
uint32_t JoinCrc32c(uint32_t first, uint32_t second, uint64_t size) {
  return internal::Multiply(first, internal::PowerOfX(8 * size)) ^ second;
}

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
