// Where helper threads may run. A virtual machine's idle processors can look busy to the kernel,
// which then wakes a helper on the caller's own processor, behind the caller, and leaves it there:
// calls after a pause of some milliseconds ran on one core, for dozens of calls.
#pragma once

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseworks {

// This thread's number for the system; 0 where that is not known.
inline int thread_number() {
#if defined(__linux__)
  return static_cast<int>(syscall(SYS_gettid));
#else
  return 0;
#endif
}

// The processor that the caller is on, or -1.
inline int processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Lets `thread` run wherever the calling thread may, except on processor `here`. False, and nothing
// changes, where there is no other one.
inline bool keep_off(int thread, int here) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;
  CPU_CLR(here, &allowed);
  return CPU_COUNT(&allowed) > 0 && sched_setaffinity(thread, sizeof allowed, &allowed) == 0;
#else
  static_cast<void>(thread);
  static_cast<void>(here);
  return false;
#endif
}

}  // namespace sparseworks
