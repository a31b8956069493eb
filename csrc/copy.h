// Copies between the byte stream of a file and strided arrays.

#ifndef DISTCKPT_COPY_H_
#define DISTCKPT_COPY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace distckpt {

// An array of items that lies in a file and in memory: item (i, ...) at file offset
// chunk_start + sum(i * source_strides) and at target_start + sum(i * target_strides) of the target.
struct CopyRegion {
  std::vector<int64_t> shape;
  std::vector<int64_t> source_strides;  // Bytes; growing in C order, without overlap.
  std::vector<int64_t> target_strides;  // Bytes; any.
  int64_t item_size;
  int64_t chunk_start;
  int64_t target_start;
};

// The file offset past the region's last byte. Throws std::invalid_argument as CopyChunk does.
int64_t RegionEnd(const CopyRegion& region, int64_t target_size);

// Copies the items that lie wholly in the window [source_start, source_start + source_size) of the file,
// which `source` holds; returns the bytes copied. The two memories must not overlap. Throws
// std::invalid_argument, and touches nothing, when any item of the region, in the window or not, would fall
// outside the target, the source strides do not grow in C order, or a number overflows.
int64_t CopyChunk(const CopyRegion& region, const uint8_t* source, int64_t source_start, int64_t source_size,
                  uint8_t* target, int64_t target_size);

}  // namespace distckpt

#endif  // DISTCKPT_COPY_H_
