"""Passwords: parameters, equal work for unknown users, and a pool that does not overflow."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher

from relay.security import hashing
from relay.security import passwords as module
from relay.security.passwords import Passwords
from relay.wire.errors import RelayError
from tests.support.frozen import freeze
from tests.support.waiting import until

GOOD = "correct horse battery"


@pytest.fixture(scope="module")
async def passwords() -> AsyncIterator[Passwords]:
    found = Passwords(processes=1, queue=10)
    yield found
    found.close()


class Watched:
    """A hasher that notes what it verifies."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self._hasher = hasher
        self.verified: list[str] = []

    def hash(self, password: str) -> str:
        return self._hasher.hash(password)

    def verify(self, hashed: str, password: str) -> bool:
        self.verified.append(hashed)
        return self._hasher.verify(hashed, password)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched(hashing.HASHER)
    monkeypatch.setattr(hashing, "HASHER", found)
    monkeypatch.setattr(hashing, "dummy", None)
    return found


def children(passwords: Passwords) -> list[int]:
    pool: Any = passwords._pool
    return [] if pool is None else list(pool._processes)


async def test_the_right_password_is_accepted_and_a_wrong_one_is_not(passwords: Passwords) -> None:
    hashed = await passwords.hash(GOOD)
    assert GOOD not in hashed
    assert await passwords.verify(hashed, GOOD)
    for wrong in (GOOD + " ", GOOD.upper(), "", "ü" * 256):
        assert not await passwords.verify(hashed, wrong)
    assert not await passwords.verify(None, GOOD)


async def test_hashes_are_argon2id_with_owasps_parameters_and_salted(passwords: Passwords) -> None:
    one, two = await passwords.hash(GOOD), await passwords.hash(GOOD)
    assert one.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert one != two


async def test_an_accented_letter_is_the_same_however_it_was_typed(passwords: Passwords) -> None:
    hashed = await passwords.hash("caf\u00e9 au lait")
    assert await passwords.verify(hashed, "cafe\u0301 au lait")
    assert not await passwords.verify(hashed, "cafe au lait")
    assert not await passwords.verify(hashed, "CAF\u00c9 AU LAIT")


def test_an_unknown_user_costs_the_verification_of_a_hash_of_the_same_kind(watched: Watched) -> None:
    hashed = hashing.make(GOOD)
    assert not hashing.matches(None, GOOD)
    assert not hashing.matches(hashed, "wrong password")
    dummy, known = watched.verified
    assert known == hashed
    assert dummy != hashed
    assert dummy.rpartition("$")[0].rpartition("$")[0] == hashed.rpartition("$")[0].rpartition("$")[0]


def test_nobody_logs_in_as_an_unknown_user_even_with_the_dummys_password(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "dummy", hashing.make(GOOD))
    assert not hashing.matches(None, GOOD)
    assert len(watched.verified) == 1


async def test_a_stored_hash_that_is_none_is_a_wrong_password(passwords: Passwords) -> None:
    assert not await passwords.verify("not a hash", GOOD)
    assert passwords.needs_rehash("not a hash")


async def test_a_hash_with_other_parameters_is_to_be_made_anew(passwords: Passwords) -> None:
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(GOOD)
    assert await passwords.verify(weak, GOOD)
    assert passwords.needs_rehash(weak)
    assert not passwords.needs_rehash(await passwords.hash(GOOD))


async def test_the_processes_step_back_behind_everything_else(passwords: Passwords) -> None:
    await passwords.verify(None, GOOD)
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in children(passwords)} == {hashing.NICENESS}
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0


async def test_the_event_loop_runs_while_passwords_are_hashed(passwords: Passwords) -> None:
    hashing_all = asyncio.gather(*(passwords.hash(GOOD) for _ in range(8)))
    longest, last = 0.0, time.perf_counter()
    while not hashing_all.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await hashing_all
    assert longest < 0.25


async def test_a_killed_process_costs_one_answer_and_the_next_is_right_again(passwords: Passwords) -> None:
    hashed = await passwords.hash(GOOD)
    (pid,) = children(passwords)
    freeze(pid)
    waiting = asyncio.create_task(passwords.verify(hashed, GOOD))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RelayError) as caught:
        await waiting
    assert caught.value.code == "unavailable"
    assert await passwords.verify(hashed, GOOD)
    assert children(passwords) != [pid]


