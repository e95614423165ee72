"""Who may do what: every endpoint as nobody, as a stranger, as a member in each role, as who was removed or is blocked.

The tables are the truth: a row is a request, a column is who asks, a cell is the status of the answer. A failure has the code
that belongs to its status (``CODE``) unless the cell names another; ``200=`` does nothing. Whoever is refused has changed nothing. What is absent and
what is not yours are answered with the same bytes. Every answer is one that ``/openapi.json`` tells of.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pytest

from handlers.http.routes import ROUTES
from relay.store.embedded import EmbeddedMongo
from tests.support import forge
from tests.support.databases import Databases
from tests.support.described import undescribed
from tests.support.device import new_id
from tests.support.node import SECRET, Node, NodeFactory

CODE: Final = {401: "unauthorized", 403: "forbidden", 404: "not_found", 409: "conflict"}

# A group. `a-moderator` and so on in a path are further members of that role, never the one who asks.
GROUP: Final = """
                                                   stranger        removed         member         moderator      admin
GET    /v1/conversations/{id}                      404             404             200            200            200
PATCH  /v1/conversations/{id}                      404             404             403            200            200
DELETE /v1/conversations/{id}                      404             404             403            403            200
PATCH  /v1/conversations/{id}/me                   404             404             200            200            200
GET    /v1/conversations/{id}/messages             404             404             200            200            200
GET    /v1/conversations/{id}/devices              404             404             200            200            200
GET    /v1/conversations/{id}/members              404             404             200            200            200
POST   /v1/conversations/{id}/members              404             404             403            200            200
PATCH  /v1/conversations/{id}/members/a-member     404             404             403            200            200   to-moderator
PATCH  /v1/conversations/{id}/members/a-member     404             404             403            403            200   to-admin
PATCH  /v1/conversations/{id}/members/a-moderator  404             404             403            200            200   to-member
PATCH  /v1/conversations/{id}/members/an-admin     404             404             403            403            200   to-member
PATCH  /v1/conversations/{id}/members/oneself      404             404             403            403            200=  to-admin
PATCH  /v1/conversations/{id}/members/a-stranger   404             404             403            404            404   to-member
DELETE /v1/conversations/{id}/members/a-member     404             404             403            200            200
DELETE /v1/conversations/{id}/members/a-moderator  404             404             403            200            200
DELETE /v1/conversations/{id}/members/an-admin     404             404             403            403            200
DELETE /v1/conversations/{id}/members/a-stranger   404             404             403            404            404
DELETE /v1/conversations/{id}/members/oneself      404             404             200            200            200
POST   /v1/messages                                404:not_member  404:not_member  201            201            201
"""

# A group in which only admins and moderators may post.
ANNOUNCEMENTS: Final = """
                                                   stranger        removed         member         moderator      admin
POST   /v1/messages                                404:not_member  404:not_member  403            201            201
"""

# A group with a single admin, who is the one who asks.
LAST_ADMIN: Final = """
                                                   admin
PATCH  /v1/conversations/{id}/members/oneself      409   to-member
PATCH  /v1/conversations/{id}/members/oneself      409   to-moderator
DELETE /v1/conversations/{id}/members/oneself      409
DELETE /v1/conversations/{id}                      200
"""

# A direct conversation has nothing that could be changed, whoever asks; `a-member` is the other person.
DIRECT: Final = """
                                                   stranger        member
GET    /v1/conversations/{id}                      404             200
PATCH  /v1/conversations/{id}                      404             403
DELETE /v1/conversations/{id}                      404             403
PATCH  /v1/conversations/{id}/me                   404             200
GET    /v1/conversations/{id}/messages             404             200
GET    /v1/conversations/{id}/devices              404             200
GET    /v1/conversations/{id}/members              404             200
POST   /v1/conversations/{id}/members              404             403
PATCH  /v1/conversations/{id}/members/a-member     404             403   to-admin
DELETE /v1/conversations/{id}/members/a-member     404             403
DELETE /v1/conversations/{id}/members/oneself      404             403
POST   /v1/messages                                404:not_member  201
"""

# Things of the owner, named in the path, and what another person gets who names them.
OWN: Final = """
                                                   another         owner
DELETE /v1/auth/devices/tablet                     404             200
PATCH  /v1/contacts/friend                         404             200
DELETE /v1/contacts/friend                         404             200
"""

# What everybody with a token may ask; it is about oneself, or about what everybody may know. Whatever `another` does here,
# the owner has and sees the same as before.
EVERYBODY: Final = """
                                                   another
