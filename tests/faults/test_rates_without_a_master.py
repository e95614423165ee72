"""Rate limits and hot messages over a Redis cluster of which one master is dead: what the others keep is shared all the while."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import pytest
from limits import parse

from relay.security.rates import Rates
from relay.store.hot_redis import HotRedis
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from tests.support.valkey import Valkey
from tests.support.valkey_cluster import master_of, valkey_cluster
from tests.support.waiting import until

OPTIONS = ("--cluster-require-full-coverage", "no", "--cluster-node-timeout", "5000")
RULE = "4/minute"
MESSAGE = "00000000-0000-4000-8000-000000000001"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has time to answer, on a machine that is busy, too."""
    monkeypatch.setattr("relay.store.hot_redis._ANSWER_SECONDS", 5)
    monkeypatch.setattr("relay.security.rates._REDIS_SECONDS", 5)


@pytest.fixture
async def masters(tmp_path: Path) -> AsyncIterator[list[Valkey]]:
    async with valkey_cluster(tmp_path, options=OPTIONS) as running:
        yield running


def url(masters: list[Valkey], number: int = 0) -> str:
    return masters[number].url.replace("redis://", "redis+cluster://")


def counted_by(master: int) -> str:
    """A key whose counts this master has."""
    rule = parse(RULE)

    def name(key: str) -> str:
        return rule.key_for("connect", sha256(key.encode()).hexdigest())

    return next(key for n in range(1000) if master_of(name(key := f"a{n}")) == master)


async def allowed(one: Rates, other: Rates, key: str) -> int:
    """How often two nodes together allow what each asks four times."""
    count = 0
    for rates in [one, other] * 4:
        try:
            await rates.check("connect", key)
        except RelayError:
            continue
        count += 1
    return count


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_counts_of_living_masters_are_shared_and_those_of_a_dead_one_are_each_node_s(
    masters: list[Valkey],
) -> None:
    one, other = nodes = [Rates({"connect": RULE}, redis_url=url(masters)) for _ in range(2)]
    try:
        assert all([await rates.reaches_redis() for rates in nodes])
        await masters[2].kill()
        lost, kept = counted_by(2), counted_by(1)
        assert await allowed(one, other, lost) == 8
        assert await allowed(one, other, kept) == 4
        assert not any([await rates.reaches_redis() for rates in nodes])
        await masters[2].start()

        async def well() -> bool:
            return all([await rates.reaches_redis() for rates in nodes])

        await until(well, 30, "all masters count again")
    finally:
        for rates in nodes:
            await rates.close()


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_hot_messages_of_living_masters_are_kept_and_found(masters: list[Valkey]) -> None:
    hot = HotRedis(url(masters), 1_000_000)
    hot.start()
    try:
        envelopes = [on_master(number) for number in (1, 2)]
        living, dying = envelopes
        for envelope in envelopes:
            hot.put(envelope)
        wanted = [(envelope.doc_id, envelope.seq) for envelope in envelopes]

        async def kept() -> bool:
            return len(await hot.find(wanted)) == 2

        await until(kept, 20, "both are kept")
        await masters[2].kill()
        hot.forget(dying.doc_id)
        for _ in range(5):
            assert list(await hot.find(wanted)) == [living.doc_id]
        new = message_of(living.conversation, "00000000-0000-4000-8000-000000000002")
        hot.put(new)

        async def kept_too() -> bool:
            return new.doc_id in await hot.find([(new.doc_id, new.seq)])

        await until(kept_too, 20, "a new one is kept, though one that is to leave cannot")
        hot.forget(living.doc_id)

        async def gone() -> bool:
            return not await hot.find(wanted)

        await until(gone, 20, "it has left")
        assert dying.doc_id in hot._leaving
        await masters[2].start()

        async def left() -> bool:
            return not hot._leaving

        await until(left, 30, "what was to leave has left")
    finally:
        await hot.close()


def on_master(master: int) -> Envelope:
    """A message of a conversation that this master has."""
    conv = next(f"talk{n}" for n in range(1000) if master_of(f"relay:hot:{{talk{n}}}:{MESSAGE}") == master)
    return message_of(conv, MESSAGE)


def message_of(conv: str, id: str) -> Envelope:
    envelope = Envelope(
        conv, id, user="ann", device="phone", seq=5, at=1000, kind="text", body="hot", awaiting=["bob/phone"]
    )
    envelope.size = 100
    return envelope
