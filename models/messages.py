"""``messages`` and ``fates``: what waits, and what became of what is gone.

The message path works on plain dictionaries, so these are the field names and indexes, not Beanie documents (which would
encode every document again).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NotRequired, TypedDict

from bson.datetime_ms import DatetimeMS
from pymongo import ASCENDING, IndexModel

MESSAGES: Final = "messages"
FATES: Final = "fates"
CREATED_TTL_INDEX: Final = "createdAt_ttl"
WAITING_INDEX: Final = "awaiting_seq"
DELIVERED_INDEX: Final = "deliveredTo_user"
FATES_TTL_INDEX: Final = "at_ttl"
EXPIRES_GRACE_SECONDS: Final = 60
"""The expiry job ends messages as soon as they are due, and counts them; MongoDB deletes, uncounted, what the job has not
reached a minute later."""


class SenderField(TypedDict):
    """Who sent a message."""

    user: str
    device: str


class MessageFields(TypedDict, total=False):
    """A stored message, or one of its parts. ``awaiting`` only ever shrinks. ``trimmed`` counts the full mailboxes that it was
    left out of; ``silent`` are people whose mailbox for what they have blocked was one of them: to the sender they look as if
    it waited. ``resent``: its sender did not know whether it was taken before; until that is known it may be a second copy of
    one that is gone.

    A message to many devices is stored in ``parts`` documents under one ``writing``: its head, and parts with a ``part``
    number. Before its parts are written the head is a *claim*: it holds the id and nothing to deliver, ``claimedAt`` is there,
    and ``abandoned`` names writings of others that were under way (docs/decisions/0010). ``trimmed`` and ``silent`` are the
    head's.
    """

    _id: str
    conversationId: str
    id: str
    sender: SenderField
    seq: int
    createdAt: DatetimeMS
    kind: str
    body: str | None
    structured: bool
    replyTo: str
    resent: bool
    media: list[str]
    sealed: list[dict[str, str]]
    awaiting: list[str]
    deliveredTo: list[dict[str, Any]]
    expiresAt: DatetimeMS
    parts: int
    writing: str
    part: int
    claimedAt: DatetimeMS
    abandoned: list[dict[str, Any]]
    trimmed: int
    silent: list[str]


class FateEntry(TypedDict):
    """What became of one message, or one part; ``delivered`` lists the people who got it, its sender aside. ``parts`` and
    ``writing`` name the others of a message in parts. ``silent`` are people who, to the sender, have yet to get it: of a part
    those who acknowledged it quietly, as long as the message waits."""

    id: str
    sender: SenderField
    seq: int
    at: int
    fate: str
    delivered: list[str]
    parts: NotRequired[int]
    writing: NotRequired[str]
    silent: NotRequired[list[str]]


def message_indexes(ttl_seconds: int) -> list[IndexModel]:
    """The indexes of ``messages``. The first also serves as the shard key's."""
    return [
        IndexModel([("conversationId", ASCENDING), ("createdAt", ASCENDING)], name="conversation_createdAt"),
        IndexModel([("awaiting", ASCENDING), ("seq", ASCENDING), ("_id", ASCENDING)], name=WAITING_INDEX),
        IndexModel(
            [("deliveredTo.user", ASCENDING)],
            name=DELIVERED_INDEX,
            partialFilterExpression={"deliveredTo.user": {"$exists": True}},
        ),
        IndexModel([("createdAt", ASCENDING)], name=CREATED_TTL_INDEX, expireAfterSeconds=ttl_seconds),
        IndexModel(
            [("expiresAt", ASCENDING)],
            name="expiresAt_ttl",
            expireAfterSeconds=EXPIRES_GRACE_SECONDS,
            partialFilterExpression={"expiresAt": {"$exists": True}},
        ),
        IndexModel(
            [("claimedAt", ASCENDING)],
            name="claimedAt",
            partialFilterExpression={"claimedAt": {"$exists": True}},
        ),
    ]


def fate_indexes(ttl_seconds: int) -> list[IndexModel]:
    """The indexes of ``fates``."""
    return [
        IndexModel([("entries.id", ASCENDING)], name="entries_id"),
        IndexModel([("at", ASCENDING)], name=FATES_TTL_INDEX, expireAfterSeconds=ttl_seconds),
    ]


ttl_indexes: Final[Mapping[str, str]] = {MESSAGES: CREATED_TTL_INDEX, FATES: FATES_TTL_INDEX}
