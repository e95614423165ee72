"""Child processes that do not outlive this one, not even when it is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# The kernel's promise (PR_SET_PDEATHSIG, 1, with SIGKILL, 9) is asked for by the child itself and outlives execve. A function
# between fork and exec could do it in fewer words, but is not safe in a process that has threads.
_TIE: Final = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]} cannot be run here: {error.strerror or error}")
"""


def tied(command: Sequence[str]) -> list[str]:
    """This command (its first word is a path) as one that the kernel kills when this process ends.

    Start it from the main thread: the kernel watches the thread that made the child. What cannot be run says so in one
    line on standard error and exits with 1."""
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]
