"""Whom people know and whom they block.

What ``owner`` keeps of ``user`` is one document. A change reads it, decides, and writes on the condition that it is still
the one that was read: repeated, raced or interrupted, no change is half done and none is lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models.contacts import Contact
from models.conversations import Conversation
from relay.store.accounts import milliseconds
from relay.store.mongo import DuplicateKeyError
from relay.store.people import later_than
from relay.store.reports import Reports
from relay.store.searching import END_OF_KEYS, fold
from relay.wire.cursor import text_cursor_at, text_place_of
from relay.wire.errors import RelayError
from relay.wire.limits import Limit

_ATTEMPTS: Final = 20
_SCAN: Final = 1000
_SCANS: Final = 10

Online = Callable[[Sequence[str]], Awaitable[set[str]]]
_Decision = Callable[[Mapping[str, Any] | None], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """What somebody keeps of ``user``. ``name`` is the owner's own name for them; ``created_at``, and ``blocked_at`` of who is
    blocked, in milliseconds."""

    user: str
    name: str | None
    listed: bool
    blocked: bool
    created_at: int
    blocked_at: int | None = None


class Contacts:
    """The ``contacts`` collection; ``reports`` are the complaints beside it. At most ``most`` people are listed by one
    person, and as many blocked (some more when that person adds several at the same moment)."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self.reports: Final = Reports()

    async def entry(self, owner: str, user: str) -> Entry | None:
        """What ``owner`` keeps of ``user``, also when neither listed nor blocked any more; None when nothing."""
        document = await Contact.get_motor_collection().find_one({"_id": _id(owner, user)})
        return None if document is None else _entry(document)

    async def add(self, owner: str, user: str, *, name: str | None, shown: str) -> tuple[Entry, bool]:
        """Lists ``user``, and names them when ``name`` is given; ``shown`` sorts who has no own name. The second value says
        whether they were not listed before. Raises RelayError ``too_large`` when the list is full."""
        new = True

        def decide(before: Mapping[str, Any] | None) -> dict[str, Any] | None:
            nonlocal new
            new = before is None or not before.get("listed")
            own = name if name is not None else (before or {}).get("name")
            if before is not None and not new and own == before.get("name"):
                return None
            return {"listed": True, "name": own, "sortKey": fold(own or shown) or user}

        found = await self.entry(owner, user)
        if found is None or not found.listed:
            await self._check_room(owner, "listed")
        document = await self._change(owner, user, decide)
        return _entry(document), new

    async def change(
        self, owner: str, user: str, *, blocked: bool | None, named: bool, name: str | None, shown: str
    ) -> Entry:
        """Blocks or unblocks ``user``, listed or not (``blocked`` None: as they are), and sets or clears the own name when
        ``named``; both or neither. Raises RelayError ``not_found`` when there is nobody to unblock or name, and
        ``too_large`` when too many are blocked."""

        def decide(before: Mapping[str, Any] | None) -> dict[str, Any] | None:
            stored = before or {}
            kept = bool(stored.get("listed") or stored.get("blocked"))
            if not blocked and not kept:
                if before is None or blocked is None:
                    raise _absent()
                return None
            changes: dict[str, Any] = {}
            if blocked is not None and bool(stored.get("blocked")) != blocked:
                changes["blocked"] = blocked
            if named and stored.get("name") != name:
                changes |= {"name": name, "sortKey": fold(name or shown) or user}
            return changes or None

        if blocked:
            found = await self.entry(owner, user)
            if found is None or not found.blocked:
                await self._check_room(owner, "blocked")
        return _entry(await self._change(owner, user, decide))

    async def remove(self, owner: str, user: str) -> None:
        """Takes ``user`` off the list; who is blocked stays so. Raises RelayError ``not_found`` when not listed."""

        def decide(before: Mapping[str, Any] | None) -> dict[str, Any] | None:
            if before is None or not before.get("listed"):
                raise _absent()
            return {"listed": False}

        await self._change(owner, user, decide)

    async def page(
        self, owner: str, *, limit: int, cursor: str | None, q: str | None = None
    ) -> tuple[list[Entry], str | None]:
        """A page of the list, sorted by name, and the cursor of the next; with ``q`` those whose name begins so. Raises
        RelayError ``bad_request`` for a cursor that is none."""
        base: dict[str, Any] = {"owner": owner, "listed": True}
        low = fold(q or "")
        bounds: dict[str, Any] = {"$lte": low + END_OF_KEYS} if low else {}
        query: dict[str, Any] = {**base, "sortKey": {"$gte": low, **bounds}} if low else base
        if cursor is not None:
            key, name = text_place_of(cursor)
            query = {
                "$or": [
                    {**base, "sortKey": key, "_id": {"$gt": name}},
                    {**base, "sortKey": {"$gt": key, **bounds}},
                ]
            }
        found = (
            await Contact.get_motor_collection()
            .find(query)
            .sort([("sortKey", 1), ("_id", 1)])
            .limit(limit + 1)
            .to_list(limit + 1)
        )
        last = found[limit - 1] if len(found) > limit else None
        return (
            [_entry(document) for document in found[:limit]],
            None if last is None else text_cursor_at(last["sortKey"], last["_id"]),
        )

    async def blocked_page(
        self, owner: str, *, limit: int, cursor: str | None
    ) -> tuple[list[Entry], str | None]:
        """A page of the blocked, by user id, and the cursor of the next. Raises RelayError ``bad_request``."""
        query: dict[str, Any] = {"owner": owner, "blocked": True}
        if cursor is not None:
            query["user"] = {"$gt": text_place_of(cursor)[0]}
        found = (
            await Contact.get_motor_collection()
            .find(query)
            # Left alone, MongoDB may read everybody's entries about the people whose ids follow.
            .hint("owner_blocked")
            .sort([("user", 1)])
            .limit(limit + 1)
            .to_list(limit + 1)
        )
        last = found[limit - 1] if len(found) > limit else None
        return (
            [_entry(document) for document in found[:limit]],
            None if last is None else text_cursor_at(last["user"], last["_id"]),
        )

    async def blocks_among(self, users: Iterable[str]) -> set[tuple[str, str]]:
        """Who of these people has blocked whom of them, as pairs ``(owner, blocked)``, with one query."""
        return await blocks_among(users)

    async def lists(self, owners: Iterable[str], user: str) -> set[str]:
        """Who of ``owners`` has ``user`` in their list, blocked or not, with one query."""
        cursor = Contact.get_motor_collection().find(
            {"_id": {"$in": [_id(owner, user) for owner in owners]}, "listed": True}, {"owner": 1}
        )
        return {row["owner"] async for row in cursor}

    async def blockers(self, owners: Iterable[str], user: str) -> set[str]:
        """Who of ``owners`` has blocked ``user``, with one query."""
        cursor = Contact.get_motor_collection().find(
            {"_id": {"$in": [_id(owner, user) for owner in owners]}, "blocked": True}, {"owner": 1}
        )
        return {row["owner"] async for row in cursor}

    async def online_page(
        self, owner: str, online: Online, *, limit: int, cursor: str | None
    ) -> tuple[list[str], str | None]:
        """A page of the listed people who are ``online`` and let ``owner`` see it: they have not blocked the owner, and list
        the owner or have a direct conversation with them. Reads at most ``_SCAN * _SCANS`` entries, so a page may be short,
        or empty, though more follows. Raises RelayError ``bad_request``."""
        found: list[tuple[str, dict[str, Any]]] = []
        after = None if cursor is None else text_place_of(cursor)
        for _ in range(_SCANS):
            rows = await _places(owner, after)
            here = await online([user for user, _ in rows])
            candidates = [user for user, _ in rows if user in here]
            visible = await self._visible(owner, candidates)
            for user, row in rows:
                after = (row["sortKey"], row["_id"])
                if user in visible:
                    found.append((user, row))
                    if len(found) > limit:
                        last = found[limit - 1][1]
                        return [one for one, _ in found[:limit]], text_cursor_at(last["sortKey"], last["_id"])
            if len(rows) < _SCAN:
                return [user for user, _ in found], None
        return [user for user, _ in found], None if after is None else text_cursor_at(*after)

    async def _visible(self, owner: str, candidates: list[str]) -> set[str]:
        if not candidates:
            return set()
        listing = await self.lists(candidates, owner)
        visible = listing - await self.blockers(listing, owner)
        rest = {
            "direct " + " ".join(sorted((owner, user))): user for user in candidates if user not in listing
        }
        if rest:
            cursor = Conversation.get_motor_collection().find(
                # The index holds strings only, and is used only for who says so.
                {"unique": {"$in": list(rest), "$type": "string"}},
                {"unique": 1},
            )
            talking = [rest[row["unique"]] async for row in cursor]
            visible |= set(talking) - await self.blockers(talking, owner)
        return visible

    async def _check_room(self, owner: str, field: str) -> None:
        held = await Contact.get_motor_collection().count_documents(
            {"owner": owner, field: True}, limit=self._most
        )
        if held >= self._most:
            raise RelayError(
                "too_large", f"a person has at most {self._most} {field} contacts", limit=Limit.CONTACTS
            )

    async def _change(self, owner: str, user: str, decide: _Decision) -> Mapping[str, Any]:
        """``decide`` gets the stored entry and returns what is to be other, or None."""
        contacts = Contact.get_motor_collection()
        for _ in range(_ATTEMPTS):
            before = await contacts.find_one({"_id": _id(owner, user)})
            changes = decide(before)
            if changes is None and before is not None:
                return dict(before)
            now = later_than(None if before is None else before["updatedAt"])
            blank = {
                "owner": owner,
                "user": user,
                "sortKey": "",
                "listed": False,
                "blocked": False,
                "createdAt": now,
            }
            after = {"_id": _id(owner, user), **blank, **(before or {}), **(changes or {}), "updatedAt": now}
            after.pop("removedAt", None)
            if not after["listed"] and not after["blocked"]:
                after["removedAt"] = now
            if after.get("name") is None:
                after.pop("name", None)
            if not after["blocked"]:
                after.pop("blockedAt", None)
            elif not (before or {}).get("blocked"):
                after["blockedAt"] = now
            if before is not None:
                guard = {"_id": after["_id"], "updatedAt": before["updatedAt"]}
                if (await contacts.replace_one(guard, after)).matched_count:
                    return after
                continue
            try:
                await contacts.insert_one(after)
            except DuplicateKeyError:
                continue
            return after
        raise RelayError("unavailable", "this contact is being changed; try again", retry_after=200)


