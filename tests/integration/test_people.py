"""People, contacts and reports as an app meets them: over HTTP, on a running node."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.support.node import Node, NodeFactory

GONE = "no such user"


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """A node that counts no searches: tests of limits set their own."""
    return await nodes.start(rate_search="off", rate_search_phone="off", rate_report="off")


async def ask(node: Node, method: str, path: str, user: str, body: Any = None, *, status: int = 200) -> Any:
    """The answer to a request of this user's phone."""
    found, answer = await node.request(method, path, user, "phone", body)
    assert found == status, answer
    return answer


async def known(node: Node, *users: str, **fields: Any) -> None:
    """People whom a token brought, with these fields in their profiles."""
    for user in users:
        await ask(node, "PATCH", "/v1/me", user, fields)


async def search(node: Node, user: str, q: str) -> list[str]:
    answer = await ask(node, "GET", "/v1/users?" + urlencode({"q": q}), user)
    return [one["id"] for one in answer["items"]]


async def all_items(node: Node, user: str, path: str, limit: int) -> list[Any]:
    """Everything a list tells, page by page."""
    found: list[Any] = []
    page = f"{path}limit={limit}"
    for _ in range(100):
        answer = await ask(node, "GET", page, user)
        assert len(answer["items"]) <= limit
        found += answer["items"]
        if answer["next"] is None:
            return found
        page = f"{path}limit={limit}&cursor={quote(answer['next'])}"
    raise AssertionError("the list has no end")


# The profile


async def test_a_person_whom_a_token_brought_has_a_profile_to_fill(node: Node) -> None:
    own = await ask(node, "GET", "/v1/me", "ann")
    created = own.pop("createdAt")
    assert isinstance(created, int)
    assert own == {
        "id": "ann",
        "username": None,
        "name": None,
        "phone": None,
        "picture": None,
        "about": None,
        "preferences": {
            "findableByName": True,
            "findableByPhone": True,
            "whoMayMessage": "anyone",
            "whoMayAdd": "anyone",
            "deliveredReceipts": True,
            "readReceipts": True,
        },
    }
    changed = await ask(
        node,
        "PATCH",
        "/v1/me",
        "ann",
        {
            "name": " Ann Lee ",
            "phone": "+49 (30) 555-0100",
            "picture": "pic_1",
            "about": "at work\nuntil five",
            "preferences": {"whoMayAdd": "contacts", "findableByPhone": False, "readReceipts": False},
        },
    )
    assert changed == await ask(node, "GET", "/v1/me", "ann")
    assert (changed["name"], changed["phone"]) == ("Ann Lee", "+49305550100")
    assert (changed["picture"], changed["about"]) == ("pic_1", "at work\nuntil five")
    assert changed["preferences"] == {
        "findableByName": True,
        "findableByPhone": False,
        "whoMayMessage": "anyone",
        "whoMayAdd": "contacts",
        "deliveredReceipts": True,
        "readReceipts": False,
    }
    assert changed["createdAt"] == created
    cleared = await ask(
        node,
        "PATCH",
        "/v1/me",
        "ann",
        {"name": None, "phone": None, "picture": None, "about": None, "preferences": None},
    )
    assert cleared == {**own, "createdAt": created}


NO_PROFILES: list[Any] = [
    {"name": ""},
    {"name": "   "},
    {"name": "x" * 65},
    {"name": "a\0b"},
    {"name": "a\nb"},
    {"name": "a\u202eb"},
    {"name": 1},
    {"name": True},
    {"name": ["Ann"]},
    {"name": {"$ne": 1}},
    {"phone": "0305550100"},
    {"phone": "+1"},
    {"phone": "+" + "1" * 30},
    {"phone": {"$gt": ""}},
    {"picture": "../x"},
    {"picture": ""},
    {"about": "x" * 257},
    {"about": "\x07"},
    {"preferences": {"whoMayMessage": "friends"}},
    {"preferences": {"findableByName": "true"}},
    {"preferences": {"findableByName": 1}},
    {"preferences": {"more": True}},
    {"preferences": []},
    {"username": "other"},
    {"id": "bob"},
    {"suspendedAt": None},
    [],
    "Ann",
    None,
]


