#include "block_io.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <utility>

#include "checked.h"

namespace distckpt {
namespace {

constexpr uint64_t kAlignment = kDirectAlignment;
constexpr int64_t kMaxRequestSize = int64_t{1} << 30;  // Linux transfers at most 2 GiB less a page at once.
constexpr int64_t kMaxQueueDepth = 1024;
constexpr int kMaxRetries = 1000;  // Of a request that the kernel keeps putting off.

constexpr uint64_t AlignDown(uint64_t value) { return value / kAlignment * kAlignment; }

}  // namespace

// One Read or Write under way.
class BlockOperation {
 public:
  BlockOperation(BlockIO& io, File& file, bool write, Requests& requests)
      : io_(io), file_(file), use_(file), write_(write), requests_(requests), slots_(io.queue_depth_) {
    free_.reserve(slots_.size());
    for (size_t slot = slots_.size(); slot-- > 0;) free_.push_back(slot);
  }

  // Returns the file offset at which the file was found to end, or the maximum.
  uint64_t Run() {
    while (true) {
      while (WantsMore()) StartNext();
      if (free_.size() == slots_.size()) break;
      const Completion completion = io_.queue_->Wait();
      if (!Continue(completion)) free_.push_back(completion.slot);
    }
    if (error_) std::rethrow_exception(error_);
    return file_end_;
  }

 private:
  struct Slot {
    Piece piece;
    uint8_t* memory;
    uint64_t done;  // Bytes of the piece.
    bool direct;    // Whether the request in flight was made with O_DIRECT on.
    int retries;
  };

  bool WantsMore() const {
    return !error_ && !stopped_ && !free_.empty() && !requests_.done() && requests_.next() < file_end_;
  }

  void StartNext() {
    const size_t index = free_.back();
    Slot& slot = slots_[index];
    try {
      slot = {requests_.Next(), nullptr, 0, false, 0};
      const bool bounced = slot.piece.memory == nullptr;
      slot.memory = bounced ? Bounce(index) : slot.piece.memory;
      if (bounced && write_) requests_.Fill(slot.piece, slot.memory);
      Submit(index);
      free_.pop_back();
    } catch (...) {
      Fail(std::current_exception());
    }
  }

  void Submit(size_t index) {
    Slot& slot = slots_[index];
    slot.direct = file_.direct();
    const Piece& piece = slot.piece;
    io_.queue_->Submit(index,
                       {use_.fd(), write_, slot.memory + slot.done,
                        static_cast<size_t>(piece.end - piece.begin - slot.done), piece.begin + slot.done});
  }

  // Takes a result. Returns whether the slot is in flight again.
  bool Continue(const Completion& completion) {
    Slot& slot = slots_[completion.slot];
    try {
      if (error_ || stopped_ || Ended(slot, completion.result)) return false;
      Submit(completion.slot);
      return true;
    } catch (...) {
      Fail(std::current_exception());
      return false;
    }
  }

  // Whether the piece is complete; if not, the rest of it is to be submitted.
  bool Ended(Slot& slot, int64_t result) {
    if (result < 0) {
      Retry(slot, static_cast<int>(-result));
      return false;
    }
    if (result == 0 && write_) throw FileError(EIO, Describe(slot) + " made no progress", file_.path());
    const bool at_end = Advance(slot, static_cast<uint64_t>(result));
    if (at_end) file_end_ = std::min(file_end_, slot.piece.begin + slot.done);
    if (!at_end && slot.piece.begin + slot.done < slot.piece.end) return false;
    if (slot.piece.memory == nullptr && !write_) {
      stopped_ = stopped_ || !requests_.Empty(slot.piece, slot.piece.begin + slot.done, slot.memory);
    }
    return true;
  }

  // Returns if the request may be made again.
  void Retry(Slot& slot, int error) {
    if (error == EINTR) return;
    if (error == EAGAIN && ++slot.retries < kMaxRetries) {
      ::usleep(1000);
      return;
    }
    if (error != EINVAL || !slot.direct) throw FileError(error, Describe(slot), file_.path());
    // The file system took O_DIRECT but not this transfer. Another slot may have found out before.
    file_.DisableDirect(use_);
  }

