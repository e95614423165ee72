"""The plan of one group of endings, as pure code: from what is asked and what is stored to what is written and told.

Because ``awaiting`` only ever shrinks, a message whose remaining recipients are all settled now can be deleted outright,
whatever happens meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bson.datetime_ms import DatetimeMS
from pymongo import UpdateOne

from models.messages import FateEntry
from relay.store.endings import Ack, Acknowledged, Ending, Release, Removal, Settlement, Sole
from relay.store.ledger import OUTCOMES, Fate, Outcome
from relay.wire import ids


class Expectation(NamedTuple):
    """What becomes of one delivery; ``told`` is for the router, where a device acknowledged."""

    outcome: Outcome
    told: Acknowledged | None


class Strayed(NamedTuple):
    """A device, by its mailboxes, and the heads, by document id, of messages that may wait for it in a part."""

    mailboxes: tuple[str, str]
    heads: dict[str, Mapping[str, Any]]


def _never(_: str) -> bool:
    return False


class EndingGroup:
    """The plan for one group: what to read, update and delete, and what to tell afterwards.

    ``look`` says of which messages nothing is taken for granted: they are read before they are deleted. What is planned while
    ``exact`` is written only where exactly that still waits.
    """

    def __init__(self, batch: Sequence[Ending], look: Callable[[str], bool] = _never) -> None:
        self.sole: dict[str, tuple[Sole, Ack]] = {}
        self.read: dict[str, None] = {}
        self.final: dict[str, int] = {}
        self.final_entries: list[FateEntry] = []
        self.updates: list[UpdateOne] = []
        self.shrunk: list[str] = []
        self.exact = True
        self.taken: dict[str, list[str]] = {}
        """Which mailboxes each update takes off its message, by document id."""
        self.awaited: dict[str, int] = {}
        """How many mailboxes each message in ``final`` waits for, where that is to be looked at again."""
        self.expected: dict[str, dict[str, Expectation]] = {}
        """For each message that was read and is changed: what becomes of its deliveries, by device key."""
        self.counts: dict[Outcome, int] = dict.fromkeys(OUTCOMES[1:], 0)
        self.settlement = Settlement([], [])
        self.ended_parts: dict[str, tuple[str, int]] = {}
        """Messages of which a part ends here: their writing and number of documents, by document id."""
        self._whole: set[str] = set()
        self._acks: dict[str, list[Ack]] = {}
        self._removals: dict[str, list[Removal]] = {}
        self._releases: dict[str, set[str]] = {}
        for ending in batch:
            if isinstance(ending, Removal):
                for doc_id in ending.doc_ids:
                    self._removals.setdefault(doc_id, []).append(ending)
                    self.read[doc_id] = None
                if ending.whole:
                    self._whole.update(ending.doc_ids)
                if ending.fate == "withdrawn":
                    self.settlement.withdrawn.extend(ending.doc_ids)
                continue
            if isinstance(ending, Release):
                for doc_id in ending.doc_ids:
                    self._releases.setdefault(doc_id, set()).update(ending.keys)
                    self.read[doc_id] = None
                continue
            released = self.settlement.released
            for doc_id, sole in ending.messages.items():
                released.append((doc_id, ending.key))
                if sole is not None and not look(doc_id):
                    self.sole.setdefault(doc_id, (sole, ending))
                else:
                    self._acks.setdefault(doc_id, []).append(ending)
                    self.read[doc_id] = None
        for doc_id in self.sole.keys() & self.read.keys():
            # Acknowledged twice, or also removed: look before deleting.
            _, ack = self.sole.pop(doc_id)
            self._acks.setdefault(doc_id, []).insert(0, ack)
        self.sole_entries = [self._sole_entry(doc_id, sole, ack) for doc_id, (sole, ack) in self.sole.items()]

    @property
    def sole_places(self) -> list[tuple[str, int]]:
        """Id and ``seq`` of the messages that are deleted without having been read."""
        return [(doc_id, sole.seq) for doc_id, (sole, _) in self.sole.items()]

    def parts_of_whole(self, documents: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The parts that end together with these heads."""
        wanted: list[str] = []
        for doc_id in self._whole & documents.keys():
            parts = parts_of(documents[doc_id])
            for part in parts:
                self._removals.setdefault(part, []).extend(self._removals[doc_id])
            wanted += parts
        return wanted

    def strayed(self, heads: Mapping[str, Mapping[str, Any]]) -> Sequence[Strayed]:
        """The devices that acknowledged messages by the messages' ids, of which a part may wait for them, and the heads of
        those."""
        found: dict[str, Strayed] = {}
        for doc_id, head in heads.items():
            if "parts" not in head or "part" in head:
                continue
            for ack in self._acks.get(doc_id, ()):
                if not _awaited(ack, head["awaiting"]):
                    found.setdefault(ack.key, Strayed(_mailboxes(ack), {})).heads[doc_id] = head
        return list(found.values())

    def found_strayed(self, part: str) -> None:
        """This part is one of a message that was acknowledged by its own id."""
        known = self._acks.setdefault(part, [])
        known += [ack for ack in self._acks.get(ids.head_id(part), ()) if ack not in known]

    def plan(self, doc_id: str, document: Mapping[str, Any]) -> None:
        """Decides what becomes of one stored message. Raises KeyError, TypeError or ValueError, and decides nothing, when
        the document is no message."""
        sender, accepted_at, seq = document["sender"], int(document["createdAt"]), int(document["seq"])
        user, device = sender["user"], sender["device"]
        awaiting = document["awaiting"]
        if not isinstance(awaiting, list) or not isinstance(document.get("deliveredTo", []), list):
            raise TypeError("awaiting and deliveredTo are lists")
        remaining = set(awaiting)
        expected: dict[str, Expectation] = {}
        counted: dict[str, Ack] = {}
        for ack in self._acks.get(doc_id, ()):
            for key in _mailboxes(ack):
                if key in remaining:
                    remaining.discard(key)
                    told = None
                    if ack.key not in counted:
                        counted[ack.key] = ack
                        told = Acknowledged(
                            doc_id, user, device, ack.user, ack.device, ack.at, accepted_at, ack.quiet
                        )
                    expected[key] = Expectation("acknowledged", told)
        dropped = remaining & self._releases.get(doc_id, set())
        remaining -= dropped
        expected.update({key: Expectation("released", None) for key in dropped})
        self.settlement.released.extend((doc_id, key) for key in dropped)
        fate = self._fate_of(doc_id, user)
        if fate is None and doc_id in self._removals:
            # Somebody else's message.
            self.settlement.withdrawn = [one for one in self.settlement.withdrawn if one != doc_id]
        entry = None
        if not remaining or fate is not None:
            # A message that nobody got before its last mailbox was removed is released, not delivered.
            nobody = dropped and not counted and not document.get("deliveredTo")
            own = fate or ("released" if nobody else "delivered")
            entry = entry_of(
                document,
                own,
                [ack.user for ack in counted.values() if not ack.quiet],
                [ack.user for ack in counted.values() if ack.quiet],
            )
        elif counted or dropped:
            taken = [key for key in dict.fromkeys(awaiting) if key not in remaining]
            acks = list(counted.values())
            self.updates.append(_shrink(document, acks, sorted(dropped), taken if self.exact else None))
            self.shrunk.append(doc_id)
            self.taken[doc_id] = taken
        if fate is not None:
            if fate != "delivered":
                expected.update({key: Expectation(fate, None) for key in remaining})
            self.settlement.released.extend((doc_id, key) for key in remaining)
        if entry is not None:
            self.final[doc_id] = seq
            if self.exact:
                self.awaited[doc_id] = len(awaiting)
            self.final_entries.append(entry)
            if "part" in document:
                self.ended_parts[ids.head_id(doc_id)] = (str(document["writing"]), int(document["parts"]))
        expected.pop(ids.PARTS_KEY, None)
        if expected:
            self.expected[doc_id] = expected
        for expectation in expected.values():
            self.counts[expectation.outcome] += 1
            if expectation.told is not None:
                self.settlement.acknowledged.append(expectation.told)

    def _fate_of(self, doc_id: str, sender: str) -> Fate | None:
        """What a removal makes of this message of that sender."""
        for removal in self._removals.get(doc_id, ()):
            if removal.sender in (None, sender):
                return removal.fate
        return None

    def doubts(self) -> dict[str, dict[str, Expectation]]:
        """What this group may have brought about, when nobody knows whether it did."""
        found = dict(self.expected)
        told = {item.doc_id: item for item in self.settlement.acknowledged if item.doc_id in self.sole}
        for doc_id, (_, ack) in self.sole.items():
            found[doc_id] = {ack.key: Expectation("acknowledged", told[doc_id])}
        return found

    def _sole_entry(self, doc_id: str, sole: Sole, ack: Ack) -> FateEntry:
        self.settlement.acknowledged.append(
            Acknowledged(doc_id, sole.user, sole.device, ack.user, ack.device, ack.at, sole.at, ack.quiet)
        )
        return {
            "id": doc_id,
            "sender": {"user": sole.user, "device": sole.device},
            "seq": sole.seq,
            "at": sole.at,
            "fate": "delivered",
            "delivered": [ack.user] if ack.user != sole.user and not ack.quiet else [],
        }