async def test_a_profile_takes_nothing_else(node: Node) -> None:
    before = await ask(node, "GET", "/v1/me", "ann")
    for body in NO_PROFILES:
        found, answer = await node.request("PATCH", "/v1/me", "ann", "phone", body)
        assert (found, answer["error"]["code"]) == (400, "bad_request"), body
    assert await ask(node, "GET", "/v1/me", "ann") == before


async def test_changes_of_different_fields_at_once_all_last(node: Node) -> None:
    await ask(node, "GET", "/v1/me", "ann")
    wanted: dict[str, Any] = {"name": "Ann", "phone": "+49305550100", "picture": "p1", "about": "here"}
    preferences = {
        "findableByPhone": False,
        "whoMayMessage": "contacts",
        "whoMayAdd": "contacts",
        "deliveredReceipts": False,
        "readReceipts": False,
    }
    await asyncio.gather(
        *(ask(node, "PATCH", "/v1/me", "ann", {name: value}) for name, value in wanted.items()),
        *(
            ask(node, "PATCH", "/v1/me", "ann", {"preferences": {name: value}})
            for name, value in preferences.items()
        ),
    )
    own = await ask(node, "GET", "/v1/me", "ann")
    assert {name: own[name] for name in wanted} == wanted
    assert own["preferences"] == {"findableByName": True, **preferences}
    assert await search(node, "bob", "ann") == ["ann"]
    assert await search(node, "bob", "+49305550100") == []


async def test_push_is_kept_on_the_device_that_asks(node: Node) -> None:
    await ask(node, "PUT", "/v1/me/push", "ann", {"provider": "expo", "token": "T[1]"})
    found, _ = await node.request("GET", "/v1/me", "ann", "tablet")
    assert found == 200
    rows = {row["_id"]: row.get("push") async for row in node.db.devices.find({})}
    assert rows == {"ann/phone": {"provider": "expo", "token": "T[1]"}, "ann/tablet": None}
    await ask(node, "DELETE", "/v1/me/push", "ann")
    assert "push" not in await node.db.devices.find_one({"_id": "ann/phone"})
    for body in (
        {},
        {"provider": "expo"},
        {"provider": "smoke", "token": "t"},
        {"provider": "expo", "token": ""},
        {"provider": "expo", "token": "x" * 513},
        {"provider": "expo", "token": {"$ne": 1}},
        {"provider": "expo", "token": "t", "device": "tablet"},
    ):
        assert (await ask(node, "PUT", "/v1/me/push", "ann", body, status=400))["error"][
            "code"
        ] == "bad_request"


# Others


async def test_others_see_the_public_profile_and_presence_only_when_it_concerns_them(node: Node) -> None:
    await known(node, "ann", name="Ann", phone="+49305550100", about="here", picture="p1")
    await known(node, "bob", "cleo")
    public = {"id": "ann", "username": None, "name": "Ann", "picture": "p1", "about": "here"}
    hidden = public | {"online": None, "lastSeen": None}
    assert await ask(node, "GET", "/v1/users/ann", "bob") == hidden
    # Listing somebody does not open what they show.
    await ask(node, "POST", "/v1/contacts", "bob", {"user": "ann"}, status=201)
    assert await ask(node, "GET", "/v1/users/ann", "bob") == hidden
    await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}, status=201)
    seen = await ask(node, "GET", "/v1/users/ann", "bob")
    assert seen["online"] is False
    assert isinstance(seen["lastSeen"], int)
    device = await node.connect("ann", "tablet")
    assert (await ask(node, "GET", "/v1/users/ann", "bob"))["online"] is True
    assert (await ask(node, "GET", "/v1/users/ann", "ann"))["online"] is True
    assert await ask(node, "GET", "/v1/users/ann", "cleo") == hidden
    await node.direct("cleo", "ann")
    assert (await ask(node, "GET", "/v1/users/ann", "cleo"))["online"] is True
    await device.close()


