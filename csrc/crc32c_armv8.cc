// The crc32c instructions of ARMv8. As on x86-64 the answer comes later than the next word may, so three
// streams are summed side by side and joined.

#include "crc32c.h"

#if defined(__aarch64__) && defined(__linux__)

#include <arm_acle.h>
#include <sys/auxv.h>

#include <cstring>

#include "crc32c_polynomial.h"

#if defined(__clang__)
#define DISTCKPT_TARGET_CRC __attribute__((target("crc")))
#else
#define DISTCKPT_TARGET_CRC __attribute__((target("+crc")))
#endif

namespace distckpt {
namespace internal {
namespace {

constexpr size_t kLongStride = 8192;
constexpr size_t kShortStride = 256;
constexpr unsigned long kHwcapCrc32 = 1ul << 7;  // HWCAP_CRC32, which old headers lack.

inline uint64_t Load(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// Sums 3 * kStride bytes.
template <size_t kStride>
DISTCKPT_TARGET_CRC uint32_t ExtendThree(uint32_t first, const uint8_t* data) {
  uint32_t second = 0;
  uint32_t third = 0;
  for (size_t i = 0; i < kStride; i += 8) {
    first = __crc32cd(first, Load(data + i));
    second = __crc32cd(second, Load(data + kStride + i));
    third = __crc32cd(third, Load(data + 2 * kStride + i));
  }
  const auto& table = kShiftTable<kStride>;
  return table.Shift(table.Shift(first) ^ second) ^ third;
}

DISTCKPT_TARGET_CRC uint32_t ExtendArmv8(uint32_t state, const uint8_t* data, size_t size) {
  for (; size > 0 && reinterpret_cast<uintptr_t>(data) % 8 != 0; --size) state = __crc32cb(state, *data++);
  for (; size >= 3 * kLongStride; size -= 3 * kLongStride, data += 3 * kLongStride) {
    state = ExtendThree<kLongStride>(state, data);
  }
  for (; size >= 3 * kShortStride; size -= 3 * kShortStride, data += 3 * kShortStride) {
    state = ExtendThree<kShortStride>(state, data);
  }
  for (; size >= 8; size -= 8, data += 8) state = __crc32cd(state, Load(data));
  for (; size > 0; --size) state = __crc32cb(state, *data++);
  return state;
}

}  // namespace

Crc32cExtend Armv8Kernel() { return (getauxval(AT_HWCAP) & kHwcapCrc32) ? ExtendArmv8 : nullptr; }

}  // namespace internal
}  // namespace distckpt

#else

distckpt::Crc32cExtend distckpt::internal::Armv8Kernel() { return nullptr; }

#endif
