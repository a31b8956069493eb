// Memory that the processes of one host share, with words to agree by.

#ifndef DISTCKPT_SHARED_MEMORY_H_
#define DISTCKPT_SHARED_MEMORY_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace distckpt {

// The content of a file in a memory file system, mapped. Its first bytes are also words of 32 bits, which any
// thread of any process may load and store; the rest is the users' to order by them. A child process does not
// have the mapping: touching it there is a fault.
class SharedMemory {
 public:
  // Opens the file, or makes it for its owner alone, and gives it `size` bytes, which are sparse until they
  // are reserved. Everybody opens it with the same size. Throws FileError; ENODEV if it does not lie in
  // memory.
  SharedMemory(const std::string& path, size_t size);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // Takes memory for the bytes, zero where they are new. Throws FileError: ENOSPC where there is none.
  // Touching bytes that nobody has reserved kills the process when memory is short.
  void Reserve(size_t begin, size_t size);

  // Maps all pages of bytes that are reserved at once, where the kernel can: faults one by one take longer.
  void Populate(size_t begin, size_t size);

  // Whoever loads a value sees all that was written before it was stored. std::invalid_argument for a word
  // outside.
  uint32_t Load(size_t word) const;
  void Store(size_t word, uint32_t value);
  // Stores `desired` if the word is `expected`; returns what it was.
  uint32_t Exchange(size_t word, uint32_t expected, uint32_t desired);

 private:
  void CheckRange(size_t begin, size_t size) const;
  uint32_t* Word(size_t word) const;

  const std::string path_;
  const size_t size_;
  const pid_t owner_;
  int fd_ = -1;
  uint8_t* data_ = nullptr;
};

}  // namespace distckpt

#endif  // DISTCKPT_SHARED_MEMORY_H_
