"""What scripts/chat tells of receipts: one line for what came together, a person once."""

from __future__ import annotations

import asyncio

import pytest

from scripts.tools import receipts
from scripts.tools.receipts import Receipts


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(receipts, "_GATHERING_SECONDS", 0.01)
    return []


async def test_everybody_who_has_the_last_line_is_named_in_one(told: list[str]) -> None:
    own = Receipts(told.append)
    own.typed("m1", "hello")
    own.arrived(["m1"], "bob")
    own.arrived(["m1"], "cleo")
    own.arrived(["m1"], "bob")
    await asyncio.sleep(0.05)
    own.arrived(["m1"], "bob")
    await asyncio.sleep(0.05)
    assert told == ["delivered to bob, cleo"]


async def test_a_line_of_before_is_quoted_and_several_are_counted(told: list[str]) -> None:
    own = Receipts(told.append)
    own.typed("m1", "x" * 60)
    own.typed("m2", "later")
    own.arrived(["m1"], "bob")
    own.arrived(["m1", "m2"], "cleo")
    own.arrived(["m0"], "dora")
    await asyncio.sleep(0.05)
    assert told == [
        f"delivered to bob: {'x' * 40}…",
        "2 messages delivered to cleo",
        "an earlier message delivered to dora",
    ]


async def test_of_a_large_group_only_some_are_named(told: list[str]) -> None:
    own = Receipts(told.append)
    own.typed("m1", "hello")
    for number in range(1000):
        own.arrived(["m1"], f"n{number}")
    await asyncio.sleep(0.05)
    assert told == ["delivered to n0, n1, n2, n3, n4, n5, n6, n7, n8, n9 and 990 more"]


async def test_nothing_is_told_after_the_end(told: list[str]) -> None:
    own = Receipts(told.append)
    own.arrived(["m1"], "bob")
    own.close()
    await asyncio.sleep(0.05)
    assert told == []
