"""Which nodes are dead: never too soon, and nobody because the store was silent."""

from __future__ import annotations

import pytest

from relay.routing import neighbours as module
from relay.routing.neighbours import Neighbours
from relay.store.mongo import PyMongoError


class Registry:
    """Who lives, as the store says (``living``, None while it is silent), looked at every two seconds of ``now``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.living: set[str] | None = {"b"}
        self.questions = 0
        self.changes = 0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        self.neighbours = Neighbours(self.others)
        self.neighbours.changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def others(self) -> set[str]:
        self.questions += 1
        if self.living is None:
            raise PyMongoError("no answer")
        return self.living

    async def passes(self, seconds: int) -> None:
        for _ in range(seconds // 2):
            self.now += 2
            if self.living is None:
                with pytest.raises(PyMongoError):
                    await self.neighbours.run()
            else:
                await self.neighbours.run()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


async def test_nobody_is_asked_for_as_long_as_there_is_nobody_to_ask_about(registry: Registry) -> None:
    await registry.passes(60)
    assert registry.questions == 0


async def test_who_is_missing_without_a_break_is_dead_and_may_come_back(registry: Registry) -> None:
    assert not registry.neighbours.is_dead("b")
    await registry.passes(10)
    registry.living = set()
    await registry.passes(6)
    assert not registry.neighbours.is_dead("b")
    await registry.passes(4)
    assert registry.neighbours.is_dead("b") and registry.changes == 1
    registry.living = {"b"}
    await registry.passes(2)
    assert not registry.neighbours.is_dead("b") and registry.changes == 2


async def test_one_that_died_before_it_was_asked_about_is_found_out(registry: Registry) -> None:
    assert not registry.neighbours.is_dead("old")
    await registry.passes(10)
    assert registry.neighbours.is_dead("old") and not registry.neighbours.is_dead("b")


async def test_a_silent_store_kills_nobody_and_all_have_time_to_speak_up_afterwards(
    registry: Registry,
) -> None:
    assert not registry.neighbours.is_dead("b")
    await registry.passes(4)
    registry.living = set()
    await registry.passes(4)
    registry.living = None
    await registry.passes(60)
    # Nobody could say that it lives.
    registry.living = set()
    await registry.passes(6)
    assert not registry.neighbours.is_dead("b")
    registry.living = {"b"}
    await registry.passes(20)
    assert not registry.neighbours.is_dead("b") and registry.changes == 0


async def test_what_is_remembered_is_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    for name in ("one", "two", "three"):
        registry.neighbours.is_dead(name)
    assert list(registry.neighbours._asked) == ["two", "three"]
