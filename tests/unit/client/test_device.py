"""The device against a relay that loses replies, closes, refuses and repeats itself."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from relay.client import (
    Device,
    Disconnected,
    Draft,
    Drained,
    Event,
    Failed,
    InvalidMessage,
    Live,
    Message,
    NewConversation,
    Receipt,
    Replaced,
    RequestFailed,
    Stopped,
    Storage,
    TokenRefused,
    Tuning,
    WrongDatabase,
)
from relay.wire import ids
from tests.unit.client.peer import Operation, Peer

ANN = "ann/phone"
FAST = Tuning(backoff=(0.01, 0.05), connect=5, answer=5)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with Peer({"c1": [ANN, "bob/one"], "c2": [ANN, "bob/one"]}) as running:
        yield running


class Log:
    """What a device's callbacks were told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.events: list[Event] = []

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def device(
    peer: Peer,
    path: Path,
    log: Log | None = None,
    token: str | Callable[[], str] = ANN,
    tuning: Tuning = FAST,
) -> Device:
    told = log or Log()
    give = token if callable(token) else lambda: token
    return Device(
        peer.url, path, give, on_message=told.messages.append, on_event=told.events.append, tuning=tuning
    )


async def lines(storage: Storage, conv: str = "c1") -> list[tuple[int | None, str, Any, str]]:
    return [(item.seq, item.id, item.body, item.user) for item in await storage.history(conv)]


async def test_a_message_is_stored_and_settles(peer: Peer, tmp_path: Path) -> None:
    async with device(peer, tmp_path / "d") as ann:
        message = await ann.send("c1", "hello", ttl=60)
        await ann.settled()
        (sent,) = peer.sent("send")
        assert (sent["id"], sent["body"], sent["ttl"], "again" in sent) == (message, "hello", 60, False)
        assert [(item.id, item.state) for item in await ann.storage.history("c1")] == [(message, "stored")]


async def test_a_message_whose_reply_was_lost_is_sent_again_under_the_same_id(
    peer: Peer, tmp_path: Path
) -> None:
    peer.lose_replies = 1
    async with device(peer, tmp_path / "d") as ann:
        message = await ann.send("c1", "hello")
        await ann.settled()
    assert [(sent["id"], sent.get("again", False)) for sent in peer.sent("send")] == [
        (message, False),
        (message, True),
    ]
    assert len(peer.messages) == 1


async def test_messages_are_sent_in_the_order_they_were_queued_also_before_there_was_a_relay(
    tmp_path: Path,
) -> None:
    async with Peer({"c1": [ANN]}) as gone:
        port = gone.port
    absent = Peer({"c1": [ANN]}, port=port)
    async with device(absent, tmp_path / "d") as ann:
        sent = [await ann.send("c1", str(number)) for number in range(5)]
        sent += [await ann.send("c2", "x")]
        absent.members["c2"] = [ANN]
        async with absent:
            await ann.settled()
            assert [operation["id"] for operation in absent.sent("send")] == sent


async def test_a_new_process_continues_the_outbox_and_says_again(peer: Peer, tmp_path: Path) -> None:
    peer.hold_replies = True
    async with device(peer, tmp_path / "d") as ann:
        message = await ann.send("c1", "hello")
        await peer.until(lambda: bool(peer.sent("send")))
    peer.hold_replies = False
    async with device(peer, tmp_path / "d") as ann:
        await ann.settled()
    assert [(sent["id"], sent.get("again", False)) for sent in peer.sent("send")] == [
        (message, False),
        (message, True),
    ]