async def test_who_is_blocked_sees_somebody_who_went_away_at_that_moment(node: Node) -> None:
    """Whether listed or met in a conversation: presence that were hidden all at once would tell of the block."""
    await known(node, "ann", "bob", "cleo", "dan", name="Ann")
    await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}, status=201)
    await node.direct("cleo", "ann")
    device = await node.connect("ann", "tablet")
    for other in ("bob", "cleo"):
        assert (await ask(node, "GET", "/v1/users/ann", other))["online"] is True
    before = int(time.time() * 1000)
    for other in ("bob", "cleo", "dan"):
        await ask(node, "PATCH", f"/v1/contacts/{other}", "ann", {"blocked": True})
    after = int(time.time() * 1000)
    later = datetime.now(UTC) + timedelta(hours=1)
    await node.db.devices.update_one({"_id": "ann/tablet"}, {"$set": {"lastSeen": later}})
    for other in ("bob", "cleo"):
        await ask(node, "PATCH", f"/v1/contacts/{other}", "ann", {"name": "Other"})
        seen = await ask(node, "GET", "/v1/users/ann", other)
        assert seen["online"] is False
        assert before <= seen["lastSeen"] <= after
    # Who was shown nothing before is shown nothing now.
    hidden = await ask(node, "GET", "/v1/users/ann", "dan")
    assert (hidden["online"], hidden["lastSeen"]) == (None, None)
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"blocked": False})
    assert (await ask(node, "GET", "/v1/users/ann", "bob"))["online"] is True
    await device.close()


async def test_unknown_suspended_and_impossible_people_look_the_same(node: Node) -> None:
    await known(node, "ann", "bob", "cleo", name="Person")
    await node.db.users.update_one({"_id": "bob"}, {"$set": {"suspendedAt": datetime.now(UTC)}})
    await node.db.users.update_one({"_id": "cleo"}, {"$set": {"erasingAt": datetime.now(UTC)}})
    answers = []
    for user in ("nobody", "bob", "cleo", "%24relay", "a%00b", "x" * 200, "%22%24ne%22"):
        answers.append(await ask(node, "GET", f"/v1/users/{user}", "ann", status=404))
    assert len({json.dumps(answer) for answer in answers}) == 1
    for user in ("nobody", "bob", "cleo"):
        body = {"user": user}
        assert (await ask(node, "POST", "/v1/contacts", "ann", body, status=404))["error"]["message"] == GONE
        body = {"user": user, "reason": "spam"}
        assert (await ask(node, "POST", "/v1/reports", "ann", body, status=404))["error"]["message"] == GONE
        path = f"/v1/contacts/{user}"
        assert (await ask(node, "PATCH", path, "ann", {"blocked": True}, status=404))["error"][
            "message"
        ] == GONE


# The search


async def test_a_search_pages_completely_and_is_remembered_once(node: Node) -> None:
    for number in range(12):
        await known(node, f"u{number:02}", name=f"Ann {'abc'[number % 3]}")
    for limit in (1, 5, 50):
        found = await all_items(node, "me", "/v1/users?q=ann&", limit)
        assert [one["id"] for one in found] == [
            f"u{number:02}" for start in range(3) for number in range(start, 12, 3)
        ]
        assert set(found[0]) == {"id", "username", "name", "picture", "about"}
    await search(node, "me", "  Ann c ")
    await search(node, "me", "+49305550100")
    kept = await ask(node, "GET", "/v1/me/searches", "me")
    assert [one["q"] for one in kept["items"]] == ["+49305550100", "Ann c", "ann"]
    assert all(isinstance(one["at"], int) for one in kept["items"])
    assert kept["next"] is None
    await ask(node, "DELETE", "/v1/me/searches", "me")
    assert (await ask(node, "GET", "/v1/me/searches", "me"))["items"] == []


async def test_who_blocked_me_is_found_by_me_as_before(node: Node) -> None:
    await known(node, "ann", "bob", name="Zoe", phone="+49305550100")
    await known(node, "me")
    await ask(node, "PATCH", "/v1/contacts/me", "ann", {"blocked": True})
    for q in ("zoe", "+49305550100"):
        assert await search(node, "me", q) == ["ann", "bob"]
    assert (await node.request("GET", "/v1/users/ann", "me", "phone"))[0] == 200


