"""A group of `scripts/chat` devices that all write all the time, two of them killed and restarted at random: in the end all
five histories are the same, and nothing is left at the relay."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Final

import pytest

from tests.faults.conftest import Processes
from tests.support.node import SECRET, Node
from tests.support.process import ROOT, environment, ledger_of
from tests.support.waiting import until

PEOPLE: Final = ("ann", "ben", "cleo", "dora", "emil")
VICTIMS: Final = 2
SECONDS: Final = float(os.environ.get("GROUP_CHAT_SECONDS", "60"))
SEED: Final = int(os.environ.get("GROUP_CHAT_SEED", random.SystemRandom().randrange(1_000_000)))
PAUSE: Final = (0.02, 0.3)
ALIVE: Final = (0.2, 6.0)
DEAD: Final = (0.0, 3.0)

Row = tuple[int, str, str, str, str]


class Person:
    """Somebody at a terminal. Whenever the program starts again all lines are entered again from the first, under the same
    ``--batch``: it knows which of them it has."""

    def __init__(self, name: str, node: Node, home: Path) -> None:
        self.name = name
        self.lines: list[str] = []
        self.kills = 0
        self._database = home / "data" / "chat" / f"{name}-terminal.sqlite"
        self._home = home
        self._environment = environment(url=node.url, data_dir=home / "data", jwt_secret=SECRET)
        self._arguments: tuple[str, ...] = ()
        self._process: asyncio.subprocess.Process | None = None
        self._entered = 0
        self._entering = asyncio.Lock()

    async def start(self, *arguments: str) -> None:
        """Starts the program; without arguments as the last time."""
        self._arguments = arguments or self._arguments
        with self._open("shown") as shown, self._open("said") as said:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "scripts.tools.chat", "--user", self.name, "--batch", "chat", "--listen"),
                *self._arguments,
                cwd=ROOT,
                env=self._environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=shown,
                stderr=said,
                start_new_session=True,
            )
        self._entered = 0
        await self._enter()

    def _open(self, what: str) -> IO[bytes]:
        return (self._home / f"{self.name}.{what}").open("ab")

    async def write(self, line: str) -> None:
        """Enters one more line, at the latest when the program runs again."""
        self.lines.append(line)
        await self._enter()

    async def _enter(self) -> None:
        async with self._entering:
            process = self._process
            if process is None or process.returncode is not None or process.stdin is None:
                return
            try:
                # A pipe that is closing belongs to a program that was killed just now: its next life gets all the lines.
                while self._entered < len(self.lines) and not process.stdin.is_closing():
                    process.stdin.write(f"{self.lines[self._entered]}\n".encode())
                    self._entered += 1
                    await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                return

    async def kill(self) -> None:
        """kill -9."""
        process = self._process
        assert process is not None
        assert process.returncode is None, f"{self.name}'s chat ended by itself: {self.said()}"
        process.kill()
        await process.wait()
        self.kills += 1

    async def close_input(self) -> None:
        """Ctrl-D: what is entered is sent, then it goes on listening."""
        await self._enter()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def end(self) -> int:
        """Ends it as Ctrl-C does; the exit code."""
        process = self._process
        assert process is not None
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            return await process.wait()

    async def close(self) -> None:
        """Whatever still runs is killed."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        return (self._home / f"{self.name}.said").read_text()[-2000:]

    def history(self, conv: str) -> list[Row]:
        """seq, id, sender, kind and body of everything in the conversation, in the order it is shown."""
        return self._select(
            "SELECT seq, id, sender_user, kind, body FROM messages WHERE conv = ? ORDER BY seq, id", conv
        )

    def count(self, conv: str) -> int:
        """How much of the conversation is on its disk, and stored at the relay where it is its own."""
        if not self._database.exists():
            return 0
        found = self._select(
            "SELECT count(*) FROM messages WHERE conv = ? AND seq IS NOT NULL AND kind = 'text'", conv
        )
        return int(found[0][0])

    def settled(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._select("SELECT 1 FROM outbox WHERE conv <> ?", "")

    def _select(self, query: str, value: str) -> list[Any]:
        database = sqlite3.connect(self._database, timeout=5)
        try:
            return database.execute(query, (value,)).fetchall()
        finally:
            database.close()


@asynccontextmanager
async def people(node: Node, home: Path) -> AsyncIterator[list[Person]]:
    """Everybody, with files in ``home``; none of their programs outlives the block."""
    (home / "data").mkdir()
    found = [Person(name, node, home) for name in PEOPLE]
    try:
        yield found
    finally:
        for person in found:
            await person.close()


async def talk(person: Person, seed: str, stop: asyncio.Event) -> None:
    chance = random.Random(seed)
    while not stop.is_set():
        await person.write(f"{person.name} {len(person.lines)} {'é' * chance.randrange(40)}")
        await asyncio.sleep(chance.uniform(*PAUSE))


async def harass(person: Person, seed: str, stop: asyncio.Event) -> None:
    chance = random.Random(seed)
    while True:
        try:
            async with asyncio.timeout(chance.uniform(*ALIVE)):
                await stop.wait()
                return
        except TimeoutError:
            await person.kill()
        await asyncio.sleep(chance.uniform(*DEAD))
        await person.start()


def to_all_but(person: Person) -> list[str]:
    return [part for name in PEOPLE if name != person.name for part in ("--to", name)]


async def made_group(node: Node) -> str:
    async def exists() -> bool:
        return bool(await node.db.conversations.count_documents({"type": "group"}))

    await until(exists, 30, "ann's chat has made the group")
    found = await node.db.conversations.find_one({"type": "group"})
    return str(found["_id"])


@pytest.mark.faults
@pytest.mark.timeout(SECONDS + 120)
async def test_five_chats_of_which_two_are_killed_all_the_time_end_with_one_history_and_an_empty_relay(
    processes: Processes, tmp_path: Path
) -> None:
    print(f"GROUP_CHAT_SEED={SEED} GROUP_CHAT_SECONDS={SECONDS:g}")
    relay = processes()
    await relay.start()
    async with people(relay, tmp_path) as everybody:
        first, *others = everybody
        await first.start(*to_all_but(first))
        conv = await made_group(relay)
        for person in others:
            await person.start(*to_all_but(person))
        stop = asyncio.Event()
        victims = random.Random(SEED).sample(everybody, VICTIMS)
        async with asyncio.TaskGroup() as group:
            for person in everybody:
                group.create_task(talk(person, f"{SEED} {person.name}", stop), name=f"{person.name} talks")
            for person in victims:
                group.create_task(
                    harass(person, f"{SEED} kill {person.name}", stop), name=f"{person.name} dies"
                )
            await asyncio.sleep(SECONDS)
            stop.set()
        for person in everybody:
            await person.close_input()
        sent = sum(len(person.lines) for person in everybody)

        async def arrived() -> bool:
            return all(person.count(conv) >= sent for person in everybody)

        try:
            await until(arrived, 40, "every line is on every disk")
        finally:
            print(
                {
                    person.name: (person.count(conv), person.kills, person.said()[-200:])
                    for person in everybody
                },
                sent,
            )

        async def empty() -> bool:
            return not await relay.db.messages.count_documents({})

        await until(empty, 15, "the relay keeps nothing")
        ledger = await ledger_of(relay)
        for person in everybody:
            assert await person.end() == 0, person.said()
        histories = {person.name: person.history(conv) for person in everybody}

    assert all(person.kills for person in victims)
    for name, history in histories.items():
        assert history == histories[first.name], f"{name}'s history is not {first.name}'s (seed {SEED})"
    texts = [(sender, body) for _, _, sender, kind, body in histories[first.name] if kind == "text"]
    assert len(texts) == sent
    for person in everybody:
        mine = [body for sender, body in texts if sender == person.name]
        assert mine == [f'"{line}"' for line in person.lines], f"{person.name}'s lines (seed {SEED})"
        assert person.settled()
    system = len(histories[first.name]) - sent
    assert system == 1, "one message says that the group was made"
    # Four devices for each line, and everybody for the one of the relay.
    deliveries = len(others) * sent + len(everybody)
    assert ledger == dict.fromkeys(ledger, 0) | {"accepted": deliveries, "acknowledged": deliveries}
