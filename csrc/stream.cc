#include "stream.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "crc32c.h"

namespace distckpt {
namespace {

// Copied and summed at a time: small enough that the sum finds the copy in the cache.
constexpr size_t kStep = size_t{128} << 10;

}  // namespace

ChecksummedSource::ChecksummedSource(const std::vector<Part>& parts, size_t block_size, uint8_t* sums)
    : block_size_(block_size), sums_(sums) {
  parts_.reserve(parts.size());
  ends_.reserve(parts.size());
  for (const Part& part : parts) {
    if (part.size == 0) continue;
    parts_end_ += part.size;
    if (!parts_.empty() && parts_.back().data + parts_.back().size == part.data) {
      parts_.back().size += part.size;
      ends_.back() = parts_end_;
    } else {
      parts_.push_back(part);
      ends_.push_back(parts_end_);
    }
  }
}

uint64_t ChecksummedSource::size() const {
  return parts_end_ + BlockCount(parts_end_, block_size_) * sizeof(uint32_t);
}

void ChecksummedSource::Fill(uint64_t begin, uint64_t end, uint8_t* out) {
  if (begin < parts_end_) FillParts(begin, std::min(end, parts_end_), out);
  if (end <= parts_end_) return;
  // All parts have been summed by now.
  const uint64_t from = std::max(begin, parts_end_);
  std::memcpy(out + (from - begin), sums_ + (from - parts_end_), end - from);
}

size_t ChecksummedSource::PartAt(uint64_t offset) const {
  return std::upper_bound(ends_.begin(), ends_.end(), offset) - ends_.begin();
}

uint64_t ChecksummedSource::PartBegin(size_t part) const { return ends_[part] - parts_[part].size; }

void ChecksummedSource::FillParts(uint64_t begin, uint64_t end, uint8_t* out) {
  size_t part = PartAt(begin);
  for (uint64_t at = begin; at < end;) {
    // Up to the end of the step, the block or the range; from as many parts as that takes.
    const uint64_t stop = std::min({end, at - at % block_size_ + block_size_, at + kStep});
    for (uint64_t filled = at; filled < stop;) {
      while (ends_[part] <= filled) ++part;
      const uint64_t size = std::min(stop, ends_[part]) - filled;
      std::memcpy(out + (filled - begin), parts_[part].data + (filled - PartBegin(part)), size);
      filled += size;
    }
    Sum(at, out + (at - begin), stop - at);
    at = stop;
  }
}

const uint8_t* ChecksummedSource::Find(uint64_t begin, uint64_t end, size_t alignment) {
  const size_t part = PartAt(begin);
  if (part == parts_.size() || end > ends_[part]) return nullptr;
  const uint8_t* const data = parts_[part].data + (begin - PartBegin(part));
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) return nullptr;
  for (uint64_t at = begin; at < end;) {
    const uint64_t stop = std::min(end, at - at % block_size_ + block_size_);
    Sum(at, data + (at - begin), stop - at);
    at = stop;
  }
  return data;
}

void ChecksummedSource::Sum(uint64_t begin, const uint8_t* data, size_t size) {
  uint8_t* const place = sums_ + begin / block_size_ * sizeof(uint32_t);
  uint32_t sum = 0;
  if (begin % block_size_ != 0) std::memcpy(&sum, place, sizeof(sum));
  sum = Crc32c(sum, data, size);
  std::memcpy(place, &sum, sizeof(sum));
}

Targets::Targets(std::vector<RegionCopy> targets) : targets_(std::move(targets)) {
  int64_t reach = 0;
  reach_.reserve(targets_.size());
  for (const RegionCopy& target : targets_) reach_.push_back(reach = std::max(reach, target.end()));
  const auto before = [](const RegionCopy& a, const RegionCopy& b) { return a.begin() < b.begin(); };
  if (!std::is_sorted(targets_.begin(), targets_.end(), before)) {
    throw std::invalid_argument("targets must be in ascending order of chunk_start");
  }
}

int64_t Targets::CopyFrom(uint64_t begin, uint64_t end, const uint8_t* data) const {
  // From the first target of which, or of whose predecessors, one reaches past `begin`.
  const auto start = static_cast<int64_t>(begin);
  const auto stop = static_cast<int64_t>(end);
  int64_t copied = 0;
  size_t i = std::upper_bound(reach_.begin(), reach_.end(), start) - reach_.begin();
  for (; i < targets_.size() && targets_[i].begin() < stop; ++i) {
    if (targets_[i].end() > start) copied += targets_[i].CopyFrom(data, start, stop - start);
  }
  return copied;
}

VerifyingSink::VerifyingSink(std::vector<RegionCopy> targets, size_t block_size, uint64_t end,
                             const uint8_t* expected)
    : targets_(std::move(targets)), block_size_(block_size), end_(end), expected_(expected) {}

bool VerifyingSink::Take(uint64_t begin, uint64_t end, const uint8_t* data) {
  end = std::min(end, end_);
  if (end != end_) end -= end % block_size_;  // The file may end inside a block.
  for (uint64_t at = begin; at < end; at += block_size_, data += block_size_) {
    const uint64_t stop = std::min(end, at + block_size_);
    if (!Check(at / block_size_, data, stop - at)) return false;
    targets_.CopyFrom(at, stop, data);  // The sum has brought the block into the cache.
  }
  return true;
}

bool VerifyingSink::Check(uint64_t block, const uint8_t* data, size_t size) {
  uint32_t expected;
  std::memcpy(&expected, expected_ + block * sizeof(expected), sizeof(expected));
  const uint32_t sum = Crc32c(0, data, size);
  if (sum == expected) return true;
  failed_ = true;
  bad_block_ = block;
  found_ = sum;
  return false;
}

}  // namespace distckpt
