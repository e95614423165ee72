"""``scripts/chat`` in a terminal, as a person sees it."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.node import SECRET, Node
from tests.support.process import ROOT, environment

_LOCAL_MODES = 3


class Window:
    """The person's end of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.shown = ""
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            self.shown += os.read(self._descriptor, 65_536).decode()
        except OSError:
            asyncio.get_running_loop().remove_reader(self._descriptor)

    def press(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    async def shows(self, text: str, seconds: float = 20) -> None:
        """Waits until the terminal was told exactly this. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while text not in self.shown:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def window(
    node: Node, directory: Path
) -> AsyncIterator[tuple[Window, asyncio.subprocess.Process, int]]:
    """ann's chat with bob; and the terminal itself, whose modes may be asked."""
    outer, inner = pty.openpty()
    settings = {"url": node.url, "data_dir": directory, "jwt_secret": SECRET}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.tools.chat", "--user", "ann", "--to", "bob"),
        cwd=ROOT,
        env=environment(**settings) | {"TERM": "dumb"},
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    try:
        yield Window(outer), process, inner
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(outer)
        os.close(outer)
        os.close(inner)


async def test_what_is_half_typed_survives_what_arrives_and_is_sent_as_it_stands(
    node: Node, tmp_path: Path
) -> None:
    bob = await node.connect("bob")
    conv = await node.direct("ann", "bob")
    async with window(node, tmp_path) as (ann, process, terminal):
        await ann.shows("> ")
        ann.press("half a sen")
        await ann.shows("half a sen")
        await bob.send(conv, "hello ann")
        await ann.shows("bob hello ann\r\n> half a sen")
        ann.press("tence\r")
        assert (await bob.expect("msg"))["body"] == "half a sentence"
        ann.press("\x04")
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert termios.tcgetattr(terminal)[_LOCAL_MODES] & termios.ECHO


async def test_ctrl_c_leaves_the_terminal_as_it_was(node: Node, tmp_path: Path) -> None:
    await node.request("GET", "/v1/me", "bob", "phone")
    async with window(node, tmp_path) as (ann, process, terminal):
        before = termios.tcgetattr(terminal)
        await ann.shows("> ")
        assert termios.tcgetattr(terminal) != before
        ann.press("not sent")
        await ann.shows("not sent")
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert termios.tcgetattr(terminal) == before
