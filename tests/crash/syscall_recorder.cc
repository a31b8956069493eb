// Records what a process does to the files below one directory, in order, by standing between it and the C
// library (LD_PRELOAD). tests/crash/power_cut.py compiles it, and explains what the log is for.
//
// RECORD_ROOT is the directory and RECORD_LOG the file to append to. Each call is made and logged under one
// lock, which all threads and all processes with the same log share, so the log is the order in which things
// happened. Files are named by inode wherever a call names them by descriptor; thus dup(), close() and fork()
// need no care. Only successful calls are logged. Not seen are io_uring, mmap and the C library's own stdio;
// power_cut.py finds such gaps by comparing its replay of the log with the real files.
//
// A record: "kind inode offset size len1 len2 len3\n", then the three byte strings (path, second path, data).

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <string>

#include "preload.h"

namespace {

pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;

void LockLog(int log, short type) {
  struct flock lock = {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  while (fcntl(log, F_SETLKW, &lock) != 0 && errno == EINTR) {
  }
}

class Recorder {
 public:
  static Recorder& Get() {
    static Recorder* recorder = new Recorder;
    return *recorder;
  }

  bool Covers(const std::string& path) const {
    return log_ >= 0 && path.compare(0, root_.size(), root_) == 0 &&
           (path.size() == root_.size() || path[root_.size()] == '/');
  }

  void Lock() {
    pthread_mutex_lock(&g_mutex);
    LockLog(log_, F_WRLCK);
  }

  void Unlock() {
    const int saved = errno;
    LockLog(log_, F_UNLCK);
    pthread_mutex_unlock(&g_mutex);
    errno = saved;
  }

  void Log(const char* kind, ino_t inode, long long offset, long long size, const std::string& path,
           const std::string& path2, const std::string& data) {
    const int saved = errno;
    char header[160];
    snprintf(header, sizeof header, "%s %llu %lld %lld %zu %zu %zu\n", kind,
             static_cast<unsigned long long>(inode), offset, size, path.size(), path2.size(), data.size());
    const std::string record = std::string(header) + path + path2 + data;
    size_t done = 0;
    while (done < record.size()) {
      const ssize_t count = REAL(write)(log_, record.data() + done, record.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) abort();
      done += static_cast<size_t>(count);
    }
    errno = saved;
  }

 private:
  Recorder() {
    const char* root = getenv("RECORD_ROOT");
    const char* log = getenv("RECORD_LOG");
    if (root == nullptr || log == nullptr) return;
    root_ = root;
    using Open = int (*)(const char*, int, ...);
    log_ = reinterpret_cast<Open>(dlsym(RTLD_NEXT, "open"))(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC,
                                                            0666);
    if (log_ < 0) abort();
    // A child must not inherit a mutex that a thread of its parent holds.
    pthread_atfork([] { pthread_mutex_lock(&g_mutex); }, [] { pthread_mutex_unlock(&g_mutex); },
                   [] { pthread_mutex_unlock(&g_mutex); });
  }

  std::string root_;
  int log_ = -1;
};

class Locked {
 public:
  explicit Locked(Recorder& recorder) : recorder_(recorder) { recorder_.Lock(); }
  ~Locked() { recorder_.Unlock(); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  Recorder& recorder_;
};

ino_t InodeOf(int fd) {
  struct stat status;
  return fstat(fd, &status) == 0 ? status.st_ino : 0;
}

int OpenAndLog(int directory, const char* path, int flags, mode_t mode) {
  Recorder& recorder = Recorder::Get();
  const std::string name = Absolute(directory, path);
  if (!recorder.Covers(name) || (flags & (O_CREAT | O_TRUNC)) == 0) {
    return REAL(openat)(directory, path, flags, mode);
  }
  const Locked locked(recorder);
  const bool existed = faccessat(directory, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
  const int fd = REAL(openat)(directory, path, flags, mode);
  if (fd < 0) return fd;
  if (!existed) recorder.Log("create", InodeOf(fd), 0, 0, name, "", "");
  if (existed && (flags & O_TRUNC) != 0) recorder.Log("truncate", InodeOf(fd), 0, 0, name, "", "");
  return fd;
}

template <typename Call>
ssize_t WriteAndLog(int fd, long long offset, const struct iovec* parts, int count, Call call) {
  Recorder& recorder = Recorder::Get();
  const std::string name = PathOf(fd);
  if (!recorder.Covers(name)) return call();
  const Locked locked(recorder);
  struct stat status;
  if (offset < 0) {
    const bool appends = (fcntl(fd, F_GETFL) & O_APPEND) != 0 && fstat(fd, &status) == 0;
    offset = appends ? status.st_size : lseek(fd, 0, SEEK_CUR);
  }
  const ssize_t result = call();
  if (result > 0) {
    std::string data;
    for (int i = 0; i < count; ++i)
      data.append(static_cast<const char*>(parts[i].iov_base), parts[i].iov_len);
    data.resize(static_cast<size_t>(result));
    recorder.Log("write", InodeOf(fd), offset, result, name, "", data);
  }
  return result;
}

template <typename Call>
int CallAndLogFd(const char* kind, int fd, long long size, Call call) {
  Recorder& recorder = Recorder::Get();
  const std::string name = PathOf(fd);
  if (!recorder.Covers(name)) return call();
  const Locked locked(recorder);
  const int result = call();
  if (result == 0) recorder.Log(kind, InodeOf(fd), 0, size, name, "", "");
  return result;
}

template <typename Call>
int CallAndLogPath(const char* kind, const std::string& path, const std::string& path2, Call call) {
  Recorder& recorder = Recorder::Get();
  if (!recorder.Covers(path) && !recorder.Covers(path2)) return call();
  const Locked locked(recorder);
  const int result = call();
  if (result != 0) return result;
  struct stat status = {};
  const int saved = errno;
  lstat(path2.empty() ? path.c_str() : path2.c_str(), &status);
  errno = saved;
  recorder.Log(kind, status.st_ino, 0, 0, path, path2, "");
  return result;
}

}  // namespace

extern "C" {

// Called by the recorded program (see power_cut.mark): "what comes before this has returned".
void recorder_mark(const char* text) {
  Recorder& recorder = Recorder::Get();
  const Locked locked(recorder);
  recorder.Log("mark", 0, 0, 0, text, "", "");
}

DEFINE_OPENS(OpenAndLog)

int creat(const char* path, mode_t mode) {
  return OpenAndLog(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
int creat64(const char* path, mode_t mode) { return creat(path, mode); }

ssize_t write(int fd, const void* data, size_t size) {
  const struct iovec part = {const_cast<void*>(data), size};
  return WriteAndLog(fd, -1, &part, 1, [&] { return REAL(write)(fd, data, size); });
}
ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  const struct iovec part = {const_cast<void*>(data), size};
  return WriteAndLog(fd, offset, &part, 1, [&] { return REAL(pwrite)(fd, data, size, offset); });
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  return pwrite(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
  return WriteAndLog(fd, -1, parts, count, [&] { return REAL(writev)(fd, parts, count); });
}
ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t offset) {
  return WriteAndLog(fd, offset, parts, count, [&] { return REAL(pwritev)(fd, parts, count, offset); });
}
ssize_t pwritev64(int fd, const struct iovec* parts, int count, off64_t offset) {
  return pwritev(fd, parts, count, offset);
}

int ftruncate(int fd, off_t size) noexcept {
  return CallAndLogFd("truncate", fd, size, [&] { return REAL(ftruncate)(fd, size); });
}
int ftruncate64(int fd, off64_t size) noexcept { return ftruncate(fd, size); }
int fsync(int fd) {
  return CallAndLogFd("fsync", fd, 0, [&] { return REAL(fsync)(fd); });
}
int fdatasync(int fd) {
  return CallAndLogFd("fsync", fd, 0, [&] { return REAL(fdatasync)(fd); });
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) noexcept {
  return CallAndLogPath("link", Absolute(from_directory, from), Absolute(to_directory, to),
                        [&] { return REAL(linkat)(from_directory, from, to_directory, to, flags); });
}
int link(const char* from, const char* to) noexcept { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat2(int from_directory, const char* from, int to_directory, const char* to,
              unsigned flags) noexcept {
  const char* kind = flags == 0 || flags == RENAME_NOREPLACE ? "rename" : "unsupported";
  return CallAndLogPath(kind, Absolute(from_directory, from), Absolute(to_directory, to),
                        [&] { return REAL(renameat2)(from_directory, from, to_directory, to, flags); });
}
int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
  return renameat2(from_directory, from, to_directory, to, 0);
}
int rename(const char* from, const char* to) noexcept { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int directory, const char* path, int flags) noexcept {
  return CallAndLogPath("unlink", Absolute(directory, path), "",
                        [&] { return REAL(unlinkat)(directory, path, flags); });
}
int unlink(const char* path) noexcept { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) noexcept { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char* path, mode_t mode) noexcept {
  return CallAndLogPath("mkdir", Absolute(directory, path), "",
                        [&] { return REAL(mkdirat)(directory, path, mode); });
}
int mkdir(const char* path, mode_t mode) noexcept { return mkdirat(AT_FDCWD, path, mode); }

}  // extern "C"
