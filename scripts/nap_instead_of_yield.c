// For LD_PRELOAD: sched_yield() that sleeps for 100 us.
//
// The parts of one vLLM spin for each other around sched_yield(). With more of them than cores this is slow at best; on
// a kernel whose yield forfeits the caller's turn (seen on 6.18), whatever else wants to run stands still for seconds.
#include <time.h>

int sched_yield(void) {
  const struct timespec nap = {0, 100000};
  nanosleep(&nap, 0);
  return 0;
}
