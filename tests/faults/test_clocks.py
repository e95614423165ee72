"""Relay processes on machines whose clocks are an hour off: MongoDB's holds for all of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from pymongo import AsyncMongoClient

from relay.security.tokens import mint
from relay.store.embedded import EmbeddedMongo
from tests.support.device import Closed
from tests.support.fake_time import faked, set_ahead
from tests.support.logins import (
    ask,
    close_code,
    connect,
    eventually_refused,
    logged_in,
    minted,
    refresh,
    register,
    somebody,
    works,
)
from tests.support.node import SECRET, Node
from tests.support.process import ROOT, RelayProcess, environment, ledger_of, metric
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until

HOUR = 3600

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
Pair = tuple[RelayProcess, RelayProcess]


class Machines:
    """Starts relays on one database of the run's MongoDB."""

    def __init__(
        self, mongod: EmbeddedMongo, valkey: Valkey, directory: Path, http: aiohttp.ClientSession
    ) -> None:
        self.database = f"clocks{uuid.uuid4().hex[:12]}"
        self._settings = {
            "mongo_uri": mongod.uri,
            "mongo_database": self.database,
            "redis_url": valkey.url,
            "pseudonym_key": SECRET,
            "sweep_seconds": 1,
            "expiry_seconds": 0.5,
        }
        self._directory = directory
        self._http = http
        self.made: list[RelayProcess] = []

    async def start(self, machine: dict[str, str] | None) -> RelayProcess:
        if machine is None:
            pytest.skip("there is no libfaketime for this machine")
        home = self._directory / f"relay{len(self.made)}"
        home.mkdir()
        relay = RelayProcess(home, self._http, **self._settings)
        relay.environment = machine
        self.made.append(relay)
        await relay.start()
        return relay

    async def close(self) -> None:
        for relay in self.made:
            await relay.close()


@pytest.fixture(scope="module")
async def machines(
    mongod: EmbeddedMongo, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Machines]:
    directory = tmp_path_factory.mktemp("machines")
    async with open_valkey(directory) as valkey, aiohttp.ClientSession() as http:
        found = Machines(mongod, valkey, directory, http)
        yield found
        await found.close()
        async with AsyncMongoClient[dict[str, Any]](mongod.uri) as client:
            await client.drop_database(found.database)


@pytest.fixture(scope="module")
async def pair(machines: Machines) -> Pair:
    """One node an hour ahead, one an hour behind."""
    return await machines.start(faked(seconds=HOUR)), await machines.start(faked(seconds=-HOUR))


@pytest.fixture(params=["ahead", "behind"])
def nodes(pair: Pair, request: pytest.FixtureRequest) -> Pair:
    """The two nodes, one way round and the other."""
    fast, slow = pair
    return (fast, slow) if request.param == "ahead" else (slow, fast)


def issued(seconds_ago: float, lifetime: int, user: str) -> str:
    """A token of an issuer whose clock is right."""
    now = time.time() - seconds_ago
    return mint(SECRET, user, "phone", audience="relay", lifetime=lifetime, now=now)


async def problems(node: Node) -> tuple[int, dict[str, str]]:
    async with node.http.get(node.url + "/readyz") as response:
        return response.status, (await response.json())["problems"]


async def absent(node: Node, other: Node, user: str) -> str:
    """A direct conversation of a new person, who has a device that is not connected, with ``user``."""
    ann = somebody()
    # Resolved by nobody yet, or the leases of the other node have run out.
    await (await node.connect(ann)).close()
    assert (await other.request("GET", "/v1/conversations?limit=1", user, "phone"))[0] == 200
    return await other.direct(user, ann)


async def test_what_is_wrong_is_told(pair: Pair) -> None:
    for node, offset, word in zip(pair, (HOUR, -HOUR), ("ahead of", "behind"), strict=True):

        async def told(node: Node = node) -> bool:
            return "clock" in (await problems(node))[1]

        await until(told, 15, "the clock is named as a problem")
        status, found = await problems(node)
        assert status == 200, "it serves all the same"
        assert f"3600 s {word} MongoDB's" in found["clock"]
        assert await metric(node, "relay_clock_offset_seconds") == pytest.approx(offset, abs=1)
        assert await metric(node, 'relay_problem{part="clock"}') == 1
        assert node.said().count("this machine's clock differs from MongoDB's") == 1


async def test_tokens_are_judged_by_the_right_time(pair: Pair) -> None:
    user = somebody()
    for node in pair:
        assert await works(node, issued(0, 900, user))
        assert await works(node, issued(800, 900, user))
        assert not await works(node, issued(930, 900, user)), "it expired half a minute ago"
        assert not await works(node, issued(-60, 900, user)), "it was issued in the future"
        assert await close_code(node, issued(930, 900, user)) == 4401


async def test_a_socket_is_closed_when_its_token_expires(nodes: Pair) -> None:
    node, _ = nodes
    token = issued(0, 6, somebody())
    device = await connect(node, token)
    with pytest.raises(TimeoutError):
        await device.expect("nothing of this name", 1)
    assert await device.closed(30) == 4401
    assert time.time() >= jwt.decode(token, options={"verify_signature": False})["exp"] - 0.2


