// What the libraries share that stand between a program and the C library (LD_PRELOAD): the C library's own
// functions, the paths that calls are about, and definitions of open() and its variants.
#pragma once

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>

#include <string>

template <typename Function>
Function Next(Function, const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
// The C library's own definition of `function`, of the same type.
#define REAL(function) Next(&::function, #function)

inline std::string PathOf(int fd) {
  const int saved = errno;
  char target[PATH_MAX];
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t size = readlink(link.c_str(), target, sizeof target);
  errno = saved;
  return size < 0 ? std::string() : std::string(target, static_cast<size_t>(size));
}

inline std::string Absolute(int directory, const char* path) {
  if (path[0] == '/') return path;
  if (directory != AT_FDCWD) return PathOf(directory) + "/" + path;
  char cwd[PATH_MAX];
  return getcwd(cwd, sizeof cwd) == nullptr ? std::string() : std::string(cwd) + "/" + path;
}

inline mode_t ModeArgument(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

#define DEFINE_OPEN(function, implementation)           \
  int function(const char* path, int flags, ...) {      \
    va_list arguments;                                  \
    va_start(arguments, flags);                         \
    const mode_t mode = ModeArgument(flags, arguments); \
    va_end(arguments);                                  \
    return implementation(AT_FDCWD, path, flags, mode); \
  }
#define DEFINE_OPENAT(function, implementation)                   \
  int function(int directory, const char* path, int flags, ...) { \
    va_list arguments;                                            \
    va_start(arguments, flags);                                   \
    const mode_t mode = ModeArgument(flags, arguments);           \
    va_end(arguments);                                            \
    return implementation(directory, path, flags, mode);          \
  }
// open() in all its forms, as calls of `implementation(directory, path, flags, mode)`. Inside extern "C".
#define DEFINE_OPENS(implementation)    \
  DEFINE_OPEN(open, implementation)     \
  DEFINE_OPEN(open64, implementation)   \
  DEFINE_OPENAT(openat, implementation) \
  DEFINE_OPENAT(openat64, implementation)
