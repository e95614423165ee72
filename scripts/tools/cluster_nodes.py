"""Relay nodes on a cluster that was started by hand: processes with their logs in files, started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import aiohttp

ROOT: Final = Path(__file__).parents[2]
_READY_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_AGAIN_SECONDS: Final = 5.0


class NodeError(Exception):
    """A relay node did not start; one line for people."""


class RelayNode:
    """One relay process. It takes the settings of this process's environment, but for where its MongoDB and its Redis are."""

    def __init__(self, name: str, port: int, directory: Path, *, mongo: str, redis: str) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / f"{name}.log"
        own = {
            "RELAY_MONGO_URI": mongo,
            "RELAY_REDIS_URL": redis,
            "RELAY_PORT": str(port),
            "RELAY_WORKERS": "1",
        }
        self._environment = {**os.environ, "RELAY_HOST": "127.0.0.1", **own}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Starts it; it is ready when this returns. Raises NodeError."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "relay",
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for who started it, which ends it in its turn.
                start_new_session=True,
            )
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            for _ in range(int(_READY_SECONDS / 0.1)):
                if self._process.returncode is not None:
                    raise NodeError(f"{self.name} did not start: {self._last_words()}")
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with http.get(f"{self.url}/readyz") as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.1)
        raise NodeError(f"{self.name} is not ready after {_READY_SECONDS:g} s; see {self.log}")

    async def keep(self, say: Callable[[str], None]) -> None:
        """Starts it again whenever it dies. Raises NodeError when that fails."""
        while True:
            assert self._process is not None
            await self._process.wait()
            say(f"{self.name} has died; it starts again in {_AGAIN_SECONDS:g} s")
            await asyncio.sleep(_AGAIN_SECONDS)
            await self.start()
            say(f"{self.name} runs again, pid {self.pid}")

    async def close(self) -> None:
        """Drains and ends it; kills it when that takes too long."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"see {self.log}"
