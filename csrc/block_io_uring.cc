// Transfers by io_uring, through the raw system calls (J. Axboe, "Efficient IO with io_uring", 2019).

#include <cerrno>
#include <system_error>

#include "transfer_queue.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(IORING_FEAT_RW_CUR_POS) && \
    defined(__NR_io_uring_setup)  // Headers of Linux 5.6, which have the probe.
#define DISTCKPT_HAVE_IO_URING
#endif
#endif
#endif

#ifdef DISTCKPT_HAVE_IO_URING

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace distckpt {
namespace {

constexpr int kMaxRefusals = 1000;  // Of a submission, a millisecond apart.

[[noreturn]] void ThrowErrno(const char* operation) {
  throw std::system_error(errno, std::generic_category(), operation);
}

// A mapping of the ring's memory. A forked child does not get it: two processes cannot share one ring.
class Mapping {
 public:
  Mapping(int fd, size_t size, uint64_t offset) : size_(size), owner_(::getpid()) {
    data_ = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                   static_cast<off_t>(offset));
    if (data_ == MAP_FAILED) ThrowErrno("mmap of io_uring");
    if (::madvise(data_, size_, MADV_DONTFORK) == -1) {
      ::munmap(data_, size_);
      ThrowErrno("madvise of io_uring");
    }
  }
  ~Mapping() {
    if (::getpid() == owner_) ::munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  template <typename T>
  T* At(uint64_t offset) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + offset);
  }

 private:
  void* data_;
  size_t size_;
  pid_t owner_;
};

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  const int fd_;
};

int Setup(size_t depth, io_uring_params* params) {
  std::memset(params, 0, sizeof(*params));
  const long fd = ::syscall(__NR_io_uring_setup, static_cast<unsigned>(depth), params);
  if (fd == -1) ThrowErrno("io_uring_setup");
  return static_cast<int>(fd);
}

size_t RingBytes(const io_uring_params& params) {
  const size_t submissions = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
  const size_t completions = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  return submissions > completions ? submissions : completions;
}

class UringQueue : public TransferQueue {
 public:
  explicit UringQueue(size_t depth)
      : ring_fd_(Setup(depth, &params_)),
        rings_(ring_fd_.get(), RingBytes(params_), IORING_OFF_SQ_RING),
        entries_(ring_fd_.get(), params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
    Probe();
    failed_.reserve(depth);
    tail_ = *rings_.At<uint32_t>(params_.sq_off.tail);
    auto* array = rings_.At<uint32_t>(params_.sq_off.array);
    for (uint32_t i = 0; i < params_.sq_entries; ++i) array[i] = i;
    CheckEnter();
  }

  void Submit(size_t slot, const Transfer& transfer) override {
    io_uring_sqe* entry = NextEntry();
    entry->opcode = transfer.write ? IORING_OP_WRITE : IORING_OP_READ;
    entry->fd = transfer.fd;
    entry->addr = reinterpret_cast<uint64_t>(transfer.memory);
    entry->len = static_cast<uint32_t>(transfer.size);
    entry->off = transfer.offset;
    Publish(slot);
  }

  Completion Wait() noexcept override {
    int refusals = 0;
    Completion completion;
    while (true) {
      // New transfers go to the kernel first, so that the device stays busy.
      if (unsubmitted_ > 0 && !Enter(HasCompletion() ? 0 : 1)) Refused(&refusals);
      if (Take(&completion)) return completion;
      if (unsubmitted_ == 0 && !Enter(1)) Refused(&refusals);
      if (Take(&completion)) return completion;
    }
  }

 private:
  // Throws unless the kernel has what is used here.
  void Probe() {
    if (!(params_.features & IORING_FEAT_SINGLE_MMAP)) {
      errno = ENOSYS;
      ThrowErrno("io_uring");
    }
    constexpr unsigned kOperations = 256;
    alignas(io_uring_probe)
        uint8_t storage[sizeof(io_uring_probe) + kOperations * sizeof(io_uring_probe_op)] = {};
    auto* probe = reinterpret_cast<io_uring_probe*>(storage);
    if (::syscall(__NR_io_uring_register, ring_fd_.get(), IORING_REGISTER_PROBE, probe, kOperations) == -1) {
      ThrowErrno("io_uring_register");
    }
    for (const int operation : {IORING_OP_READ, IORING_OP_WRITE}) {
      if (probe->last_op >= operation && (probe->ops[operation].flags & IO_URING_OP_SUPPORTED)) continue;
      errno = ENOSYS;
      ThrowErrno("io_uring");
    }
  }

