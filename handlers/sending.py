"""Sending a message, from either door (WebSocket or HTTP): checks, recipients, order, hand-over to the group commit."""

from __future__ import annotations

from functools import partial
from math import ceil
from time import monotonic
from typing import Final, NamedTuple

from bson.errors import BSONError

from handlers.context import Context
from relay.store.audience import Audience, refusal_error
from relay.store.batcher import BatcherClosed
from relay.store.documents import owner
from relay.store.submissions import Done, Stored, Submission
from relay.wire.codec import dumps
from relay.wire.envelope import WITHDRAWN, Envelope
from relay.wire.errors import RelayError
from relay.wire.frames import Send
from relay.wire.ids import document_id, is_placeholder
from relay.wire.limits import Limit

# What a message may be refused for though it was taken before: members, devices, permissions or mailboxes have changed since.
_AFTER_CHANGES: Final = frozenset({"not_member", "device_mismatch", "blocked", "forbidden", "mailbox_full"})
_AFTER_GROWTH: Final = frozenset({Limit.RECIPIENTS, Limit.GROUP_BODY})


class Sender(NamedTuple):
    """The sending device. ``floor`` is the ``seq`` its next message must exceed."""

    user: str
    device: str
    key: str
    floor: int = 0


def submit(ctx: Context, sender: Sender, op: Send, audience: Audience, done: Done) -> Submission:
    """Checks a message, gives it its place in the order and queues it.

    ``done`` is called once, when it is durable or has failed. Raises RelayError when it is refused here.
    """
    wait = ctx.message_rates.take(sender.key, monotonic())
    if wait:
        raise RelayError(
            "rate_limited",
            f"too many messages; try again in {wait:.1f} s",
            retry_after=ceil(wait * 1000),
            limit=Limit.MESSAGE_RATE,
        )
    body, structured = check(ctx, op)
    if sender.user not in audience.members:
        raise RelayError("not_member", "no such conversation")
    refusal = audience.refusals.get(sender.user)
    if refusal is not None:
        if refusal[0] == "mailbox_full":
            ctx.quotas.recount(audience.full)
        raise refusal_error(refusal)
    awaiting = audience.awaiting(sender.key)
    trimmed = audience.trimmed(sender.key)
    recipients = len(awaiting) + len(trimmed)
    if recipients > ctx.limits.recipients:
        raise RelayError(
            "too_large",
            f"this conversation has {recipients} recipient devices, the limit is {ctx.limits.recipients}",
            limit=Limit.RECIPIENTS,
        )
    if body is not None and recipients > ctx.limits.large_group:
        _check_size(body, ctx.limits.large_group_body, Limit.GROUP_BODY)
    sealed = op.sealed is not None or op.devices_rev is not None
    if sealed:
        _check_devices(op, sender, audience)
    now = ctx.clock.now()
    after = -1 if op.after is None else op.after
    seq = ctx.clock.next(max(after, sender.floor) + 1)
    envelope = Envelope(
        op.conv,
        op.id,
        user=sender.user,
        device=sender.device,
        seq=seq,
        at=now,
        kind=op.kind,
        body=body,
        structured=structured,
        awaiting=awaiting,
        trimmed=trimmed,
        reply_to=op.reply_to,
        media=op.media,
        sealed=op.sealed,
        expires=None if op.ttl is None else now + op.ttl * 1000,
    )
    try:
        submission = Submission(
            envelope,
            audience,
            sender.key,
            again=op.again,
            deadline=monotonic() + ctx.limits.send_deadline,
            done=done,
            check=partial(_check_devices, op, sender) if sealed else None,
            inline=ctx.limits.inline,
        )
    except (BSONError, OverflowError, UnicodeEncodeError):
        raise RelayError("bad_request", "this message cannot be stored") from None
    try:
        ctx.sends.submit(submission)
    except BatcherClosed:
        raise RelayError("unavailable", "the relay is stopping; send again", retry_after=1000) from None
    return submission


def check(ctx: Context, op: Send) -> tuple[str | None, bool]:
    """Refuses what no conversation would take; returns the body as text and whether it is an object's JSON."""
    if op.kind == "system":
        raise RelayError("bad_request", "kind system is the relay's own")
    if op.kind == WITHDRAWN and (op.reply_to is None or op.body is not None):
        raise RelayError("bad_request", "a withdrawal names the message in replyTo and has a null body")
    if op.after is not None and ctx.clock.too_far_ahead(op.after):
        raise RelayError("bad_request", "after lies more than two hours in the future")
    body = op.body
    if body is None:
        return None, False
    structured = not isinstance(body, str)
    text = body if isinstance(body, str) else dumps(body)
    _check_size(text, ctx.limits.body, Limit.BODY)
    return text, structured


