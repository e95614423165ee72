"""What makes the audit trail a chain: how an entry is sealed, and how one is checked. No database here.

An entry's hash is a keyed hash of everything in it but the personal values, together with the hash of the entry before.
Personal values take part as salted hashes, so that a value and its salt can be dropped and the chain still holds.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from relay.security.pseudonyms import Pseudonyms
from relay.store.accounts import milliseconds

BEGINNING: Final = "0" * 64
"""What stands for the hash of the entry before the first."""
HEAD: Final = "head"
NOBODY: Final = "$nobody"
"""Who an act is noted for that nobody has proven to be the author of."""
ERASE: Final = "me.erase"
"""The act that lets personal values of its actor be missing."""
_MOST_CHARACTERS: Final = 256
_OUTSIDE: Final = ("_id", "hash", "personal")
# The hash takes these for what JSON makes of them: a date that became a number has the same one.
_KINDS: Final[Mapping[str, type]] = {
    "at": datetime,
    "act": str,
    "actorKey": str,
    "details": Mapping,
    "hashes": Mapping,
    "previous": str,
}
_DETAILS: Final = (str, int, bool)


@dataclass(frozen=True, slots=True)
class End:
    """Where the chain ends: the number and the hash of its last entry."""

    entry: int
    hash: str


NOTHING: Final = End(0, BEGINNING)


def act_fields(
    pseudonyms: Pseudonyms,
    act: str,
    at: datetime,
    *,
    actor: str,
    target: str | None,
    address: str,
    agent: str,
    device: str | None,
    details: Mapping[str, str | int | bool],
) -> dict[str, Any]:
    """An entry without its place in the chain. ``at`` counts in whole milliseconds, as it will be stored."""
    values = {"actor": actor, "target": target, "address": address, "agent": agent, "device": device}
    personal = {name: _personal(value) for name, value in values.items() if value}
    fields: dict[str, Any] = {
        "at": at.replace(microsecond=at.microsecond // 1000 * 1000),
        "act": act,
        "actorKey": pseudonyms.of(actor),
        "details": dict(details),
        "hashes": {name: salted(found["value"], found["salt"]) for name, found in personal.items()},
        "personal": personal,
    }
    if target is not None:
        fields["targetKey"] = pseudonyms.of(target)
    return fields


def _personal(value: str) -> dict[str, str]:
    # What a header brought may hold half a character, which BSON refuses.
    text = value[:_MOST_CHARACTERS].encode(errors="replace").decode()
    return {"value": text, "salt": secrets.token_hex(16)}


def salted(value: str, salt: str) -> str:
    """The hash that stands for a personal value. The salt has 128 bits: without it nobody can try values."""
    return hashlib.sha256(f"{salt}{value}".encode()).hexdigest()


def linked(pseudonyms: Pseudonyms, fields: Mapping[str, Any], end: End) -> dict[str, Any]:
    """The entry that follows ``end``."""
    entry = {"_id": end.entry + 1, **fields, "previous": end.hash}
    return {**entry, "hash": seal(pseudonyms, entry)}


def seal(pseudonyms: Pseudonyms, entry: Mapping[str, Any]) -> str:
    """The hash of an entry, as its other fields have it."""
    sealed = {name: value for name, value in entry.items() if name not in _OUTSIDE}
    sealed["id"] = entry["_id"]
    return pseudonyms.seal(json.dumps(sealed, sort_keys=True, separators=(",", ":"), default=_as_json))


def _as_json(value: Any) -> Any:
    # Of what JSON does not know only dates belong into an entry; anything else was put there by somebody else.
    return milliseconds(value) if isinstance(value, datetime) else f"{type(value).__name__} {value!r}"


def head_fields(pseudonyms: Pseudonyms, end: End) -> dict[str, Any]:
    """The head document's fields for a chain that ends so."""
    return {
        "entry": end.entry,
        "hash": end.hash,
        "mac": pseudonyms.seal(f"{HEAD} {end.entry} {end.hash}"),
    }


