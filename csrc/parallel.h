// A loop over independent items on a few short-lived threads. No pool: nothing to keep across a fork.

#ifndef DISTCKPT_PARALLEL_H_
#define DISTCKPT_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace distckpt {

constexpr size_t kMaxThreads = 256;

// Calls body(0) ... body(count - 1), each once, on the calling thread and up to `threads` - 1 others, and
// returns when all have returned. `body` must not throw. Where the system refuses a thread, fewer do the
// work.
template <typename Body>
void ParallelFor(size_t count, size_t threads, const Body& body) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  };
  std::vector<std::thread> others;
  const size_t wanted = std::min({count, threads, kMaxThreads});
  others.reserve(wanted);
  try {
    while (others.size() + 1 < wanted) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The threads there are do it all.
  }
  work();
  for (std::thread& thread : others) thread.join();
}

}  // namespace distckpt

#endif  // DISTCKPT_PARALLEL_H_
