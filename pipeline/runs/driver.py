"""Names the process that drives a run, and tells whether it may still be at work."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_driver() -> dict[str, Any]:
    """Describe this process, so that another one can tell whether it is still there."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def may_be_alive(driver: Mapping[str, Any] | None) -> bool:
    """Whether a process that `this_driver` described may still be there; of another machine's that is not known.

    A session of an earlier version names no driver: it may be.
    """
    if not driver or driver.get("host") != socket.gethostname() or not isinstance(driver.get("pid"), int):
        return True
    try:
        os.kill(driver["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(driver["pid"])
    return now is None or driver.get("started") in (None, now)  # another start: another process has the number by now


def _started(pid: int) -> str | None:
    """When a process of this machine began: the boot's id and clock ticks since then; None where that is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None
