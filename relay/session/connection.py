"""The life of one authenticated WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
from aiohttp import WebSocketError, WSMsgType, web

from handlers.context import Context
from relay.routing.delivery import Backlog, Delivery
from relay.routing.outbox import Outbox
from relay.security.tokens import Identity
from relay.session.admission import Admission
from relay.session.dispatch import dispatch
from relay.wire import errors
from relay.wire.codec import Refused, decode
from relay.wire.errors import Close, FrameError, RelayError
from relay.wire.frames import Ack, Operation, Send
from relay.wire.ids import device_key
from relay.wire.limits import Limit

_CLOSE_SECONDS: Final = 3.0
_FROM_THE_CLIENT: Final = (WSMsgType.TEXT, WSMsgType.PING, WSMsgType.PONG, WSMsgType.CLOSE)
_HEARD: Final = (*_FROM_THE_CLIENT, WSMsgType.BINARY)
_LAST_DATA_RECEIVED: Final = 52  # offset of tcpi_last_data_recv in struct tcp_info (linux/tcp.h)

log = structlog.get_logger(__name__)


class Connection:
    """One device's socket: a reader (``run``), a writer (the outbox), deliveries. Closed once, for one reason."""

    __slots__ = (
        "_admission",
        "_close",
        "_closing",
        "_ctx",
        "_flushed",
        "_reader",
        "_spoke",
        "_transport",
        "_waits",
        "_ws",
        "crowded",
        "delivery",
        "device",
        "expires",
        "heard",
        "issued",
        "key",
        "last_seq",
        "outbox",
        "pinged",
        "quiet",
        "serial",
        "session",
        "user",
    )

    def __init__(
        self,
        ctx: Context,
        admission: Admission,
        ws: web.WebSocketResponse,
        transport: asyncio.Transport | None,
        identity: Identity,
        *,
        outbox_bytes: int,
        drained: Callable[[], None],
        serial: int,
        first: Backlog,
        quiet: bool = False,
    ) -> None:
        self._ctx = ctx
        self._admission = admission
        self._ws = ws
        self._transport = transport
        self.user = identity.user
        self.device = identity.device
        self.key = device_key(identity.user, identity.device)
        self.expires = identity.expires
        self.issued = identity.issued
        self.session = identity.session
        self.last_seq = 0
        self.crowded = False
        self.quiet = quiet
        self.serial = serial
        self.heard = asyncio.get_running_loop().time()
        self.pinged = False
        self._close: Close | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._flushed = False
        self._spoke = False
        self._waits: Callable[[], None] | None = None
        self._reader: asyncio.Task[object] | None = None
        limits = ctx.limits
        self.outbox = Outbox(max_bytes=outbox_bytes, max_frame=limits.frame, on_room=self._on_room)
        self.delivery = Delivery(
            self.user,
            self.key,
            self.outbox,
            ctx.messages,
            window=limits.window,
            window_bytes=limits.window_bytes,
            now=ctx.clock.now,
            behind=ctx.metrics.behind.inc,
            used_up=partial(ctx.metrics.reached, Limit.WINDOW),
            drained=drained,
            broken=self._broken,
            first=first,
        )

    async def run(self) -> None:
        """Serves the socket until it is closed. The closing handshake is the reader's: only it may wait for the client's
        close frame."""
        self._reader = asyncio.current_task()
        writer = asyncio.create_task(self._write(), name="writer")
        self.delivery.start()
        ours = None
        try:
            await self._read()
        except asyncio.CancelledError:
            if not self._flushed:
                raise
            if self._reader is not None:
                self._reader.uncancel()
        finally:
            self._reader = None
            ours = self._close
            self.shut(errors.NORMAL)
            await self.delivery.close()
            await asyncio.gather(writer, return_exceptions=True)
            if ours is not None:
                with contextlib.suppress(ConnectionError, RuntimeError):
                    await self._ws.close(code=ours.code, message=ours.reason.encode())
            if self._closing is not None:
                self._closing.cancel()
            self._ctx.hub.remove(self)
            self._ctx.bus.leave(self.user, self.device, self.serial)
            self._ctx.live.left(self)
            code = ours.code if ours is not None else self._ws.close_code or 1006
            self._ctx.metrics.closed.labels(str(code)).inc()

    def shut(self, close: Close) -> None:
        """Closes the connection after what is queued has left; a socket that does not take it is cut off."""
        if self._close is not None:
            return
        self._close = close
        self.outbox.close()
        self._closing = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._abort)

    @property
    def open(self) -> bool:
        """Whether the connection is not being closed."""
        return self._close is None

    def when_it_speaks(self, then: Callable[[], None]) -> None:
        """Calls ``then`` once the device has sent anything on this connection, at once when it has: it is there, and has
        read its ``welcome``."""
        if self._spoke:
            then()
        else:
            self._waits = then

    async def renew(self, token: str) -> int | None:
        """Takes a new token of the same user and device; returns its expiry (s). None when that device may not be here any
        more: then the connection is being closed. Raises RelayError, and what the store raises."""
        identity = self._admission.verify(token)
        if (identity.user, identity.device) != (self.user, self.device):
            raise RelayError("unauthorized", "the token is another user's or device's")
        # What ended before this connection began is not looked for any more.
        if identity.session != self.session or identity.issued < self.issued:
            raise RelayError(
                "unauthorized", "the token is another session's, or older than this connection's"
            )
        # The token that this connection began with is older, or as old: it is not good either.
        if not await self._admission.is_good(identity):
            self.shut(errors.UNAUTHORIZED)
        if not self.open:
            return None
        self.expires = identity.expires
        self.issued = identity.issued
        return identity.expires

    def listen(self, now: float) -> None:
        """Counts the bytes of an unfinished frame as life: a long frame on a slow line is no silence."""
        raw = None if self._transport is None else self._transport.get_extra_info("socket")
        if raw is None:
            return
        try:
            info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECEIVED + 4)
        except OSError:
            return
        if len(info) >= _LAST_DATA_RECEIVED + 4:
            (milliseconds,) = struct.unpack_from("I", info, _LAST_DATA_RECEIVED)
            self.heard = max(self.heard, now - milliseconds / 1000)

    async def ping(self) -> None:
        """Sends a protocol ping, unless the socket is slow: then its silence is judged as it is."""
        self.pinged = True
        if self._transport is None or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return
        try:
            await self._ws.ping()
        except (ConnectionError, RuntimeError):
            return

    async def _read(self) -> None:
        ws, ctx = self._ws, self._ctx
        loop = asyncio.get_running_loop()
        while self.open:
            message = await ws.receive()
            if self._close is not None:
                # The socket is slow to take its goodbye; a revoked device may do nothing more meanwhile.
                return
            kind = message.type
            if kind in _HEARD:
                # A socket that breaks says nothing of whether the device was there.
                self.heard = loop.time()
                if self.pinged:
                    self.pinged = False
                    ctx.live.presence.heard(self)
            if (not self._spoke or self._waits is not None) and kind in _FROM_THE_CLIENT:
                self._spoke = True
                waits, self._waits = self._waits, None
                if waits is not None:
                    waits()
            if kind is WSMsgType.TEXT:
                try:
                    operations = decode(message.data)
                except FrameError as error:
                    self.shut(error.close)
                    return
                await dispatch(ctx, self, operations)
                # What is not read stays in the socket: the sender feels it, not the relay's memory.
                if ctx.sends.full or ctx.endings.full:
                    await self._room_for(operations)
                if self.outbox.full:
                    await self.outbox.room()
            elif kind is WSMsgType.PING:
                await ws.pong(message.data)
            elif kind is WSMsgType.BINARY:
                self.shut(errors.BINARY)
                return
            elif kind is not WSMsgType.PONG:
                if isinstance(message.data, WebSocketError) and message.data.code == errors.TOO_BIG.code:
                    ctx.metrics.reached(Limit.FRAME)
                return

    async def _room_for(self, operations: Sequence[Operation | Refused]) -> None:
        """Waits while those places of the store are busy that this frame's messages and acknowledgements go to."""
        ctx = self._ctx
        names = {operation.conv for operation in operations if isinstance(operation, Send | Ack)}
        while ctx.sends.is_full(names) or ctx.endings.is_full(names):
            await ctx.sends.room(names)
            await ctx.endings.room(names)

    async def _write(self) -> None:
        try:
            await self.outbox.run(self._ws.send_str)
        except (ConnectionError, RuntimeError):
            self._abort()
            return
        self._flushed = True
        if self._reader is not None:
            # It waits for a frame; it has to say goodbye instead.
            self._reader.cancel()

    def _abort(self) -> None:
        self.outbox.discard()
        if self._transport is not None:
            self._transport.abort()

    def _broken(self) -> None:
        self.shut(errors.RESTARTING)

    def _on_room(self) -> None:
        if self.delivery.behind:
            self.delivery.has_room()
