"""Which process this is, for others on the same machine to see whether it still runs.

A node that is killed and started again need not wait until its former self is taken for dead. Across machines and containers
only the heartbeat tells.
"""

from __future__ import annotations

import os
from pathlib import Path


def this_place() -> str:
    """Names this process: kernel, namespace of process ids, process id, start. Empty where the system does not say."""
    try:
        return f"{_machine()} {os.getpid()} {_begun(os.getpid())[1]}"
    except OSError:
        return ""


def runs(place: str) -> bool | None:
    """Whether the process of this place runs; None when it cannot be known from here."""
    machine, _, process = place.partition(" ")
    try:
        if machine != _machine():
            return None
        pid, begun = (int(part) for part in process.split())
    except (OSError, ValueError):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's, but there
    try:
        state, since = _begun(pid)
    except OSError:
        return None
    return since == begun and state not in "ZX"


def _machine() -> str:
    """The namespace of process ids on a kernel that has been running since one boot. Raises OSError."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _begun(pid: int) -> tuple[str, int]:
    """A process's state, and when it began, in ticks since the boot. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
