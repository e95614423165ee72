"""A router's stand-in: passes MongoDB's wire protocol on to a shard server, which contains the router's own code.

A shard server answers ``clusterInsert``, ``clusterUpdate``, ``clusterDelete``, ``clusterFind``, ``clusterAggregate`` and
``clusterGetMore`` as a router answers the commands without the prefix. So those six are renamed and go to one shard, whichever data
they are about: cursors live there. Everything else (``findAndModify``, what concerns unsharded collections) goes to the primary shard
as it is. What administers the cluster, or concerns all shards, is up to tests/support/router_admin.py.

``python -m tests.support.forwarder --port 0 --shard HOST:PORT --primary HOST:PORT --config HOST:PORT`` listens on loopback until
SIGTERM, and prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import struct
from collections.abc import Coroutine, Mapping
from typing import Any, Final

import bson
import uvloop
from pymongo.errors import OperationFailure, PyMongoError

from tests.support.router_admin import Address, RouterAdmin

HEADER: Final = struct.Struct("<iiii")
# After the header: flags, the first section's kind, and the size of its document.
BODY: Final = struct.Struct("<IBi")
REPLY: Final = struct.Struct("<iqii")
OP_REPLY: Final = 1
OP_QUERY: Final = 2004
OP_MSG: Final = 2013
CHECKSUM: Final = 1
MAX_MESSAGE: Final = 48_000_000
_NAME_AT: Final = 26
_DATABASE: Final = b"\x02$db\0"
_PREFERENCE: Final = b"$readPreference\0"

ROUTED: Final[Mapping[bytes, bytes]] = {
    b"insert": b"clusterInsert",
    b"update": b"clusterUpdate",
    b"delete": b"clusterDelete",
    b"find": b"clusterFind",
    b"aggregate": b"clusterAggregate",
    b"getMore": b"clusterGetMore",
}
HELLO: Final = frozenset({b"hello", b"isMaster", b"ismaster"})
# Answered by whoever is asked, so that a primary shard that is down does not take a router with it.
OWN: Final = HELLO | {b"ping", b"buildInfo", b"buildinfo", b"endSessions", b"killCursors"}
SLOW: Final = RouterAdmin.commands()
NOT_A_ROUTERS: Final = (
    "setName",
    "hosts",
    "primary",
    "me",
    "setVersion",
    "electionId",
    "secondary",
    "lastWrite",
    "topologyVersion",
    "compression",
)
FAIL_POINT: Final = b"configureFailPoint"
NO_FAIL_POINTS: Final = "a router has no fail points: set them on a shard"


class Router:
    """What the connections of one forwarder share: where to, and how to administer the cluster."""

    def __init__(self, shard: Address, primary: Address, config: Address, primary_name: str) -> None:
        self.shard = shard
        self.primary = primary
        self.admin = RouterAdmin(shard, config, primary_name)
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Runs this in the background."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.admin.close()


class Upstream(asyncio.Protocol):
    """One connection to a shard server, for one client connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._buffer = b""

    async def connect(self, address: Address) -> None:
        """Connects; when that fails the client's connection ends, as a router's would."""
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, *address)
        except OSError:
            self._client.end()

    def write(self, data: bytes) -> None:
        """Passes on; what comes before there is a connection waits for it."""
        if self._transport is None:
            self._early.append(data)
            self._client.hold(True)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """The client has gone."""
        if self._transport is not None:
            self._transport.abort()

    def hold(self, held: bool) -> None:
        """The client reads too slowly, or fast enough again."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport = transport
        if self._client.ended:
            transport.abort()
            return
        for data in self._early:
            transport.write(data)
        if self._early:
            self._early.clear()
            self._client.hold(False)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        client = self._client
        if not client.hellos and not self._buffer:
            client.answer(data)
            return
        data = self._buffer + data
        while len(data) >= HEADER.size:
            size = HEADER.unpack_from(data)[0]
            if len(data) < size:
                break
            message, data = data[:size], data[size:]
            answered = HEADER.unpack_from(message)[2]
            if answered in client.hellos:
                client.hellos.discard(answered)
                message = as_router(message)
            client.answer(message)
        self._buffer = data

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._client.end()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._client.hold(True)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._client.hold(False)


class Client(asyncio.Protocol):
    """One connection of a driver."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._transport: Any = None
        self._own = Upstream(self)
        self._primary = self._own if router.primary == router.shard else Upstream(self)
        self._is_primary_connected = self._primary is self._own
        self._buffer = b""
        # What is left of a message whose head has been passed on, and where to.
        self._left = 0
        self._target = self._own
        self._is_looking_up = False
        self.hellos: set[int] = set()
        self.ended = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport = transport
        self._router.run(self._own.connect(self._router.shard), "forwarder-connect")

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._left:
            if self._left >= len(data):
                self._left -= len(data)
                self._target.write(data)
                return
            self._target.write(data[: self._left])
            data = data[self._left :]
            self._left = 0
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while data and not self._is_looking_up and not self._left:
            taken = self._begin(data)
            if not taken:
                break
            data = data[taken:]
        self._buffer = data

    def _begin(self, data: bytes) -> int:
        """Passes on the message at the beginning, or what is there of it; how much that was, 0 when more is needed to decide."""
        if len(data) < HEADER.size + BODY.size:
            return 0
        size: int
        request: int
        size, request, _, opcode = HEADER.unpack_from(data)
        if not HEADER.size < size <= MAX_MESSAGE:
            self.end()
            return 0
        if opcode != OP_MSG:
            # Old clients' first hello.
            self.hellos.add(request)
            return self._pass(self._own, data, size, data[:size])
        flags, kind, length = BODY.unpack_from(data, HEADER.size)
        end = _NAME_AT - 5 + length
        if kind == 0 and len(data) < min(end, size):
            return 0
        unusual = kind != 0 or flags & CHECKSUM
        if unusual or data.find(_PREFERENCE, _NAME_AT, end) >= 0:
            if len(data) < size:
                return 0
            plain = plainly(data[:size])
            self._begin(plain)
            return size
        name_end = data.index(b"\0", _NAME_AT)
        name = data[_NAME_AT:name_end]
        if name in HELLO:
            self.hellos.add(request)
        if name == FAIL_POINT and len(data) >= size:
            # On the primary shard alone it would half work.
            self.answer(packed(0, request, {"ok": 0.0, "errmsg": NO_FAIL_POINTS, "code": 59}))
            return size
        if name in SLOW:
            if len(data) < size:
                return 0
            self._is_looking_up = True
            self._router.run(self._look_up(data[:size]), "forwarder-look-up")
            return size
        # The last one: it comes after what people wrote.
        database_at = data.rfind(_DATABASE, _NAME_AT, end) + len(_DATABASE) + 4
        is_admins = data.startswith((b"admin\0", b"local\0"), database_at)
        new_name = ROUTED.get(name)
        if new_name is None or is_admins:
            target = self._own if name in OWN else self._primary_upstream()
            return self._pass(target, data, size, data[:size])
        if name == b"getMore" and data.find(b"\0$cmd.", _NAME_AT, end) >= 0:
            return self._pass(self._primary_upstream(), data, size, data[:size])
        more = len(new_name) - len(name)
        head = HEADER.pack(size + more, request, 0, opcode) + BODY.pack(flags, 0, length + more)
        renamed = b"".join((head, data[_NAME_AT - 1 : _NAME_AT], new_name, data[name_end:size]))
        return self._pass(self._own, data, size, renamed)

    def _pass(self, target: Upstream, data: bytes, size: int, written: bytes) -> int:
        target.write(written)
        self._target = target
        self._left = max(size - len(data), 0)
        return min(size, len(data))

    async def _look_up(self, message: bytes) -> None:
        request = HEADER.unpack_from(message)[1]
        body = bson.decode(message[_NAME_AT - 5 :])
        admin = self._router.admin
        try:
            answer = await admin.answer(body)
            if answer is None:
                self._primary_upstream().write(packed(request, 0, await admin.rewritten(body)))
        except OperationFailure as error:
            answer = {"ok": 0.0, "errmsg": str(error.details and error.details["errmsg"]), "code": error.code}
        except PyMongoError as error:
            answer = {"ok": 0.0, "errmsg": str(error)[:500], "code": 6}
        if answer is not None:
            self.answer(packed(0, request, answer))
        self._is_looking_up = False
        self.data_received(b"")

    def _primary_upstream(self) -> Upstream:
        if not self._is_primary_connected:
            self._is_primary_connected = True
            self._router.run(self._primary.connect(self._router.primary), "forwarder-connect-primary")
        return self._primary

    def answer(self, data: bytes) -> None:
        """Passes an answer on."""
        self._transport.write(data)

    def hold(self, held: bool) -> None:
        """A shard server takes too little, or enough again."""
        if not self._transport.is_closing():
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def end(self) -> None:
        """Ends the connection: what it had asked is not answered."""
        self.ended = True
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.ended = True
        self._own.close()
        self._primary.close()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._own.hold(True)
        self._primary.hold(True)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._own.hold(False)
        self._primary.hold(False)


