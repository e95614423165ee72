"""Changes of a conversation, one after the other, none lost half-way.

There are no transactions (a sharded cluster's control collections need none). A *revision* is written into the
conversation first (``pending``), with everything needed to carry it out; then its steps are done, each of which may be
repeated; then it is taken out. Whoever meets a revision whose author is gone carries it out. Each revision has a number, and
a membership remembers the last that wrote it: an author that was stopped for a while and wakes up late changes nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final, Literal, NamedTuple

from pymongo import ReturnDocument, UpdateOne

from models.conversations import Conversation, Membership
from relay.store.attempts import Attempts
from relay.store.mongo import DuplicateKeyError
from relay.wire import ids
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.stamps import stamp_now

Event = Literal["created", "added", "removed", "left", "role", "changed", "dissolved"]
ConversationType = Literal["direct", "group"]
_PATIENCE_SECONDS: Final = 3.0
# A live node that is this late with it has given up, or hangs.
_STALLED: Final = timedelta(seconds=60)
_REPAIRED: Final = timedelta(seconds=2)
_REPAIR: Final = 100
_SCANNED: Final = 1000


class Origin(NamedTuple):
    """Where somebody acts from, for the audit trail."""

    address: str
    agent: str


NOWHERE: Final = Origin("", "")


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision about a conversation is made from. ``role`` is the actor's; ``roles`` those of the members among
    the people concerned; ``admins`` counts up to two; ``settings`` are the conversation's fields as they are stored."""

    type: ConversationType
    role: str
    roles: Mapping[str, str]
    admins: int
    members: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What shall be done: the event told to the members, on whom, and the conversation's fields to set (None: absent
    from now on)."""

    event: Event
    users: Sequence[str] = ()
    role: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Revision:
    """A change that is under way. ``id`` is also the id of the system message that tells of it. ``tries``, ``due`` and ``applied`` are
    relay.store.attempts'."""

    conversation: str
    type: ConversationType
    id: str
    number: int
    event: Event
    by: str
    users: tuple[str, ...]
    role: str | None
    at: datetime
    node: str = ""
    address: str = ""
    agent: str = ""
    tries: int = 0
    due: datetime | None = None
    applied: bool = False


