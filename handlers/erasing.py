"""Erasing a person, completely, whatever fails in between.

The intent is written first. Everything after it is a list of steps, each safe to repeat. A request for erasure does all of
them once; the job (relay.jobs.housekeeping) does them again until nothing that was admitted or resolved before can still
be on its way, and only then lets the intent go. A node that dies anywhere in between therefore leaves nothing behind.

Every step does all that can be done and only then says what could not, and what one step cannot do keeps no other from its
turn: while a shard does not answer, what lies there stays due, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

import structlog

from handlers.changing import leave_all
from handlers.context import Context
from handlers.revoking import cut_off
from relay.store.erasure import Erasures, Intent
from relay.store.mongo import brief
from relay.store.shards import ShardDown
from relay.wire import errors
from relay.wire.clock import utc_now

SETTLE: Final = timedelta(seconds=30)
"""How long after the intent a request admitted before it, or a message resolved before it, may still leave something."""
_PATIENCE_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


async def erase(ctx: Context, user: str, *, address: str = "", agent: str = "") -> None:
    """Erases a person who asks for it. When this returns it is durably decided, and usually done but for the bare id; what
    is left is done within a minute, whatever happens to this node, and on a shard that does not answer when it is back. Raises
    RelayError and what the store raises as long as nothing is decided."""
    # The steps drop the personal part of this entry too; what stays says that somebody was erased, and when.
    await ctx.audit.record("me.erase", actor=user, target=user, address=address, agent=agent)
    intent = await _erasures(ctx).begin(user)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await _do(ctx, intent)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is decided
        log.warning("an erasure goes on in the background", error=brief(error))


async def resume(ctx: Context, intent: Intent, settle: timedelta = SETTLE) -> bool:
    """Does every step again, and ends the erasure when ``settle`` has passed since it began; whether it has ended.
    A change of a conversation that stopped half-way is awaited: the repair job finishes it."""
    if not await _do(ctx, intent):
        return True
    if utc_now() - intent.at < settle or not await _erasures(ctx).is_complete(intent):
        return False
    # What waits for the devices is found by their documents, which go now.
    if await ctx.releases.is_ahead(intent.user):
        return False
    await _erasures(ctx).finish(intent)
    return True


async def _do(ctx: Context, intent: Intent) -> bool:
    """Does every step; raises the first error when all had their turn. False when the erasure has ended meanwhile."""
    failed: Exception | None = None
    for step in STEPS:
        # Another node may have ended it, and the id may belong to somebody again.
        if not await _erasures(ctx).is_pending(intent):
            return False
        try:
            await step(ctx, intent)
        except Exception as error:  # noqa: BLE001 - a document that is none of ours may be in the way
            failed = failed or error
    if failed is not None:
        raise failed
    return True


async def _close_account(ctx: Context, intent: Intent) -> None:
    await _erasures(ctx).bury(intent)
    await _erasures(ctx).close_account(intent)


async def _end_devices(ctx: Context, intent: Intent) -> None:
    for key in await _erasures(ctx).end_devices(intent):
        cut_off(ctx, key)
        await ctx.keys.forget(key)
    for connection in ctx.hub.of_user(intent.user):
        connection.shut(errors.UNAUTHORIZED)
    await ctx.invalidation.tell(users=[intent.user])


async def _leave(ctx: Context, intent: Intent) -> None:
    await leave_all(ctx, intent.user)


async def _rename(ctx: Context, intent: Intent) -> None:
    devices = await _erasures(ctx).end_devices(intent)
    where = ctx.messages.reachable
    await _erasures(ctx).rename_deliveries(intent, devices, where)
    if where:
        raise ShardDown


async def _release(ctx: Context, intent: Intent) -> None:
    # The devices' documents are still there: a release finds the mailboxes by them, this time and when it is repeated.
    # While a shard is down for long, one is planned, not one at every round.
    if not await ctx.releases.is_ahead(intent.user):
        await ctx.releases.run(await ctx.releases.plan(intent.user))


async def _drop_people(ctx: Context, intent: Intent) -> None:
    await _erasures(ctx).drop_contacts(intent)
    await _erasures(ctx).drop_reports(intent)


async def _drop_memberships(ctx: Context, intent: Intent) -> None:
    await _erasures(ctx).drop_memberships(intent)


async def _forget(ctx: Context, intent: Intent) -> None:
    await ctx.audit.forget(intent.user)


Step = Callable[[Context, Intent], Awaitable[None]]
# Leaving many groups takes longest, and is noted in the trail: what is personal there goes before and after it.
STEPS: Final[tuple[Step, ...]] = (
    _close_account,
    _end_devices,
    _drop_people,
    _forget,
    _leave,
    _rename,
    _release,
    _drop_memberships,
    _forget,
)


def _erasures(ctx: Context) -> Erasures:
    return Erasures(ctx.pseudonyms)