POST   /v1/auth/logout                             200
GET    /v1/auth/devices                            200
GET    /v1/me                                      200
PATCH  /v1/me                                      200
DELETE /v1/me                                      200
GET    /v1/me/export                               200
PUT    /v1/me/push                                 200
DELETE /v1/me/push                                 200
GET    /v1/me/searches                             200
DELETE /v1/me/searches                             200
GET    /v1/users                                   200
GET    /v1/users/owner                             200
GET    /v1/users/nobody-is-called-so               404
GET    /v1/users/owner/keys                        200
GET    /v1/users/nobody-is-called-so/keys          404
GET    /v1/contacts                                200
POST   /v1/contacts                                201
GET    /v1/contacts/online                         200
POST   /v1/reports                                 201
GET    /v1/conversations                           200
POST   /v1/conversations                           201
GET    /v1/sync                                    200
POST   /v1/acks                                    200
GET    /v1/changes                                 200
PUT    /v1/keys                                    200
GET    /v1/keys/count                              200
POST   /v1/keys/claim                              200
"""

# The owner has blocked `blocked`, and is not told to them: to `blocked` most things look as ever. The two have a direct
# conversation, `{theirs}` is a group of `blocked` without the owner.
BLOCKED: Final = """
                                                   blocked         owner
GET    /v1/users/owner                             200             200
GET    /v1/users/owner/keys                        200             200
POST   /v1/keys/claim                              200             200
POST   /v1/reports                                 201             201
POST   /v1/contacts                                201             201
GET    /v1/contacts                                200             200
GET    /v1/contacts/online                         200             200
GET    /v1/conversations/{id}                      200             200
GET    /v1/conversations/{id}/devices              200             200
GET    /v1/conversations/{id}/messages             200             200
POST   /v1/messages                                201             403:blocked
POST   /v1/conversations                           200             200   direct
POST   /v1/conversations                           403             201   group
POST   /v1/conversations/{theirs}/members          403             404   owner
"""

# What needs no token. A wrong one does no harm.
OPEN: Final = """
                                                   nobody
