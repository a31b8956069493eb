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

// A region with its target, checked and planned once, to be copied window by window.
class RegionCopy {
 public:
  // Throws std::invalid_argument when any item of the region would fall outside the target, the source
  // strides do not grow in C order, or a number overflows.
  RegionCopy(const CopyRegion& region, uint8_t* target, int64_t target_size);

  // The file offsets of the region's first byte and past its last.
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // Copies the items that lie wholly in the window [source_start, source_start + source_size) of the file,
  // which `source` holds; returns the bytes copied. The two memories must not overlap. Throws
  // std::invalid_argument, and touches nothing, when the window is not one of a file.
  int64_t CopyFrom(const uint8_t* source, int64_t source_start, int64_t source_size) const;

 private:
  struct Dimension {
    int64_t count;  // > 1
    int64_t source_stride;
    int64_t target_stride;
    int64_t
        extent;  // Bytes of the file from the first byte of this and the inner dimensions to past their last.
  };
  struct Window {
    const uint8_t* source;
    int64_t begin;
    int64_t end;
  };

  int64_t Plan(const CopyRegion& region);
  int64_t Copy(const Window& window, size_t d, int64_t from, uint8_t* target) const;
  int64_t CopyRun(const Window& window, int64_t from, uint8_t* target) const;
  void CopyWhole(size_t d, const uint8_t* source, uint8_t* target) const;
  void CopyRuns(const Dimension& d, const uint8_t* source, uint8_t* target) const;

  // Dimensions are merged: the outer ones, outermost first, around runs of bytes that are contiguous on both
  // sides.
  std::vector<Dimension> dimensions_;
  int64_t item_size_;
  int64_t run_ = 0;  // Bytes, a multiple of item_size; 0 of a region without items.
  int64_t begin_;
  int64_t end_;
  uint8_t* target_ = nullptr;  // Of the first item.
};

}  // namespace distckpt

#endif  // DISTCKPT_COPY_H_
