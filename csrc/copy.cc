#include "copy.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "checked.h"

namespace distckpt {
namespace {

struct Dimension {
  int64_t count;
  int64_t source_stride;
  int64_t target_stride;
  int64_t
      extent;  // Bytes of the file from the first byte of this and the inner dimensions to past their last.
};

// The region with dimensions merged: outer dimensions around runs of bytes that are contiguous on both sides.
struct Plan {
  std::vector<Dimension> dimensions;  // Outermost first; every count > 1.
  int64_t run = 0;                    // Bytes, a multiple of item_size.
  int64_t item_size = 0;
};

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

Plan MakePlan(const CopyRegion& region) {
  Plan plan;
  plan.item_size = plan.run = region.item_size;
  int64_t extent = region.item_size;
  for (size_t d = region.shape.size(); d-- > 0;) {
    const int64_t count = region.shape[d];
    const int64_t source_stride = region.source_strides[d];
    const int64_t target_stride = region.target_strides[d];
    if (count == 1) continue;
    if (source_stride < extent) throw std::invalid_argument("source_strides must grow in C order");
    extent = CheckedAdd(extent, CheckedMultiply(count - 1, source_stride));
    if (plan.dimensions.empty() && source_stride == plan.run && target_stride == plan.run) {
      plan.run = CheckedMultiply(plan.run, count);
      continue;
    }
    if (!plan.dimensions.empty()) {
      Dimension& inner = plan.dimensions.back();
      if (IsProduct(source_stride, inner.count, inner.source_stride) &&
          IsProduct(target_stride, inner.count, inner.target_stride)) {
        inner.count = CheckedMultiply(inner.count, count);
        inner.extent = extent;
        continue;
      }
    }
    plan.dimensions.push_back({count, source_stride, target_stride, extent});
  }
  CheckedAdd(region.chunk_start, extent);
  std::reverse(plan.dimensions.begin(), plan.dimensions.end());
  return plan;
}

template <size_t kSize>
void CopyItems(const Dimension& d, const uint8_t* source, uint8_t* target) {
  for (int64_t i = 0; i < d.count; ++i) {
    std::memcpy(target + i * d.target_stride, source + i * d.source_stride, kSize);
  }
}

void CopyRuns(const Dimension& d, int64_t run, const uint8_t* source, uint8_t* target) {
  switch (run) {
    case 1:
      return CopyItems<1>(d, source, target);
    case 2:
      return CopyItems<2>(d, source, target);
    case 4:
      return CopyItems<4>(d, source, target);
    case 8:
      return CopyItems<8>(d, source, target);
    case 16:
      return CopyItems<16>(d, source, target);
    default:
      for (int64_t i = 0; i < d.count; ++i) {
        std::memcpy(target + i * d.target_stride, source + i * d.source_stride, static_cast<size_t>(run));
      }
  }
}

class Copier {
 public:
  Copier(const Plan& plan, const uint8_t* source, int64_t begin, int64_t end, uint8_t* target)
      : plan_(plan), source_(source), begin_(begin), end_(end), target_(target) {}

  // Copies what lies in the window of the dimensions from d on, whose first item is at file offset `from` and
  // target offset `to`.
  int64_t Copy(size_t d, int64_t from, int64_t to) const {
    if (d == plan_.dimensions.size()) return CopyRun(from, to);
    const Dimension& dimension = plan_.dimensions[d];
    if (from >= begin_ && from + dimension.extent <= end_) {
      CopyWhole(d, source_ + (from - begin_), target_ + to);
      return WholeBytes(d);
    }
    const int64_t inner = d + 1 < plan_.dimensions.size() ? plan_.dimensions[d + 1].extent : plan_.run;
    // From the first index whose bytes end after the window's begin, to the last that begins before its end.
    const int64_t before = begin_ - from - inner;
    const int64_t first = before < 0 ? 0 : before / dimension.source_stride + 1;
    const int64_t room = end_ - from;
    const int64_t last = room <= 0 ? 0 : std::min(dimension.count, (room - 1) / dimension.source_stride + 1);
    int64_t copied = 0;
    for (int64_t i = first; i < last; ++i) {
      copied += Copy(d + 1, from + i * dimension.source_stride, to + i * dimension.target_stride);
    }
    return copied;
  }

 private:
  int64_t WholeBytes(size_t d) const {
    int64_t bytes = plan_.run;
    for (; d < plan_.dimensions.size(); ++d) bytes *= plan_.dimensions[d].count;
    return bytes;
  }

  void CopyWhole(size_t d, const uint8_t* source, uint8_t* target) const {
    const Dimension& dimension = plan_.dimensions[d];
    if (d + 1 == plan_.dimensions.size()) return CopyRuns(dimension, plan_.run, source, target);
    for (int64_t i = 0; i < dimension.count; ++i) {
      CopyWhole(d + 1, source + i * dimension.source_stride, target + i * dimension.target_stride);
    }
  }

  // The whole items of one run that lie in the window.
  int64_t CopyRun(int64_t from, int64_t to) const {
    const int64_t item = plan_.item_size;
    const int64_t skipped = from >= begin_ ? 0 : (begin_ - from + item - 1) / item * item;
    const int64_t stop = std::min(plan_.run, end_ <= from ? 0 : (end_ - from) / item * item);
    if (skipped >= stop) return 0;
    std::memcpy(target_ + to + skipped, source_ + (from + skipped - begin_),
                static_cast<size_t>(stop - skipped));
    return stop - skipped;
  }

  const Plan& plan_;
  const uint8_t* const source_;
  const int64_t begin_;
  const int64_t end_;
  uint8_t* const target_;
};

}  // namespace

int64_t RegionEnd(const CopyRegion& region, int64_t target_size) {
  CheckArguments(region);
  if (std::find(region.shape.begin(), region.shape.end(), 0) != region.shape.end()) return region.chunk_start;
  CheckTarget(region, target_size);
  const Plan plan = MakePlan(region);
  const int64_t extent = plan.dimensions.empty() ? plan.run : plan.dimensions.front().extent;
  return CheckedAdd(region.chunk_start, extent);
}

int64_t CopyChunk(const CopyRegion& region, const uint8_t* source, int64_t source_start, int64_t source_size,
                  uint8_t* target, int64_t target_size) {
  CheckArguments(region);
  if (source_start < 0) throw std::invalid_argument("source_start must not be negative");
  const int64_t source_end = CheckedAdd(source_start, source_size);
  if (std::find(region.shape.begin(), region.shape.end(), 0) != region.shape.end()) return 0;
  CheckTarget(region, target_size);
  const Plan plan = MakePlan(region);
  return Copier(plan, source, source_start, source_end, target)
      .Copy(0, region.chunk_start, region.target_start);
}

}  // namespace distckpt
