"""``GET /v1/changes``: what a device that was away, or another device of the same person, has to know."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from relay.store import changes as module
from relay.wire.clock import wall_ms
from relay.wire.stamps import Stamps
from tests.support.node import Node

DAY_MS = 86_400_000


async def ask(
    node: Node, user: str, method: str, path: str, body: Any = None, device: str = "phone"
) -> tuple[int, Any]:
    return await node.request(method, path, user, device, body)


async def changes(node: Node, user: str, since: str | None = None, device: str = "phone") -> dict[str, Any]:
    """One answer, which has the promised shape."""
    query = "" if since is None else f"?since={since}"
    status, found = await ask(node, user, "GET", f"/v1/changes{query}", device=device)
    assert status == 200, found
    assert set(found) == {
        "conversations",
        "removed",
        "reads",
        "contacts",
        "devices",
        "me",
        "next",
        "more",
    }
    return dict(found)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told once is not told again: on one node in one process nothing becomes visible late."""
    monkeypatch.setattr(Stamps, "settled", lambda _: wall_ms())


async def test_a_new_device_is_told_everything(node: Node) -> None:
    group = await node.group("ann", ["bob"])
    await ask(node, "bob", "POST", "/v1/contacts", {"user": "ann", "name": "Annie"})
    found = await changes(node, "bob", device="tablet")
    assert found["conversations"] == [(await ask(node, "bob", "GET", f"/v1/conversations/{group}"))[1]]
    assert found["contacts"] == [{"user": "ann", "name": "Annie", "listed": True, "blocked": False}]
    assert {one["id"]: one["removed"] for one in found["devices"]} == {"phone": False, "tablet": False}
    assert set(found["devices"][0]) == {"id", "name", "platform", "removed", "createdAt"}
    assert (found["removed"], found["reads"], found["me"], found["more"]) == ([], [], True, False)


@pytest.mark.usefixtures("at_once")
async def test_mute_pin_and_archive_reach_the_other_device_and_nobody_else(node: Node) -> None:
    conv, other = await node.group("ann", ["bob"]), await node.group("ann", ["bob"])
    cursors = {user: (await changes(node, user, device="tablet"))["next"] for user in ("ann", "bob")}
    until = 1_900_000_000_000
    path = f"/v1/conversations/{conv}/me"
    for body in ({"pinned": True}, {"mutedUntil": until, "archived": True}):
        status, shown = await ask(node, "bob", "PATCH", path, body)
        assert status == 200
    (found,) = (await changes(node, "bob", cursors["bob"], "tablet"))["conversations"]
    assert found == shown
    assert (found["id"], found["me"]["mutedUntil"]) == (conv, until)
    assert (found["me"]["pinned"], found["me"]["archived"]) == (True, True)
    assert (await changes(node, "ann", cursors["ann"], "tablet"))["conversations"] == []
    cursor = (await changes(node, "bob", cursors["bob"], "tablet"))["next"]
    await ask(node, "bob", "PATCH", path, {"mutedUntil": None, "pinned": False, "archived": None})
    (found,) = (await changes(node, "bob", cursor, "tablet"))["conversations"]
    assert (found["me"]["mutedUntil"], found["me"]["pinned"], found["me"]["archived"]) == (None, False, False)
    assert other not in (found["id"],)


