"""One connection of a device, from ``welcome`` to its close.

Three tasks share it. The *reader* parses frames and hands them on, bounded. The *committer* writes all that has been read in
one transaction, only then acknowledges, and only then tells the application. The *sender* keeps a bounded number of
messages of the outbox unanswered. The fourth, the *heartbeat*, ends a connection that is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from aiohttp import ClientWebSocketResponse, WSMessage, WSMsgType

from relay.client.database import Committed, Incoming, Waiting
from relay.client.packing import Limits, acknowledgements, attempt, pack
from relay.client.parsing import live_of, operations_of, receipt_of, seconds, stored_of
from relay.client.storage import Storage
from relay.client.values import Drained, Event, Failed, Live, Message

MAX_UNANSWERED: Final = 64
_READ_AHEAD: Final = 256
_READ_AHEAD_BYTES: Final = 1 << 20
_INBOX_FRAMES: Final = 32
_MAX_HELD: Final = 256
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Times in seconds. ``backoff`` is the shortest and longest pause before another attempt; ``answer`` how long a
    message may stay unanswered on a live connection; ``connect`` limits reaching ``welcome``; ``leave`` how long a relay that
    said ``bye`` may take to close."""

    backoff: tuple[float, float] = (1.0, 30.0)
    connect: float = 10.0
    answer: float = 30.0
    leave: float = 15.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a connection ended. ``retry_after`` is in seconds and the relay's own wish; ``lived`` says it did useful work."""

    code: int | None
    reason: str
    retry_after: float | None = None
    lived: bool = False


class Outbox(Protocol):
    """What connections of one device share about its outbox."""

    generation: int
    """Rises with every message queued."""
    attempted: int
    """The highest position that may have gone out before, by this process or an earlier one."""

    def answered(self, frame: Mapping[str, Any]) -> bool:
        """Whether a ``done`` or ``error`` answers a live operation of the device."""
        ...

    def pause(self, tries: int) -> float:
        """Seconds before a refused message may be tried for the ``tries``-th time again."""
        ...


@dataclass(slots=True)
class _Hold:
    until: float
    tries: int


@dataclass(slots=True)
class _Batch:
    """One received frame, sorted by what is to be done with it."""

    incoming: Incoming
    keys: list[tuple[str, str]]
    after: list[Event]