POST   /v1/auth/register                           201
POST   /v1/auth/login                              401
POST   /v1/auth/refresh                            401
GET    /v1/info                                    200
GET    /livez                                      200
GET    /readyz                                     200
GET    /metrics                                    200
GET    /openapi.json                               200
GET    /asyncapi.json                              200
GET    /docs                                       200
GET    /docs/start.js                              200
GET    /docs/swagger-ui.js                         200
GET    /docs/swagger-ui.css                        200
GET    /docs/favicon.png                           200
"""

KEY: Final = "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb"
DEVICE: Final = {"name": "a phone", "platform": "ios"}
BODIES: Final[Mapping[str, Any]] = {
    "to-member": {"role": "member"},
    "to-moderator": {"role": "moderator"},
    "to-admin": {"role": "admin"},
    "direct": {"type": "direct", "members": ["{other}"]},
    "group": {"type": "group", "members": ["{other}"], "name": "together"},
    "owner": {"users": ["newcomer", "owner"]},
    "PATCH /v1/conversations/{id}": {"name": "changed"},
    "PATCH /v1/conversations/{id}/me": {"pinned": True},
    "POST /v1/conversations/{id}/members": {"users": ["newcomer"]},
    "POST /v1/conversations": {"type": "group", "members": ["friend"], "name": "another's"},
    "PATCH /v1/me": {"name": "changed", "about": "changed"},
    "PUT /v1/me/push": {"provider": "fcm", "token": "of another"},
    "POST /v1/contacts": {"user": "{other}", "name": "changed"},
    "PATCH /v1/contacts/{user}": {"name": "changed"},
    "POST /v1/reports": {"user": "{other}", "reason": "spam"},
    "PUT /v1/keys": {
        "identityKey": KEY,
        "registrationId": 7,
        "signedPreKey": {"id": 1, "key": KEY, "signature": KEY},
        "oneTimePreKeys": [],
    },
    "POST /v1/keys/claim": {"devices": ["{other}/unknown"]},
    "POST /v1/auth/register": {"username": "nobody", "password": "correct horse battery", "device": DEVICE},
    "POST /v1/auth/login": {"username": "who", "password": "correct horse battery", "device": DEVICE},
    "POST /v1/auth/refresh": {"refreshToken": "made up"},
}
QUERIES: Final = {"GET /v1/users": "?q=owner"}
ABSENT: Final = "nothing-has-this-id"


@dataclass(frozen=True, slots=True)
class Row:
    """One request, and what who gets for it."""

    method: str
    path: str
    cells: Mapping[str, str]
    note: str

    @property
    def endpoint(self) -> str:
        """Which route of ``ROUTES`` it asks."""
        path = re.sub(r"(/members|/contacts)/(?!online$)[^/]+$", r"\1/{user}", self.path)
        path = re.sub(r"/users/[^/]+", "/users/{id}", path)
        return f"{self.method} {re.sub('/devices/[^/]+$', '/devices/{device}', path)}".replace(
            "{theirs}", "{id}"
        )

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.note}".strip()


def rows(table: str) -> list[Row]:
    """The rows of a table."""
    head, *lines = table.strip("\n").splitlines()
    columns = head.split()
    found = []
    for line in lines:
        method, path, *rest = line.split()
        cells, notes = rest[: len(columns)], rest[len(columns) :]
        assert len(cells) == len(columns), line
        found.append(Row(method, path, dict(zip(columns, cells, strict=True)), " ".join(notes)))
    return found


TABLES: Final = (GROUP, ANNOUNCEMENTS, LAST_ADMIN, DIRECT, OWN, EVERYBODY, BLOCKED, OPEN)
PROTECTED: Final = [route for route in ROUTES if not route.open]


@pytest.fixture(scope="module")
async def node(
    mongod: EmbeddedMongo, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Node]:
    """One relay for all tables: every test brings people and conversations of its own."""
    factory = NodeFactory(mongod.uri, tmp_path_factory.mktemp("rights"), databases)
    yield await factory.start()
    await factory.close()


class Group:
    """A fresh group with two of each role, a stranger, and somebody who was removed."""

    def __init__(self, node: Node, sole: bool) -> None:
        self._node = node
        tag = new_id()[:8]
        self.people = {
            role: f"{role}-{tag}"
            for role in (
                "stranger",
                "removed",
                "member",
                "moderator",
                "admin",
                "a-member",
                "a-moderator",
                "an-admin",
                "a-stranger",
            )
        }
        self.sole = sole
        self.id = ""

    @classmethod
    async def make(cls, node: Node, *, posting: str = "members", sole: bool = False) -> Group:
        found = cls(node, sole)
        people = found.people
        roles = {"moderator": "moderator", "a-moderator": "moderator", "an-admin": "admin"}
        if sole:
            del roles["an-admin"]
        inside = ("removed", "member", "moderator", "a-member", "a-moderator", "an-admin")
        wanted = {"type": "group", "members": [people[who] for who in inside], "name": "secret name"}
        found.id = (await found.asked("POST", "/v1/conversations", wanted))["id"]
        path = f"/v1/conversations/{found.id}"
        for who, role in roles.items():
            await found.asked("PATCH", f"{path}/members/{people[who]}", {"role": role})
        await found.asked("DELETE", f"{path}/members/{people['removed']}")
        if posting != "members":
            await found.asked("PATCH", path, {"settings": {"whoMayPost": posting}})
        return found

    async def asked(self, method: str, path: str, body: Any = None) -> Any:
        """What the admin gets."""
        status, found = await self._node.request(method, path, self.people["admin"], "phone", body)
        assert status in (200, 201), found
        return found

    async def state(self) -> Any:
        """All that is stored of it and sent in it."""
        wanted = {"conversationId": self.id}
        return (
            await self._node.db.conversations.find_one({"_id": self.id}),
            await self._node.db.memberships.find(wanted).sort("_id").to_list(None),
            await self._node.db.messages.count_documents(wanted),
        )

    async def ask(self, row: Row, who: str, conversation: str) -> Asked:
        """This row's request as one of these people, about this conversation."""
        head, slash, last = row.path.rpartition("/")
        named = self.people[who] if last == "oneself" else self.people.get(last, last)
        path = f"{head}{slash}{named}".replace("{id}", conversation)
        body = BODIES.get(row.note, BODIES.get(row.endpoint))
        if row.path == "/v1/messages":
            body = {"id": new_id(), "conv": conversation, "kind": "text", "body": "x"}
        return await ask(self._node, row.method, path, self._node.headers(self.people[who], "phone"), body)


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer; ``text`` as it came."""

    status: int
    text: str
    headers: Mapping[str, str]

    def is_(self, cell: str) -> bool:
        """Whether it is what the table says, with the error's promised shape."""
        status, _, code = cell.rstrip("=").partition(":")
        if self.status != int(status):
            return False
        if self.status < 400:
            return True
        found = json.loads(self.text)
        error = found["error"]
        return (
            set(found) == {"error"}
            and set(error) <= {"code", "message", "details"}
            and error["code"] == (code or CODE[self.status])
            and "\n" not in error["message"]
        )


