"""Relay nodes that die and are restarted one by one, on two shards and under load: where their devices go, and that nothing is
lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from tests.faults.conftest import Processes
from tests.faults.test_all_together import balanced, goes_on, house
from tests.support.device import Closed, WireDevice
from tests.support.load import Load
from tests.support.node import Node
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
DEVICES = 500
# Of a machine that does much else at the same time.
PATIENCE = 60
Found = TypeVar("Found")


async def test_the_devices_of_a_killed_node_connect_to_another_and_drain_while_others_write(
    processes: Processes, tmp_path: Path
) -> None:
    async with house(processes, tmp_path) as found:
        one, two = found.nodes
        load = Load(one, pairs=6, rate=5, nodes=found.nodes, groups=(5,), name="other")
        try:
            await load.start()
            async with asyncio.TaskGroup() as reading:
                users = [f"u{n}" for n in range(DEVICES)]
                phones = [Phone(device, reading) for device in await in_turns(two.connect, users)]
                ann = Phone(await one.connect("ann"), reading)
                convs = await in_turns(partial(one.direct, "ann"), users)
                assert {conv < "8" for conv in convs} == {True, False}, "they lie on both shards"
                before = await store(ann, convs, "before")
                await have_got(phones, before)
                await goes_on(load, PATIENCE)

                two.signal(signal.SIGKILL)
                await two.wait(5)
                during = await store(ann, convs, "while they are away")
                stored = len(load.stored)
                again = [Phone(device, reading) for device in await in_turns(one.connect, users)]
                await have_got(again, before, during)
                assert not any(set(during) & phone.got.keys() for phone in phones)
                for phone, conv, *ids in zip(again, convs, before, during, strict=True):
                    await phone.device.put({"t": "ack", "conv": conv, "ids": ids})
                await until(partial(have_drained, again), PATIENCE, "every device has drained")
                await load.stored_since(stored, PATIENCE)
                await load.settle(PATIENCE)
                for phone in (ann, *phones, *again):
                    phone.reading.cancel()
        finally:
            await load.close()
        print(await load.verify())
        assert await one.db.messages.count_documents({}) == 0
        await balanced([one])


async def in_turns(work: Callable[[str], Awaitable[Found]], users: Sequence[str]) -> list[Found]:
    """The results of this for every one of them, 25 at a time."""
    found: list[Found] = []
    for begin in range(0, len(users), 25):
        found += await asyncio.gather(*(work(user) for user in users[begin : begin + 25]))
    return found


class Phone:
    """A device that reads all the time; who does not is cut off. ``got`` are the ids of its messages, and ``drained`` that it has
    been told that all of them are acknowledged."""

    def __init__(self, device: WireDevice, tasks: asyncio.TaskGroup) -> None:
        self.device = device
        self.got: dict[str, None] = {}
        self.stored: set[str] = set()
        self.drained = False
        self.reading = tasks.create_task(self._read(), name=device.key)

    async def _read(self) -> None:
        with contextlib.suppress(Closed, OSError):
            while True:
                frame = await self.device.next(600)
                if frame["t"] == "msg":
                    self.got[frame["id"]] = None
                elif frame["t"] == "stored":
                    self.stored.add(frame["id"])
                elif frame["t"] == "drained":
                    self.drained = True


async def have_got(phones: Sequence[Phone], *sent: Sequence[str]) -> None:
    """Every phone has the messages at its place of these, in this order and no others."""

    def late() -> list[tuple[str, bool, bool, int]]:
        return [
            (phone.device.key, phone.reading.done(), phone.drained, len(phone.got))
            for phone, *ids in zip(phones, *sent, strict=True)
            if list(phone.got) != ids
        ]

    async def have() -> bool:
        return not late()

    try:
        await until(have, PATIENCE, "every device has got its messages")
    except AssertionError as error:
        missing = late()
        raise AssertionError(f"{error}: {len(missing)} have not, such as {missing[:5]}") from None


async def have_drained(phones: Sequence[Phone]) -> bool:
    """Whether each of them has been told that all is acknowledged."""
    return all(phone.drained for phone in phones)


async def store(ann: Phone, convs: Sequence[str], body: str) -> list[str]:
    """A message in each conversation, all of them stored; their ids in the same order."""
    ids: list[str] = []

    async def stored() -> bool:
        return ann.stored.issuperset(ids)

    for begin in range(0, len(convs), 50):
        ids += [await ann.device.send(conv, body) for conv in convs[begin : begin + 50]]
        await until(stored, PATIENCE, "all of them are stored")
    return ids


async def test_a_rolling_restart_loses_nothing_and_moves_the_devices_of_the_node_that_restarts_once(
    processes: Processes, tmp_path: Path
) -> None:
    async with house(processes, tmp_path) as found:
        load = Load(found.nodes[0], pairs=16, rate=8, nodes=found.nodes, groups=(5, 5))
        await load.start()
        await goes_on(load, PATIENCE)
        for node in found.nodes:
            before = {key: list(homes) for key, homes in load.homes.items()}
            here = [key for key, homes in before.items() if homes[-1] is node]
            assert here, "there are devices at every node"
            node.signal(signal.SIGTERM)
            assert await node.wait(20) == 0
            await node.start()

            async def are_back(here: Sequence[str] = here, before: dict[str, list[Node]] = before) -> bool:
                return all(len(load.homes[key]) > len(before[key]) for key in here)

            await until(are_back, PATIENCE, "the devices of the node that restarts are connected again")
            await goes_on(load, PATIENCE)
            moved = {key: len(homes) - len(before[key]) for key, homes in load.homes.items()}
            assert {key: times for key, times in moved.items() if times} == dict.fromkeys(here, 1)
        await load.settle(PATIENCE)
        print(await load.verify())
        await balanced(found.nodes)
