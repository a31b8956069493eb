// CRC32C (Castagnoli polynomial, as in RFC 3720). All functions may be called from any thread.

#ifndef DISTCKPT_CRC32C_H_
#define DISTCKPT_CRC32C_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distckpt {

// The checksum of data[0, size) appended to bytes whose checksum is `value`; 0 for none. By the first of the
// kernels.
uint32_t Crc32c(uint32_t value, const void* data, size_t size);

// The checksum of bytes whose checksum is `first`, followed by `size` bytes whose checksum is `second`.
uint32_t JoinCrc32c(uint32_t first, uint32_t second, uint64_t size);

// A kernel takes and returns the raw shift register: the checksum's complement.
using Crc32cExtend = uint32_t (*)(uint32_t state, const uint8_t* data, size_t size);

struct Crc32cKernel {
  const char* name;
  Crc32cExtend extend;
};

// Those that this processor has, the fastest first: of "avx512", "sse4.2" and "armv8", and "portable", which
// uses tables and runs everywhere. They give equal sums.
const std::vector<Crc32cKernel>& Crc32cKernels();

uint32_t Crc32cBy(const Crc32cKernel& kernel, uint32_t value, const void* data, size_t size);

// The number of blocks of block_size bytes in `size` bytes; the last may be short.
// Throws std::invalid_argument if block_size is 0.
size_t BlockCount(size_t size, size_t block_size);

// The checksum of each block into out, BlockCount(size, block_size) items of native byte order, aligned or
// not.
void Crc32cBlocks(const void* data, size_t size, size_t block_size, void* out, size_t threads);

namespace internal {

uint32_t ExtendPortable(uint32_t state, const uint8_t* data, size_t size);

// nullptr where the processor lacks the instructions.
Crc32cExtend Avx512Kernel();
Crc32cExtend Sse42Kernel();
Crc32cExtend Armv8Kernel();

}  // namespace internal
}  // namespace distckpt

#endif  // DISTCKPT_CRC32C_H_
