"""What changed for one user since a cursor: conversations, read cursors, contacts, devices, preferences.

Each kind is read by the stamp of its last change (relay.wire.stamps). A write takes its time, so a cursor never goes further
than a moment ago: what is younger is told again next time, and applying it twice changes nothing. Pages that follow each
other do go further, and come back at the last of them to a moment before the first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from models.accounts import Device, User
from models.contacts import REMOVED_SECONDS, Contact
from models.conversations import Membership
from relay.store.accounts import milliseconds
from relay.store.conversations import Conversations, ConversationView
from relay.store.reading import ReadCursor, cursor_of, hidden_readers
from relay.wire import codec
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.stamps import STAMPS, Stamps

_PAGE: Final = 200
_READS: Final = 500
_DEVICES: Final = 1000
_CONVERSATIONS: Final = 20_000
_CHUNK: Final = 200
_VERSION: Final = 1

Place = tuple[int, str]
_START: Final[Place] = (0, "")


@dataclass(frozen=True, slots=True)
class ContactChange:
    """A contact as it is now; neither ``listed`` nor ``blocked``: it is gone."""

    user: str
    name: str | None
    listed: bool
    blocked: bool


@dataclass(frozen=True, slots=True)
class DeviceChange:
    """An own device as it is now. Times in milliseconds."""

    id: str
    name: str | None
    platform: str | None
    removed: bool
    created_at: int


@dataclass(frozen=True, slots=True)
class ChangesPage:
    """``removed`` are ids of conversations that this user is no member of any more. ``me``: the profile or the preferences
    have changed. ``more``: ask again at once."""

    conversations: list[ConversationView]
    removed: list[str]
    reads: list[ReadCursor]
    contacts: list[ContactChange]
    devices: list[DeviceChange]
    me: bool
    next: str
    more: bool


@dataclass(frozen=True, slots=True)
class _Since:
    """An opened cursor: when it was made (ms), and the place in each kind. ``settled``: where to come back to after the last
    of several pages (ms), 0 between them."""

    at: int
    conversations: Place = _START
    contacts: Place = _START
    reads: Place = _START
    devices: int = 0
    me: int = 0
    settled: int = 0

    @property
    def lowest(self) -> int:
        """A time (ms) up to which everything has been told."""
        return max(1, min(self.conversations[0], self.contacts[0], self.reads[0], self.devices, self.me))


class Changes:
    """Reads changes."""

    def __init__(self, conversations: Conversations, stamps: Stamps = STAMPS) -> None:
        self._conversations = conversations
        self._stamps = stamps

    async def since(self, user: str, cursor: str | None) -> ChangesPage:
        """A page of what changed since ``cursor``; everything from the beginning when it is None. Raises RelayError
        ``bad_request`` for a cursor that is none, ``resync`` for one so old that removals may be forgotten."""
        now = milliseconds(utc_now())
        since = _Since(now) if cursor is None else _open(cursor)
        if since.at < now - REMOVED_SECONDS * 1000:
            raise RelayError("resync", "this cursor is too old; fetch everything again")
        # Before anything is read.
        settled = since.settled or self._stamps.settled() or since.lowest
        rows = await _rows(Membership, {"user": user}, since.conversations, limit=_PAGE)
        contacts = await _rows(Contact, {"owner": user}, since.contacts, limit=_PAGE)
        reads = await self._reads(user, since.reads)
        hidden = await hidden_readers(user, {row["user"] for row in reads} - {user})
        devices = await self._devices(user, since.devices)
        active = [row for row in rows if row.get("removedAt") is None]
        views = await self._conversations.listed(active)
        shown = {view.id for view in views}
        me = await self._me_changed(user, since.me)
        more = len(rows) == _PAGE or len(contacts) == _PAGE or len(reads) == _READS
        limit = None if more else settled
        following = _Since(
            at=now,
            conversations=_place(rows, "updatedAt", limit, since.conversations),
            contacts=_place(contacts, "updatedAt", limit, since.contacts),
            reads=_place(reads, "readAt", limit, since.reads),
            devices=max(since.devices, settled),
            me=max(since.me, settled),
            settled=settled if more else 0,
        )
        return ChangesPage(
            conversations=views,
            removed=[row["conversationId"] for row in rows if row["conversationId"] not in shown],
            reads=[cursor_of(row) for row in reads if row["user"] not in hidden],
            contacts=[
                ContactChange(row["user"], row.get("name"), row["listed"], row["blocked"]) for row in contacts
            ],
            devices=devices,
            me=me,
            next=_close(following),
            more=more,
        )

    async def _reads(self, user: str, place: Place) -> list[Mapping[str, Any]]:
        collection = Membership.get_motor_collection()
        cursor = collection.find({"user": user, "removedAt": None}, {"conversationId": 1}).limit(
            _CONVERSATIONS
        )
        names = [row["conversationId"] async for row in cursor]
        found: list[Mapping[str, Any]] = []
        for start in range(0, len(names), _CHUNK):
            query = {"conversationId": {"$in": names[start : start + _CHUNK]}, "removedAt": None}
            found += await _rows(Membership, query, place, field="readAt", limit=_READS)
        found.sort(key=lambda row: (row["readAt"], row["_id"]))
        return found[:_READS]

    async def _devices(self, user: str, since: int) -> list[DeviceChange]:
        cursor = Device.get_motor_collection().find({"user": user}).limit(_DEVICES)
        return [
            DeviceChange(
                id=row["_id"].partition("/")[2],
                name=row.get("name"),
                platform=row.get("platform"),
                removed=row.get("removedAt") is not None,
                created_at=milliseconds(row["createdAt"]),
            )
            async for row in cursor
            if milliseconds(row.get("updatedAt") or row["createdAt"]) > since
        ]

    async def _me_changed(self, user: str, since: int) -> bool:
        row = await User.get_motor_collection().find_one({"_id": user}, {"updatedAt": 1, "createdAt": 1})
        return row is not None and milliseconds(row.get("updatedAt") or row["createdAt"]) > since


async def _rows(
    model: type[Membership] | type[Contact],
    query: Mapping[str, Any],
    place: Place,
    *,
    field: str = "updatedAt",
    limit: int,
) -> list[Mapping[str, Any]]:
    moment = datetime.fromtimestamp(place[0] / 1000, UTC)
    wanted = {
        **query,
        field: {"$gte": moment},
        "$or": [{field: {"$gt": moment}}, {"_id": {"$gt": place[1]}}],
    }
    cursor = model.get_motor_collection().find(wanted).sort([(field, 1), ("_id", 1)]).limit(limit)
    found: list[Mapping[str, Any]] = await cursor.to_list(limit)
    return found


def _place(rows: Sequence[Mapping[str, Any]], field: str, settled: int | None, before: Place) -> Place:
    """Where the next page begins: behind this one, but not behind what is settled when this was the last."""
    reached = (milliseconds(rows[-1][field]), str(rows[-1]["_id"])) if rows else before
    return reached if settled is None else min(reached, (settled, ""))


def _close(since: _Since) -> str:
    places = [*since.conversations, *since.contacts, *since.reads, since.devices, since.me, since.settled]
    parts = [_VERSION, since.at, *places]
    return base64.urlsafe_b64encode(codec.dumps(parts).encode()).decode()


def _open(cursor: str) -> _Since:
    try:
        parts = codec.loads(base64.urlsafe_b64decode(cursor.encode()).decode())
        version, at, c0, c1, k0, k1, r0, r1, devices, me, settled = parts
        numbers = (version, at, c0, k0, r0, devices, me, settled)
        if any(type(number) is not int or not 0 <= number < 253_402_300_800_000 for number in numbers):
            raise ValueError
        if version != _VERSION or any(type(text) is not str for text in (c1, k1, r1)):
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RelayError):
        raise RelayError("bad_request", "since is not one of our cursors") from None
    return _Since(at, (c0, c1), (k0, k1), (r0, r1), devices, me, settled)
