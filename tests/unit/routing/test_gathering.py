"""What a node has to tell others, sorted by where devices are, in parcels of a bounded size."""

from __future__ import annotations

from relay.routing import hints
from relay.routing.directory import Line
from relay.routing.gathering import Gathered, packed
from relay.routing.hints import Hint, Message, Released, Seen, Told
from relay.wire.envelope import Envelope
from tests.support.backlog import message

LINES = {
    "ann": [Line("phone", "here", 1, False)],
    "bob": [Line("phone", "there", 2, False), Line("tablet", "far", 3, True)],
}


def sort(gathered: Gathered) -> dict[str, list[Hint]]:
    return gathered.sort(LINES, "here")[0]


def test_a_message_goes_once_to_each_node_of_its_devices_and_not_to_ones_own() -> None:
    gathered = Gathered()
    envelope = message(1, "ann/phone", "bob/phone", "bob/tablet", "bob/laptop", "cleo/phone")
    gathered.messages.append((envelope, list(envelope.awaiting)))
    parcels = sort(gathered)
    copies = {node: [one.copies for one in its if isinstance(one, Message)] for node, its in parcels.items()}
    assert copies == {
        "there": [[(envelope.stored_id, ["bob/phone"])]],
        "far": [[(envelope.stored_id, ["bob/tablet"])]],
    }


def test_a_placeholder_is_for_every_device_of_its_user() -> None:
    gathered = Gathered()
    gathered.messages.append((message(1, "bob/*"), ["bob/*"]))
    assert sorted(sort(gathered)) == ["far", "there"]


def test_a_live_frame_goes_to_the_nodes_of_its_users_but_not_for_the_device_that_is_left_out() -> None:
    gathered = Gathered()
    gathered.told += [
        Told("read", "{}", ["ann", "bob"], "bob/phone"),
        Told("keys", "{}", ["bob"], only="bob/phone"),
    ]
    parcels = sort(gathered)
    assert parcels == {
        "far": [Told("read", "{}", ["bob"], "bob/phone")],
        "there": [Told("keys", "{}", ["bob"], None, "bob/phone")],
    }


def test_what_is_too_much_is_not_taken() -> None:
    gathered = Gathered()
    assert gathered.takes(1, 33_000_000)
    assert not gathered.takes(1, 1_000_000)
    assert gathered.takes(199_999, 0) and not gathered.takes(1, 0)


def test_parcels_are_of_a_megabyte_or_a_little_more_whatever_is_in_them() -> None:
    gathered = Gathered()
    gathered.released = [(f"conversation {number:036}", "bob/phone") for number in range(40_000)]
    gathered.seen = {f"user-{number:050}": 1_800_000_000_000 for number in range(40_000)}
    gathered.told = [Told("typing", "x" * 3000, ["bob"])] * 1000
    gathered.messages = [(_sealed(number), ["bob/phone"]) for number in range(1, 8)]
    parcels, for_all = gathered.sort(LINES, "here")
    for its in (parcels["there"], for_all):
        payloads = list(packed("here", 5, its))
        assert max(map(len, payloads)) < 1_700_000
        read = [hint for payload in payloads for hint in hints.decode(payload).hints]
        assert read == its
    pairs = [pair for one in parcels["there"] if isinstance(one, Released) for pair in one.pairs]
    assert pairs == gathered.released
    assert [user for one in for_all if isinstance(one, Seen) for user in one.users] == list(
        gathered.seen.items()
    )
    assert list(packed("here", 5, [])) == []


def _sealed(number: int) -> Envelope:
    found = message(number, "bob/phone")
    found.sealed = {"bob/phone": "c" * 400_000}
    return found
