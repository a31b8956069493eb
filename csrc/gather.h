// Copies of many pieces of memory into one.

#ifndef DISTCKPT_GATHER_H_
#define DISTCKPT_GATHER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distckpt {

struct Part {
  const uint8_t* data;
  size_t size;
};

// Copies parts[i] to target + offsets[i], on up to `threads` threads. Throws std::invalid_argument, and
// touches nothing, when there is not one offset a part, a part would reach outside the target, or two of the
// places overlap, in the target or of a part with the target.
void Gather(const std::vector<Part>& parts, const std::vector<int64_t>& offsets, uint8_t* target,
            size_t target_size, size_t threads);

}  // namespace distckpt

#endif  // DISTCKPT_GATHER_H_
