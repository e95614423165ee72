"""The nodes' clock goes back, as it does when MongoDB's next primary is behind: what changes afterwards is told all the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from relay.store.timekeeping import Timekeeper
from relay.wire import clock, stamps
from relay.wire.clock import steer, wall_ms
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until

HOUR_NS = 3600 * 1_000_000_000


@pytest.fixture
def back(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """From now on all nodes go by a clock that is an hour behind."""
    before = clock._ahead

    def goes_back() -> None:
        monkeypatch.setattr(Timekeeper, "take", lambda *_: None)
        steer(clock.wall_ns() - clock.steady_ns() - HOUR_NS)

    yield goes_back
    steer(before)


async def ask(node: Node, user: str, method: str, path: str, body: Any = None, device: str = "phone") -> Any:
    status, found = await node.request(method, path, user, device, body)
    assert status in (200, 201), found
    return found


async def changes(node: Node, since: str | None = None) -> dict[str, Any]:
    return dict(await ask(node, "bob", "GET", "/v1/changes" + ("" if since is None else f"?since={since}")))


@pytest.mark.parametrize("fresh", [False, True], ids=["the same node", "a node that started afterwards"])
async def test_what_changes_after_the_clock_went_back_is_told_to_who_asked_before(
    nodes: NodeFactory, back: Callable[[], None], monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    node = await nodes.start()
    mine, left, theirs = [await node.group("ann", ["bob"]) for _ in range(3)]
    await node.connect("ann")
    await ask(node, "bob", "POST", "/v1/contacts", {"user": "ann"})
    # A cursor of a node that runs for a while.
    monkeypatch.setattr(stamps, "MARGIN_SECONDS", 1)

    async def settled() -> bool:
        return (stamps.STAMPS.settled() or 0) > wall_ms() - 30_000

    await until(settled, 15, "the node knows how far a cursor may go")
    cursor = (await changes(node))["next"]
    before = wall_ms()
    back()
    assert wall_ms() < before - 3_000_000
    if fresh:
        await nodes.stop(node)
        # What a process has heard goes with it.
        stamps.STAMPS._last = 0
        stamps.STAMPS._heard.clear()
        node = await nodes.start()
    for made in ("users", "devices", "memberships", "contacts"):
        # As if all of it had been made long ago.
        await node.db[made].update_many(
            {}, [{"$set": {"updatedAt": {"$subtract": ["$$NOW", 2 * HOUR_NS // 1_000_000]}}}]
        )
    quiet = await changes(node, cursor)
    assert (quiet["conversations"], quiet["contacts"], quiet["devices"], quiet["me"]) == ([], [], [], False)

    conv = await node.group("ann", ["bob"])
    acts: list[Awaitable[Any]] = [
        ask(node, "bob", "PATCH", f"/v1/conversations/{mine}/me", {"pinned": True}),
        ask(node, "ann", "DELETE", f"/v1/conversations/{left}/members/bob"),
        ask(node, "ann", "PATCH", f"/v1/conversations/{theirs}", {"name": "new"}),
        ask(node, "bob", "PATCH", "/v1/contacts/ann", {"name": "Annie"}),
        ask(node, "bob", "GET", "/v1/me", device="tablet"),
        ask(node, "bob", "PATCH", "/v1/me", {"name": "Bob"}),
    ]
    for act in acts:
        await act
    bob = await node.connect("bob", "laptop")
    await bob.put({"t": "read", "conv": mine, "upTo": 7, "ref": "r"})
    await bob.expect("done", ref="r")
    found = await changes(node, cursor)
    assert {one["id"] for one in found["conversations"]} >= {conv, mine, theirs}
    assert found["removed"] == [left]
    assert [one["name"] for one in found["contacts"]] == ["Annie"]
    assert {one["id"] for one in found["devices"]} >= {"tablet", "laptop"}
    assert found["me"]
    assert [one["conv"] for one in found["reads"]] == [mine]
