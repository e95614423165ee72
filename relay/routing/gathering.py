"""What a node has to tell others, gathered until the last group is on its way; then sorted by where devices are."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Final

from relay.routing import hints
from relay.routing.directory import Line
from relay.routing.hints import Hint, Message, Parcel, Released, Seen, Told
from relay.wire.envelope import Envelope
from relay.wire.ids import device_key, user_of

_MOST_BYTES: Final = 33_554_432
_MOST_ITEMS: Final = 200_000
_PARCEL_BYTES: Final = 1_000_000
_ITEM_BYTES: Final = 100
_PAIRS: Final = 2000

Lines = Mapping[str, Sequence[Line]]


class Gathered:
    """One group. ``items`` counts what is in it; ``takes`` says whether there is room for more and counts it."""

    def __init__(self) -> None:
        self.messages: list[tuple[Envelope, list[str]]] = []
        self.released: list[tuple[str, str]] = []
        self.told: list[Told] = []
        self.for_node: list[tuple[str, Hint]] = []
        self.for_all: list[Hint] = []
        self.seen: dict[str, int] = {}
        self.items = 0
        self._bytes = 0

    def takes(self, items: int, size: int) -> bool:
        """Counts so many items of so many bytes, unless that is too much."""
        if self.items + items > _MOST_ITEMS or self._bytes + size > _MOST_BYTES:
            return False
        self.items += items
        self._bytes += size
        return True

    def users(self) -> list[str]:
        """The users whose devices must be looked up."""
        found: dict[str, None] = {}
        for _, keys in self.messages:
            found.update(dict.fromkeys(map(user_of, keys)))
        found.update(dict.fromkeys(user_of(key) for _, key in self.released))
        for one in self.told:
            found.update(dict.fromkeys(one.users))
        return list(found)

    def split(self, known: Container[str]) -> tuple[Gathered, Gathered]:
        """What can be told now, and what must be looked up. A message is told now only when all are that came with it: those of
        one commit are one text for each node."""
        early, rest = Gathered(), Gathered()
        if all(user_of(key) in known for _, keys in self.messages for key in keys):
            early.messages = self.messages
        else:
            rest.messages = self.messages
        early.for_node, early.for_all, early.seen = self.for_node, self.for_all, self.seen
        rest.released, rest.told = self.released, self.told
        return early, rest

    def count(self, users: Collection[str]) -> int:
        """How much of it is for these users."""
        if not users:
            return 0
        count = sum(user_of(key) in users for _, keys in self.messages for key in keys)
        count += sum(user_of(key) in users for _, key in self.released)
        return count + sum(user in users for one in self.told for user in one.users)

    def sort(self, lines: Lines, own: str) -> tuple[dict[str, list[Hint]], list[Hint]]:
        """The hints for each node but this one (``own``), and those for all. ``lines`` by user."""
        parcels: dict[str, list[Hint]] = {}
        if lines:
            self._sort_messages(lines, own, parcels)
            self._sort_released(lines, own, parcels)
            self._sort_told(lines, own, parcels)
        for node, hint in self.for_node:
            parcels.setdefault(node, []).append(hint)
        for_all = [*self.for_all]
        if self.seen:
            seen = list(self.seen.items())
            for_all += [hints.Seen(seen[start : start + _PAIRS]) for start in range(0, len(seen), _PAIRS)]
        return parcels, for_all

    def _sort_messages(self, lines: Lines, own: str, parcels: dict[str, list[Hint]]) -> None:
        known: dict[tuple[str, str, int], Message] = {}
        for envelope, keys in self.messages:
            by_node: dict[str, list[str]] = {}
            for key in keys:
                for line in _of(key, lines):
                    if line.node != own:
                        by_node.setdefault(line.node, []).append(key)
            for node, its in by_node.items():
                name = (node, envelope.doc_id, envelope.seq)
                found = known.get(name)
                if found is None:
                    found = known[name] = Message.of(envelope)
                    parcels.setdefault(node, []).append(found)
                found.add(envelope, its)

    def _sort_released(self, lines: Lines, own: str, parcels: dict[str, list[Hint]]) -> None:
        by_node: dict[str, list[tuple[str, str]]] = {}
        for doc_id, key in self.released:
            for node in {line.node for line in _of(key, lines)} - {own}:
                by_node.setdefault(node, []).append((doc_id, key))
        for node, pairs in by_node.items():
            its = parcels.setdefault(node, [])
            its += [Released(pairs[start : start + _PAIRS]) for start in range(0, len(pairs), _PAIRS)]

    def _sort_told(self, lines: Lines, own: str, parcels: dict[str, list[Hint]]) -> None:
        for one in self.told:
            by_node: dict[str, dict[str, None]] = {}
            for user in one.users:
                for line in lines.get(user, ()):
                    key = device_key(user, line.device)
                    if line.node != own and key != one.but and one.only in (None, key):
                        by_node.setdefault(line.node, {})[user] = None
            for node, users in by_node.items():
                told = Told(one.event, one.frame, list(users), one.but, one.only)
                parcels.setdefault(node, []).append(told)


def packed(node: str, at: int, its: Sequence[Hint]) -> Iterator[bytes]:
    """Parcels of about a megabyte at most: a longer one would hold up everybody's."""
    start, size = 0, 0
    for number, hint in enumerate(its):
        size += _size(hint)
        if size >= _PARCEL_BYTES or number == len(its) - 1:
            yield hints.encode(Parcel(node, at, list(its[start : number + 1])))
            start, size = number + 1, 0


def _size(hint: Hint) -> int:
    match hint:
        case Message():
            sealed = 0 if hint.sealed is None else sum(map(len, hint.sealed.values()))
            keys = sum(len(keys) for _, keys in hint.copies)
            return len(hint.framed.frame) + sealed + _ITEM_BYTES * (1 + keys)
        case Told():
            return len(hint.frame) + _ITEM_BYTES * (1 + len(hint.users))
        case Released():
            return _ITEM_BYTES * (1 + len(hint.pairs))
        case Seen():
            return _ITEM_BYTES * (1 + len(hint.users))
        case _:
            return _ITEM_BYTES


def _of(key: str, lines: Lines) -> Iterable[Line]:
    """Where the devices that drain this mailbox are: the device it is named after, or for a placeholder any."""
    user, _, device = key.partition("/")
    return [line for line in lines.get(user, ()) if device in (line.device, "*")]
