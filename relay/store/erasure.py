"""Erasing a person: the parts that the store does, each safe to repeat and to be done by several nodes at once.

handlers.erasing says in which order, and why. What stays of a person is a pseudonym, in the tombstone of the account, in
reports about them and in the audit trail; and, until they run out, the messages they sent, the system messages that name
them, the fates of messages (72 h), and that they are no contact any more of those whose contact they were, as of whoever
is taken off a list (31 days): devices that were away must hear of it. What others typed into their last searches is those others' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pymongo import UpdateOne

from models.accounts import Device, User
from models.contacts import Contact, Report
from models.conversations import Conversation, Membership
from models.housekeeping import Erasure, Tombstone
from models.messages import DELIVERED_INDEX, MESSAGES, WAITING_INDEX
from relay.security.pseudonyms import Pseudonyms
from relay.store.mongo import DuplicateKeyError
from relay.wire.clock import utc_now
from relay.wire.stamps import stamp_now

_PAGE: Final = 500
_NO_DEVICE: Final = "-"
_KEPT: Final = frozenset({"id", "createdAt", "erasingAt"})
_GONE: Final = {name: "" for name in User.model_fields if name not in _KEPT}


@dataclass(frozen=True, slots=True)
class Intent:
    """Somebody is to be erased. ``at``: since when; tokens issued before bring nobody back."""

    user: str
    at: datetime


class Erasures:
    """What of a person is where, and how it goes."""

    def __init__(self, pseudonyms: Pseudonyms) -> None:
        self._pseudonyms = pseudonyms

    async def begin(self, user: str) -> Intent:
        """Writes down, durably, that this person is to be erased: from here on it will be done. Safe to repeat."""
        collection = Erasure.get_motor_collection()
        with contextlib.suppress(DuplicateKeyError):
            await collection.insert_one({"_id": user, "at": utc_now()})
        found = await collection.find_one({"_id": user})
        return Intent(user, utc_now() if found is None else found["at"])

    async def pending(self, limit: int) -> list[Intent]:
        """Who is being erased, the oldest first."""
        cursor = Erasure.get_motor_collection().find({}).sort([("at", 1)]).limit(limit)
        return [Intent(row["_id"], row["at"]) for row in await cursor.to_list(limit)]

    async def is_pending(self, intent: Intent) -> bool:
        """Whether it has not ended yet. Afterwards the same id may be somebody's again."""
        found = await Erasure.get_motor_collection().find_one({"_id": intent.user})
        return found is not None and found["at"] == intent.at

    async def close_account(self, intent: Intent) -> None:
        """Empties the account: no name, no password, found by nobody, tokens refused. Its bare id stays until ``finish``, so
        that nothing takes its place in between."""
        await User.get_motor_collection().update_one(
            {"_id": intent.user}, {"$set": {"erasingAt": intent.at}, "$unset": _GONE}
        )

    async def bury(self, intent: Intent) -> None:
        """Writes the tombstone."""
        pseudonym = self._pseudonyms.of(intent.user)
        await Tombstone.get_motor_collection().update_one(
            {"_id": pseudonym}, {"$max": {"at": intent.at}}, upsert=True
        )

    async def end_devices(self, intent: Intent) -> list[str]:
        """Makes every device no recipient, without session and name; the keys of all of them."""
        collection = Device.get_motor_collection()
        now = utc_now()
        strip = {
            "$unset": {"session": "", "push": "", "name": "", "platform": "", "gap": "", "fullSince": ""}
        }
        ended = {"$set": {"removedAt": now, "endedAt": now, "updatedAt": stamp_now()}}
        await collection.update_many({"user": intent.user, "removedAt": None}, ended | strip)
        await collection.update_many({"user": intent.user}, strip)
        return [row["_id"] async for row in collection.find({"user": intent.user}, {"_id": 1})]

    async def drop_contacts(self, intent: Intent) -> None:
        """Their contacts, and what others called them. Others keep, as long as of any removed contact, that this one is
        removed."""
        collection = Contact.get_motor_collection()
        await _delete(collection, {"owner": intent.user})
        bare = {"$set": {"sortKey": ""}, "$unset": {"name": "", "blockedAt": ""}}
        # Of who was removed before nothing is new: their time runs already.
        await _update(
            collection, {"user": intent.user, "removedAt": {"$ne": None}, "sortKey": {"$ne": ""}}, bare
        )
        now = stamp_now()
        removed = {"listed": False, "blocked": False, "removedAt": now, "updatedAt": now}
        await _update(
            collection,
            {"user": intent.user, "removedAt": None},
            {**bare, "$set": {**bare["$set"], **removed}},
        )

    async def drop_reports(self, intent: Intent) -> None:
        """Their reports; those about them are closed and keep a pseudonym, and nothing that anybody wrote."""
        collection = Report.get_motor_collection()
        await _delete(collection, {"reporter": intent.user})
        now = utc_now()
        await collection.update_many(
            {"user": intent.user, "closedAt": None}, {"$set": {"closedAt": now}, "$unset": {"openKey": ""}}
        )
        await collection.update_many(
            {"user": intent.user},
            {"$set": {"user": self._pseudonyms.of(intent.user)}, "$unset": {"text": "", "messages": ""}},
        )

    async def drop_memberships(self, intent: Intent) -> None:
        """What is left of their memberships. A row stays as long as they have not left that conversation, or a change of it is
        under way, which may name them."""
        rows = Membership.get_motor_collection()
        collection = Conversation.get_motor_collection()
        query = {"user": intent.user}
        left = {row["_id"]: row.get("removedAt") async for row in rows.find(query, {"removedAt": 1})}
        names = list(left)
        for start in range(0, len(names), _PAGE):
            page = {name.partition(" ")[0]: name for name in names[start : start + _PAGE]}
            cursor = collection.find({"_id": {"$in": list(page)}}, {"dissolvedAt": 1, "pending.at": 1})
            busy = {
                row["_id"]
                async for row in cursor
                if row.get("pending") or (row.get("dissolvedAt") is None and left[page[row["_id"]]] is None)
            }
            await rows.delete_many({"_id": {"$in": [name for key, name in page.items() if key not in busy]}})

    async def is_complete(self, intent: Intent) -> bool:
        """Whether nothing is under way any more that names them: a conversation whose creation stopped half-way has no
        memberships yet."""
        user = intent.user
        naming = {
            "pending.at": {"$exists": True},
            "$or": [{"pending.users": user}, {"pending.by": user}],
        }
        return (
            await Membership.get_motor_collection().find_one({"user": user}, {"_id": 1}) is None
            and await Conversation.get_motor_collection().find_one(naming, {"_id": 1}) is None
        )

    async def rename_deliveries(
        self, intent: Intent, devices: Sequence[str], where: Mapping[str, Any]
    ) -> None:
        """In messages of others that still wait, and meet the condition ``where``: who has got them becomes a pseudonym, and
        what was sealed for their devices goes."""
        sealed = {"sealed": {"device": {"$in": list(devices)}}}
        name = {
            "deliveredTo.$[own].user": self._pseudonyms.of(intent.user),
            "deliveredTo.$[own].device": _NO_DEVICE,
        }
        await _change_messages(
            {"deliveredTo.user": intent.user, **where},
            DELIVERED_INDEX,
            {"$set": name, "$pull": sealed},
            [{"own.user": intent.user}],
        )
        await _change_messages(
            {"awaiting": {"$in": list(devices)}, "sealed.device": {"$in": list(devices)}, **where},
            WAITING_INDEX,
            {"$pull": sealed},
            None,
        )

    async def finish(self, intent: Intent) -> None:
        """The last of it: devices, the account's id, and the intent itself."""
        await _delete(Device.get_motor_collection(), {"user": intent.user})
        await User.get_motor_collection().delete_one({"_id": intent.user, "erasingAt": {"$ne": None}})
        await Erasure.get_motor_collection().delete_one({"_id": intent.user})


