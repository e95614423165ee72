"""One of several workers: a process that is a whole node, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from config.settings import READY_VARIABLE
from relay.tied import tied

_KILL_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


def tell_ready() -> None:
    """A worker tells its supervisor that it listens; does nothing in a relay without one."""
    descriptor = os.environ.pop(READY_VARIABLE, "")
    if descriptor.isdecimal():
        # The supervisor may have ended this moment.
        with contextlib.suppress(OSError):
            os.write(int(descriptor), b"1")
            os.close(int(descriptor))


class Worker:
    """One process. ``ready`` becomes True when it listens, or False when it ended before; ``exit`` is its exit code."""

    def __init__(self, number: int, environment: Mapping[str, str]) -> None:
        """Starts it, in a session of its own: Ctrl-C on the terminal is for the supervisor. Raises OSError."""
        loop = asyncio.get_running_loop()
        self.number = number
        self.lived = 0.0
        self.ready: asyncio.Future[bool] = loop.create_future()
        self.exit: asyncio.Future[int] = loop.create_future()
        self._since = loop.time()
        self._hears, says = os.pipe()
        try:
            self._process = subprocess.Popen(
                tied([sys.executable, "-m", "relay"]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**environment, "RELAY_WORKER": str(number), READY_VARIABLE: str(says)},
                pass_fds=(says,),
                start_new_session=True,
            )
        except OSError:
            os.close(self._hears)
            raise
        finally:
            os.close(says)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        loop.add_reader(self._hears, self._heard)
        loop.add_reader(self._pidfd, self._ended)

    def signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if not self.exit.done():
            self._process.send_signal(number)

    def _heard(self) -> None:
        said = os.read(self._hears, 1)
        asyncio.get_running_loop().remove_reader(self._hears)
        os.close(self._hears)
        if not self.ready.done():
            self.ready.set_result(bool(said))

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.lived = asyncio.get_running_loop().time() - self._since
        self.exit.set_result(self._process.wait())


async def gone(workers: Iterable[Worker], seconds: float) -> None:
    """Waits for these to end, for so long."""
    exits = {worker.exit for worker in workers}
    if exits:
        await asyncio.wait(exits, timeout=seconds)


async def killed(workers: Iterable[Worker]) -> None:
    """Ends those that still run."""
    left = [worker for worker in workers if not worker.exit.done()]
    for worker in left:
        log.warning("a worker did not end in time and is killed", worker=worker.number, pid=worker.pid)
        worker.signal(signal.SIGKILL)
    await gone(left, _KILL_SECONDS)
