"""The device's file: order, one row an id, withdrawals, what survives."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from relay.client import (
    Draft,
    Failed,
    Message,
    OutboxFull,
    Receipt,
    Storage,
    StorageError,
    Stored,
    WrongDatabase,
)
from relay.client.database import Incoming
from relay.client.packing import encode
from relay.wire import ids


def message(
    number: int, seq: int, body: str = "x", *, user: str = "bob", conv: str = "c1", **more: Any
) -> Message:
    fields: dict[str, Any] = {"device": "one", "kind": "text", "at": 5, **more}
    return Message(conv=conv, id=uid(number), seq=seq, user=user, body=body, **fields)


def withdrawal(number: int, seq: int, of: int, user: str = "bob") -> Message:
    return message(number, seq, "", user=user, kind="withdrawn", reply_to=uid(of))


def uid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


async def receive(storage: Storage, *messages: Message) -> list[str]:
    done = await storage.commit(Incoming(messages=list(messages)))
    return [item.id for item in done.messages]


async def enqueue(storage: Storage, *drafts: Draft, limit: int = 100) -> int:
    return await storage.enqueue([(draft, encode(draft)) for draft in drafts], 7, limit)


async def test_a_conversation_is_ordered_by_seq_and_then_by_id(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, message(3, 20), message(9, 10), message(1, 20), message(2, 5, conv="c2"))
        assert [item.id for item in await storage.history("c1")] == [uid(9), uid(1), uid(3)]


async def test_pages_of_the_history_join_without_gap_or_repetition(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, *(message(number, 10 + number // 3) for number in range(20)))
        found, after = [], (-1, "")
        while page := await storage.history("c1", after, 7):
            found += [item.id for item in page]
            after = (page[-1].seq or 0, page[-1].id)
        assert found == [uid(number) for number in range(20)]


async def test_an_id_that_comes_again_stays_one_row_with_the_higher_seq(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        assert await receive(storage, message(1, 10)) == [uid(1)]
        assert await receive(storage, message(1, 30)) == []
        assert await receive(storage, message(1, 20)) == []
        assert [(item.id, item.seq) for item in await storage.history("c1")] == [(uid(1), 30)]


async def test_another_sender_with_the_same_id_replaces_nothing(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, message(1, 10, "true"))
        await receive(storage, message(1, 99, "false", user="cleo"))
        assert [(item.user, item.body, item.seq) for item in await storage.history("c1")] == [
            ("bob", "true", 10)
        ]


async def test_a_withdrawal_removes_the_original_it_follows(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, message(1, 10), message(2, 11))
        await receive(storage, withdrawal(3, 12, of=1))
        assert [item.id for item in await storage.history("c1")] == [uid(2), uid(3)]


async def test_an_original_that_arrives_after_its_withdrawal_is_ignored(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, withdrawal(3, 12, of=1))
        assert await receive(storage, message(1, 10)) == []
        assert [item.id for item in await storage.history("c1")] == [uid(3)]


@pytest.mark.parametrize("first", [True, False])
async def test_nobody_withdraws_the_message_of_another_user(tmp_path: Path, first: bool) -> None:
    async with Storage(tmp_path / "d") as storage:
        both = [message(1, 10), withdrawal(3, 12, of=1, user="cleo")]
        for item in both if first else reversed(both):
            await receive(storage, item)
        assert uid(1) in [item.id for item in await storage.history("c1")]


async def test_an_own_message_enters_the_history_when_the_relay_has_stored_it(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await storage.own("ann", "phone")
        await enqueue(storage, Draft("c1", uid(1), "hello"))
        assert await storage.history("c1") == []
        assert [item.state for item in await storage.unsent("c1")] == ["queued"]
        await storage.commit(Incoming(stored=[Stored("c1", uid(1), 42, 9)]))
        (held,) = await storage.history("c1")
        assert (held.seq, held.at, held.user, held.device, held.body, held.state) == (
            42,
            9,
            "ann",
            "phone",
            "hello",
            "stored",
        )
        assert (await storage.outbox_state())[0] == 0


async def test_messages_queued_before_the_first_welcome_get_their_sender_then(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await enqueue(storage, Draft("c1", uid(1), "early"))
        await storage.own("ann", "phone")
        assert [(item.user, item.device) for item in await storage.unsent("c1")] == [("ann", "phone")]


async def test_queueing_an_id_twice_sends_it_once_also_after_it_was_stored(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        draft = Draft("c1", uid(1), "once")
        assert await enqueue(storage, draft, draft) == 1
        await storage.commit(Incoming(stored=[Stored("c1", uid(1), 42, 9)]))
        assert await enqueue(storage, draft) == 0
        assert (await storage.outbox_state())[0] == 0


async def test_a_failed_message_keeps_its_code_and_can_be_queued_again(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        draft = Draft("c1", uid(1), "no")
        await enqueue(storage, draft)
        await storage.commit(Incoming(failed=[Failed("c1", uid(1), "blocked", "you blocked them")]))
        assert [(item.state, item.error) for item in await storage.unsent("c1")] == [("failed", "blocked")]
        assert await enqueue(storage, draft) == 1
        assert [item.state for item in await storage.unsent("c1")] == ["queued"]


async def test_an_own_withdrawal_takes_effect_when_it_is_stored(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await storage.own("ann", "phone")
        await enqueue(storage, Draft("c1", uid(1), "oops"), Draft("c1", uid(2), None, "withdrawn", uid(1)))
        await storage.commit(Incoming(stored=[Stored("c1", uid(1), 10, 1)]))
        assert [item.id for item in await storage.history("c1")] == [uid(1)]
        await storage.commit(Incoming(stored=[Stored("c1", uid(2), 11, 1)]))
        assert [item.id for item in await storage.history("c1")] == [uid(2)]
        assert await enqueue(storage, Draft("c1", uid(1), "oops")) == 0


async def test_a_full_outbox_refuses_and_keeps_nothing_of_the_call(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        with pytest.raises(OutboxFull):
            await enqueue(storage, *(Draft("c1", uid(number), "x") for number in range(4)), limit=3)
        assert (await storage.outbox_state())[0] == 0
        assert await storage.unsent("c1") == []


async def test_the_outbox_comes_in_order_without_the_conversations_left_out(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        await enqueue(storage, *(Draft(f"c{number % 2}", uid(number), "x") for number in range(6)))
        await receive(storage, message(50, 77, conv="c1"))
        rows = await storage.waiting(0, 10, 1 << 20, ["c0"])
        assert [(row.id, row.after) for row in rows] == [(uid(1), 77), (uid(3), 77), (uid(5), 77)]
        assert [row.id for row in await storage.waiting(rows[0].position, 10, 1, [])] == [uid(2)]


async def test_what_was_committed_is_there_after_the_process_vanished(tmp_path: Path) -> None:
    path = tmp_path / "d"
    async with Storage(path) as storage:
        await receive(storage, message(1, 10, "kept", extra={"media": ["m"], "sealed": "aGk="}))
        # A copy of the files as they are now is what a process that was killed leaves behind.
        left = tmp_path / "left"
        for suffix in ("", "-wal"):
            (tmp_path / f"left{suffix}").write_bytes((tmp_path / f"d{suffix}").read_bytes())
    async with Storage(left) as storage:
        (held,) = await storage.history("c1")
        assert (held.body, held.extra) == ("kept", {"media": ["m"], "sealed": "aGk="})


@pytest.mark.parametrize("body", ["", "naïve 😀\n\t\0", {"a": [1, None, {"b": "ü"}]}, None, "lone \ud800"])
async def test_a_body_comes_back_as_it_was(tmp_path: Path, body: Any) -> None:
    async with Storage(tmp_path / "d") as storage:
        await receive(storage, message(1, 10, body))
        assert (await storage.history("c1"))[0].body == body


async def test_receipts_are_kept_once(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        for at in (5, 6):
            await storage.commit(Incoming(receipts=[Receipt("c1", (uid(1), uid(2)), "bob", "one", at)]))
        assert await storage.receipts("c1", uid(1)) == [("bob", "one", 5)]


async def test_conversations_never_seen_are_told_once(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        first = await storage.commit(
            Incoming(messages=[message(1, 10), message(2, 11), message(3, 9, conv="c2")])
        )
        again = await storage.commit(Incoming(messages=[message(4, 12)]))
        assert (first.conversations, again.conversations) == (["c1", "c2"], [])
        assert await storage.conversations() == [("c1", 12), ("c2", 9)]


async def test_a_transaction_that_fails_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        with pytest.raises(StorageError):
            await receive(storage, message(1, 10), message(2, 1 << 70))
        assert await storage.history("c1") == []
        assert await receive(storage, message(3, 12)) == [uid(3)]


async def test_a_database_open_in_another_place_is_refused(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d"):
        with pytest.raises(WrongDatabase, match="open"):
            await Storage(tmp_path / "d").__aenter__()
    async with Storage(tmp_path / "d") as storage:
        assert await storage.conversations() == []


async def test_a_database_of_another_device_a_later_version_or_another_program_is_refused(
    tmp_path: Path,
) -> None:
    async with Storage(tmp_path / "d") as storage:
        await storage.own("ann", "phone")
        await storage.own("ann", "phone")
        with pytest.raises(WrongDatabase, match="ann/phone"):
            await storage.own("bob", "phone")
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(WrongDatabase, match="newer"):
        await Storage(tmp_path / "later").__aenter__()
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE songs (name)")
    other.close()
    with pytest.raises(WrongDatabase, match="another program"):
        await Storage(tmp_path / "other").__aenter__()


async def test_new_ids_are_accepted_by_the_wire(tmp_path: Path) -> None:
    async with Storage(tmp_path / "d") as storage:
        assert await enqueue(storage, Draft("c1", ids.new_id(), {"a": 1}, ttl=60)) == 1
