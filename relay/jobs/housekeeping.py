"""Finishes what was written down and not done to the end."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import structlog

from handlers import erasing
from handlers.context import Context
from relay.store.erasure import Erasures, Intent
from relay.store.mongo import brief
from relay.tasks import each

_MOST: Final = 1000
_AT_ONCE: Final = 3

log = structlog.get_logger(__name__)


class InterruptedErasures:
    """Ends erasures: of people whose time to settle is over, and of those whose node died. Safe on several nodes."""

    def __init__(self, ctx: Context, *, settle: timedelta = erasing.SETTLE) -> None:
        self._ctx = ctx
        self._settle = settle

    async def run(self) -> None:
        """One round. One person whose erasure fails, or hangs, keeps nobody else's from ending."""
        pending = await Erasures(self._ctx.pseudonyms).pending(_MOST)
        await each(pending, self._resume, at_once=_AT_ONCE, name="erasure")

    async def _resume(self, intent: Intent) -> None:
        try:
            if await erasing.resume(self._ctx, intent, self._settle):
                log.info("an erasure has ended")
        except Exception as error:  # noqa: BLE001 - a document that is none of ours may be in the way
            log.warning("an erasure could not be finished; it is tried again", error=brief(error))
