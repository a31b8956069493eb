// The carry-less multiplication of AVX-512 (VPCLMULQDQ). Four registers of 64 bytes are moved over 256 bytes
// by multiplying each of their words with a power of x, and the next 256 bytes are added (V. Gopal et al.,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009).

#include "crc32c.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "crc32c_polynomial.h"

#define DISTCKPT_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,vpclmulqdq,sse4.2")))

namespace distckpt {
namespace internal {
namespace {

constexpr size_t kLine = sizeof(__m512i);
constexpr size_t kRound = 4 * kLine;

inline uint64_t Load(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// `line` moved over kBytes, with `next` added. A reflected product of two words is one bit short: hence the
// shift. Of each 16 bytes the first 8 are the higher powers.
template <size_t kBytes>
DISTCKPT_TARGET_AVX512 inline __m512i Fold(__m512i line, __m512i next) {
  constexpr auto kFirst = static_cast<long long>(uint64_t{PowerOfX(8 * kBytes + 32)} << 1);
  constexpr auto kSecond = static_cast<long long>(uint64_t{PowerOfX(8 * kBytes - 32)} << 1);
  const __m512i powers = _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
  const __m512i first = _mm512_clmulepi64_epi128(line, powers, 0x00);
  const __m512i second = _mm512_clmulepi64_epi128(line, powers, 0x11);
  return _mm512_ternarylogic_epi64(first, second, next, 0x96);  // a ^ b ^ c
}

DISTCKPT_TARGET_AVX512 uint32_t ExtendWords(uint32_t state, const uint8_t* data, size_t size) {
  uint64_t sum = state;
  for (; size >= 8; size -= 8, data += 8) sum = _mm_crc32_u64(sum, Load(data));
  state = static_cast<uint32_t>(sum);
  for (; size > 0; --size) state = _mm_crc32_u8(state, *data++);
  return state;
}

DISTCKPT_TARGET_AVX512 uint32_t ExtendAvx512(uint32_t state, const uint8_t* data, size_t size) {
  if (size < kRound) return ExtendWords(state, data, size);
  const __m512i start = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state)));
  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data), start);
  __m512i b = _mm512_loadu_si512(data + kLine);
  __m512i c = _mm512_loadu_si512(data + 2 * kLine);
  __m512i d = _mm512_loadu_si512(data + 3 * kLine);
  for (data += kRound, size -= kRound; size >= kRound; data += kRound, size -= kRound) {
    a = Fold<kRound>(a, _mm512_loadu_si512(data));
    b = Fold<kRound>(b, _mm512_loadu_si512(data + kLine));
    c = Fold<kRound>(c, _mm512_loadu_si512(data + 2 * kLine));
    d = Fold<kRound>(d, _mm512_loadu_si512(data + 3 * kLine));
  }
  d = Fold<kLine>(Fold<kLine>(Fold<kLine>(a, b), c), d);
  for (; size >= kLine; data += kLine, size -= kLine) d = Fold<kLine>(d, _mm512_loadu_si512(data));
  // What is left stands for the bytes so far as if they had been these 64.
  uint8_t rest[kLine];
  _mm512_storeu_si512(rest, d);
  return ExtendWords(ExtendWords(0, rest, kLine), data, size);
}

}  // namespace

Crc32cExtend Avx512Kernel() {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("sse4.2");
  return has ? ExtendAvx512 : nullptr;
}

}  // namespace internal
}  // namespace distckpt

#else

distckpt::Crc32cExtend distckpt::internal::Avx512Kernel() { return nullptr; }

#endif
