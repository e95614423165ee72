"""Releases: what waits for a device or a member that is none any more is taken off its messages, so that nobody's message
waits for it.

A release is written down before its cause takes effect, and is done twice: once its cause has taken effect, and when nothing
that was resolved before can still be on its way. A node that dies in between leaves it to whoever looks next. What waits on
shards that do not answer is released when they are back: until every shard was looked at a release stays due.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final

import structlog
from pymongo import ReturnDocument

from models.accounts import Device, User
from models.conversations import Membership
from models.housekeeping import Release
from relay.store.accounts import milliseconds
from relay.store.batcher import BatcherClosed
from relay.store.lanes import EndingLanes
from relay.store.messages import Messages
from relay.store.mongo import PyMongoError, brief
from relay.tasks import each
from relay.wire.clock import utc_now
from relay.wire.ids import RELAY_USER, any_device_key, blocked_key, new_id

_PAGE: Final = 500
_DUE: Final = 100
_AT_ONCE: Final = 3
_GIVE_UP_SECONDS: Final = 30.0
# Its author comes first; who looks later finds what an author left undone.
_AUTHOR: Final = timedelta(seconds=10)
_AT_WORK: Final = timedelta(seconds=45)
_AGAIN: Final = timedelta(seconds=5)
_ABANDONED: Final = timedelta(minutes=5)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Planned:
    """A release that is written down."""

    document: Mapping[str, Any]


class Releases:
    """The ``releases`` collection, and what it asks for. ``settle_seconds``: how long after a change a message may still be
    committed to recipients resolved before it."""

    def __init__(self, messages: Messages, endings: EndingLanes, *, settle_seconds: float) -> None:
        self._messages = messages
        self._endings = endings
        self._settle = timedelta(seconds=settle_seconds)

    async def plan(self, mailbox: str, *, conversation: str | None = None) -> Planned:
        """Writes down that a mailbox (a device key, or a user id for all of a person's) is to be released, in one
        conversation or in all. Call before the removal, ``run`` after it."""
        moment = utc_now()
        document: dict[str, Any] = {
            "_id": new_id(),
            "mailbox": mailbox,
            "at": moment,
            "dueAt": moment + _AUTHOR,
            "passes": 0,
        }
        if conversation is not None:
            document["conversationId"] = conversation
        await Release.get_motor_collection().insert_one(document)
        return Planned(document)

    async def is_ahead(self, mailbox: str) -> bool:
        """Whether a release of this mailbox in all conversations is planned, all of which is still to come."""
        ahead = {"mailbox": mailbox, "conversationId": None, "passes": 0}
        return await Release.get_motor_collection().find_one(ahead, {"_id": 1}) is not None

    async def run(self, planned: Planned) -> None:
        """Does a planned release now, as far as the messages' shards let it; the job does the rest, and repeats it later. Raises
        what the store raises when it cannot even be looked up."""
        collection = Release.get_motor_collection()
        document = dict(planned.document)
        name = document.pop("_id")
        # An author who was held up for long may find that it was given up for never having taken effect.
        await collection.update_one({"_id": name}, {"$setOnInsert": document}, upsert=True)
        found = await collection.find_one({"_id": name})
        if found is not None:
            await self._do(found)

    async def run_due(self) -> int:
        """Does the releases that are due; returns how many."""
        cursor = Release.get_motor_collection().find({"dueAt": {"$lte": utc_now()}}).sort([("dueAt", 1)])
        documents = await cursor.limit(_DUE).to_list(_DUE)
        await each(documents, self._do_or_tell, at_once=_AT_ONCE, name="release")
        return len(documents)

    async def _do_or_tell(self, document: Mapping[str, Any]) -> None:
        try:
            await self._do(document)
        except Exception as error:  # noqa: BLE001 - a document that is none of ours may be in the way
            # It comes again; the others must not wait for it.
            log.warning("a release is not done yet", error=brief(error))

    async def _do(self, document: Mapping[str, Any]) -> None:
        """Whoever moves ``dueAt`` does it: two nodes at once would count it twice."""
        collection = Release.get_motor_collection()
        name, mailbox, at = document["_id"], document["mailbox"], document["at"]
        claimed = await collection.find_one_and_update(
            {"_id": name, "dueAt": document["dueAt"]},
            {"$set": {"dueAt": utc_now() + _AT_WORK}},
            return_document=ReturnDocument.AFTER,
        )
        if claimed is None:
            return
        conversation = document.get("conversationId")
        removed, before = await self._removed(mailbox, conversation, at)
        if not removed:
            # Not yet, or its cause never took effect.
            if utc_now() - at > _ABANDONED:
                await collection.delete_one({"_id": name})
            else:
                await collection.update_one({"_id": name}, {"$set": {"dueAt": utc_now() + _AGAIN}})
            return
        if not await self._try_release(name, mailbox, conversation, before):
            await collection.update_one({"_id": name}, {"$set": {"dueAt": utc_now() + _AGAIN}})
        elif claimed["passes"]:
            await collection.delete_one({"_id": name})
        else:
            last = {"$set": {"dueAt": utc_now() + self._settle, "passes": 1}}
            await collection.update_one({"_id": name}, last)

    async def _removed(self, mailbox: str, conversation: str | None, at: datetime) -> tuple[bool, int | None]:
        """Whether the cause has taken effect, and up to when (ms) messages were for what was removed: None when it has not
        come back."""
        if conversation is not None:
            row = await Membership.get_motor_collection().find_one({"_id": f"{conversation} {mailbox}"})
            if row is None or row.get("removedAt") is not None:
                return True, None
            return row["joinedAt"] >= at, milliseconds(row["joinedAt"])
        if "/" not in mailbox:
            user = await User.get_motor_collection().find_one({"_id": mailbox}, {"createdAt": 1})
            # Erased, and meanwhile somebody of the same name may have come.
            again = user is not None and user["createdAt"] >= at
            return True, milliseconds(user["createdAt"]) if user is not None and again else None
        device = await Device.get_motor_collection().find_one({"_id": mailbox}, {"removedAt": 1, "since": 1})
        if device is None or device.get("removedAt") is not None:
            return True, None
        since = device.get("since")
        return since is not None and since >= at, None if since is None else milliseconds(since)

    async def _try_release(
        self, name: str, mailbox: str, conversation: str | None, before: int | None
    ) -> bool:
        try:
            return await self._release(name, mailbox, conversation, before)
        except (PyMongoError, BatcherClosed) as error:
            # Its cause has taken effect, and who asked for that must not be told otherwise.
            log.warning("a release is not done yet", error=brief(error))
            return False

    async def _release(self, name: str, mailbox: str, conversation: str | None, before: int | None) -> bool:
        """Releases what can be; whether that is all there is."""
        keys = await self._keys(mailbox)
        stuck: set[str] = set()
        page: set[str] = set()
        while True:
            found, complete = await self._messages.awaited(
                keys,
                limit=_PAGE,
                conversation=conversation,
                before=before,
                exclude=stuck,
                # Who was removed is told so by a system message of that very conversation.
                exclude_sender=None if conversation is None else RELAY_USER,
            )
            if not found:
                return complete
            # What comes twice is no message and cannot be released.
            stuck |= page.intersection(found)
            page = set(found) - stuck
            # However many messages wait: who works at it is not taken for dead.
            await Release.get_motor_collection().update_one(
                {"_id": name}, {"$set": {"dueAt": utc_now() + _AT_WORK}}
            )
            if page and not await self._endings.release(
                list(page), keys, deadline=monotonic() + _GIVE_UP_SECONDS
            ):
                return False

    async def _keys(self, mailbox: str) -> list[str]:
        if "/" in mailbox:
            return [mailbox]
        cursor = Device.get_motor_collection().find({"user": mailbox}, {"_id": 1})
        devices = [row["_id"] async for row in cursor]
        return [*devices, any_device_key(mailbox), blocked_key(mailbox)]
