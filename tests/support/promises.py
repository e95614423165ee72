"""The promises of the design, section 1, as a model: what each message must come to, and the checks against the relay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.wire.ids import PARTS_KEY, user_of
from tests.support.phone import LOST, Phone

Stored = Mapping[str, Any]


@dataclass(slots=True)
class Message:
    """One message of a phone. ``must`` are the devices that get it whatever happens, ``anyone`` people without a device, of
    whom one that comes later gets it; ``may`` people who were members at some attempt, and had not blocked its sender.
    ``left_out`` are devices that were full, and how often each had been told of a gap; ``silent`` people who had blocked the sender;
    ``lacked_room``: some mailbox of a member was full, be it that of who has no device;
    ``released`` and ``freed`` people, or devices, for whom it may, or must, wait no more."""

    conv: str
    id: str
    phone: Phone
    kind: str
    body: str | None
    reply_to: str | None = None
    after: int | None = None
    ttl: int | None = None
    must: set[str] | None = None
    anyone: set[str] = field(default_factory=set)
    may: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    freed: set[str] = field(default_factory=set)
    left_out: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    lacked_room: bool = False
    seq: int | None = None
    refused: str | None = None
    sure: bool = True
    withdrawal: Message | None = None
    expired: bool = False

    @property
    def doc_id(self) -> str:
        """Its ``_id`` in the store."""
        return f"{self.conv} {self.id}"

    def operation(self, *, again: bool = False) -> dict[str, Any]:
        """What a ``send`` says of it."""
        fields = {"replyTo": self.reply_to, "after": self.after, "ttl": self.ttl, "again": again or None}
        return {
            "id": self.id,
            "kind": self.kind,
            "body": self.body,
            **{name: value for name, value in fields.items() if value is not None},
        }


@dataclass(slots=True)
class Told:
    """A change of members that was answered: these devices must hear of it."""

    conv: str
    event: str
    users: tuple[str, ...]
    must: set[str]


class Broken(AssertionError):
    """A promise that was not kept."""

    def __init__(self, promise: int, what: str) -> None:
        super().__init__(f"promise {promise}: {what}")


class Model:
    """What has happened, as far as anybody can know it from outside."""

    def __init__(self, phones: Iterable[Phone]) -> None:
        self.phones = {phone.key: phone for phone in phones}
        self.people = list(dict.fromkeys(phone.user for phone in self.phones.values()))
        self.members: dict[str, set[str]] = {}
        self.ever: dict[str, set[str]] = {}
        self.groups: list[str] = []
        self.admins: dict[str, str] = {}
        self.directs: list[str] = []
        self.messages: dict[str, Message] = {}
        self.told: list[Told] = []
        self.surely_read: dict[tuple[str, str], int] = {}
        self.perhaps_read: dict[tuple[str, str], int] = {}
        self.blocks: set[tuple[str, str]] = set()
        self.full: set[str] = set()
        """Mailboxes that have been full since the last look but one."""
        self.was_full = False
        self.most_trimmed = 0
        self.is_over = False
        """Whether so much time has passed that nothing waits any more for who has blocked its sender."""
        self.lost = 0
        """Deliveries by which the ledgers of the lives that are running differ from what waits, since one of them began."""

    def of(self, user: str) -> list[Phone]:
        """A person's devices."""
        return [phone for phone in self.phones.values() if phone.user == user]

    def joined(self, conv: str, users: Iterable[str]) -> None:
        """These are members now."""
        people = set(users)
        for user in people - self.members.get(conv, set()):
            self.surely_read.pop((conv, user), None)
        self.members.setdefault(conv, set()).update(people)
        self.ever.setdefault(conv, set()).update(people)

    def are_members(self, conv: str, users: set[str]) -> None:
        """These are members, whatever was believed; who has come anew meanwhile has read nothing."""
        for user in self.members[conv] ^ users:
            self.surely_read.pop((conv, user), None)
        self.members[conv] = users

    def read(self, conv: str, user: str, up_to: int, found: str) -> None:
        """They marked a conversation as read, and were told this."""
        place = conv, user
        if found not in ("done", LOST, *(() if user in self.members[conv] else ("not_member",))):
            raise Broken(6, f"{user} has read {conv}, and was told {found}")
        self.perhaps_read[place] = max(up_to, self.perhaps_read.get(place, 0))
        if found == "done":
            self.surely_read[place] = max(up_to, self.surely_read.get(place, 0))

    def check_read(self, memberships: Iterable[Stored]) -> None:
        """No read mark is lost, goes back or lies further than somebody has read."""
        found = {(row["conversationId"], row["user"]): row.get("readUpTo") or 0 for row in memberships}
        for place, stored in found.items():
            if stored > self.perhaps_read.get(place, 0):
                raise Broken(1, f"{place} is read up to {stored}, which nobody has said")
        for place, up_to in self.surely_read.items():
            if place[1] in self.members[place[0]] and found.get(place, 0) < up_to:
                raise Broken(1, f"{place} was read up to {up_to}, stored is {found.get(place)}")

    def going(self, conv: str, user: str) -> list[Message]:
        """What waits for them there may be released from now on; returns what does."""
        found = [message for message in self.messages.values() if message.conv == conv]
        for message in found:
            message.released.add(user)
        return [message for message in found if message.seq is not None]

    def gone(self, conv: str, user: str, stored: Iterable[Message]) -> None:
        """They are no member any more; what was stored when they were going waits for them no more."""
        self.members[conv].discard(user)
        for message in stored:
            message.freed.add(user)

    def removed(self, phone: Phone) -> None:
        """A device is none any more: nothing that was stored waits for it."""
        phone.known = False
        for message in self.messages.values():
            message.released.add(phone.key)
            message.freed.add(phone.key)
        for told in self.told:
            told.must.discard(phone.key)

    def are_full(self, before: set[str], now: set[str]) -> None:
        """These mailboxes were and are full: they may be left out of messages."""
        self.full = before | now
        self.was_full = self.was_full or bool(self.full)

    def are_apart(self, one: str, other: str) -> bool:
        """Whether one of these has blocked the other."""
        return bool(self.blocks & {(one, other), (other, one)})

    def check_bounded(self, waiting: Mapping[str, int], full: set[str], most: int) -> None:
        """No mailbox of a device that is away grows on and on."""
        for phone in self.phones.values():
            count = waiting.get(phone.key, 0)
            if not phone.connected and count >= most and phone.key not in full:
                raise Broken(7, f"{count} messages wait for {phone.key}, and it is not full")

    def check_trimmed(self, booked: int, *, crashed: bool) -> None:
        """Nothing is left out for lack of room where there is room. Of a change whose node died nobody knows what it told."""
        if booked > self.most_trimmed and not (crashed and self.was_full):
            raise Broken(1, f"{booked} deliveries were trimmed, at most {self.most_trimmed} had no room")

    def tell(self, conv: str, event: str, *users: str) -> None:
        """A change was answered: its system message is stored."""
        people = self.members[conv] | set(users)
        self.most_trimmed += len(self.full)
        must = {phone.key for user in people for phone in self.of(user) if phone.known} - self.full
        self.told.append(Told(conv, event, users, must))

    def attempt(self, message: Message, *, perhaps: Iterable[str] = ()) -> None:
        """The message is sent, for the first time or again. ``perhaps``: members who come or go at this moment."""
        self.messages[message.id] = message
        blockers = {user for user in self.members[message.conv] if (user, message.phone.user) in self.blocks}
        message.silent |= blockers
        people = self.members[message.conv] - set(perhaps) - blockers
        message.may |= people | (set(perhaps) - blockers)
        if message.seq is not None:
            return
        self.most_trimmed += len(self.full)
        members = self.members[message.conv]
        message.lacked_room = message.lacked_room or any(user_of(key) in members for key in self.full)
        keys: set[str] = set()
        anyone: set[str] = set()
        for user in people:
            # Whose mailbox is full is there, though the node died that should have told it so.
            known = [phone.key for phone in self.of(user) if phone.known or phone.key in self.full]
            keys.update(key for key in known if key != message.phone.key)
            if not known and user != message.phone.user and f"{user}/*" not in self.full:
                anyone.add(user)
        for key in keys & self.full:
            message.left_out[key] = self.phones[key].gaps
        keys -= self.full
        message.anyone = anyone if message.must is None else message.anyone & anyone
        message.must = keys if message.must is None else message.must & keys
        if message.kind == "withdrawn" and message.reply_to is not None:
            self.messages[message.reply_to].withdrawal = message

    def outcome(self, message: Message, found: Stored | str, *, allowed: Iterable[str] = ()) -> None:
        """What its sender was told."""
        if found == LOST:
            message.sure = False
            return
        if isinstance(found, str):
            if found == "mailbox_full" and not message.sure:
                # It may be stored all the same; another attempt tells.
                return
            if found not in {*allowed, *self._refusals(message)}:
                raise Broken(6, f"{message.id} was refused with {found}")
            if message.seq is not None:
                raise Broken(5, f"{message.id} was stored, and a resend refused with {found}")
            message.refused = found
            return
        seq = int(found["seq"])
        if message.seq is not None and seq != message.seq:
            raise Broken(5, f"{message.id} was stored as {message.seq}, and a resend answered with {seq}")
        if message.after is not None and seq <= message.after:
            raise Broken(5, f"{message.id} sorts before what its sender had: {seq} <= {message.after}")
        if message.refused is not None:
            raise Broken(1, f"{message.id} was refused and then stored")
        message.seq = seq

    def _refusals(self, message: Message) -> set[str]:
        """What its sender may be told instead."""
        found: set[str] = set()
        if not self.may_send(message):
            found.add("not_member")
        if message.conv in self.directs:
            for user in self.members[message.conv] - {message.phone.user}:
                if (message.phone.user, user) in self.blocks:
                    found.add("blocked")
                if {phone.key for phone in self.of(user) if phone.known} <= self.full:
                    found.add("mailbox_full")
        return found

    def may_send(self, message: Message) -> bool:
        """Whether its sender is a member now."""
        return message.phone.user in self.members[message.conv]

    def check_phones(self) -> None:
        """Nothing that a device has heard or seen is unexpected."""
        for phone in self.phones.values():
            if phone.trouble:
                raise Broken(6, f"{phone.key}: {phone.trouble}")
            for name, row in phone.rows.items():
                self._check_row(phone, name, row.conv, row.seq, row.body)

    def _check_row(self, phone: Phone, name: str, conv: str, seq: int, body: Any) -> None:
        if phone.user not in self.ever.get(conv, ()):
            raise Broken(4, f"{phone.key} has {name} of a conversation that they were never in")
        message = self.messages.get(name)
        if message is None:
            return
        if phone.user not in message.may:
            raise Broken(
                4, f"{phone.key} has {name}, sent while they were no member or had blocked its sender"
            )
        if message.after is not None and seq <= message.after:
            raise Broken(5, f"{phone.key} has {name} before what its sender had: {seq} <= {message.after}")
        if message.seq is not None and message.seq != seq:
            raise Broken(5, f"{phone.key} has {name} as {seq}, stored was {message.seq}")
        if message.refused is not None:
            raise Broken(4, f"{phone.key} has {name}, which was refused with {message.refused}")
        if (message.conv, message.body) != (conv, body):
            raise Broken(1, f"{phone.key} has another content of {name}: {body!r}")

    def check_window(self, window: int) -> None:
        """No connection has more unacknowledged messages than its window."""
        for phone in self.phones.values():
            held = {name for name in phone.shown if name in phone.unacknowledged}
            own = {name for name in held if not self._may_have_ended(name, phone.key)}
            if phone.connected and len(own - phone.acknowledging) > window:
                raise Broken(7, f"{phone.key} has {len(own)} messages in flight, the window is {window}")

    def check_waiting(self, documents: Iterable[Stored]) -> None:
        """Everything that somebody has not acknowledged still waits for them in the store."""
        awaited: dict[str, set[str]] = {}
        heads: set[str] = set()
        for document in documents:
            place = f"{document['conversationId']} {document['id']}"
            awaited.setdefault(place, set()).update(document.get("awaiting", ()))
            if "claimedAt" not in document and "part" not in document:
                heads.add(place)
        for message in self.messages.values():
            if message.seq is None:
                continue
            known = awaited.get(message.doc_id, set())
            held_up = {
                one for key in known if key != PARTS_KEY for one in (key, user_of(key))
            } & message.freed
            if held_up:
                raise Broken(3, f"{message.id} waits for {held_up}, who were removed")
            for key in message.must or ():
                phone = self.phones[key]
                if message.id in phone.acknowledging or self._may_have_ended(message.id, key):
                    continue
                if key not in known or message.doc_id not in heads:
                    raise Broken(2, f"{message.id} was stored, and {key} neither has it nor awaits it")
            for user in message.anyone:
                phones = self.of(user)
                if any(message.id in phone.acknowledging for phone in phones):
                    continue
                if self._may_have_ended(message.id, user):
                    continue
                if not known & {f"{user}/*", *(phone.key for phone in phones)}:
                    raise Broken(2, f"{message.id} was stored, and nobody of {user} has it or awaits it")

    def doubtful(self, documents: Iterable[Stored]) -> set[str]:
        """Messages (by document id) that a device has, though neither was their sender told that they are stored nor are
        they in the store."""
        heads = {doc["_id"] for doc in documents if "claimedAt" not in doc}
        held = {name for phone in self.phones.values() for name in phone.rows}
        return {
            one.doc_id
            for one in self.messages.values()
            if one.seq is None and one.id in held and one.doc_id not in heads
        }

    def check_doubtful(self, doc_ids: Iterable[str], fates: Mapping[str, tuple[str, int]]) -> None:
        """These were messages: their fate is on record."""
        for doc_id in doc_ids:
            if doc_id not in fates:
                raise Broken(1, f"{doc_id} was delivered, and is no message")

    def _may_have_ended(self, name: str, whose: str) -> bool:
        """For a person, or for a device."""
        message = self.messages.get(name)
        if message is None:
            return True
        ended = message.expired or message.withdrawal is not None
        return ended or not message.released.isdisjoint({whose, whose.partition("/")[0]})

    def check_status(self, message: Message, found: Stored) -> None:
        """What a sender is told of a message agrees with what its recipients did."""
        if message.seq is None:
            return
        delivered = set(found["delivered"])
        others = [phone for phone in self.phones.values() if phone.user != message.phone.user]
        perhaps = {phone.user for phone in others if message.id in phone.acknowledging}
        surely = {
            phone.user
            for phone in others
            if message.id in phone.acknowledged and not self._may_have_ended(message.id, phone.key)
        }
        if not surely <= delivered <= perhaps:
            raise Broken(8, f"status of {message.id}: {dict(found)}, acknowledged by {surely}..{perhaps}")
        if found.get("gone"):
            self._check_fate(message, str(found["fate"]))

    def _check_fate(self, message: Message, fate: str) -> None:
        allowed = {"delivered"}
        if message.withdrawal is not None:
            allowed.add("withdrawn")
        if message.expired:
            allowed.add("expired")
        if message.released:
            allowed.add("released")
        if message.lacked_room:
            allowed.add("trimmed")
        if message.silent and self.is_over:
            allowed.add("expired")
        if fate not in allowed:
            raise Broken(1, f"the fate of {message.id} is {fate}, not one of {sorted(allowed)}")

    def check_end(self, fates: Mapping[str, tuple[str, int]]) -> None:
        """Everything was drained and acknowledged: ``fates`` are (fate, seq) by document id."""
        self.is_over = True
        self.check_phones()
        for message in self.messages.values():
            if message.seq is None:
                continue
            found = fates.get(message.doc_id)
            if found is None:
                raise Broken(1, f"{message.id} is gone, and its fate is not on record")
            if found[1] != message.seq:
                raise Broken(5, f"{message.id} was stored as {message.seq}, its fate says {found[1]}")
            self._check_fate(message, found[0])
            self._check_delivered(message)
        self._check_order()
        self._check_told()

    def _check_delivered(self, message: Message) -> None:
        withdrawal = message.withdrawal
        for key in message.must or ():
            phone = self.phones[key]
            if message.expired or message.id in phone.rows:
                continue
            if not message.released.isdisjoint({key, phone.user}):
                continue
            if withdrawal is None or (message.id, message.phone.user) not in phone.withdrawn:
                if withdrawal is not None and key not in (withdrawal.must or ()):
                    continue
                raise Broken(1, f"{message.id} never reached {key}")
        for user in message.anyone:
            if message.expired or withdrawal is not None or user in message.released:
                continue
            if not any(message.id in phone.rows for phone in self.of(user)):
                raise Broken(1, f"{message.id} never reached any device of {user}")

    def check_gaps(self, *, crashed: bool) -> None:
        """Every device that was left out of a message has been told since, or before, when a node has died that knew of it."""
        for message in self.messages.values():
            for key, before in message.left_out.items():
                phone = self.phones[key]
                if message.seq is None or message.id in phone.rows or phone.is_removed:
                    continue
                if (
                    message.expired
                    or message.withdrawal
                    or not message.released.isdisjoint({key, phone.user})
                ):
                    continue
                if phone.gaps <= (0 if crashed else before):
                    raise Broken(1, f"{key} was left out of {message.id}, and was not told of a gap")

    def _check_order(self) -> None:
        places: dict[str, int] = {}
        for phone in self.phones.values():
            for name, row in phone.rows.items():
                if places.setdefault(name, row.seq) != row.seq:
                    raise Broken(5, f"{name} is {row.seq} on {phone.key} and {places[name]} elsewhere")

    def _check_told(self) -> None:
        wanted: Counter[tuple[str, str, str, tuple[str, ...]]] = Counter()
        for told in self.told:
            wanted.update((key, told.conv, told.event, told.users) for key in told.must)
        heard: Counter[tuple[str, str, str, tuple[str, ...]]] = Counter()
        for key, phone in self.phones.items():
            for row in phone.rows.values():
                if row.kind == "system":
                    users = tuple(row.body["users"]) if row.body["event"] != "created" else ()
                    heard[key, row.conv, row.body["event"], users] += 1
        missing = wanted - heard
        if missing:
            raise Broken(1, f"changes that were not told: {list(missing)}")


def waiting_in(documents: Iterable[Stored]) -> int:
    """Deliveries that these documents wait for; parts of claims are no messages yet."""
    whole = {doc["_id"]: doc for doc in documents}
    count = 0
    for name, document in whole.items():
        if "claimedAt" in document:
            continue
        head = whole.get(" ".join(name.split(" ")[:2]))
        if "part" in document and (
            head is None or "claimedAt" in head or head.get("writing") != document.get("writing")
        ):
            continue
        count += sum(key != PARTS_KEY for key in document["awaiting"])
    return count