NO_SEARCHES: list[str] = [
    "",
    "q=",
    "q=a",
    "q=+",
    "q=%20%20a%20%20",
    "q=" + "x" * 65,
    "q=a%00b",
    "q=a%0Ab",
    "q[$ne]=1",
    "q=ann&limit=0",
    "q=ann&limit=51",
    "q=ann&limit=x",
    "q=ann&limit=1e1",
    "q=ann&limit=%D9%A1",
    "q=ann&cursor=x",
    "q=ann&cursor=WzEsImEiXQ==",
    "q=ann&more=1",
    "name=ann",
]


async def test_a_search_that_is_none_is_refused(node: Node) -> None:
    for query in NO_SEARCHES:
        found, answer = await node.request("GET", f"/v1/users?{query}", "ann", "phone")
        assert (found, answer["error"]["code"]) == (400, "bad_request"), query
    assert (await ask(node, "GET", "/v1/me/searches", "ann"))["items"] == []


async def test_searches_are_counted_and_those_by_phone_by_themselves(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_search="3/minute", rate_search_phone="2/minute")
    await known(node, "ann")

    async def status(q: str, user: str = "ann") -> int:
        return (await node.request("GET", f"/v1/users?q={q}", user, "phone"))[0]

    assert [await status("zoe") for _ in range(4)] == [200, 200, 200, 429]
    assert [await status("%2B49305550100") for _ in range(3)] == [200, 200, 429]
    assert await status("zoe", "bob") == 200
    async with node.http.get(node.url + "/v1/users?q=zoe", headers=node.headers("ann", "phone")) as response:
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == "rate_limited"


async def test_the_phone_book_is_not_walked_by_many_accounts_of_one_address(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_search_phone="2/minute", rate_search_phone_address="3/minute")
    found = [
        (await node.request("GET", "/v1/users?q=%2B49305550100", f"u{number}", "phone"))[0]
        for number in range(4)
    ]
    assert found == [200, 200, 200, 429]
    assert (await node.request("GET", "/v1/users?q=zoe", "u9", "phone"))[0] == 200


async def test_what_is_recorded_is_limited(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_contact_change="2/minute", rate_profile_change="3/minute")
    await known(node, "bob", name="Bob")

    async def status(method: str, path: str, body: Any) -> int:
        return (await node.request(method, path, "ann", "phone", body))[0]

    blocks = [await status("PATCH", "/v1/contacts/bob", {"blocked": flag}) for flag in (True, False, True)]
    assert blocks == [200, 200, 429]
    # Only what is recorded: names and lists are not.
    assert await status("POST", "/v1/contacts", {"user": "bob"}) == 201
    assert await status("PATCH", "/v1/contacts/bob", {"name": "Rob"}) == 200
    push = {"provider": "expo", "token": "t"}
    changes = [
        await status("PATCH", "/v1/me", {"name": "Ann"}),
        await status("PUT", "/v1/me/push", push),
        await status("DELETE", "/v1/me/push", None),
        await status("PATCH", "/v1/me", {"name": "Ann"}),
        await status("PUT", "/v1/me/push", push),
    ]
    assert changes == [200, 200, 200, 429, 429]
    assert await node.db.audit.count_documents({"act": {"$nin": ["profile.change", "device.provision"]}}) == 4


async def test_changes_of_the_profile_are_recorded_without_their_values(node: Node) -> None:
    body = {"phone": "+49305550100", "preferences": {"whoMayAdd": "contacts", "findableByName": True}}
    await ask(node, "PATCH", "/v1/me", "ann", body)
    await ask(node, "PATCH", "/v1/me", "ann", {})
    await ask(node, "PUT", "/v1/me/push", "ann", {"provider": "expo", "token": "a-token"})
    await ask(node, "DELETE", "/v1/me/push", "ann")
    rows = [row async for row in node.db.audit.find({}).sort("_id", 1)]
    assert [(row["act"], row["details"]) for row in rows] == [
        ("device.provision", {"returned": False, "account": True}),
        ("profile.change", {"fields": "findableByName phone whoMayAdd"}),
        ("push.set", {}),
        ("push.unset", {}),
    ]
    assert {row["personal"]["device"]["value"] for row in rows} == {"phone"}
    for value in ("5550100", "a-token", "contacts"):
        assert value not in str(rows)


