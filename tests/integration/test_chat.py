"""`scripts/chat` against a running relay: a file piped through while its reader and its writer are killed and restarted."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.node import SECRET, Node
from tests.support.waiting import until

LINES = 3000
_STARTED: list[Process] = []
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
async def started() -> AsyncIterator[list[Process]]:
    """What a failing test left running is ended: it would hold the whole run up."""
    _STARTED.clear()
    yield _STARTED
    for process in _STARTED:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def chat(node: Node, directory: Path, *arguments: str, text: Path | None = None) -> Process:
    environment = {
        **os.environ,
        "RELAY_URL": node.url,
        "RELAY_JWT_SECRET": SECRET,
        "RELAY_DATA_DIR": str(directory),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "scripts.tools.chat", *arguments]
    with Path(text or os.devnull).open("rb") as lines:  # noqa: ASYNC230 - it is the process that reads it
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdin=lines, stdout=DEVNULL, stderr=DEVNULL
        )
    _STARTED.append(process)
    return process


def history(directory: Path, user: str) -> list[tuple[int, str, str]]:
    path = directory / "chat" / f"{user}-terminal.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(path) as database:
        # The file is there a moment before its tables.
        if not database.execute("select 1 from sqlite_master where name = 'messages'").fetchall():
            return []
        return database.execute("select seq, id, body from messages order by seq, id").fetchall()


async def test_a_piped_file_arrives_line_for_line_though_both_ends_are_killed_and_restarted(
    node: Node, tmp_path: Path
) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"line {number} 😀\n" for number in range(LINES)))
    listen = ("--user", "bob", "--to", "ann", "--listen")
    reader = await chat(node, tmp_path, *listen)
    writer = await chat(node, tmp_path, "--user", "ann", "--to", "bob", text=text)

    async def under_way() -> bool:
        return len(history(tmp_path, "bob")) > LINES // 10

    await until(under_way, 20, "the first lines have arrived")
    for process in (reader, writer):
        process.kill()
        await process.wait()
    reader = await chat(node, tmp_path, *listen)
    writer = await chat(node, tmp_path, "--user", "ann", "--to", "bob", text=text)
    assert await asyncio.wait_for(writer.wait(), 30) == 0

    async def arrived() -> bool:
        return len(history(tmp_path, "bob")) >= LINES and not await node.db.messages.count_documents({})

    await until(arrived, 20, "every line has arrived and nothing is left in messages")
    reader.terminate()
    await reader.wait()
    ann, bob = history(tmp_path, "ann"), history(tmp_path, "bob")
    assert ann == bob
    assert len(bob) == LINES
    assert [f"line {number} 😀" in row[2] for number, row in enumerate(bob)] == [True] * LINES
