// Makes chosen system calls of a process fail, by standing between it and the C library (LD_PRELOAD).
// tests/crash/io_faults.py compiles it, and sets at run time what is to fail, with io_faults_set().
//
// A call that fails is not made, unless `after`: then it has its effect, and only its reply is lost. close()
// is always made, as Linux makes it whatever it returns. Where fsync() or close() fails, the content of the
// file is gone too: pages that could not be written may be dropped, and a later fsync() then reports success.
// Not seen are io_uring, mmap and the C library's own stdio.

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "preload.h"

namespace {

struct Fault {
  std::string kind;
  std::string text;  // That the path, or one of the two, contains; "$" stands at the end of each path.
  int first = 0;     // Number of the first call to fail, from 1.
  int count = 0;     // Of calls to fail.
  int code = 0;      // 0: not at all, but half of the bytes are written.
  bool after = false;
};

class Faults {
 public:
  static Faults& Get() {
    static Faults* faults = new Faults;
    return *faults;
  }

  void Set(const Fault& fault) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fault_ = fault;
    seen_ = failed_ = 0;
    active_.store(true, std::memory_order_release);
  }

  void Stop() { active_.store(false, std::memory_order_release); }

  bool active() const { return active_.load(std::memory_order_acquire); }

  // Counts a call. Returns whether it is to fail, and then how.
  bool Strikes(const char* kind, const std::string& path, Fault* how) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fault_.kind != kind || (path + "$").find(fault_.text) == std::string::npos) return false;
    ++seen_;
    if (seen_ < fault_.first || seen_ - fault_.first >= fault_.count) return false;
    ++failed_;
    *how = fault_;
    return true;
  }

  int seen() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return seen_;
  }

  int failed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failed_;
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> active_{false};
  Fault fault_;
  int seen_ = 0;
  int failed_ = 0;
};

int Fail(int code) {
  errno = code;
  return -1;
}

template <typename Call>
int CallOnPath(const char* kind, const std::string& path, Call call) {
  Fault fault;
  if (!Faults::Get().active() || !Faults::Get().Strikes(kind, path, &fault)) return call();
  if (fault.after && call() == -1) return -1;
  return Fail(fault.code);
}

template <typename Call>
int CallOnFd(const char* kind, int fd, Call call) {
  return Faults::Get().active() ? CallOnPath(kind, PathOf(fd), call) : call();
}

// Of a file that is open for writing; nothing else has any that could get lost.
void LoseContent(int fd) {
  struct stat status;
  if (REAL(fstat)(fd, &status) != 0 || !S_ISREG(status.st_mode)) return;
  if (REAL(ftruncate)(fd, 0) == 0 && REAL(ftruncate)(fd, status.st_size) != 0) perror("ftruncate");
}

template <typename Call>
int Sync(int fd, Call call) {
  Fault fault;
  if (!Faults::Get().active() || !Faults::Get().Strikes("fsync", PathOf(fd), &fault)) return call();
  LoseContent(fd);
  return Fail(fault.code);
}

int Open(int directory, const char* path, int flags, mode_t mode) {
  Fault fault;
  if (!Faults::Get().active() || !Faults::Get().Strikes("open", Absolute(directory, path), &fault)) {
    return REAL(openat)(directory, path, flags, mode);
  }
  if (fault.after) {
    const int fd = REAL(openat)(directory, path, flags, mode);
    if (fd == -1) return -1;
    REAL(close)(fd);
  }
  return Fail(fault.code);
}

// write(parts, count) writes memory so described.
template <typename Write>
ssize_t WriteParts(int fd, const struct iovec* parts, int count, Write write) {
  Fault fault;
  if (!Faults::Get().active() || !Faults::Get().Strikes("write", PathOf(fd), &fault)) {
    return write(parts, count);
  }
  if (fault.code != 0) return Fail(fault.code);
  std::vector<struct iovec> half(parts, parts + count);
  size_t size = 0;
  for (const struct iovec& part : half) size += part.iov_len;
  size_t rest = std::max<size_t>(size / 2, std::min<size_t>(size, 1));
  for (struct iovec& part : half) {
    part.iov_len = std::min(part.iov_len, rest);
    rest -= part.iov_len;
  }
  return write(half.data(), count);
}

}  // namespace

