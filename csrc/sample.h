// Checksums that tell different tensors apart at little cost, where equal ones are the rule.

#ifndef DISTCKPT_SAMPLE_H_
#define DISTCKPT_SAMPLE_H_

#include <cstddef>
#include <cstdint>

namespace distckpt {

// CRC32C of data[0, size) if that is at most 64 KiB, else of 65 of its n items of item_size bytes: those
// numbered 0, s, ... 63 s, where s is (n - 1) / 63 rounded down, and the last. Throws std::invalid_argument
// unless item_size is at least 1 and divides size.
uint32_t SampleChecksum(const uint8_t* data, size_t size, int64_t item_size);

}  // namespace distckpt

#endif  // DISTCKPT_SAMPLE_H_
