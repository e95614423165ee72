"""Other wall clocks for processes under test, by libfaketime. Their steady clocks are true."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

_DEBIAN = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")


def faked(*, seconds: float = 0, file: Path | None = None) -> dict[str, str] | None:
    """The environment of a process whose wall clock is so many seconds ahead; or as many as ``file`` says, about a second after it
    was written. None where there is no libfaketime for this machine: the package's is built for x86-64 Linux."""
    library = _library()
    return None if library is None else _environment(library, seconds, file)


def set_ahead(file: Path, seconds: float) -> None:
    """Steps the wall clock of the processes that go by this file."""
    # Replaced in one piece: they must not read half of it.
    fresh = file.with_suffix(".new")
    fresh.write_text(f"{seconds:+.3f}\n")
    fresh.replace(file)


def _environment(library: Path, seconds: float, file: Path | None) -> dict[str, str]:
    common = {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    if file is None:
        return {**common, "FAKETIME": f"{seconds:+.3f}"}
    return {**common, "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_CACHE_DURATION": "1"}


@cache
def _library() -> Path | None:
    found = importlib.util.find_spec("libfaketime")
    names = [] if found is None or found.origin is None else [_vendored(Path(found.origin).parent)]
    return next((name for name in [*names, *_DEBIAN] if name.is_file() and _works(name)), None)


def _vendored(package: Path) -> Path:
    return package / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"


def _works(library: Path) -> bool:
    code = "import time; print(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME))"
    before = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env=_environment(library, 3600, None),
            capture_output=True,
            text=True,
            timeout=20,
        )
        wall, steady = (float(word) for word in answer.stdout.split())
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return 0 <= wall - 3600 - before[0] < 30 and 0 <= steady - before[1] < 30
