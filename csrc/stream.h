// What flows through a checked transfer: where the bytes that are written come from, where those that are
// read go. Both are told of whole requests, and never see a file.

#ifndef DISTCKPT_STREAM_H_
#define DISTCKPT_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy.h"
#include "gather.h"

namespace distckpt {

// Where the bytes of a write come from. Called by one thread at a time; ranges are in file offsets.
class Source {
 public:
  virtual ~Source() = default;

  // Brings bytes [begin, end) into `out`.
  virtual void Fill(uint64_t begin, uint64_t end, uint8_t* out) = 0;

  // The memory that already holds [begin, end), at a multiple of `alignment`, to be written as it is; nullptr
  // if there is none, and Fill is called instead.
  virtual const uint8_t* Find(uint64_t begin, uint64_t end, size_t alignment) = 0;
};

// Where the bytes of a read go. Called by one thread at a time.
class Sink {
 public:
  virtual ~Sink() = default;

  // Takes bytes [begin, end) of the file. Requests may come in any order. Returns false to stop the read.
  virtual bool Take(uint64_t begin, uint64_t end, const uint8_t* data) = 0;
};

// Memory whose bytes follow each other in a file from offset 0 on, and after them the checksum of each block
// of them. To be filled or found in file order, every byte once.
class ChecksummedSource : public Source {
 public:
  // `sums` has room for one checksum a block, aligned or not. A range inside one part is found where it is.
  ChecksummedSource(const std::vector<Part>& parts, size_t block_size, uint8_t* sums);

  // Of the file: parts and checksums.
  uint64_t size() const;

  void Fill(uint64_t begin, uint64_t end, uint8_t* out) override;
  const uint8_t* Find(uint64_t begin, uint64_t end, size_t alignment) override;

 private:
  // The part that holds the byte at `offset` of the file, or the number of parts.
  size_t PartAt(uint64_t offset) const;
  uint64_t PartBegin(size_t part) const;
  void FillParts(uint64_t begin, uint64_t end, uint8_t* out);
  void Sum(uint64_t begin, const uint8_t* data, size_t size);

  std::vector<Part> parts_;  // Without the empty ones; those that follow each other in memory too are one.
  const size_t block_size_;
  uint8_t* const sums_;
  std::vector<uint64_t> ends_;  // File offset after each part.
  uint64_t parts_end_ = 0;
};

// Regions of a file that are wanted in memory. Never changes; any thread may use it.
class Targets {
 public:
  // In ascending order of begin(), else std::invalid_argument.
  explicit Targets(std::vector<RegionCopy> targets);

  // Copies what bytes [begin, end) of the file, which lie at `data`, hold of every target; returns how much
  // that is.
  int64_t CopyFrom(uint64_t begin, uint64_t end, const uint8_t* data) const;

 private:
  const std::vector<RegionCopy> targets_;
  std::vector<int64_t> reach_;  // The largest end of targets_[0 .. i].
};

// Checks blocks against a table and copies what they hold of the targets.
class VerifyingSink : public Sink {
 public:
  // Targets as above. `expected` has the checksum of every block of the file up to `end`, aligned or not.
  // Every request begins at a block, and ends at one's end, at `end` or where the file does: then its last
  // block is neither checked nor copied.
  VerifyingSink(std::vector<RegionCopy> targets, size_t block_size, uint64_t end, const uint8_t* expected);

  bool Take(uint64_t begin, uint64_t end, const uint8_t* data) override;

  // Whether a checksum was wrong; then of which block, and what it was.
  bool failed() const { return failed_; }
  uint64_t bad_block() const { return bad_block_; }
  uint32_t found() const { return found_; }

 private:
  bool Check(uint64_t block, const uint8_t* data, size_t size);

  const Targets targets_;
  const size_t block_size_;
  const uint64_t end_;
  const uint8_t* const expected_;
  bool failed_ = false;
  uint64_t bad_block_ = 0;
  uint32_t found_ = 0;
};

}  // namespace distckpt

#endif  // DISTCKPT_STREAM_H_
