"""The WebSocket's duties over HTTP: for background tasks that get half a minute after a push."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

from aiohttp import web

from handlers import sending
from handlers.context import Context
from handlers.http.pages import PAGE_QUERY, message_page
from handlers.http.route import Caller, Route, answer, body, json_text, parsed
from handlers.http.schemas.base import DoneAnswer
from handlers.http.schemas.messages import Acknowledge, ReadMark, StoredAnswer, SyncPage
from handlers.sending import Sender
from relay.store.batcher import BatcherClosed
from relay.store.submissions import Stored
from relay.wire.codec import decode_send
from relay.wire.envelope import WITHDRAWN
from relay.wire.errors import RelayError
from relay.wire.frames import Send
from relay.wire.ids import device_key, document_id


async def sync(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """What waits for this device, in order. Nothing counts as delivered before it is acknowledged."""
    frames, cursor = await message_page(ctx, caller, request, None)
    return json_text(f'{{"messages":[{",".join(frames)}],"next":{cursor}}}')


async def send(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """201 once the message is durable, also for one that was stored before."""
    op = decode_send(await body(request))
    sender = Sender(caller.user, caller.device, device_key(caller.user, caller.device))
    sending.check(ctx, op)
    # A device has one connection, but may post at many nodes.
    await ctx.rates.check("message", sender.key)
    if ctx.sends.is_full([op.conv]) or ctx.endings.is_full([op.conv]):
        raise RelayError("unavailable", "the relay is busy; send again", retry_after=1000)
    audience = await ctx.audiences.resolve(op.conv)
    if len(audience.keys) > ctx.limits.inline and ctx.sends.is_large_full(op.conv):
        raise RelayError("unavailable", "the relay is busy; send again", retry_after=1000)
    outcome: asyncio.Future[Stored | RelayError] = asyncio.get_running_loop().create_future()

    def done(result: Stored | RelayError) -> None:
        if not outcome.done():
            outcome.set_result(result)

    try:
        if op.kind == WITHDRAWN and caller.user in audience.members:
            await sending.check_withdrawal(ctx, sender, op)
        sending.submit(ctx, sender, op, audience, done)
        connection = ctx.hub.get(sender.key)
        if connection is not None:
            ctx.live.typing.end(connection, op.conv)
        found = await outcome
    except RelayError as refusal:
        found = await sending.first_answer(ctx, sender, op, refusal)
    if isinstance(found, RelayError):
        raise found
    if op.kind == WITHDRAWN:
        sending.withdraw(ctx, sender.user, op)
    return answer(StoredAnswer(conv=op.conv, id=op.id, seq=found.seq, at=found.at), 201)


async def acknowledge(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """200 once every acknowledgement is durable, and every read cursor moved."""
    wanted = await parsed(request, Acknowledge)
    if any(ctx.clock.too_far_ahead(mark.up_to) for mark in wanted.reads or ()):
        raise RelayError("bad_request", "upTo lies more than two hours in the future")
    if ctx.endings.is_full([group.conv for group in wanted.acks]):
        raise RelayError("unavailable", "the relay is busy; acknowledge again", retry_after=1000)
    loop = asyncio.get_running_loop()
    now = ctx.clock.now()
    quiet = bool(wanted.acks) and await ctx.people.is_quiet(caller.user)
    waiters: list[asyncio.Future[bool]] = []
    try:
        for group in wanted.acks:
            if not group.ids:
                continue
            waiter: asyncio.Future[bool] = loop.create_future()
            ctx.endings.acknowledge(
                group.conv,
                caller.user,
                caller.device,
                {document_id(group.conv, message): None for message in group.ids},
                at=now,
                deadline=monotonic() + ctx.limits.send_deadline,
                done=lambda durable, waiter=waiter: None if waiter.done() else waiter.set_result(durable),  # type: ignore[misc]
                quiet=quiet,
            )
            waiters.append(waiter)
    except BatcherClosed:
        raise RelayError(
            "unavailable", "the relay is stopping; acknowledge again", retry_after=1000
        ) from None
    if not all(await asyncio.gather(*waiters)):
        raise RelayError("unavailable", "the acknowledgement could not be stored in time; send it again")
    for failure in await asyncio.gather(*(_mark(ctx, caller, mark) for mark in wanted.reads or ())):
        # The acknowledgements are durable; a conversation that one has left has no cursor to move.
        if failure is not None and failure.code != "not_member":
            raise failure
    return answer(DoneAnswer())


async def _mark(ctx: Context, caller: Caller, mark: ReadMark) -> RelayError | None:
    outcome: asyncio.Future[RelayError | None] = asyncio.get_running_loop().create_future()

    def done(failure: RelayError | None) -> None:
        if not outcome.done():
            outcome.set_result(failure)

    key = device_key(caller.user, caller.device)
    try:
        ctx.live.reads.mark(mark.conv, caller.user, mark.up_to, done, device=key)
    except RelayError as failure:
        return failure
    return await outcome


ROUTES: Final = (
    Route(
        "GET",
        "/v1/sync",
        sync,
        "What waits for this device",
        "messages",
        {200: SyncPage},
        query=PAGE_QUERY,
        errors=("bad_request",),
    ),
    Route(
        "POST",
        "/v1/messages",
        send,
        "Send a message",
        "messages",
        {201: StoredAnswer},
        request=Send,
        errors=(
            "bad_request",
            "not_member",
            "forbidden",
            "blocked",
            "rate_limited",
            "id_conflict",
            "too_large",
            "mailbox_full",
            "device_mismatch",
            "unavailable",
        ),
    ),
    Route(
        "POST",
        "/v1/acks",
        acknowledge,
        "Acknowledge messages that are on this device's disk",
        "messages",
        {200: DoneAnswer},
        request=Acknowledge,
        errors=("bad_request", "too_large", "rate_limited", "unavailable"),
    ),
)
