// Slicing-by-8: eight table look-ups advance the register by eight bytes (Kounavis and Berry, "A Systematic
// Approach to Building High Performance Software-Based CRC Generators", 2005).

#include <cstring>

#include "crc32c.h"
#include "crc32c_polynomial.h"

namespace distckpt {
namespace internal {
namespace {

// values[k][b]: the register after byte b and k zero bytes.
struct SlicingTables {
  uint32_t values[8][256] = {};

  constexpr SlicingTables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t state = byte;
      for (int bit = 0; bit < 8; ++bit) state = TimesX(state);
      values[0][byte] = state;
    }
    for (int k = 1; k < 8; ++k) {
      for (uint32_t byte = 0; byte < 256; ++byte) {
        const uint32_t state = values[k - 1][byte];
        values[k][byte] = (state >> 8) ^ values[0][state & 0xff];
      }
    }
  }
};

constexpr SlicingTables kTables;

}  // namespace

uint32_t ExtendPortable(uint32_t state, const uint8_t* data, size_t size) {
  const auto& table = kTables.values;
  for (; size >= 8; size -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, sizeof(word));
    word ^= state;
    state = 0;
    for (int k = 0; k < 8; ++k) state ^= table[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; size > 0; --size, ++data) state = (state >> 8) ^ table[0][(state ^ *data) & 0xff];
  return state;
}

}  // namespace internal
}  // namespace distckpt
