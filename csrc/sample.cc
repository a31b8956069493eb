#include "sample.h"

#include <stdexcept>
#include <string>

#include "crc32c.h"

namespace distckpt {
namespace {

constexpr size_t kSmall = size_t{64} << 10;
constexpr size_t kSteps = 63;

}  // namespace

uint32_t SampleChecksum(const uint8_t* data, size_t size, int64_t item_size) {
  const auto item = static_cast<size_t>(item_size);
  if (item_size < 1 || size % item != 0) {
    throw std::invalid_argument(std::to_string(size) + " bytes are no items of " + std::to_string(item_size));
  }
  if (size <= kSmall) return Crc32c(0, data, size);
  const size_t last = size / item - 1;
  const size_t step = last / kSteps;
  uint32_t sum = 0;
  for (size_t i = 0; i <= kSteps; ++i) sum = Crc32c(sum, data + i * step * item, item);
  return Crc32c(sum, data + last * item, item);
}

}  // namespace distckpt
