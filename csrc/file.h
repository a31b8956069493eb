// One file descriptor with the path it was opened by.

#ifndef DISTCKPT_FILE_H_
#define DISTCKPT_FILE_H_

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <system_error>

namespace distckpt {

// A failed system call and the file that it was about.
class FileError : public std::system_error {
 public:
  FileError(int error, const std::string& operation, const std::string& path)
      : std::system_error(error, std::generic_category(), operation), path_(path) {}
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Owns one descriptor of a file. Any thread may call any method; Close() waits for those that are under way.
// Failures of the system throw FileError; a closed file throws std::invalid_argument.
class File {
 public:
  // A new file, read and write; EEXIST if there is one. Where the file system refuses O_DIRECT it is
  // buffered.
  static std::unique_ptr<File> Create(const std::string& path, bool direct, mode_t mode);
  // An existing file, read and write.
  static std::unique_ptr<File> Reopen(const std::string& path, bool direct);
  // An existing file, read only.
  static std::unique_ptr<File> Open(const std::string& path, bool direct);

  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  const std::string& path() const { return path_; }
  bool direct() const { return direct_.load(std::memory_order_acquire); }

  int64_t Size() const { return Size(Use(*this)); }
  void Truncate(int64_t size);
  void Sync();
  // Whether `path` leads to this very file: same device, same inode. False where it leads nowhere.
  bool IsNamed(const std::string& path) const;
  // Permission bits, whatever the umask left of those that it was created with, and group; -1 leaves either
  // as it is.
  void SetAccess(int mode, int64_t group);
  // A second call does nothing.
  void Close();

  // The open descriptor; it stays open as long as this object lives.
  class Use {
   public:
    explicit Use(const File& file);
    int fd() const { return fd_; }

   private:
    std::shared_lock<std::shared_mutex> lock_;
    int fd_;
  };

  // For whoever holds a Use, who must not take another: Size(), and going on without O_DIRECT, for good.
  int64_t Size(const Use& use) const;
  void DisableDirect(const Use& use);

 private:
  File(int fd, const std::string& path) : path_(path), fd_(fd) {}
  static std::unique_ptr<File> OpenWith(const std::string& path, int flags, bool direct, mode_t mode);
  void TryDirect();

  const std::string path_;
  mutable std::shared_mutex mutex_;  // Exclusive to change fd_, shared to use it.
  int fd_;
  std::atomic<bool> direct_{false};
};

// fsync of a directory: makes durable which names it holds.
void SyncDirectory(const std::string& path);

}  // namespace distckpt

#endif  // DISTCKPT_FILE_H_
