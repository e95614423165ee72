"""Everything that is kept about a person, for them: asynchronous generators of plain values, times in milliseconds.

A part holds the ids of what it is going to tell, never the things themselves; it reads them in pages, as fast as they are
taken. What is changed meanwhile is told as it is when its page is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from models.accounts import Device, User
from models.contacts import Contact, Report
from models.conversations import Conversation, Membership
from models.keys import PreKey, PublicKeys
from models.messages import FATES, MESSAGES
from relay.store.accounts import milliseconds
from relay.store.documents import told_of
from relay.store.fates import find_in, whole_of
from relay.store.mongo import MESSAGE_CODEC
from relay.wire.ids import any_device_key, part_ids

_PAGE: Final = 200
_SECRET_IN_USER: Final = frozenset({"password", "usernameKey", "nameKey", "phoneKey", "searches"})
_SECRET_IN_SESSION: Final = frozenset({"id", "current", "previous", "successor"})

Value = dict[str, Any]


class Exports:
    """Reads what is kept about one person. Nobody else's phone number, address or profile is in it."""

    async def profile(self, user: str) -> Value | None:
        """The account without its password; None when there is no such person."""
        document = await User.get_motor_collection().find_one({"_id": user})
        return None if document is None else _plain(document, _SECRET_IN_USER)

    async def counts(self, user: str) -> dict[str, int]:
        """How much there is, for operators: each counted in an index."""
        contacts, rows = Contact.get_motor_collection(), Membership.get_motor_collection()
        return {
            "contacts": await contacts.count_documents({"owner": user, "listed": True}),
            "conversations": await rows.count_documents({"user": user, "removedAt": None}),
            "open reports about them": await Report.get_motor_collection().count_documents(
                {"user": user, "closedAt": None}
            ),
        }

    async def searches(self, user: str) -> AsyncIterator[Value]:
        """What they searched for last."""
        document = await User.get_motor_collection().find_one({"_id": user}, {"searches": 1})
        for search in (document or {}).get("searches") or ():
            yield _plain(search)

    async def devices(self, user: str) -> AsyncIterator[Value]:
        """Their devices, without anything that a token could be made or checked with."""
        async for document in _read(Device.get_motor_collection(), {"user": user}):
            found = _plain(document)
            if isinstance(found.get("session"), dict):
                found["session"] = _plain(found["session"], _SECRET_IN_SESSION)
            yield found

    async def keys(self, user: str) -> AsyncIterator[Value]:
        """The public keys of their devices."""
        async for document in _read(PublicKeys.get_motor_collection(), {"user": user}):
            yield _plain(document)

    async def prekeys(self, user: str) -> AsyncIterator[Value]:
        """The one-time prekeys of their devices: those that wait, and the marks of those that were handed out."""
        for device in await _device_keys(user):
            async for document in _read(PreKey.get_motor_collection(), {"device": device}):
                yield _plain(document)

    async def contacts(self, user: str) -> AsyncIterator[Value]:
        """Whom they keep as a contact or have blocked, under the name they gave."""
        async for document in _read(Contact.get_motor_collection(), {"owner": user}):
            yield _plain(document, frozenset({"owner", "sortKey"}))

    async def conversations(self, user: str) -> AsyncIterator[Value]:
        """The conversations they are in, or left not long ago, with what they set there; then those they only made. Of one that
        they left there is no name: it may be a later one."""
        collection = Membership.get_motor_collection()
        names = [row["_id"] async for row in collection.find({"user": user}, {"_id": 1})]
        for start in range(0, len(names), _PAGE):
            rows = [row async for row in collection.find({"_id": {"$in": names[start : start + _PAGE]}})]
            wanted = [row["conversationId"] for row in rows]
            cursor = Conversation.get_motor_collection().find({"_id": {"$in": wanted}})
            documents = {document["_id"]: document async for document in cursor}
            for row in rows:
                document = documents.get(row["conversationId"], {})
                found = _plain(row, frozenset({"_id", "user", "rev"}))
                found |= {
                    "type": document.get("type"),
                    "name": document.get("name") if row.get("removedAt") is None else None,
                    "createdByYou": document.get("createdBy") == user,
                }
                other = _other_of(document, user)
                yield found if other is None else {**found, "with": other}
        told = {name.partition(" ")[0] for name in names}
        cursor = Conversation.get_motor_collection().find({"createdBy": user}, {"type": 1, "createdAt": 1})
        async for document in cursor:
            if document["_id"] not in told:
                found = _plain(document, frozenset({"_id", "createdAt"}))
                made = milliseconds(document["createdAt"])
                yield {"conversationId": document["_id"], **found, "createdByYou": True, "createdAt": made}

    async def reports(self, user: str) -> AsyncIterator[Value]:
        """What they reported."""
        async for document in _read(Report.get_motor_collection(), {"reporter": user}):
            yield _plain(document, frozenset({"reporter", "openKey"}))

    async def waiting(self, user: str) -> AsyncIterator[Value]:
        """The messages that wait for their devices, in order for each; ``mailbox`` is the device."""
        for key in [*await _device_keys(user), any_device_key(user)]:
            async for document in _waiting(key):
                yield {"mailbox": key, **_message(document, key)}

    async def received(self, user: str) -> AsyncIterator[Value]:
        """The messages that devices of theirs have and other devices have not: ``deliveredTo`` says which, and since when."""
        messages = _messages()
        found = [row["_id"] async for row in messages.find({"deliveredTo.user": user}, {"_id": 1})]
        for start in range(0, len(found), _PAGE):
            async for document in messages.find({"_id": {"$in": found[start : start + _PAGE]}}):
                own = [
                    {"device": entry["device"], "at": int(entry["at"])}
                    for entry in document.get("deliveredTo") or ()
                    if entry["user"] == user
                ]
                yield {**_message(document, None), "deliveredTo": own}

    async def sent(self, user: str) -> AsyncIterator[Value]:
        """The messages they sent that still wait for somebody. There is no index by sender, and need not be one: what they
        sent is in their conversations."""
        collection = Membership.get_motor_collection()
        cursor = collection.find({"user": user}, {"conversationId": 1})
        for name in [row["conversationId"] async for row in cursor]:
            query = {"conversationId": name, "sender.user": user, "part": None, "claimedAt": None}
            async for document in _messages().find(query):
                # As ``status`` counts them: by mailboxes, a sender could tell who has blocked them, as such a person has
                # one instead of one for each device.
                whole = await _whole(document) if "parts" in document else document
                yield {**_message(document, None), "awaiting": len(told_of(whole, user)[0])}


