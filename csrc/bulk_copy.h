// memcpy for sizes at which the caches are no help.

#ifndef DISTCKPT_BULK_COPY_H_
#define DISTCKPT_BULK_COPY_H_

#include <cstddef>
#include <cstdint>

namespace distckpt {

// Copies `size` bytes between memories that do not overlap. Large copies go around the caches where the
// processor can, and are visible to other threads as those of memcpy are.
void BulkCopy(uint8_t* target, const uint8_t* source, size_t size);

}  // namespace distckpt

#endif  // DISTCKPT_BULK_COPY_H_
