#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <stdexcept>

namespace distckpt {
namespace {

// Repeats a system call while a signal interrupts it.
template <typename Call>
auto Uninterrupted(const Call& call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

// close() must not be repeated: after EINTR Linux has closed the descriptor, and its number may be another's.
int CloseOnce(int fd) { return ::close(fd) == -1 && errno != EINTR ? errno : 0; }

}  // namespace

std::unique_ptr<File> File::OpenWith(const std::string& path, int flags, bool direct, mode_t mode) {
  const int fd = Uninterrupted([&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); });
  if (fd == -1) throw FileError(errno, "open", path);
  std::unique_ptr<File> file;
  try {
    file.reset(new File(fd, path));
  } catch (...) {
    CloseOnce(fd);
    throw;
  }
  if (direct) file->TryDirect();
  return file;
}

std::unique_ptr<File> File::Create(const std::string& path, bool direct, mode_t mode) {
  return OpenWith(path, O_CREAT | O_EXCL | O_RDWR, direct, mode);
}

std::unique_ptr<File> File::Reopen(const std::string& path, bool direct) {
  return OpenWith(path, O_RDWR, direct, 0);
}

std::unique_ptr<File> File::Open(const std::string& path, bool direct) {
  return OpenWith(path, O_RDONLY, direct, 0);
}

// Set after opening: a file system that refuses O_DIRECT in open() may have created the file all the same,
// and O_EXCL would then fail on it.
void File::TryDirect() {
  const int flags = ::fcntl(fd_, F_GETFL);
  if (flags == -1) throw FileError(errno, "fcntl", path_);
  if (::fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0) {
    direct_.store(true, std::memory_order_release);
  } else if (errno != EINVAL) {
    throw FileError(errno, "fcntl", path_);
  }
}

File::~File() {
  if (fd_ != -1) CloseOnce(fd_);
}

File::Use::Use(const File& file) : lock_(file.mutex_), fd_(file.fd_) {
  if (fd_ == -1) throw std::invalid_argument("the file is closed: " + file.path_);
}

void File::DisableDirect(const Use& use) {
  const int flags = ::fcntl(use.fd(), F_GETFL);
  if (flags == -1 || ::fcntl(use.fd(), F_SETFL, flags & ~O_DIRECT) == -1) {
    throw FileError(errno, "fcntl", path_);
  }
  direct_.store(false, std::memory_order_release);
}

int64_t File::Size(const Use& use) const {
  struct stat status;
  if (::fstat(use.fd(), &status) == -1) throw FileError(errno, "fstat", path_);
  return status.st_size;
}

void File::Truncate(int64_t size) {
  const Use use(*this);
  if (size < 0) throw std::invalid_argument("a file cannot have a negative size");
  if (Uninterrupted([&] { return ::ftruncate(use.fd(), size); }) == -1) {
    throw FileError(errno, "ftruncate", path_);
  }
}

void File::Sync() {
  const Use use(*this);
  if (Uninterrupted([&] { return ::fsync(use.fd()); }) == -1) throw FileError(errno, "fsync", path_);
}

bool File::IsNamed(const std::string& path) const {
  const Use use(*this);
  struct stat ours;
  if (::fstat(use.fd(), &ours) == -1) throw FileError(errno, "fstat", path_);
  struct stat theirs;
  if (Uninterrupted([&] { return ::stat(path.c_str(), &theirs); }) == -1) {
    if (errno == ENOENT || errno == ENOTDIR) return false;
    throw FileError(errno, "stat", path);
  }
  return ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

void File::SetAccess(int mode, int64_t group) {
  const Use use(*this);
  // Group first: a change of it takes bits away.
  if (group != -1 && ::fchown(use.fd(), static_cast<uid_t>(-1), static_cast<gid_t>(group)) == -1) {
    throw FileError(errno, "fchown", path_);
  }
  if (mode != -1 && ::fchmod(use.fd(), static_cast<mode_t>(mode)) == -1) {
    throw FileError(errno, "fchmod", path_);
  }
}

void File::Close() {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  if (fd_ == -1) return;
  const int error = CloseOnce(fd_);
  fd_ = -1;
  if (error != 0) throw FileError(error, "close", path_);
}

void SyncDirectory(const std::string& path) {
  const int fd = Uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd == -1) throw FileError(errno, "open", path);
  const int sync_error = Uninterrupted([&] { return ::fsync(fd); }) == -1 ? errno : 0;
  const int close_error = CloseOnce(fd);
  if (sync_error != 0) throw FileError(sync_error, "fsync of directory", path);
  if (close_error != 0) throw FileError(close_error, "close of directory", path);
}

}  // namespace distckpt