@pytest.mark.parametrize("act", ["contact.block", "report.add"])
async def test_what_cannot_be_recorded_is_not_done(node: Node, act: str) -> None:
    await known(node, "ann", "bob")
    if act == "contact.block":
        wanted: tuple[str, str, Any] = ("PATCH", "/v1/contacts/bob", {"blocked": True})
    else:
        wanted = ("POST", "/v1/reports", {"user": "bob", "reason": "spam"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.relay.context.audit, "_seconds", 0)
        assert (await node.request(wanted[0], wanted[1], "ann", "phone", wanted[2]))[0] == 503
    assert await node.db.reports.count_documents({}) == 0
    assert await node.db.contacts.count_documents({"blocked": True}) == 0
    assert (await node.request(wanted[0], wanted[1], "ann", "phone", wanted[2]))[0] in (200, 201)
    assert await node.db.audit.count_documents({"act": act}) >= 1


# Contacts


async def test_a_contact_comes_changes_and_goes(node: Node) -> None:
    await known(node, "bob", name="Bob", about="here")
    await known(node, "ann")
    made = await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob", "name": "Bobby"}, status=201)
    profile = {"id": "bob", "username": None, "name": "Bob", "picture": None, "about": "here"}
    created = made.pop("createdAt")
    assert made == {"user": "bob", "name": "Bobby", "listed": True, "blocked": False, "profile": profile}
    assert await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}) == made | {"createdAt": created}
    again = await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob", "name": "Rob"})
    assert (again["name"], again["createdAt"]) == ("Rob", created)
    assert (await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"name": None}))["name"] is None
    both = await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"name": "B", "blocked": True})
    assert (both["name"], both["blocked"], both["listed"]) == ("B", True, True)
    assert [one["user"] for one in (await ask(node, "GET", "/v1/contacts", "ann"))["items"]] == ["bob"]
    await ask(node, "DELETE", "/v1/contacts/bob", "ann")
    await ask(node, "DELETE", "/v1/contacts/bob", "ann", status=404)
    assert (await ask(node, "GET", "/v1/contacts", "ann"))["items"] == []
    blocked = (await ask(node, "GET", "/v1/contacts?blocked=true", "ann"))["items"]
    assert [(one["user"], one["name"], one["listed"], one["blocked"]) for one in blocked] == [
        ("bob", "B", False, True)
    ]
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"blocked": False})
    assert (await ask(node, "GET", "/v1/contacts?blocked=true", "ann"))["items"] == []
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"name": "Bob"}, status=404)
    assert (await ask(node, "GET", "/v1/contacts", "bob"))["items"] == []


NO_CONTACTS: list[tuple[str, str, Any]] = [
    ("POST", "", {}),
    ("POST", "", {"user": ""}),
    ("POST", "", {"user": "a b"}),
    ("POST", "", {"user": {"$ne": 1}}),
    ("POST", "", {"user": ["bob"]}),
    ("POST", "", {"user": 1}),
    ("POST", "", {"user": "ann"}),
    ("POST", "", {"user": "bob", "name": ""}),
    ("POST", "", {"user": "bob", "name": "x" * 65}),
    ("POST", "", {"user": "bob", "name": "a\0"}),
    ("POST", "", {"user": "bob", "blocked": True}),
    ("PATCH", "/bob", {}),
    ("PATCH", "/bob", {"blocked": None}),
    ("PATCH", "/bob", {"blocked": 1}),
    ("PATCH", "/bob", {"blocked": "true"}),
    ("PATCH", "/bob", {"blocked": {"$ne": True}}),
    ("PATCH", "/bob", {"listed": False}),
    ("PATCH", "/bob", [{"blocked": True}]),
    ("PATCH", "/ann", {"blocked": True}),
    ("GET", "?blocked=yes", None),
    ("GET", "?blocked=true&q=b", None),
    ("GET", "?q=", None),
    ("GET", "?q=a%00", None),
    ("GET", "?limit=201", None),
    ("GET", "?cursor=x", None),
    ("GET", "?blocked=true&cursor=x", None),
    ("GET", "?more=1", None),
    ("GET", "/online?limit=0", None),
    ("GET", "/online?cursor=x", None),
]


