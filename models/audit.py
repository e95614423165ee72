"""``audit``: who did what, on whom, from where, when. Append-only and chained (relay.store.audit)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from beanie import Document
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel


class Personal(BaseModel):
    """A personal value with the salt of its hash. Erasure drops both; the hash stays in the chain."""

    value: str
    salt: str


class AuditEntry(Document):
    """One act. ``id`` counts from 1 without gaps.

    ``actorKey`` and ``targetKey`` are pseudonyms (keyed hashes) of the people concerned; ``hashes`` the salted hashes of the
    values in ``personal``; ``hash`` is the keyed hash of everything but ``personal`` with the hash of the entry before.
    """

    id: int  # type: ignore[assignment]
    at: datetime
    act: str
    actorKey: str
    targetKey: str | None = Field(default=None)
    details: dict[str, Any] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)
    personal: dict[str, Personal] = Field(default_factory=dict)
    previous: str
    hash: str

    class Settings:
        name = "audit"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("actorKey", ASCENDING), ("_id", ASCENDING)], name="actorKey"),
            IndexModel([("targetKey", ASCENDING), ("_id", ASCENDING)], name="targetKey"),
            IndexModel(
                [("details.change", ASCENDING)],
                name="change",
                partialFilterExpression={"details.change": {"$exists": True}},
            ),
        ]


class AuditHead(Document):
    """The last entry of the chain, so that entries missing at its end are noticed. ``id`` is ``"head"``."""

    id: str  # type: ignore[assignment]
    entry: int
    hash: str
    mac: str

    class Settings:
        name = "audit_head"
