"""A device that comes by its token is in the audit trail before it is here."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from typing import Any

import aiohttp
import pytest

from relay.wire.errors import RelayError
from tests.support.device import Closed, WireDevice
from tests.support.failpoints import failing
from tests.support.logins import ask, connect, logged_in, minted, noted, register, works
from tests.support.node import Node, NodeFactory
from tests.support.on_cluster import ON_CLUSTER

ACT = "device.provision"
AGENT = {"User-Agent": "app/7 (tests)"}


async def by_socket(node: Node, token: str) -> WireDevice:
    headers = {"Authorization": f"Bearer {token}", **AGENT}
    device = WireDevice(await node.http.ws_connect(node.url + "/v1/ws", headers=headers), "", "")
    node._devices.append(device)
    device.welcome = await device.expect("welcome", seconds=30)
    return device


async def by_first_frame(node: Node, token: str) -> WireDevice:
    device = WireDevice(await node.http.ws_connect(node.url + "/v1/ws", headers=AGENT), "", "")
    node._devices.append(device)
    await device.put({"t": "auth", "token": token})
    device.welcome = await device.expect("welcome", seconds=30)
    return device


async def by_request(node: Node, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}", **AGENT}
    async with node.http.get(node.url + "/v1/me", headers=headers) as response:
        assert response.status == 200


DOORS = {"socket": by_socket, "first frame": by_first_frame, "request": by_request}


def told(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("entry", "at", "hash", "act")}


def entry_of(user: str, device: str, **details: bool) -> dict[str, Any]:
    return {
        "actor": user,
        "target": user,
        "device": device,
        "address": "127.0.0.1",
        "agent": AGENT["User-Agent"],
        "details": details,
    }


@pytest.mark.parametrize("door", DOORS)
async def test_the_first_contact_of_a_device_is_one_entry_and_the_next_is_none(node: Node, door: str) -> None:
    await DOORS[door](node, minted("ann", 0, "phone"))
    await DOORS[door](node, minted("ann", 0, "tablet"))
    expected = [
        entry_of("ann", "tablet", returned=False),
        entry_of("ann", "phone", returned=False, account=True),
    ]
    assert [told(entry) for entry in await noted(node, "ann", ACT)] == expected
    for again in DOORS.values():
        for name in ("phone", "tablet"):
            await again(node, minted("ann", 0, name))
    assert [told(entry) for entry in await noted(node, "ann", ACT)] == expected
    assert (await node.relay.context.audit.verify()).holds


async def test_a_device_that_comes_through_every_door_at_once_has_one_entry(node: Node) -> None:
    found = await asyncio.gather(
        *(open_door(node, minted("ann", 0)) for open_door in (by_socket, *[by_request] * 8))
    )
    assert len(found) == 9
    assert len(await noted(node, "ann", ACT)) == 1


@pytest.mark.parametrize("door", DOORS)
async def test_a_removed_device_that_comes_back_has_an_entry_that_says_so(node: Node, door: str) -> None:
    old, new = minted("ann", -2, "tablet"), minted("ann", 2, "tablet")
    await by_request(node, minted("ann", 0, "phone"))
    await by_request(node, old)
    assert (await node.request("DELETE", "/v1/auth/devices/tablet", "ann", "phone"))[0] == 200
    assert not await works(node, old)
    assert len(await noted(node, "ann", ACT)) == 2, "whose token is not good leaves nothing"
    await DOORS[door](node, new)
    await DOORS[door](node, new)
    entries = await noted(node, "ann", ACT)
    assert len(entries) == 3
    assert told(entries[0]) == entry_of("ann", "tablet", returned=True)


async def test_devices_that_log_in_by_password_are_in_the_trail_once_by_that(node: Node) -> None:
    made = await register(node)
    user = made["user"]["id"]
    tablet = await logged_in(node, made, "tablet")
    for one in (made, tablet):
        await connect(node, one["accessToken"])
        assert await works(node, one["accessToken"])
    assert await noted(node, user, ACT) == []
    assert len(await noted(node, user, "session.open")) == 2


async def test_without_provision_nobody_is_noted(nodes: NodeFactory) -> None:
    node = await nodes.start(auto_provision=False)
    assert not await works(node, minted("ann", 0))
    assert await node.db.audit.count_documents({}) == 0


async def unwritable(*_: object, **__: object) -> None:
    raise RelayError("unavailable", "the audit trail cannot be written; try again")


async def test_while_the_trail_cannot_be_written_new_devices_are_told_to_come_again_and_known_ones_are_served(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await by_socket(node, minted("bob", 0))
    with monkeypatch.context() as patch:
        patch.setattr(node.relay.context.audit, "record", unwritable)
        for door in (by_socket, by_first_frame):
            with pytest.raises(Closed) as caught:
                await door(node, minted("ann", 0))
            assert caught.value.code == 1012
        status, answer = await ask(node, "GET", "/v1/me", token=minted("ann", 0))
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        for known in DOORS.values():
            await known(node, minted("bob", 0))
    assert await node.db.users.distinct("_id") == ["bob"]
    assert await node.db.devices.distinct("_id") == ["bob/phone"]
    await by_socket(node, minted("ann", 0))
    assert len(await noted(node, "ann", ACT)) == 1


@pytest.mark.skipif(ON_CLUSTER, reason="fail points are set at the server that is asked")
async def test_a_trail_whose_writes_fail_for_a_moment_costs_a_moment_and_no_second_entry(node: Node) -> None:
    async with failing(node, "insert", "audit", times=2, errorCode=189):
        await asyncio.gather(*(by_socket(node, minted(f"u{number}", 0)) for number in range(20)))
    assert await node.db.audit.count_documents({"act": ACT}) == 20
    assert (await node.relay.context.audit.verify()).holds


async def test_of_hundreds_of_new_devices_at_once_each_has_one_entry(nodes: NodeFactory) -> None:
    # More than a hundred sockets to one node.
    await nodes._http.close()
    nodes._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    node = await nodes.start()
    users = [f"u{number:03}" for number in range(300)]
    found = await asyncio.gather(*(node.connect(user, welcome=False) for user in users))
    await asyncio.gather(*(one.expect("welcome", seconds=30) for one in found))
    actors = [
        entry["personal"]["actor"]["value"]
        async for entry in node.db.audit.find({"act": ACT}, {"personal.actor": 1})
    ]
    assert sorted(actors) == users
    verdict = await node.relay.context.audit.verify()
    assert (verdict.holds, verdict.entries) == (True, len(users))


async def test_a_person_finds_their_entry_in_the_export_and_it_forgets_them_when_they_are_erased(
    node: Node,
) -> None:
    await by_socket(node, minted("ann", 0))
    url, headers = node.url + "/v1/me/export", node.headers("ann", "phone")
    async with node.http.get(url, headers=headers) as response:
        archive = zipfile.ZipFile(io.BytesIO(await response.read()))
    (entry,) = [one for one in json.loads(archive.read("relay-export/audit.json")) if one.get("act") == ACT]
    assert told(entry) == entry_of("ann", "phone", returned=False, account=True)
    assert (await node.request("DELETE", "/v1/me", "ann", "phone"))[0] == 200
    stored = await node.db.audit.find_one({"act": ACT})
    assert stored is not None
    assert stored["personal"] == {}
    assert set(stored["hashes"]) == {"actor", "target", "device", "address", "agent"}
    assert (await node.relay.context.audit.verify()).holds
    assert not await works(node, minted("ann", -60)), "an older token"
    assert await node.db.audit.count_documents({"act": ACT}) == 1, "leaves no new trace of them"
