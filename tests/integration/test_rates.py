"""Rate limits in a real Valkey, and what happens when it is killed or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.security import rates as module
from relay.security.rates import Rates
from relay.wire.errors import RelayError
from relay.wire.ids import new_id
from tests.support.node import NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until

RULES = {"search": "5/minute", "connect": "1000/10 seconds"}


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as server:
        yield server


@asynccontextmanager
async def limits(url: str) -> AsyncIterator[Rates]:
    found = Rates(RULES, redis_url=url)
    try:
        yield found
    finally:
        await found.close()


async def allowed(rates: Rates, key: str, times: int = 1, name: str = "search") -> int:
    """How many of so many tries were allowed."""
    refusals: list[RelayError] = []
    for _ in range(times):
        try:
            await rates.check(name, key)
        except RelayError as error:
            refusals.append(error)
    assert {error.code for error in refusals} <= {"rate_limited"}
    assert all(0 < (error.retry_after or 0) <= 60_100 for error in refusals)
    return times - len(refusals)


async def test_nodes_that_share_a_redis_share_their_counts(valkey: Valkey) -> None:
    async with limits(valkey.url) as one, limits(valkey.url) as other:
        assert await allowed(one, "ann", 3) == 3
        assert await allowed(other, "ann", 10) == 2
        assert await allowed(one, "ann", 2) == 0
        assert await allowed(one, "bob") == 1
        assert one.shared
        assert other.shared


async def test_as_many_pass_as_the_rule_says_when_many_ask_at_once(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This is about counts: a machine that is busy with something else may take its time.
    monkeypatch.setattr(module, "_REDIS_SECONDS", 10.0)
    async with limits(valkey.url) as one, limits(valkey.url) as other:
        tries = [allowed(rates, "ann") for rates in (one, other) for _ in range(20)]
        assert sum(await asyncio.gather(*tries)) == 5
        assert one.shared
        assert other.shared


async def test_redis_holds_neither_the_keys_themselves_nor_anything_for_ever(valkey: Valkey) -> None:
    async with limits(valkey.url) as rates, Redis.from_url(valkey.url) as client:
        await allowed(rates, "an account name", 7)
        keys = [key async for key in client.scan_iter("*")]
        assert keys
        assert not any(b"account" in key for key in keys)
        assert all([0 < await client.ttl(key) <= 120 for key in keys])


async def test_a_killed_redis_stops_nothing_and_counts_again_when_it_is_back(valkey: Valkey) -> None:
    async with limits(valkey.url) as rates:
        assert await allowed(rates, "ann", 4) == 4
        await valkey.kill()
        assert await allowed(rates, "ann", 10) == 5
        assert not rates.shared
        await valkey.start()
        await asyncio.sleep(1.55)
        assert await allowed(rates, "bob", 10) == 5
        assert rates.shared


async def test_a_hanging_redis_costs_one_request_a_second_200_ms_and_the_others_nothing(
    valkey: Valkey,
) -> None:
    async with limits(valkey.url) as rates:
        assert await allowed(rates, "ann") == 1
        valkey.pause()
        try:
            start = monotonic()
            assert await allowed(rates, "bob", 10) == 5
            assert 0.15 < monotonic() - start < 0.6
            assert not rates.shared
            start = monotonic()
            assert await allowed(rates, "cleo", 100, "connect") == 100
            assert monotonic() - start < 0.4
        finally:
            valkey.resume()
        await asyncio.sleep(1.55)
        assert await allowed(rates, "ann", 10) == 4
        assert rates.shared


async def test_requests_that_come_together_while_redis_hangs_are_all_answered_in_time(valkey: Valkey) -> None:
    async with limits(valkey.url) as rates:
        valkey.pause()
        try:
            start = monotonic()
            counts = await asyncio.gather(*(allowed(rates, "ann", 1, "connect") for _ in range(200)))
            assert sum(counts) == 200
            assert monotonic() - start < 0.8
        finally:
            valkey.resume()


async def test_a_redis_that_was_never_there_stops_nothing(tmp_path: Path) -> None:
    async with limits(f"redis://127.0.0.1:{Valkey(tmp_path).port}") as rates:
        assert await allowed(rates, "ann", 10) == 5
        assert not rates.shared


@pytest.mark.parametrize(
    "reply", [b"", b":abc\r\n", b"$x\r\n", b"-READONLY no\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
async def test_what_is_no_redis_stops_nothing(reply: bytes) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while reply and await reader.read(4096):
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(answers, "127.0.0.1", 0)
    async with server, limits(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}") as rates:
        assert await allowed(rates, "ann", 10) == 5
        assert not rates.shared


async def test_a_password_and_a_unix_socket_are_understood(tmp_path: Path) -> None:
    async with open_valkey(tmp_path, password="open-sesame") as server:
        async with limits(server.url) as rates:
            assert await allowed(rates, "ann", 3) == 3
            assert rates.shared
        async with limits(f"unix://default:open-sesame@{server.socket}?db=0") as rates:
            assert await allowed(rates, "ann", 10) == 2
            assert rates.shared
        async with limits(f"redis://default:wrong@127.0.0.1:{server.port}") as rates:
            assert await allowed(rates, "ann", 10) == 5
            assert not rates.shared


async def test_a_device_over_its_message_rate_is_told_when_to_come_back_and_others_are_not_slowed(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(message_rate=50, message_burst=10)
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await ann.expect("drained")
    sends = [{"t": "send", "id": new_id(), "conv": conv, "kind": "text", "body": str(n)} for n in range(30)]
    await ann.put(*sends)
    answers = [await ann.next() for _ in range(30)]
    stored = {answer["id"] for answer in answers if answer["t"] == "stored"}
    refused = {answer["id"]: answer for answer in answers if answer["t"] == "error"}
    assert stored == {send["id"] for send in sends[: len(stored)]}, "a message was taken behind a refused one"
    assert 10 <= len(stored) < 30
    for error in refused.values():
        assert error["code"] == "rate_limited"
        assert error["retry"] is True
        assert 0 < error["retryAfter"] <= 1000
    await bob.sent(conv)
    async with node.http.post(
        f"{node.url}/v1/messages", headers=node.headers("ann", "phone"), json=_http(sends[-1])
    ) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        assert (await response.json())["error"]["code"] == "rate_limited"
    status, _ = await node.request(
        "POST", "/v1/messages", "ann", "tablet", {**_http(sends[-1]), "id": new_id()}
    )
    assert status == 201
    await asyncio.sleep(1.05)
    await ann.put({**sends[-1], "again": True})
    await ann.expect("stored")


async def test_a_device_that_posts_at_all_nodes_in_turn_has_no_rate_for_each_of_them(
    nodes: NodeFactory, valkey: Valkey
) -> None:
    settings: dict[str, Any] = {"redis_url": valkey.url, "message_rate": 0.001, "message_burst": 4}
    several = [await nodes.start(**settings) for _ in range(3)]
    conv = await several[0].direct("ann", "bob")
    posted = []
    for number in range(12):
        message = {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
        posted.append(await several[number % 3].request("POST", "/v1/messages", "ann", "phone", message))
    assert [status for status, _ in posted] == [201] * 8 + [429] * 4
    refusal = posted[-1][1]["error"]
    assert refusal["code"] == "rate_limited"
    assert refusal["message"].startswith("too many messages")
    other = {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    assert (await several[0].request("POST", "/v1/messages", "bob", "phone", other))[0] == 201


def _http(operation: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in operation.items() if name != "t"}


async def test_nodes_with_one_redis_count_together_and_answer_429_with_retry_after(
    nodes: NodeFactory, valkey: Valkey
) -> None:
    settings: dict[str, Any] = {"redis_url": valkey.url, "rate_search": "3/minute"}
    one, other = await nodes.start(**settings), await nodes.start(**settings)
    statuses = []
    for node in (one, other, one, other):
        async with node.http.get(
            f"{node.url}/v1/users?q=bob", headers=node.headers("ann", "phone")
        ) as response:
            statuses.append(response.status)
            last = response
    assert statuses == [200, 200, 200, 429]
    assert 0 < int(last.headers["Retry-After"]) <= 61


async def test_a_redis_that_hangs_is_named_as_a_problem_until_it_counts_again_and_refuses_nobody(
    nodes: NodeFactory, valkey: Valkey
) -> None:
    node = await nodes.start(redis_url=valkey.url, rate_search="3/minute")

    async def told() -> tuple[int, list[str], bool]:
        async with node.http.get(f"{node.url}/readyz") as response:
            status, problems = response.status, list((await response.json())["problems"])
        async with node.http.get(f"{node.url}/metrics") as response:
            return status, problems, 'relay_problem{part="redis"} 1.0' in await response.text()

    async def hurt() -> bool:
        return await told() == (200, ["redis", "bus"], True)

    async def well() -> bool:
        return await told() == (200, [], False)

    async def search() -> int:
        return (await node.request("GET", "/v1/users?q=bob", "ann", "phone"))[0]

    assert await well()
    valkey.pause()
    try:
        # Nobody asks for anything that is counted.
        await until(hurt, 6, "the hanging Redis is told of")
        start = monotonic()
        assert [await search() for _ in range(4)] == [200, 200, 200, 429]
        assert monotonic() - start < 3
        await node.connect("ann")
    finally:
        valkey.resume()
    await until(well, 6, "Redis counts again")
