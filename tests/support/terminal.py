"""``scripts/chat`` as a process that a test types into and reads from."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.node import Node
from tests.support.process import ROOT, environment


class Terminal:
    """One running chat. Its standard input is a pipe, so what it prints is ``sender<TAB>text``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def type(self, line: str) -> None:
        """Enters a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        await self._process.stdin.drain()

    async def read(self, seconds: float = 10) -> str:
        """The next line shown. Raises TimeoutError."""
        assert self._process.stdout is not None
        async with asyncio.timeout(seconds):
            return (await self._process.stdout.readline()).decode().rstrip("\n")

    async def ended(self, seconds: float = 15) -> tuple[int, str]:
        """Waits for its end without closing its input: exit code and standard error."""
        assert self._process.stderr is not None
        async with asyncio.timeout(seconds):
            said = await self._process.stderr.read()
            return await self._process.wait(), said.decode()

    async def stop(self) -> None:
        """Ends it as Ctrl-C does, unless it has ended."""
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.communicate()


@asynccontextmanager
async def terminal(
    node: Node, directory: Path, *arguments: str, password: str | None = None
) -> AsyncIterator[Terminal]:
    """Runs ``scripts/chat`` with these arguments against a node, its files in ``directory``; without a terminal to ask a
    password on."""
    settings = {"url": node.url, "data_dir": directory}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.tools.chat", *arguments),
        cwd=ROOT,
        env=environment(**settings, **({} if password is None else {"password": password})),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    running = Terminal(process)
    try:
        yield running
    finally:
        await running.stop()