def packed(request: int, answered: int, body: Mapping[str, Any]) -> bytes:
    """A message of one document."""
    document = bson.encode(body)
    return HEADER.pack(21 + len(document), request, answered, OP_MSG) + struct.pack("<IB", 0, 0) + document


def plainly(message: bytes) -> bytes:
    """The same command with its body first, without read preference and checksum."""
    size, request, _, _ = HEADER.unpack_from(message)
    flags = int.from_bytes(message[16:20], "little")
    at, end = 20, size - 4 if flags & CHECKSUM else size
    body: dict[str, Any] = {}
    others: list[bytes] = []
    while at < end:
        length = int.from_bytes(message[at + 1 : at + 5], "little")
        section = message[at : at + 1 + length]
        if section[0] == 0:
            body = bson.decode(section[1:])
        else:
            others.append(section)
        at += 1 + length
    body.pop("$readPreference", None)
    content = b"".join((b"\0", bson.encode(body), *others))
    return HEADER.pack(20 + len(content), request, 0, OP_MSG) + struct.pack("<I", flags & ~CHECKSUM) + content


def as_router(message: bytes) -> bytes:
    """A shard server's answer to ``hello`` as a router's."""
    _, request, answered, opcode = HEADER.unpack_from(message)
    start = 36 if opcode == OP_REPLY else 21
    said = bson.decode(message[start:])
    said = {name: value for name, value in said.items() if name not in NOT_A_ROUTERS}
    document = bson.encode({**said, "msg": "isdbgrid"})
    return (
        HEADER.pack(start + len(document), request, answered, opcode)
        + message[HEADER.size : start]
        + document
    )


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


async def serve(port: int, router: Router) -> None:
    """Listens on loopback until SIGTERM; says its port on standard output."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    server = await loop.create_server(lambda: Client(router), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()
    server.close()
    await router.close()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--shard", type=_address, required=True)
    parser.add_argument("--primary", type=_address, required=True)
    parser.add_argument("--primary-name", default="s1")
    parser.add_argument("--config", type=_address, required=True)
    given = parser.parse_args()
    router_of = (given.shard, given.primary, given.config, given.primary_name)

    async def run() -> None:
        await serve(given.port, Router(*router_of))

    uvloop.run(run())


if __name__ == "__main__":
    main()
