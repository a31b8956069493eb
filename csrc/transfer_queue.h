// The port between BlockIO and the ways to have several transfers in flight.

#ifndef DISTCKPT_TRANSFER_QUEUE_H_
#define DISTCKPT_TRANSFER_QUEUE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace distckpt {

// One read or write of a file at an offset, as in pread(2) and pwrite(2).
struct Transfer {
  int fd;
  bool write;
  uint8_t* memory;
  size_t size;
  uint64_t offset;
};

struct Completion {
  size_t slot;
  int64_t result;  // Bytes transferred, perhaps fewer than asked for, or a negative errno.
};

// Not thread-safe. Nothing may be in flight when it is destroyed. A child process that inherits one by fork
// may destroy it and nothing else.
class TransferQueue {
 public:
  virtual ~TransferQueue() = default;

  // Puts a transfer in flight under the number `slot`, which is less than the depth and in no other use.
  // If it throws, the transfer is not in flight.
  virtual void Submit(size_t slot, const Transfer& transfer) = 0;

  // Waits until one of the transfers in flight, of which there must be one, has ended.
  virtual Completion Wait() noexcept = 0;
};

// Both throw std::system_error where the system refuses what they need.
std::unique_ptr<TransferQueue> MakeUringQueue(size_t depth);
std::unique_ptr<TransferQueue> MakeThreadQueue(size_t depth);

}  // namespace distckpt

#endif  // DISTCKPT_TRANSFER_QUEUE_H_
