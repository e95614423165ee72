"""What a node does with what other nodes tell it, and when it hears nothing of them."""

from __future__ import annotations

from contextlib import AsyncExitStack

from handlers.context import Context
from relay.jobs.sweep import Sweep
from relay.routing.cut_offs import CutOffs
from relay.routing.elsewhere import Elsewhere
from relay.routing.neighbours import Neighbours
from relay.routing.redis_bus import RedisBus
from relay.routing.router import Router


async def join(
    bus: RedisBus,
    ctx: Context,
    router: Router,
    sweep: Sweep,
    neighbours: Neighbours,
    *,
    own: str,
    stack: AsyncExitStack,
) -> None:
    """Listens to the bus until ``stack`` is left. ``own`` is this node's id."""
    cut_offs = CutOffs(ctx.hub, ctx.accounts.forget, ctx.accounts.standing)
    stack.push_async_callback(cut_offs.close)

    def resumed() -> None:
        sweep.hurry()
        ctx.live.looks.hurry()

    bus.resumed = resumed
    neighbours.changed = ctx.live.looks.died
    elsewhere = Elsewhere(
        ctx.hub,
        ctx.metrics,
        router,
        ctx.invalidation,
        ctx.live.presence,
        own=own,
        confirmed=bus.confirmed,
        ended=cut_offs.take,
        missed=bus.missed,
        back=resumed,
    )
    await bus.start(elsewhere)
    stack.push_async_callback(bus.close)