@pytest.mark.usefixtures("at_once")
async def test_members_and_settings_that_changed_are_told(node: Node) -> None:
    named, left, gone, joined = [await node.group("ann", ["bob", "cleo"]) for _ in range(4)]
    await ask(node, "ann", "DELETE", f"/v1/conversations/{joined}/members/bob")
    cursor = (await changes(node, "bob"))["next"]
    body = {"name": "new", "picture": "p1", "settings": {"whoMayPost": "moderators"}}
    await ask(node, "ann", "PATCH", f"/v1/conversations/{named}", body)
    await ask(node, "ann", "DELETE", f"/v1/conversations/{left}/members/bob")
    await ask(node, "ann", "DELETE", f"/v1/conversations/{gone}")
    await ask(node, "ann", "POST", f"/v1/conversations/{joined}/members", {"users": ["bob"]})
    found = await changes(node, "bob", cursor)
    shown = {one["id"]: one for one in found["conversations"]}
    assert set(shown) == {named, joined}
    assert (shown[named]["name"], shown[named]["picture"]) == ("new", "p1")
    assert shown[named]["settings"] == {"whoMayPost": "moderators"}
    assert sorted(found["removed"]) == sorted([left, gone])
    assert await changes(node, "zoe") | {"next": "", "devices": [], "me": True} == {
        "conversations": [],
        "removed": [],
        "reads": [],
        "contacts": [],
        "devices": [],
        "me": True,
        "next": "",
        "more": False,
    }


@pytest.mark.usefixtures("at_once")
async def test_read_cursors_contacts_devices_and_preferences_are_told(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    await ask(node, "bob", "GET", "/v1/me")
    await ask(node, "bob", "GET", "/v1/me", device="old")
    cursor = (await changes(node, "bob"))["next"]
    quiet = await changes(node, "bob", cursor)
    assert (quiet["reads"], quiet["contacts"], quiet["devices"], quiet["me"]) == ([], [], [], False)
    reads = {"acks": [], "reads": [{"conv": conv, "upTo": 17}]}
    assert (await ask(node, "cleo", "POST", "/v1/acks", reads))[0] == 200
    assert (await ask(node, "bob", "PATCH", "/v1/contacts/ann", {"blocked": True}))[0] == 200
    assert (await ask(node, "bob", "DELETE", "/v1/auth/devices/old"))[0] == 200
    assert (await ask(node, "bob", "PATCH", "/v1/me", {"name": "Bob"}))[0] == 200
    found = await changes(node, "bob", quiet["next"])
    assert [{**one, "at": 0} for one in found["reads"]] == [
        {"conv": conv, "user": "cleo", "upTo": 17, "at": 0}
    ]
    assert found["contacts"] == [{"user": "ann", "name": None, "listed": False, "blocked": True}]
    assert [(one["id"], one["removed"]) for one in found["devices"]] == [("old", True)]
    assert found["me"] is True
    of_ann = await changes(node, "ann", (await changes(node, "ann"))["next"])
    assert of_ann["contacts"] == [], "nobody is told that they were blocked"


async def test_pages_follow_while_there_is_more(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 3)
    made = [await node.group("ann", ["bob"]) for _ in range(8)]
    seen: list[str] = []
    cursor: str | None = None
    pages = 0
    more = True
    while more:
        found = await changes(node, "bob", cursor)
        seen += [one["id"] for one in found["conversations"]]
        cursor, more = found["next"], found["more"]
        pages += 1
    assert (seen, pages) == (made, 3)
    # What was changed within the last seconds is told again: some of it may have become visible late.
    assert [one["id"] for one in (await changes(node, "bob", cursor))["conversations"]] == made[:3]


async def test_an_old_cursor_must_begin_anew_and_garbage_is_a_bad_request(node: Node) -> None:
    cursor = (await changes(node, "bob"))["next"]
    parts = json.loads(base64.urlsafe_b64decode(cursor))

    def aged(days: float) -> str:
        text = json.dumps([parts[0], int(parts[1] - days * DAY_MS), *parts[2:]])
        return base64.urlsafe_b64encode(text.encode()).decode()

    assert (await ask(node, "bob", "GET", f"/v1/changes?since={aged(29.9)}"))[0] == 200
    status, found = await ask(node, "bob", "GET", f"/v1/changes?since={aged(30.1)}")
    assert (status, found["error"]["code"]) == (410, "resync")
    for query in (
        "since=",
        "since=x",
        "since=%00",
        "since=W10=",
        "since[$gt]=",
        "cursor=x",
        f"since={'A' * 3000}",
    ):
        status, found = await ask(node, "bob", "GET", f"/v1/changes?{query}")
        assert (status, found["error"]["code"]) == (400, "bad_request"), query
