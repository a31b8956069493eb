// What the native tests share.

#ifndef DISTCKPT_TESTS_NATIVE_TESTING_H_
#define DISTCKPT_TESTS_NATIVE_TESTING_H_

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "block_io.h"
#include "faulty_queue.h"
#include "file.h"
#include "memory.h"

using distckpt::BlockIO;
using distckpt::File;
using distckpt::Memory;
using Bytes = std::vector<uint8_t>;

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                               \
    }                                                                             \
  } while (false)

inline std::string directory;  // Where the tests' files are.

inline std::string FreshPath(const std::string& name) {
  const std::string path = directory + "/" + name;
  if (::unlink(path.c_str()) == -1) CHECK(errno == ENOENT);
  return path;
}

inline Bytes Random(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

inline void InThreads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

template <typename Error>
Error Caught(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  CHECK(!"an exception");
  std::abort();
}

inline std::unique_ptr<BlockIO> FaultyIO(const Faults& faults, std::atomic<int>* in_flight) {
  auto queue = std::make_unique<FaultyQueue>(distckpt::MakeThreadQueue(4), 4, faults, in_flight);
  return std::make_unique<BlockIO>("faulty", std::move(queue), 65536, 4);
}

// In checked_transfers_test.cc.
void TestCheckedTransfers();

#endif  // DISTCKPT_TESTS_NATIVE_TESTING_H_