async def blocks_among(users: Iterable[str]) -> set[tuple[str, str]]:
    """Who of these people has blocked whom of them, as pairs ``(owner, blocked)``, with one query."""
    wanted = list(users)
    if len(wanted) < 2:
        return set()
    cursor = (
        Contact.get_motor_collection()
        .find(
            {"owner": {"$in": wanted}, "blocked": True},
            {"_id": 0, "owner": 1, "user": 1},
        )
        # Left alone, MongoDB may read everybody's entries about these people.
        .hint("owner_blocked")
    )
    # Few have blocked anybody: reading all they blocked is less than looking for every pair.
    people = set(wanted)
    return {(row["owner"], row["user"]) async for row in cursor if row["user"] in people}


async def _places(owner: str, after: tuple[str, str] | None) -> list[tuple[str, dict[str, Any]]]:
    """The next entries of the list in its order, with the user of each; answered from the index alone."""
    base: dict[str, Any] = {"owner": owner, "listed": True}
    query = base
    if after is not None:
        key, name = after
        query = {"$or": [{**base, "sortKey": key, "_id": {"$gt": name}}, {**base, "sortKey": {"$gt": key}}]}
    cursor = (
        Contact.get_motor_collection()
        .find(query, {"sortKey": 1})
        .sort([("sortKey", 1), ("_id", 1)])
        .limit(_SCAN)
    )
    return [(row["_id"].partition(" ")[2], row) async for row in cursor]


def _id(owner: str, user: str) -> str:
    return f"{owner} {user}"


def _entry(document: Mapping[str, Any]) -> Entry:
    return Entry(
        user=document["user"],
        name=document.get("name"),
        listed=bool(document.get("listed")),
        blocked=bool(document.get("blocked")),
        created_at=milliseconds(document["createdAt"]),
        blocked_at=milliseconds(document["blockedAt"]) if document.get("blockedAt") else None,
    )


def _absent() -> RelayError:
    return RelayError("not_found", "no such contact")
