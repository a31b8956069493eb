#include "requests.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "bulk_copy.h"

namespace distckpt {
namespace {

constexpr size_t kSmall = size_t{64} << 10;  // Below this one bounced request beats several exact ones.

constexpr double kLongestPauseS = 1e6;  // So that no rate overflows the clock.

constexpr uint64_t AlignDown(uint64_t value) { return value / kDirectAlignment * kDirectAlignment; }
constexpr uint64_t AlignUp(uint64_t value) { return AlignDown(value + kDirectAlignment - 1); }
constexpr bool IsAligned(uint64_t value) { return value % kDirectAlignment == 0; }

// The end of the request that begins at `begin`, on a grid of the request size.
uint64_t GridEnd(uint64_t begin, uint64_t end, size_t request_size) {
  return std::min(end, begin - begin % request_size + request_size);
}

void PadBounce(const Piece& piece, uint8_t* bounce) {
  std::memset(bounce + (piece.user_end - piece.begin), 0, piece.end - piece.user_end);
}

}  // namespace

MemoryRequests::MemoryRequests(uint64_t offset, uint8_t* memory, size_t size, size_t request_size,
                               bool direct)
    : offset_(offset),
      next_(offset),
      end_(offset + size),
      memory_(memory),
      request_size_(request_size),
      direct_(direct) {
  const bool exact = IsAligned(offset) && IsAligned(size);
  in_place_ = IsAligned(reinterpret_cast<uintptr_t>(memory) - offset) && (exact || size >= kSmall);
}

Piece MemoryRequests::Next() {
  const Piece piece = Cut();
  next_ = piece.user_end;
  return piece;
}

Piece MemoryRequests::Cut() const {
  const uint64_t room = end_ - next_;
  if (!direct_ || (in_place_ && IsAligned(next_) && room >= kDirectAlignment)) {
    const uint64_t size = std::min<uint64_t>(request_size_, direct_ ? AlignDown(room) : room);
    return {next_, next_ + size, next_, next_ + size, memory_ + (next_ - offset_)};
  }
  const uint64_t begin = AlignDown(next_);
  const uint64_t end = std::min(begin + (in_place_ ? kDirectAlignment : request_size_), AlignUp(end_));
  return {begin, end, next_, std::min(end, end_), nullptr};
}

// A bounced write begins at user_begin, for the offset of a direct write is aligned.
void MemoryRequests::Fill(const Piece& piece, uint8_t* bounce) {
  std::memcpy(bounce, memory_ + (piece.user_begin - offset_), piece.user_end - piece.user_begin);
  PadBounce(piece, bounce);
}

bool MemoryRequests::Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) {
  end = std::min(end, piece.user_end);
  if (end > piece.user_begin) {
    BulkCopy(memory_ + (piece.user_begin - offset_), bounce + (piece.user_begin - piece.begin),
             end - piece.user_begin);
  }
  return true;
}

SourceRequests::SourceRequests(uint64_t begin, uint64_t end, Source& source, size_t request_size, bool direct,
                               double bytes_per_s)
    : next_(begin),
      end_(end),
      source_(source),
      request_size_(request_size),
      direct_(direct),
      bytes_per_s_(bytes_per_s) {}

Piece SourceRequests::Next() {
  const uint64_t begin = next_;
  next_ = GridEnd(begin, end_, request_size_);
  Throttle(next_ - begin);
  // The last bytes of a direct write need room for their padding.
  const bool padded = direct_ && !IsAligned(next_);
  const uint8_t* memory =
      padded ? nullptr : source_.Find(begin, next_, direct_ ? size_t{kDirectAlignment} : 1);
  // A write only reads the memory.
  return {begin, padded ? AlignUp(next_) : next_, begin, next_, const_cast<uint8_t*>(memory)};
}

void SourceRequests::Throttle(uint64_t bytes) {
  if (bytes_per_s_ <= 0) return;
  using Clock = std::chrono::steady_clock;
  not_before_ = std::max(not_before_, Clock::now());
  std::this_thread::sleep_until(not_before_);
  const std::chrono::duration<double> pause(
      std::min(static_cast<double>(bytes) / bytes_per_s_, kLongestPauseS));
  not_before_ += std::chrono::duration_cast<Clock::duration>(pause);
}

void SourceRequests::Fill(const Piece& piece, uint8_t* bounce) {
  source_.Fill(piece.user_begin, piece.user_end, bounce);
  PadBounce(piece, bounce);
}

bool SourceRequests::Empty(const Piece&, uint64_t, const uint8_t*) { return true; }

SinkRequests::SinkRequests(std::vector<ByteRange> ranges, Sink& sink, size_t request_size, bool direct)
    : ranges_(std::move(ranges)), sink_(sink), request_size_(request_size), direct_(direct) {
  SkipEmpty();
}

void SinkRequests::SkipEmpty() {
  while (!done() && ranges_[range_].begin >= ranges_[range_].end) ++range_;
}

Piece SinkRequests::Next() {
  ByteRange& range = ranges_[range_];
  const uint64_t begin = range.begin;
  const uint64_t end = range.begin = GridEnd(begin, range.end, request_size_);
  SkipEmpty();
  return {direct_ ? AlignDown(begin) : begin, direct_ ? AlignUp(end) : end, begin, end, nullptr};
}

void SinkRequests::Fill(const Piece&, uint8_t*) {}

bool SinkRequests::Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) {
  end = std::min(end, piece.user_end);
  return end <= piece.user_begin ||
         sink_.Take(piece.user_begin, end, bounce + (piece.user_begin - piece.begin));
}

}  // namespace distckpt
