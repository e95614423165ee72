"""`scripts/chat` in a group, against a running relay: one group whoever comes first, and what a person on a terminal sees."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from tests.support.node import Node
from tests.support.process import ROOT, environment
from tests.support.terminal import terminal
from tests.support.waiting import until


class Person:
    """Somebody on a pseudo-terminal: what they type, and all that it has shown, as it came."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.shown = ""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            self.shown += os.read(self._descriptor, 65_536).decode()
        except OSError:  # the program has ended
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._changed.set()

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def sees(self, text: str, seconds: float = 15) -> None:
        """Waits until it was shown. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while text not in self.shown:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def on_a_terminal(node: Node, directory: Path, *arguments: str) -> AsyncIterator[Person]:
    ours, theirs = pty.openpty()
    settings = {"url": node.url, "data_dir": directory}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.tools.chat", *arguments),
        cwd=ROOT,
        env={**environment(**settings), "TERM": "xterm", "COLUMNS": "80"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    person = Person(ours)
    try:
        yield person
    finally:
        asyncio.get_running_loop().remove_reader(ours)
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(ours)


def who(node: Node, user: str, *others: str) -> list[str]:
    named = [part for other in others for part in ("--to", other)]
    return ["--user", user, "--token", node.token(user, "terminal"), *named]


async def stored(node: Node, user: str) -> bool:
    return bool(await node.db.messages.count_documents({"sender.user": user}))


async def test_people_who_name_each_other_meet_in_one_group(node: Node, tmp_path: Path) -> None:
    everybody = ("ann", "bob", "cleo")
    async with terminal(node, tmp_path, *who(node, "ann", "bob", "cleo")) as ann:
        await ann.type("from ann")
        assert await ann.read() == "$relay\tann made the group with bob, cleo"
        # Her line follows; it may take longer than the others take to come.
        await until(partial(stored, node, "ann"), 10, "ann's line is stored")
        async with (
            terminal(node, tmp_path, *who(node, "bob", "ann", "cleo")) as bob,
            terminal(node, tmp_path, *who(node, "cleo", "ann", "bob")) as cleo,
        ):
            await bob.type("from bob")
            assert await ann.read() == "bob\tfrom bob"
            for one in (bob, cleo):
                assert await one.read() == "$relay\tann made the group with bob, cleo"
                assert await one.read() == "ann\tfrom ann"
            assert await cleo.read() == "bob\tfrom bob"
    assert await node.db.conversations.count_documents({"type": "group"}) == 1
    assert await node.db.memberships.count_documents({"user": {"$in": everybody}}) == 3


async def test_a_person_sees_who_has_their_line(node: Node, tmp_path: Path) -> None:
    async with on_a_terminal(node, tmp_path, *who(node, "ann", "bob", "cleo")) as ann:
        await ann.sees("ann made the group with bob, cleo")
        async with on_a_terminal(node, tmp_path, *who(node, "bob", "ann", "cleo")) as bob:
            await bob.sees("ann made the group with bob, cleo")
            ann.type("hello\n")
            await bob.sees("hello")
            await ann.sees("delivered to bob")


async def test_what_is_said_in_another_conversation_is_marked(node: Node, tmp_path: Path) -> None:
    async with on_a_terminal(node, tmp_path, *who(node, "ann", "bob", "cleo")) as ann:
        await ann.sees("> ")
        conv = await node.direct("bob", "ann")
        bob = await node.connect("bob")
        await bob.send(conv, "psst")
        await ann.sees("(elsewhere) ")
        await ann.sees(f"--conversation {conv}")
