"""What people have changed at other nodes is found by every node, also after its store was silent for long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.jobs import preferences
from relay.jobs.preferences import Preferences
from relay.routing.hub import Hub
from relay.store.mongo import PyMongoError
from tests.support.backlog import LocalConnection, MemoryBacklog

MINUTE = timedelta(minutes=1)


class Store:
    """Who has changed it last, as ``People`` tells; ``silent``: it does not answer."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.silent = False
        self.changes: dict[str, tuple[bool, datetime]] = {}

    async def receipts_changed_since(self, moment: datetime) -> AsyncIterator[tuple[str, bool, int]]:
        if self.silent:
            raise PyMongoError("no answer")
        for user, (quiet, at) in self.changes.items():
            if at >= moment:
                yield user, quiet, int(at.timestamp() * 1000)


@pytest.fixture
async def bob() -> AsyncIterator[LocalConnection]:
    found = LocalConnection(MemoryBacklog(), "bob", "phone")
    yield found
    await found.close()


async def test_a_change_is_found_though_the_store_was_silent_for_minutes(
    bob: LocalConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = Store()
    monkeypatch.setattr(preferences, "utc_now", lambda: store.now)
    hub = Hub()
    hub.add(bob)
    job = Preferences(hub, store)
    await job.run()
    store.silent = True
    store.changes["bob"] = (True, store.now)
    for _ in range(5):
        store.now += MINUTE
        with pytest.raises(PyMongoError):
            await job.run()
    seen = [bob.quiet]
    store.silent = False
    await job.run()
    seen.append(bob.quiet)
    store.changes["bob"] = (False, store.now)
    await job.run()
    seen.append(bob.quiet)
    assert seen == [False, True, False]


async def test_what_changed_long_ago_is_not_read_again(
    bob: LocalConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = Store()
    monkeypatch.setattr(preferences, "utc_now", lambda: store.now)
    hub = Hub()
    hub.add(bob)
    job = Preferences(hub, store)
    for _ in range(3):
        store.now += 2 * MINUTE
        await job.run()
    store.changes["bob"] = (True, store.now - 4 * MINUTE)
    await job.run()
    assert not bob.quiet