  // Counts transferred bytes. Returns whether the file ends after them.
  bool Advance(Slot& slot, uint64_t transferred) {
    const uint64_t position = slot.piece.begin + slot.done + transferred;
    if (!slot.direct || position == slot.piece.end || transferred % kAlignment == 0) {
      slot.done += transferred;
      return transferred == 0;
    }
    // A direct transfer stopped inside a block, and cannot go on from there.
    if (!write_ && position >= static_cast<uint64_t>(file_.Size(use_))) {
      slot.done += transferred;
      return true;
    }
    if (transferred < kAlignment) {
      file_.DisableDirect(use_);
      slot.done += transferred;
    } else {
      slot.done += AlignDown(transferred);
    }
    return false;
  }

  uint8_t* Bounce(size_t index) {
    std::unique_ptr<Memory>& bounce = io_.bounces_[index];
    if (!bounce) bounce = std::make_unique<Memory>(io_.request_size_);
    return bounce->data();
  }

  std::string Describe(const Slot& slot) const {
    const uint64_t offset = slot.piece.begin + slot.done;
    return (write_ ? "write of " : "read of ") + std::to_string(slot.piece.end - offset) +
           " bytes at offset " + std::to_string(offset);
  }

  // The first error is the one that is told; the transfers in flight are waited for.
  void Fail(std::exception_ptr error) {
    if (!error_) error_ = std::move(error);
  }

