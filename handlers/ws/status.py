"""``status``: what became of own messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlers.context import Context, Peer
from handlers.parts import add_parts
from relay.store.documents import owner, told_of
from relay.store.fates import Gone
from relay.wire import replies
from relay.wire.codec import check_ids
from relay.wire.frames import Status
from relay.wire.ids import document_id


async def status(ctx: Context, peer: Peer, op: Status) -> None:
    """Answers from the messages that wait and the fates of those that are gone. What is not one's own looks unknown.
    Raises RelayError."""
    check_ids(op.ids)
    peer.outbox.put(replies.status(op.conv, await _items(ctx, peer.user, op.conv, op.ids), op.ref))


async def _items(ctx: Context, user: str, conversation: str, messages: list[str]) -> list[dict[str, object]]:
    doc_ids = [document_id(conversation, message) for message in messages]
    waiting: dict[str, Mapping[str, Any]] = dict(await ctx.messages.read(doc_ids))
    gone = await ctx.fates.find([doc_id for doc_id in doc_ids if doc_id not in waiting])
    # Of what is not one's own nothing is told: its parts need not be read.
    own = {doc_id: one for doc_id, one in waiting.items() if (owner(one) or ("",))[0] == user}
    past = {doc_id: one for doc_id, one in gone.items() if doc_id not in waiting and one.user == user}
    await add_parts(ctx, own, past)
    items: list[dict[str, object]] = []
    now = ctx.clock.now()
    room = ctx.limits.frame // 2
    for message, doc_id in zip(messages, doc_ids, strict=True):
        document, fate = own.get(doc_id), past.get(doc_id)
        if document is not None:
            awaiting, people = _people(document, user)
            told: dict[str, object] = {"awaiting": awaiting}
            if ctx.messages.is_due(document, now):
                told = {"gone": True, "fate": "expired"}
        elif fate is not None and _seems_to_wait(fate):
            people, told = fate.delivered, {"awaiting": len(fate.silent)}
        elif fate is not None:
            people, told = fate.delivered, {"gone": True, "fate": fate.fate}
        else:
            people, told = [], {"gone": True, "fate": "unknown"}
        size = sum(map(len, people)) + 3 * len(people)
        if size > room:
            told["deliveredCount"], people = len(people), []
        else:
            room -= size
        items.append({"id": message, **told, "delivered": people})
    return items


def _people(document: Mapping[str, Any], user: str) -> tuple[int, list[str]]:
    awaiting, delivered = told_of(document, user)
    return len(awaiting), sorted(delivered)


def _seems_to_wait(fate: Gone) -> bool:
    """Whether it would still wait, had not somebody who blocked the sender a full mailbox."""
    return bool(fate.silent) and fate.fate in ("delivered", "trimmed")
