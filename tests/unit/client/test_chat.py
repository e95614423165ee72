"""scripts/chat as a process: pipes, repeated runs, kills, listening."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import pytest

from relay.wire import ids
from tests.unit.client.peer import Peer

ANN = "ann/terminal"
CONV = "c-ann-bob"


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer({CONV: [ANN, "bob/one"]}) as running:
        yield running


async def chat(
    peer: Peer, directory: Path, *arguments: str, stdin: IO[bytes] | int = asyncio.subprocess.DEVNULL
) -> asyncio.subprocess.Process:
    command = ["--user", "ann", "--url", peer.url, "--token", ANN, *arguments]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.tools.chat", *command),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "RELAY_DATA_DIR": str(directory)},
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def bodies(peer: Peer) -> list[str]:
    return [message["body"] for message in sorted(peer.messages.values(), key=lambda item: item["seq"])]


async def test_every_line_of_a_file_is_stored_in_order_and_a_second_run_sends_nothing(
    peer: Peer, tmp_path: Path
) -> None:
    text = [f"line {number} ü" for number in range(1500)] + ["", "  spaces  ", "last without newline"]
    (tmp_path / "some.txt").write_text("\n".join(text))
    for goal in ("1503 stored", "1503 queued or sent by an earlier run"):
        with (tmp_path / "some.txt").open("rb") as file:
            code, out, err = await ended(await chat(peer, tmp_path, "--to", "bob", stdin=file))
        assert (code, out) == (0, "")
        assert goal in err
        assert err.count("\n") == 1
        assert bodies(peer) == text


async def test_a_run_that_was_killed_goes_on_where_it_stopped(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("".join(f"{number}\n" for number in range(6000)))
    for goal in (500, 3000):
        with (tmp_path / "some.txt").open("rb") as file:
            process = await chat(peer, tmp_path, "--to", "bob", stdin=file)
        await peer.until(lambda goal=goal: len(peer.messages) >= goal)  # type: ignore[misc]
        process.kill()
        await process.wait()
    with (tmp_path / "some.txt").open("rb") as file:
        code, _, _ = await ended(await chat(peer, tmp_path, "--to", "bob", stdin=file))
    assert code == 0
    assert bodies(peer) == [str(number) for number in range(6000)]


async def test_the_same_file_under_another_batch_is_sent_again(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("one\ntwo\n")
    for batch in ("monday", "tuesday", "monday"):
        with (tmp_path / "some.txt").open("rb") as file:
            await ended(await chat(peer, tmp_path, "--to", "bob", "--batch", batch, stdin=file))
    assert bodies(peer) == ["one", "two", "one", "two"]


async def test_a_line_that_is_not_text_is_named_and_the_others_are_sent(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_bytes(b"good\n\xff\xfe\nfine\n")
    with (tmp_path / "some.txt").open("rb") as file:
        code, _, err = await ended(await chat(peer, tmp_path, "--to", "bob", stdin=file))
    assert code == 1
    assert "line 2 is not UTF-8" in err
    assert bodies(peer) == ["good", "fine"]


async def test_lines_of_a_pipe_go_out_as_they_come(peer: Peer, tmp_path: Path) -> None:
    process = await chat(peer, tmp_path, "--to", "bob", stdin=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"first\nsec")
    await peer.until(lambda: bodies(peer) == ["first"])
    process.stdin.write(b"ond\n")
    await peer.until(lambda: bodies(peer) == ["first", "second"])
    process.stdin.close()
    assert (await ended(process))[0] == 0


async def test_listening_prints_one_harmless_line_a_message_until_it_is_told_to_end(
    peer: Peer, tmp_path: Path
) -> None:
    await peer.post(CONV, ids.new_id(), "hello")
    await peer.post(CONV, ids.new_id(), "two\nlines \x1b[31mred")
    process = await chat(peer, tmp_path)
    assert process.stdout is not None
    found = [(await process.stdout.readline()).decode() for _ in range(2)]
    process.terminate()
    assert (await ended(process))[0] == 0
    assert found == ["bob\thello\n", "bob\ttwo\\nlines \ufffd[31mred\n"]


async def test_json_gives_the_message_as_it_is(peer: Peer, tmp_path: Path) -> None:
    message = ids.new_id()
    await peer.post(CONV, message, {"a": "two\nlines"})
    process = await chat(peer, tmp_path, "--json")
    assert process.stdout is not None
    found = json.loads(await process.stdout.readline())
    process.terminate()
    await ended(process)
    assert (found["id"], found["user"], found["body"]) == (message, "bob", {"a": "two\nlines"})


async def test_without_a_relay_a_pipe_says_so_once_and_gives_up(peer: Peer, tmp_path: Path) -> None:
    async with Peer({}) as gone:
        pass
    code, _, err = await ended(await chat(gone, tmp_path, "--to", "bob", "--timeout", "1"))
    assert code == 1
    assert err.splitlines() == [
        f"cannot reach the relay at {gone.url} ; is it running? start it with: make run",
        "chat: gave up after 1 s without the relay; nothing was sent",
    ]


async def test_a_device_that_is_replaced_ends_with_one_line(peer: Peer, tmp_path: Path) -> None:
    process = await chat(peer, tmp_path)
    await peer.until(lambda: ANN in peer.lines)
    await peer.drop(ANN, 4409)
    code, _, err = await ended(process)
    assert code == 1
    assert err.startswith("chat: another connection of this device took over")
    assert err.count("\n") == 1
