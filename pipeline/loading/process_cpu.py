"""CPU seconds of another process, as Linux counts them. Knows nothing of what the process does."""

from __future__ import annotations

import os
from pathlib import Path


def process_cpu_s(pid: int) -> float:
    """User and system seconds so far, also of a process that ended and was not waited for; 0.0 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user_ticks, system_ticks = stat.rpartition(")")[2].split()[11:13]  # the name before may hold spaces
    return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")
