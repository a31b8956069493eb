// Arithmetic on sizes and offsets that come from outside: an overflow is an error, never a small number.

#ifndef DISTCKPT_CHECKED_H_
#define DISTCKPT_CHECKED_H_

#include <cstdint>
#include <stdexcept>

namespace distckpt {

inline int64_t CheckedAdd(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) throw std::invalid_argument("a sum of offsets overflows 63 bits");
  return sum;
}

inline int64_t CheckedMultiply(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw std::invalid_argument("a product of sizes overflows 63 bits");
  }
  return product;
}

}  // namespace distckpt

#endif  // DISTCKPT_CHECKED_H_
