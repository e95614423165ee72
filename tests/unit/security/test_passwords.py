"""Passwords: parameters, equal work for unknown users, and a pool that does not overflow."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from argon2 import PasswordHasher

from relay.security.passwords import Passwords
from relay.wire.errors import RelayError

GOOD = "correct horse battery"


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    found = Passwords(threads=1, queue=10)
    yield found
    found.close()


class Watched:
    """A hasher that notes what it verifies; ``gate`` holds it up."""

    def __init__(self, hasher: Any) -> None:
        self._hasher = hasher
        self.verified: list[str] = []
        self.priorities: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def hash(self, password: str) -> str:
        assert self.gate.wait(10)
        return str(self._hasher.hash(password))

    def verify(self, hashed: str, password: str) -> bool:
        assert self.gate.wait(10)
        self.verified.append(hashed)
        self.priorities.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return bool(self._hasher.verify(hashed, password))


@pytest.fixture
def watched(passwords: Passwords) -> Watched:
    found = Watched(passwords._hasher)
    passwords._hasher = found  # type: ignore[assignment]
    return found


async def test_the_right_password_is_accepted_and_a_wrong_one_is_not(passwords: Passwords) -> None:
    hashed = await passwords.hash(GOOD)
    assert GOOD not in hashed
    assert await passwords.verify(hashed, GOOD)
    for wrong in (GOOD + " ", GOOD.upper(), "", "ü" * 256):
        assert not await passwords.verify(hashed, wrong)


async def test_hashes_are_argon2id_with_owasps_parameters_and_salted(passwords: Passwords) -> None:
    one, two = await passwords.hash(GOOD), await passwords.hash(GOOD)
    assert one.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert one != two


async def test_an_accented_letter_is_the_same_however_it_was_typed(passwords: Passwords) -> None:
    hashed = await passwords.hash("caf\u00e9 au lait")
    assert await passwords.verify(hashed, "cafe\u0301 au lait")
    assert not await passwords.verify(hashed, "cafe au lait")
    assert not await passwords.verify(hashed, "CAF\u00c9 AU LAIT")


async def test_an_unknown_user_costs_the_verification_of_a_hash_of_the_same_kind(
    passwords: Passwords, watched: Watched
) -> None:
    hashed = await passwords.hash(GOOD)
    assert not await passwords.verify(None, GOOD)
    assert not await passwords.verify(hashed, "wrong password")
    dummy, known = watched.verified
    assert known == hashed
    assert dummy != hashed
    assert dummy.rpartition("$")[0].rpartition("$")[0] == hashed.rpartition("$")[0].rpartition("$")[0]


async def test_nobody_logs_in_as_an_unknown_user_even_with_the_dummys_password(passwords: Passwords) -> None:
    passwords._dummy = passwords._pool.submit(
        PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash, GOOD
    )
    assert not await passwords.verify(None, GOOD)


async def test_a_stored_hash_that_is_none_is_a_wrong_password(passwords: Passwords) -> None:
    assert not await passwords.verify("not a hash", GOOD)
    assert passwords.needs_rehash("not a hash")


async def test_a_hash_with_other_parameters_is_to_be_made_anew(passwords: Passwords) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(GOOD)
    assert await passwords.verify(weak, GOOD)
    assert passwords.needs_rehash(weak)
    assert not passwords.needs_rehash(await passwords.hash(GOOD))


async def test_the_threads_step_back_behind_everything_else(passwords: Passwords, watched: Watched) -> None:
    await passwords.verify(None, GOOD)
    assert watched.priorities == {10}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == 0


async def test_the_event_loop_runs_while_passwords_are_hashed(passwords: Passwords) -> None:
    hashing = asyncio.gather(*(passwords.hash(GOOD) for _ in range(8)))
    longest, last = 0.0, time.perf_counter()
    while not hashing.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await hashing
    assert longest < 0.25


async def test_what_does_not_fit_into_the_queue_is_told_to_come_back() -> None:
    passwords = Passwords(threads=1, queue=2)
    await passwords.hash(GOOD)
    watched = Watched(passwords._hasher)
    passwords._hasher = watched  # type: ignore[assignment]
    watched.gate.clear()
    waiting = [asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RelayError) as caught:
        await passwords.verify(None, GOOD)
    assert caught.value.code == "unavailable"
    assert caught.value.retry_after
    watched.gate.set()
    assert await asyncio.gather(*waiting) == [False, False, False]
    assert await passwords.verify(None, GOOD) is False, "there is room again"
    passwords.close()


async def test_who_gives_up_makes_room() -> None:
    passwords = Passwords(threads=1, queue=1)
    await passwords.hash(GOOD)
    watched = Watched(passwords._hasher)
    passwords._hasher = watched  # type: ignore[assignment]
    watched.gate.clear()
    first, second = (asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    third = asyncio.create_task(passwords.verify(None, GOOD))
    await asyncio.sleep(0)
    watched.gate.set()
    assert not any(await asyncio.gather(first, third))
    assert len(watched.verified) == 2, "what was given up is not worked on"
    passwords.close()


async def test_what_waits_when_the_pool_closes_is_refused() -> None:
    passwords = Passwords(threads=1, queue=10)
    await passwords.hash(GOOD)
    watched = Watched(passwords._hasher)
    passwords._hasher = watched  # type: ignore[assignment]
    watched.gate.clear()
    waiting = [asyncio.create_task(passwords.hash(GOOD)) for _ in range(3)]
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(asyncio.to_thread(passwords.close))
    await asyncio.sleep(0.05)
    watched.gate.set()
    await closing
    first, *others = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, str)
    assert [getattr(error, "code", None) for error in others] == ["unavailable", "unavailable"]
    with pytest.raises(RelayError):
        await passwords.hash(GOOD)
