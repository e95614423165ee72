"""What every node's books hold, for all nodes to see: so that a sum over the nodes that live balances, whoever comes and goes.

A balance is counted in one place at a time: in its node's books while that lives, in its document when the node has left or
vanished, in the books of the one node that takes it. Taking goes in steps, each of which may be the last of a node that dies:
the document is claimed, then booked, then published as part of the taker's own balance (``took``), then removed. The taker's
document says how far it came, so that whoever takes that counts nothing twice.

Where this cannot be exact, what a vanished node counted since its last word, a recount is noted beforehand: whoever has the time
compares the books with what waits in the store.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pymongo import ReturnDocument

from models.housekeeping import Balance, Setting
from relay.store.mongo import DuplicateKeyError
from relay.store.place import this_place
from relay.wire.ids import new_id

_TURN: Final = "ledger opening"
_RECOUNT: Final = "ledger recount"
_MOST: Final = 1000
RECOUNT_LEASE_SECONDS: Final = 60.0
"""After so long another node may try."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a node publishes its books, and after how long without that it is taken for dead; in seconds."""

    beat: float = 2.0
    alive: float = 10.0


@dataclass(frozen=True, slots=True)
class Books:
    """What a node publishes. ``quiet``: nothing is under way that will be booked. ``took``: whose balances are in this one."""

    balance: int
    turnover: int
    quiet: bool
    took: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """Published books. ``silent`` is for how many seconds nothing was published, by MongoDB's clock."""

    id: str
    books: Books
    beats: int
    silent: float
    place: str
    left: bool
    taken_by: str | None


