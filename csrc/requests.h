// How a read or write is cut into requests, and what happens to their bytes on the way.

#ifndef DISTCKPT_REQUESTS_H_
#define DISTCKPT_REQUESTS_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "stream.h"

namespace distckpt {

// Of file offsets, sizes and memory in direct transfers.
constexpr uint64_t kDirectAlignment = 4096;

// One request: bytes [begin, end) of the file. Bytes [user_begin, user_end) of them are the caller's. They
// lie at `memory`, or, if that is nullptr, pass through a bounce buffer.
struct Piece {
  uint64_t begin;
  uint64_t end;
  uint64_t user_begin;
  uint64_t user_end;
  uint8_t* memory;
};

// The requests of one operation, in file order. Used by one thread.
class Requests {
 public:
  virtual ~Requests() = default;

  virtual bool done() const = 0;
  // Where the next one begins; only if not done.
  virtual uint64_t next() const = 0;
  virtual Piece Next() = 0;

  // Brings the bytes of a piece to be written into its bounce buffer, zeros past user_end.
  virtual void Fill(const Piece& piece, uint8_t* bounce) = 0;
  // Takes what was read of a piece, up to file offset `end`, from its bounce buffer. Returns false to stop.
  virtual bool Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) = 0;
};

// [offset, offset + size) of a file, which the caller has at `memory`: bounced only where it must be.
class MemoryRequests : public Requests {
 public:
  MemoryRequests(uint64_t offset, uint8_t* memory, size_t size, size_t request_size, bool direct);

  bool done() const override { return next_ == end_; }
  uint64_t next() const override { return next_; }
  Piece Next() override;
  void Fill(const Piece& piece, uint8_t* bounce) override;
  bool Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) override;

 private:
  Piece Cut() const;

  const uint64_t offset_;
  uint64_t next_;
  const uint64_t end_;
  uint8_t* const memory_;
  const size_t request_size_;
  const bool direct_;
  bool in_place_;  // The caller's memory is aligned where the file is.
};

// [begin, end) of a file that a source fills. Requests begin at multiples of the request size.
class SourceRequests : public Requests {
 public:
  // At most bytes_per_s a second, unless that is 0.
  SourceRequests(uint64_t begin, uint64_t end, Source& source, size_t request_size, bool direct,
                 double bytes_per_s);

  bool done() const override { return next_ == end_; }
  uint64_t next() const override { return next_; }
  Piece Next() override;
  void Fill(const Piece& piece, uint8_t* bounce) override;
  bool Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) override;

 private:
  void Throttle(uint64_t bytes);

  uint64_t next_;
  const uint64_t end_;
  Source& source_;
  const size_t request_size_;
  const bool direct_;
  const double bytes_per_s_;
  std::chrono::steady_clock::time_point not_before_{};
};

struct ByteRange {
  uint64_t begin;
  uint64_t end;
};

// Ranges of a file that a sink takes. Requests begin at multiples of the request size, or where a range does.
class SinkRequests : public Requests {
 public:
  SinkRequests(std::vector<ByteRange> ranges, Sink& sink, size_t request_size, bool direct);

  bool done() const override { return range_ == ranges_.size(); }
  uint64_t next() const override { return ranges_[range_].begin; }
  Piece Next() override;
  void Fill(const Piece& piece, uint8_t* bounce) override;
  bool Empty(const Piece& piece, uint64_t end, const uint8_t* bounce) override;

 private:
  void SkipEmpty();

  std::vector<ByteRange> ranges_;
  size_t range_ = 0;
  Sink& sink_;
  const size_t request_size_;
  const bool direct_;
};

}  // namespace distckpt

#endif  // DISTCKPT_REQUESTS_H_
