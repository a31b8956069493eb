// Reads and writes of files in large requests, many in flight, around the page cache where the file asks for
// it.

#ifndef DISTCKPT_BLOCK_IO_H_
#define DISTCKPT_BLOCK_IO_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "file.h"
#include "memory.h"
#include "requests.h"
#include "stream.h"
#include "transfer_queue.h"

namespace distckpt {

// Calls from several threads wait for each other. Whatever Write and Read throw, nothing is in flight any
// more when they do: the caller's memory is its own again. An object made before a fork is of no use in the
// child: every call but Close() throws std::runtime_error there.
class BlockIO {
 public:
  // Of file offsets, sizes and memory in direct transfers.
  static constexpr size_t kAlignment = kDirectAlignment;

  // What this machine can do, best first.
  static const std::vector<std::string>& Backends();

  // An empty `backend` is the best there is. Throws std::invalid_argument for an unknown backend or a size
  // out of range, std::system_error for a backend that the system refuses.
  BlockIO(const std::string& backend, int64_t request_size, int64_t queue_depth);
  // Over a queue of one's own, of at least queue_depth.
  BlockIO(const std::string& name, std::unique_ptr<TransferQueue> queue, int64_t request_size,
          int64_t queue_depth);
  ~BlockIO();
  BlockIO(const BlockIO&) = delete;
  BlockIO& operator=(const BlockIO&) = delete;

  const std::string& backend() const { return backend_; }
  size_t request_size() const { return request_size_; }

  // Writes all of data, or throws FileError. If the file is direct, offset must be a multiple of kAlignment
  // (else std::invalid_argument) and the last request is padded with zeros to the next one.
  void Write(File& file, int64_t offset, const void* data, size_t size);

  // Returns the bytes read: fewer than size only at the end of the file. What lies past them in `data` is
  // unspecified, as is all of it after an error.
  size_t Read(File& file, int64_t offset, void* data, size_t size);

  // Writes [offset, offset + size) of the file with what `source` gives, at most bytes_per_s a second unless
  // that is 0 (std::invalid_argument if it is negative or NaN); offset and padding as in Write. The source is
  // asked for every byte, in file order.
  void WriteFrom(Source& source, File& file, int64_t offset, size_t size, double bytes_per_s);

  // Hands the bytes of the ranges, which ascend and do not overlap (else std::invalid_argument), to `sink`,
  // in requests that begin at multiples of the request size or where a range does. Returns the offset at
  // which the file was found to end, or the largest number. Ends early when the sink wants no more.
  uint64_t ReadInto(Sink& sink, File& file, std::vector<ByteRange> ranges);

  // Gives back the queue and the bounce buffers. A second call does nothing.
  void Close();

 private:
  friend class BlockOperation;

  std::string backend_;
  const size_t request_size_;
  const size_t queue_depth_;
  const pid_t owner_;
  std::mutex mutex_;                              // Held for the whole of a call.
  std::unique_ptr<TransferQueue> queue_;          // nullptr when closed.
  std::vector<std::unique_ptr<Memory>> bounces_;  // One per slot, made when first needed.
};

}  // namespace distckpt

#endif  // DISTCKPT_BLOCK_IO_H_
