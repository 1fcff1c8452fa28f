"""CPU seconds of another process, as Linux counts them. Knows nothing of what the process does."""

from __future__ import annotations

import time

_ALL_ITS_THREADS = 2  # CPUCLOCK_SCHED of include/linux/posix-timers.h, where a process's clock is `~pid << 3 | kind`


def process_cpu_s(pid: int) -> float:
    """User and system seconds so far, to the microsecond and of threads that ended too; 0.0 where there is no process.

    Also of a process that ended and was not waited for.
    """
    try:
        return time.clock_gettime(~pid << 3 | _ALL_ITS_THREADS)
    except OSError:
        return 0.0