async def test_a_received_message_is_on_disk_before_it_is_acknowledged(peer: Peer, tmp_path: Path) -> None:
    rows_at_ack: list[int] = []

    def look(operation: Operation) -> Operation | None:
        if operation["t"] == "ack":
            with sqlite3.connect(f"file:{tmp_path / 'd'}?mode=ro", uri=True) as reader:
                rows_at_ack.append(reader.execute("SELECT count(*) FROM messages").fetchone()[0])
        return None

    peer.answer = look
    for number in range(3):
        await peer.post("c1", ids.new_id(), f"m{number}")
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
    assert rows_at_ack == [3]
    assert [item.body for item in log.messages] == ["m0", "m1", "m2"]
    assert log.of(Drained) == [Drained(3)]
    assert log.of(NewConversation) == [NewConversation("c1")]
    assert peer.waiting[ANN] == {}


async def test_a_redelivered_message_is_acknowledged_again_and_shown_once(peer: Peer, tmp_path: Path) -> None:
    message, log = ids.new_id(), Log()
    await peer.post("c1", message, "hello")
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
        await peer.push(
            ANN,
            {
                "t": "msg",
                "id": message,
                "conv": "c1",
                "seq": 5000,
                "from": {"user": "bob", "device": "one"},
                "kind": "text",
                "body": "hello",
                "at": 1,
            },
        )
        await peer.until(lambda: len(peer.sent("ack")) == 2)
        assert [item[0] for item in await lines(ann.storage)] == [5000]
    assert [ack["ids"] for ack in peer.sent("ack")] == [[message], [message]]
    assert len(log.messages) == 1


async def test_an_acknowledgement_names_at_most_a_thousand_ids(peer: Peer, tmp_path: Path) -> None:
    held = [ids.new_id() for _ in range(2500)]
    message = {
        "t": "msg",
        "conv": "c1",
        "from": {"user": "bob", "device": "one"},
        "kind": "text",
        "body": "",
        "at": 1,
    }
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
        await peer.push(ANN, *({**message, "id": one, "seq": 10 + number} for number, one in enumerate(held)))
        await peer.until(lambda: sum(len(ack["ids"]) for ack in peer.sent("ack")) == 2500)
    assert [len(ack["ids"]) for ack in peer.sent("ack")] == [1000, 1000, 500]
    assert [one for ack in peer.sent("ack") for one in ack["ids"]] == held


async def test_frames_keep_to_the_limits_of_the_welcome(peer: Peer, tmp_path: Path) -> None:
    peer.limits = {"frame": 2048, "ops": 5, "body": 1000}
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.queue([Draft("c1", ids.new_id(), "ü" * (number % 7) * 50) for number in range(60)])
        large = await ann.send("c1", "x" * 3000)
        for _ in range(120):
            await peer.post("c1", ids.new_id(), "x")
        await ann.settled()
        await peer.until(lambda: not peer.waiting[ANN])
    assert len(peer.sent("send")) == 60
    assert max(operations for _, operations, _ in peer.frames) == 5
    assert max(size for *_, size in peer.frames) <= 2048
    assert [(failed.id, failed.code) for failed in log.of(Failed)] == [(large, "too_large")]


async def test_at_most_64_messages_are_unanswered(peer: Peer, tmp_path: Path) -> None:
    peer.hold_replies = True
    async with device(peer, tmp_path / "d") as ann:
        await ann.queue([Draft("c1", ids.new_id(), "x") for _ in range(200)])
        await peer.until(lambda: len(peer.sent("send")) >= 64)
        await asyncio.sleep(0.1)
        assert len(peer.sent("send")) == 64
        assert ann.queued == 200


async def test_a_replaced_device_stops_with_a_typed_error_and_never_reconnects(
    peer: Peer, tmp_path: Path
) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
        await peer.drop(ANN, 4409)
        with pytest.raises(Replaced):
            await asyncio.wait_for(ann.stopped(), 5)
        with pytest.raises(Replaced):
            await ann.drained()
        await asyncio.sleep(0.2)
        assert len(peer.connects) == 1
    assert isinstance(log.of(Stopped)[0].error, Replaced)


