"""Made-up people, contacts and conversations, as the documents that ``relay.store`` writes.

Everything follows from the seed. A fifth of the people have four fifths of the contacts and of the places in conversations,
and most conversations have been quiet for long, as Pareto has it.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from relay.store.people import fold, search_keys
from relay.wire.ids import device_key

Row = dict[str, Any]

DEVICE: Final = "phone"
_SYLLABLES: Final = (
    "ba be bi bo bra da de do dra fa fe fi ga ge go ha he hi ja jo ka ke ko la le li lo ma me mi mo na ne ni",
    "la le li lo ma me mi na ne no ra re ri ro sa se si ta te ti to va ve vi za zo",
    "bel dan den dor fin gar hal kan lan lin lis mar mir nan nel nor ran rik ris sen son tan tor van vin zan",
)
_STARTS, _MIDDLES, _ENDS = (text.split() for text in _SYLLABLES)
_BUSY: Final = 0.2
_LARGEST_GROUP: Final = 100
_GROUP_SHAPE: Final = 1.16  # Pareto's: a fifth of the groups hold four fifths of the places
_QUIET_SHAPE: Final = 0.12
_YEAR_MS: Final = 365 * 86_400_000
_YOUNGEST_MS: Final = 60_000
_READ: Final = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of what. ``heavy``: the first person is in so many conversations, and has as many contacts. ``first``: so
    many people are there already. ``password`` is the stored hash that all share, or None."""

    users: int
    memberships: int
    contacts: int
    heavy: int
    seed: int
    now: datetime
    first: int = 0
    password: str | None = None

    def problem(self) -> str | None:
        """Why this cannot be made; None when it can."""
        if self.heavy >= self.users:
            return "--heavy needs more --users: everybody else can be a contact once"
        if self.memberships < 2 * self.heavy:
            return "--memberships must be at least twice --heavy: a conversation has two members or more"
        if self.memberships > 20 * self.users + 2 * self.heavy:
            return "--memberships may be 20 times --users at most"
        if self.contacts < self.heavy or self.contacts > 20 * self.users + self.heavy:
            return "--contacts must be --heavy or more, and 20 times --users at most"
        return None


