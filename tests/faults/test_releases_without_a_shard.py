"""One of two shards does not answer while a device or a person goes: what lives is released at once, the rest when it is back."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster import Cluster
from tests.faults.test_dead_shard import without_s2
from tests.integration.test_keys import upload
from tests.support.logins import ask, logged_in, login, noted, register
from tests.support.node import Node, NodeFactory
from tests.support.sharded import SHARDS, cluster, nodes, sharded
from tests.support.waiting import until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

BACK_SECONDS = 40


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(send_deadline_seconds=3, commit_timeout_seconds=1)


class Bob:
    """Somebody with a phone and a tablet, for both of which a message waits on either shard."""

    def __init__(self, cluster: Cluster, node: Node, made: dict[str, Any], messages: dict[str, str]) -> None:
        self.made = made
        self.id: str = made["user"]["id"]
        self.tablet: dict[str, Any] = {}
        self._cluster = cluster
        self._node = node
        self._messages = messages

    async def awaiting(self, shard: str) -> set[str]:
        """His devices that the message on this shard waits for."""
        server = self._cluster.shards[SHARDS.index(shard)]
        found = await server.client[self._node.db.name].messages.find_one({"id": self._messages[shard]})
        return {key.removeprefix(f"{self.id}/") for key in found["awaiting"]} if found else set()

    async def all_released(self) -> bool:
        """Nothing waits for his tablet any more, and nothing more is planned to be released but once again."""
        if await self.awaiting("s2") != {"phone"}:
            return False
        return not await self._node.db.releases.count_documents({"passes": 0})


@pytest.fixture
async def bob(cluster: Cluster, node: Node) -> Bob:
    made = await register(node)
    messages: dict[str, str] = {}
    found = Bob(cluster, node, made, messages)
    found.tablet = await logged_in(node, made, "tablet")
    ann = await node.connect("ann")
    for shard in SHARDS:
        conv = ""
        while not conv or (conv < "8") != (shard == "s1"):
            conv = await node.group("ann", [found.id])
        messages[shard] = (await ann.sent(conv))["id"]
        assert await found.awaiting(shard) == {"phone", "tablet"}
    return found


async def revoked(node: Node, bob: Bob) -> int:
    status, _ = await ask(node, "DELETE", "/v1/auth/devices/tablet", token=bob.made["accessToken"])
    return status


async def logged_out(node: Node, bob: Bob) -> int:
    status, _ = await ask(node, "POST", "/v1/auth/logout", token=bob.tablet["accessToken"])
    return status


async def reset(node: Node, bob: Bob) -> int:
    status, _ = await login(node, bob.made, "tablet", reset=True)
    return status


async def relinked(node: Node, bob: Bob) -> int:
    changed = upload(identityKey="b3RoZXI=")
    status, _ = await ask(node, "PUT", "/v1/keys", changed, token=bob.tablet["accessToken"])
    return status


WAYS = {
    "device.revoke": revoked,
    "device.revoke by itself": logged_out,
    "session.open": reset,
    "keys.replace": relinked,
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_device_that_goes_is_done_with_at_once_but_for_what_waits_on_the_dead_shard(
    cluster: Cluster, node: Node, bob: Bob, way: str
) -> None:
    act = way.partition(" ")[0]
    if act == "keys.replace":
        assert (await ask(node, "PUT", "/v1/keys", upload(), token=bob.tablet["accessToken"]))[0] == 200
    before = len(await noted(node, bob.id, act))
    async with without_s2(cluster, node):
        assert await WAYS[way](node, bob) == 200
        assert len(await noted(node, bob.id, act)) == before + 1
        assert await bob.awaiting("s1") == {"phone"}
        assert await node.db.releases.count_documents({"mailbox": f"{bob.id}/tablet", "passes": 0}) == 1
    await until(bob.all_released, BACK_SECONDS, "what waited on the shard that was dead is released")


async def test_a_device_that_goes_when_a_shard_has_just_died_is_done_with_as_soon_as_that_is_known(
    cluster: Cluster, node: Node, bob: Bob
) -> None:
    async def here() -> bool:
        return await bob.awaiting("s1") == {"phone"}

    cluster.shards[1].stop()
    try:
        assert await revoked(node, bob) == 200
        await until(here, BACK_SECONDS, "what waited on the shard that lives is released")
    finally:
        cluster.shards[1].resume()
    await until(bob.all_released, BACK_SECONDS, "what waited on the shard that was dead is released")