def _mailboxes(ack: Ack) -> tuple[str, str]:
    return ack.key, ids.any_device_key(ack.user)


def _awaited(ack: Ack, awaiting: Sequence[str]) -> bool:
    return any(key in awaiting for key in _mailboxes(ack))


def parts_of(head: Mapping[str, Any]) -> list[str]:
    """The ``_id`` of every part of this head's message; none of what is no head."""
    if "parts" not in head or "part" in head:
        return []
    return ids.part_ids(head["_id"], str(head["writing"]), int(head["parts"]))


def entry_of(
    document: Mapping[str, Any], fate: Fate, also: Sequence[str], quietly: Sequence[str] = ()
) -> FateEntry:
    """The fate of a stored message that is about to be deleted; ``also`` and ``quietly`` have just acknowledged it. Who
    acknowledged quietly is not named among those who have it: while somebody seems to await it, they do, too."""
    sender = document["sender"]
    entries = document.get("deliveredTo", ())
    people = {entry["user"] for entry in entries if not entry.get("quiet")} | set(also)
    quiet = {entry["user"] for entry in entries if entry.get("quiet")} | set(quietly)
    people.discard(sender["user"])
    quiet -= {sender["user"]} | people
    if fate == "delivered" and not people and not quiet and document.get("trimmed"):
        fate = "trimmed"
    entry: FateEntry = {
        "id": document["_id"],
        "sender": {"user": sender["user"], "device": sender["device"]},
        "seq": document["seq"],
        "at": int(document["createdAt"]),
        "fate": fate,
        "delivered": sorted(people),
    }
    if "parts" in document:
        entry["parts"] = document["parts"]
        entry["writing"] = document["writing"]
    silent = document.get("silent", ())
    # Of a part also when nobody seems to await it: the message may wait in another one.
    if silent or ("part" in document and quiet):
        entry["silent"] = sorted(quiet.union(silent))
    return entry


