"""What a process has used so far, from ``/proc``: CPU time and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")

MACHINE: Final = "machine"


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
    """Of several processes, by name; one that is gone is left out. ``MACHINE`` is everything that ran, the host's theft
    included."""
    busy = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, soft_irq, stolen = busy
    found = {MACHINE: Usage((user + nice + system + irq + soft_irq + stolen) / _TICK, 0)}
    for name, pid in pids.items():
        try:
            found[name] = usage(pid)
        except OSError:
            continue
    return found


def transferred(pid: int) -> tuple[int, int]:
    """Bytes that a process has read and written, sockets included where it reads and writes them as files, as uvloop does. Raises
    OSError."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def spent(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> dict[str, float]:
    """CPU seconds between two readings, by process; ``others`` is what else ran on the machine."""
    found = {name: after[name].cpu - before[name].cpu for name in sorted(after.keys() & before.keys())}
    whole = found.pop(MACHINE, 0.0)
    found["others"] = max(0.0, whole - sum(found.values()))
    return found