async def test_contacts_take_nothing_else(node: Node) -> None:
    await known(node, "ann", "bob")
    await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}, status=201)
    before = await node.db.contacts.find({}).to_list()
    for method, path, body in NO_CONTACTS:
        found, answer = await node.request(method, "/v1/contacts" + path, "ann", "phone", body)
        assert (found, answer["error"]["code"]) == (400, "bad_request"), (method, path, body)
    assert await node.db.contacts.find({}).to_list() == before


async def test_pages_of_contacts_are_complete_sorted_and_ones_own(node: Node) -> None:
    await known(node, "ann")
    for number in range(9):
        await known(node, f"u{number}", name=f"{'xyz'[number % 3]}{number}")
        await ask(node, "POST", "/v1/contacts", "ann", {"user": f"u{number}"}, status=201)
    await ask(node, "POST", "/v1/contacts", "u1", {"user": "u2"}, status=201)
    expected = ["u0", "u3", "u6", "u1", "u4", "u7", "u2", "u5", "u8"]
    for limit in (1, 2, 9, 200):
        assert [one["user"] for one in await all_items(node, "ann", "/v1/contacts?", limit)] == expected
        assert [one["user"] for one in await all_items(node, "ann", "/v1/contacts?q=Y&", limit)] == expected[
            3:6
        ]
    for user in ("u5", "u1"):
        await ask(node, "PATCH", f"/v1/contacts/{user}", "ann", {"blocked": True})
    assert [one["user"] for one in await all_items(node, "ann", "/v1/contacts?blocked=true&", 1)] == [
        "u1",
        "u5",
    ]


async def test_a_full_list_is_too_large(nodes: NodeFactory) -> None:
    node = await nodes.start(max_contacts=1)
    await known(node, "ann", "bob", "cleo")
    await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}, status=201)
    answer = await ask(node, "POST", "/v1/contacts", "ann", {"user": "cleo"}, status=413)
    assert answer["error"]["code"] == "too_large"


async def test_contacts_are_online_while_connected_and_told_to_whom_they_know(node: Node) -> None:
    await known(node, "ann", "bob", "cleo", "dan")
    for user in ("bob", "cleo", "dan"):
        await ask(node, "POST", "/v1/contacts", "ann", {"user": user}, status=201)
    await ask(node, "POST", "/v1/contacts", "bob", {"user": "ann"}, status=201)
    await node.direct("cleo", "ann")

    async def online() -> list[str]:
        return [one["user"] for one in await all_items(node, "ann", "/v1/contacts/online?", 1)]

    assert await online() == []
    devices = [await node.connect(user) for user in ("bob", "cleo", "dan")]
    assert await online() == ["bob", "cleo"]
    await ask(node, "PATCH", "/v1/contacts/ann", "cleo", {"blocked": True})
    assert await online() == ["bob"]
    for device in devices:
        await device.close()


async def test_a_block_reaches_the_next_message_and_is_recorded(node: Node) -> None:
    await known(node, "ann", "bob")
    conversation = await node.direct("bob", "ann")

    async def awaiting(number: int) -> list[str]:
        body = {
            "id": f"00000000-0000-4000-8000-{number:012}",
            "conv": conversation,
            "kind": "text",
            "body": "hello",
        }
        await ask(node, "POST", "/v1/messages", "bob", body, status=201)
        found = await node.db.messages.find_one({"id": body["id"]})
        return list(found["awaiting"])

    assert await awaiting(1) == ["ann/phone"]
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"blocked": True})
    assert await awaiting(2) == ["ann/!"]
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"blocked": True})
    await ask(node, "PATCH", "/v1/contacts/bob", "ann", {"blocked": False})
    assert await awaiting(3) == ["ann/phone"]
    acts = [
        row["act"] async for row in node.db.audit.find({}).sort("_id", 1) if row["act"].startswith("contact.")
    ]
    assert acts == ["contact.block", "contact.unblock"]


# Reports


