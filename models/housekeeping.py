"""What the relay still has to do, written down before it begins: a crash in between is healed by a job."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from beanie import Document
from pydantic import Field
from pymongo import ASCENDING, IndexModel


class Release(Document):
    """What waits for a mailbox shall be released. ``mailbox`` is a device key, or a user id for a person's part in one
    conversation (``conversationId``) or in all. Done at ``dueAt``, twice: once more when nothing resolved before can be
    on its way any more (``passes``)."""

    id: str  # type: ignore[assignment]
    mailbox: str
    conversationId: str | None = Field(default=None)
    at: datetime
    dueAt: datetime
    passes: int = Field(default=0)

    class Settings:
        name = "releases"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("dueAt", ASCENDING)], name="dueAt"),
            IndexModel([("mailbox", ASCENDING)], name="mailbox"),
        ]


class Erasure(Document):
    """A person is being erased. ``id`` is the user id; gone when everything is."""

    id: str  # type: ignore[assignment]
    at: datetime

    class Settings:
        name = "erasures"
        indexes: ClassVar[list[IndexModel]] = [IndexModel([("at", ASCENDING)], name="at")]


class Tombstone(Document):
    """An account that was erased. ``id`` is the user id's pseudonym: tokens issued before ``at`` bring nobody back."""

    id: str  # type: ignore[assignment]
    at: datetime

    class Settings:
        name = "tombstones"


class Setting(Document):
    """Something all nodes must agree on."""

    id: str  # type: ignore[assignment]
    value: Any

    class Settings:
        name = "settings"


class Node(Document):
    """A running relay. ``at`` is when it last said so, by MongoDB's clock."""

    id: str  # type: ignore[assignment]
    at: datetime

    class Settings:
        name = "nodes"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("at", ASCENDING)], name="at_ttl", expireAfterSeconds=3600)
        ]


class Balance(Document):
    """A node's books: what of all deliveries it has accepted and not ended (negative when it ended what others accepted). ``id`` is
    of one life of a node. ``at`` is when it last said so, by MongoDB's clock; every time ``beats`` grows by one. ``turnover`` grows
    with all that is booked, ``quiet`` when nothing is under way. ``left``: handed over, for another node to take; ``takenBy``: being
    taken by that one; ``took``: those whose balances are in this one, and which are about to be removed. ``place`` tells the process."""

    id: str  # type: ignore[assignment]
    at: datetime
    balance: int
    turnover: int
    beats: int = Field(default=0)
    quiet: bool = Field(default=False)
    place: str = Field(default="")
    left: bool = Field(default=False)
    takenBy: str | None = Field(default=None)
    took: list[str] = Field(default_factory=list)

    class Settings:
        name = "balances"
