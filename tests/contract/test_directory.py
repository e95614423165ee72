"""Who is connected where, in a real Valkey: of two connections of a device the younger one's line stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.routing.directory import KEPT_SECONDS, Directory, Entry, Line, Outcome, Way
from relay.routing.hub import Hub
from relay.routing.registrations import Registrations
from tests.support.backlog import LocalConnection, MemoryBacklog
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until

ODD = "a.b@c:d+e-f_%s"
NOW = 1_800_000_000_000 << 10


@pytest.fixture(scope="module")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Any]:
    found = Redis.from_url(valkey.url)
    await found.flushall()
    yield found
    await found.aclose()


@pytest.fixture
def one(redis: Any) -> Directory:
    return Directory(redis, prefix="relay:test", node="one")


@pytest.fixture
def other(redis: Any) -> Directory:
    return Directory(redis, prefix="relay:test", node="other")


async def note(at: Directory, way: Way, serial: int, device: str = "phone", user: str = "bob") -> Outcome:
    (outcome,) = await at.note([Entry(way, user, device, serial)])
    assert outcome is not None
    return outcome


async def lines(at: Directory, user: str = "bob") -> list[Line]:
    return (await at.find([user])).get(user, [])


async def test_who_enters_replaces_any_connection_and_hears_of_it(one: Directory, other: Directory) -> None:
    assert await note(one, "enter", NOW + 9) == Outcome(True, None)
    assert await note(other, "enter", NOW) == Outcome(True, Line("phone", "one", NOW + 9, False))
    assert await lines(one) == [Line("phone", "other", NOW, False)]


async def test_who_is_kept_replaces_nobody_and_comes_back_when_the_line_is_lost(
    one: Directory, other: Directory
) -> None:
    await note(one, "enter", NOW)
    assert await note(other, "keep", NOW + 1) == Outcome(False, Line("phone", "one", NOW, False))
    assert await note(one, "leave", NOW) == Outcome(False, None)
    assert await note(other, "keep", NOW + 1) == Outcome(True, None)
    assert await lines(one) == [Line("phone", "other", NOW + 1, False)]


async def test_who_is_late_replaces_only_what_is_older(one: Directory, other: Directory) -> None:
    await note(one, "enter", NOW + 1)
    assert (await note(other, "late", NOW)).written is False
    assert await lines(one) == [Line("phone", "one", NOW + 1, False)]
    assert await note(other, "late", NOW + 2) == Outcome(True, Line("phone", "one", NOW + 1, False))
    assert (await note(one, "late", NOW + 1)).written is False
    assert await lines(one) == [Line("phone", "other", NOW + 2, False)]


async def test_only_the_connection_of_a_line_takes_it_away(
    one: Directory, other: Directory, redis: Any
) -> None:
    await note(one, "enter", NOW + 1)
    await note(one, "leave", NOW)
    await note(other, "leave", NOW + 1)
    assert len(await lines(one)) == 1
    await note(one, "leave", NOW + 1)
    assert await redis.keys() == []


async def test_lines_run_out_by_the_clock_of_redis(one: Directory, redis: Any) -> None:
    now = int((await redis.time())[0])
    past = f"tablet gone {NOW} {now} -\nlaptop there {NOW} {now + 50} s"
    await redis.set("relay:test:at:bob", past)
    assert await note(one, "enter", NOW, "tablet") == Outcome(True, None)
    assert {line.device: line for line in await lines(one)} == {
        "laptop": Line("laptop", "there", NOW, True),
        "tablet": Line("tablet", "one", NOW, False),
    }
    assert 0 < await redis.ttl("relay:test:at:bob") <= KEPT_SECONDS


async def test_of_too_many_devices_of_one_user_the_latest_are_kept(one: Directory) -> None:
    for number in range(70):
        await note(one, "enter", NOW + number, f"d{number}")
    assert {line.device for line in await lines(one)} == {f"d{number}" for number in range(6, 70)}


async def test_ids_of_every_allowed_form_are_found_again(one: Directory) -> None:
    user = ODD.replace("%s", "Z9")
    for device in ("-", ".", "a-b.c:d_e", "%w+".replace("%", "-").replace("+", ".")):
        await note(one, "enter", NOW, device, user)
        await note(one, "enter", NOW + 1, device, user)
    assert sorted(line.device for line in await lines(one, user)) == sorted(["-", ".", "a-b.c:d_e", "-w."])


class Noting:
    """The connections of a node, and whether its Redis works."""

    def __init__(self, directory: Directory, seconds: float = 0.3) -> None:
        self.hub = Hub()
        self.connections: list[LocalConnection] = []
        self.works = True
        self.failures = 0
        self.noted: list[tuple[Entry, Outcome]] = []
        self.registrations = Registrations(
            directory,
            self.hub,
            seconds=seconds,
            works=lambda: self.works,
            fails=self._fails,
            noted=lambda entry, outcome: self.noted.append((entry, outcome)),
        )

    def _fails(self, _: BaseException) -> None:
        self.works = False
        self.failures += 1

    def connect(self, serial: int) -> None:
        connection = LocalConnection(MemoryBacklog(), "bob", "phone")
        connection.serial = serial
        self.hub.add(connection)
        self.connections.append(connection)


@pytest.fixture
async def noting(one: Directory) -> AsyncIterator[Noting]:
    found = Noting(one)
    task = asyncio.create_task(found.registrations.run())
    yield found
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for connection in found.connections:
        await connection.close()


async def test_who_came_while_redis_was_away_stays_late_until_it_is_written(
    noting: Noting, valkey: Valkey, other: Directory
) -> None:
    await note(other, "enter", NOW)
    noting.works = False
    await noting.registrations.enter("bob", "phone", NOW + 1)
    noting.connect(NOW + 1)
    # Redis seems to be back, and is not.
    valkey.pause()
    try:
        noting.works = True
        await noting.registrations.renew_all()
        await until(lambda: _is(not noting.works), 5, "Redis did not answer")
    finally:
        valkey.resume()
    # What Redis had got before it was given up is carried out late.
    await other.note([])
    noting.works = True
    noting.noted.clear()
    await noting.registrations.renew_all()
    await until(lambda: _is(bool(noting.noted)), 5, "noted")
    assert noting.noted[0][0].way == "late"
    await noting.registrations.renew_all()
    await until(lambda: _is(len(noting.noted) > 1), 5, "noted again")
    assert noting.noted[1][0].way == "keep"
    assert await lines(other) == [Line("phone", "one", NOW + 1, False)]


async def test_what_waits_for_a_redis_that_hangs_is_given_up_together_and_soon(
    noting: Noting, valkey: Valkey
) -> None:
    valkey.pause()
    try:
        await asyncio.gather(
            *(noting.registrations.enter(f"u{number}", "phone", NOW) for number in range(2000))
        )
        await until(lambda: _is(noting.failures > 0 and len(noting.registrations) == 0), 5, "nothing waits")
        assert noting.failures == 1, "not a time limit for each group"
    finally:
        valkey.resume()


async def test_a_device_that_goes_while_it_enters_leaves_no_line(noting: Noting, other: Directory) -> None:
    entering = asyncio.create_task(noting.registrations.enter("bob", "phone", NOW))
    await asyncio.sleep(0)
    entering.cancel()
    await asyncio.gather(entering, return_exceptions=True)
    await until(lambda: _is(len(noting.noted) == 2), 5, "both are noted")
    assert await lines(other) == []


async def test_a_silent_connection_stays_silent_when_it_is_renewed(noting: Noting, one: Directory) -> None:
    await noting.registrations.enter("bob", "phone", NOW)
    noting.connect(NOW)
    noting.registrations.note(Entry("keep", "bob", "phone", NOW, True))
    await noting.registrations.renew_all()
    await until(lambda: _is(len(noting.noted) == 3), 5, "noted")
    assert await lines(one) == [Line("phone", "one", NOW, True)]
    noting.registrations.note(Entry("keep", "bob", "phone", NOW, False))
    await noting.registrations.renew_all()
    await until(lambda: _is(len(noting.noted) == 5), 5, "noted")
    assert await lines(one) == [Line("phone", "one", NOW, False)]


async def _is(true: bool) -> bool:
    return true
