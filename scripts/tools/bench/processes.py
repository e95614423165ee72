"""What a process has used so far, from ``/proc``: CPU time and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Usage(msgspec.Struct, frozen=True):
    """CPU seconds since the process began (10 ms steps, all threads) and resident bytes."""

    cpu: float
    rss: int


def usage(pid: int) -> Usage:
    """Raises OSError when there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage((int(fields[11]) + int(fields[12])) / _TICK, resident * _PAGE)


def usages(pids: Mapping[str, int]) -> dict[str, Usage]:
    """Of several processes, by name; one that is gone is left out."""
    found = {}
    for name, pid in pids.items():
        try:
            found[name] = usage(pid)
        except OSError:
            continue
    return found
