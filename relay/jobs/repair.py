"""Finishes what a node left half-way: revisions of conversations, and releases."""

from __future__ import annotations

import structlog

from handlers import changing
from handlers.context import Context
from relay.store.mongo import PyMongoError, brief
from relay.wire.errors import RelayError

log = structlog.get_logger(__name__)


class Repair:
    """Looks for both now and then; every round is bounded."""

    def __init__(self, context: Context) -> None:
        self._ctx = context

    async def run(self) -> None:
        """One round."""
        for revision in await self._ctx.revisions.stalled():
            try:
                async with self._ctx.revisions.turn(revision.conversation):
                    await changing.carry_out(self._ctx, revision)
            except (PyMongoError, RelayError) as error:
                # It must not keep the others from being finished.
                log.warning("a change of a conversation is not finished yet", error=brief(error))
        await self._ctx.releases.run_due()
