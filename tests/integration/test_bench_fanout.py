"""The fan-out bench against real processes, at tiny sizes: that its figures add up, and that nothing escapes its accounts."""

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scripts.tools.bench.crowd import Crowd, Member
from scripts.tools.bench.crowd_messages import Gather, Group, Talk
from scripts.tools.bench.pairs import message_id

ROOT = Path(__file__).parents[2]
SMALL = "--devices 30 --messages 6 --senders 2 --seconds 1 --warmup 0.2"


def run(temporary: Path, line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "scripts.tools.bench", "fanout", *line.split()],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def fanout(temporary: Path, line: str) -> dict[str, Any]:
    done = run(temporary, f"{SMALL} {line} --json -")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(temporary.iterdir()), "temporary files are left behind"
    found: dict[str, Any] = msgspec.json.decode(done.stdout)
    assert found["ok"]
    assert all(check["ok"] for check in found["checks"])
    return found


def test_latency_and_closed_loops_are_measured_and_every_delivery_is_accounted_for(tmp_path: Path) -> None:
    line = "--scenario latency --scenario sustained --scenario inline --inline-groups 2 --inline-devices 9 --limit-seconds 1"
    found = fanout(tmp_path, line)
    said = found["latency"]["said"]
    assert found["latency"]["devices"] == 30
    assert [said[name]["count"] for name in ("stored_ms", "first_ms", "last_ms")] == [6, 6, 6]
    assert said["last_ms"]["p50"] >= said["first_ms"]["p50"] > 0
    assert (found["inline"]["groups"], found["inline"]["devices"]) == (2, 9)
    for name in ("sustained", "inline"):
        measured = found[name]["measured"]
        assert measured["deliveries"] > 0
        assert measured["rate"] == pytest.approx(measured["deliveries"] / measured["seconds"])
        assert 0.9 <= measured["seconds"] < 10
        assert measured["cpu_us"]["relay"] > 0
        assert found[name]["ratio"] == pytest.approx(measured["rate"] / found["raw_rate"])
        assert found[name]["reached_ms"]["count"] > 0
    assert found["raw_rate"] == pytest.approx(sum(limit["rate"] for limit in found["limits"]) / 2)
    assert found["huge"] is None


def test_absent_devices_keep_their_deliveries_and_neighbours_theirs_too(tmp_path: Path) -> None:
    line = "--scenario huge --scenario neighbours --huge-devices 50 --online 20 --pairs 2 --rate 50 --limit-seconds 0"
    found = fanout(tmp_path, line)
    assert (found["huge"]["devices"], found["huge"]["online"]) == (50, 20)
    kept = next(
        check["found"] for check in found["checks"] if check["name"].startswith("huge: the store holds")
    )
    assert "30 devices await 10" in kept
    beside = found["neighbours"]
    assert beside["alone_ms"]["count"] > 0
    assert beside["beside_ms"]["count"] > 0
    assert beside["ratio_p50"] == pytest.approx(beside["beside_ms"]["p50"] / beside["alone_ms"]["p50"])
    assert beside["group"]["deliveries"] > 0


def test_everybody_drains_the_same_messages_as_configured_and_with_another_setting(tmp_path: Path) -> None:
    found = fanout(tmp_path, "--scenario reconnect --limit-seconds 0 --compare RELAY_MESSAGE_RATE=1000")
    plain, other = found["reconnect"]
    assert (plain["setting"], other["setting"]) == (None, "RELAY_MESSAGE_RATE=1000")
    for one in (plain, other):
        assert (one["devices"], one["messages"]) == (30, 6)
        assert one["seconds"] > 0
    assert found["compared"]["seconds_ratio"] == pytest.approx(other["seconds"] / plain["seconds"])


def test_a_comparison_with_anything_but_a_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--compare HOT=1")
    assert done.returncode == 1
    assert done.stderr.startswith("bench: --compare HOT=1: ")
    assert done.stderr.count("\n") == 1


# -- the crowd's own accounts


class Wire:
    """What a member would write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.transport = self

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def send(self, text: str) -> None:
        self.written.append(text.encode())


async def a_crowd(count: int = 3) -> tuple[Crowd, list[Member], list[Wire]]:
    """A crowd in one group whose members are connected to nothing; the first of them has sent two messages."""
    group = Group(str(uuid.uuid4()), 0, count)
    crowd = Crowd(Gather(host="", port=0, secret="", audience="", groups=[group], size=3))
    wires = [Wire() for _ in crowd.members]
    for member, wire in zip(crowd.members, wires, strict=True):
        crowd.join(member, wire)  # type: ignore[arg-type]  # as much of a socket as it needs
    crowd.talk(Talk(senders=1, window=2))
    crowd.silence()
    return crowd, crowd.members, wires


def msg(member: Member, number: int) -> str:
    return f'{{"t":"msg","id":"{message_id(number)}","conv":"{member.group.conversation}","seq":{number}}}'


def stored(number: int) -> bytes:
    return f'{{"t":"stored","id":"{message_id(number)}"}}'.encode()


async def test_a_frame_is_acknowledged_as_a_whole_by_every_device_that_gets_it() -> None:
    crowd, members, wires = await a_crowd()
    frame = f"[{msg(members[0], 1)},{msg(members[0], 2)}]".encode()
    for member in members[1:]:
        member.took(frame)
    one, other = wires[1].written[-1], wires[2].written[-1]
    assert one == other
    ack = msgspec.json.decode(one[one.index(b"{") :])
    assert ack == {
        "t": "ack",
        "conv": members[0].group.conversation,
        "ids": [message_id(1), message_id(2)],
    }
    for number in (1, 2):
        members[0].took(stored(number))
    settled = await crowd.stop()
    assert (settled.sent, settled.stored, settled.delivered, settled.missing) == (2, 2, 4, 0)
    assert settled.per_frame == 2


async def test_what_comes_again_or_was_never_sent_is_counted_though_the_bytes_are_known() -> None:
    crowd, members, _ = await a_crowd()
    for _ in range(3):
        members[1].took(msg(members[0], 1).encode())
    for _ in range(2):
        members[1].took(msg(members[0], 77).encode())
    members[0].took(stored(1))
    members[0].took(stored(1))
    assert (crowd.delivered, crowd.repeated, crowd.unknown) == (1, 3, 2)


async def test_a_message_that_a_device_misses_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.tools.bench.crowd._SETTLE_SECONDS", 0.05)
    crowd, members, _ = await a_crowd()
    for number in (1, 2):
        members[0].took(stored(number))
        members[1].took(msg(members[0], number).encode())
    members[2].took(msg(members[0], 1).encode())
    settled = await crowd.stop()
    assert (settled.delivered, settled.missing) == (3, 1)
    assert "1 messages are still under way" in settled.errors[0]


async def test_a_refusal_is_counted_with_its_reason() -> None:
    crowd, members, _ = await a_crowd()
    for number in (1, 2):
        members[0].took(
            f'{{"t":"error","code":"too_large","message":"no","id":"{message_id(number)}"}}'.encode()
        )
    settled = await crowd.stop()
    assert (settled.failed, settled.stored) == (2, 0)
    assert settled.errors == ["too_large: no", "too_large: no"]