  // Does nothing once, through the kernel: a system call filter may allow the set-up and refuse the use.
  void CheckEnter() {
    NextEntry()->opcode = IORING_OP_NOP;
    Publish(0);
    const int64_t result = Wait().result;
    if (result >= 0) return;
    errno = static_cast<int>(-result);
    ThrowErrno("io_uring_enter");
  }

  // A cleared entry. There is a free one: no more are in flight than the ring has.
  io_uring_sqe* NextEntry() {
    io_uring_sqe* entry = entries_.At<io_uring_sqe>(0) + (tail_ & (params_.sq_entries - 1));
    std::memset(entry, 0, sizeof(*entry));
    return entry;
  }

  void Publish(size_t slot) {
    entries_.At<io_uring_sqe>(0)[tail_ & (params_.sq_entries - 1)].user_data = slot;
    ++tail_;
    ++unsubmitted_;
    __atomic_store_n(rings_.At<uint32_t>(params_.sq_off.tail), tail_, __ATOMIC_RELEASE);
  }

  // Hands the new entries to the kernel and waits for some completions. Returns whether it could, or may at
  // once be tried again; errno tells why not.
  bool Enter(unsigned completions) noexcept {
    const long submitted = ::syscall(__NR_io_uring_enter, ring_fd_.get(), unsubmitted_, completions,
                                     IORING_ENTER_GETEVENTS, nullptr, 0);
    if (submitted == -1) return errno == EINTR;
    unsubmitted_ -= static_cast<unsigned>(submitted);
    return true;
  }

  // Waits a little and lets the caller try again. What the kernel will not take is taken back, as failed;
  // what it has taken is in its hands and must come back by itself.
  void Refused(int* refusals) noexcept {
    const int error = errno;
    if (unsubmitted_ > 0 && ((error != EAGAIN && error != EBUSY) || ++*refusals > kMaxRefusals)) {
      TakeBack(error);
    } else {
      ::usleep(1000);
    }
  }

  void TakeBack(int error) noexcept {
    for (; unsubmitted_ > 0; --unsubmitted_) {
      --tail_;
      const auto& entry = entries_.At<io_uring_sqe>(0)[tail_ & (params_.sq_entries - 1)];
      failed_.push_back({static_cast<size_t>(entry.user_data), -error});
    }
    __atomic_store_n(rings_.At<uint32_t>(params_.sq_off.tail), tail_, __ATOMIC_RELEASE);
  }

  bool HasCompletion() const noexcept {
    return *rings_.At<uint32_t>(params_.cq_off.head) !=
           __atomic_load_n(rings_.At<uint32_t>(params_.cq_off.tail), __ATOMIC_ACQUIRE);
  }

  bool Take(Completion* completion) noexcept {
    if (!failed_.empty()) {
      *completion = failed_.back();
      failed_.pop_back();
      return true;
    }
    if (!HasCompletion()) return false;
    auto* head = rings_.At<uint32_t>(params_.cq_off.head);
    const auto& entry = rings_.At<io_uring_cqe>(params_.cq_off.cqes)[*head & (params_.cq_entries - 1)];
    *completion = {static_cast<size_t>(entry.user_data), entry.res};
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return true;
  }

  io_uring_params params_;
  const Descriptor ring_fd_;
  const Mapping rings_;
  const Mapping entries_;
  uint32_t tail_ = 0;
  unsigned unsubmitted_ = 0;
  std::vector<Completion> failed_;
};

}  // namespace

std::unique_ptr<TransferQueue> MakeUringQueue(size_t depth) { return std::make_unique<UringQueue>(depth); }

}  // namespace distckpt

#else

std::unique_ptr<distckpt::TransferQueue> distckpt::MakeUringQueue(size_t) {
  throw std::system_error(ENOSYS, std::generic_category(), "io_uring, which this build is without");
}

#endif
