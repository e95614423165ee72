"""One HTTP exchange with the relay: JSON there, JSON back, everything that can go wrong as ``RequestFailed``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import ClientSession

from relay.client.errors import RequestFailed


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. ``body`` is None when it is no JSON; ``retry_after`` is in milliseconds."""

    status: int
    body: Any
    retry_after: int | None


async def exchange(
    session: ClientSession, method: str, url: str, path: str, body: object = None, *, token: str | None = None
) -> Reply:
    """Asks the relay at ``url``. Raises RequestFailed ``unreachable`` when no answer came."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        # What follows a redirect would carry the token, or a password, to somebody else.
        async with session.request(
            method, url + path, json=body, headers=headers, allow_redirects=False
        ) as response:
            wish = response.headers.get("Retry-After", "")
            text = await response.text()
            try:
                answer = await response.json(content_type=None) if text else None
            except ValueError:
                answer = None
            return Reply(response.status, answer, int(wish) * 1000 if wish.isdecimal() else None)
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:
        raise RequestFailed(0, "unreachable", f"cannot reach the relay at {url}: {why(error)}") from error


def accepted(reply: Reply, what: str) -> Any:
    """The body of a reply that is no error. Raises RequestFailed with the relay's own words; ``what`` names the request where
    it has none."""
    if reply.status < 300:
        return reply.body
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    told: Mapping[str, Any] = error if isinstance(error, dict) else {}
    text = str(told.get("message", f"{what} was answered with status {reply.status}"))
    raise RequestFailed(reply.status, str(told.get("code", "internal")), text, retry_after=reply.retry_after)


def why(error: BaseException) -> str:
    """One line about an error of a library."""
    return str(error) or type(error).__name__
