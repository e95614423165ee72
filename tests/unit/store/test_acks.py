"""The plan of one group of endings, against a model that takes them one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.store.ending_plan import EndingGroup, entry_of
from relay.store.endings import Ack, Ending, Release, Removal, Sole
from relay.store.ledger import Fate

KEYS = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/*", "dan/phone"]
DEVICES = ["ann/tablet", "bob/phone", "bob/laptop", "cleo/watch", "cleo/phone", "dan/phone", "eve/phone"]
FATES: list[Fate] = ["expired", "withdrawn", "released", "trimmed", "delivered"]
IDS = [f"talk m{number}" for number in range(5)]


def document(doc_id: str, awaiting: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "_id": doc_id,
        "conversationId": "talk",
        "sender": {"user": "ann", "device": "phone"},
        "seq": 100 + int(doc_id[-1]),
        "createdAt": 1000,
        "awaiting": awaiting,
        **fields,
    }


def ack(key: str, *doc_ids: str, sole: bool = False, at: int = 2000) -> Ack:
    user, _, device = key.partition("/")
    known = {
        doc_id: Sole(100 + int(doc_id[-1]), "ann", "phone", 1000) if sole else None for doc_id in doc_ids
    }
    return Ack(user, device, known, at=at, deadline=0, done=lambda _: None)


def removal(fate: Fate, *doc_ids: str) -> Removal:
    return Removal(doc_ids, fate, deadline=0)


def release(keys: list[str], *doc_ids: str) -> Release:
    return Release(doc_ids, keys, deadline=0, done=lambda _: None)


def planned(batch: list[Ending], *documents: dict[str, Any]) -> EndingGroup:
    group = EndingGroup(batch)
    stored = {one["_id"]: one for one in documents}
    for doc_id in group.read:
        if doc_id in stored:
            group.plan(doc_id, stored[doc_id])
    return group


def test_the_only_recipients_acknowledgement_deletes_without_reading() -> None:
    group = planned([ack("bob/phone", IDS[0], sole=True)])
    assert list(group.sole) == [IDS[0]]
    assert not group.read
    assert group.sole_entries[0]["fate"] == "delivered"
    assert group.sole_entries[0]["delivered"] == ["bob"]
    assert group.settlement.released == [(IDS[0], "bob/phone")]


def test_a_senders_own_device_is_not_among_the_people_who_got_it() -> None:
    assert planned([ack("ann/tablet", IDS[0], sole=True)]).sole_entries[0]["delivered"] == []
    group = planned([ack("ann/tablet", IDS[0])], document(IDS[0], ["ann/tablet"]))
    assert group.final_entries[0]["delivered"] == []


def test_an_acknowledgement_that_is_not_the_last_only_shrinks() -> None:
    group = planned([ack("bob/phone", IDS[0])], document(IDS[0], ["bob/phone", "dan/phone"]))
    assert group.final == {}
    assert group.shrunk == [IDS[0]]
    assert group.counts["acknowledged"] == 1


def test_the_last_acknowledgement_deletes_and_names_everybody_who_has_it() -> None:
    before = [{"user": "dan", "device": "phone", "at": 1}, {"user": "ann", "device": "tablet", "at": 1}]
    group = planned([ack("bob/phone", IDS[0])], document(IDS[0], ["bob/phone"], deliveredTo=before))
    assert group.final == {IDS[0]: 100}
    assert group.updates == []
    assert group.final_entries == [
        {
            "id": IDS[0],
            "sender": {"user": "ann", "device": "phone"},
            "seq": 100,
            "at": 1000,
            "fate": "delivered",
            "delivered": ["bob", "dan"],
        }
    ]


def test_two_last_acknowledgements_in_one_group_delete() -> None:
    group = planned(
        [ack("bob/phone", IDS[0]), ack("dan/phone", IDS[0])], document(IDS[0], ["bob/phone", "dan/phone"])
    )
    assert group.final == {IDS[0]: 100}
    assert group.counts["acknowledged"] == 2
    assert [(one.by_user, one.by_device) for one in group.settlement.acknowledged] == [
        ("bob", "phone"),
        ("dan", "phone"),
    ]


@pytest.mark.parametrize("sole", [(True, True), (True, False), (False, True), (False, False)])
def test_an_acknowledgement_given_twice_counts_once(sole: tuple[bool, bool]) -> None:
    batch: list[Ending] = [ack("bob/phone", IDS[0], sole=one) for one in sole]
    group = planned(batch, document(IDS[0], ["bob/phone"]))
    assert group.counts["acknowledged"] + len(group.sole) == 1
    assert len(group.settlement.acknowledged) == 1
    assert len(group.final) + len(group.sole) == 1
    assert len(group.final_entries) + len(group.sole_entries) == 1


def test_the_first_device_of_a_person_takes_what_waited_for_any_of_theirs() -> None:
    group = planned(
        [ack("cleo/watch", IDS[0]), ack("cleo/phone", IDS[0])], document(IDS[0], ["cleo/*", "dan/phone"])
    )
    assert group.counts["acknowledged"] == 1
    assert [one.by_device for one in group.settlement.acknowledged] == ["watch"]
    assert {key for _, key in group.settlement.released} == {"cleo/watch", "cleo/phone"}


def test_an_acknowledgement_beside_a_removal_still_counts_as_one() -> None:
    group = planned(
        [removal("expired", IDS[0]), ack("bob/phone", IDS[0])],
        document(IDS[0], ["bob/phone", "dan/phone", "cleo/*"]),
    )
    assert group.counts["acknowledged"] == 1
    assert group.counts["expired"] == 2
    assert group.final_entries[0]["fate"] == "expired"
    assert group.final_entries[0]["delivered"] == ["bob"]
    assert set(group.settlement.released) == {
        (IDS[0], "bob/phone"),
        (IDS[0], "dan/phone"),
        (IDS[0], "cleo/*"),
    }


def test_of_two_removals_the_first_is_the_fate() -> None:
    group = planned(
        [removal("withdrawn", IDS[0]), removal("expired", IDS[0])], document(IDS[0], ["bob/phone"])
    )
    assert group.counts["withdrawn"] == 1
    assert group.counts["expired"] == 0
    assert [entry["fate"] for entry in group.final_entries] == ["withdrawn"]


def test_an_acknowledgement_by_a_stranger_changes_nothing() -> None:
    group = planned([ack("eve/phone", IDS[0])], document(IDS[0], ["bob/phone"]))
    assert group.final == {}
    assert group.updates == []
    assert group.settlement.acknowledged == []
    assert group.counts == dict.fromkeys(group.counts, 0)


def test_what_is_gone_gives_its_credit_back() -> None:
    group = planned([ack("bob/phone", *IDS)])
    assert group.settlement.released == [(doc_id, "bob/phone") for doc_id in IDS]
    assert group.final == {}
    assert group.final_entries == []


def test_a_leftover_is_deleted_by_whoever_acknowledges_it_again() -> None:
    left = document(IDS[0], [], deliveredTo=[{"user": "bob", "device": "phone", "at": 1}])
    group = planned([ack("bob/phone", IDS[0])], left)
    assert group.final == {IDS[0]: 100}
    assert group.final_entries[0]["delivered"] == ["bob"]
    assert group.counts["acknowledged"] == 0


def test_a_release_that_leaves_others_waiting_only_shrinks() -> None:
    group = planned([release(["bob/phone", "bob/*"], IDS[0])], document(IDS[0], ["bob/phone", "dan/phone"]))
    assert group.final == {}
    assert group.shrunk == [IDS[0]]
    assert group.counts["released"] == 1
    assert group.settlement.released == [(IDS[0], "bob/phone")]
    assert group.settlement.acknowledged == []


def test_what_nobody_got_before_its_last_mailbox_was_released_is_released() -> None:
    group = planned(
        [release(["bob/phone", "bob/laptop"], IDS[0])], document(IDS[0], ["bob/phone", "bob/laptop"])
    )
    assert group.final == {IDS[0]: 100}
    assert (group.final_entries[0]["fate"], group.final_entries[0]["delivered"]) == ("released", [])
    assert group.counts["released"] == 2


@pytest.mark.parametrize("how", ["before", "beside"])
def test_what_somebody_got_is_delivered_when_the_last_mailbox_is_released(how: str) -> None:
    got = [{"user": "dan", "device": "phone", "at": 1}]
    before = document(IDS[0], ["bob/phone"], deliveredTo=got)
    beside = document(IDS[0], ["bob/phone", "dan/phone"])
    batch: list[Ending] = [release(["bob/phone"], IDS[0])]
    group = planned(
        batch if how == "before" else [*batch, ack("dan/phone", IDS[0])],
        before if how == "before" else beside,
    )
    assert group.final == {IDS[0]: 100}
    assert (group.final_entries[0]["fate"], group.final_entries[0]["delivered"]) == ("delivered", ["dan"])
    assert group.counts["released"] == 1


def test_what_is_acknowledged_and_released_at_once_is_acknowledged() -> None:
    group = planned(
        [release(["bob/phone"], IDS[0]), ack("bob/phone", IDS[0])], document(IDS[0], ["bob/phone"])
    )
    assert (group.counts["acknowledged"], group.counts["released"]) == (1, 0)
    assert [(one["fate"], one["delivered"]) for one in group.final_entries] == [("delivered", ["bob"])]


def test_a_release_of_mailboxes_that_do_not_wait_changes_nothing() -> None:
    group = planned([release(["eve/phone"], IDS[0], IDS[1])], document(IDS[0], ["bob/phone"]))
    assert (group.final, group.updates, group.settlement.released) == ({}, [], [])
    assert group.counts == dict.fromkeys(group.counts, 0)


def test_the_only_recipients_acknowledgement_beside_a_release_is_looked_at_first() -> None:
    group = planned(
        [ack("bob/phone", IDS[0], sole=True), release(["bob/phone"], IDS[0])], document(IDS[0], ["bob/phone"])
    )
    assert not group.sole
    assert group.counts["acknowledged"] + group.counts["released"] == 1
    assert len(group.final_entries) == 1


def test_a_removal_beside_a_release_is_the_fate() -> None:
    group = planned(
        [removal("withdrawn", IDS[0]), release(["bob/phone"], IDS[0])],
        document(IDS[0], ["bob/phone", "dan/phone"]),
    )
    assert (group.counts["withdrawn"], group.counts["released"]) == (1, 1)
    assert [one["fate"] for one in group.final_entries] == ["withdrawn"]


def test_a_fate_has_no_content() -> None:
    entry = entry_of(document(IDS[0], [], body="secret", sealed=[]), "expired", ["bob"])
    assert set(entry) == {"id", "sender", "seq", "at", "fate", "delivered"}


@dataclass
class Model:
    """Takes endings one after the other; a release takes effect after all acknowledgements of its group, a removal after
    all releases."""

    awaiting: dict[str, set[str]]
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0) | {"acknowledged": 0})
    touched: set[str] = field(default_factory=set)
    got: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)

    def apply(self, batch: list[Ending]) -> None:
        for ending in batch:
            if isinstance(ending, Ack):
                for doc_id in ending.messages:
                    waiting = self.awaiting.get(doc_id, set())
                    taken = waiting & {ending.key, f"{ending.user}/*"}
                    waiting -= taken
                    self.counts["acknowledged"] += len(taken)
                    if taken:
                        self.touched.add(doc_id)
                        self.got.add(doc_id)
        dropped: set[str] = set()
        for ending in batch:
            if isinstance(ending, Release):
                for doc_id in ending.doc_ids:
                    waiting = self.awaiting.get(doc_id, set())
                    taken = waiting & set(ending.keys)
                    waiting -= taken
                    self.counts["released"] += len(taken)
                    if taken:
                        self.touched.add(doc_id)
                        dropped.add(doc_id)
        removed = {doc_id for one in batch if isinstance(one, Removal) for doc_id in one.doc_ids}
        for doc_id in dropped - self.got - removed:
            if not self.awaiting[doc_id]:
                self.ended[doc_id] = "released"
        for ending in batch:
            if isinstance(ending, Removal):
                for doc_id in ending.doc_ids:
                    waiting = self.awaiting.get(doc_id, set())
                    self.counts[ending.fate] += len(waiting)
                    waiting.clear()
                    if doc_id in self.awaiting:
                        self.ended.setdefault(doc_id, ending.fate)


acks = st.builds(
    lambda key, ids: ack(key, *ids), st.sampled_from(DEVICES), st.lists(st.sampled_from(IDS), unique=True)
)
removals = st.builds(
    lambda fate, ids: removal(fate, *ids), st.sampled_from(FATES), st.lists(st.sampled_from(IDS), unique=True)
)
releases = st.builds(
    lambda keys, ids: release(keys, *ids),
    st.lists(st.sampled_from(KEYS), unique=True),
    st.lists(st.sampled_from(IDS), unique=True),
)
mailboxes = st.dictionaries(st.sampled_from(IDS), st.lists(st.sampled_from(KEYS), unique=True, min_size=1))


@given(mailboxes=mailboxes, batch=st.lists(acks | acks | releases | removals, max_size=12))
def test_a_group_does_what_its_endings_would_do_one_after_the_other(
    mailboxes: dict[str, list[str]], batch: list[Ending]
) -> None:
    documents = {doc_id: document(doc_id, list(awaiting)) for doc_id, awaiting in mailboxes.items()}
    model = Model({doc_id: set(awaiting) for doc_id, awaiting in mailboxes.items()})
    model.apply(batch)
    group = planned(batch, *documents.values())
    named = {doc_id for one in batch for doc_id in (one.messages if isinstance(one, Ack) else one.doc_ids)}

    assert set(group.final) == {doc_id for doc_id in named & set(mailboxes) if not model.awaiting[doc_id]}
    assert {doc_id: documents[doc_id]["seq"] for doc_id in group.final} == group.final
    assert set(group.shrunk) == model.touched - set(group.final)
    assert len(group.updates) == len(group.shrunk)
    assert group.counts == {name: count for name, count in model.counts.items() if name != "delivered"}
    assert {entry["id"]: entry["fate"] for entry in group.final_entries} == {
        doc_id: model.ended.get(doc_id, "delivered") for doc_id in group.final
    }
    pairs = [(one.doc_id, one.by_user, one.by_device) for one in group.settlement.acknowledged]
    assert len(pairs) == len(set(pairs)) == model.counts["acknowledged"]
    # Credit comes back for all that was acknowledged and for all who need not wait any more.
    released = set(group.settlement.released)
    for one in batch:
        if isinstance(one, Ack):
            assert {(doc_id, one.key) for doc_id in one.messages} <= released
    for doc_id in model.ended:
        for key in mailboxes[doc_id]:
            user = key.partition("/")[0]
            assert any(found == doc_id and name.partition("/")[0] == user for found, name in released)


@given(mailboxes=mailboxes, batch=st.lists(acks | releases | removals, max_size=8))
def test_every_message_is_read_first_unless_its_only_recipient_ends_it(
    mailboxes: dict[str, list[str]], batch: list[Ending]
) -> None:
    documents = {doc_id: document(doc_id, list(awaiting)) for doc_id, awaiting in mailboxes.items()}
    group = planned(batch, *documents.values())
    assert set(group.final) | set(group.shrunk) <= set(group.read)
    assert not set(group.sole) & set(group.read)
    looked = EndingGroup(batch, lambda _: True)
    assert not looked.sole
    assert set(looked.read) == set(group.read) | set(group.sole)


@pytest.mark.parametrize(
    ("fate", "delivered", "trimmed", "told"),
    [
        ("delivered", [], 1, "trimmed"),
        ("delivered", ["bob"], 1, "delivered"),
        ("delivered", [], 0, "delivered"),
        ("withdrawn", [], 1, "withdrawn"),
        ("expired", [], 2, "expired"),
    ],
)
def test_what_nobody_had_room_for_is_trimmed(
    fate: Fate, delivered: list[str], trimmed: int, told: Fate
) -> None:
    fields = {"trimmed": trimmed} if trimmed else {}
    assert entry_of(document("talk 1", [], **fields), fate, delivered)["fate"] == told


def test_the_fate_keeps_who_looks_as_if_they_waited() -> None:
    assert entry_of(document("talk 1", [], trimmed=1, silent=["bob"]), "delivered", ())["silent"] == ["bob"]
    assert "silent" not in entry_of(document("talk 1", []), "delivered", ())


def test_who_acknowledged_quietly_had_room_and_looks_as_if_they_waited_while_somebody_else_does() -> None:
    quiet = [{"user": "bob", "device": "phone", "at": 1, "quiet": True}]
    for entry in (
        entry_of(document("talk 1", [], trimmed=1, deliveredTo=quiet), "delivered", ()),
        entry_of(document("talk 1", [], trimmed=1), "delivered", (), ["bob"]),
    ):
        assert (entry["fate"], entry["delivered"], entry.get("silent")) == ("delivered", [], None)
    waiting = document("talk 1", [], trimmed=1, silent=["dan"], deliveredTo=quiet)
    entry = entry_of(waiting, "delivered", ["cleo"], ["ann", "cleo"])
    assert (entry["delivered"], entry["silent"]) == (["cleo"], ["bob", "dan"])