async def test_an_expired_token_is_renewed_once_and_the_connection_goes_on(
    peer: Peer, tmp_path: Path
) -> None:
    given = iter([ANN, f"{ANN}+new"])
    async with device(peer, tmp_path / "d", token=lambda: next(given)) as ann:
        await ann.drained()
        peer.refuse_tokens.add(ANN)
        await peer.drop(ANN, 4401)
        await peer.until(lambda: len(peer.tokens) == 2)
        await ann.send("c1", "still here")
        await ann.settled()
    assert peer.tokens == [ANN, f"{ANN}+new"]


async def test_a_token_refused_twice_stops_the_device(peer: Peer, tmp_path: Path) -> None:
    peer.refuse_tokens.add(ANN)
    async with device(peer, tmp_path / "d") as ann:
        with pytest.raises(TokenRefused):
            await asyncio.wait_for(ann.stopped(), 5)
    assert len(peer.tokens) == 2


async def test_a_bye_is_obeyed_to_the_millisecond_it_names(peer: Peer, tmp_path: Path) -> None:
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
        told = asyncio.get_running_loop().time()
        await peer.push(ANN, {"t": "bye", "retryAfter": 400})
        await peer.drop(ANN, 1012)
        await peer.until(lambda: len(peer.connects) == 2)
        assert 0.4 <= peer.connects[1][1] - told < 0.8


async def test_a_closed_connection_comes_back_with_backoff(peer: Peer, tmp_path: Path) -> None:
    log = Log()
    peer.close_on_connect = [1012, 1012, 4429]
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
    assert [event.code for event in log.of(Disconnected)] == [1012, 1012, 4429]
    assert all(0.01 <= event.retry_in <= 0.05 for event in log.of(Disconnected))


async def test_a_retryable_error_is_tried_again_after_the_time_it_names_and_others_go_on(
    peer: Peer, tmp_path: Path
) -> None:
    refusals: list[float] = []
    loop = asyncio.get_running_loop()

    def refuse(operation: Operation) -> Operation | None:
        if operation["t"] == "send" and operation["conv"] == "c1" and not refusals:
            refusals.append(loop.time())
            return {
                "t": "error",
                "code": "mailbox_full",
                "message": "their mailbox is full",
                "retry": True,
                "retryAfter": 300,
                "id": operation["id"],
                "conv": "c1",
            }
        return None

    peer.answer = refuse
    async with device(peer, tmp_path / "d") as ann:
        first = await ann.send("c1", "one")
        await peer.until(lambda: bool(refusals))
        await ann.send("c2", "other")
        await ann.room(2)
        assert loop.time() - refusals[0] < 0.25
        await ann.settled()
        assert loop.time() - refusals[0] >= 0.3
    attempts = [(sent["id"], sent.get("again", False)) for sent in peer.sent("send") if sent["conv"] == "c1"]
    assert attempts == [(first, False), (first, True)]


