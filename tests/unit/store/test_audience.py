"""Who receives a message, and for how long that is believed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from relay.store import audience as module
from relay.store.audience import FULL_RETRY_MS, LEASE_SECONDS, Audience, Audiences, Roster, refusal_error
from relay.wire.limits import Limit
from tests.support.backlog import turns

Members = dict[str, dict[str, list[str]]]


class Directory:
    """Members by conversation, asked like the store. While ``gate`` is clear an answer is held back after it was read."""

    def __init__(self, conversations: Members) -> None:
        self.conversations = conversations
        self.blocks: set[tuple[str, str]] = set()
        self.asked: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: Exception | None = None

    async def load(self, wanted: list[str]) -> Mapping[str, Roster]:
        self.asked.append(wanted)
        found = {
            name: Roster(
                {user: list(keys) for user, keys in self.conversations[name].items()},
                blocks=frozenset(self.blocks),
            )
            for name in wanted
            if name in self.conversations
        }
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return found


class Clock:
    """What time it is."""

    now = 1000.0


@pytest.fixture
def directory() -> Directory:
    return Directory(
        {
            "talk": {"ann": ["ann/phone", "ann/tablet"], "bob": ["bob/phone"], "cleo": []},
            "pair": {"ann": ["ann/phone", "ann/tablet"], "bob": ["bob/phone"]},
        }
    )


def test_everybody_awaits_a_message_but_the_device_that_sent_it(directory: Directory) -> None:
    one = Audience("talk", Roster(directory.conversations["talk"]))
    assert one.members == {"ann", "bob", "cleo"}
    assert one.awaiting("ann/phone") == ["ann/tablet", "bob/phone", "cleo/*"]
    assert one.awaiting("bob/phone") == ["ann/phone", "ann/tablet", "cleo/*"]


def test_a_sender_without_an_active_device_does_not_await_their_own_message(directory: Directory) -> None:
    one = Audience("talk", Roster(directory.conversations["talk"]))
    assert one.awaiting("cleo/watch") == ["ann/phone", "ann/tablet", "bob/phone"]


def test_the_revision_follows_the_devices_and_nothing_else() -> None:
    one = Audience("talk", Roster({"ann": ["ann/phone"], "bob": []}))
    same = Audience("other", Roster({"bob": [], "cleo": [], "ann": ["ann/phone"]}))
    other = Audience("talk", Roster({"ann": ["ann/phone"], "bob": ["bob/phone"]}))
    assert one.devices_rev == same.devices_rev
    assert one.devices_rev != other.devices_rev
    assert len(one.devices_rev) == 16 + 2


def test_the_revision_follows_the_newest_relink_and_tells_of_it() -> None:
    devices = {"ann": ["ann/phone", "ann/tablet"], "bob": ["bob/phone"]}
    never = Audience("talk", Roster(devices))
    once = Audience("talk", Roster(devices, relinked={"bob/phone": 5000}))
    again = Audience("talk", Roster(devices, relinked={"bob/phone": 7000, "ann/tablet": 6000}))
    revisions = [one.devices_rev for one in (never, once, again)]
    assert len(set(revisions)) == 3
    assert never.relinked_since(revisions[0]) == []
    assert once.relinked_since(revisions[0]) == ["bob/phone"]
    assert once.relinked_since(revisions[1]) == []
    assert (
        again.relinked_since(revisions[0])
        == again.relinked_since(revisions[1])
        == ["ann/tablet", "bob/phone"]
    )
    assert again.relinked_since(revisions[2]) == []


@pytest.mark.parametrize(
    "rev", ["", "x", ".", "abc.", "abc.-1", "abc.ZZ", "abc." + "z" * 12, "\0", "a.b.c d"]
)
def test_a_revision_that_is_none_of_ours_knows_of_no_relink(rev: str) -> None:
    one = Audience("talk", Roster({"bob": ["bob/phone"]}, relinked={"bob/phone": 5000}))
    assert one.relinked_since(rev) == ["bob/phone"]


def test_a_device_that_was_relinked_and_is_gone_is_not_told() -> None:
    one = Audience("talk", Roster({"bob": ["bob/phone"]}, relinked={"bob/old": 5000}))
    assert one.devices_rev == Audience("talk", Roster({"bob": ["bob/phone"]})).devices_rev


def test_who_has_blocked_the_sender_waits_under_a_name_that_nobody_drains() -> None:
    members = {"ann": ["ann/phone", "ann/tablet"], "bob": ["bob/phone", "bob/tablet"], "cleo": []}
    one = Audience("talk", Roster(members, blocks=frozenset({("bob", "ann"), ("cleo", "bob")})))
    assert one.awaiting("ann/phone") == ["ann/tablet", "bob/!", "cleo/*"]
    assert one.awaiting("bob/phone") == ["ann/phone", "ann/tablet", "bob/tablet", "cleo/!"]
    assert one.awaiting("cleo/watch") == ["ann/phone", "ann/tablet", "bob/phone", "bob/tablet"]


def test_who_is_blocked_sees_the_devices_that_everybody_sees() -> None:
    members = {"ann": ["ann/phone"], "bob": ["bob/phone", "bob/tablet"]}
    open_, blocked = (
        Audience("talk", Roster(members, blocks=blocks))
        for blocks in (frozenset(), frozenset({("bob", "ann")}))
    )
    assert blocked.others("ann/phone") == open_.others("ann/phone") == ["bob/phone", "bob/tablet"]
    assert blocked.devices_rev == open_.devices_rev
    assert blocked.keys == open_.keys


def test_refusals_are_kept_by_member() -> None:
    refusals = {"bob": ("blocked", "no")}
    one = Audience("talk", Roster({"ann": [], "bob": []}, refusals=refusals))  # type: ignore[arg-type]
    assert dict(one.refusals) == refusals


async def test_a_known_audience_needs_no_query(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    assert audiences.get("talk") is None
    first = await audiences.resolve("talk")
    assert audiences.get("talk") is first
    assert await audiences.resolve("talk") is first
    assert directory.asked == [["talk"]]


async def test_the_lease_runs_out(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "lease_time", lambda: now)
    audiences = Audiences(directory.load)
    first = await audiences.resolve("talk")
    now += LEASE_SECONDS - 0.01
    assert audiences.get("talk") is first
    now += 0.01
    assert audiences.get("talk") is None
    directory.conversations["talk"]["dan"] = ["dan/phone"]
    second = await audiences.resolve("talk")
    assert "dan" in second.members
    assert first.stale, "what leaves the cache hears of no further change"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of leases, which are renewed as soon as three quarters of them are over, at once, and however seldom they are used."""
    found = Clock()
    monkeypatch.setattr(module, "_FLOWS", 1)
    monkeypatch.setattr(module, "lease_time", lambda: found.now)
    monkeypatch.setattr(module, "_RENEWED", (0.75, 0.75))
    monkeypatch.setattr(module, "_GATHER_SECONDS", 0.0)
    return found


