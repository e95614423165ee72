"""Messages as documents of MongoDB, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bson import encode as bson_encode
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

from models.messages import MessageFields
from relay.store.mongo import MESSAGE_CODEC
from relay.wire.envelope import Envelope
from relay.wire.ids import PARTS_KEY, blocked_key, user_of


def owner(document: Mapping[str, Any]) -> tuple[str, str] | None:
    """The user and device that sent a stored message; None when the document is no message."""
    sender = document.get("sender")
    if not isinstance(sender, Mapping) or "user" not in sender or "device" not in sender:
        return None
    return sender["user"], sender["device"]


def told_of(document: Mapping[str, Any], user: str) -> tuple[set[str], set[str]]:
    """The people who await a stored message, and those who have it, as its sender ``user`` may know: a person has it from
    their first device on, and who acknowledged quietly, or had no room for what they have blocked, counts as awaited as long as
    the message waits for anybody."""
    entries = document.get("deliveredTo") or ()
    delivered = {entry["user"] for entry in entries if not entry.get("quiet")} - {user}
    quiet = {entry["user"] for entry in entries if entry.get("quiet")}
    awaiting = {user_of(key) for key in document.get("awaiting") or () if key != PARTS_KEY}
    awaiting |= quiet.union(document.get("silent") or ())
    return awaiting - {user} - delivered, delivered


def encode(envelope: Envelope) -> RawBSONDocument:
    """The stored form of a message, and ``envelope.size`` set to its bytes.

    Encoded when it is submitted, so that what cannot be encoded fails alone. Raises bson.errors.BSONError.
    """
    in_parts = envelope.parts > 1
    document: MessageFields = {
        "_id": envelope.stored_id,
        "conversationId": envelope.conversation,
        "id": envelope.id,
        "sender": {"user": envelope.user, "device": envelope.device},
        "seq": envelope.seq,
        "createdAt": DatetimeMS(envelope.at),
        "kind": envelope.kind,
        "body": envelope.body,
        # The head goes last, after every part.
        "awaiting": [*envelope.awaiting, PARTS_KEY]
        if in_parts and not envelope.number
        else envelope.awaiting,
    }
    if in_parts:
        assert envelope.writing is not None
        document["parts"] = envelope.parts
        document["writing"] = envelope.writing
        if envelope.number:
            document["part"] = envelope.number
    if envelope.structured:
        document["structured"] = True
    if envelope.resent:
        document["resent"] = True
    if envelope.reply_to is not None:
        document["replyTo"] = envelope.reply_to
    if envelope.media:
        document["media"] = envelope.media
    if envelope.sealed:
        sealed = envelope.sealed
        if in_parts:
            sealed = {key: sealed[key] for key in envelope.awaiting if key in sealed}
        document["sealed"] = [{"device": key, "data": data} for key, data in sealed.items()]
    if envelope.expires is not None:
        document["expiresAt"] = DatetimeMS(envelope.expires)
    if envelope.trimmed:
        document["trimmed"] = len(envelope.trimmed)
        silent = [user_of(key) for key in envelope.trimmed if key == blocked_key(user_of(key))]
        if silent:
            document["silent"] = silent
    raw = bson_encode(document, codec_options=MESSAGE_CODEC)
    envelope.size = len(raw)
    return RawBSONDocument(raw, _RAW_CODEC)


_RAW_CODEC: Final = MESSAGE_CODEC.with_options(document_class=RawBSONDocument)


def decode(document: Mapping[str, Any]) -> Envelope:
    """A stored message. Raises KeyError, TypeError, ValueError or AttributeError on a document that is none."""
    sender = document["sender"]
    sealed = document.get("sealed")
    expires = document.get("expiresAt")
    envelope = Envelope(
        document["conversationId"],
        document["id"],
        user=sender["user"],
        device=sender["device"],
        seq=int(document["seq"]),
        at=int(document["createdAt"]),
        kind=document["kind"],
        body=document["body"],
        structured=document.get("structured", False),
        awaiting=list(document["awaiting"]),
        reply_to=document.get("replyTo"),
        media=document.get("media"),
        sealed={entry["device"]: entry["data"] for entry in sealed} if sealed else None,
        expires=None if expires is None else int(expires),
    )
    if not isinstance(envelope.body, str | None):
        raise TypeError("body")
    if document.get("deliveredTo") or document.get("trimmed"):
        envelope.shared = True
    envelope.resent = document.get("resent") is True
    writing = document.get("writing")
    if writing is not None:
        envelope.shared = True
        envelope.stored_id = document["_id"]
        envelope.writing, envelope.parts = writing, int(document["parts"])
        envelope.number = int(document.get("part", 0))
    body = envelope.body
    envelope.size = 500 + (len(body.encode()) if body else 0) + (len(str(sealed)) if sealed else 0)
    return envelope