class Connection:
    """``run`` returns when the connection has ended, however it did, and leaves no task behind.

    ``on_committed`` is awaited after each transaction and its acknowledgements; a slow one slows the reading down.
    """

    def __init__(
        self,
        socket: ClientWebSocketResponse,
        welcome: Mapping[str, Any],
        first: Sequence[Mapping[str, Any]],
        storage: Storage,
        outbox: Outbox,
        on_committed: Callable[[Committed, list[Event]], Awaitable[None]],
        tuning: Tuning,
    ) -> None:
        self._socket = socket
        self._first = first
        self._storage = storage
        self._outbox = outbox
        self._on_committed = on_committed
        self._tuning = tuning
        self._limits = Limits.from_welcome(welcome)
        heartbeat = welcome.get("heartbeat")
        self._heartbeat = heartbeat / 1000 if type(heartbeat) is int and heartbeat > 0 else 25.0
        self._now = asyncio.get_running_loop().time
        self._received = self._sent = self._now()
        self._reading = False
        self._lived = False
        self._ended: Ended | None = None
        self._leaving: float | None = None
        self._retry_after: float | None = None
        self._inbox: asyncio.Queue[_Batch | None] = asyncio.Queue(_INBOX_FRAMES)
        self._work = asyncio.Event()
        self._ready: deque[Waiting] = deque()
        self._loaded = 0
        self._complete = -1  # the generation of the outbox of which everything is loaded
        self._unanswered: dict[tuple[str, str], tuple[float, int]] = {}
        self._unanswered_bytes = 0
        self._settling: set[tuple[str, str]] = set()
        self._held: dict[str, _Hold] = {}
        self._silent_until = 0.0

    async def run(self) -> Ended:
        """Serves the connection to its end. Raises StorageError when the disk refuses; then nothing was acknowledged."""
        committer = asyncio.create_task(self._commit_received(), name="relay-client-committer")
        others = [
            asyncio.create_task(self._read(), name="relay-client-reader"),
            asyncio.create_task(self._send_waiting(), name="relay-client-sender"),
            asyncio.create_task(self._watch(), name="relay-client-heartbeat"),
        ]
        try:
            running = {committer, *others}
            # The committer ends last: after the reader's last frame, so a close code is never lost to another task's end.
            while not committer.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (committer, *others):
                task.cancel()
            await asyncio.gather(committer, *others, return_exceptions=True)
            await self._socket.close()
        return self._ended or Ended(None, "the connection broke", self._retry_after, self._lived)

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._work.set()

    async def say(self, operations: Sequence[str]) -> None:
        """Sends live operations; lost when the connection is."""
        if self._leaving is None:
            await self._write(operations)

    # -- receiving

    async def _read(self) -> None:
        await self._take(self._first)
        while True:
            self._reading = True
            frame = await self._socket.receive()
            self._reading = False
            self._received = self._now()
            if frame.type is WSMsgType.TEXT:
                await self._take(operations_of(frame.data))
            elif frame.type is WSMsgType.PING:
                await self._try_pong(frame.data)
            elif frame.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
                self._end(frame)
                await self._inbox.put(None)
                return

    async def _try_pong(self, data: bytes) -> None:
        try:
            await self._socket.pong(data)
        except ConnectionError:
            return  # the next receive tells why
        self._sent = self._now()

    def _end(self, frame: WSMessage) -> None:
        if self._ended is None:
            code = frame.data if frame.type is WSMsgType.CLOSE else self._socket.close_code
            reason = str(frame.extra or "") if frame.type is WSMsgType.CLOSE else "the connection broke"
            self._ended = Ended(code, reason, self._retry_after, self._lived)

    async def _take(self, operations: Sequence[Mapping[str, Any]]) -> None:
        batch = _Batch(Incoming(), [], [])
        for operation in operations:
            self._lived = True
            self._sort(operation, batch)
        if operations:
            self._work.set()
            await self._inbox.put(batch)

    def _sort(self, operation: Mapping[str, Any], batch: _Batch) -> None:
        kind = operation.get("t")
        if kind == "msg":
            message = Message.from_frame(operation)
            if message is None:
                _LOG.warning("the relay sent a message without conversation, id or seq; it is ignored")
                return
            batch.incoming.messages.append(message)
            batch.keys.append((message.conv, message.id))
        elif kind == "stored":
            stored = stored_of(operation)
            if stored is not None:
                self._answered((stored.conv, stored.id))
                self._held.pop(stored.conv, None)
                batch.incoming.stored.append(stored)
        elif kind in ("done", "error") and self._outbox.answered(operation):
            if kind == "error":
                batch.after.append(Live(operation))
        elif kind == "error":
            self._refused(operation, batch)
        elif kind == "receipt":
            receipt = receipt_of(operation)
            if receipt is not None:
                batch.incoming.receipts.append(receipt)
                batch.after.append(receipt)
        elif kind == "drained":
            count = operation.get("count")
            batch.after.append(Drained(count if type(count) is int else 0))
        elif kind == "bye":
            self._retry_after = seconds(operation.get("retryAfter"), 1.0)
            self._leaving = self._now() + self._tuning.leave
        elif kind not in ("pong", "authed"):
            batch.after.append(live_of(operation) or Live(operation))

    def _refused(self, error: Mapping[str, Any], batch: _Batch) -> None:
        key = self._find(error)
        wish = seconds(error.get("retryAfter"), 0.0)
        if key is None:
            # Not about a message of ours, or about the frame as a whole.
            self._silent_until = max(self._silent_until, self._now() + wish)
            batch.after.append(Live(error))
            return
        self._answered(key, settling=not error.get("retry"))
        if error.get("code") == "rate_limited":
            self._keep_silent(wish)
            batch.after.append(Live(error))
        elif error.get("retry"):
            self._hold(key[0], wish)
            batch.after.append(Live(error))
        else:
            batch.incoming.failed.append(
                Failed(*key, code=str(error.get("code", "internal")), message=str(error.get("message", "")))
            )

    def _find(self, error: Mapping[str, Any]) -> tuple[str, str] | None:
        conv, message = error.get("conv"), error.get("id")
        if (conv, message) in self._unanswered:
            return conv, message  # type: ignore[return-value]  # the keys are pairs of strings
        if conv is None and message is not None:
            return next((key for key in self._unanswered if key[1] == message), None)
        return None

    def _answered(self, key: tuple[str, str], *, settling: bool = True) -> None:
        waited = self._unanswered.pop(key, None)
        if waited is not None:
            self._unanswered_bytes -= waited[1]
            if settling:
                self._settling.add(key)

    def _keep_silent(self, wish: float) -> None:
        """The limit is the device's, whatever the conversation; what is refused goes out again in its place."""
        until = self._now() + (wish or self._outbox.pause(1))
        self._silent_until = max(self._silent_until, until)
        self._reload()

    def _hold(self, conv: str, wish: float) -> None:
        """Nothing of that conversation for a while; the others go on."""
        now = self._now()
        before = self._held.get(conv)
        # The refusals of one flight are one refusal.
        tries = 1 if before is None else before.tries + (before.until <= now)
        until = now + max(wish, self._outbox.pause(tries))
        if before is None and len(self._held) >= _MAX_HELD:
            self._silent_until = max(self._silent_until, until)
        else:
            self._held[conv] = _Hold(until if before is None else max(until, before.until), tries)
        self._reload()

    async def _commit_received(self) -> None:
        ended = False
        while not ended:
            batches = [await self._inbox.get()]
            while not self._inbox.empty():
                batches.append(self._inbox.get_nowait())
            ended = batches[-1] is None
            incoming = Incoming()
            keys: list[tuple[str, str]] = []
            after: list[Event] = []
            for batch in batches:
                if batch is not None:
                    incoming.messages += batch.incoming.messages
                    incoming.stored += batch.incoming.stored
                    incoming.failed += batch.incoming.failed
                    incoming.receipts += batch.incoming.receipts
                    keys += batch.keys
                    after += batch.after
            committed = await self._storage.commit(incoming)
            self._settling.difference_update((item.conv, item.id) for item in incoming.stored)
            self._settling.difference_update((item.conv, item.id) for item in incoming.failed)
            await self._write(acknowledgements(keys, self._limits))
            await self._on_committed(committed, after)

    # -- sending

    async def _send_waiting(self) -> None:
        while True:
            self._work.clear()
            # What ends while the storage is read was left out of what it gave, and is due at once.
            began = self._now()
            if began >= self._silent_until and self._leaving is None:
                chosen = await self._choose()
                if chosen:
                    await self._write(chosen)
                    continue
            due = [hold.until for hold in self._held.values() if hold.until > began]
            if self._silent_until > began:
                due.append(self._silent_until)
            try:
                async with asyncio.timeout_at(min(due) if due else None):
                    await self._work.wait()
            except TimeoutError:
                self._reload()

    async def _choose(self) -> list[str]:
        """The operations that may go out now, in the outbox's order; counts them as unanswered."""
        chosen: list[str] = []
        while len(self._unanswered) < MAX_UNANSWERED:
            if not self._ready and not await self._load():
                break
            row = self._ready[0]
            key = (row.conv, row.id)
            if key in self._unanswered or key in self._settling:
                self._ready.popleft()
                continue
            operation = attempt(row, again=row.position <= self._outbox.attempted)
            size = len(operation.encode())
            if size > self._limits.frame:
                self._ready.popleft()
                await self._too_large(row, size)
                continue
            if self._unanswered and self._unanswered_bytes + size + 3 > self._limits.frame:
                break
            self._ready.popleft()
            self._outbox.attempted = max(self._outbox.attempted, row.position)
            self._unanswered[key] = (self._now(), size + 3)
            self._unanswered_bytes += size + 3
            chosen.append(operation)
        return chosen

    async def _load(self) -> bool:
        generation = self._outbox.generation
        if self._complete == generation:
            return False
        now = self._now()
        without = [conv for conv, hold in self._held.items() if hold.until > now]
        start = self._loaded
        rows = await self._storage.waiting(start, _READ_AHEAD, _READ_AHEAD_BYTES, without)
        if self._loaded != start or any(
            hold.until > now for conv, hold in self._held.items() if conv not in without
        ):
            return True if self._ready else await self._load()  # a refusal came meanwhile: read again
        if rows:
            self._loaded = rows[-1].position
            self._ready.extend(rows)
        else:
            self._complete = generation
        return bool(rows)

    def _reload(self) -> None:
        self._ready.clear()
        self._loaded = 0
        self._complete = -1

    async def _too_large(self, row: Waiting, size: int) -> None:
        text = f"the message takes {size} bytes, a frame of this relay {self._limits.frame}"
        failed = Failed(row.conv, row.id, "too_large", text)
        self._settling.add((row.conv, row.id))
        await self._inbox.put(_Batch(Incoming(failed=[failed]), [], []))

    async def _write(self, operations: Iterable[str]) -> None:
        try:
            for frame in pack(operations, self._limits):
                await self._socket.send_str(frame)
                self._sent = self._now()
        except ConnectionError:
            return  # the reader learns why; what was not sent is redelivered or resent

    # -- life

    async def _watch(self) -> None:
        pinged = 0.0
        while True:
            now = self._now()
            received = self._received if self._reading else now
            oldest = min((since for since, _ in self._unanswered.values()), default=now)
            if now - received >= 2 * self._heartbeat:
                return await self._give_up("the relay was silent for two heartbeats")
            if now - oldest >= self._tuning.answer:
                return await self._give_up("the relay left a message unanswered")
            if self._leaving is not None and now >= self._leaving:
                return await self._give_up("the relay said bye")
            quiet = min(received, self._sent)
            if now - max(quiet, pinged) >= self._heartbeat:
                pinged = now
                await self._write(['{"t":"ping"}'])
            due = [
                received + 2 * self._heartbeat,
                max(quiet, pinged) + self._heartbeat,
                oldest + self._tuning.answer,
            ]
            if self._leaving is not None:
                due.append(self._leaving)
            await asyncio.sleep(max(0.005, min(due) - now))

    async def _give_up(self, reason: str) -> None:
        if self._ended is None:
            self._ended = Ended(None, reason, self._retry_after, self._lived)
        await self._socket.close()
