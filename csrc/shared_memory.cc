#include "shared_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <stdexcept>

#include "file.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace distckpt {
namespace {

// Returns 0 or an errno, with *data mapped.
int Map(int fd, size_t size, uint8_t** data) {
  struct statfs status;
  if (::fstatfs(fd, &status) == -1) return errno;
  // Elsewhere every page would be written to a disk.
  if (status.f_type != TMPFS_MAGIC) return ENODEV;
  while (::ftruncate(fd, static_cast<off_t>(size)) == -1) {
    if (errno != EINTR) return errno;
  }
  void* mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return errno;
  if (::madvise(mapped, size, MADV_DONTFORK) == -1) {
    const int error = errno;
    ::munmap(mapped, size);
    return error;
  }
  *data = static_cast<uint8_t*>(mapped);
  return 0;
}

}  // namespace

SharedMemory::SharedMemory(const std::string& path, size_t size)
    : path_(path), size_(size), owner_(::getpid()) {
  if (size == 0 || size > static_cast<size_t>(std::numeric_limits<off_t>::max())) {
    throw std::invalid_argument("the size must be 1 to 2^63 - 1: " + std::to_string(size));
  }
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd_ == -1) throw FileError(errno, "open", path);
  const int error = Map(fd_, size, &data_);
  if (error == 0) return;
  ::close(fd_);
  throw FileError(error, "map", path);
}

SharedMemory::~SharedMemory() {
  ::close(fd_);
  // A forked child does not have the mapping, and may have another one at its address.
  if (::getpid() == owner_) ::munmap(data_, size_);
}

void SharedMemory::Reserve(size_t begin, size_t size) {
  CheckRange(begin, size);
  if (size == 0) return;
  int error;
  do {
    error = ::posix_fallocate(fd_, static_cast<off_t>(begin), static_cast<off_t>(size));
  } while (error == EINTR);
  if (error != 0) throw FileError(error, "posix_fallocate", path_);
}

void SharedMemory::Populate(size_t begin, size_t size) {
  CheckRange(begin, size);
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t first = begin / page * page;
  // An older kernel refuses, and then each page is mapped when it is touched.
  ::madvise(data_ + first, begin + size - first, MADV_POPULATE_WRITE);
}

void SharedMemory::CheckRange(size_t begin, size_t size) const {
  if (begin > size_ || size > size_ - begin) throw std::invalid_argument("the bytes lie outside the memory");
}

uint32_t SharedMemory::Load(size_t word) const { return __atomic_load_n(Word(word), __ATOMIC_ACQUIRE); }

void SharedMemory::Store(size_t word, uint32_t value) {
  __atomic_store_n(Word(word), value, __ATOMIC_RELEASE);
}

uint32_t SharedMemory::Exchange(size_t word, uint32_t expected, uint32_t desired) {
  __atomic_compare_exchange_n(Word(word), &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

uint32_t* SharedMemory::Word(size_t word) const {
  if (word >= size_ / sizeof(uint32_t)) throw std::invalid_argument("there is no such word");
  return reinterpret_cast<uint32_t*>(data_) + word;
}

}  // namespace distckpt
