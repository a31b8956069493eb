#include "memory.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

#include "parallel.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace distckpt {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPopulateStep = size_t{32} << 20;

// madvise(MADV_HUGEPAGE) succeeds even where huge pages are switched off.
bool HugePagesEnabled() {
  if (::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1) return false;
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return !std::getline(file, line) || line.find("[never]") == std::string::npos;
}

// Writes to each page without changing it, even while others write to it.
void TouchPages(uint8_t* data, size_t size) {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  for (size_t i = 0; i < size; i += page) {
    uint8_t zero = 0;
    __atomic_compare_exchange_n(data + i, &zero, 0, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
}

// Returns 0 or an errno.
int PopulateRange(uint8_t* data, size_t size) {
  while (::madvise(data, size, MADV_POPULATE_WRITE) == -1) {
    if (errno == EINTR) continue;
    if (errno != EINVAL && errno != ENOSYS) return errno;
    TouchPages(data, size);
    break;
  }
  return 0;
}

}  // namespace

Memory::Memory(size_t size) : size_(size), owner_(::getpid()) {
  if (size > SIZE_MAX - 2 * kHugePage) throw std::invalid_argument("the size overflows the address space");
  mapped_ = std::max(size_t{1}, (size + kHugePage - 1) / kHugePage) * kHugePage;
  void* raw =
      ::mmap(nullptr, mapped_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  const auto begin = reinterpret_cast<uintptr_t>(raw);
  const size_t before = (kHugePage - begin % kHugePage) % kHugePage;
  data_ = static_cast<uint8_t*>(raw) + before;
  // Giving back the slack at both ends cannot fail short of the limit of mappings, and then it costs nothing.
  if (before > 0) ::munmap(raw, before);
  if (before < kHugePage) ::munmap(data_ + mapped_, kHugePage - before);
  huge_pages_ = ::madvise(data_, mapped_, MADV_HUGEPAGE) == 0 && HugePagesEnabled();
  if (::madvise(data_, mapped_, MADV_DONTFORK) == -1) {
    const int error = errno;
    ::munmap(data_, mapped_);
    throw std::system_error(error, std::generic_category(), "madvise(MADV_DONTFORK)");
  }
}

Memory::~Memory() {
  // A forked child does not have the mapping, and may have another one at its address.
  if (::getpid() == owner_) ::munmap(data_, mapped_);
}

void Memory::Populate(size_t threads) {
  std::atomic<int> error{0};
  ParallelFor((size_ + kPopulateStep - 1) / kPopulateStep, threads, [&](size_t step) {
    const size_t begin = step * kPopulateStep;
    const int failed = PopulateRange(data_ + begin, std::min(kPopulateStep, size_ - begin));
    if (failed != 0) error.store(failed);
  });
  if (error != 0) throw std::system_error(error, std::generic_category(), "madvise(MADV_POPULATE_WRITE)");
}

}  // namespace distckpt