class Balances:
    """The collection. Every method raises PyMongoError."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.place = this_place()
        self._silent: Mapping[str, Any] = {"$subtract": ["$$NOW", "$at"]}
        self._dead: Mapping[str, Any] = {"$gte": [self._silent, int(pace.alive * 1000)]}

    async def enter(self, account: str, books: Books) -> None:
        """Makes an account; may be called again when its outcome was unknown."""
        await Balance.get_motor_collection().update_one(
            {"_id": account},
            {
                "$setOnInsert": {**_fields(books), "place": self.place, "beats": 0},
                "$currentDate": {"at": True},
            },
            upsert=True,
        )

    async def publish(self, account: str, books: Books, *, left: bool = False) -> bool:
        """Says what the books hold; with ``left`` for the last time: another node takes it. False when this account was taken
        for that of a dead node."""
        found = await Balance.get_motor_collection().update_one(
            {"_id": account, "takenBy": None, "left": None},
            {
                "$set": {**_fields(books), **({"left": True} if left else {})},
                "$inc": {"beats": 1},
                "$currentDate": {"at": True},
            },
        )
        return bool(found.matched_count)

    async def all(self) -> list[Account]:
        """Every account: of nodes that live, and what others have left."""
        shown = {**dict.fromkeys(Balance.model_fields.keys() - {"id"}, 1), "silent": self._silent}
        cursor = Balance.get_motor_collection().find({}, shown).limit(_MOST)
        return [_account(row) async for row in cursor]

    async def any_remains(self) -> bool:
        """Whether there is an account of a node that has left or is dead."""
        query = {"$or": [{"left": True}, {"takenBy": {"$ne": None}}, {"$expr": self._dead}]}
        return await Balance.get_motor_collection().find_one(query, {"_id": 1}) is not None

    async def claim(self, seen: Account, by: str) -> Account | None:
        """Claims an account, as it was seen, of a node that has left or is dead; None when that has changed. From then on nothing
        but its taker changes it."""
        query = {
            "_id": seen.id,
            "takenBy": seen.taken_by,
            **({"left": True} if seen.left else {"$expr": self._dead}),
        }
        found = await Balance.get_motor_collection().find_one_and_update(
            query, {"$set": {"takenBy": by}}, return_document=ReturnDocument.AFTER
        )
        return None if found is None else _account({**found, "silent": 0})

    async def forget(self, accounts: Collection[str]) -> None:
        """Removes accounts whose balances are elsewhere now."""
        if accounts:
            await Balance.get_motor_collection().delete_many({"_id": {"$in": list(accounts)}})

    # -- one node opens at a time ----------------------------------------------------------------------------------------

    async def take_turn(self, by: str, gone: str | None = None) -> tuple[str, str]:
        """Who opens its books now, and that one's place: ``by``, unless another does and lives and is not ``gone``. Call it again
        and again to keep the turn."""
        holder = {"$ifNull": ["$value.by", by]}
        free = {
            "$or": [
                {"$in": [holder, [by, gone]]},
                {"$gte": [{"$subtract": ["$$NOW", "$value.at"]}, int(self.pace.alive * 1000)]},
            ]
        }
        own = {"by": by, "place": {"$literal": self.place}, "at": "$$NOW"}
        while True:
            try:
                found = await Setting.get_motor_collection().find_one_and_update(
                    {"_id": _TURN},
                    [{"$set": {"value": {"$cond": [free, own, "$value"]}}}],
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            except DuplicateKeyError:
                continue  # two made it at once
            return found["value"]["by"], found["value"]["place"]

    async def end_turn(self, by: str) -> bool:
        """The books are open. False when the turn was lost meanwhile."""
        found = await Setting.get_motor_collection().delete_one({"_id": _TURN, "value.by": by})
        return bool(found.deleted_count)

    async def is_opening(self) -> bool:
        """Whether a node opens its books now."""
        fresh = {"$lt": [{"$subtract": ["$$NOW", "$value.at"]}, int(self.pace.alive * 1000)]}
        query = {"_id": _TURN, "$expr": fresh}
        return await Setting.get_motor_collection().find_one(query, {"_id": 1}) is not None

    # -- recounts --------------------------------------------------------------------------------------------------------

    async def note_recount(self) -> None:
        """A recount is due, whatever becomes of this node, and of any recount that has begun."""
        while True:
            try:
                await Setting.get_motor_collection().update_one(
                    {"_id": _RECOUNT}, {"$set": {"value.token": new_id()}}, upsert=True
                )
            except DuplicateKeyError:
                continue  # two made it at once
            return

    async def recount_due(self) -> str | None:
        """The token of the recount that is due."""
        found = await Setting.get_motor_collection().find_one({"_id": _RECOUNT})
        return None if found is None else str(found["value"]["token"])

    async def claim_recount(self, by: str, token: str) -> bool:
        """Whether this node may do it, for ``RECOUNT_LEASE_SECONDS``."""
        over = {"$gte": [{"$subtract": ["$$NOW", "$value.at"]}, int(RECOUNT_LEASE_SECONDS * 1000)]}
        found = await Setting.get_motor_collection().update_one(
            {
                "_id": _RECOUNT,
                "value.token": token,
                "$or": [{"value.by": None}, {"value.by": by}, {"$expr": over}],
            },
            {"$set": {"value.by": by}, "$currentDate": {"value.at": True}},
        )
        return bool(found.matched_count)

    async def end_recount(self, by: str, token: str | None) -> None:
        """It is done (``token``: of what was due when it began), or given up (None)."""
        settings = Setting.get_motor_collection()
        if token is not None:
            await settings.delete_one({"_id": _RECOUNT, "value.token": token})
        await settings.update_one({"_id": _RECOUNT, "value.by": by}, {"$unset": {"value.by": ""}})


def _fields(books: Books) -> dict[str, Any]:
    return {
        "balance": books.balance,
        "turnover": books.turnover,
        "quiet": books.quiet,
        "took": list(books.took),
    }


def _account(row: Mapping[str, Any]) -> Account:
    return Account(
        id=row["_id"],
        books=Books(row["balance"], row["turnover"], row["quiet"], row["took"]),
        beats=row["beats"],
        silent=row["silent"] / 1000,
        place=row["place"],
        left=row.get("left", False),
        taken_by=row.get("takenBy"),
    )
