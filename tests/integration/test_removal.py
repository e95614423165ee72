"""Who is added gets what is sent later; who is removed gets nothing committed later, and nobody's message waits for them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from handlers import changing
from relay import app
from relay.routing import invalidation
from relay.store import audience
from tests.support.device import WireDevice, new_id
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.waiting import arriving, until


async def ask(node: Node, user: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    return await node.request(method, path, user, "phone", body)


async def remove(node: Node, conv: str, user: str, by: str = "ann") -> None:
    assert (await ask(node, by, "DELETE", f"/v1/conversations/{conv}/members/{user}"))[0] == 200


async def add(node: Node, conv: str, user: str) -> None:
    path = f"/v1/conversations/{conv}/members"
    assert (await ask(node, "ann", "POST", path, {"users": [user]}))[0] == 200


async def waiting_for(node: Node, user: str, **query: Any) -> list[str]:
    """Ids of the messages in the database that wait for this user, without system messages."""
    mailbox = {"$regex": f"^{user}/"}
    found = node.db.messages.find({"awaiting": mailbox, "kind": {"$ne": "system"}, **query})
    return [one["id"] async for one in found]


async def recipients(node: Node, message: str) -> set[str]:
    found = await node.db.messages.find_one({"id": message})
    return set() if found is None else {key.partition("/")[0] for key in found["awaiting"]}


async def balanced(*nodes: Node) -> None:
    """Accepted is acknowledged, released, … and what waits in the database, over all nodes."""
    waiting = 0
    async for one in await nodes[0].db.messages.aggregate([{"$project": {"n": {"$size": "$awaiting"}}}]):
        waiting += one["n"]
    assert sum(node.relay.context.ledger.waiting for node in nodes) == waiting


async def status_of(device: WireDevice, conv: str, *messages: str) -> list[dict[str, Any]]:
    await device.put({"t": "status", "conv": conv, "ids": list(messages)})
    items = (await device.expect("status", conv=conv))["items"]
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


class Talker:
    """A device that sends as fast as it is answered, many messages at a time, until it is stopped."""

    def __init__(self, device: WireDevice, conv: str) -> None:
        self.device, self.conv = device, conv
        self.sent: list[str] = []
        self.stored: set[str] = set()
        self._stop = False
        self._task = asyncio.create_task(self._run(), name=f"talker {device.key}")

    async def _run(self) -> None:
        pending: set[str] = set()
        while not self._stop or pending:
            while not self._stop and len(pending) < 40:
                burst = [
                    {"t": "send", "id": new_id(), "conv": self.conv, "kind": "text", "body": "hello"}
                    for _ in range(8)
                ]
                self.sent += [str(one["id"]) for one in burst]
                pending |= {str(one["id"]) for one in burst}
                await self.device.put(*burst)
            found = await self.device.expect("stored")
            pending.discard(found["id"])
            self.stored.add(found["id"])

    async def stop(self) -> None:
        self._stop = True
        await self._task
        assert self.stored == set(self.sent)


async def test_who_is_added_gets_what_is_sent_later_and_nothing_before(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    before = await ann.sent(conv, "before")
    await add(node, conv, "cleo")
    after = await ann.sent(conv, "after")
    cleo = await node.connect("cleo")
    system, message = await cleo.expect("msg"), await cleo.expect("msg")
    assert (system["kind"], system["body"]) == (
        "system",
        {"event": "added", "by": "ann", "users": ["cleo"]},
    )
    assert message["id"] == after["id"]
    await cleo.nothing("msg", 0.2)
    assert await recipients(node, before["id"]) == {"bob"}
    assert (await ask(node, "cleo", "GET", f"/v1/conversations/{conv}/messages"))[1]["items"] == [
        system,
        message,
    ]


async def test_who_was_away_and_comes_back_gets_only_what_is_sent_since(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await ann.sent(conv, "as a member")
    await remove(node, conv, "bob")
    await ann.sent(conv, "while away")
    await add(node, conv, "bob")
    after = await ann.sent(conv, "back")
    # The release of the first time is done again, and leaves alone what is of the second.
    await node.db.releases.update_many({}, {"$set": {"dueAt": (await node.db.releases.find_one({}))["at"]}})
    await node.relay.context.releases.run_due()
    bob = await node.connect("bob")
    found = await arriving(bob, "msg")
    assert [one["body"] if one["kind"] == "text" else one["body"]["event"] for one in found] == [
        "removed",
        "added",
        "back",
    ]
    assert found[-1]["id"] == after["id"]
    await balanced(node)


async def test_nothing_committed_after_a_removal_is_for_who_was_removed_at_full_speed(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    cleo, tablet = await node.connect("cleo"), await node.connect("cleo", "tablet")
    talkers = [Talker(await node.connect(user), conv) for user in ("ann", "bob")]
    try:
        async with asyncio.timeout(10):
            while min(len(one.stored) for one in talkers) < 60:
                await asyncio.sleep(0.01)
        assert await waiting_for(node, "cleo")
        await remove(node, conv, "cleo")
        at_removal = [len(one.sent) for one in talkers]
        left = await waiting_for(node, "cleo")
        async with asyncio.timeout(10):
            while any(len(one.sent) < known + 100 for one, known in zip(talkers, at_removal, strict=True)):
                await asyncio.sleep(0.01)
    finally:
        for one in talkers:
            await one.stop()
    assert left == [], "what waited was released before the removal was answered"
    assert await waiting_for(node, "cleo") == []
    later = {message for one, known in zip(talkers, at_removal, strict=True) for message in one.sent[known:]}
    assert len(later) >= 200
    for device in (cleo, tablet):
        got = await arriving(device, "msg", 0.3)
        assert got[-1]["kind"] == "system" or any(one["kind"] == "system" for one in got)
        assert not later & {one["id"] for one in got}
    assert node.relay.context.ledger.count("released") > 0
    await balanced(node)
    # Every message went to both who stay.
    assert await node.db.messages.count_documents({"kind": "text", "awaiting": {"$size": 0}}) == 0
    assert await node.db.messages.count_documents({"kind": "text"}) == sum(len(one.sent) for one in talkers)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resolved is believed for half a second, and a release is done again two seconds later."""
    for place in (audience, invalidation):
        monkeypatch.setattr(place, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(app, "_SETTLE_SECONDS", 2.0)


async def released_twice(node: Node) -> None:
    """Waits until no release is left to do."""

    async def over() -> bool:
        return bool(await node.db.releases.count_documents({}) == 0)

    await until(over, 10, "the release is done for the second time")


@pytest.mark.usefixtures("short_lease")
async def test_a_second_node_with_a_warm_cache_commits_nothing_for_who_was_removed(
    nodes: NodeFactory,
) -> None:
    one, two = [await nodes.start(leases=True, commit_timeout_seconds=0.5) for _ in range(2)]
    conv = await one.group("ann", ["bob", "cleo"])
    talker = Talker(await two.connect("bob"), conv)
    try:
        async with asyncio.timeout(5):
            while len(talker.stored) < 40:
                await asyncio.sleep(0.01)
        await remove(one, conv, "cleo")
        at_removal = len(talker.sent)
        left = await waiting_for(one, "cleo")
        async with asyncio.timeout(5):
            while len(talker.sent) < at_removal + 100:
                await asyncio.sleep(0.01)
    finally:
        await talker.stop()
    assert left == []
    assert await waiting_for(one, "cleo") == []
    await released_twice(one)
    await balanced(one, two)


@pytest.mark.usefixtures("short_lease")
async def test_a_message_queued_for_longer_than_the_lease_resolves_its_recipients_again(
    nodes: NodeFactory,
) -> None:
    one, two = [
        await nodes.start(leases=True, commit_timeout_seconds=1.4, commits_in_flight=1) for _ in range(2)
    ]
    conv = await one.group("ann", ["bob", "cleo"])
    bob = await two.connect("bob")
    await bob.sent(conv, "warms the cache")
    async with failing(one, "insert", times=1, blockConnection=True, blockTimeMS=1000):
        slow = await bob.send(conv, "is being committed")
        await asyncio.sleep(0.1)
        queued = await bob.send(conv, "waits behind it")
        removing = asyncio.ensure_future(remove(one, conv, "cleo"))

        async def removed() -> bool:
            return bool(
                await one.db.memberships.count_documents({"user": "cleo", "removedAt": {"$ne": None}})
            )

        await until(removed, 1, "the removal is written")
        both = {"id": {"$in": [slow, queued]}}
        assert await one.db.messages.count_documents(both) == 0, "neither is committed"
        await bob.expect("stored", id=slow)
        assert await recipients(one, slow) == {"ann", "cleo"}, "it was resolved before"
        await bob.expect("stored", id=queued)
        assert await recipients(one, queued) == {"ann"}
        assert not removing.done()
    await removing
    assert await recipients(one, slow) == {"ann"}, "what was on its way is released before the answer"
    await released_twice(one)
    await balanced(one, two)


async def test_a_node_that_was_stopped_for_longer_than_all_others_wait_loses_to_the_second_release(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is not seen to live commits to recipients of long ago: nobody waits for it, the release is repeated."""
    monkeypatch.setattr(app, "_SETTLE_SECONDS", 2.0)
    # Only what a change waits for is short here, not what the other node believes.
    monkeypatch.setattr(invalidation, "LEASE_SECONDS", 0.1)
    one, two = [await nodes.start(leases=True, commit_timeout_seconds=0.5) for _ in range(2)]
    conv = await one.group("ann", ["bob", "cleo"])
    bob = await two.connect("bob")
    await bob.sent(conv, "warms the cache")
    long_ago = (await one.db.memberships.find_one({"_id": f"{conv} cleo"}))["joinedAt"] - timedelta(minutes=1)
    await one.db.nodes.update_many({}, {"$set": {"at": long_ago}})
    await remove(one, conv, "cleo")
    straggler = await bob.sent(conv, "resolved before")
    assert await recipients(one, straggler["id"]) == {"ann", "cleo"}
    await released_twice(one)
    assert await recipients(one, straggler["id"]) == {"ann"}
    await balanced(one, two)


async def test_a_message_that_was_being_committed_on_the_same_node_is_not_for_who_was_removed(
    node: Node,
) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    bob, cleo = await node.connect("bob"), await node.connect("cleo")
    await bob.sent(conv, "warms the cache")
    first = await cleo.expect("msg")
    await cleo.ack(conv, first["id"])
    async with failing(node, "insert", times=1, blockConnection=True, blockTimeMS=600):
        slow = await bob.send(conv, "is being committed")
        await asyncio.sleep(0.1)
        removing = asyncio.ensure_future(remove(node, conv, "cleo"))
        await bob.expect("stored", id=slow)
        await removing
    assert await recipients(node, slow) == {"ann"}
    assert (await cleo.expect("msg"))["kind"] == "system"
    await cleo.nothing("msg", 0.2)
    await balanced(node)


async def test_what_waits_for_who_is_removed_is_released_or_delivered_and_status_tells(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    got, waits = await ann.sent(conv), await ann.sent(conv)
    await bob.ack(conv, got["id"])
    assert await status_of(ann, conv, got["id"], waits["id"]) == [
        {"awaiting": 1, "delivered": ["bob"]},
        {"awaiting": 2, "delivered": []},
    ]
    await remove(node, conv, "cleo")
    assert await status_of(ann, conv, got["id"], waits["id"]) == [
        {"gone": True, "fate": "delivered", "delivered": ["bob"]},
        {"awaiting": 1, "delivered": []},
    ]
    await remove(node, conv, "bob")
    assert await status_of(ann, conv, waits["id"]) == [{"gone": True, "fate": "released", "delivered": []}]
    assert node.relay.context.ledger.count("released") == 3
    await balanced(node)


async def test_what_waits_in_other_conversations_stays(node: Node) -> None:
    conv, other = await node.group("ann", ["bob"]), await node.group("ann", ["bob"])
    pair = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    kept = [(await ann.sent(name))["id"] for name in (other, pair)]
    await ann.sent(conv)
    await remove(node, conv, "bob")
    assert sorted(await waiting_for(node, "bob")) == sorted(kept)


async def test_a_removed_device_that_was_away_is_told_when_it_connects(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    tablet = await node.connect("cleo", "tablet")
    await tablet.close()
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await ann.sent(conv)
    await remove(node, conv, "cleo")
    expected = {"event": "removed", "by": "ann", "users": ["cleo"]}
    for device in (ann, bob):
        assert (await device.expect("msg", kind="system"))["body"] == expected
    # Also after the second pass of the release.
    await node.db.releases.update_many(
        {}, [{"$set": {"at": {"$subtract": ["$at", 60_000]}, "dueAt": {"$subtract": ["$at", 60_000]}}}]
    )
    await node.relay.context.releases.run_due()

    # The job may have been faster, and not be done yet.
    async def done() -> bool:
        return bool(await node.db.releases.count_documents({}) == 0)

    await until(done, 10, "the release has had its second pass")
    tablet = await node.connect("cleo", "tablet")
    system = await tablet.expect("msg")
    assert (system["kind"], system["from"]["user"], system["body"]) == ("system", "$relay", expected)
    await tablet.nothing("msg", 0.2)
    assert (await ask(node, "cleo", "GET", f"/v1/conversations/{conv}"))[0] == 404
    await tablet.ack(conv, system["id"])
    assert "cleo" not in await recipients(node, system["id"])
    await balanced(node)


async def test_who_was_removed_cannot_write_but_hears_again_of_what_was_stored(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    bob = await node.connect("bob")
    stored = await bob.sent(conv, "while a member")
    await remove(node, conv, "bob")
    message = await bob.send(conv, "too late")
    assert (await bob.expect("error", id=message))["code"] == "not_member"
    again = await bob.sent(conv, "while a member", id=stored["id"], again=True)
    assert again == stored
    assert await node.db.messages.count_documents({"id": message}) == 0


async def test_a_dissolved_group_takes_no_messages_and_keeps_what_waits(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    message = await ann.sent(conv)
    assert (await ask(node, "ann", "DELETE", f"/v1/conversations/{conv}"))[0] == 200
    refused = await ann.send(conv)
    assert (await ann.expect("error", id=refused))["code"] == "not_member"
    assert (await bob.expect("msg", kind="text"))["id"] == message["id"]
    system = await bob.expect("msg", kind="system")
    assert system["body"] == {"event": "dissolved", "by": "ann", "users": ["ann", "bob"]}
    await bob.ack(conv, message["id"], system["id"])
    assert await waiting_for(node, "bob") == []
    await balanced(node)


async def test_credit_for_what_is_released_comes_back(nodes: NodeFactory) -> None:
    """A device that acknowledges nothing of a group it is removed from goes on to get messages of others."""
    node = await nodes.start(window=8)
    conv, other = await node.group("ann", ["bob"]), await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    for _ in range(8):
        await ann.sent(conv)
    for _ in range(8):
        await bob.expect("msg", conv=conv)
    later = await ann.sent(other)
    await bob.nothing("msg", 0.2)
    await remove(node, conv, "bob")
    found = {(await bob.expect("msg"))["id"] for _ in range(2)}
    assert later["id"] in found


async def test_an_erased_person_leaves_groups_in_good_hands(node: Node) -> None:
    last, shared, alone = (
        await node.group("ann", ["bob", "cleo"]),
        await node.group("bob", ["ann"]),
        await node.group("ann", []),
    )
    pair = await node.direct("ann", "bob")
    await node.db.memberships.update_one({"_id": f"{last} cleo"}, {"$set": {"role": "moderator"}})
    for _ in range(2):
        await changing.leave_all(node.relay.context, "ann")
    rows = node.db.memberships.find({"removedAt": None})
    assert sorted([(row["conversationId"], row["user"], row["role"]) async for row in rows]) == sorted(
        [(last, "bob", "member"), (last, "cleo", "admin"), (shared, "bob", "admin"), (pair, "bob", "member")]
    )
    assert "dissolvedAt" in await node.db.conversations.find_one({"_id": alone})
    assert await node.db.conversations.count_documents({"createdBy": "ann"}) == 0
