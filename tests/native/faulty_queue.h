// A queue that does what kernels may do and seldom do: stop short, interrupt, put off, refuse, fail.

#ifndef DISTCKPT_TESTS_NATIVE_FAULTY_QUEUE_H_
#define DISTCKPT_TESTS_NATIVE_FAULTY_QUEUE_H_

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "transfer_queue.h"

struct Faults {
  bool short_transfers = false;  // Claim fewer bytes than were transferred.
  int64_t missing_bytes = 0;     // Of every transfer of more than 8 KiB.
  bool interrupted = false;      // Now and then EINTR or EAGAIN.
  bool refuse_direct = false;    // EINVAL for whatever is submitted with O_DIRECT on.
  int fail_after = -1;           // From this completion on, `error`.
  int error = EIO;
  bool no_progress = false;  // Nothing is ever transferred, without an error.
};

class FaultyQueue : public distckpt::TransferQueue {
 public:
  FaultyQueue(std::unique_ptr<distckpt::TransferQueue> queue, size_t depth, const Faults& faults,
              std::atomic<int>* in_flight)
      : queue_(std::move(queue)), direct_(depth), faults_(faults), in_flight_(in_flight) {}

  void Submit(size_t slot, const distckpt::Transfer& transfer) override {
    queue_->Submit(slot, transfer);
    direct_[slot] = (::fcntl(transfer.fd, F_GETFL) & O_DIRECT) != 0;
    ++*in_flight_;
  }

  distckpt::Completion Wait() noexcept override {
    distckpt::Completion completion = queue_->Wait();
    --*in_flight_;
    const int number = completed_++;
    int64_t& result = completion.result;
    if (faults_.fail_after >= 0 && number >= faults_.fail_after) {
      result = -faults_.error;
    } else if (faults_.refuse_direct && direct_[completion.slot]) {
      result = -EINVAL;
    } else if (faults_.interrupted && random_() % 3 == 0) {
      result = random_() % 2 == 0 ? -EINTR : -EAGAIN;
    } else if (faults_.no_progress) {
      result = std::min<int64_t>(result, 0);
    } else if (faults_.missing_bytes > 0 && result > 8192) {
      result -= faults_.missing_bytes;
    } else if (faults_.short_transfers && result > 1 && random_() % 4 != 0) {
      result = 1 + static_cast<int64_t>(random_() % static_cast<uint64_t>(result));
    }
    return completion;
  }

 private:
  std::unique_ptr<distckpt::TransferQueue> queue_;
  std::vector<bool> direct_;
  const Faults faults_;
  std::atomic<int>* const in_flight_;
  int completed_ = 0;
  std::mt19937_64 random_{17};
};

#endif  // DISTCKPT_TESTS_NATIVE_FAULTY_QUEUE_H_
