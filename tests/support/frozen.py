"""Processes that stand still: the kernel stops a process's threads one by one, on a busy machine some while after the signal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def freeze(pid: int, seconds: float = 5) -> None:
    """SIGSTOP; every thread of the process stands still when this returns. SIGCONT lets it go on."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while not _is_still(pid):
        assert time.monotonic() < deadline, f"process {pid} did not stop within {seconds:g} s"
        time.sleep(0.002)


def send_signal(pid: int, number: int) -> None:
    """Sends a signal; when it is SIGSTOP, as ``freeze``."""
    if number == signal.SIGSTOP:
        freeze(pid)
    else:
        os.kill(pid, number)


def _is_still(pid: int) -> bool:
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    # The state follows the name, which is in brackets and may hold any character.
    return all(stat.read_text().rpartition(") ")[2][:1] in "Tt" for stat in stats)
