"""PROTOCOL 3: the end-to-end key directory over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.failpoints import MAJORITY_TIMEOUT, failing
from tests.support.node import Node, NodeFactory

KEY = "a2V5"


def signed(number: int) -> dict[str, Any]:
    return {"id": number, "key": KEY, "signature": "c2ln"}


def upload(**changes: Any) -> dict[str, Any]:
    return {
        "identityKey": "aWQ=",
        "registrationId": 7,
        "signedPreKey": signed(1),
        "oneTimePreKeys": [{"id": number, "key": KEY} for number in (1, 2, 3)],
        "kemPreKeys": [signed(4)],
        "lastResort": signed(9),
        **changes,
    }


async def publish(node: Node, user: str = "ann", device: str = "phone", **changes: Any) -> dict[str, Any]:
    status, found = await node.request("PUT", "/v1/keys", user, device, upload(**changes))
    assert status == 200, found
    return dict(found)


async def claim(node: Node, *devices: str, user: str = "bob") -> tuple[int, Any]:
    return await node.request("POST", "/v1/keys/claim", user, "phone", {"devices": list(devices)})


async def directory(node: Node, user: str, by: str = "bob") -> tuple[int, Any]:
    return await node.request("GET", f"/v1/users/{user}/keys", by, "phone")


def code(found: tuple[int, Any]) -> tuple[int, str]:
    status, answer = found
    assert set(answer) == {"error"}, answer
    return status, answer["error"]["code"]


async def test_published_keys_are_listed_claimed_and_counted(node: Node) -> None:
    assert await publish(node) == {"oneTime": 3, "kem": 1}
    listed = {
        "devices": [
            {"device": "ann/phone", "identityKey": "aWQ=", "registrationId": 7, "signedPreKey": signed(1)}
        ]
    }
    assert await directory(node, "ann") == await directory(node, "ann") == (200, listed)
    assert await claim(node, "ann/phone", "ann/none", "cleo/none") == (
        200,
        {
            "devices": [
                {"device": "ann/phone", "oneTimePreKey": {"id": 1, "key": KEY}, "kemPreKey": signed(4)},
                {"device": "ann/none", "oneTimePreKey": None, "kemPreKey": None},
                {"device": "cleo/none", "oneTimePreKey": None, "kemPreKey": None},
            ]
        },
    )
    _, found = await claim(node, "ann/phone")
    assert found["devices"][0]["kemPreKey"] == signed(9)
    assert await node.request("GET", "/v1/keys/count", "ann", "phone") == (200, {"oneTime": 1, "kem": 0})
    assert await node.request("GET", "/v1/keys/count", "bob", "phone") == (200, {"oneTime": 0, "kem": 0})
    assert await publish(node) == {"oneTime": 1, "kem": 0}


async def test_a_hundred_claims_at_once_never_get_the_same_key(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_key_claim="off")
    await publish(node, oneTimePreKeys=[{"id": number, "key": KEY} for number in range(80)])
    answers = await asyncio.gather(*(claim(node, "ann/phone") for _ in range(100)))
    assert {status for status, _ in answers} == {200}
    given = [found["devices"][0]["oneTimePreKey"] for _, found in answers]
    assert sorted(one["id"] for one in given if one) == list(range(80))
    assert given.count(None) == 20


async def test_a_claim_for_many_devices_answers_in_their_order(node: Node) -> None:
    devices = [f"d{number}" for number in range(40)]
    await asyncio.gather(*(publish(node, device=device) for device in devices))
    wanted = [f"ann/{device}" for device in reversed(devices)]
    status, found = await claim(node, *wanted)
    assert status == 200
    assert [one["device"] for one in found["devices"]] == wanted
    assert {one["oneTimePreKey"]["id"] for one in found["devices"]} == {1}


async def test_a_device_is_told_when_its_stock_runs_low(node: Node) -> None:
    await publish(node, oneTimePreKeys=[{"id": number, "key": KEY} for number in range(21)])
    ann = await node.connect("ann")
    await claim(node, "ann/phone")
    await ann.nothing("keys", 0.2)
    await claim(node, "ann/phone")
    assert await ann.expect("keys") == {"t": "keys", "oneTime": 19}
    await claim(node, "ann/phone")
    assert await ann.expect("keys") == {"t": "keys", "oneTime": 18}
    await ann.nothing("keys", 0.2)


async def test_claims_are_limited_for_each_target(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_key_claim="2/minute")
    await publish(node)
    await publish(node, device="tablet")
    for user in ("bob", "cleo"):
        assert (await claim(node, "ann/phone", user=user))[0] == 200
    headers = node.headers("bob", "phone")
    body = {"devices": ["ann/phone", "ann/tablet"]}
    async with node.http.post(node.url + "/v1/keys/claim", json=body, headers=headers) as answer:
        found = await answer.json()
        assert (answer.status, found["error"]["code"]) == (429, "rate_limited")
        assert found["error"]["details"]["devices"] == ["ann/phone"]
        assert int(answer.headers["Retry-After"]) >= 1
    assert (await claim(node, "ann/tablet"))[0] == 200
    # Nothing was handed out to those who were refused.
    assert await node.request("GET", "/v1/keys/count", "ann", "tablet") == (200, {"oneTime": 2, "kem": 0})
    assert await node.request("GET", "/v1/keys/count", "ann", "phone") == (200, {"oneTime": 1, "kem": 0})


async def test_a_caller_uses_up_only_their_own_claims_of_a_device(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_key_claim="4/minute", rate_key_claim_pair="2/minute")
    await publish(node)
    status = [(await claim(node, "ann/phone", user="bob"))[0] for _ in range(5)]
    assert status == [200, 200, 429, 429, 429]
    assert [(await claim(node, "ann/phone", user="cleo"))[0] for _ in range(2)] == [200, 200]


async def test_a_caller_claims_of_so_many_devices_and_invented_ones_count_nowhere(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_key_claim_caller="3/minute", rate_key_claim="100/minute")
    for device in ("phone", "tablet"):
        await publish(node, device=device)
    invented = [f"made-up-{number}/phone" for number in range(250)]
    for _ in range(4):
        assert (await claim(node, *invented))[0] == 200
    assert len(node.relay.context.rates._here["key_claim"]) == 0
    assert (await claim(node, "ann/phone", "ann/tablet"))[0] == 200
    refused = await claim(node, "ann/phone", "ann/tablet")
    assert code(refused) == (429, "rate_limited")
    assert "devices" not in refused[1]["error"].get("details", {})
    assert (await claim(node, "ann/phone"))[0] == 200
    assert (await claim(node, "ann/phone", user="cleo"))[0] == 200


async def test_changes_of_keys_are_limited_and_new_prekeys_are_not(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_key_change="3/minute")
    status = [
        (await node.request("PUT", "/v1/keys", "ann", "phone", upload(registrationId=number)))[0]
        for number in range(5)
    ]
    assert status == [200, 200, 200, 429, 429]
    assert await node.db.audit.count_documents({"act": {"$regex": "^keys"}}) == 3
    await publish(node, registrationId=2, oneTimePreKeys=[{"id": 77, "key": KEY}])
    assert (await node.request("PUT", "/v1/keys", "ann", "tablet", upload()))[0] == 200


async def test_the_keys_of_a_suspended_person_are_shown_to_those_alone_who_must_seal_for_them(
    node: Node,
) -> None:
    await publish(node)
    assert (await directory(node, "ann"))[0] == 200
    await node.relay.context.people.suspend("ann")
    assert await directory(node, "ann") == await directory(node, "nobody")
    assert (await directory(node, "ann"))[0] == 404
    await node.direct("bob", "ann")
    status, found = await directory(node, "ann")
    assert (status, [one["device"] for one in found["devices"]]) == (200, ["ann/phone"])


@pytest.mark.parametrize("change", [{"registrationId": 8}, {"identityKey": "b3RoZXI="}])
async def test_a_relinked_device_releases_what_waited_for_its_former_self(
    node: Node, change: dict[str, Any]
) -> None:
    await publish(node)
    conv = await node.direct("bob", "ann")
    rev = (await node.request("GET", f"/v1/conversations/{conv}/devices", "bob", "phone"))[1]["devicesRev"]
    bob = await node.connect("bob")
    first = await bob.sent(conv, "for the former installation")
    assert await publish(node, **change) == {"oneTime": 3, "kem": 1}
    async with asyncio.timeout(5):
        while await node.db.messages.count_documents({"awaiting": "ann/phone"}):
            await asyncio.sleep(0.02)
    second = await bob.sent(conv, "for this one")
    ann = await node.connect("ann")
    assert ann.welcome["gap"]["why"] == "reset"
    heard = await ann.expect("msg")
    assert (heard["id"], heard["body"]) == (second["id"], "for this one")
    assert heard["id"] != first["id"]
    _, found = await node.request("GET", f"/v1/conversations/{conv}/devices", "bob", "phone")
    assert found["devicesRev"] != rev
    await bob.put(
        {
            "t": "send",
            "id": "00000000-0000-4000-8000-000000000001",
            "conv": conv,
            "kind": "text",
            "body": "x",
            "devicesRev": rev,
        }
    )
    refused = await bob.expect("error")
    assert (refused["code"], refused["stale"]) == ("device_mismatch", ["ann/phone"])


async def test_publishing_first_or_again_releases_nothing(node: Node) -> None:
    conv = await node.direct("bob", "ann")
    await node.request("GET", "/v1/sync", "ann", "phone")
    bob = await node.connect("bob")
    sent = await bob.sent(conv, "waits")
    await publish(node)
    await publish(node)
    await publish(node, signedPreKey=signed(2), oneTimePreKeys=[], kemPreKeys=[])
    ann = await node.connect("ann")
    assert "gap" not in ann.welcome
    assert (await ann.expect("msg"))["id"] == sent["id"]
    assert await node.db.releases.count_documents({}) == 0


async def test_first_keys_rotations_and_replacements_are_audited_and_new_prekeys_are_not(node: Node) -> None:
    await publish(node)
    await publish(node)
    await publish(node, oneTimePreKeys=[{"id": 5, "key": KEY}])
    await publish(node, signedPreKey=signed(2))
    await publish(node, registrationId=8, signedPreKey=signed(2))
    rows = [row async for row in node.db.audit.find({}).sort("_id", 1)]
    assert [row["act"] for row in rows] == ["device.provision", "keys.publish", "keys.change", "keys.replace"]
    assert {row["personal"]["device"]["value"] for row in rows} == {"phone"}


async def test_keys_whose_change_cannot_be_recorded_stay_as_they_are(node: Node) -> None:
    await publish(node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.relay.context.audit, "_seconds", 0)
        found = await node.request("PUT", "/v1/keys", "ann", "phone", upload(signedPreKey=signed(2)))
        assert code(found) == (503, "unavailable")
    assert (await directory(node, "ann"))[1]["devices"][0]["signedPreKey"] == signed(1)


async def test_devices_that_get_no_messages_are_not_listed(node: Node) -> None:
    await publish(node)
    await publish(node, device="tablet")
    await node.db.devices.update_one({"_id": "ann/tablet"}, {"$currentDate": {"removedAt": True}})
    _, found = await directory(node, "ann")
    assert [one["device"] for one in found["devices"]] == ["ann/phone"]
    _, found = await claim(node, "ann/tablet")
    assert found["devices"][0]["oneTimePreKey"] is None


async def test_a_person_without_keys_has_an_empty_list_and_an_unknown_one_none(node: Node) -> None:
    await node.request("GET", "/v1/sync", "ann", "phone")
    assert await directory(node, "ann") == (200, {"devices": []})
    for user in ("nobody", "%7B%22$ne%22:1%7D", "a" * 200, "*"):
        assert code(await directory(node, user)) == (404, "not_found"), user


MALFORMED: list[dict[str, Any]] = [
    {"identityKey": ""},
    {"identityKey": {"$ne": None}},
    {"identityKey": "a" * 4097},
    {"identityKey": "not base64!"},
    {"identityKey": "YQ==\n"},
    {"identityKey": 5},
    {"registrationId": -1},
    {"registrationId": 2**31},
    {"registrationId": "7"},
    {"registrationId": True},
    {"registrationId": 7.5},
    {"signedPreKey": None},
    {"signedPreKey": {"id": 1, "key": KEY}},
    {"signedPreKey": {**signed(1), "extra": 1}},
    {"signedPreKey": {**signed(1), "id": {"$gt": 0}}},
    {"oneTimePreKeys": None},
    {"oneTimePreKeys": {"id": 1, "key": KEY}},
    {"oneTimePreKeys": [{"id": 1, "key": KEY}, {"id": 1, "key": KEY}]},
    {"oneTimePreKeys": [signed(1)]},
    {"kemPreKeys": [{"id": 1, "key": KEY}]},
    {"kemPreKeys": [signed(1), signed(1)]},
    {"lastResort": {"id": 1}},
    {"surplus": 1},
]


async def test_malformed_keys_are_refused_and_change_nothing(node: Node) -> None:
    for change in MALFORMED:
        found = await node.request("PUT", "/v1/keys", "ann", "phone", upload(**change))
        assert code(found) == (400, "bad_request"), change
    assert await node.db.public_keys.count_documents({}) == await node.db.prekeys.count_documents({}) == 0


async def test_too_many_keys_are_refused(node: Node) -> None:
    many = [{"id": number, "key": KEY} for number in range(201)]
    found = await node.request("PUT", "/v1/keys", "ann", "phone", upload(oneTimePreKeys=many))
    assert code(found) == (413, "too_large")
    for start in range(0, 1000, 200):
        part = [{"id": number, "key": KEY} for number in range(start, start + 200)]
        last = await publish(node, oneTimePreKeys=part)
    assert last["oneTime"] == 1000
    extra = upload(oneTimePreKeys=[{"id": 5000, "key": KEY}])
    assert code(await node.request("PUT", "/v1/keys", "ann", "phone", extra)) == (413, "too_large")


async def test_malformed_claims_are_refused_and_hand_out_nothing(node: Node) -> None:
    await publish(node)
    malformed: list[Any] = [
        None,
        "ann/phone",
        [{"$ne": None}],
        ["ann"],
        ["ann/"],
        ["/phone"],
        ["ann/*"],
        ["ann/!"],
        ["ann/phone/x"],
        ["ann/phone\n"],
        [5],
        ["ann/phone", "ann/phone"],
    ]
    for devices in malformed:
        found = await node.request("POST", "/v1/keys/claim", "bob", "phone", {"devices": devices})
        assert code(found) == (400, "bad_request"), devices
    assert await node.request("GET", "/v1/keys/count", "ann", "phone") == (200, {"oneTime": 3, "kem": 1})


async def test_a_claim_names_at_most_256_devices(node: Node) -> None:
    names = [f"ann/d{number}" for number in range(257)]
    assert code(await claim(node, *names)) == (413, "too_large")
    status, found = await claim(node, *names[:256])
    assert (status, len(found["devices"])) == (200, 256)
    assert await claim(node) == (200, {"devices": []})


async def test_unknown_parameters_are_refused(node: Node) -> None:
    for method, path, body in (
        ("PUT", "/v1/keys", upload()),
        ("GET", "/v1/keys/count", None),
        ("GET", "/v1/users/ann/keys", None),
        ("POST", "/v1/keys/claim", {"devices": []}),
    ):
        found = await node.request(method, f"{path}?surplus=1", "ann", "phone", body)
        assert code(found) == (400, "bad_request"), path


async def test_every_query_of_the_directory_uses_an_index_and_sorts_nothing_in_memory(node: Node) -> None:
    await publish(node)
    waiting = {"device": "ann/phone", "generation": "x", "kind": "one", "claimedAt": None}
    stages: list[str] = []

    def walk(plan: Any) -> None:
        if isinstance(plan, dict):
            stages.extend(value for name, value in plan.items() if name == "stage")
            for value in plan.values():
                walk(value)
        elif isinstance(plan, list):
            for value in plan:
                walk(value)

    for command in (
        {"findAndModify": "prekeys", "query": waiting, "sort": {"keyId": 1}, "update": {"$set": {"k": 1}}},
        {"count": "prekeys", "query": waiting, "limit": 20},
        {"find": "public_keys", "filter": {"user": "ann"}},
        {
            "delete": "prekeys",
            "deletes": [
                {"q": {"device": "ann/phone", "generation": {"$ne": "x"}, "claimedAt": None}, "limit": 0}
            ],
        },
    ):
        plan = await node.db.command({"explain": command, "verbosity": "queryPlanner"})
        walk(plan["queryPlanner"]["winningPlan"])
    assert not {"COLLSCAN", "SORT"} & set(stages)
    assert {"IXSCAN", "COUNT_SCAN"} & set(stages)


@pytest.mark.parametrize(
    ("command", "collection"),
    [("update", "devices"), ("update", "public_keys"), ("delete", "prekeys"), ("update", "prekeys")],
)
async def test_a_replacement_that_fails_half_way_is_finished_by_its_repetition(
    node: Node, command: str, collection: str
) -> None:
    await publish(node)
    conv = await node.direct("bob", "ann")
    bob = await node.connect("bob")
    await bob.sent(conv, "for the former installation")
    rev = (await node.request("GET", f"/v1/conversations/{conv}/devices", "bob", "phone"))[1]["devicesRev"]
    async with failing(node, command, collection, errorCode=50):
        found = await node.request("PUT", "/v1/keys", "ann", "phone", upload(registrationId=8))
        assert code(found) == (503, "unavailable")
    assert await publish(node, registrationId=8) == {"oneTime": 3, "kem": 1}
    _, listed = await directory(node, "ann")
    assert [one["registrationId"] for one in listed["devices"]] == [8]
    assert await node.db.prekeys.count_documents({}) == 4
    _, found = await node.request("GET", f"/v1/conversations/{conv}/devices", "bob", "phone")
    assert found["devicesRev"] != rev
    async with asyncio.timeout(15):
        while await node.db.messages.count_documents({"awaiting": "ann/phone"}):
            await asyncio.sleep(0.05)
    assert (await node.connect("ann")).welcome["gap"]["why"] == "reset"


async def test_a_claim_whose_answer_is_lost_wastes_a_key_and_repeats_none(node: Node) -> None:
    await publish(node, oneTimePreKeys=[{"id": number, "key": KEY} for number in range(5)])
    async with failing(node, "findAndModify", "prekeys", times=1, writeConcernError=MAJORITY_TIMEOUT):
        assert code(await claim(node, "ann/phone")) == (503, "unavailable")
    given = [(await claim(node, "ann/phone"))[1]["devices"][0]["oneTimePreKey"] for _ in range(5)]
    assert [one["id"] for one in given if one] == [1, 2, 3, 4]
