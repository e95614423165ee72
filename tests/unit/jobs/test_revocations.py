"""What ended is found by every node, also after its store was silent for long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.jobs import revocations
from relay.jobs.revocations import Revocations
from relay.routing.hub import Hub
from relay.store.accounts import Standing
from relay.store.mongo import PyMongoError
from relay.wire import errors
from tests.support.backlog import LocalConnection, MemoryBacklog

MINUTE = timedelta(minutes=1)


class Clock:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.moment = datetime.now(UTC)

    def now(self) -> datetime:
        return self.moment


class Ends:
    """Devices and users that ended, as ``Accounts`` tells of them; ``silent``: the store does not answer."""

    def __init__(self) -> None:
        self.silent = False
        self.devices: dict[str, datetime] = {}
        self.users: dict[str, datetime] = {}
        self.forgotten: list[str] = []

    async def ended_since(self, moment: datetime) -> AsyncIterator[tuple[str, Standing]]:
        if self.silent:
            raise PyMongoError("no answer")
        for key, at in self.devices.items():
            if at >= moment:
                yield key, Standing(ended=int(at.timestamp() * 1000), session=None, barred=True)

    async def barred_since(self, moment: datetime) -> AsyncIterator[str]:
        for user, at in self.users.items():
            if at >= moment:
                yield user

    def forget(self, key: str) -> None:
        self.forgotten.append(key)


@pytest.fixture
async def bob() -> AsyncIterator[LocalConnection]:
    found = LocalConnection(MemoryBacklog())
    yield found
    await found.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(revocations, "utc_now", found.now)
    return found


def job(bob: LocalConnection, ends: Any) -> Revocations:
    hub = Hub()
    hub.add(bob)
    return Revocations(hub, ends)


@pytest.mark.parametrize("whose", ["device", "user"])
async def test_what_ended_while_the_store_was_silent_for_minutes_is_cut_off_when_it_answers(
    bob: LocalConnection, clock: Clock, whose: str
) -> None:
    ends = Ends()
    found = job(bob, ends)
    await found.run()
    ends.silent = True
    clock.moment += MINUTE
    if whose == "device":
        ends.devices[bob.key] = clock.moment
    else:
        ends.users[bob.user] = clock.moment
    for _ in range(5):
        clock.moment += MINUTE
        with pytest.raises(PyMongoError):
            await found.run()
    assert bob.closes == []
    ends.silent = False
    await found.run()
    assert bob.closes == [errors.UNAUTHORIZED]
    assert set(ends.forgotten) == {bob.key}


async def test_a_clock_that_was_set_back_hides_nothing(bob: LocalConnection, clock: Clock) -> None:
    ends = Ends()
    clock.moment += 10 * MINUTE
    found = job(bob, ends)
    await found.run()
    clock.moment -= 10 * MINUTE
    ends.devices[bob.key] = clock.moment
    await found.run()
    assert bob.closes == [errors.UNAUTHORIZED]


async def test_what_ended_long_ago_is_not_read_again(bob: LocalConnection, clock: Clock) -> None:
    ends = Ends()
    found = job(bob, ends)
    for _ in range(3):
        clock.moment += 2 * MINUTE
        await found.run()
    ends.devices[bob.key] = clock.moment - 4 * MINUTE
    await found.run()
    assert bob.closes == []