  BlockIO& io_;
  File& file_;
  const File::Use use_;
  const bool write_;
  Requests& requests_;
  std::vector<Slot> slots_;
  std::vector<size_t> free_;
  std::exception_ptr error_;
  uint64_t file_end_ = std::numeric_limits<uint64_t>::max();
  bool stopped_ = false;  // By whom the bytes are read for.
};

namespace {

std::vector<std::string> FindBackends() {
  try {
    MakeUringQueue(1);
    return {"io_uring", "threads"};
  } catch (const std::system_error&) {
    return {"threads"};
  }
}

std::unique_ptr<TransferQueue> MakeQueue(const std::string& backend, size_t depth) {
  if (backend == "io_uring") return MakeUringQueue(depth);
  if (backend == "threads") return MakeThreadQueue(depth);
  throw std::invalid_argument("unknown backend '" + backend + "': expected 'io_uring' or 'threads'");
}

// Before the lock is taken: a thread of the parent may have held it when the process forked.
void CheckOwner(pid_t owner) {
  if (::getpid() != owner) throw std::runtime_error("a BlockIO cannot be used in a child of its process");
}

void CheckOpen(const std::unique_ptr<TransferQueue>& queue) {
  if (!queue) throw std::invalid_argument("the BlockIO is closed");
}

void CheckRange(int64_t offset, size_t size) {
  if (offset < 0) throw std::invalid_argument("offset must not be negative: " + std::to_string(offset));
  if (size > static_cast<size_t>(std::numeric_limits<int64_t>::max())) {
    throw std::invalid_argument("the size overflows 63 bits");
  }
  // With room for the padding of the last block.
  CheckedAdd(CheckedAdd(offset, static_cast<int64_t>(size)), static_cast<int64_t>(kAlignment));
}

void CheckWriteOffset(const File& file, int64_t offset) {
  if (!file.direct() || offset % static_cast<int64_t>(kAlignment) == 0) return;
  throw std::invalid_argument("the offset of a direct write must be a multiple of 4096: " +
                              std::to_string(offset));
}

}  // namespace

const std::vector<std::string>& BlockIO::Backends() {
  static const std::vector<std::string> backends = FindBackends();
  return backends;
}

BlockIO::BlockIO(const std::string& backend, int64_t request_size, int64_t queue_depth)
    : BlockIO(backend, nullptr, request_size, queue_depth) {
  if (!backend.empty()) {
    queue_ = MakeQueue(backend, queue_depth_);
    return;
  }
  backend_ = Backends().front();
  try {
    queue_ = MakeQueue(backend_, queue_depth_);
  } catch (const std::system_error&) {
    // A ring may be refused for its size: its memory counts as locked on older kernels.
    backend_ = Backends().back();
    queue_ = MakeQueue(backend_, queue_depth_);
  }
}

BlockIO::BlockIO(const std::string& name, std::unique_ptr<TransferQueue> queue, int64_t request_size,
                 int64_t queue_depth)
    : backend_(name),
      request_size_(static_cast<size_t>(request_size)),
      queue_depth_(static_cast<size_t>(queue_depth)),
      owner_(::getpid()),
      queue_(std::move(queue)) {
  if (request_size < 1 || request_size > kMaxRequestSize || request_size_ % kAlignment != 0) {
    throw std::invalid_argument("request_size must be a multiple of 4096, at most 1 GiB: " +
                                std::to_string(request_size));
  }
  if (queue_depth < 1 || queue_depth > kMaxQueueDepth) {
    throw std::invalid_argument("queue_depth must be 1 to 1024: " + std::to_string(queue_depth));
  }
  bounces_.resize(queue_depth_);
}

BlockIO::~BlockIO() = default;

void BlockIO::Write(File& file, int64_t offset, const void* data, size_t size) {
  // A write only reads the memory.
  auto* memory = static_cast<uint8_t*>(const_cast<void*>(data));
  CheckOwner(owner_);
  CheckRange(offset, size);
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckOpen(queue_);
  CheckWriteOffset(file, offset);
  MemoryRequests requests(static_cast<uint64_t>(offset), memory, size, request_size_, file.direct());
  BlockOperation(*this, file, true, requests).Run();
}

size_t BlockIO::Read(File& file, int64_t offset, void* data, size_t size) {
  CheckOwner(owner_);
  CheckRange(offset, size);
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckOpen(queue_);
  const auto begin = static_cast<uint64_t>(offset);
  MemoryRequests requests(begin, static_cast<uint8_t*>(data), size, request_size_, file.direct());
  const uint64_t end = std::min(BlockOperation(*this, file, false, requests).Run(), begin + size);
  return end <= begin ? 0 : static_cast<size_t>(end - begin);
}

void BlockIO::WriteFrom(Source& source, File& file, int64_t offset, size_t size, double bytes_per_s) {
  CheckOwner(owner_);
  CheckRange(offset, size);
  if (!(bytes_per_s >= 0)) {  // Nor is NaN.
    throw std::invalid_argument("bytes per second must not be negative: " + std::to_string(bytes_per_s));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckOpen(queue_);
  CheckWriteOffset(file, offset);
  const auto begin = static_cast<uint64_t>(offset);
  SourceRequests requests(begin, begin + size, source, request_size_, file.direct(), bytes_per_s);
  BlockOperation(*this, file, true, requests).Run();
}

uint64_t BlockIO::ReadInto(Sink& sink, File& file, std::vector<ByteRange> ranges) {
  CheckOwner(owner_);
  uint64_t previous_end = 0;
  for (const ByteRange& range : ranges) {
    if (range.begin < previous_end || range.end < range.begin) {
      throw std::invalid_argument("ranges must ascend and not overlap: " + std::to_string(range.begin) +
                                  " to " + std::to_string(range.end) + " comes after " +
                                  std::to_string(previous_end));
    }
    previous_end = range.end;
    CheckRange(static_cast<int64_t>(range.begin), static_cast<size_t>(range.end - range.begin));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckOpen(queue_);
  SinkRequests requests(std::move(ranges), sink, request_size_, file.direct());
  return BlockOperation(*this, file, false, requests).Run();
}

void BlockIO::Close() {
  if (::getpid() != owner_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.reset();
  bounces_.clear();
}

}  // namespace distckpt
