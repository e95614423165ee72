"""A WebSocket by hand, for what a well-behaved client library does not do: slow, odd and unanswered frames."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import struct
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.support.node import Node

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


@dataclass(frozen=True, slots=True)
class RawFrame:
    """One frame from the relay."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """The close code of a close frame."""
        return int(struct.unpack("!H", self.payload[:2])[0])


def frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A masked client frame (RFC 6455 5.2)."""
    head = bytes([(0x80 if fin else 0) | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 1 << 16:
        head += bytes([0x80 | 126]) + struct.pack("!H", len(payload))
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", len(payload))
    mask = os.urandom(4)
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)], "big")
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(len(payload), "big")
    return head + mask + masked


class RawSocket:
    """One upgraded socket. Nothing is read, answered or closed unless a test says so."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.reader = reader
        self.writer = writer
        self.head = head

    @classmethod
    async def open(
        cls, node: Node, headers: dict[str, str], *, path: str = "/v1/ws", receive_buffer: int | None = None
    ) -> RawSocket:
        """Upgrades, with a receive buffer of that many bytes when given; ``head`` is the answer's head."""
        parts = urlsplit(node.url)
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=65536)
        lines = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        return cls(reader, writer, head.decode())

    async def send(self, opcode: int, payload: bytes, *, fin: bool = True) -> None:
        """Sends one frame."""
        self.writer.write(frame(opcode, payload, fin=fin))
        await self.writer.drain()

    async def receive(self, seconds: float = 5) -> RawFrame:
        """The next frame, of any kind. Raises TimeoutError and IncompleteReadError."""
        async with asyncio.timeout(seconds):
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                (size,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return RawFrame(first & 0x0F, await self.reader.readexactly(size))

    async def until(self, opcode: int, seconds: float = 5) -> RawFrame:
        """The next frame of this kind; those before it are dropped."""
        async with asyncio.timeout(seconds):
            while (found := await self.receive(seconds)).opcode != opcode:
                pass
            return found

    def cut(self) -> None:
        """Drops the connection without a word."""
        self.writer.transport.abort()