async def ask(node: Node, method: str, path: str, headers: Mapping[str, str], body: Any = None) -> Asked:
    async with node.http.request(method, node.url + path, headers=headers, json=body) as answer:
        content = await answer.read()
        if answer.content_type == "application/zip":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        text = content.decode(errors="replace")
        assert undescribed(method, path, answer.status, text) is None, f"{method} {path}: {text[:200]}"
        return Asked(answer.status, text, dict(answer.headers))


def test_every_endpoint_stands_in_a_table() -> None:
    known = {row.endpoint for table in TABLES for row in rows(table)}
    assert known == {f"{route.method} {route.path}" for route in ROUTES}


def test_what_needs_no_token_is_exactly_what_the_table_of_open_endpoints_says() -> None:
    assert {row.endpoint for row in rows(OPEN)} == {
        f"{route.method} {route.path}" for route in ROUTES if route.open
    }


@pytest.fixture(scope="module")
async def bad_headers(node: Node) -> dict[str, dict[str, str]]:
    """Ways to come without a valid token."""
    left = node.headers("left", "phone")
    assert (await node.request("GET", "/v1/me", "left", "phone"))[0] == 200
    assert (await ask(node, "POST", "/v1/auth/logout", left)).status == 200
    await node.request("GET", "/v1/me", "suspended", "phone")
    await node.relay.context.people.suspend("suspended")
    good = forge.claims("intruder")
    tokens = {
        "not a token": "x",
        "an expired token": node.token("intruder", "phone", lifetime=-1),
        "somebody else's signature": forge.token(
            {"alg": "HS256"}, good, b"another secret of thirty-two bytes!"
        ),
        "no signature": forge.token({"alg": "none"}, good, None),
        "another audience": forge.token(
            {"alg": "HS256"}, forge.claims("intruder", aud="another"), SECRET.encode()
        ),
    }
    return {
        "no header": {},
        "another scheme": {"Authorization": "Basic YTpi"},
        "an empty token": {"Authorization": "Bearer "},
        **{name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()},
        "a revoked device's token": left,
        "a suspended person's token": node.headers("suspended", "tablet"),
    }


@pytest.mark.parametrize("route", PROTECTED, ids=lambda route: f"{route.method} {route.path}")
async def test_nobody_gets_anything_without_a_valid_token(
    node: Node, bad_headers: dict[str, dict[str, str]], route: Any
) -> None:
    path = re.sub(r"\{\w+\}", "intruder", route.path)
    for name, headers in bad_headers.items():
        bodies: tuple[Any, ...] = (None, BODIES.get(f"{route.method} {route.path}", {}))
        for body in bodies:
            found = await ask(node, route.method, path, headers, body)
            assert found.is_("401"), (name, found)
            assert found.headers["WWW-Authenticate"].startswith("Bearer"), name
    assert await node.db.users.find_one({"_id": "intruder"}) is None


@pytest.mark.parametrize("row", rows(OPEN), ids=str)
async def test_open_endpoints_need_no_token_and_mind_no_wrong_one(
    node: Node, bad_headers: dict[str, dict[str, str]], row: Row
) -> None:
    once = row.path == "/v1/auth/register"
    for headers in [{}] if once else bad_headers.values():
        found = await ask(node, row.method, row.path, headers, BODIES.get(row.endpoint))
        assert found.is_(row.cells["nobody"]), found


def stands(row: Row, who: str, found: Asked) -> None:
    assert found.is_(row.cells[who]), f"{row} as {who}: {row.cells[who]} promised, got {found}"


@pytest.mark.parametrize("row", rows(GROUP), ids=str)
async def test_rights_in_a_group(node: Node, row: Row) -> None:
    await in_groups(node, row)


@pytest.mark.parametrize("row", rows(ANNOUNCEMENTS), ids=str)
async def test_rights_in_a_group_where_few_may_post(node: Node, row: Row) -> None:
    await in_groups(node, row, posting="moderators")


