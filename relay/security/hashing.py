"""Argon2id in a process of its own: what runs there. It imports little, so that the process stays small."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
from pathlib import Path
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from argon2.low_level import Type

# OWASP's Password Storage Cheat Sheet, Argon2id: 19 MiB, 2 passes, 1 lane.
HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1, type=Type.ID)
# The last of the steps that the scheduler knows: a storm of log-ins gets what messages leave over.
NICENESS: Final = 19
_PR_SET_PDEATHSIG: Final = 1

# A hash with the parameters of all others, of a password that nobody knows.
dummy: str | None = None


def start(relay: int) -> None:
    """Prepares the process: it steps back behind everything else, ends with the process ``relay`` however that ends, and leaves
    Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != relay:
        # It died before this one could ask to be told, and nobody else ends it.
        os._exit(0)
    _step_back()
    known_dummy()


def _step_back() -> None:
    os.nice(NICENESS)
    # Linux weighs sessions against each other first (sched(7), autogroup): a nice process in the relay's own session would
    # step back behind the relay, but not behind its database.
    with contextlib.suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def known_dummy() -> str:
    """The dummy hash of this process."""
    global dummy
    if dummy is None:
        dummy = HASHER.hash(secrets.token_urlsafe(32))
    return dummy


def make(password: str) -> str:
    """The hash to store, with its salt and parameters."""
    return HASHER.hash(password)


def matches(hashed: str | None, password: str) -> bool:
    """Whether this is the password; without a hash no, after the same work."""
    try:
        HASHER.verify(known_dummy() if hashed is None else hashed, password)
    except (Argon2Error, InvalidHashError):
        return False
    return hashed is not None