def _delivered(ack: Ack) -> dict[str, Any]:
    entry = {"user": ack.user, "device": ack.device, "at": DatetimeMS(ack.at)}
    return {**entry, "quiet": True} if ack.quiet else entry


def _shrink(
    document: Mapping[str, Any], acks: Sequence[Ack], dropped: Sequence[str], taken: Sequence[str] | None
) -> UpdateOne:
    """Takes devices out of ``awaiting`` and notes those that acknowledged in ``deliveredTo``; what is sealed for those dropped
    goes. Idempotent: a device that is no longer awaited changes nothing, so a retry does not double an entry. With ``taken`` it
    does all of that, or nothing when one of these mailboxes is not awaited any more."""
    gone = [key for ack in acks for key in (ack.key, ids.any_device_key(ack.user))] + list(dropped)
    new = [
        {
            "keys": [ack.key, ids.any_device_key(ack.user)],
            "entry": _delivered(ack),
        }
        for ack in acks
    ]
    still_awaited = {"$gt": [{"$size": {"$setIntersection": ["$$this.keys", "$awaiting"]}}, 0]}
    change: dict[str, Any] = {
        "deliveredTo": {
            "$concatArrays": [
                {"$ifNull": ["$deliveredTo", []]},
                {
                    "$map": {
                        "input": {"$filter": {"input": {"$literal": new}, "cond": still_awaited}},
                        "in": "$$this.entry",
                    }
                },
            ]
        },
        "awaiting": {"$setDifference": ["$awaiting", {"$literal": gone}]},
    }
    if dropped:
        change["sealed"] = _sealed_without(dropped)
    place: dict[str, Any] = {
        "_id": document["_id"],
        "conversationId": document["conversationId"],
        "seq": document["seq"],
        "awaiting": {"$in": gone if taken is None else list(taken)},
    }
    if taken is not None and len(taken) > 1:
        # Not $all: for every number of mailboxes MongoDB would weigh its indexes anew.
        place["$expr"] = {"$setIsSubset": [{"$literal": list(taken)}, "$awaiting"]}
    return UpdateOne(place, [{"$set": change}])


def _sealed_without(dropped: Sequence[str]) -> dict[str, Any]:
    """``sealed`` without what is for these mailboxes; a placeholder is dropped for all devices of its user."""
    people = [ids.user_of(key) for key in dropped if ids.is_placeholder(key)]
    # An expression that fails would fail the whole group: what is no name is nobody's.
    name = {"$cond": [{"$eq": [{"$type": "$$this.device"}, "string"]}, "$$this.device", ""]}
    user = {"$arrayElemAt": [{"$split": [name, "/"]}, 0]}
    stays = {
        "$not": [
            {
                "$or": [
                    {"$in": ["$$this.device", {"$literal": list(dropped)}]},
                    {"$in": [user, {"$literal": people}]},
                ]
            }
        ]
    }
    return {
        "$cond": [
            {"$isArray": ["$sealed"]},
            {"$filter": {"input": "$sealed", "cond": stays}},
            "$$REMOVE",
        ]
    }
