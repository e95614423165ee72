"""Two nodes that settle the same messages at the same moment, against a store that is a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bson.datetime_ms import DatetimeMS
from hypothesis import event, given
from hypothesis import strategies as st

from relay.store.disputes import settle_dispute
from relay.store.ending_plan import EndingGroup
from relay.store.endings import Ack, Ending, Release, Removal
from relay.wire.ids import any_device_key

IDS = [f"talk m{number}" for number in range(4)]
KEYS = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/*", "dan/phone"]
DEVICES = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/watch", "cleo/phone", "dan/phone"]
AT = st.sampled_from((1000, 2000))
Store = dict[str, dict[str, Any]]


def ack(key: str, doc_ids: list[str], at: int) -> Ack:
    user, _, device = key.partition("/")
    return Ack(user, device, dict.fromkeys(doc_ids), at=at, deadline=0, done=lambda _: None)


named = st.lists(st.sampled_from(IDS), unique=True, min_size=1)
acks = st.builds(ack, st.sampled_from(DEVICES), named, AT)
removals = st.builds(lambda ids: Removal(ids, "expired", deadline=0), named)
releases = st.builds(
    lambda keys, ids: Release(ids, keys, deadline=0, done=lambda _: None),
    st.lists(st.sampled_from(KEYS), unique=True),
    named,
)
batches = st.lists(acks | acks | acks | releases | removals, min_size=1, max_size=5)
mailboxes = st.dictionaries(st.sampled_from(IDS), st.lists(st.sampled_from(KEYS), unique=True, min_size=1))


def document(doc_id: str, awaiting: list[str]) -> dict[str, Any]:
    return {
        "_id": doc_id,
        "conversationId": "talk",
        "sender": {"user": "ann", "device": "phone"},
        "seq": 100,
        "createdAt": 1000,
        "awaiting": awaiting,
        "deliveredTo": [],
    }


@dataclass
class Node:
    """Commits one batch, a write at a time."""

    store: Store
    batch: list[Ending]
    booked: int = 0
    told: list[tuple[str, str]] = field(default_factory=list)
    sure: bool = True

    def steps(self) -> Iterator[None]:
        """Everything it does, with a stop wherever another may do something."""
        while True:
            group = EndingGroup(self.batch)
            for doc_id in group.read:
                if doc_id in self.store:
                    stored = self.store[doc_id]
                    group.plan(doc_id, {**stored, "awaiting": [*stored["awaiting"]]})
            yield
            shrunk = ended = 0
            for doc_id in group.shrunk:
                shrunk += self.shrink(group, doc_id)
                yield
            for doc_id in group.final:
                found = self.store.get(doc_id)
                if found is not None and len(found["awaiting"]) == group.awaited[doc_id]:
                    del self.store[doc_id]
                    ended += 1
                yield
            left: set[str] = set()
            if (shrunk, ended) != (len(group.shrunk), len(group.final)):
                some = {one: self.store[one] for one in (*group.shrunk, *group.final) if one in self.store}
                left, is_sure = settle_dispute(group, some, shrunk, ended)
                self.sure = self.sure and is_sure
            self.booked += sum(group.counts.values())
            self.told += [
                (one.doc_id, f"{one.by_user}/{one.by_device}") for one in group.settlement.acknowledged
            ]
            for doc_id in group.shrunk:
                if doc_id in self.store and not self.store[doc_id]["awaiting"]:
                    del self.store[doc_id]
            if not left:
                return
            yield

    def shrink(self, group: EndingGroup, doc_id: str) -> bool:
        found = self.store.get(doc_id)
        taken = set(group.taken[doc_id])
        if found is None or not taken <= set(found["awaiting"]):
            return False
        found["awaiting"] = [key for key in found["awaiting"] if key not in taken]
        noted: set[str] = set()
        for one in self.batch:
            if not isinstance(one, Ack) or one.key in noted or doc_id not in one.messages:
                continue
            if taken & {one.key, any_device_key(one.user)}:
                noted.add(one.key)
                entry = {"user": one.user, "device": one.device, "at": DatetimeMS(one.at)}
                found["deliveredTo"].append(entry)
        return True


@given(mailboxes=mailboxes, batches=st.tuples(batches, batches), draw=st.data())
def test_what_two_nodes_settle_at_once_is_booked_once(
    mailboxes: dict[str, list[str]], batches: tuple[list[Ending], list[Ending]], draw: st.DataObject
) -> None:
    store = {doc_id: document(doc_id, list(keys)) for doc_id, keys in mailboxes.items()}
    before = waiting(store)
    nodes = [Node(store, batch) for batch in batches]
    play([node.steps() for node in nodes], lambda: draw.draw(st.booleans()))
    booked = sum(node.booked for node in nodes)
    is_sure = all(node.sure for node in nodes)
    event(f"sure: {is_sure}")
    if is_sure:
        assert booked == before - waiting(store)
    # Nothing that was asked for is left undone.
    for node in nodes:
        for doc_id, key in node.told:
            assert doc_id not in store or key not in store[doc_id]["awaiting"]
        for one in node.batch:
            if isinstance(one, Ack):
                awaited = [
                    key for doc_id in one.messages if doc_id in store for key in store[doc_id]["awaiting"]
                ]
                assert not {one.key, any_device_key(one.user)}.intersection(awaited)


def waiting(store: Store) -> int:
    return sum(len(found["awaiting"]) for found in store.values())


def play(players: list[Iterator[None]], choose: Callable[[], bool]) -> None:
    """Lets two go on in turns of any length until both are done."""
    while players:
        player = players[-1] if choose() else players[0]
        if next(player, True):
            players.remove(player)


def test_a_group_whose_writes_were_all_forestalled_books_nothing() -> None:
    group = EndingGroup([ack("bob/phone", IDS[:2], 1000)])
    for doc_id, keys in ((IDS[0], ["bob/phone", "dan/phone"]), (IDS[1], ["bob/phone"])):
        group.plan(doc_id, document(doc_id, keys))
    other = {"user": "bob", "device": "phone", "at": DatetimeMS(999)}
    after = {IDS[0]: {**document(IDS[0], ["dan/phone"]), "deliveredTo": ["no entry", other]}}
    verdict = settle_dispute(group, after, 0, 0)
    assert (verdict.left, verdict.is_sure) == (set(), True)
    assert (group.counts["acknowledged"], group.expected) == (0, {})


def test_when_only_some_of_unlike_deletions_were_its_own_a_group_is_not_sure() -> None:
    group = EndingGroup([ack("bob/phone", IDS[:2], 1000), ack("dan/phone", IDS[:1], 1000)])
    group.plan(IDS[0], document(IDS[0], ["bob/phone", "dan/phone"]))
    group.plan(IDS[1], document(IDS[1], ["bob/phone"]))
    assert settle_dispute(group, {}, 0, 1) == (set(), False)


def test_what_was_not_written_though_nobody_changed_it_is_neither_booked_nor_tried_again() -> None:
    group = EndingGroup([ack("bob/phone", IDS[:2], 1000)])
    after = {
        IDS[0]: document(IDS[0], ["bob/phone", "dan/phone"]),
        IDS[1]: document(IDS[1], ["bob/phone"]),
    }
    for doc_id, found in after.items():
        group.plan(doc_id, found)
    assert settle_dispute(group, after, 0, 0) == (set(), True)
    assert group.counts["acknowledged"] == 0