@pytest.mark.parametrize("row", rows(LAST_ADMIN), ids=str)
async def test_rights_of_the_last_admin(node: Node, row: Row) -> None:
    await in_groups(node, row, sole=True)


async def in_groups(node: Node, row: Row, **settings: Any) -> None:
    """All cells of a row: those who are refused or only look share a group and leave it as it was, the others have one
    each."""
    shared = await Group.make(node, **settings)
    before = await shared.state()
    acting = []
    for who, cell in row.cells.items():
        if int(cell[:3]) < 400 and row.method != "GET":
            acting.append(who)
            continue
        found = await shared.ask(row, who, shared.id)
        stands(row, who, found)
        if who in ("stranger", "removed"):
            absent = await shared.ask(row, who, ABSENT)
            assert (found.status, found.text) == (absent.status, absent.text), (row, who)
            assert "secret name" not in found.text
    assert await shared.state() == before, f"{row}: who was refused or only looked has changed something"
    for number, who in enumerate(acting):
        group = await Group.make(node, **settings) if number else shared
        stands(row, who, await group.ask(row, who, group.id))
        assert (await group.state() != before) == (not row.cells[who].endswith("="))


async def test_a_person_who_is_no_member_and_one_who_does_not_exist_look_the_same_to_a_moderator(
    node: Node,
) -> None:
    group = await Group.make(node)
    await node.request("GET", "/v1/me", group.people["a-stranger"], "phone")
    headers = node.headers(group.people["moderator"], "phone")
    for method, body in (("PATCH", {"role": "member"}), ("DELETE", None)):
        path = f"/v1/conversations/{group.id}/members"
        there = await ask(node, method, f"{path}/{group.people['a-stranger']}", headers, body)
        nowhere = await ask(node, method, f"{path}/{ABSENT}", headers, body)
        assert there.is_("404")
        assert (there.status, there.text) == (nowhere.status, nowhere.text)


@pytest.mark.parametrize("row", rows(DIRECT), ids=str)
async def test_rights_in_a_direct_conversation(node: Node, row: Row) -> None:
    group = Group(node, False)
    group.id = await node.direct(group.people["member"], group.people["a-member"])
    before = await group.state()
    for who in ("stranger", "member"):
        found = await group.ask(row, who, group.id)
        stands(row, who, found)
        if found.status >= 400:
            assert await group.state() == before
        if who == "stranger":
            absent = await group.ask(row, who, ABSENT)
            assert (found.status, found.text) == (absent.status, absent.text)
            assert group.people["member"] not in found.text