async def test_a_report_reaches_the_operators_and_is_recorded(node: Node) -> None:
    await known(node, "ann", "bob")
    conversation = await node.direct("ann", "bob")
    message = "00000000-0000-4000-8000-000000000001"
    body = {
        "user": "bob",
        "reason": "abuse",
        "text": "rude\nand often",
        "conversation": conversation,
        "messages": [message],
    }
    made = await ask(node, "POST", "/v1/reports", "ann", body, status=201)
    assert await ask(node, "POST", "/v1/reports", "ann", body) == made
    found = await node.db.reports.find_one({"_id": made["id"]})
    assert (found["reporter"], found["user"], found["reason"]) == ("ann", "bob", "abuse")
    assert (found["text"], found["messages"]) == ("rude\nand often", [message])
    entry = await node.db.audit.find_one({"act": "report.add"})
    assert entry is not None
    assert "rude" not in json.dumps(entry, default=str)
    # Absent and not yours look the same.
    other = await node.direct("bob", "cleo")
    refused = [
        await ask(node, "POST", "/v1/reports", "ann", body | {"conversation": name}, status=404)
        for name in (other, "none")
    ]
    assert refused[0] == refused[1]


NO_REPORTS: list[dict[str, Any]] = [
    {"user": "ann"},
    {"user": {"$ne": 1}},
    {"reason": "because"},
    {"reason": None},
    {"text": "x" * 1001},
    {"text": "a\0b"},
    {"text": ["x"]},
    {"messages": ["00000000-0000-4000-8000-000000000001"]},
    {"conversation": "c1", "messages": ["x"]},
    {"conversation": "c1", "messages": {"$in": []}},
    {"conversation": "a b"},
    {"more": 1},
]


async def test_reports_take_nothing_else(node: Node) -> None:
    await known(node, "ann", "bob")
    for change in NO_REPORTS:
        body = {"user": "bob", "reason": "spam"} | change
        found, answer = await node.request("POST", "/v1/reports", "ann", "phone", body)
        assert (found, answer["error"]["code"]) == (400, "bad_request"), change
    assert await node.db.reports.count_documents({}) == 0


async def test_a_report_of_very_many_messages_is_too_large(node: Node) -> None:
    await known(node, "ann", "bob")
    ids = [f"00000000-0000-4000-8000-{number:012}" for number in range(21)]
    body = {"user": "bob", "reason": "spam", "conversation": "c1", "messages": ids}
    assert (await ask(node, "POST", "/v1/reports", "ann", body, status=413))["error"]["code"] == "too_large"


# Rights


ENDPOINTS: list[tuple[str, str]] = [
    ("GET", "/v1/me"),
    ("PATCH", "/v1/me"),
    ("PUT", "/v1/me/push"),
    ("DELETE", "/v1/me/push"),
    ("GET", "/v1/me/searches"),
    ("DELETE", "/v1/me/searches"),
    ("GET", "/v1/users?q=ann"),
    ("GET", "/v1/users/ann"),
    ("POST", "/v1/contacts"),
    ("GET", "/v1/contacts"),
    ("GET", "/v1/contacts/online"),
    ("PATCH", "/v1/contacts/bob"),
    ("DELETE", "/v1/contacts/bob"),
    ("POST", "/v1/reports"),
]


async def test_nobody_gets_anything_without_a_token(node: Node) -> None:
    for method, path in ENDPOINTS:
        async with node.http.request(method, node.url + path, json={}) as response:
            assert response.status == 401, path
            assert (await response.json())["error"]["code"] == "unauthorized"


async def test_who_lets_contacts_only_write_is_written_to_by_them_at_once(node: Node) -> None:
    await known(node, "ann", "bob")
    conversation = await node.direct("bob", "ann")

    async def send(number: int) -> int:
        body = {
            "id": f"00000000-0000-4000-8000-{number:012}",
            "conv": conversation,
            "kind": "text",
            "body": "hello",
        }
        return (await node.request("POST", "/v1/messages", "bob", "phone", body))[0]

    assert await send(1) == 201
    await ask(node, "PATCH", "/v1/me", "ann", {"preferences": {"whoMayMessage": "contacts"}})
    assert await send(2) == 403
    await ask(node, "POST", "/v1/contacts", "ann", {"user": "bob"}, status=201)
    assert await send(3) == 201
    await ask(node, "DELETE", "/v1/contacts/bob", "ann")
    assert await send(4) == 403
    await ask(node, "PATCH", "/v1/me", "ann", {"preferences": {"whoMayMessage": "anyone"}})
    assert await send(5) == 201
