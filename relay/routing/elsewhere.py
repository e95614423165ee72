"""What other nodes tell this one, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from relay.metrics import Metrics
from relay.routing.announcer import Announcer
from relay.routing.bus import Event
from relay.routing.hints import (
    Back,
    Beat,
    Changed,
    Confirmed,
    Ended,
    Hint,
    Message,
    Missed,
    Quiet,
    Recheck,
    Released,
    Replaced,
    Seen,
    Told,
)
from relay.routing.hub import Hub
from relay.routing.invalidation import Invalidation
from relay.routing.presence import Presence
from relay.routing.router import Router
from relay.wire import errors

log = structlog.get_logger(__name__)


class Elsewhere:
    """Hands hints to those whom they concern. ``own`` is this node's id; ``confirmed`` is told who confirms which numbers,
    ``ended`` the keys of devices whose tokens are not good any more; ``missed`` tells a node that its device with this key should
    look for what came meanwhile; ``back`` is called when what another had to tell may be lost, and comes again."""

    def __init__(
        self,
        hub: Hub,
        metrics: Metrics,
        router: Router,
        invalidation: Invalidation,
        presence: Presence,
        *,
        own: str,
        confirmed: Callable[[str, Iterable[int]], None],
        ended: Callable[[str], None],
        missed: Callable[[str, str], None] = lambda node, key: None,
        back: Callable[[], None] = lambda: None,
    ) -> None:
        self._hub = hub
        self._router = router
        self._invalidation = invalidation
        self._presence = presence
        self._own = own
        self._confirmed = confirmed
        self._ended = ended
        self._missed = missed
        self._back = back
        events: tuple[Event, ...] = ("receipt", "read", "typing", "presence", "keys")
        self._announcers = {event: Announcer(hub, metrics, event) for event in events}

    def take(self, node: str, hints: Iterable[Hint]) -> None:
        """Hints of one node, this one's own among them. Never raises."""
        for hint in hints:
            try:
                self._take(node, hint)
            except Exception:
                # One of them must not cost the others; the sweep finds what it was about.
                log.exception("what another node told is lost", hint=type(hint).__name__)

    def _take(self, node: str, hint: Hint) -> None:
        match hint:
            case Message():
                self._router.handed(hint.envelopes())
            case Released():
                self._router.released(hint.pairs)
            case Told():
                self._tell(hint)
            case Replaced():
                # A dead socket is seconds in closing, and nothing must be pushed into it that the other could have.
                if (connection := self._hub.replace(hint.key, hint.serial)) is not None:
                    if connection.delivery.under_way:
                        self._missed(node, hint.key)
                    connection.shut(errors.REPLACED)
            case Missed():
                self._router.found([hint.key])
            case Confirmed():
                self._confirmed(hint.node, hint.numbers)
            case Changed() if node != self._own:
                self._invalidation.take(hint)
            case Seen() if node != self._own:
                self._presence.changed_elsewhere(hint.users)
            case Recheck() if node != self._own:
                self._presence.recheck_here(hint.users)
            case Quiet() if node != self._own:
                self._hub.set_quiet(hint.user, hint.quiet, hint.moment)
            case Ended() if node != self._own:
                self._ended(hint.key)
            case Back() if node != self._own:
                self._back()
            case Changed() | Seen() | Recheck() | Quiet() | Ended() | Beat() | Back():
                pass

    def _tell(self, told: Told) -> None:
        announcer = self._announcers[told.event]
        if told.only is None:
            announcer.tell_here(told.users, told.frame, but=told.but)
            return
        connection = self._hub.get(told.only)
        if connection is not None:
            announcer.put(connection, told.frame)
