// Transfers by pread and pwrite on threads, which are started when there is work for them.

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "transfer_queue.h"

namespace distckpt {
namespace {

// Blocks signals in the threads that are started during its life: handlers belong on the program's own.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    blocked_ = ::pthread_sigmask(SIG_SETMASK, &all, &previous_) == 0;
  }
  ~SignalsBlocked() {
    if (blocked_) ::pthread_sigmask(SIG_SETMASK, &previous_, nullptr);
  }

 private:
  sigset_t previous_;
  bool blocked_;
};

class Workers {
 public:
  explicit Workers(size_t depth) : depth_(depth) {
    threads_.reserve(depth);
    completions_.reserve(depth);
  }

  ~Workers() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    has_job_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Submit(size_t slot, const Transfer& transfer) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (idle_ <= jobs_.size() && threads_.size() < depth_) StartThread();
      jobs_.push_back({slot, transfer});
    }
    has_job_.notify_one();
  }

  Completion Wait() noexcept {
    std::unique_lock<std::mutex> lock(mutex_);
    has_completion_.wait(lock, [&] { return !completions_.empty(); });
    const Completion completion = completions_.back();
    completions_.pop_back();
    return completion;
  }

 private:
  struct Job {
    size_t slot;
    Transfer transfer;
  };

  void StartThread() {
    const SignalsBlocked blocked;
    try {
      threads_.emplace_back([this] { Work(); });
    } catch (const std::system_error&) {
      if (threads_.empty()) throw;  // Otherwise those there are do it all.
    }
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      ++idle_;
      has_job_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      --idle_;
      if (jobs_.empty()) return;
      const Job job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      const int64_t result = Execute(job.transfer);
      lock.lock();
      completions_.push_back({job.slot, result});  // Within the reserved depth: never allocates.
      has_completion_.notify_one();
    }
  }

  static int64_t Execute(const Transfer& t) {
    const auto offset = static_cast<off_t>(t.offset);
    const ssize_t result =
        t.write ? ::pwrite(t.fd, t.memory, t.size, offset) : ::pread(t.fd, t.memory, t.size, offset);
    return result == -1 ? -errno : result;
  }

  const size_t depth_;
  std::mutex mutex_;
  std::condition_variable has_job_;
  std::condition_variable has_completion_;
  std::deque<Job> jobs_;
  std::vector<Completion> completions_;
  std::vector<std::thread> threads_;
  size_t idle_ = 0;
  bool stopping_ = false;
};

class ThreadQueue : public TransferQueue {
 public:
  explicit ThreadQueue(size_t depth) : workers_(std::make_unique<Workers>(depth)), owner_(::getpid()) {}

  ~ThreadQueue() override {
    // The threads did not come along into a forked child: joining them there would wait for ever.
    if (::getpid() != owner_) static_cast<void>(workers_.release());
  }

  void Submit(size_t slot, const Transfer& transfer) override { workers_->Submit(slot, transfer); }
  Completion Wait() noexcept override { return workers_->Wait(); }

 private:
  std::unique_ptr<Workers> workers_;
  const pid_t owner_;
};

}  // namespace

std::unique_ptr<TransferQueue> MakeThreadQueue(size_t depth) { return std::make_unique<ThreadQueue>(depth); }

}  // namespace distckpt