async def test_what_does_not_fit_into_the_queue_is_told_to_come_back() -> None:
    passwords = Passwords(processes=1, queue=2)
    await passwords.hash(GOOD)
    (pid,) = children(passwords)
    freeze(pid)
    waiting = [asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RelayError) as caught:
        await passwords.verify(None, GOOD)
    assert caught.value.code == "unavailable"
    assert caught.value.retry_after
    os.kill(pid, signal.SIGCONT)
    assert await asyncio.gather(*waiting) == [False, False, False]
    assert await passwords.verify(None, GOOD) is False, "there is room again"
    passwords.close()


async def test_while_messages_are_under_way_a_process_rests_between_two_passwords(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_REST", 1000.0)
    monkeypatch.setattr(module, "_MOST_REST", 0.4)
    busy = True
    passwords = Passwords(processes=1, queue=10, busy=lambda: busy)
    await passwords.verify(None, GOOD)
    began = time.perf_counter()
    await passwords.verify(None, GOOD)
    assert time.perf_counter() - began >= 0.39
    monkeypatch.setattr(module, "_MOST_REST", 60.0)
    busy = False
    await passwords.verify(None, GOOD)
    async with asyncio.timeout(30):
        await passwords.verify(None, GOOD)
    passwords.close()


async def test_an_answer_does_not_wait_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST", 1000.0)
    monkeypatch.setattr(module, "_MOST_REST", 60.0)
    passwords = Passwords(processes=1, queue=10, busy=lambda: True)
    async with asyncio.timeout(30):
        assert await passwords.verify(None, GOOD) is False
    passwords.close()


async def test_who_would_wait_for_too_long_is_told_to_come_back_while_there_is_room_in_the_queue() -> None:
    passwords = Passwords(processes=1, queue=100)
    await passwords.hash(GOOD)
    (pid,) = children(passwords)
    freeze(pid)
    passwords._lately = 8.0
    waiting = [asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RelayError) as caught:
        await passwords.verify(None, GOOD)
    assert caught.value.code == "unavailable"
    os.kill(pid, signal.SIGCONT)
    await asyncio.gather(*waiting)
    passwords._lately = 100.0
    assert await passwords.verify(None, GOOD) is False, "nobody waits"
    passwords.close()


async def test_who_gives_up_makes_room() -> None:
    passwords = Passwords(processes=1, queue=1)
    await passwords.hash(GOOD)
    (pid,) = children(passwords)
    freeze(pid)
    first, second = (asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(2))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    third = asyncio.create_task(passwords.verify(None, GOOD))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGCONT)
    assert not any(await asyncio.gather(first, third))
    passwords.close()


async def test_what_waits_at_the_end_is_told_to_come_back() -> None:
    passwords = Passwords(processes=1, queue=10)
    await passwords.hash(GOOD)
    waiting = [asyncio.create_task(passwords.verify(None, GOOD)) for _ in range(6)]
    await asyncio.sleep(0)
    await asyncio.to_thread(passwords.close)
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(one is False or isinstance(one, RelayError) for one in found)
    assert any(isinstance(one, RelayError) for one in found)
    with pytest.raises(RelayError):
        await passwords.verify(None, GOOD)


_LIFE = """
import asyncio, sys
from relay.security.passwords import Passwords
async def main():
    passwords = Passwords(processes=1, queue=1)
    await passwords.hash("a password")
    print(*passwords._pool._processes, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_process_whose_relay_died_before_it_had_started_ends_by_itself() -> None:
    line = "from relay.security import hashing; hashing.start(2**30); print('alive')"
    ended = subprocess.run([sys.executable, "-c", line], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"")


async def test_the_processes_end_with_a_relay_that_is_killed() -> None:
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _LIFE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert relay.stdout is not None
    child = int(await relay.stdout.readline())
    relay.kill()
    await relay.wait()

    async def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    await until(gone, 5, "the process has ended")
