#include "gather.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>

#include "bulk_copy.h"
#include "parallel.h"

namespace distckpt {
namespace {

constexpr size_t kShare =
    size_t{1} << 20;  // Bytes that a thread takes at a time, from as many parts as that is.

void CheckPlaces(const std::vector<Part>& parts, const std::vector<int64_t>& offsets, const uint8_t* target,
                 size_t target_size) {
  if (offsets.size() != parts.size()) {
    throw std::invalid_argument(std::to_string(parts.size()) + " parts with " +
                                std::to_string(offsets.size()) + " offsets");
  }
  const std::less<const uint8_t*> before;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto [data, size] = parts[i];
    if (offsets[i] < 0 || static_cast<uint64_t>(offsets[i]) > target_size ||
        size > target_size - static_cast<uint64_t>(offsets[i])) {
      throw std::invalid_argument("part " + std::to_string(i) + ", " + std::to_string(size) +
                                  " bytes at offset " + std::to_string(offsets[i]) +
                                  ", reaches outside the target of " + std::to_string(target_size));
    }
    if (size > 0 && before(data, target + target_size) && before(target, data + size)) {
      throw std::invalid_argument("part " + std::to_string(i) + " overlaps the target");
    }
  }
}

void CheckDisjoint(const std::vector<Part>& parts, const std::vector<int64_t>& offsets) {
  std::vector<size_t> order(parts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto is_empty = [&](size_t i) { return parts[i].size == 0; };
  order.erase(std::remove_if(order.begin(), order.end(), is_empty), order.end());
  const auto before = [&](size_t a, size_t b) { return offsets[a] < offsets[b]; };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  const auto overlap = [&](size_t a, size_t b) {
    return static_cast<uint64_t>(offsets[b] - offsets[a]) < parts[a].size;
  };
  const auto found = std::adjacent_find(order.begin(), order.end(), overlap);
  if (found == order.end()) return;
  throw std::invalid_argument("parts " + std::to_string(*found) + " and " + std::to_string(*(found + 1)) +
                              " overlap in the target");
}

}  // namespace

void Gather(const std::vector<Part>& parts, const std::vector<int64_t>& offsets, uint8_t* target,
            size_t target_size, size_t threads) {
  CheckPlaces(parts, offsets, target, target_size);
  CheckDisjoint(parts, offsets);
  std::vector<size_t> ends;  // Of each part, in the bytes of all parts.
  ends.reserve(parts.size());
  size_t total = 0;
  for (const Part& part : parts)
    ends.push_back(total += part.size);  // At most target_size: they are disjoint.
  ParallelFor((total + kShare - 1) / kShare, threads, [&](size_t share) {
    size_t at = share * kShare;
    const size_t stop = std::min(total, at + kShare);
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin(); at < stop; ++i) {
      const size_t skipped = at - (ends[i] - parts[i].size);
      const size_t size = std::min(stop, ends[i]) - at;
      if (size == 0) continue;
      BulkCopy(target + offsets[i] + skipped, parts[i].data + skipped, size);
      at += size;
    }
  });
}

}  // namespace distckpt
