"""What is ready for one socket leaves in order, in few frames, within the limits."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.routing.outbox import Outbox
from relay.wire.codec import dumps
from relay.wire.frames import MAX_OPERATIONS
from tests.support.backlog import turns

LIMIT = 2048


class Socket:
    """Takes frames; while ``flowing`` is clear it is slow."""

    def __init__(self, outbox: Outbox) -> None:
        self.frames: list[str] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.fault: Exception | None = None
        self.writer = asyncio.create_task(outbox.run(self.send))

    async def send(self, frame: str) -> None:
        await self.flowing.wait()
        if self.fault is not None:
            raise self.fault
        self.frames.append(frame)


def operation(number: int, text: str = "") -> str:
    return dumps({"t": "x", "n": number, "text": text})


def numbers(frames: list[str]) -> list[int]:
    found = []
    for frame in frames:
        value = json.loads(frame)
        found += [item["n"] for item in (value if isinstance(value, list) else [value])]
    return found


async def test_one_operation_is_a_frame_and_all_of_one_turn_are_one_frame() -> None:
    outbox = Outbox(max_bytes=10_000, max_frame=LIMIT)
    socket = Socket(outbox)
    outbox.put(operation(1))
    await turns()
    assert socket.frames == [operation(1)]
    for number in (2, 3, 4):
        outbox.put(operation(number))
    await turns()
    assert len(socket.frames) == 2
    assert numbers(socket.frames) == [1, 2, 3, 4]
    outbox.close()
    await socket.writer


@settings(max_examples=150)
@given(
    texts=st.lists(
        st.text(max_size=300)
        | st.text("\U0001f600\U0001f468", max_size=300)
        | st.text("\u20ac\u00e4", max_size=300),
        max_size=40,
    ),
    pauses=st.sets(st.integers(0, 40)),
)
async def test_operations_leave_in_order_and_no_frame_is_too_large(
    texts: list[str], pauses: set[int]
) -> None:
    outbox = Outbox(max_bytes=10_000, max_frame=LIMIT)
    socket = Socket(outbox)
    for number, text in enumerate(texts):
        outbox.put(operation(number, text))
        if number in pauses:
            await turns(2)
    outbox.close()
    await socket.writer
    assert numbers(socket.frames) == list(range(len(texts)))
    assert outbox.size == 0
    for frame in socket.frames:
        assert len(frame.encode()) <= LIMIT or not frame.startswith("[")


async def test_a_frame_holds_no_more_operations_than_a_client_takes() -> None:
    outbox = Outbox(max_bytes=1_000_000, max_frame=1_000_000)
    socket = Socket(outbox)
    for number in range(2 * MAX_OPERATIONS + 1):
        outbox.put(operation(number))
    outbox.close()
    await socket.writer
    assert [len(json.loads(frame)) for frame in socket.frames[:2]] == [MAX_OPERATIONS] * 2
    assert numbers(socket.frames) == list(range(2 * MAX_OPERATIONS + 1))


async def test_an_operation_larger_than_a_frame_goes_alone() -> None:
    outbox = Outbox(max_bytes=100_000, max_frame=LIMIT)
    socket = Socket(outbox)
    for number, text in enumerate(("", "x" * 5000, "")):
        outbox.put(operation(number, text))
    outbox.close()
    await socket.writer
    assert [numbers([frame]) for frame in socket.frames] == [[0], [1], [2]]


async def test_a_slow_socket_fills_the_outbox_and_room_comes_when_it_flows() -> None:
    told: list[int] = []
    outbox = Outbox(max_bytes=500, max_frame=LIMIT, on_room=lambda: told.append(outbox.size))
    socket = Socket(outbox)
    socket.flowing.clear()
    while not outbox.full:
        outbox.put(operation(0, "x" * 20))
        await asyncio.sleep(0)
    assert outbox.size >= 500
    waiter = asyncio.ensure_future(outbox.room())
    await turns()
    assert not waiter.done()
    assert told == []
    socket.flowing.set()
    await asyncio.wait_for(waiter, 1)
    assert [outbox.full] == [False]
    assert told
    outbox.close()
    await socket.writer


async def test_a_closed_outbox_sends_what_it_has_and_takes_nothing_more() -> None:
    outbox = Outbox(max_bytes=10_000, max_frame=LIMIT)
    socket = Socket(outbox)
    outbox.put(operation(1))
    outbox.close()
    outbox.put(operation(2))
    await asyncio.wait_for(socket.writer, 1)
    assert numbers(socket.frames) == [1]


async def test_a_discarded_outbox_forgets_what_it_has_and_lets_everybody_go() -> None:
    outbox = Outbox(max_bytes=100, max_frame=LIMIT)
    socket = Socket(outbox)
    socket.flowing.clear()
    outbox.put(operation(1))
    await turns()
    for number in range(2, 9):
        outbox.put(operation(number))
    reader = asyncio.ensure_future(outbox.room())
    await turns()
    assert not reader.done()
    outbox.discard()
    await asyncio.wait_for(reader, 1)
    socket.flowing.set()
    await asyncio.wait_for(socket.writer, 1)
    assert outbox.size == 0
    assert numbers(socket.frames) == [1]


async def test_a_socket_that_fails_ends_the_writer() -> None:
    outbox = Outbox(max_bytes=100, max_frame=LIMIT)
    socket = Socket(outbox)
    socket.fault = ConnectionResetError()
    outbox.put(operation(1))
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(socket.writer, 1)
