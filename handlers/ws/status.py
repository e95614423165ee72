"""``status``: what became of own messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlers.context import Context, Peer
from relay.store.messages import owner
from relay.wire import replies
from relay.wire.codec import check_ids
from relay.wire.frames import Status
from relay.wire.ids import document_id, user_of


async def status(ctx: Context, peer: Peer, op: Status) -> None:
    """Answers from the messages that wait and the fates of those that are gone. What is not one's own looks unknown.
    Raises RelayError."""
    check_ids(op.ids)
    peer.outbox.put(replies.status(op.conv, await _items(ctx, peer.user, op.conv, op.ids), op.ref))


async def _items(ctx: Context, user: str, conversation: str, messages: list[str]) -> list[dict[str, object]]:
    doc_ids = [document_id(conversation, message) for message in messages]
    waiting = await ctx.messages.read(doc_ids)
    gone = await ctx.fates.find([doc_id for doc_id in doc_ids if doc_id not in waiting])
    items: list[dict[str, object]] = []
    now = ctx.clock.now()
    for message, doc_id in zip(messages, doc_ids, strict=True):
        document = waiting.get(doc_id)
        fate = gone.get(doc_id)
        if document is not None and (owner(document) or ("",))[0] == user:
            told = _waiting(document, user)
            if ctx.messages.is_due(document, now):
                told = {"gone": True, "fate": "expired", "delivered": told["delivered"]}
            items.append({"id": message, **told})
        elif document is None and fate is not None and fate.user == user:
            items.append({"id": message, "gone": True, "fate": fate.fate, "delivered": fate.delivered})
        else:
            items.append({"id": message, "gone": True, "fate": "unknown", "delivered": []})
    return items


def _waiting(document: Mapping[str, Any], user: str) -> dict[str, object]:
    """Counts people, not devices: a person has the message from their first device on."""
    delivered = {entry["user"] for entry in document.get("deliveredTo", ())} - {user}
    awaiting = {user_of(key) for key in document["awaiting"]} - {user} - delivered
    return {"awaiting": len(awaiting), "delivered": sorted(delivered)}