extern "C" {

void io_faults_set(const char* kind, const char* text, int first, int count, int code, int after) {
  Faults::Get().Set({kind, text, first, count, code, after != 0});
}
void io_faults_stop() { Faults::Get().Stop(); }
// Calls that the fault is about, and those of them that failed, since it was set.
int io_faults_seen() { return Faults::Get().seen(); }
int io_faults_failed() { return Faults::Get().failed(); }

DEFINE_OPENS(Open)

ssize_t write(int fd, const void* data, size_t size) {
  const struct iovec whole = {const_cast<void*>(data), size};
  return WriteParts(fd, &whole, 1, [&](const struct iovec* parts, int) {
    return REAL(write)(fd, parts->iov_base, parts->iov_len);
  });
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  const struct iovec whole = {const_cast<void*>(data), size};
  return WriteParts(fd, &whole, 1, [&](const struct iovec* parts, int) {
    return REAL(pwrite)(fd, parts->iov_base, parts->iov_len, offset);
  });
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  return pwrite(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec* whole, int count) {
  return WriteParts(fd, whole, count,
                    [&](const struct iovec* parts, int n) { return REAL(writev)(fd, parts, n); });
}
ssize_t pwritev(int fd, const struct iovec* whole, int count, off_t offset) {
  return WriteParts(fd, whole, count,
                    [&](const struct iovec* parts, int n) { return REAL(pwritev)(fd, parts, n, offset); });
}
ssize_t pwritev64(int fd, const struct iovec* whole, int count, off64_t offset) {
  return pwritev(fd, whole, count, offset);
}

int ftruncate(int fd, off_t size) noexcept {
  return CallOnFd("truncate", fd, [&] { return REAL(ftruncate)(fd, size); });
}
int ftruncate64(int fd, off64_t size) noexcept { return ftruncate(fd, size); }
int fsync(int fd) {
  return Sync(fd, [&] { return REAL(fsync)(fd); });
}
int fdatasync(int fd) {
  return Sync(fd, [&] { return REAL(fdatasync)(fd); });
}
int fstat(int fd, struct stat* status) noexcept {
  return CallOnFd("fstat", fd, [&] { return REAL(fstat)(fd, status); });
}
int fstat64(int fd, struct stat64* status) noexcept {
  return CallOnFd("fstat", fd, [&] { return REAL(fstat64)(fd, status); });
}
int close(int fd) {
  Fault fault;
  const bool fails = Faults::Get().active() && Faults::Get().Strikes("close", PathOf(fd), &fault);
  if (fails) LoseContent(fd);
  const int result = REAL(close)(fd);
  return fails && result == 0 ? Fail(fault.code) : result;
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) noexcept {
  return CallOnPath("link", Absolute(to_directory, to),
                    [&] { return REAL(linkat)(from_directory, from, to_directory, to, flags); });
}
int link(const char* from, const char* to) noexcept { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat2(int from_directory, const char* from, int to_directory, const char* to,
              unsigned flags) noexcept {
  return CallOnPath("rename", Absolute(to_directory, to),
                    [&] { return REAL(renameat2)(from_directory, from, to_directory, to, flags); });
}
int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
  return renameat2(from_directory, from, to_directory, to, 0);
}
int rename(const char* from, const char* to) noexcept { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int directory, const char* path, int flags) noexcept {
  return CallOnPath("unlink", Absolute(directory, path),
                    [&] { return REAL(unlinkat)(directory, path, flags); });
}
int unlink(const char* path) noexcept { return unlinkat(AT_FDCWD, path, 0); }

}  // extern "C"
