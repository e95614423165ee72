"""The live side of the device: read marks that survive a reconnect, typing, watch lists, and what comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.client import Device, Live, Presence, ReadCursor, Typing
from relay.client.parsing import live_of
from relay.client.wishes import MOST_READS, Wishes
from relay.wire import codec
from tests.unit.client.peer import Peer
from tests.unit.client.test_device import ANN, FAST, Log

FEATURES = ["read", "typing", "presence"]


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer({"c1": [ANN, "bob/one"]}) as running:
        running.features = list(FEATURES)
        yield running


def device(peer: Peer, path: Path, log: Log) -> Device:
    return Device(
        peer.url,
        path,
        lambda: ANN,
        on_message=log.messages.append,
        on_event=log.events.append,
        tuning=FAST,
    )


def fields(operation: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in operation.items() if name != "ref"}


async def test_reading_typing_and_watching_are_told_and_come_in_typed(peer: Peer, tmp_path: Path) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
        await ann.read("c1", 7)
        await ann.typing("c1")
        await ann.typing("c1", False)
        await ann.watch(["bob"])
        await peer.until(lambda: len(peer.sent("presence")) == 1)
        assert [fields(one) for one in peer.sent("read")] == [{"t": "read", "conv": "c1", "upTo": 7}]
        assert [one["on"] for one in peer.sent("typing")] == [True, False]
        assert [one["users"] for one in peer.sent("presence")] == [["bob"]]
        await peer.push(
            ANN,
            {"t": "read", "conv": "c1", "user": "bob", "upTo": 7, "at": 8},
            {"t": "typing", "conv": "c1", "user": "bob", "on": True, "more": 1},
            {"t": "presence", "user": "bob", "online": True, "lastSeen": None},
            {"t": "presence", "user": 5},
            {"t": "newer", "x": 1},
        )
        await peer.post("c1", "m1", "hello")
        await peer.until(lambda: len(peer.sent("ack")) == 1)
    assert log.of(ReadCursor) == [ReadCursor("c1", "bob", 7, 8)]
    assert log.of(Typing) == [Typing("c1", "bob", True)]
    assert log.of(Presence) == [Presence("bob", True, None)]
    assert [one.frame["t"] for one in log.of(Live)] == ["presence", "newer"]


async def test_what_was_not_confirmed_is_told_again_on_the_next_connection(
    peer: Peer, tmp_path: Path
) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.read("c1", 5)
        await ann.watch(["bob", "cleo"])
        await ann.drained()
        await peer.until(lambda: len(peer.sent("read")) == 1)
        await ann.read("c1", 9)
        await peer.until(lambda: len(peer.sent("read")) == 2)
        await peer.push(ANN, {"t": "done", "ref": peer.sent("read")[0]["ref"]})
        await peer.drop(ANN, 1012)
        await peer.until(lambda: len(peer.sent("read")) == 3)
        assert [one["upTo"] for one in peer.sent("read")] == [5, 9, 9]
        await peer.until(lambda: len(peer.sent("presence")) == 2)
        await peer.push(ANN, {"t": "done", "ref": peer.sent("read")[2]["ref"]})
        await peer.post("c1", "m1", "hello")
        await peer.until(lambda: len(peer.sent("ack")) == 1)
        await peer.drop(ANN, 1012)
        await peer.until(lambda: len(peer.sent("presence")) == 3)
        assert len(peer.sent("read")) == 3
    assert log.of(Live) == []


async def test_a_refused_live_operation_does_not_hold_messages_back(peer: Peer, tmp_path: Path) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
        await ann.typing("c1")
        await peer.until(lambda: len(peer.sent("typing")) == 1)
        refusal = {"t": "error", "code": "rate_limited", "message": "", "retry": True, "retryAfter": 60_000}
        await peer.push(ANN, refusal | {"conv": "c1", "ref": peer.sent("typing")[0]["ref"]})
        await peer.post("c1", "m1", "hello")
        await peer.until(lambda: len(peer.sent("ack")) == 1)
        await ann.send("c1", "hello")
        await ann.settled()
    assert [one.frame["code"] for one in log.of(Live)] == ["rate_limited"]


async def test_a_relay_without_these_features_is_told_nothing(peer: Peer, tmp_path: Path) -> None:
    peer.features = []
    async with device(peer, tmp_path / "d", Log()) as ann:
        await ann.drained()
        await ann.read("c1", 7)
        await ann.typing("c1")
        await ann.watch(["bob"])
        await ann.send("c1", "hello")
        await ann.settled()
    assert peer.sent("read") == peer.sent("typing") == peer.sent("presence") == []


def test_only_the_furthest_mark_is_told_and_what_is_kept_is_bounded() -> None:
    wishes = Wishes()
    wishes.connected(FEATURES)
    assert [len(wishes.read("c", up_to)) for up_to in (5, 5, 4, 6)] == [1, 0, 0, 1]
    for number in range(MOST_READS + 5):
        wishes.read(f"c{number}", 1)
    again = wishes.connected(FEATURES)
    assert len(again) == MOST_READS
    assert codec.loads(again[-1])["conv"] == f"c{MOST_READS + 4}"
    for wrong in (-1, 1 << 53, True, 1.5, "5"):
        with pytest.raises(ValueError, match="seq"):
            wishes.read("c", wrong)  # type: ignore[arg-type]


def test_a_mark_refused_for_good_is_forgotten_and_another_kept() -> None:
    wishes = Wishes()
    wishes.connected(FEATURES)
    for conv, retry in (("gone", False), ("busy", True)):
        ref = codec.loads(wishes.read(conv, 5)[0])["ref"]
        assert wishes.answered({"t": "error", "ref": ref, "code": "x", "retry": retry})
    assert [codec.loads(text)["conv"] for text in wishes.connected(FEATURES)] == ["busy"]
    assert not wishes.answered({"t": "error", "ref": "somebody else's"})
    assert not wishes.answered({"t": "done"})


@pytest.mark.parametrize(
    "frame",
    [
        {},
        {"t": "read", "conv": "c", "user": "u"},
        {"t": "read", "conv": 5, "user": "u", "upTo": 5},
        {"t": "typing", "conv": "c", "user": "u", "on": 1},
        {"t": "typing", "conv": "c", "user": None, "on": True},
        {"t": "presence", "user": "u", "online": "yes"},
        {"t": "later", "conv": "c", "user": "u"},
    ],
)
def test_a_frame_that_lacks_something_is_no_event(frame: dict[str, Any]) -> None:
    assert live_of(frame) is None
