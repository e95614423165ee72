"""The bench of several nodes against real processes, at tiny sizes: that its figures add up, that nothing escapes its accounts, and
that it ends what it starts."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scripts.tools.bench.crowd_messages import Group
from scripts.tools.bench.load import ports
from scripts.tools.bench.messages import Order, Placement
from scripts.tools.bench.nodes_costs import Point, fitted, line
from scripts.tools.bench.pairs import message_id
from scripts.tools.bench.sites import by_kind
from scripts.tools.bench.sockets import Drained, Msg, Stored
from scripts.tools.bench.storm_devices import Device, Storm
from scripts.tools.bench.storm_messages import Assemble

ROOT = Path(__file__).parents[2]
SMALL = "--pairs 6 --seconds 1 --warmup 0.3 --rounds 1"


def start(temporary: Path, line: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.tools.bench", "nodes", *line.split()],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"},
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(temporary: Path, line: str) -> dict[str, Any]:
    process = start(temporary, f"{SMALL} {line} --json -")
    try:
        out, err = process.communicate(timeout=55)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err[-2000:]
    assert not list(temporary.iterdir()), "temporary files are left behind"
    assert processes_using(temporary) == []
    found: dict[str, Any] = msgspec.json.decode(out)
    assert found["ok"]
    assert all(check["ok"] for check in found["checks"])
    return found


def processes_using(directory: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if str(directory).encode() in text:
                found.append(process.name)
    return found


@pytest.mark.faults
def test_one_node_is_compared_with_two_that_pass_messages_through_redis(tmp_path: Path) -> None:
    found = bench(tmp_path, "--scenario workers --scenario hop --rate 100")
    workers, hop = found["workers"], found["hop"]
    one, two = workers["first"], workers["second"]
    assert workers["ratio"] == pytest.approx(two["rates"][0] / one["rates"][0])
    assert workers["cpu_ratio"] == pytest.approx(sum(two["cpu_us"].values()) / sum(one["cpu_us"].values()))
    assert set(one["cpu_us"]) == {"load", "mongod", "relay"}
    assert set(two["cpu_us"]) == {"load", "mongod", "relay", "valkey"}
    assert {"relay 1", "relay 2"} <= set(two["processes"])
    assert two["cpu_us"]["relay"] == pytest.approx(two["processes"]["relay 1"] + two["processes"]["relay 2"])
    assert one["use"]["redis_publications"] == 0
    # Half of the bodies go to another node, through Redis.
    assert hop["run"]["use"]["redis_in"] > 100
    assert hop["run"]["use"]["redis_publications"] > 0
    assert hop["asked_rate"] == 100
    same, another = hop["same"][0], hop["another"][0]
    assert same["count"] > 0
    assert another["count"] > 0
    assert hop["more_p50"] == pytest.approx(another["p50"] - same["p50"])
    for side in (one, two, hop["run"]):
        assert side["device_bytes"] > 2 * 200, "a body is written by one device and read by another"
        assert 0 < side["p50"] <= side["p99"]
    assert [goal["name"][:9] for goal in found["goals"]] == ["two nodes", "another n"]
    assert (found["shards"], found["storm"], found["kill"]) == (None, None, None)


@pytest.mark.faults
def test_a_cluster_of_two_shards_is_compared_with_a_replica_set(tmp_path: Path) -> None:
    found = bench(tmp_path, "--scenario shards")
    one, two = found["shards"]["first"], found["shards"]["second"]
    assert {"mongod s1", "mongod s2", "mongod config", "forwarder 1", "forwarder 2", "relay 1"} <= set(
        two["processes"]
    )
    counted = [side["cpu_us"]["relay"] + side["cpu_us"]["mongod"] for side in (one, two)]
    assert found["shards"]["ratio"] == pytest.approx(counted[1] / counted[0])
    assert two["use"]["mongo_requests"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("scenario", ["storm", "kill"])
def test_devices_that_come_back_at_once_get_all_that_waits_while_others_talk(
    tmp_path: Path, scenario: str
) -> None:
    found = bench(
        tmp_path,
        f"--scenario {scenario} --devices 40 --group-devices 8 --messages 3 --storm-rate 50 --calm 1",
    )
    storm = found[scenario]
    assert storm["killed"] is (scenario == "kill")
    assert (storm["came"]["devices"], storm["came"]["messages"]) == (40, 120)
    assert storm["came"]["drained_ms"]["count"] == 40
    assert storm["came"]["seconds"] * 1000 == pytest.approx(storm["came"]["drained_ms"]["max"], rel=0.01)
    assert storm["before_ms"]["count"] > 0
    assert storm["ratio_p99"] == pytest.approx(storm["during_ms"]["p99"] / storm["before_ms"]["p99"])
    assert ("relay 2" in storm["cpu"]) is (scenario == "storm")


@pytest.mark.faults
def test_single_costs_are_fitted_to_loads_of_one_node_and_of_two(tmp_path: Path) -> None:
    found = bench(tmp_path, "--scenario costs --rates 100")
    assert [point["name"] for point in found["costs"]["points"]] == ["one node", "two nodes"]
    assert all(point["relay"] > 0 and point["commit_ms"] > 0 for point in found["costs"]["points"])
    assert all(
        (point["publications"] > 0) is (point["name"] == "two nodes") for point in found["costs"]["points"]
    )


@pytest.mark.faults
def test_idle_devices_are_watched_and_what_is_kept_is_weighed(tmp_path: Path) -> None:
    line = "--scenario idle --scenario disk --devices 40 --group-devices 8 --idle-seconds 1 --kept 2000"
    found = bench(tmp_path, line)
    assert found["idle"]["devices"] == 40
    assert found["disk"]["document"] > 200
    assert found["disk"]["message"] > 0
    assert found["disk"]["oplog"] > found["disk"]["document"]


@pytest.mark.faults
def test_an_interrupt_ends_nodes_cluster_and_devices_and_leaves_no_files(tmp_path: Path) -> None:
    process = start(
        tmp_path, "--scenario shards --pairs 5 --seconds 60 --warmup 0", stdout=subprocess.DEVNULL
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "measuring" in line:
                break
        assert len(processes_using(tmp_path)) >= 6
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert processes_using(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_devices_that_are_no_whole_groups_are_refused_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--devices 15 --group-devices 10")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("bench: --devices 15: ")
    assert err.count("\n") == 1


# -- small parts


@pytest.mark.parametrize(
    ("placement", "wanted"),
    [
        ("first", [(1, 1), (1, 1), (1, 1), (1, 1)]),
        ("same", [(1, 1), (2, 2), (1, 1), (2, 2)]),
        ("apart", [(1, 2), (2, 1), (1, 2), (2, 1)]),
        ("mixed", [(1, 1), (2, 1), (1, 2), (2, 2)]),
    ],
)
def test_the_two_of_a_pair_are_placed_as_they_should(
    placement: Placement, wanted: list[tuple[int, int]]
) -> None:
    order = Order(host="", port=1, more_ports=[2], secret="", audience="", run="", placement=placement)
    assert [ports(order, number) for number in range(4)] == wanted


def test_processes_are_summed_by_what_they_are() -> None:
    assert by_kind({"relay 1": 1.0, "relay 2": 2.0, "mongod s1": 4.0}) == {"relay": 3.0, "mongod": 4.0}


def test_a_line_is_fitted_and_no_part_of_it_is_negative() -> None:
    assert line([0, 1, 2], [5, 7, 9]) == pytest.approx((5, 2))
    assert line([1, 2], [1, 3]) == pytest.approx((0, 1.4))
    assert line([1, 2], [3, 1]) == pytest.approx((2, 0))
    assert line([], []) == (0, 0)


def test_costs_are_found_again_from_points_that_they_made() -> None:
    points = []
    for name in ("one node", "two nodes"):
        for requests in (0.1, 0.5, 1.0):
            away = name != "one node"
            publications = requests / 2 if away else 0.0
            relay = 50 + 300 * requests + away * (20 + 100 * publications)
            mongod = 40 + 480 * requests
            points.append(
                Point(
                    name=name,
                    rate=1000,
                    commit_ms=3,
                    mongo_requests=requests,
                    publications=publications,
                    relay=relay,
                    mongod=mongod,
                    valkey=30 * publications,
                )
            )
    found = fitted(points, {}, [])
    assert (found.relay_message, found.relay_request) == pytest.approx((50, 300))
    assert (found.relay_remote, found.relay_publication) == pytest.approx((20, 100))
    assert (found.mongod_message, found.mongod_request) == pytest.approx((40, 480))
    assert found.valkey_publication == pytest.approx(30)


class Wire:
    """What a device would write."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, text: str) -> None:
        self.sent.append(text)


