"""Receipts: senders are told that their messages reached a device, many messages in one frame.

What is acknowledged after a quiet moment is told at once, in the next turn of the event loop; what follows is gathered for a
moment. So one message costs no wait, and ten thousand a handful of frames.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Final

from relay.routing.announcer import Announcer
from relay.store.endings import Acknowledged
from relay.wire import replies
from relay.wire.ids import device_key, split_document_id

SPACING_SECONDS: Final = 0.1
MOST_IDS: Final = 1000
MOST_PENDING: Final = 5000
_AT_ONCE: Final = 256
_ID_BYTES: Final = 39  # a quoted UUID and its comma
_REST_BYTES: Final = 400  # the names in a receipt

_Group = tuple[str, str, str, str]


class _Pending:
    __slots__ = ("at", "messages")

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.at = 0


class Receipts:
    """Gathers receipts by sender, conversation and acknowledging device. At most ``MOST_PENDING`` ids wait: the one more
    sends them all. ``max_frame`` in bytes."""

    def __init__(self, out: Announcer, *, max_frame: int) -> None:
        self._out = out
        self._most = max(1, min(MOST_IDS, (max_frame - _REST_BYTES) // _ID_BYTES))
        self._pending: dict[_Group, _Pending] = {}
        self._count = 0
        self._timer: asyncio.Handle | None = None
        self._next = 0.0
        self._closed = False

    def add(self, item: Acknowledged) -> None:
        """An acknowledgement is durable. Who acknowledged quietly is told of to their own devices only; when no device
        of the sender can be connected, nobody is told."""
        if item.quiet and item.by_user != item.user:
            return
        conversation, message = split_document_id(item.doc_id)
        group = (item.user, conversation, item.by_user, item.by_device)
        found = self._pending.get(group)
        if found is None:
            if not self._out.reaches(item.user):
                return
            found = self._pending[group] = _Pending()
        found.messages.append(message)
        if item.at > found.at:
            found.at = item.at
        self._count += 1
        if self._count >= MOST_PENDING or self._closed:
            self.flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            wait = self._next - loop.time()
            self._timer = loop.call_later(wait, self.flush) if wait > 0 else loop.call_soon(self.flush)

    def flush(self) -> None:
        """Tells what is pending now."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._next = loop.time() + SPACING_SECONDS
        pending = self._pending
        if len(pending) > _AT_ONCE and not self._closed:
            # Many devices have acknowledged: others have their turn in between.
            pending = {group: pending.pop(group) for group in list(islice(pending, _AT_ONCE))}
            self._count -= sum(len(found.messages) for found in pending.values())
            self._timer = loop.call_soon(self.flush)
        else:
            self._pending, self._count = {}, 0
        for (user, conversation, by_user, by_device), found in pending.items():
            # The device that acknowledged knows.
            own = device_key(by_user, by_device)
            for start in range(0, len(found.messages), self._most):
                part = found.messages[start : start + self._most]
                frame = replies.receipt(conversation, part, by_user, by_device, found.at)
                self._out.tell((user,), frame, but=own)

    def close(self) -> None:
        """Tells what is pending, and from now on everything at once."""
        self._closed = True
        self.flush()
