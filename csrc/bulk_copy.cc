#include "bulk_copy.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace distckpt {

#if defined(__SSE2__)

namespace {

constexpr size_t kLine = 64;
constexpr size_t kStep = 2 * kLine;
constexpr size_t kSmall = size_t{8} << 10;  // Below this memcpy is as fast.

}  // namespace

// A plain store first reads the line that it is about to replace: a third of the traffic of a copy. Wider
// registers gain little more, and these every x86-64 has.
void BulkCopy(uint8_t* target, const uint8_t* source, size_t size) {
  if (size >= kSmall) {
    const size_t head = -reinterpret_cast<uintptr_t>(target) % kLine;
    std::memcpy(target, source, head);
    const size_t tail = (size - head) % kStep;
    const uint8_t* const stop = source + (size - tail);
    for (target += head, source += head; source != stop; target += kStep, source += kStep) {
      __m128i words[kStep / sizeof(__m128i)];
      std::memcpy(words, source, kStep);
      for (size_t i = 0; i < kStep / sizeof(__m128i); ++i) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(target) + i, words[i]);
      }
    }
    _mm_sfence();  // What is stored so waits for no other store.
    size = tail;
  }
  std::memcpy(target, source, size);
}

#else

void BulkCopy(uint8_t* target, const uint8_t* source, size_t size) { std::memcpy(target, source, size); }

#endif

}  // namespace distckpt
