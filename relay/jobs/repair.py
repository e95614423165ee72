"""Finishes what a node left half-way: revisions of conversations, and releases."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from handlers import changing
from handlers.context import Context
from relay.store.mongo import PyMongoError, brief
from relay.store.revisions import Revision
from relay.wire.errors import RelayError

_AT_ONCE: Final = 8

log = structlog.get_logger(__name__)


class Repair:
    """Carries out revisions whose author is gone. Every round is bounded."""

    def __init__(self, context: Context) -> None:
        self._ctx = context

    async def run(self) -> None:
        """One round."""
        stalled = await self._ctx.revisions.stalled()
        for start in range(0, len(stalled), _AT_ONCE):
            await asyncio.gather(*map(self._finish, stalled[start : start + _AT_ONCE]))

    async def _finish(self, revision: Revision) -> None:
        revisions = self._ctx.revisions
        try:
            async with revisions.turn(revision.conversation):
                if not await revisions.is_abandoned(revision):
                    return
                claimed = await revisions.claim(revision)
                if claimed is not None:
                    await changing.carry_out(self._ctx, claimed)
        except (PyMongoError, RelayError) as error:
            # It must not keep the others from being finished.
            log.warning("a change of a conversation is not finished yet", error=brief(error))


class Released:
    """Does the releases that are due. Every round is bounded."""

    def __init__(self, context: Context) -> None:
        self._ctx = context

    async def run(self) -> None:
        """One round."""
        await self._ctx.releases.run_due()
