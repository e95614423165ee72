"""What people are called, for scripts/chat: asked of the relay when needed, remembered while the program runs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import quote

from relay.client import DeviceError, RequestFailed
from relay.wire import ids

Request = Callable[[str, str], Awaitable[Any]]
"""An HTTP request with the device's token: method and path to parsed answer. Raises RequestFailed."""

_USERNAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{2,31}")
_RELAY_MADE_ID: Final = re.compile(r"[0-9a-f]{32}")
_PAGES: Final = 20
_PATIENCE_SECONDS: Final = 5.0
_ASK_AGAIN_SECONDS: Final = 60.0
_MOST: Final = 10_000


class Unknown(Exception):
    """Nobody is called so; ``str()`` is the line for people."""


class Names:
    """Display names by user id; the id itself for who has none. Two people of one name are told apart by their ids."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._names: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        self._unknown_until: dict[str, float] = {}

    async def of(self, conv: str, users: Sequence[str]) -> dict[str, str]:
        """The names of people met in a conversation. Never raises: without an answer in time they are their ids."""
        missing = self._missing(users)
        if missing:
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await self._ask(conv, missing)
            except (DeviceError, TimeoutError, OSError):
                pass
            again = time.monotonic() + _ASK_AGAIN_SECONDS
            self._unknown_until.update((user, again) for user in self._missing(missing))
        return {user: self._names.get(user, user) for user in users}

    def _missing(self, users: Sequence[str]) -> list[str]:
        if len(self._names) + len(self._unknown_until) > _MOST:
            self._names.clear()
            self._owners.clear()
            self._unknown_until.clear()
        now = time.monotonic()
        return [
            user
            for user in dict.fromkeys(users)
            if user not in self._names and user != ids.RELAY_USER and self._unknown_until.get(user, 0) <= now
        ]

    async def _ask(self, conv: str, missing: Sequence[str]) -> None:
        found = await _or_nothing(self._request, f"/v1/conversations/{quote(conv, safe='')}")
        for member in found.get("members", ()):
            self._learn(member.get("user"), member.get("name"))
        for user in self._missing(missing):
            profile = await _or_nothing(self._request, f"/v1/users/{quote(user, safe='')}")
            self._learn(user, profile.get("name") or profile.get("username"))

    def _learn(self, user: object, name: object) -> None:
        if isinstance(user, str) and isinstance(name, str) and name.strip():
            owner = self._owners.setdefault(name, user)
            self._names[user] = name if owner == user else f"{name} ({user[:8]})"


async def find_user(request: Request, who: str) -> str:
    """The id of the person with this user name or id. Raises Unknown, RequestFailed."""
    # Somebody could take another's id as user name; and a user name is what is meant by whatever looks like one.
    ways = [_by_id, _by_username] if _RELAY_MADE_ID.fullmatch(who) else [_by_username, _by_id]
    for way in ways:
        found = await way(request, who)
        if found is not None:
            return found
    raise Unknown(f"nobody is called {who} here, or they do not want to be found: ask them for their user id")


async def _by_username(request: Request, who: str) -> str | None:
    username = who.lower()
    if not _USERNAME.fullmatch(username):
        return None
    path = f"/v1/users?q={quote(username, safe='')}"
    cursor = ""
    for _ in range(_PAGES):
        page = await request("GET", path + cursor)
        for item in page["items"]:
            if item["username"] == username:
                return str(item["id"])
        if page["next"] is None:
            return None
        cursor = f"&cursor={quote(page['next'], safe='')}"
    return None


async def _by_id(request: Request, who: str) -> str | None:
    if not ids.USER_ID.fullmatch(who):
        return None
    found = await _or_nothing(request, f"/v1/users/{quote(who, safe='')}")
    return None if found.get("id") is None else str(found["id"])


async def _or_nothing(request: Request, path: str) -> dict[str, Any]:
    try:
        found = await request("GET", path)
    except RequestFailed as error:
        if error.status in (400, 404):
            return {}
        raise
    return found if isinstance(found, dict) else {}