async def test_a_message_with_a_minute_to_live_waits_at_the_other_node(nodes: Pair) -> None:
    here, there = nodes
    bob = somebody("bob")
    conv = await absent(here, here, bob)
    ann = conv_other(await here.request("GET", f"/v1/conversations/{conv}", bob, "phone"), bob)
    sender = await here.connect(bob)
    sent = await sender.sent(conv, "for a minute", ttl=60)
    # Both look for what has expired meanwhile.
    await asyncio.sleep(2)
    device = await there.connect(ann)
    await device.expect("msg", 20, id=sent["id"])
    await device.ack(conv, sent["id"])


def conv_other(answer: tuple[int, Any], user: str) -> str:
    """The other person of a direct conversation."""
    status, found = answer
    assert status == 200, found
    return next(str(one["user"]) for one in found["members"] if one["user"] != user)


async def test_a_short_life_ends_in_time_and_a_long_one_goes_on(nodes: Pair) -> None:
    here, there = nodes
    bob = somebody("bob")
    conv = await absent(here, here, bob)
    sender = await here.connect(bob)
    long = await sender.sent(conv, "for almost an hour", ttl=HOUR - 60)
    assert await here.db.messages.count_documents({"id": long["id"]}) == 1
    before = (await ledger_of(there))["expired"]

    async def other_expires() -> bool:
        began = time.monotonic()
        short = await sender.sent(conv, "for two seconds", ttl=2)

        async def gone() -> bool:
            return bool(await here.db.messages.count_documents({"id": short["id"]}) == 0)

        await until(gone, 20, "what had two seconds has expired")
        assert time.monotonic() - began > 1.9
        return (await ledger_of(there))["expired"] > before

    # Each node looks; sooner or later it is the other one that finds something.
    await until(other_expires, 60, "the other node expired a message")
    assert await here.db.messages.count_documents({"id": long["id"]}) == 1


async def test_messages_and_greetings_carry_the_right_time(nodes: Pair) -> None:
    here, _ = nodes
    bob = somebody("bob")
    conv = await absent(here, here, bob)
    before = time.time()
    sender = await here.connect(bob)
    sent = await sender.sent(conv, "now")
    after = time.time()
    document = await here.db.messages.find_one({"id": sent["id"]})
    assert document is not None
    for moment in (
        sender.welcome["time"] / 1000,
        document["createdAt"].timestamp(),
        (sent["seq"] >> 10) / 1000,
    ):
        assert before - 0.2 <= moment <= after + 0.2
    user = await here.db.users.find_one({"_id": bob})
    assert user is not None and abs((user["createdAt"] - datetime.now(UTC)).total_seconds()) < 60


async def test_who_logs_in_at_one_node_is_known_at_the_other(nodes: Pair) -> None:
    here, there = nodes
    made = await register(here)
    assert await works(there, made["accessToken"])
    claims = jwt.decode(made["accessToken"], options={"verify_signature": False})
    assert abs(claims["iat"] - time.time()) < 60
    status, renewed = await refresh(there, made["refreshToken"])
    assert status == 200, renewed
    assert await works(here, renewed["accessToken"])
    again = await logged_in(there, made, "tablet")
    assert await works(here, again["accessToken"])


async def test_a_revocation_at_one_node_bars_what_was_issued_before_and_nothing_later(nodes: Pair) -> None:
    here, there = nodes
    user = somebody()
    old = minted(user, -1)
    tablet = minted(user, -1, "tablet")
    assert await works(here, tablet)
    device = await connect(there, old)
    assert (await ask(here, "DELETE", "/v1/auth/devices/phone", token=tablet))[0] == 200
    assert await device.closed(10) == 4401
    await eventually_refused(there, old, "the older token is refused at the other node")
    assert not await works(here, old)
    # Tokens count whole seconds.
    await asyncio.sleep(1.1)
    new = minted(user, 0)
    assert await works(there, new)
    assert await works(here, new)
    assert not await works(there, old)


async def test_an_operator_whose_clock_is_ahead_shuts_nobody_out_for_longer_than_meant(pair: Pair) -> None:
    node, _ = pair
    user = somebody()
    assert await works(node, minted(user, -1))
    for command in ("suspend", "unsuspend"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scripts.tools.admin", command, user),
            cwd=ROOT,
            env={**environment(**node.settings), **node.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err
        assert b"NTP" in err and b"NTP" not in out, "it tells its operator"
    # Tokens count whole seconds; and a node remembers for a few how a device stands.
    await asyncio.sleep(1.1)
    token = minted(user, 0)

    async def accepted() -> bool:
        return await works(node, token)

    await until(accepted, 15, "a token of after the suspension is good")


async def test_a_clock_that_is_set_while_the_node_runs_changes_nothing(
    machines: Machines, tmp_path: Path
) -> None:
    file = tmp_path / "ahead"
    set_ahead(file, 0)
    node = await machines.start(faked(file=file))
    user = somebody()
    assert "clock" not in (await problems(node))[1]
    for step in (HOUR, -HOUR, 0):
        set_ahead(file, step)
        deadline = time.monotonic() + 30
        while ("clock" in (await problems(node))[1]) != bool(step) or abs(
            await metric(node, "relay_clock_offset_seconds") - step
        ) > 1:
            assert time.monotonic() < deadline, f"the step to {step} s is noticed"
            assert await works(node, issued(0, 60, user)), "before it was noticed"
            await asyncio.sleep(0.05)
        assert await works(node, issued(0, 60, user)), "and after"
        with pytest.raises(Closed) as refused:
            await connect(node, issued(90, 60, user))
        assert refused.value.code == 4401