async def _device_keys(user: str) -> list[str]:
    return [row["_id"] async for row in Device.get_motor_collection().find({"user": user}, {"_id": 1})]


async def _read(collection: Any, query: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    """Everything that matches, by id: a cursor would have to stay open as long as somebody takes to read."""
    found = [row["_id"] async for row in collection.find(query, {"_id": 1})]
    for start in range(0, len(found), _PAGE):
        page = await collection.find({"_id": {"$in": found[start : start + _PAGE]}}).to_list(_PAGE)
        for document in page:
            yield document


async def _waiting(key: str) -> AsyncIterator[Mapping[str, Any]]:
    query: dict[str, Any] = {"awaiting": key}
    while True:
        cursor = _messages().find(query).sort([("seq", 1), ("_id", 1)]).limit(_PAGE)
        page = await cursor.to_list(_PAGE)
        for document in page:
            yield document
        if len(page) < _PAGE:
            return
        last = page[-1]
        query = {
            "awaiting": key,
            "seq": {"$gte": last["seq"]},
            "$or": [{"seq": {"$gt": last["seq"]}}, {"_id": {"$gt": last["_id"]}}],
        }


async def _whole(head: Mapping[str, Any]) -> Mapping[str, Any]:
    names = part_ids(head["_id"], head["writing"], head["parts"])
    fields = {"awaiting": 1, "deliveredTo": 1}
    cursor = _messages().find({"_id": {"$in": names}, "conversationId": head["conversationId"]}, fields)
    parts = {part["_id"]: part async for part in cursor}
    ended = await find_in(_plainly(FATES), [name for name in names if name not in parts])
    return whole_of(head, parts.values(), ended.values())


def _messages() -> Any:
    return _plainly(MESSAGES)


def _plainly(name: str) -> Any:
    return User.get_motor_collection().database.get_collection(name, codec_options=MESSAGE_CODEC)


def _message(document: Mapping[str, Any], mailbox: str | None) -> Value:
    """A message as its mailbox gets it, or as its sender sent it (None): sealed contents are for one device each."""
    found: Value = {
        "id": document.get("id"),
        "conversation": document.get("conversationId"),
        "from": document.get("sender"),
        "seq": document.get("seq"),
        "at": int(document["createdAt"]) if "createdAt" in document else None,
        "kind": document.get("kind"),
    }
    for name in ("body", "replyTo", "media"):
        if document.get(name) is not None:
            found[name] = document[name]
    for entry in document.get("sealed") or ():
        if entry["device"] == mailbox:
            found["sealed"] = entry["data"]
    return found


def _other_of(document: Mapping[str, Any], user: str) -> str | None:
    """The other person of a direct conversation."""
    kind, *people = str(document.get("unique", "")).split(" ")
    others = [person for person in people if person != user]
    return others[0] if kind == "direct" and len(others) == 1 else None


def _plain(document: Mapping[str, Any], without: frozenset[str] = frozenset()) -> Value:
    found: Value = {}
    for name, value in document.items():
        if name not in without:
            found["id" if name == "_id" else name] = _plain_value(value)
    return found


def _plain_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return milliseconds(value)
    if isinstance(value, Mapping):
        return _plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain_value(item) for item in value]
    return value
