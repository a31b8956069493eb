#include "copy.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bulk_copy.h"
#include "checked.h"

namespace distckpt {
namespace {

void CheckArguments(const CopyRegion& region) {
  if (region.source_strides.size() != region.shape.size() ||
      region.target_strides.size() != region.shape.size()) {
    throw std::invalid_argument("shape, source_strides and target_strides must be of one length");
  }
  if (region.item_size < 1) throw std::invalid_argument("item_size must be at least 1");
  if (region.chunk_start < 0) throw std::invalid_argument("chunk_start must not be negative");
  for (const int64_t count : region.shape) {
    if (count < 0) throw std::invalid_argument("shape must not be negative");
  }
}

void CheckTarget(const CopyRegion& region, int64_t target_size) {
  int64_t begin = region.target_start;
  int64_t end = CheckedAdd(region.target_start, region.item_size);
  for (size_t d = 0; d < region.shape.size(); ++d) {
    const int64_t reach = CheckedMultiply(region.shape[d] - 1, region.target_strides[d]);
    int64_t& side = reach < 0 ? begin : end;
    side = CheckedAdd(side, reach);
  }
  if (begin < 0 || end > target_size) {
    throw std::invalid_argument("the region reaches outside the target: bytes " + std::to_string(begin) +
                                " to " + std::to_string(end) + " of " + std::to_string(target_size));
  }
}

bool IsProduct(int64_t value, int64_t a, int64_t b) {
  int64_t product;
  return !__builtin_mul_overflow(a, b, &product) && product == value;
}

template <size_t kSize>
void CopyItems(int64_t count, const uint8_t* source, int64_t source_stride, uint8_t* target,
               int64_t target_stride) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * target_stride, source + i * source_stride, kSize);
  }
}

}  // namespace

RegionCopy::RegionCopy(const CopyRegion& region, uint8_t* target, int64_t target_size)
    : item_size_(region.item_size), begin_(region.chunk_start), end_(region.chunk_start) {
  CheckArguments(region);
  if (std::find(region.shape.begin(), region.shape.end(), 0) != region.shape.end()) return;
  CheckTarget(region, target_size);
  end_ = CheckedAdd(begin_, Plan(region));
  target_ = target + region.target_start;
}

// Returns the bytes of the file from the first to past the last.
int64_t RegionCopy::Plan(const CopyRegion& region) {
  run_ = item_size_;
  int64_t extent = item_size_;
  for (size_t d = region.shape.size(); d-- > 0;) {
    const int64_t count = region.shape[d];
    const int64_t source_stride = region.source_strides[d];
    const int64_t target_stride = region.target_strides[d];
    if (count == 1) continue;
    if (source_stride < extent) throw std::invalid_argument("source_strides must grow in C order");
    extent = CheckedAdd(extent, CheckedMultiply(count - 1, source_stride));
    if (dimensions_.empty() && source_stride == run_ && target_stride == run_) {
      run_ = CheckedMultiply(run_, count);
      continue;
    }
    if (!dimensions_.empty()) {
      Dimension& inner = dimensions_.back();
      if (IsProduct(source_stride, inner.count, inner.source_stride) &&
          IsProduct(target_stride, inner.count, inner.target_stride)) {
        inner.count = CheckedMultiply(inner.count, count);
        inner.extent = extent;
        continue;
      }
    }
    dimensions_.push_back({count, source_stride, target_stride, extent});
  }
  std::reverse(dimensions_.begin(), dimensions_.end());
  return extent;
}

int64_t RegionCopy::CopyFrom(const uint8_t* source, int64_t source_start, int64_t source_size) const {
  if (source_start < 0) throw std::invalid_argument("source_start must not be negative");
  const int64_t source_end = CheckedAdd(source_start, source_size);
  if (run_ == 0) return 0;
  return Copy({source, source_start, source_end}, 0, begin_, target_);
}

// Copies what lies in the window of the dimensions from d on, whose first item is at file offset `from` and
// goes to `target`.
int64_t RegionCopy::Copy(const Window& window, size_t d, int64_t from, uint8_t* target) const {
  if (d == dimensions_.size()) return CopyRun(window, from, target);
  const Dimension& dimension = dimensions_[d];
  if (from >= window.begin && from + dimension.extent <= window.end) {
    CopyWhole(d, window.source + (from - window.begin), target);
    int64_t bytes = run_;
    for (size_t i = d; i < dimensions_.size(); ++i) bytes *= dimensions_[i].count;
    return bytes;
  }
  const int64_t inner = d + 1 < dimensions_.size() ? dimensions_[d + 1].extent : run_;
  // From the first index whose bytes end after the window's begin, to the last that begins before its end.
  const int64_t before = window.begin - from - inner;
  const int64_t first = before < 0 ? 0 : before / dimension.source_stride + 1;
  const int64_t room = window.end - from;
  const int64_t last = room <= 0 ? 0 : std::min(dimension.count, (room - 1) / dimension.source_stride + 1);
  int64_t copied = 0;
  for (int64_t i = first; i < last; ++i) {
    copied += Copy(window, d + 1, from + i * dimension.source_stride, target + i * dimension.target_stride);
  }
  return copied;
}

// Copies the whole items of one run that lie in the window.
int64_t RegionCopy::CopyRun(const Window& window, int64_t from, uint8_t* target) const {
  const int64_t item = item_size_;
  const int64_t skipped = from >= window.begin ? 0 : (window.begin - from + item - 1) / item * item;
  const int64_t stop = std::min(run_, window.end <= from ? 0 : (window.end - from) / item * item);
  if (skipped >= stop) return 0;
  BulkCopy(target + skipped, window.source + (from + skipped - window.begin),
           static_cast<size_t>(stop - skipped));
  return stop - skipped;
}

void RegionCopy::CopyWhole(size_t d, const uint8_t* source, uint8_t* target) const {
  const Dimension& dimension = dimensions_[d];
  if (d + 1 == dimensions_.size()) return CopyRuns(dimension, source, target);
  for (int64_t i = 0; i < dimension.count; ++i) {
    CopyWhole(d + 1, source + i * dimension.source_stride, target + i * dimension.target_stride);
  }
}

void RegionCopy::CopyRuns(const Dimension& d, const uint8_t* source, uint8_t* target) const {
  switch (run_) {
    case 1:
      return CopyItems<1>(d.count, source, d.source_stride, target, d.target_stride);
    case 2:
      return CopyItems<2>(d.count, source, d.source_stride, target, d.target_stride);
    case 4:
      return CopyItems<4>(d.count, source, d.source_stride, target, d.target_stride);
    case 8:
      return CopyItems<8>(d.count, source, d.source_stride, target, d.target_stride);
    case 16:
      return CopyItems<16>(d.count, source, d.source_stride, target, d.target_stride);
    default:
      for (int64_t i = 0; i < d.count; ++i) {
        BulkCopy(target + i * d.target_stride, source + i * d.source_stride, static_cast<size_t>(run_));
      }
  }
}

}  // namespace distckpt