class Owner:
    """Somebody who has one of everything, all of it marked; and names for other people."""

    MARK: Final = "zebra"

    def __init__(self, node: Node) -> None:
        self._node = node
        self.tag = new_id()[:8]
        self.direct = self.group = self.theirs = ""

    def name(self, who: str) -> str:
        return f"{who}-{self.tag}"

    @classmethod
    async def make(cls, node: Node) -> Owner:
        found = cls(node)
        for user, device in (
            ("owner", "phone"),
            ("owner", "tablet"),
            ("friend", "phone"),
            ("newcomer", "phone"),
        ):
            await node.request("GET", "/v1/me", found.name(user), device)
        mark, friend = cls.MARK, found.name("friend")
        await found.does(
            "PATCH",
            "/v1/me",
            {"name": "owner", "phone": "+49 30 5550100", "preferences": {"findableByPhone": False}},
        )
        await found.does("PUT", "/v1/me/push", {"provider": "fcm", "token": f"{mark} token"})
        await found.does("GET", f"/v1/users?q={mark}")
        await found.does("POST", "/v1/contacts", {"user": friend, "name": f"{mark} friend"})
        await found.does(
            "PUT", "/v1/keys", {**BODIES["PUT /v1/keys"], "oneTimePreKeys": [{"id": 1, "key": KEY}]}
        )
        made = await found.does(
            "POST", "/v1/conversations", {"type": "group", "members": [friend], "name": f"{mark} group"}
        )
        found.group = made["id"]
        await found.does(
            "POST",
            "/v1/messages",
            {"id": new_id(), "conv": found.group, "kind": "text", "body": f"{mark} text"},
        )
        return found

    async def does(self, method: str, path: str, body: Any = None) -> Any:
        status, found = await self._node.request(method, path, self.name("owner"), "phone", body)
        assert status in (200, 201), found
        return found

    async def ask(self, row: Row, who: str, other: str) -> Asked:
        """This row's request as one of these people; ``other`` takes the place of ``{other}`` in its body."""
        path = row.path.replace("{id}", self.direct).replace("{theirs}", self.theirs)
        path = re.sub(r"(?<=/)(owner|friend)(?=/|$)", lambda found: self.name(found[0]), path)
        body = BODIES.get(row.note, BODIES.get(row.endpoint))
        if body is not None:
            text = json.dumps(body).replace("{other}", self.name(other))
            text = re.sub(r'"(owner|friend|newcomer)"', lambda found: f'"{self.name(found[1])}"', text)
            body = json.loads(text)
        if row.path == "/v1/messages":
            body = {"id": new_id(), "conv": self.direct, "kind": "text", "body": "x"}
        if row.path == "/v1/acks":
            body = await self.all_acknowledged()
        headers = self._node.headers(self.name(who), "phone")
        return await ask(self._node, row.method, path + QUERIES.get(row.endpoint, ""), headers, body)

    async def all_acknowledged(self) -> dict[str, Any]:
        """Acknowledges and marks as read all that waits in the owner's group."""
        waiting = await self._node.db.messages.distinct("id", {"conversationId": self.group})
        assert waiting
        return {
            "acks": [{"conv": self.group, "ids": waiting}],
            "reads": [{"conv": self.group, "upTo": 1}],
        }

    async def state(self) -> Any:
        """All that is stored of the owner, and of what they made."""
        db, owner = self._node.db, self.name("owner")
        return [
            await db.users.find_one({"_id": owner}),
            *[
                await db[name].find(wanted).sort("_id").to_list(None)
                for name, wanted in (
                    ("devices", {"user": owner}),
                    ("contacts", {"owner": owner}),
                    ("memberships", {"conversationId": self.group}),
                    ("conversations", {"_id": self.group}),
                    ("messages", {"conversationId": self.group}),
                    ("public_keys", {"_id": {"$regex": f"^{owner}/"}}),
                    ("prekeys", {"device": {"$regex": f"^{owner}/"}}),
                )
            ],
        ]


@pytest.mark.parametrize("row", rows(OWN), ids=str)
async def test_things_of_ones_own_are_absent_to_others(node: Node, row: Row) -> None:
    owner = await Owner.make(node)
    before = await owner.state()
    found = await owner.ask(row, "another", "owner")
    stands(row, "another", found)
    head = row.path.rpartition("/")[0]
    absent = await owner.ask(Row(row.method, f"{head}/{ABSENT}", row.cells, row.note), "another", "owner")
    assert (found.status, found.text) == (absent.status, absent.text)
    assert await owner.state() == before
    stands(row, "owner", await owner.ask(row, "owner", "friend"))
    assert await owner.state() != before


@pytest.fixture(scope="module")
async def owner(node: Node) -> Owner:
    """Somebody to whom nothing happens, whatever everybody else does."""
    return await Owner.make(node)


@pytest.mark.parametrize("row", rows(EVERYBODY), ids=str)
async def test_what_everybody_may_do_shows_and_changes_nothing_of_anybody_else(
    node: Node, owner: Owner, row: Row
) -> None:
    before = await owner.state()
    another = f"another{new_id()[:8]}"
    await node.request("GET", "/v1/me", owner.name(another), "phone")
    found = await owner.ask(row, another, "owner")
    stands(row, "another", found)
    assert Owner.MARK not in found.text
    assert "5550100" not in found.text
    assert await owner.state() == before


@pytest.mark.parametrize("row", rows(BLOCKED), ids=str)
async def test_what_a_block_changes(node: Node, row: Row) -> None:
    owner = await Owner.make(node)
    owner.theirs = await node.group(owner.name("blocked"), [owner.name("newcomer")])
    owner.direct = await node.direct(owner.name("owner"), owner.name("blocked"))
    await node.request("GET", "/v1/me", owner.name("blocked"), "phone")
    await owner.does("PATCH", f"/v1/contacts/{owner.name('blocked')}", {"blocked": True})
    for who, other in (("blocked", "owner"), ("owner", "blocked")):
        found = await owner.ask(row, who, other)
        stands(row, who, found)
        if row.endpoint == "GET /v1/users/{id}" and who == "blocked":
            shown = json.loads(found.text)
            # As if they had gone away: what is hidden all at once would tell.
            assert (shown["online"], type(shown["lastSeen"])) == (False, int)
