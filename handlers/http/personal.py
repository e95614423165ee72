"""A person's data: take all of it along, or have it erased."""

from __future__ import annotations

import asyncio
import json
import time
import zipfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import structlog
from aiohttp import web

from handlers import erasing
from handlers.context import Context
from handlers.http.route import UNCACHED, Caller, Route, answer
from handlers.http.schemas.base import DoneAnswer
from relay.store.export import Exports, Value
from relay.store.mongo import PyMongoError, brief
from relay.wire.clock import wall_seconds
from relay.wire.errors import RelayError

_CHUNK: Final = 65_536
_STALLED_SECONDS: Final = 60.0
_README: Final = "README.txt"
_INTRODUCTION: Final = """\
Everything that this relay keeps about {user}, as of {moment}.

The files are JSON, in UTF-8. Times are milliseconds since 1 January 1970 (UTC). Messages are kept only until the devices
they are for have stored them: what everybody has is on your devices, not here. For 72 hours the relay also remembers the ids
of messages that are gone, who sent them and who received them, without their content; these records run out by themselves and
are not listed.

"""
_FILES: Final = {
    "profile.json": "your account: names, phone number, picture, status text, preferences",
    "devices.json": "your devices, and when each was last seen",
    "keys.json": "the public end-to-end keys of your devices",
    "prekeys.json": "the one-time prekeys of your devices; those with `claimedAt` were handed out",
    "contacts.json": "whom you keep as a contact or have blocked, and the names you gave them",
    "conversations.json": "the conversations you are in or left lately: role, dates, mute, pin, archive, how far you read",
    "searches.json": "what you searched for last",
    "reports.json": "what you reported to the operators",
    "waiting.json": "messages that wait for one of your devices (`mailbox`); `sealed` is encrypted for that device",
    "received.json": "messages that devices of yours have (`deliveredTo`) and that still wait for other devices",
    "sent.json": "messages you sent that still wait; `awaiting` counts the people without it",
    "audit.json": "the audit trail: what you did, from where, and what others did to your account or memberships",
}

log = structlog.get_logger(__name__)


async def export(ctx: Context, caller: Caller, request: web.Request) -> web.StreamResponse:
    """A zip of JSON files, with a README.txt that says what is in each. It is made while it is sent: there is no length in
    advance, and an archive without its end means that the download failed."""
    await ctx.rates.check("export", caller.user)
    exports = Exports()
    profile = await exports.profile(caller.user)
    if profile is None:
        raise RelayError("not_found", "no such user")
    await ctx.audit.record("me.export", actor=caller.user, address=caller.address, agent=caller.agent)
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/zip",
            "Content-Disposition": 'attachment; filename="relay-export.zip"',
            **UNCACHED,
        }
    )
    await response.prepare(request)
    try:
        async with aclosing(_archive(ctx, exports, caller.user, profile)) as chunks:
            async for chunk in chunks:
                async with asyncio.timeout(_STALLED_SECONDS):
                    await response.write(chunk)
    except Exception as error:
        # The status is sent already: a torn connection is what says that this is not all.
        if isinstance(error, PyMongoError | TimeoutError | OSError):
            log.warning("an export was broken off", error=brief(error))
        else:
            log.exception("an export was broken off")
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the export was broken off") from None
    await response.write_eof()
    return response


async def erase(ctx: Context, caller: Caller, request: web.Request) -> web.Response:
    """Erases the account with everything in it: devices, keys, contacts, memberships, what waits for the devices, and the
    name in other people's lists. It cannot be undone. Tokens are refused from here on; what is left to do when this is
    answered is done within a minute, and where the store does not answer as soon as it does. Messages sent before stay with
    those who received them."""
    await erasing.erase(ctx, caller.user, address=caller.address, agent=caller.agent)
    return answer(DoneAnswer())


class _Sink:
    """Where the zip is written to: what the response has not taken yet. Not seekable, so nothing is written twice."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """There is nothing behind it."""

    def take(self) -> bytes:
        found = b"".join(self._parts)
        self._parts.clear()
        self.size = 0
        return found


async def _archive(ctx: Context, exports: Exports, user: str, profile: Value) -> AsyncGenerator[bytes, None]:
    """The zip, chunk by chunk."""
    sources = {
        "devices.json": exports.devices(user),
        "keys.json": exports.keys(user),
        "prekeys.json": exports.prekeys(user),
        "contacts.json": exports.contacts(user),
        "conversations.json": exports.conversations(user),
        "searches.json": exports.searches(user),
        "reports.json": exports.reports(user),
        "waiting.json": exports.waiting(user),
        "received.json": exports.received(user),
        "sent.json": exports.sent(user),
        "audit.json": ctx.audit.entries_of(user),
    }
    moment = time.gmtime(wall_seconds())
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[call-overload]
        archive.writestr(_entry(_README, moment), _readme(user, moment))
        archive.writestr(_entry("profile.json", moment), _json(profile, indent=2))
        for name, source in sources.items():
            # Nobody knows how long it will be: the form of long files is right for any.
            with archive.open(_entry(name, moment), "w", force_zip64=True) as file:
                first = True
                async for value in source:
                    file.write(f"{'[' if first else ','}\n{_json(value)}".encode())
                    first = False
                    if sink.size >= _CHUNK:
                        yield sink.take()
                file.write(b"[]\n" if first else b"\n]\n")
    yield sink.take()


def _json(value: Value, *, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def _entry(name: str, moment: time.struct_time) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(f"relay-export/{name}", moment[:6])
    found.compress_type = zipfile.ZIP_DEFLATED
    found.external_attr = 0o600 << 16
    return found


def _readme(user: str, moment: time.struct_time) -> str:
    lines = [f"{name:<20}{text}\n" for name, text in _FILES.items()]
    return _INTRODUCTION.format(user=user, moment=time.strftime("%Y-%m-%d %H:%M UTC", moment)) + "".join(
        lines
    )


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "GET",
        "/v1/me/export",
        export,
        "Everything kept about you, as a zip of JSON files",
        "people",
        {200: None},
        errors=("bad_request", "not_found", "rate_limited"),
        media_type="application/zip",
    ),
    Route(
        "DELETE",
        "/v1/me",
        erase,
        "Erase your account and everything in it",
        "people",
        {200: DoneAnswer},
        errors=("bad_request",),
    ),
)