async def test_a_delivery_that_comes_twice_or_to_the_wrong_place_is_counted_as_such() -> None:
    group = Group(str(uuid.uuid4()), 0, 3)
    storm = Storm(Assemble(secret="", audience="", groups=[group], size=1))
    sender, first, second = (Device(storm, group, place) for place in range(3))
    wire = Wire()
    for device in (sender, first, second):
        device.socket = wire  # type: ignore[assignment]  # as much of a socket as it needs
    storm.post_from(sender, 1)
    name, conversation = message_id(1), group.conversation
    assert name in wire.sent.pop()
    sender.received([Stored(name)])
    first.received([Msg(name, conversation), Msg("unheard", conversation), Drained(1)])
    assert wire.sent.pop() == f'{{"t":"ack","conv":"{conversation}","ids":["{name}","unheard"]}}'
    first.received([Msg(name, conversation)])
    found = storm.settled()
    assert (found.sent, found.stored, found.delivered) == (1, 1, 1)
    assert (found.missing, found.repeated, found.unknown) == (1, 1, 1)


async def test_a_connection_that_is_cut_is_a_fault_unless_its_node_was_killed() -> None:
    group = Group(str(uuid.uuid4()), 0, 2)
    storm = Storm(Assemble(secret="", audience="", groups=[group], size=1))
    Device(storm, group, 1).lost("cut")
    assert storm.settled().closed == 1
    assert storm.settled().errors == ["cut"]