async def test_where_messages_flow_a_lease_is_renewed_before_it_runs_out(
    directory: Directory, clock: Clock
) -> None:
    audiences = Audiences(directory.load)
    first = await audiences.resolve("talk")
    assert first.awaiting("ann/phone") == ["ann/tablet", "bob/phone", "cleo/*"]
    clock.now += LEASE_SECONDS * 0.7
    assert audiences.get("talk") is first
    await turns()
    assert len(directory.asked) == 1
    clock.now -= LEASE_SECONDS * 0.7
    for lease in range(2, 5):
        clock.now += LEASE_SECONDS * 0.8
        assert audiences.get("talk") is first
        assert audiences.get("talk") is first
        await turns()
        assert directory.asked == [["talk"]] * lease
    assert not first.stale
    assert first.awaiting("ann/phone") == ["ann/tablet", "bob/phone", "cleo/*"]
    clock.now += LEASE_SECONDS
    assert audiences.get("talk") is None, "nobody has used it since"


async def test_where_few_messages_come_nothing_is_read_in_vain(
    directory: Directory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FLOWS", 4)
    audiences = Audiences(directory.load)
    await audiences.resolve("talk")
    clock.now += LEASE_SECONDS * 0.8
    for times in range(1, 5):
        assert audiences.get("talk") is not None
        await turns()
        assert len(directory.asked) == (1 if times < 4 else 2)
    for _ in range(3):
        assert audiences.get("talk") is not None
    clock.now += LEASE_SECONDS * 0.9
    await turns()
    assert len(directory.asked) == 2
    assert audiences.get("talk") is not None, "the fourth since it was renewed"
    await turns()
    assert len(directory.asked) == 3


async def test_what_has_changed_by_the_time_of_a_renewal_makes_what_was_resolved_stale(
    directory: Directory, clock: Clock
) -> None:
    audiences = Audiences(directory.load)
    before = await audiences.resolve_all(["talk", "pair"])
    directory.conversations["talk"]["dan"] = ["dan/phone"]
    clock.now += LEASE_SECONDS * 0.8
    assert audiences.get("talk") is before["talk"]
    assert audiences.get("pair") is before["pair"]
    await turns()
    after = audiences.get("talk")
    assert after is not None
    assert "dan" in after.members
    assert [one.stale for one in before.values()] == [True, False]
    assert len(directory.asked) == 2, "renewals that are due together share a query"
    audiences.changed(user="dan")
    assert after.stale


@pytest.mark.parametrize("what", ["conversation", "user", "everything"])
async def test_a_change_during_a_renewal_is_not_missed(directory: Directory, clock: Clock, what: str) -> None:
    audiences = Audiences(directory.load)
    first = await asked_again(audiences, directory, clock)
    if what == "user":
        audiences.changed(user="bob")
    elif what == "conversation":
        audiences.changed(conversation="pair")
    else:
        audiences.forget()
    assert first.stale
    directory.gate.set()
    await turns()
    assert audiences.get("pair") is None, "what was read before the change is not believed after it"
    assert (await audiences.resolve("pair")).fresh
    assert audiences.get("pair") is not None


async def asked_again(audiences: Audiences, directory: Directory, clock: Clock) -> Audience:
    """What is known of "pair" while its renewal has been asked for and is not answered: the gate is closed."""
    known = await audiences.resolve("pair")
    directory.gate.clear()
    clock.now += LEASE_SECONDS * 0.8
    assert audiences.get("pair") is known
    await turns()
    assert directory.asked == [["pair"]] * 2
    return known


async def test_a_renewal_is_not_lost_by_a_change_that_does_not_concern_it(
    directory: Directory, clock: Clock
) -> None:
    audiences = Audiences(directory.load)
    first = await asked_again(audiences, directory, clock)
    for user in ("cleo", "stranger"):
        audiences.changed(user=user)
    audiences.changed(conversation="talk")
    directory.gate.set()
    await turns()
    clock.now += LEASE_SECONDS * 0.7
    assert audiences.get("pair") is first


async def test_what_was_read_before_a_change_of_who_is_new_there_harms_no_lease_that_holds(
    directory: Directory, clock: Clock
) -> None:
    audiences = Audiences(directory.load)
    await audiences.resolve("pair")
    directory.conversations["pair"]["dan"] = ["dan/phone"]
    first = await asked_again(audiences, directory, clock)
    audiences.changed(user="dan")
    directory.gate.set()
    await turns()
    assert audiences.get("pair") is first, "its lease is as good as without a renewal, which is tried again"
    await turns()
    assert first.stale
    found = audiences.get("pair")
    assert found is not None
    assert "dan" in found.members


async def test_a_lease_that_has_run_out_is_never_taken_up_again(directory: Directory, clock: Clock) -> None:
    audiences = Audiences(directory.load)
    first = await asked_again(audiences, directory, clock)
    clock.now += LEASE_SECONDS * 0.3
    directory.gate.set()
    await turns()
    # What was resolved with it counts as concerned by every change until it has been resolved again.
    assert not first.fresh
    assert first.stale
    assert audiences.get("pair") is not None


async def test_the_lease_of_a_renewal_counts_from_its_question(directory: Directory, clock: Clock) -> None:
    audiences = Audiences(directory.load)
    first = await asked_again(audiences, directory, clock)
    clock.now += LEASE_SECONDS * 0.1
    directory.gate.set()
    await turns()
    clock.now += LEASE_SECONDS * 0.89
    assert audiences.get("pair") is first
    clock.now += LEASE_SECONDS * 0.02
    assert audiences.get("pair") is None


async def test_a_renewal_that_fails_changes_nothing(directory: Directory, clock: Clock) -> None:
    audiences = Audiences(directory.load)
    first = await audiences.resolve("pair")
    directory.fault = ConnectionError("away")
    clock.now += LEASE_SECONDS * 0.8
    for _ in range(3):
        assert audiences.get("pair") is first
        await turns()
    assert len(directory.asked) == 2, "it is tried once"
    clock.now += LEASE_SECONDS * 0.2
    with pytest.raises(ConnectionError, match="away"):
        await audiences.resolve("pair")
    directory.fault = None
    assert (await audiences.resolve("pair")).fresh


async def test_conversations_that_began_together_are_not_renewed_together(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"c{number}" for number in range(200)]
    directory.conversations.update({name: {"ann": ["ann/phone"]} for name in names})
    now = 1000.0
    monkeypatch.setattr(module, "lease_time", lambda: now)
    monkeypatch.setattr(module, "_GATHER_SECONDS", 0.0)
    audiences = Audiences(directory.load)
    await audiences.resolve_all(names)
    directory.asked.clear()
    while now < 1000 + LEASE_SECONDS - 0.3:
        now += 0.1
        assert all(audiences.get(name) for name in names)
        await turns()
    sizes = [len(wanted) for wanted in directory.asked]
    assert sum(sizes) == len(names)
    assert max(sizes) < len(names) / 3


async def test_all_who_ask_while_a_query_runs_share_the_next_one(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    directory.gate.clear()
    first = asyncio.ensure_future(audiences.resolve("talk"))
    await turns()
    others = [asyncio.ensure_future(audiences.resolve(name)) for name in ("pair", "pair", "none", "talk")]
    await turns()
    directory.gate.set()
    await first
    found = await asyncio.gather(*others)
    assert directory.asked == [["talk"], ["pair", "none", "talk"]]
    assert found[0] is found[1]
    assert found[0].members == {"ann", "bob"}


async def test_a_conversation_that_does_not_exist_is_remembered_as_empty(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    assert (await audiences.resolve("none")).members == frozenset()
    assert (await audiences.resolve("none")).keys == ()
    assert directory.asked == [["none"]]


async def test_several_are_resolved_with_one_query(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    found = await audiences.resolve_all(["talk", "pair", "talk"])
    assert set(found) == {"talk", "pair"}
    assert directory.asked == [["talk", "pair"]]


async def test_a_change_of_members_makes_what_was_resolved_stale(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    talk, pair = await audiences.resolve("talk"), await audiences.resolve("pair")
    audiences.changed(conversation="talk")
    assert talk.stale
    assert not talk.fresh
    assert audiences.get("talk") is None
    assert audiences.get("pair") is pair


async def test_a_change_of_a_users_devices_makes_all_their_conversations_stale(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    talk, pair = await audiences.resolve("talk"), await audiences.resolve("pair")
    audiences.changed(user="cleo")
    assert [talk.stale, pair.stale] == [True, False]
    talk = await audiences.resolve("talk")
    audiences.changed(user="ann")
    assert [talk.stale, pair.stale] == [True, True]
    audiences.changed(user="nobody")


async def test_a_block_is_seen_once_it_is_told(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    before = await audiences.resolve("pair")
    directory.blocks.add(("bob", "ann"))
    assert (await audiences.resolve("pair")) is before
    audiences.changed(user="bob")
    assert before.stale
    assert (await audiences.resolve("pair")).awaiting("ann/phone") == ["ann/tablet", "bob/!"]


@pytest.mark.parametrize("what", ["conversation", "user"])
async def test_a_change_during_the_query_is_not_missed(directory: Directory, what: str) -> None:
    audiences = Audiences(directory.load)
    directory.gate.clear()
    asking = asyncio.ensure_future(audiences.resolve("pair"))
    await turns()
    directory.conversations["pair"]["bob"] = ["bob/phone", "bob/tablet"]
    if what == "user":
        audiences.changed(user="bob")
    else:
        audiences.changed(conversation="pair")
    directory.gate.set()
    found = await asking
    # What was read before the change may still be handed out, but only as stale, so that it is resolved again.
    assert "bob/tablet" in found.keys or not found.fresh
    assert "bob/tablet" in (await audiences.resolve("pair")).keys


async def test_a_query_that_fails_is_told_to_all_who_wait_and_the_next_one_asks_again(
    directory: Directory,
) -> None:
    audiences = Audiences(directory.load)
    directory.fault = ConnectionError("no answer")
    waiting = [asyncio.ensure_future(audiences.resolve(name)) for name in ("talk", "talk", "pair")]
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert found == [directory.fault] * 3
    directory.fault = None
    assert (await audiences.resolve("talk")).members == {"ann", "bob", "cleo"}


async def test_one_who_stops_waiting_does_not_disturb_the_others(directory: Directory) -> None:
    audiences = Audiences(directory.load)
    directory.gate.clear()
    gone, stays = (asyncio.ensure_future(audiences.resolve("talk")) for _ in range(2))
    await turns()
    gone.cancel()
    await turns()
    directory.gate.set()
    assert (await stays).members == {"ann", "bob", "cleo"}


async def test_the_cache_is_bounded(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CACHED", 3)
    directory.conversations = {f"c{n}": {"ann": ["ann/phone"]} for n in range(5)}
    audiences = Audiences(directory.load)
    for name in directory.conversations:
        await audiences.resolve(name)
    assert [name for name in directory.conversations if audiences.get(name)] == ["c2", "c3", "c4"]


def test_full_mailboxes_are_left_out_and_named_and_seal_and_revision_stay_the_same() -> None:
    members = {"ann": ["ann/phone", "ann/tablet"], "bob": ["bob/phone", "bob/tablet"], "cleo": []}
    roomy = Audience("talk", Roster(members))
    full = Audience("talk", Roster(members, full=frozenset({"ann/phone", "bob/tablet", "cleo/*"})))
    assert full.awaiting("ann/phone") == ["ann/tablet", "bob/phone"]
    assert full.trimmed("ann/phone") == ["bob/tablet", "cleo/*"]
    assert full.trimmed("ann/phone") is full.trimmed("ann/phone"), "shared by all messages of a sender"
    assert roomy.trimmed("ann/phone") == []
    assert full.others("ann/phone") == roomy.others("ann/phone")
    assert full.devices_rev == roomy.devices_rev


def test_the_full_mailbox_of_what_was_blocked_counts_for_the_blocked_only() -> None:
    members = {"ann": ["ann/phone"], "bob": ["bob/phone"], "cleo": ["cleo/phone"]}
    roster = Roster(members, blocks=frozenset({("bob", "ann")}), full=frozenset({"bob/!"}))
    audience = Audience("talk", roster)
    assert audience.trimmed("ann/phone") == ["bob/!"]
    assert audience.awaiting("ann/phone") == ["cleo/phone"]
    assert audience.trimmed("cleo/phone") == []
    assert audience.awaiting("cleo/phone") == ["ann/phone", "bob/phone"]


def test_the_refusal_for_full_mailboxes_says_when_to_come_back_and_names_the_limit() -> None:
    refusal = refusal_error(("mailbox_full", "full"))
    assert (refusal.retry, refusal.retry_after, refusal.limit) == (True, FULL_RETRY_MS, Limit.MAILBOX)
    assert refusal_error(("blocked", "you did")).retry_after is None
