"""The message store that the tests of a module share, empty for each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from relay.store.embedded import EmbeddedMongo
from tests.support.store import Store, open_store


@pytest.fixture(scope="module")
async def opened(mongod: EmbeddedMongo) -> AsyncIterator[Store]:
    async with open_store(mongod.uri) as store:
        yield store


@pytest.fixture
async def store(opened: Store) -> Store:
    await opened.clear()
    return opened
