"""The access token that a device uses now: asked for when there is none, when it was refused, and before it expires."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol, runtime_checkable

from aiohttp import ClientWebSocketResponse

from relay.client.errors import DeviceError, RequestFailed
from relay.wire import codec

Token = Callable[[], str | Awaitable[str]]
"""Gives an access token. It is asked again when the relay refused one, and before one expires."""

_AHEAD_SECONDS: Final = 45.0
_SHORTEST_SECONDS: Final = 0.5
_LOG: Final = logging.getLogger(__name__)


@runtime_checkable
class TokenSource(Protocol):
    """A ``Token`` that keeps tokens itself (relay.client.Session): it is asked every time, and told of refusals."""

    def __call__(self) -> Awaitable[str]:
        """A token that is good for a while."""
        ...

    def refused(self, token: str) -> None:
        """The relay refused this token; it must not be given again."""
        ...


class Tokens:
    """What all connections and requests of one device share."""

    def __init__(self, give: Token) -> None:
        self._give = give
        self._source = give if isinstance(give, TokenSource) else None
        self._held: str | None = None

    async def current(self) -> str:
        """The token to use now. Raises what the application's callback raises."""
        if self._held is None or self._source is not None:
            self._held = await self._ask()
        return self._held

    def refused(self) -> None:
        """The relay refused the current token: the next one is asked for."""
        if self._held is not None and self._source is not None:
            self._source.refused(self._held)
        self._held = None

    async def keep(self, socket: ClientWebSocketResponse, token: str, welcome: Mapping[str, Any]) -> None:
        """Renews the token of a connection in place for as long as it lives. Returns when ``token`` does not say when it
        expires, or nothing newer is to be had: then the relay closes the connection."""
        now = asyncio.get_running_loop().time
        told = welcome.get("time")
        # Expiry is judged by the relay's clock; this machine's may be wrong.
        offset = (told / 1000 if type(told) is int else time.time()) - now()
        while (expires := expiry(token)) is not None:
            left = expires - offset - now()
            if left <= 0:
                return
            await asyncio.sleep(max(_SHORTEST_SECONDS, left - min(_AHEAD_SECONDS, left / 3)))
            try:
                fresh = await self._ask()
            except DeviceError as error:
                if isinstance(error, RequestFailed) and error.retry:
                    continue
                return  # the next connection asks again, and stops the device with it
            except Exception as error:  # noqa: BLE001 - the application's token callback may fail in any way
                _LOG.warning("no token: %s", type(error).__name__)
                continue
            if fresh == token:
                continue
            self._held = token = fresh
            try:
                await socket.send_str(codec.dumps({"t": "auth", "token": fresh}))
            except ConnectionError:
                return

    async def _ask(self) -> str:
        given = self._give()
        return await given if inspect.isawaitable(given) else given


def expiry(token: str) -> float | None:
    """When a JWT expires, in seconds since the epoch; None when this is none or does not say."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    found = claims.get("exp") if isinstance(claims, dict) else None
    return float(found) if isinstance(found, int | float) else None