def end_of(pseudonyms: Pseudonyms, head: Mapping[str, Any]) -> End | None:
    """Where a head document says that the chain ends; None when it was not written with this key."""
    entry, found = head.get("entry"), head.get("hash")
    if not isinstance(entry, int) or not isinstance(found, str):
        return None
    end = End(entry, found)
    return end if head.get("mac") == head_fields(pseudonyms, end)["mac"] else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of reading the whole chain.

    ``entries`` were read and hold, ``erased`` of them without a personal value that they once had. ``end`` is the last of
    them: note it down, and a later chain must still contain it. ``problem`` is one line about the first thing that is
    wrong, at entry number ``bad`` (None when it is none of one entry); both are None when nothing is.
    """

    entries: int
    erased: int
    end: End
    problem: str | None = None
    bad: int | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None


class Reading:
    """Checks entries in the order of their numbers. ``pins`` are ends that the chain must pass through."""

    def __init__(self, pseudonyms: Pseudonyms, pins: Mapping[int, Sequence[tuple[str, str]]]) -> None:
        self._pseudonyms = pseudonyms
        self._pins = pins
        self._nobody = pseudonyms.of(NOBODY)
        self._erased: set[str] = set()
        self._without: dict[str, tuple[int, str]] = {}
        self.end = NOTHING
        self.erased = 0

    def take(self, entry: Mapping[str, Any]) -> str | None:
        """The next entry; what is wrong with it, if anything is."""
        number, wanted = entry["_id"], self.end.entry + 1
        if not isinstance(number, int) or number < wanted:
            return f"entry {number!r} is none of the relay's: somebody inserted it"
        if number > wanted:
            return missing(wanted, number - 1)
        found = entry.get("hash")
        if found != seal(self._pseudonyms, entry):
            return f"entry {number} was edited"
        if (kind := _wrong_kind(entry)) is not None:
            return f"entry {number} was edited: its {kind} is of another kind than was recorded"
        if entry.get("previous") != self.end.hash:
            return f"entry {number} does not follow entry {number - 1}, which was replaced or put in another place"
        wrong = self._wrong_value(entry)
        if wrong is not None:
            return f"entry {number} was edited: its {wrong} is not the one that was recorded"
        if entry["act"] == ERASE and entry.get("targetKey") == entry["actorKey"]:
            self._erased.add(entry["actorKey"])
        self.end = End(number, str(found))
        for pinned, whose in self._pins.get(number, ()):
            if pinned != found:
                return f"entry {number} is not the one that {whose}"
        return None

    def dropped(self) -> tuple[int, str] | None:
        """When all is read: the first entry without a personal value though nobody asked to be erased whose it is, and the
        line about it."""
        found = [place for key, place in self._without.items() if key not in self._erased]
        if not found:
            return None
        number, name = min(found)
        return (
            number,
            f"entry {number} was edited: its {name} is gone, and the person it is about was never erased",
        )

    def _wrong_value(self, entry: Mapping[str, Any]) -> str | None:
        hashes, personal = entry["hashes"], entry.get("personal", {})
        if not isinstance(personal, Mapping):
            return "personal part"
        for name, found in personal.items():
            value, salt = (
                (found.get("value"), found.get("salt")) if isinstance(found, Mapping) else (None, None)
            )
            if type(value) is not str or type(salt) is not str or set(found) != {"value", "salt"}:
                return str(name)
            if salted(value, salt) != hashes.get(name):
                return str(name)
        for name in hashes.keys() - personal.keys():
            whose = self._whose(entry, name)
            if whose is None:
                return str(name)
            # The erasure comes later in the trail, or came before: what a person leaves on their way out is noted, too.
            if whose not in self._erased:
                self._without.setdefault(whose, (entry["_id"], str(name)))
        self.erased += len(personal) < len(hashes)
        return None

    def _whose(self, entry: Mapping[str, Any], name: str) -> str | None:
        """Whose erasure takes this value: their pseudonym."""
        of_target = name in ("target", "device") or (name != "actor" and entry["actorKey"] == self._nobody)
        found = entry.get("targetKey") if of_target else entry["actorKey"]
        return found if isinstance(found, str) else None


def _wrong_kind(entry: Mapping[str, Any]) -> str | None:
    """Which field is of another kind than the relay writes."""
    for name, kind in _KINDS.items():
        if not isinstance(entry.get(name), kind):
            return name
    if "targetKey" in entry and not isinstance(entry["targetKey"], str):
        return "targetKey"
    return next((str(name) for name, value in entry["details"].items() if type(value) not in _DETAILS), None)


def missing(first: int, last: int) -> str:
    """The line about entries that are not there."""
    return f"entry {first} is missing" if first == last else f"entries {first} to {last} are missing"
