"""A WebSocket client that costs as little as possible: it shares the machine with what it measures.

Only what the relay speaks: text frames in one piece, pings, close. Frames are masked with zeros, which RFC 6455 5.3 lets a
server not tell from any other mask; the unpredictability it asks for protects caches in browsers' ways, not loopback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

_TEXT: Final = 0x81
_CLOSE: Final = 0x88
_PING: Final = 0x89
_MASK: Final = bytes(4)
_MAX_FRAME: Final = 1 << 24


class Msg(msgspec.Struct, tag_field="t", tag="msg", gc=False):
    """A delivered message."""

    id: str
    conv: str


class Stored(msgspec.Struct, tag_field="t", tag="stored", gc=False):
    """A durable message."""

    id: str


class Receipt(msgspec.Struct, tag_field="t", tag="receipt", gc=False):
    """A message reached its device."""


class Drained(msgspec.Struct, tag_field="t", tag="drained", gc=False):
    """All that waited has come: so many messages."""

    count: int = 0


class Welcome(msgspec.Struct, tag_field="t", tag="welcome", gc=False):
    """The connection is authenticated."""


class Bye(msgspec.Struct, tag_field="t", tag="bye", gc=False):
    """The relay stops."""


class Pong(msgspec.Struct, tag_field="t", tag="pong", gc=False):
    """An answer to a ping."""


class Error(msgspec.Struct, tag_field="t", tag="error"):
    """Something was refused."""

    code: str
    message: str
    id: str | None = None


Op = Msg | Stored | Receipt | Drained | Welcome | Bye | Pong | Error
_decode: Final = msgspec.json.Decoder(Op | list[Op]).decode


def decoded(payload: bytes) -> list[Op]:
    """The operations of one text frame. Raises msgspec.DecodeError."""
    ops = _decode(payload)
    return ops if isinstance(ops, list) else [ops]


def text_frame(text: str) -> bytes:
    """The bytes of one text frame."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        header = bytes((_TEXT, 0x80 | size))
    elif size < 65536:
        header = bytes((_TEXT, 0xFE, size >> 8, size & 255))
    else:
        header = bytes((_TEXT, 0xFF)) + size.to_bytes(8)
    return header + _MASK + payload


class Receiver(Protocol):
    """Whom a socket tells. Called in the event loop, never concurrently."""

    def received(self, ops: list[Op]) -> None:
        """Everything of one frame."""

    def lost(self, reason: str) -> None:
        """The connection ended without having been closed from here."""


class Socket(asyncio.Protocol):
    """One connection. ``opened`` is done after the upgrade, or has the reason why there was none."""

    __slots__ = (
        "_buffer",
        "_closing",
        "_paused",
        "_receiver",
        "_request",
        "_upgraded",
        "opened",
        "transport",
    )

    def __init__(self, receiver: Receiver, host: str, port: int, token: str) -> None:
        self._receiver = receiver
        self._request = (
            f"GET /v1/ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: relay.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
        ).encode()
        self._buffer = b""
        self._upgraded = False
        self._closing = False
        self._paused = False
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self.transport = transport
        self.transport.write(self._request)
        self._request = b""

    def pause_writing(self) -> None:
        """asyncio's."""
        self._paused = True

    def resume_writing(self) -> None:
        """asyncio's."""
        self._paused = False

    @property
    def slow(self) -> bool:
        """Whether the relay does not take what is sent."""
        return self._paused

    def listen(self, receiver: Receiver) -> None:
        """Tells another from now on."""
        self._receiver = receiver

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if not self._upgraded:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._buffer = head
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                self._end(
                    f"the relay answered {head.partition(b' ')[2][:60].decode('latin-1').splitlines()[0]}"
                )
                return
            self._upgraded = True
            self.opened.set_result(None)
        position, available = 0, len(data)
        while available - position >= 2:
            start = position + 2
            length = data[position + 1]
            if length == 126:
                start += 2
                length = int.from_bytes(data[position + 2 : start]) if start <= available else _MAX_FRAME
            elif length == 127:
                start += 8
                length = int.from_bytes(data[position + 2 : start]) if start <= available else _MAX_FRAME
            end = start + length
            if end > available:
                break
            kind = data[position]
            if kind == _TEXT:
                self.took(data[start:end])
            elif not self._control(kind, data[start:end]):
                return
            position = end
        if position < available:
            self._buffer = data[position:]

    def took(self, payload: bytes) -> None:
        """One text frame has come."""
        self._receiver.received(decoded(payload))

    def _control(self, kind: int, payload: bytes) -> bool:
        if kind == _PING:
            self.transport.write(bytes((0x8A, 0x80 | len(payload))) + _MASK + payload)
            return True
        if kind == _CLOSE:
            self._end(
                f"the relay closed with {int.from_bytes(payload[:2])} {payload[2:].decode(errors='replace')}"
            )
        else:
            self._end(f"the relay sent a frame of an unexpected kind ({kind:#x})")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        self._end("the relay cut the connection" if error is None else f"the connection broke: {error}")

    def send(self, text: str) -> None:
        """Writes one text frame."""
        self.transport.write(text_frame(text))

    def close(self) -> None:
        """Says goodbye and closes; nothing is received any more."""
        self._closing = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(bytes((_CLOSE, 0x82)) + _MASK + (1000).to_bytes(2))
            self.transport.close()

    def _end(self, reason: str) -> None:
        if self._closing:
            return
        self._closing = True
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(reason))
        if self.transport is not None:
            self.transport.close()
        self._receiver.lost(reason)


async def connect(
    receiver: Receiver,
    host: str,
    port: int,
    token: str,
    *,
    seconds: float = 30,
    make: Callable[[Receiver, str, int, str], Socket] = Socket,
) -> Socket:
    """An upgraded socket, as ``make`` makes them. Raises OSError (ConnectionError among them) with the reason in one line."""
    loop = asyncio.get_running_loop()
    socket: Callable[[], Socket] = lambda: make(receiver, host, port, token)  # noqa: E731
    try:
        async with asyncio.timeout(seconds):
            _, made = await loop.create_connection(socket, host, port)
            await made.opened
    except TimeoutError:
        raise ConnectionError(f"the relay did not answer an upgrade within {seconds:g} s") from None
    return made