async def test_a_wait_that_ends_while_the_storage_is_slow_is_not_missed(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    read = Storage.waiting

    async def slow(storage: Storage, *wanted: Any) -> Any:
        found = await read(storage, *wanted)
        if wanted[-1]:
            await asyncio.sleep(0.2)
        return found

    def refuse(operation: Operation) -> Operation | None:
        nonlocal refused
        if operation["t"] != "send" or refused:
            return None
        refused += 1
        code = {"code": "mailbox_full", "message": "their mailbox is full", "retry": True, "retryAfter": 100}
        return {"t": "error", "id": operation["id"], "conv": operation["conv"], **code}

    monkeypatch.setattr(Storage, "waiting", slow)
    peer.answer = refuse
    async with device(peer, tmp_path / "d") as ann:
        await ann.send("c1", "one")
        await asyncio.wait_for(ann.settled(), 5)


async def test_a_device_that_sends_too_fast_is_silent_as_long_as_it_is_told_and_keeps_its_order(
    peer: Peer, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    began, taken = loop.time(), 0
    silent_until = 0.0
    early: list[Operation] = []

    def refuse(operation: Operation) -> Operation | None:
        nonlocal taken, silent_until
        if operation["t"] != "send":
            return None
        if loop.time() >= silent_until and taken < 10:
            taken += 1
            return None
        if taken == 10:
            taken, silent_until = 0, loop.time() + 0.2
        elif loop.time() > silent_until - 0.1:
            early.append(operation)
        return {
            "t": "error",
            "code": "rate_limited",
            "message": "too many messages",
            "retry": True,
            "retryAfter": int(1000 * (silent_until - loop.time())) + 1,
            "id": operation["id"],
            "conv": operation["conv"],
        }

    peer.answer = refuse
    async with device(peer, tmp_path / "d") as ann:
        sent = [await ann.send("c1" if number % 3 else "c2", str(number)) for number in range(50)]
        await ann.settled()
        assert 0.8 <= loop.time() - began < 4
        assert early == []
        for conv in ("c1", "c2"):
            stored = [item.id for item in await ann.storage.history(conv)]
            assert stored == [one for number, one in enumerate(sent) if (number % 3 != 0) == (conv == "c1")]
    assert len(peer.sent("send")) < 50 + 5 * 64


async def test_a_final_error_fails_that_message_alone_and_tells_why(peer: Peer, tmp_path: Path) -> None:
    log = Log()

    def refuse(operation: Operation) -> Operation | None:
        if operation.get("body") == "bad":
            return {
                "t": "error",
                "code": "blocked",
                "message": "you blocked them",
                "retry": False,
                "id": operation["id"],
                "conv": "c1",
            }
        return None

    peer.answer = refuse
    async with device(peer, tmp_path / "d", log) as ann:
        sent = [await ann.send("c1", body) for body in ("good", "bad", "fine")]
        await ann.settled()
        assert [item.id for item in await ann.storage.history("c1")] == [sent[0], sent[2]]
        assert [(item.id, item.state, item.error) for item in await ann.storage.unsent("c1")] == [
            (sent[1], "failed", "blocked")
        ]
    assert log.of(Failed) == [Failed("c1", sent[1], "blocked", "you blocked them")]


async def test_an_error_about_nothing_in_particular_is_told_and_harms_nothing(
    peer: Peer, tmp_path: Path
) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        await ann.drained()
        await peer.push(
            ANN,
            {"t": "error", "code": "bad_request", "message": "odd", "retry": False},
            {"t": "later", "x": 1},
        )
        await ann.send("c1", "x")
        await ann.settled()
    assert [event.frame["t"] for event in log.of(Live)] == ["error", "later"]


async def test_kinds_bodies_and_fields_never_heard_of_are_stored_and_acknowledged(
    peer: Peer, tmp_path: Path
) -> None:
    deep: Any = "x"
    for _ in range(40):
        deep = {"d": deep}
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
        base = {
            "t": "msg",
            "conv": "c1",
            "at": 1,
            "kind": "hologram",
            "from": {"user": "bob", "device": "one"},
        }
        odd = [
            {**base, "id": ids.new_id(), "seq": 1, "body": deep, "future": [1]},
            {**base, "id": ids.new_id(), "seq": 2, "body": 5},
            {"t": "msg", "conv": "c1", "id": ids.new_id(), "seq": 3},
            {"t": "msg", "conv": "c1"},
        ]
        await peer.push(ANN, *odd)
        await peer.until(lambda: bool(peer.sent("ack")))
        assert peer.sent("ack")[0]["ids"] == [item["id"] for item in odd[:3]]
        held = await ann.storage.history("c1")
        assert (held[0].body, held[0].extra) == (deep, {"future": [1]})


async def test_receipts_are_recorded(peer: Peer, tmp_path: Path) -> None:
    log = Log()
    async with device(peer, tmp_path / "d", log) as ann:
        message = await ann.send("c1", "x")
        await ann.settled()
        await peer.push(
            ANN,
            {
                "t": "receipt",
                "conv": "c1",
                "ids": [message],
                "by": {"user": "bob", "device": "one"},
                "at": 77,
            },
        )
        await peer.push(ANN, {"t": "ping-me-not"})
        while not log.of(Receipt):
            await asyncio.sleep(0.01)
        assert await ann.storage.receipts("c1", message) == [("bob", "one", 77)]


async def test_after_names_the_highest_seq_held_when_the_message_was_written(
    peer: Peer, tmp_path: Path
) -> None:
    async with device(peer, tmp_path / "d") as ann:
        await peer.post("c1", ids.new_id(), "from the future", seq=9_000_000)
        await peer.until(lambda: bool(peer.sent("ack")))
        await ann.send("c1", "answer")
        await ann.settled()
        history = [item.body for item in await ann.storage.history("c1")]
    assert peer.sent("send")[0]["after"] == 9_000_000
    assert history == ["from the future", "answer"]


async def test_a_silent_relay_is_pinged_and_left_after_two_heartbeats(peer: Peer, tmp_path: Path) -> None:
    peer.heartbeat = 100
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
        await peer.until(lambda: len(peer.sent("ping")) >= 3)
        assert len(peer.connects) == 1
        peer.mute = True
        await peer.until(lambda: len(peer.connects) == 2)


async def test_a_message_left_unanswered_is_sent_again_on_a_new_connection(
    peer: Peer, tmp_path: Path
) -> None:
    peer.hold_replies = True
    async with device(peer, tmp_path / "d", tuning=Tuning(backoff=(0.01, 0.05), answer=0.2)) as ann:
        await ann.send("c1", "x")
        await peer.until(lambda: len(peer.connects) == 2)
        peer.hold_replies = False
        await ann.settled()


async def test_a_callback_that_raises_stops_nothing(peer: Peer, tmp_path: Path) -> None:
    def angry(_: object) -> None:
        raise RuntimeError("application's own fault")

    await peer.post("c1", ids.new_id(), "hello")
    async with Device(
        peer.url, tmp_path / "d", lambda: ANN, on_message=angry, on_event=angry, tuning=FAST
    ) as ann:
        await ann.drained()
        assert len(await ann.storage.history("c1")) == 1


async def test_what_can_never_be_sent_is_refused_at_once(peer: Peer, tmp_path: Path) -> None:
    async with device(peer, tmp_path / "d") as ann:
        for body in ("lone \ud800", {"x": float("nan")}, {"x": 1 << 60}, {"x": object()}):
            with pytest.raises(InvalidMessage):
                await ann.send("c1", body)
        with pytest.raises(InvalidMessage):
            await ann.send("no spaces", "x")
        with pytest.raises(InvalidMessage):
            await ann.send("c1", "x", kind="Text")
        assert ann.queued == 0


async def test_the_database_of_another_device_is_not_sent_under_this_name(peer: Peer, tmp_path: Path) -> None:
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
    async with device(peer, tmp_path / "d", token="bob/one") as bob:
        await bob.send("c1", "as whom?")
        with pytest.raises(WrongDatabase):
            await asyncio.wait_for(bob.settled(), 5)
    assert peer.sent("send") == []


async def test_requests_carry_the_token_and_renew_it_once(peer: Peer, tmp_path: Path) -> None:
    given = iter([ANN, f"{ANN}+new", f"{ANN}+newer"])
    async with device(peer, tmp_path / "d", token=lambda: next(given)) as ann:
        await ann.drained()
        peer.refuse_tokens.add(ANN)
        answer = await ann.request("POST", "/v1/conversations", {"type": "direct", "members": ["bob"]})
        assert answer["id"] == "c-ann-bob"
        with pytest.raises(RequestFailed) as caught:
            await ann.request("GET", "/v1/nothing")
        assert (caught.value.status, caught.value.retry) == (404, False)


async def test_both_histories_agree_line_for_line_after_a_conversation_with_faults(
    peer: Peer, tmp_path: Path
) -> None:
    async with device(peer, tmp_path / "a") as ann, device(peer, tmp_path / "b", token="bob/one") as bob:
        await asyncio.gather(ann.drained(), bob.drained())

        async def talk(one: Device) -> None:
            for number in range(40):
                message = await one.send("c1", {"n": number})
                if number % 10 == 9:
                    await one.withdraw("c1", message)

        async def disturb() -> None:
            for round_ in range(6):
                peer.lose_replies = round_ % 2
                for key in list(peer.lines):
                    await peer.drop(key, 1012)
                await asyncio.sleep(0.03)

        await asyncio.gather(talk(ann), talk(bob), disturb())
        peer.lose_replies = 0
        await asyncio.gather(ann.settled(), bob.settled())
        await peer.until(lambda: not any(peer.waiting.values()))
        of_ann, of_bob = await lines(ann.storage), await lines(bob.storage)
    assert of_ann == of_bob
    assert len(of_ann) == 80
    assert {(user, body["n"]) for _, _, body, user in of_ann if body} == {
        (user, number) for user in ("ann", "bob") for number in range(40) if number % 10 != 9
    }


_SUBPROCESS = """
import asyncio, sys, uuid
from pathlib import Path
from relay.client import Device, Draft, Tuning

async def main():
    async with Device(sys.argv[1], Path(sys.argv[2]), lambda: "ann/phone", tuning=Tuning(backoff=(0.01, 0.05))) as device:
        for start in range(0, 3000, 100):
            await device.queue([
                Draft("c1", str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))), str(number)) for number in range(start, start + 100)
            ])
            await device.room(500)
        await device.settled()

asyncio.run(main())
"""


async def test_a_device_killed_in_mid_pipe_loses_and_doubles_nothing(peer: Peer, tmp_path: Path) -> None:
    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", _SUBPROCESS, peer.url, str(tmp_path / "d")
        )

    for goal in (300, 1200, 2000):
        process = await start()
        await peer.until(lambda goal=goal: len(peer.messages) >= goal)  # type: ignore[misc]
        process.kill()
        await process.wait()
    process = await start()
    assert await process.wait() == 0
    assert sorted(int(message["body"]) for message in peer.messages.values()) == list(range(3000))
    async with Storage(tmp_path / "d") as storage:
        rows, after = [], (-1, "")
        while page := await storage.history("c1", after):
            rows += page
            after = (page[-1].seq or 0, page[-1].id)
        assert await storage.unsent("c1") == []
    assert [(item.id, item.seq) for item in rows] == sorted(
        ((message["id"], message["seq"]) for message in peer.messages.values()),
        key=lambda pair: (pair[1], pair[0]),
    )
    assert json.dumps(sorted(int(str(item.body)) for item in rows)) == json.dumps(list(range(3000)))


async def test_nothing_acknowledged_is_missing_after_a_device_is_killed_while_receiving(
    peer: Peer, tmp_path: Path
) -> None:
    sent = [ids.new_id() for _ in range(3000)]
    for message in sent:
        await peer.post("c1", message, "x")
    for goal in (200, 1500):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _SUBPROCESS, peer.url, str(tmp_path / "d")
        )
        await peer.until(lambda goal=goal: sum(len(ack["ids"]) for ack in peer.sent("ack")) >= goal)  # type: ignore[misc]
        process.kill()
        await process.wait()
        acknowledged = {message for ack in peer.sent("ack") for message in ack["ids"]}
        with sqlite3.connect(tmp_path / "d") as reader:
            held = {row[0] for row in reader.execute("SELECT id FROM messages WHERE state = 'received'")}
        assert acknowledged <= held
    async with device(peer, tmp_path / "d") as ann:
        await ann.drained()
    with sqlite3.connect(tmp_path / "d") as reader:
        held_now = [row[0] for row in reader.execute("SELECT id FROM messages WHERE state = 'received'")]
    assert sorted(held_now) == sorted(sent)
