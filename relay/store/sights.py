"""Who may see whether somebody is online: their contacts and those who share a conversation with them.

Asked for many pairs at once; the number of queries does not grow with the number of people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models.accounts import User
from models.contacts import Contact
from models.conversations import Conversation, Membership
from relay.store.accounts import is_barred, milliseconds
from relay.store.mongo import time_limit

_PAGE: Final = 5000
_ROWS: Final = 20_000
_LOOKED: Final = 200_000

Pair = tuple[str, str]
"""Who looks, and at whom."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Somebody's presence may be seen: as it is, or when ``blocked`` as it was at that moment (``blocked_at``, ms): were it
    hidden all at once, who was blocked would notice."""

    blocked: bool = False
    blocked_at: int | None = None


_OPEN: Final = Sight()


class Sights:
    """Reads who may see whom. ``timeout`` (s) is the time limit of one answer."""

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout

    async def of(self, pairs: Collection[Pair]) -> dict[Pair, Sight]:
        """How each may see the other; absent: not at all. Of those who share only a conversation 20,000 memberships are
        looked at, of one person those that changed last."""
        with time_limit(self._timeout):
            present = await _present({user for _, user in pairs})
            wanted = [pair for pair in pairs if pair[1] in present]
            entries = await _entries([pair for pair in wanted if pair[0] != pair[1]])
            listed = {pair for pair in wanted if pair[0] == pair[1] or entries.get(pair, {}).get("listed")}
            rest = {pair for pair in wanted if pair not in listed}
            rest -= (talking := await _talking(rest))
            sharing = await _sharing(rest)
        return {pair: _sight(entries.get(pair)) for pair in listed | talking | sharing}


def _sight(entry: Mapping[str, Any] | None) -> Sight:
    if entry is None or not entry.get("blocked"):
        return _OPEN
    moment = entry.get("blockedAt")
    return Sight(True, None if moment is None else milliseconds(moment))


async def _present(users: Collection[str]) -> set[str]:
    cursor = User.get_motor_collection().find(
        {"_id": {"$in": list(users)}}, {"suspendedAt": 1, "erasingAt": 1}
    )
    return {row["_id"] async for row in cursor if not is_barred(row)}


async def _entries(pairs: Sequence[Pair]) -> dict[Pair, Mapping[str, Any]]:
    """What those who are looked at keep of those who look."""
    found: dict[Pair, Mapping[str, Any]] = {}
    fields = {"owner": 1, "user": 1, "listed": 1, "blocked": 1, "blockedAt": 1}
    for start in range(0, len(pairs), _PAGE):
        ids = [f"{user} {viewer}" for viewer, user in pairs[start : start + _PAGE]]
        async for row in Contact.get_motor_collection().find({"_id": {"$in": ids}}, fields):
            found[row["user"], row["owner"]] = row
    return found


async def _talking(pairs: Collection[Pair]) -> set[Pair]:
    """Those that have a direct conversation."""
    names: dict[str, list[Pair]] = {}
    for pair in pairs:
        names.setdefault("direct " + " ".join(sorted(pair)), []).append(pair)
    wanted = list(names)
    found: set[Pair] = set()
    for start in range(0, len(wanted), _PAGE):
        # The index holds strings only, and is used only for who says so.
        query = {"unique": {"$in": wanted[start : start + _PAGE], "$type": "string"}}
        async for row in Conversation.get_motor_collection().find(query, {"unique": 1}):
            found.update(names[row["unique"]])
    return found


async def _sharing(pairs: Collection[Pair]) -> set[Pair]:
    """Those that are members of one conversation, found from the side of which there are fewer."""
    if not pairs:
        return set()
    side = 0 if len({one for one, _ in pairs}) <= len({one for _, one in pairs}) else 1
    others: dict[str, set[str]] = {}
    for pair in pairs:
        others.setdefault(pair[side], set()).add(pair[1 - side])
    found: set[Pair] = set()
    asked: dict[str, list[Pair]] = {}
    looked = 0
    query = {"user": {"$in": list(others)}, "removedAt": None}
    rows = Membership.get_motor_collection().find(query, {"conversationId": 1, "user": 1})
    if len(others) == 1:
        # Of several the index does not tell whose changed last, and sorting would read them all.
        rows = rows.sort([("updatedAt", -1), ("_id", 1)])
    rows = rows.limit(_ROWS)
    async for row in rows:
        for other in others[row["user"]]:
            pair = (row["user"], other) if side == 0 else (other, row["user"])
            asked.setdefault(f"{row['conversationId']} {other}", []).append(pair)
            looked += 1
        if len(asked) >= _PAGE:
            found |= await _members(asked)
            asked = {}
            for pair in found:
                others[pair[side]].discard(pair[1 - side])
        if looked >= _LOOKED:
            break
    return found | await _members(asked)


async def _members(asked: Mapping[str, list[Pair]]) -> set[Pair]:
    if not asked:
        return set()
    cursor = Membership.get_motor_collection().find(
        {"_id": {"$in": list(asked)}, "removedAt": None}, {"_id": 1}
    )
    return {pair async for row in cursor for pair in asked[row["_id"]]}
