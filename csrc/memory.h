// Large anonymous memory for staging and direct I/O.

#ifndef DISTCKPT_MEMORY_H_
#define DISTCKPT_MEMORY_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace distckpt {

// Zeroed memory, 2 MiB aligned, on huge pages where the kernel gives them: a direct request over 4 KiB pages
// is cut at the segment limit of the device's queue. A child process does not have it (a forking data loader
// would double it, and copy-on-write would slow the parent): touching it there is a fault.
class Memory {
 public:
  // Throws std::system_error; size 0 is legal.
  explicit Memory(size_t size);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Whether the kernel took the request for huge pages.
  bool huge_pages() const { return huge_pages_; }

  // Touches every page now, contents unchanged. Throws std::system_error where the kernel has no memory left.
  void Populate(size_t threads);

 private:
  size_t size_;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  bool huge_pages_ = false;
  pid_t owner_;
};

}  // namespace distckpt

#endif  // DISTCKPT_MEMORY_H_
