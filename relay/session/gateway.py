"""The door for WebSockets: upgrade, authentication, welcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog
from aiohttp import WSMsgType, web

from handlers.context import Context
from relay.routing.first_drains import FirstDrains, Pages
from relay.security.tokens import Identity
from relay.session.addresses import Addresses, agent_of
from relay.session.admission import Admission, bearer
from relay.session.connection import Connection
from relay.session.turns import Turns
from relay.store.accounts import Arrival
from relay.store.mongo import PyMongoError, brief
from relay.wire import errors, replies
from relay.wire.clock import utc_now
from relay.wire.codec import Refused, decode
from relay.wire.errors import Close, FrameError, RelayError
from relay.wire.frames import FEATURES, Auth
from relay.wire.ids import device_key
from relay.wire.limits import Limit

SUBPROTOCOL: Final = "relay.v1"
_CLOSE_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the door needs to know. Sizes in bytes."""

    max_connections: int
    auth_seconds: float
    outbox_bytes: int


class Gateway:
    """Turns upgrade requests into connections. ``entering`` counts those that are not authenticated yet, too. ``pages`` tells
    many devices at once what waits for them, ``others`` whether anybody's messages are under way, which go first."""

    def __init__(
        self,
        ctx: Context,
        admission: Admission,
        settings: GatewaySettings,
        addresses: Addresses,
        pages: Pages,
        others: Callable[[], bool],
    ) -> None:
        self._ctx = ctx
        self._admission = admission
        self._settings = settings
        self._addresses = addresses
        self._first = FirstDrains(ctx.messages, pages, ctx.metrics)
        self._arrived = Turns(others=others)
        self._entering = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serves one WebSocket from its upgrade to its end."""
        if self._ctx.health.draining:
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "5"}, text="the relay is stopping")
        limit = self._ctx.limits.frame
        # A message equal to max_msg_size is refused, hence + 1. Pings are answered by the connection, which counts them
        # as life; compression would cost memory for every connection.
        ws = web.WebSocketResponse(
            protocols=(SUBPROTOCOL,),
            max_msg_size=limit + 1,
            autoping=False,
            compress=False,
            timeout=_CLOSE_SECONDS,
        )
        try:
            await ws.prepare(request)
        except web.HTTPBadRequest:
            raise RelayError(
                "bad_request", "this path is a WebSocket, and the request does not ask for one"
            ) from None
        if not await self._may_connect(request):
            await self._refuse(ws, errors.TOO_MANY)
            return ws
        self._entering += 1
        try:
            connection = await self._enter(request, ws)
        finally:
            self._entering -= 1
        if connection is not None:
            with self._ctx.metrics.connections.track_inprogress():
                await connection.run()
        return ws

    async def close(self, timeout: float) -> None:
        """Ends what is still being noted, after at most ``timeout`` seconds."""
        await self._first.close()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=timeout)
            for task in late:
                task.cancel()

    async def _may_connect(self, request: web.Request) -> bool:
        try:
            await self._ctx.rates.check("connect", self._addresses.of(request))
        except RelayError:
            return False
        return True

    async def _enter(self, request: web.Request, ws: web.WebSocketResponse) -> Connection | None:
        try:
            token = bearer(request.headers.get("Authorization"))
            if token is None and self._entering > self._settings.max_connections:
                raise FrameError(errors.TOO_MANY)
            identity = self._admission.verify(token) if token is not None else await self._first_frame(ws)
            if identity is None:
                return None
            known = self._ctx.hub.get(device_key(identity.user, identity.device))
            if known is None and len(self._ctx.hub) >= self._settings.max_connections:
                raise FrameError(errors.TOO_MANY)
            arrival = await self._admission.arrive(
                identity, address=self._addresses.of(request), agent=agent_of(request), live=True
            )
        except RelayError as failure:
            await self._refuse(ws, errors.RESTARTING if failure.retry else errors.UNAUTHORIZED)
            return None
        except FrameError as error:
            await self._refuse(ws, error.close)
            return None
        except PyMongoError as error:
            log.warning("store did not answer a connecting device", error=brief(error))
            await self._refuse(ws, errors.RESTARTING)
            return None
        # Before its drain begins: what is committed elsewhere from now on is sent here.
        serial = await self._ctx.bus.enter(identity.user, identity.device)
        try:
            await self._arrived.turn()
        except asyncio.CancelledError:
            # It is never registered: nobody else takes its line away.
            self._ctx.bus.leave(identity.user, identity.device, serial)
            raise
        replaced = self._ctx.hub.is_replaced(device_key(identity.user, identity.device), serial)
        if replaced or self._ctx.health.draining:
            self._ctx.bus.leave(identity.user, identity.device, serial)
            await self._refuse(ws, errors.REPLACED if replaced else errors.RESTARTING)
            return None
        return self._welcome(request, ws, identity, arrival, serial)

    async def _first_frame(self, ws: web.WebSocketResponse) -> Identity | None:
        """The identity of an ``auth`` frame. None when the client has gone. Raises RelayError and FrameError."""
        try:
            async with asyncio.timeout(self._settings.auth_seconds):
                while True:
                    message = await ws.receive()
                    if message.type is WSMsgType.PING:
                        await ws.pong(message.data)
                    elif message.type is not WSMsgType.PONG:
                        break
        except TimeoutError:
            raise FrameError(errors.TIMED_OUT) from None
        if message.type is WSMsgType.BINARY:
            raise FrameError(errors.BINARY)
        if message.type is not WSMsgType.TEXT:
            return None
        operations = decode(message.data)
        first = operations[0] if len(operations) == 1 else None
        if first is None or isinstance(first, Refused) or not isinstance(first, Auth):
            raise FrameError(errors.UNAUTHORIZED)
        return self._admission.verify(first.token)

    def _welcome(
        self,
        request: web.Request,
        ws: web.WebSocketResponse,
        identity: Identity,
        arrival: Arrival,
        serial: int,
    ) -> Connection:
        shown = utc_now()
        key = device_key(identity.user, identity.device)

        def drained() -> None:
            full = arrival.full or self._ctx.quotas.is_full(key)
            if full:
                self._note(self._ctx.quotas.drained(key))
            if arrival.live_until is not None:
                self._ctx.live.catching_up.add(connection, arrival.live_until)
            if arrival.gap_since is not None:
                connection.when_it_speaks(lambda: self._note(self._close_gap(identity, shown, full=full)))

        connection = Connection(
            self._ctx,
            self._admission,
            ws,
            request.transport,
            identity,
            outbox_bytes=self._settings.outbox_bytes,
            drained=drained,
            serial=serial,
            first=self._first,
            quiet=arrival.quiet,
        )
        limits = self._ctx.limits
        fields: dict[str, Any] = {
            "user": identity.user,
            "device": identity.device,
            "time": self._ctx.clock.now(),
            "heartbeat": limits.heartbeat_ms,
            "window": limits.window,
            "windowBytes": limits.window_bytes,
            "limits": {"frame": limits.frame, "body": limits.body, "ops": limits.operations},
            "features": list(FEATURES),
        }
        if arrival.gap_since is not None:
            fields["gap"] = {"since": arrival.gap_since, "why": arrival.gap_why}
        before = self._ctx.hub.add(connection)
        if before is not None:
            before.shut(errors.REPLACED)
        connection.outbox.put(replies.welcome(fields))
        self._ctx.live.presence.arrived(connection)
        return connection

    async def _close_gap(self, identity: Identity, shown: datetime, *, full: bool) -> None:
        if full:
            await self._ctx.quotas.drained(device_key(identity.user, identity.device))
        try:
            await self._ctx.accounts.close_gap(identity.user, identity.device, shown)
        except PyMongoError as error:
            log.warning("a gap stays open until the next drain", error=brief(error))

    def _note(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="close gap")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refuse(self, ws: web.WebSocketResponse, close: Close) -> None:
        self._ctx.metrics.closed.labels(str(close.code)).inc()
        if close is errors.TOO_MANY:
            self._ctx.metrics.reached(Limit.CONNECTIONS)
        await ws.close(code=close.code, message=close.reason.encode())