async def _delete(collection: Any, query: Mapping[str, Any]) -> None:
    """Deletes what matches, in pages: one call must not take longer than its time limit."""
    while True:
        found = [row["_id"] async for row in collection.find(query, {"_id": 1}).limit(_PAGE)]
        if found:
            await collection.delete_many({"_id": {"$in": found}})
        if len(found) < _PAGE:
            return


async def _update(collection: Any, query: Mapping[str, Any], change: Mapping[str, Any]) -> None:
    """Changes what matches, in pages, until nothing does: the change must see to that."""
    while True:
        found = [row["_id"] async for row in collection.find(query, {"_id": 1}).limit(_PAGE)]
        if found:
            await collection.update_many({"_id": {"$in": found}, **query}, change)
        if len(found) < _PAGE:
            return


async def _change_messages(
    query: Mapping[str, Any],
    index: str,
    change: Mapping[str, Any],
    filters: list[Mapping[str, Any]] | None,
) -> None:
    """Changes the messages that match, each by its shard key, until none matches any more."""
    collection = User.get_motor_collection().database[MESSAGES]
    before: set[str] = set()
    while True:
        cursor = collection.find(query, {"conversationId": 1}, hint=index).limit(_PAGE)
        found = {row["_id"]: row["conversationId"] async for row in cursor}
        # What is no message, and stays as it is, comes back.
        if not found or before.issuperset(found):
            return
        before = set(found)
        await collection.bulk_write(
            [
                UpdateOne({"_id": key, "conversationId": conversation}, change, array_filters=filters)
                for key, conversation in found.items()
            ],
            ordered=False,
        )
