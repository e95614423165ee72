"""A relay node in the test's own process, on a real mongod and a real socket, with a database of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
from pymongo import AsyncMongoClient
from pymongo.write_concern import WriteConcern

from config.settings import Settings
from relay import app
from relay.security.tokens import mint
from tests.support.databases import Databases
from tests.support.device import WireDevice

SECRET = "a secret for tests only, of more than 32 bytes"
RATES = [name for name in Settings.model_fields if name.startswith("rate_")]


class Node:
    """One node. ``db`` is an independent client's view of its database."""

    def __init__(self, relay: app.Relay, db: Any, http: aiohttp.ClientSession) -> None:
        self.relay = relay
        self.db = db
        self.http = http
        self.url = relay.url
        self._devices: list[WireDevice] = []

    def token(self, user: str, device: str, lifetime: int = 600) -> str:
        """A valid access token."""
        return mint(SECRET, user, device, audience="relay", lifetime=lifetime)

    def headers(self, user: str, device: str) -> dict[str, str]:
        """The header that authenticates a request."""
        return {"Authorization": f"Bearer {self.token(user, device)}"}

    async def request(
        self, method: str, path: str, user: str, device: str, body: Any = None
    ) -> tuple[int, Any]:
        """An authenticated HTTP request: status and parsed answer."""
        async with self.http.request(
            method, self.url + path, json=body, headers=self.headers(user, device)
        ) as response:
            return response.status, await response.json()

    async def direct(self, user: str, other: str, device: str = "phone") -> str:
        """The id of the direct conversation of two people (``user``'s device becomes known by asking)."""
        status, found = await self.request(
            "POST", "/v1/conversations", user, device, {"type": "direct", "members": [other]}
        )
        assert status in (200, 201), found
        return str(found["id"])

    async def group(
        self, user: str, others: list[str], device: str = "phone", *, announced: bool = False
    ) -> str:
        """The id of a new group. Unless ``announced`` nobody is told of it by a system message: a test of messages counts
        its own only."""
        if not announced:
            return await self._quiet_group(user, others, device)
        status, found = await self.request(
            "POST", "/v1/conversations", user, device, {"type": "group", "members": others, "name": "group"}
        )
        assert status == 201, found
        return str(found["id"])

    async def _quiet_group(self, user: str, others: list[str], device: str) -> str:
        # The device becomes known by asking, as it would by making the group.
        status, found = await self.request("GET", "/v1/conversations?limit=1", user, device)
        assert status == 200, found
        ctx = self.relay.context
        await ctx.accounts.add_users(others)
        conv, revision, _ = await ctx.revisions.create(user, "group", others, name="group", ref=None)
        assert revision is not None
        # Nobody can have resolved the recipients of a conversation that is new: there is nothing to invalidate.
        await ctx.revisions.apply(revision)
        await ctx.revisions.finish(revision)
        return conv

    async def connect(self, user: str, device: str = "phone", *, welcome: bool = True) -> WireDevice:
        """A connected device; its ``welcome`` and the first ``drained`` are left for the test unless ``welcome``,
        which takes the welcome frame off."""
        socket = await self.http.ws_connect(
            self.url + "/v1/ws", headers=self.headers(user, device), max_msg_size=0, protocols=("relay.v1",)
        )
        found = WireDevice(socket, user, device)
        self._devices.append(found)
        if welcome:
            found.welcome = await found.expect("welcome", seconds=12)
        return found

    async def close(self) -> None:
        """Closes the devices and stops the node."""
        for device in self._devices:
            await device.close()
        await self.relay.stop()


class NodeFactory:
    """Starts nodes for one test. They share one empty database unless told otherwise."""

    def __init__(self, uri: str, directory: Path, databases: Databases) -> None:
        self.uri = uri
        self.database = databases.take()
        self._databases = databases
        self._directory = directory
        self._nodes: list[Node] = []
        self._http = aiohttp.ClientSession()
        self._client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(uri, tz_aware=True)

    async def start(self, *, leases: bool = False, **settings: Any) -> Node:
        """A node with these settings on top of the defaults of a test. With ``leases`` it waits for those of other nodes as
        long as it really would."""
        values: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": 0,
            "data_dir": self._directory,
            "mongo_uri": self.uri,
            "mongo_database": self.database,
            "jwt_secret": SECRET,
            "drain_seconds": 2,
            # Every device of a test has one address, and is fast: a test of a limit sets it.
            "message_rate": 0,
            **dict.fromkeys(RATES, "off"),
            **settings,
        }
        relay = await app.start(Settings(**values))
        if not leases:
            relay.context.invalidation.lease = 0.1
        # What a test writes is seen by whoever reads what a majority has.
        database = self._client.get_database(
            values["mongo_database"], write_concern=WriteConcern(w="majority")
        )
        node = Node(relay, database, self._http)
        self._nodes.append(node)
        return node

    async def stop(self, node: Node) -> None:
        """Stops one node early."""
        self._nodes.remove(node)
        await node.close()

    async def close(self) -> None:
        """Stops every node and gives the database back."""
        for node in self._nodes:
            await node.close()
        await self._http.close()
        await self._databases.give(self._client, self.database)
        await self._client.close()
