"""Databases for nodes under test, used again: making every index anew takes longer than most tests."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase

Shape = tuple[frozenset[str], int]

makers: dict[str, Callable[[str], Awaitable[str]]] = {}
"""By URI: how a database is made where that takes more than naming it. A cluster's collections are sharded before they are used."""


async def make_database(uri: str, name: str) -> str:
    """A database of this name may be used; returns the name."""
    maker = makers.get(uri)
    return name if maker is None else await maker(name)


class Databases:
    """Empty databases of one server. One that a test leaves with other collections, options or numbers of indexes than a
    node makes is dropped, and so is one that something still works on."""

    def __init__(self) -> None:
        self._spare: list[str] = []
        self._usual: Shape | None = None

    def take(self) -> str:
        """The name of a database without documents; it has the indexes of a node, or does not exist yet."""
        return self._spare.pop() if self._spare else f"t{uuid.uuid4().hex[:20]}"

    async def give(self, client: AsyncMongoClient[dict[str, Any]], name: str) -> None:
        """A test has ended and its nodes have stopped."""
        database = client[name]
        shape = await _shape(database)
        if self._usual is None and shape[1]:
            self._usual = shape
        if shape != self._usual or await self._is_busy(client, name):
            await client.drop_database(name)
            return
        for collection in await database.list_collection_names():
            await database[collection].delete_many({})
        self._spare.append(name)

    async def _is_busy(self, client: AsyncMongoClient[dict[str, Any]], name: str) -> bool:
        return await is_busy(client, name)


async def is_busy(client: AsyncMongoClient[dict[str, Any]], name: str) -> bool:
    """Whether an operation that its client no longer waits for goes on, and may still write."""
    found = await client.admin.command({"currentOp": 1, "ns": {"$regex": f"^{name}[.]"}})
    return bool(found["inprog"])


async def _shape(database: AsyncDatabase[dict[str, Any]]) -> Shape:
    collections = await (await database.list_collections()).to_list()
    described = frozenset(f"{found['name']} {found['type']} {found.get('options')}" for found in collections)
    return described, int((await database.command("dbStats"))["indexes"])
