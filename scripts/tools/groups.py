"""Groups as scripts/chat meets them: the one that certain people have already, and what a group is called."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final
from urllib.parse import quote

from relay.client import DeviceError
from scripts.tools.names import Request

_PAGE: Final = 200
_PAGES: Final = 10
_PATIENCE_SECONDS: Final = 5.0
_MOST: Final = 1000


async def meet(
    request: Callable[..., Awaitable[Any]], people: Collection[str], body: Mapping[str, object]
) -> str:
    """The group that these people have, made by this request when there is none: the same people are the same group, whoever
    of them comes first. Raises RequestFailed."""
    known = await group_of(request, people)
    if known is None:
        made = str((await request("POST", "/v1/conversations", body))["id"])
        # Somebody else may have made it in the same moment: then all go to the older one.
        known = await group_of(request, people) or made
    return known


async def group_of(request: Request, people: Collection[str]) -> str | None:
    """The oldest group of exactly these people, oneself among them; None when there is none among one's latest 2,000
    conversations. Everybody finds the same one. Raises RequestFailed."""
    wanted = set(people)
    found: list[tuple[int, str]] = []
    cursor = ""
    for _ in range(_PAGES):
        page = await request("GET", f"/v1/conversations?limit={_PAGE}{cursor}")
        for item in page["items"]:
            members = {member["user"] for member in item["members"]}
            if item["type"] == "group" and members == wanted and item["memberCount"] == len(wanted):
                found.append((item["createdAt"], item["id"]))
        if page["next"] is None:
            break
        cursor = f"&cursor={quote(page['next'], safe='')}"
    return min(found)[1] if found else None


class Titles:
    """What groups were called when last asked, a bounded number of them."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._known: OrderedDict[str, str] = OrderedDict()

    async def learn(self, conv: str) -> tuple[str | None, str | None]:
        """Asks what a group is called now: that, and what it was called before; None where it is not known. Never
        raises."""
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                found = await self._request("GET", f"/v1/conversations/{quote(conv, safe='')}")
        except (DeviceError, TimeoutError, OSError):
            return None, None
        now, before = found.get("name"), self._known.get(conv)
        if not isinstance(now, str):
            return None, before
        self._known[conv] = now
        self._known.move_to_end(conv)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return now, before