def _check_size(text: str, most: int, limit: Limit) -> None:
    # A character is at most three bytes of UTF-8 in the BMP and four beyond: short texts need no encoding to be measured.
    if len(text) * 4 > most and len(text.encode()) > most:
        where = " in a group of this size" if limit is Limit.GROUP_BODY else ""
        raise RelayError("too_large", f"a body has at most {most} bytes{where}", limit=limit)


def may_be_known(refusal: RelayError) -> bool:
    """Whether a message that is refused so may have been taken before."""
    return refusal.code in _AFTER_CHANGES or refusal.limit in _AFTER_GROWTH


async def first_answer(ctx: Context, sender: Sender, op: Send, refusal: RelayError) -> Stored:
    """The answer to a message that is refused now, but was stored when it came first. Raises the refusal otherwise."""
    found = await known(ctx, sender, op) if may_be_known(refusal) else None
    if found is None:
        raise refusal
    return found


async def known(ctx: Context, sender: Sender, op: Send) -> Stored | None:
    """The first answer to a message that this device has sent before: while it waits, and with ``again`` also when it is
    gone. For messages that would be refused now (the sender has left, devices have changed). Raises RelayError
    ``id_conflict``."""
    doc_id = document_id(op.conv, op.id)
    found = (await ctx.messages.read([doc_id], committed=True)).get(doc_id)
    if found is not None:
        first = owner(found)
        stored = Stored(found["seq"], int(found["createdAt"]), fresh=False)
    elif op.again:
        gone = (await ctx.fates.find([doc_id])).get(doc_id)
        if gone is None:
            return None
        first = (gone.user, gone.device)
        stored = Stored(gone.seq, gone.at, fresh=False)
    else:
        return None
    return stored if first == (sender.user, sender.device) else None


async def check_withdrawal(ctx: Context, sender: Sender, op: Send) -> None:
    """Only one's own message may be withdrawn. One that is unknown may have been one's own: devices decide by its sender.
    Raises RelayError ``forbidden``."""
    if op.reply_to is None:
        return
    doc_id = document_id(op.conv, op.reply_to)
    found = (await ctx.messages.read([doc_id])).get(doc_id)
    if found is not None:
        whose = (owner(found) or ("",))[0]
    else:
        gone = (await ctx.fates.find([doc_id])).get(doc_id)
        whose = sender.user if gone is None else gone.user
    if whose != sender.user:
        raise RelayError("forbidden", "only its sender can withdraw a message")


def withdraw(ctx: Context, sender: str, op: Send) -> None:
    """The withdrawal is stored: the original is deleted where it still waits, if this user has sent it: what is answered as stored
    may be a resend, whose claims nobody has checked. When this fails nothing is lost: devices that get the original know that it
    is withdrawn."""
    if op.reply_to is None:
        return
    try:
        ctx.endings.discard(
            document_id(op.conv, op.reply_to),
            "withdrawn",
            deadline=monotonic() + ctx.limits.send_deadline,
            sender=sender,
        )
    except BatcherClosed:
        return


def _check_devices(op: Send, sender: Sender, audience: Audience) -> None:
    """A ``sealed`` message has a ciphertext for each recipient device and no other; one that names ``devicesRev`` was
    made for these very devices in their present installations."""
    expected = {key for key in audience.others(sender.key) if not is_placeholder(key)}
    sealed = set(op.sealed) if op.sealed is not None else expected
    missing, extra = sorted(expected - sealed), sorted(sealed - expected)
    stale: list[str] = []
    outdated = op.devices_rev is not None and op.devices_rev != audience.devices_rev
    if op.devices_rev is not None and outdated:
        stale = [key for key in audience.relinked_since(op.devices_rev) if key in expected & sealed]
    if missing or extra or outdated:
        raise RelayError(
            "device_mismatch",
            "the recipient devices have changed; fetch them and seal again",
            details={
                "missing": missing,
                "extra": extra,
                "stale": stale,
                "devicesRev": audience.devices_rev,
            },
        )
