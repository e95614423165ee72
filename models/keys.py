"""``public_keys`` and ``prekeys``: the end-to-end key directory. The relay holds public keys only."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from beanie import Document
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel

from models.accounts import REMOVED_SECONDS


class SignedKey(BaseModel):
    """A prekey with its signature (base64)."""

    id: int
    key: str
    signature: str


class RetiredKey(SignedKey):
    """A signed prekey that another has taken the place of."""

    retiredAt: datetime


class PublicKeys(Document):
    """The keys of one device; ``id`` is its device key. ``generation`` names the installation that the keys belong to:
    one-time prekeys of another are not handed out."""

    id: str  # type: ignore[assignment]
    user: str
    generation: str
    identityKey: str
    registrationId: int | None = Field(default=None)
    signedPreKey: SignedKey
    history: list[RetiredKey] = Field(default_factory=list)
    lastResort: SignedKey | None = Field(default=None)
    updatedAt: datetime

    class Settings:
        name = "public_keys"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [IndexModel([("user", ASCENDING)], name="user")]


class PreKey(Document):
    """A one-time prekey. It is handed out by setting ``claimedAt`` and stays, without the key, so that uploading it once
    more cannot bring it back, under whatever generation. ``id`` is ``"<device key> <kind> <key id> <hash of the key>"``.

    A mark stays as long as the device does. ``forgottenAt``: the device is signed out; when it does not come back the mark
    runs out, as the device itself does.
    """

    id: str  # type: ignore[assignment]
    device: str
    generation: str
    kind: Literal["one", "kem"]
    keyId: int
    key: str | None = Field(default=None)
    signature: str | None = Field(default=None)
    claimedAt: datetime | None = Field(default=None)
    forgottenAt: datetime | None = Field(default=None)

    class Settings:
        name = "prekeys"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [
                    ("device", ASCENDING),
                    ("generation", ASCENDING),
                    ("kind", ASCENDING),
                    ("claimedAt", ASCENDING),
                    ("keyId", ASCENDING),
                ],
                name="device_unclaimed",
            ),
            IndexModel(
                [
                    ("device", ASCENDING),
                    ("generation", ASCENDING),
                    ("kind", ASCENDING),
                    ("keyId", ASCENDING),
                ],
                name="device_keyId",
                unique=True,
            ),
            IndexModel(
                [("forgottenAt", ASCENDING)],
                name="forgottenAt_ttl",
                expireAfterSeconds=REMOVED_SECONDS,
                partialFilterExpression={"forgottenAt": {"$exists": True}},
            ),
        ]
