// Arithmetic modulo the Castagnoli polynomial, at compile time. A register is bit-reflected: its bit 31 - k
// is the coefficient of x^k.

#ifndef DISTCKPT_CRC32C_POLYNOMIAL_H_
#define DISTCKPT_CRC32C_POLYNOMIAL_H_

#include <cstddef>
#include <cstdint>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the checksum kernels load little-endian words"
#endif

namespace distckpt {
namespace internal {

constexpr uint32_t kCastagnoli = 0x82F63B78;

// value * x modulo the polynomial.
constexpr uint32_t TimesX(uint32_t value) { return (value >> 1) ^ ((value & 1) ? kCastagnoli : 0); }

constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = TimesX(b);
  }
  return product;
}

constexpr uint32_t PowerOfX(uint64_t exponent) {
  uint32_t power = 1u << 31;   // x^0
  uint32_t square = 1u << 30;  // x^1
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) power = Multiply(power, square);
    square = Multiply(square, square);
  }
  return power;
}

// Moves a register over kBytes zero bytes. With it, streams that were summed side by side are joined:
// register(A B) = shift(register(A), size of B) ^ register of B begun at zero.
template <size_t kBytes>
struct ShiftTable {
  uint32_t values[4][256] = {};

  constexpr ShiftTable() {
    const uint32_t power = PowerOfX(8 * static_cast<uint64_t>(kBytes));
    for (uint32_t byte = 0; byte < 4; ++byte) {
      for (uint32_t value = 0; value < 256; ++value) {
        values[byte][value] = Multiply(value << (8 * byte), power);
      }
    }
  }

  uint32_t Shift(uint32_t state) const {
    return values[0][state & 0xff] ^ values[1][(state >> 8) & 0xff] ^ values[2][(state >> 16) & 0xff] ^
           values[3][state >> 24];
  }
};

template <size_t kBytes>
inline constexpr ShiftTable<kBytes> kShiftTable{};

}  // namespace internal
}  // namespace distckpt

#endif  // DISTCKPT_CRC32C_POLYNOMIAL_H_