@dataclass(slots=True)
class Population:
    """The documents of a plan, in batches that may be read once, in this order: people, contacts, conversations."""

    plan: Plan
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    usernames: list[str] = field(default_factory=list)
    _random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        plan = self.plan
        self._random.seed(f"{plan.seed} {plan.first}")

    def people(self) -> Iterator[tuple[Row, Row]]:
        """A user and their device."""
        plan, number = self.plan, self._random
        for index in range(plan.users):
            place = plan.first + index
            user = uuid.UUID(int=number.getrandbits(128), version=4).hex
            given, family = self._name(), self._name()
            username = f"{given}.{family}{place}"
            made = plan.now - timedelta(milliseconds=number.randrange(_YOUNGEST_MS, _YEAR_MS))
            row: Row = {
                "_id": user,
                "createdAt": made,
                "updatedAt": made,
                "username": username,
                "name": f"{given.capitalize()} {family.capitalize()}",
                # No country has the code 999.
                "phone": f"+999{place:09d}",
            }
            if plan.password is not None:
                row["password"] = plan.password
            row |= search_keys(row)[0]
            self.ids.append(user)
            self.names.append(row["name"])
            self.usernames.append(username)
            seen = max(made, self._moment())
            device: Row = {
                "_id": device_key(user, DEVICE),
                "user": user,
                "createdAt": made,
                "updatedAt": made,
                "lastSeen": seen,
                "name": DEVICE,
                "platform": "generated",
            }
            yield row, device

    def contacts(self) -> Iterator[Row]:
        """Whom people know."""
        plan, number = self.plan, self._random
        for index in number.sample(range(1, plan.users), plan.heavy):
            yield self._contact(0, index)
        known: set[int] = set()
        while len(known) < plan.contacts - plan.heavy:
            owner, other = number.randrange(1, plan.users), self._somebody()
            pair = owner * plan.users + other
            if owner != other and pair not in known:
                known.add(pair)
                yield self._contact(owner, other)

    def conversations(self) -> Iterator[tuple[Row, list[Row]]]:
        """A conversation and its members."""
        plan, number = self.plan, self._random
        left = plan.memberships
        pairs: set[int] = set()
        heavy = iter(number.sample(range(1, plan.users), plan.heavy))
        for count, other in enumerate(heavy):
            # Every later conversation of this person needs two places.
            spare = left - 2 * (plan.heavy - count)
            if number.random() < 0.7 or spare < 1:
                members = [0, other]
                pairs.add(other)
            else:
                members = self._group([0, other], min(self._size(), 2 + spare))
            left -= len(members)
            yield self._conversation(members, direct=len(members) == 2 and other in pairs)
        while left > 1:
            if number.random() < 0.6:
                one, other = sorted((number.randrange(1, plan.users), self._somebody()))
                if one == other or one * plan.users + other in pairs:
                    continue
                pairs.add(one * plan.users + other)
                members, direct = [one, other], True
            else:
                members, direct = (
                    self._group([number.randrange(1, plan.users)], min(self._size(), left)),
                    False,
                )
            left -= len(members)
            yield self._conversation(members, direct=direct)

    def _conversation(self, members: list[int], *, direct: bool) -> tuple[Row, list[Row]]:
        number = self._random
        changed = self._moment()
        name = str(uuid.UUID(int=number.getrandbits(128), version=4))
        people = [self.ids[index] for index in members]
        creator = people[0]
        row: Row = {
            "_id": name,
            "type": "direct" if direct else "group",
            "createdBy": creator,
            "createdAt": changed,
            "rev": 1,
            "memberCount": len(people),
        }
        if direct:
            row["unique"] = "direct " + " ".join(sorted(people))
        else:
            row["name"] = f"{self._name().capitalize()} {self._name()}"
        rows: list[Row] = []
        for user in people:
            membership: Row = {
                "_id": f"{name} {user}",
                "conversationId": name,
                "user": user,
                "role": "admin" if not direct and user == creator else "member",
                "joinedAt": changed,
                "updatedAt": changed,
                "rev": 1,
            }
            if number.random() < _READ:
                read = int(changed.timestamp() * 1000) + number.randrange(_YOUNGEST_MS)
                membership["readUpTo"] = read << 10
                membership["readAt"] = datetime.fromtimestamp(read / 1000, UTC)
            rows.append(membership)
        return row, rows

    def _contact(self, owner: int, other: int) -> Row:
        made = self._moment()
        row: Row = {
            "_id": f"{self.ids[owner]} {self.ids[other]}",
            "owner": self.ids[owner],
            "user": self.ids[other],
            "sortKey": fold(self.names[other]),
            "listed": True,
            "blocked": False,
            "createdAt": made,
            "updatedAt": made,
        }
        if self._random.random() < _BUSY:
            row["name"] = self._name().capitalize()
            row["sortKey"] = fold(row["name"])
        return row

    def _group(self, members: list[int], size: int) -> list[int]:
        chosen = dict.fromkeys(members)
        for _ in range(4 * size):
            if len(chosen) >= size:
                break
            chosen[self._somebody()] = None
        return list(chosen)

    def _somebody(self) -> int:
        """Not the heavy one, whose conversations are counted."""
        number, users = self._random, self.plan.users
        busy = max(2, int(users * _BUSY))
        if number.random() < 1 - _BUSY or busy >= users:
            return number.randrange(1, busy)
        return number.randrange(busy, users)

    def _size(self) -> int:
        return min(_LARGEST_GROUP, int(3 * self._random.paretovariate(_GROUP_SHAPE)))

    def _moment(self) -> datetime:
        """Half of all within a few hours, a fifth most of a year ago, none in the last minute."""
        ago = _YOUNGEST_MS * self._random.paretovariate(_QUIET_SHAPE)
        longest = _YEAR_MS * self._random.uniform(0.5, 1)
        return self.plan.now - timedelta(milliseconds=int(min(ago, longest)))

    def _name(self) -> str:
        number = self._random
        middle = number.choice(_MIDDLES) if number.random() < 0.7 else ""
        return number.choice(_STARTS) + middle + number.choice(_ENDS)