class Revisions:
    """Begins, carries out and ends revisions. ``lives`` says whether another node is still there to do so with its own."""

    def __init__(
        self,
        node: str = "alone",
        lives: Callable[[str], Awaitable[bool]] | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self._node = node
        self._lives = lives or _nobody_lives
        self._attempts = attempts or Attempts()
        self._under_way: dict[str, int] = {}
        self._turns: dict[str, tuple[asyncio.Lock, list[object]]] = {}

    @asynccontextmanager
    async def turn(self, conversation: str) -> AsyncIterator[None]:
        """One revision of a conversation at a time on this node, first come first served."""
        lock, waiting = self._turns.setdefault(conversation, (asyncio.Lock(), []))
        mark = object()
        waiting.append(mark)
        try:
            async with lock:
                yield
        finally:
            waiting.remove(mark)
            if not waiting:
                self._turns.pop(conversation, None)

    @contextmanager
    def carrying(self, revision: Revision) -> Iterator[None]:
        """This node is at this revision: nobody else need take it up."""
        self._under_way[revision.id] = self._under_way.get(revision.id, 0) + 1
        try:
            yield
        finally:
            left = self._under_way.pop(revision.id) - 1
            if left:
                self._under_way[revision.id] = left

    async def is_pending(self, revision: Revision) -> bool:
        """Whether the revision is still to be carried out."""
        found = await Conversation.get_motor_collection().find_one(
            {"_id": revision.conversation, "pending.id": revision.id}, {"_id": 1}
        )
        return found is not None

    async def is_abandoned(self, revision: Revision) -> bool:
        """Whether nobody is at this revision any more."""
        if utc_now() - revision.at > _STALLED:
            return True
        if revision.node == self._node:
            return revision.id not in self._under_way
        return not await self._lives(revision.node)

    async def create(
        self,
        creator: str,
        kind: ConversationType,
        members: Sequence[str],
        *,
        name: str | None,
        ref: str | None,
        origin: Origin = NOWHERE,
    ) -> tuple[str, Revision | None, bool]:
        """Makes a conversation, or finds the one that exists: the direct one of the same pair, or the one that this user
        made with the same ``ref``. Its id, its unfinished revision if any, and whether it is new."""
        people = list(dict.fromkeys([creator, *members]))
        unique = _unique(creator, kind, members, ref)
        moment = utc_now()
        document: dict[str, Any] = {
            "_id": ids.new_id(),
            "type": kind,
            "createdBy": creator,
            "createdAt": moment,
            "rev": 1,
            "memberCount": len(people),
            "pending": {
                "id": ids.new_id(),
                "number": 1,
                "event": "created",
                "by": creator,
                "users": people,
                "at": moment,
                "node": self._node,
                **origin._asdict(),
            },
        }
        if name is not None:
            document["name"] = name
        if unique is not None:
            document["unique"] = unique
        collection = Conversation.get_motor_collection()
        try:
            await collection.insert_one(document)
        except DuplicateKeyError:
            found = await self.made(creator, kind, members, ref=ref)
            if found is None:
                raise RelayError("unavailable", "the conversation is being changed; try again") from None
            return *found, False
        return document["_id"], _pending(document), True

    async def made(
        self, creator: str, kind: ConversationType, members: Sequence[str], *, ref: str | None
    ) -> tuple[str, Revision | None] | None:
        """The conversation that such a creation would find, and its unfinished revision if any."""
        unique = _unique(creator, kind, members, ref)
        if unique is None:
            return None
        # Without the type MongoDB would not use the partial index.
        query = {"unique": {"$eq": unique, "$type": "string"}}
        found = await Conversation.get_motor_collection().find_one(query)
        return None if found is None else (found["_id"], _pending(found))

    async def begin(
        self,
        conversation: str,
        actor: str | None,
        concerned: Sequence[str],
        decide: Callable[[Situation], Proposal | None],
        *,
        everybody: bool = False,
        origin: Origin = NOWHERE,
    ) -> tuple[Revision | None, bool]:
        """Writes down what ``decide`` proposes, and returns it to be carried out, and True; None when there is nothing to
        do. False comes with an unfinished revision of somebody gone: carry it out and begin again. ``actor`` None is the
        relay itself.

        ``everybody``: all members are concerned. Raises RelayError ``not_found`` when the conversation is absent or not the
        actor's, ``unavailable`` when others change it all the time, and what ``decide`` raises.
        """
        collection = Conversation.get_motor_collection()
        until = monotonic() + _PATIENCE_SECONDS
        while True:
            document = await collection.find_one({"_id": conversation, "dissolvedAt": None})
            if document is None:
                raise RelayError("not_found", "no such conversation")
            pending = _pending(document)
            if pending is not None:
                if await self.is_abandoned(pending):
                    return pending, False
                if monotonic() >= until:
                    raise RelayError(
                        "unavailable", "the conversation is being changed; try again", retry_after=1000
                    )
                # Another node is at it, or this one with a creation; changes here take turns.
                await asyncio.sleep(random.uniform(0.02, 0.06))
                continue
            situation, people = await self._situation(document, actor, concerned, everybody)
            proposal = decide(situation)
            if proposal is None:
                return None, True
            begun = await self._write(
                document, actor, proposal, people if everybody else proposal.users, origin
            )
            if begun is not None:
                return begun, True

    async def apply(self, revision: Revision) -> bool:
        """Does the steps of a revision in the memberships. May be repeated. False, and nothing done, when somebody else has
        finished it: who was held up must not write anything of what has changed again since."""
        if not await self.is_pending(revision):
            return False
        rows = Membership.get_motor_collection()
        earlier = {"$or": [{"rev": {"$lt": revision.number}}, {"rev": None}]}
        # Not when it was decided: what is carried out late must not appear behind cursors given out meanwhile.
        now = stamp_now()
        stamp = {"updatedAt": now, "rev": revision.number}
        names = [f"{revision.conversation} {user}" for user in revision.users]
        if revision.event in ("created", "added"):
            await rows.bulk_write(_joins(revision, earlier, now), ordered=True)
        elif revision.event in ("removed", "left", "dissolved"):
            await rows.update_many(
                {"_id": {"$in": names}, "removedAt": None, **earlier},
                {"$set": {"removedAt": revision.at, **stamp}},
            )
        elif revision.event == "role":
            await rows.update_many(
                {"_id": {"$in": names}, "removedAt": None, **earlier},
                {"$set": {"role": revision.role, **stamp}},
            )
        present = {"conversationId": revision.conversation, "removedAt": None}
        if revision.event != "created":
            # Before the members are told by ``updatedAt``: a count that came later nobody would hear of.
            await Conversation.get_motor_collection().update_one(
                {"_id": revision.conversation, "pending.id": revision.id},
                {"$set": {"memberCount": await rows.count_documents(present)}},
            )
            await rows.update_many(present, {"$max": {"updatedAt": stamp_now()}})
        return True

    async def finish(self, revision: Revision) -> None:
        """The revision is carried out."""
        change: dict[str, Any] = {"$unset": {"pending": ""}}
        if revision.event == "dissolved":
            change["$set"] = {"dissolvedAt": revision.at}
            change["$unset"]["unique"] = ""
        await Conversation.get_motor_collection().update_one(
            {"_id": revision.conversation, "pending.id": revision.id}, change
        )

    async def stalled(self) -> list[Revision]:
        """Revisions whose author is gone and that are due to be tried (again), those first that were not yet; a bounded page of
        them. Conversations of a shard that does not answer are left out."""
        query = self._attempts.due(utc_now() - _REPAIRED)
        if query is None:
            return []
        cursor = (
            Conversation.get_motor_collection().find(query).sort([("pending.dueAt", 1), ("pending.at", 1)])
        )
        found: list[Revision] = []
        async for document in cursor.limit(_SCANNED):
            revision = _pending(document)
            if revision is not None and await self.is_abandoned(revision):
                found.append(revision)
                if len(found) == _REPAIR:
                    break
        return found

    async def claim(self, revision: Revision) -> Revision | None:
        """The revision as it is now, for this node to carry out; None when it is over, or somebody else's."""
        document = await self._attempts.claim(revision.conversation, revision.id, revision.due)
        return None if document is None else _pending(document)

    async def failed(self, revision: Revision, *, applied: bool) -> None:
        """It could not be carried out, and is tried again later. ``applied``: what is left is to tell its members."""
        await self._attempts.failed(
            revision.conversation, revision.id, revision.tries + 1, applied=applied or revision.applied
        )

    async def _situation(
        self, document: Mapping[str, Any], actor: str | None, concerned: Sequence[str], everybody: bool
    ) -> tuple[Situation, list[str]]:
        rows = Membership.get_motor_collection()
        name = document["_id"]
        query: dict[str, Any] = {"conversationId": name, "removedAt": None}
        if not everybody:
            query["user"] = {"$in": list({*concerned, *([] if actor is None else [actor])})}
        roles = {row["user"]: row["role"] async for row in rows.find(query, {"user": 1, "role": 1})}
        if actor is not None and actor not in roles:
            raise RelayError("not_found", "no such conversation")
        admins = 0
        if "admin" in roles.values():
            admins = await rows.count_documents(
                {"conversationId": name, "removedAt": None, "role": "admin"}, limit=2
            )
        count = document.get("memberCount")
        if count is None:
            count = await rows.count_documents({"conversationId": name, "removedAt": None})
        own = "admin" if actor is None else roles[actor]
        return Situation(document["type"], own, roles, admins, count, document), sorted(roles)

    async def _write(
        self,
        document: Mapping[str, Any],
        actor: str | None,
        proposal: Proposal,
        users: Sequence[str],
        origin: Origin,
    ) -> Revision | None:
        before = document.get("rev")
        number = (before or 0) + 1
        pending: dict[str, Any] = {
            "id": ids.new_id(),
            "number": number,
            "event": proposal.event,
            "by": ids.RELAY_USER if actor is None else actor,
            "users": list(users),
            "at": utc_now(),
            "node": self._node,
            **origin._asdict(),
        }
        if proposal.role is not None:
            pending["role"] = proposal.role
        fields = {name: value for name, value in proposal.fields.items() if value is not None}
        change: dict[str, Any] = {"$set": {"rev": number, "pending": pending, **fields}}
        gone = {name: "" for name, value in proposal.fields.items() if value is None}
        if gone:
            change["$unset"] = gone
        found = await Conversation.get_motor_collection().find_one_and_update(
            {"_id": document["_id"], "rev": before, "pending": None, "dissolvedAt": None},
            change,
            return_document=ReturnDocument.AFTER,
        )
        return None if found is None else _pending(found)


def _unique(creator: str, kind: ConversationType, members: Sequence[str], ref: str | None) -> str | None:
    """The key under which a second creation finds the first."""
    if kind == "direct":
        return "direct " + " ".join(sorted({creator, *members}))
    return None if ref is None else f"ref {creator} {ref}"


def _joins(revision: Revision, earlier: Mapping[str, Any], now: datetime) -> list[UpdateOne]:
    steps: list[UpdateOne] = []
    forgotten = dict.fromkeys(("removedAt", "mutedUntil", "pinned", "archived", "readUpTo", "readAt"), "")
    for user in revision.users:
        name = f"{revision.conversation} {user}"
        role = "member"
        if revision.event == "created" and revision.type == "group" and user == revision.by:
            role = "admin"
        row = {
            "conversationId": revision.conversation,
            "user": user,
            "role": role,
            "joinedAt": revision.at,
            "updatedAt": now,
            "rev": revision.number,
        }
        if revision.event == "added":
            back = {"_id": name, "removedAt": {"$ne": None}, **earlier}
            steps.append(UpdateOne(back, {"$set": row, "$unset": forgotten}))
        steps.append(UpdateOne({"_id": name}, {"$setOnInsert": row}, upsert=True))
    return steps


def _pending(document: Mapping[str, Any]) -> Revision | None:
    found = document.get("pending")
    if found is None:
        return None
    return Revision(
        conversation=document["_id"],
        type=document["type"],
        id=found["id"],
        number=found["number"],
        event=found["event"],
        by=found["by"],
        users=tuple(found["users"]),
        role=found.get("role"),
        at=found["at"] if found["at"].tzinfo else found["at"].replace(tzinfo=UTC),
        node=found.get("node", ""),
        address=found.get("address", ""),
        agent=found.get("agent", ""),
        tries=found.get("tries", 0),
        due=found.get("dueAt"),
        applied=found.get("applied", False),
    )


async def _nobody_lives(_: str) -> bool:
    return False
