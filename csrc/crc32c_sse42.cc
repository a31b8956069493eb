// The crc32 instruction of x86-64. It takes a word each cycle but answers after three, so three streams are
// summed side by side and joined.

#include "crc32c.h"

#if defined(__x86_64__)

#include <nmmintrin.h>

#include <cstring>

#include "crc32c_polynomial.h"

namespace distckpt {
namespace internal {
namespace {

constexpr size_t kLongStride = 8192;
constexpr size_t kShortStride = 256;

inline uint64_t Load(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// Sums 3 * kStride bytes.
template <size_t kStride>
__attribute__((target("sse4.2"))) uint32_t ExtendThree(uint32_t state, const uint8_t* data) {
  uint64_t first = state;
  uint64_t second = 0;
  uint64_t third = 0;
  for (size_t i = 0; i < kStride; i += 8) {
    first = _mm_crc32_u64(first, Load(data + i));
    second = _mm_crc32_u64(second, Load(data + kStride + i));
    third = _mm_crc32_u64(third, Load(data + 2 * kStride + i));
  }
  const auto& table = kShiftTable<kStride>;
  const uint32_t both = table.Shift(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
  return table.Shift(both) ^ static_cast<uint32_t>(third);
}

__attribute__((target("sse4.2"))) uint32_t ExtendSse42(uint32_t state, const uint8_t* data, size_t size) {
  for (; size > 0 && reinterpret_cast<uintptr_t>(data) % 8 != 0; --size) state = _mm_crc32_u8(state, *data++);
  for (; size >= 3 * kLongStride; size -= 3 * kLongStride, data += 3 * kLongStride) {
    state = ExtendThree<kLongStride>(state, data);
  }
  for (; size >= 3 * kShortStride; size -= 3 * kShortStride, data += 3 * kShortStride) {
    state = ExtendThree<kShortStride>(state, data);
  }
  for (; size >= 8; size -= 8, data += 8) state = static_cast<uint32_t>(_mm_crc32_u64(state, Load(data)));
  for (; size > 0; --size) state = _mm_crc32_u8(state, *data++);
  return state;
}

}  // namespace

Crc32cExtend Sse42Kernel() { return __builtin_cpu_supports("sse4.2") ? ExtendSse42 : nullptr; }

}  // namespace internal
}  // namespace distckpt

#else

distckpt::Crc32cExtend distckpt::internal::Sse42Kernel() { return nullptr; }

#endif
