"""A device: durable history and outbox over a connection that comes and goes.

What it keeps, whenever the process dies: a message is acknowledged only after it is on disk; an own message is on disk before
it is sent, and is sent under the same id until the relay has stored it or refused it for good.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
from aiohttp import ClientSession, ClientTimeout, ClientWebSocketResponse, ClientWSTimeout, WSMsgType

from relay.client.connection import Connection, Ended, Tuning
from relay.client.database import Committed
from relay.client.errors import (
    ClientTooOld,
    DeviceError,
    Replaced,
    RequestFailed,
    StorageError,
    TokenRefused,
)
from relay.client.http import accepted, exchange, why
from relay.client.packing import encode
from relay.client.parsing import operations_of
from relay.client.storage import Storage
from relay.client.tokens import Token, Tokens
from relay.client.values import (
    WITHDRAWN,
    Body,
    Connected,
    Disconnected,
    Draft,
    Drained,
    Event,
    Gap,
    Message,
    NewConversation,
    Stopped,
)
from relay.client.wishes import Wishes

OnMessage = Callable[[Message], Awaitable[None] | None]
OnEvent = Callable[[Event], Awaitable[None] | None]

SUBPROTOCOL: Final = "relay.v1"
_MAX_FRAME: Final = 16_777_216
_REQUEST_SECONDS: Final = 30.0
_LOG: Final = logging.getLogger(__name__)


class Device:
    """One device of one user, as an async context manager: connected, or trying to be, from entry to exit.

    ``url`` is the relay's (``http://host:port``); ``database`` its SQLite file, made when absent; ``token`` gives an access
    token whenever one is needed. ``on_message`` gets each message once, after it is on disk and acknowledged; a message
    committed just before the process died is in ``storage`` but is not called again. ``on_event`` gets the rest. Callbacks
    may be plain or async; a slow one slows down receiving, one that raises is logged. At most ``outbox_limit`` messages
    wait to be sent.
    """

    def __init__(
        self,
        url: str,
        database: Path,
        token: Token,
        *,
        on_message: OnMessage | None = None,
        on_event: OnEvent | None = None,
        outbox_limit: int = 100_000,
        tuning: Tuning | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.storage = Storage(database)
        self.generation = 0
        self.attempted = 0
        self._tokens = Tokens(token)
        self._on_message = on_message
        self._on_event = on_event
        self._outbox_limit = outbox_limit
        self._tuning = tuning or Tuning()
        self._wishes = Wishes()
        self._queued = 0
        self._is_drained = False
        self._error: DeviceError | None = None
        self._changed = asyncio.Condition()
        self._connection: Connection | None = None
        self._session: ClientSession | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.storage.__aenter__()
        # What was queued when the process began may have gone out in an earlier life.
        self._queued, self.attempted = await self.storage.outbox_state()
        self._session = ClientSession(timeout=ClientTimeout(total=_REQUEST_SECONDS))
        self._task = asyncio.create_task(self._run(), name="relay-client-device")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        await self.storage.__aexit__()

    # -- sending

    async def send(
        self,
        conv: str,
        body: Body,
        kind: str = "text",
        reply_to: str | None = None,
        ttl: int | None = None,
    ) -> str:
        """Queues a message and returns its id once it is on disk; ``ttl`` in seconds.

        Raises InvalidMessage, OutboxFull or StorageError; then it is not queued. Works without a connection.
        """
        message = str(uuid.uuid4())
        await self.queue([Draft(conv, message, body, kind, reply_to, ttl)])
        return message

    async def withdraw(self, conv: str, message: str) -> str:
        """Queues the withdrawal of an own message; its row disappears once the relay has stored the withdrawal."""
        return await self.send(conv, None, WITHDRAWN, message)

    async def queue(self, drafts: Sequence[Draft]) -> int:
        """Queues drafts under their own ids in one transaction, in order; how many were new.

        One that is queued, stored or withdrawn already is left alone, so a repeated call sends nothing twice; one that had
        failed is tried again. Raises as ``send`` does; then none is queued.
        """
        encoded = [(draft, encode(draft)) for draft in drafts]
        added = await self.storage.enqueue(encoded, time.time_ns() // 1_000_000, self._outbox_limit)
        self._queued += added
        self.generation += 1
        if self._connection is not None:
            self._connection.wake()
        return added

    @property
    def queued(self) -> int:
        """How many messages wait for ``stored``."""
        return self._queued

    async def room(self, below: int) -> None:
        """Returns when fewer than ``below`` messages wait for ``stored``. Raises what stopped the device."""
        await self._until(lambda: self._queued < below)

    async def settled(self) -> None:
        """Returns when the outbox is empty: all is stored, or failed for good. Raises what stopped the device."""
        await self.room(1)

    async def drained(self) -> None:
        """Returns when all that waited at the relay as this connection began is on disk and acknowledged."""
        await self._until(lambda: self._is_drained)

    async def stopped(self) -> None:
        """Never returns; raises the error that stops the device, when one does."""
        await self._until(lambda: False)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._error is not None or condition())
        if self._error is not None and not condition():
            raise self._error

    # -- live

    async def read(self, conv: str, up_to: int) -> None:
        """The user has read this conversation up to this ``seq``. Kept in memory until the relay has it, also over a
        reconnect. Raises ValueError."""
        await self._say(self._wishes.read(conv, up_to))

    async def typing(self, conv: str, on: bool = True) -> None:
        """The user types here, or has stopped: repeat it every few seconds while it lasts. Nothing without a connection."""
        await self._say(self._wishes.typing(conv, on))

    async def watch(self, users: Sequence[str]) -> None:
        """Tells ``Presence`` of these people from now on, also after a reconnect, and of nobody else."""
        await self._say(self._wishes.watch(users))

    def answered(self, frame: Mapping[str, Any]) -> bool:
        """Whether a ``done`` or ``error`` answers one of these."""
        return self._wishes.answered(frame)

    async def _say(self, operations: Sequence[str]) -> None:
        if operations and self._connection is not None:
            await self._connection.say(operations)

    # -- HTTP

    async def request(self, method: str, path: str, json: object = None) -> Any:
        """An HTTP request with the device's token: the parsed answer, None when it has no body. Raises RequestFailed."""
        if self._session is None:
            raise RequestFailed(0, "unreachable", "the device is not open")
        reply = await exchange(
            self._session, method, self.url, path, json, token=await self._tokens.current()
        )
        if reply.status == 401:
            self._tokens.refused()
            reply = await exchange(
                self._session, method, self.url, path, json, token=await self._tokens.current()
            )
        return accepted(reply, f"{method} {path}")

    # -- being connected

    async def _run(self) -> None:
        try:
            await self._stay_connected()
        except DeviceError as error:
            self._error = error
            await self._tell(Stopped(error))
            await self._notify()

    async def _stay_connected(self) -> None:
        failures, refused = 0, False
        while True:
            ended = await self._connect_once()
            self._connection, self._is_drained = None, False
            if ended.code == 4409:
                raise Replaced("another connection of this device took over; this one stays closed")
            if ended.code == 4426:
                raise ClientTooOld("the relay no longer serves this version of the client; update it")
            if ended.lived:
                failures, refused = 0, False
            delay = self._delay(failures)
            failures += 1
            if ended.code == 4401:
                self._tokens.refused()
                if refused:
                    raise TokenRefused("the relay refused the token and the one fetched after it")
                refused, delay = True, 0.0
            elif ended.retry_after is not None:
                delay = ended.retry_after
            await self._tell(Disconnected(ended.code, ended.reason, delay))
            await asyncio.sleep(delay)

    async def _connect_once(self) -> Ended:
        try:
            async with asyncio.timeout(self._tuning.connect):
                token = await self._tokens.current()
                socket = await self._open_socket(token)
                welcomed = False
                try:
                    welcome, rest = await _welcome(socket)
                    welcomed = True
                finally:
                    if not welcomed:
                        await socket.close()
        except _Refused as refused:
            return refused.ended
        except TimeoutError:
            return Ended(None, f"the relay did not answer within {self._tuning.connect:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Ended(None, why(error))
        except RequestFailed as error:
            if not error.retry:
                raise
            return Ended(None, str(error), None if error.retry_after is None else error.retry_after / 1000)
        except StorageError as error:
            return Ended(None, str(error))
        except DeviceError:
            raise
        except Exception as error:  # noqa: BLE001 - the application's token callback may fail in any way
            _LOG.warning("no token: %s", type(error).__name__)
            return Ended(None, f"no token: {error}")
        renewal = asyncio.create_task(
            self._tokens.keep(socket, token, welcome), name="relay-client-token-renewal"
        )
        try:
            return await self._serve(socket, welcome, rest)
        except StorageError as error:
            _LOG.error("%s", error)
            return Ended(None, str(error))
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)
            await socket.close()

    async def _open_socket(self, token: str) -> ClientWebSocketResponse:
        assert self._session is not None
        try:
            return await self._session.ws_connect(
                f"{self.url}/v1/ws",
                protocols=(SUBPROTOCOL,),
                headers={"Authorization": f"Bearer {token}"},
                timeout=ClientWSTimeout(ws_close=2.0),
                autoping=False,
                max_msg_size=_MAX_FRAME,
            )
        except aiohttp.WSServerHandshakeError as error:
            wish = error.headers.get("Retry-After", "") if error.headers else ""
            retry_after = float(wish) if wish.isdecimal() else None
            code = 4401 if error.status == 401 else None
            raise _Refused(
                Ended(code, f"the relay answered with status {error.status}", retry_after)
            ) from None

    async def _serve(
        self, socket: ClientWebSocketResponse, welcome: Mapping[str, Any], rest: Sequence[Mapping[str, Any]]
    ) -> Ended:
        user, device = str(welcome.get("user", "")), str(welcome.get("device", ""))
        await self.storage.own(user, device)
        connection = Connection(socket, welcome, rest, self.storage, self, self._committed, self._tuning)
        self._connection = connection
        await self._tell(Connected(user, device))
        gap = welcome.get("gap")
        if isinstance(gap, dict):
            since = gap.get("since")
            await self._tell(Gap(since if type(since) is int else 0, str(gap.get("why", ""))))
        features = welcome.get("features")
        await connection.say(self._wishes.connected(features if isinstance(features, list) else ()))
        return await connection.run()

    async def _committed(self, committed: Committed, events: list[Event]) -> None:
        left = len(committed.stored) + len(committed.failed)
        self._queued -= left
        for conv in committed.conversations:
            await self._tell(NewConversation(conv))
        for message in committed.messages:
            await self._call(self._on_message, message)
        for event in (*committed.stored, *committed.failed, *events):
            await self._tell(event)
        drained = any(isinstance(event, Drained) for event in events)
        self._is_drained = self._is_drained or drained
        if left or drained:
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _tell(self, event: Event) -> None:
        await self._call(self._on_event, event)

    async def _call(self, callback: Callable[[Any], Awaitable[None] | None] | None, value: object) -> None:
        if callback is None:
            return
        try:
            result = callback(value)
            if inspect.isawaitable(result):
                await result
        except Exception:  # noqa: BLE001 - the application's own code
            _LOG.exception("the application's callback failed on %s", type(value).__name__)

    def pause(self, tries: int) -> float:
        """Seconds before a refused message may be tried again: the backoff, with jitter."""
        return self._delay(tries)

    def _delay(self, failures: int) -> float:
        shortest, longest = self._tuning.backoff
        # Full jitter: thousands of devices that lost one node must not come back together.
        return random.uniform(shortest, min(longest, shortest * 2 ** min(failures + 1, 16)))


class _Refused(Exception):
    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.reason)
        self.ended = ended


async def _welcome(socket: ClientWebSocketResponse) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    while True:
        frame = await socket.receive()
        if frame.type is WSMsgType.TEXT:
            operations = operations_of(frame.data)
            if operations and operations[0].get("t") == "welcome":
                return operations[0], operations[1:]
        elif frame.type is WSMsgType.PING:
            await socket.pong(frame.data)
        elif frame.type is WSMsgType.CLOSE:
            raise _Refused(Ended(frame.data, str(frame.extra or "")))
        elif frame.type in (WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
            raise _Refused(Ended(socket.close_code, "the connection broke"))
