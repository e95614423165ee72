"""`scripts/admin` on the database of a running relay."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.admin import ROOT, Admin
from tests.support.arriving import make_known
from tests.support.device import Closed, new_id
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory

KEY = "a key for tests only, of more than 32 bytes"


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    found = await nodes.start(pseudonym_key=KEY)
    await make_known(found, ("ann", "bob", "u1"))
    for user in ("ann", "bob", "u1"):
        assert (await found.request("GET", "/v1/conversations", user, "phone"))[0] == 200
    await found.db.users.update_one({"_id": "u1"}, {"$set": {"username": "cleo", "name": "Cleo \x1b[2J"}})
    return found


def environment(nodes: NodeFactory, directory: Path) -> dict[str, str]:
    return {
        "RELAY_MONGO_URI": nodes.uri,
        "RELAY_MONGO_DATABASE": nodes.database,
        "RELAY_DATA_DIR": str(directory / "none"),
        "RELAY_PSEUDONYM_KEY": KEY,
    }


@pytest.fixture
def admin(nodes: NodeFactory, tmp_path: Path) -> Admin:
    return Admin(environment(nodes, tmp_path), tmp_path)


async def test_the_program_itself_runs(node: Node, nodes: NodeFactory, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.tools.admin", "audit", "verify"),
        cwd=ROOT,
        env={**os.environ, **environment(nodes, tmp_path)},
        stdout=PIPE,
        stderr=PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out.decode(), err) == (0, "the audit trail is empty\n", b"")


async def test_verification_prints_the_head_and_says_what_is_broken(node: Node, admin: Admin) -> None:
    audit = node.relay.context.audit
    for _ in range(3):
        await audit.record("test.act", actor="ann")
    code, out, _ = await admin("audit", "verify", "--json")
    found = json.loads(out)
    assert (code, found["holds"], found["entries"], found["problem"]) == (0, True, 3, None)
    head = found["head"]
    await audit.record("test.act", actor="ann")
    plain, pinned, other_key, other_head = await asyncio.gather(
        admin("audit", "verify"),
        admin("audit", "verify", "--expect", head),
        admin("audit", "verify", env={"RELAY_PSEUDONYM_KEY": "another " + KEY}),
        admin("audit", "verify", "--expect", "2:" + "0" * 64),
    )
    assert plain[0] == pinned[0] == 0
    assert plain[1].startswith("the audit trail holds: 4 entries\nhead  4:")
    assert (other_key[0], "not the key" in other_key[2]) == (1, True)
    assert (other_head[0], "entry 2 is not the one that was noted down" in other_head[2]) == (1, True)
    await node.db.audit.update_one({"_id": 2}, {"$set": {"act": "test.other"}})
    code, out, err = await admin("audit", "verify")
    assert (code, out) == (1, "")
    assert err == "admin: the audit trail is broken: entry 2 was edited; entries 1 to 1 hold\n"


async def test_a_node_that_starts_logs_the_head_as_it_finds_it(
    node: Node, nodes: NodeFactory, admin: Admin
) -> None:
    await node.relay.context.audit.record("test.act", actor="ann")
    while await node.db.audit_head.find_one({"entry": 1}) is None:
        await asyncio.sleep(0.01)
    with capture_logs() as logs:
        other = await nodes.start(pseudonym_key=KEY)
    (told,) = [line for line in logs if line["event"] == "audit head"]
    assert (await admin("audit", "verify", "--expect", f"{told['entry']}:{told['hash']}"))[0] == 0
    # As somebody does who wants no node to write a head again.
    for running in (node, other):
        await nodes.stop(running)
    await node.db.audit.delete_many({})
    await node.db.audit_head.delete_many({})
    assert (await admin("audit", "verify"))[0] == 0
    assert (await admin("audit", "verify", "--expect", f"{told['entry']}:{told['hash']}"))[0] == 1


async def test_a_suspended_person_is_out_at_once_and_comes_back(node: Node, admin: Admin) -> None:
    phone = await node.connect("u1", "phone")
    code, out, _ = await admin("suspend", "Cleo")
    assert (code, out) == (0, "u1 is suspended; their connections close within 5 s\n")
    with pytest.raises(Closed) as closed:
        await phone.expect("nothing", 6)
    assert closed.value.code == 4401
    assert (await node.request("GET", "/v1/conversations", "u1", "phone"))[0] == 401
    assert (await admin("unsuspend", "u1"))[0] == 0
    await asyncio.sleep(1.1)
    async with asyncio.timeout(8):
        while (await node.request("GET", "/v1/conversations", "u1", "phone"))[0] != 200:
            await asyncio.sleep(0.2)
    code, out, _ = await admin("audit", "list", "--user", "cleo", "--json")
    entries = json.loads(out)
    assert [(entry["act"], entry["actor"], entry["target"]) for entry in entries] == [
        ("user.unsuspend", "$admin", "u1"),
        ("user.suspend", "$admin", "u1"),
    ]
    assert (await node.relay.context.audit.verify()).holds


async def test_reports_are_listed_and_closed(node: Node, admin: Admin) -> None:
    names = [new_id() for _ in range(3)]
    for name in names:
        await node.db.reports.insert_one(
            {
                "_id": name,
                "reporter": "ann",
                "user": "u1",
                "reason": "spam",
                "text": "line\tone\nline two",
                "createdAt": datetime.now(UTC),
            }
        )
    code, out, err = await admin("reports", "list", "--limit", "2")
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == names[:2]
    # What people write neither breaks a line nor drives a terminal.
    assert out.splitlines()[0].split("\t")[2:] == [
        "spam",
        "u1 (Cleo \ufffd[2J)",
        "ann",
        "line\ufffdone\ufffdline two",
    ]
    cursor = err.rpartition(" ")[2].strip()
    rest, closed, unknown = await asyncio.gather(
        admin("reports", "list", "--cursor", cursor, "--json"),
        admin("reports", "close", names[0]),
        admin("reports", "close", "nothing"),
    )
    assert [report["id"] for report in json.loads(rest[1])["items"]] == names[2:]
    assert closed[:2] == (0, f"report {names[0]} is closed\n")
    assert unknown == (1, "", "admin: there is no report 'nothing'\n")
    assert len(json.loads((await admin("reports", "list", "--json"))[1])["items"]) == 2


async def test_a_person_is_shown_by_id_or_user_name_and_never_guessed(node: Node, admin: Admin) -> None:
    await node.db.users.update_one({"_id": "bob"}, {"$set": {"username": "ann"}})
    by_name, as_json, unknown, ambiguous, chosen = await asyncio.gather(
        admin("user", "show", "cleo"),
        admin("user", "show", "u1", "--json"),
        admin("user", "show", "nobody"),
        admin("user", "show", "ann"),
        admin("user", "show", "username=ann"),
    )
    assert by_name[0] == 0
    assert "user name                cleo" in by_name[1]
    assert "state                    active" in by_name[1]
    found = json.loads(as_json[1])
    assert found["profile"]["id"] == "u1"
    assert [device["id"] for device in found["devices"]] == ["u1/phone"]
    assert unknown == (1, "", "admin: nobody has the id or the user name 'nobody'\n")
    assert ambiguous[0] == 1
    assert "id=ann or username=ann" in ambiguous[2]
    assert "bob" in chosen[1].splitlines()[0]
    # Whom an operator looked at is on record; whom they did not find is not.
    shown = json.loads((await admin("audit", "list", "--act", "user.show", "--json"))[1])
    assert sorted(entry["target"] for entry in shown) == ["bob", "u1", "u1"]
    assert {entry["actor"] for entry in shown} == {"$admin"}


async def test_a_device_that_came_by_its_token_is_listed_with_what_was_made(node: Node, admin: Admin) -> None:
    for _ in range(2):
        await node.connect("dora", "tablet")
    code, out, _ = await admin("audit", "list", "--user", "dora")
    assert code == 0
    (line,) = out.splitlines()
    told = line.split("\t")
    agent = told.pop(7)
    assert agent.startswith("Python/")
    assert told[2:] == [
        "device.provision",
        "dora",
        "dora",
        "tablet",
        "127.0.0.1",
        "returned=no account=yes",
    ]
    code, out, _ = await admin("audit", "verify")
    assert code == 0
    assert out.startswith("the audit trail holds: 1 entr")


async def test_the_trail_is_listed_with_the_device_that_an_entry_is_about(node: Node, admin: Admin) -> None:
    await node.relay.context.audit.record(
        "device.revoke", actor="bob", target="ann", device="tablet", address="192.0.2.7", details={"n": 1}
    )
    code, out, _ = await admin("audit", "list")
    assert code == 0
    assert out.rstrip("\n").split("\t")[2:] == [
        "device.revoke",
        "bob",
        "ann",
        "tablet",
        "192.0.2.7",
        "",
        "n=1",
    ]


async def test_a_report_is_closed_only_when_that_is_recorded(node: Node, admin: Admin) -> None:
    name = new_id()
    await node.db.reports.insert_one(
        {"_id": name, "reporter": "ann", "user": "u1", "reason": "spam", "createdAt": datetime.now(UTC)}
    )
    async with failing(node, "update", "reports", errorCode=50):
        assert (await admin("reports", "close", name))[0] == 1
    assert (await node.db.reports.find_one({"_id": name})).get("closedAt") is None
    assert await node.db.audit.count_documents({"act": "report.close"}) == 1
    assert (await admin("reports", "close", name))[0] == 0
    assert await node.db.audit.count_documents({"act": "report.close"}) == 2


async def test_what_stands_in_the_way_is_said_in_one_line(
    node: Node, nodes: NodeFactory, tmp_path: Path
) -> None:
    admin = Admin(environment(nodes, tmp_path), tmp_path, patience=1)
    await node.relay.context.audit.record("test.act", actor="ann")
    await node.db.settings.update_one(
        {"_id": "pseudonym-key"}, {"$set": {"value": node.relay.context.pseudonyms.fingerprint}}, upsert=True
    )
    found = await asyncio.gather(
        admin("suspend", "ann", env={"RELAY_PSEUDONYM_KEY": "another " + KEY}),
        admin("suspend", "ann", env={"RELAY_PSEUDONYM_KEY": "short"}),
        admin("suspend", "ann", env={"RELAY_PSEUDONYM_KEY": None}),
        admin("suspend", "ann", env={"RELAY_MONGO_URI": None}),
        admin("suspend", "ann", env={"RELAY_MONGO_URI": "mongodb://secret:word@127.0.0.1:1/?replicaSet=x"}),
    )
    words = (
        "another RELAY_PSEUDONYM_KEY",
        "at least 32 bytes",
        "there is no key",
        "no relay has",
        "does not answer",
    )
    for (code, out, err), part in zip(found, words, strict=True):
        assert (code, out) == (1, "")
        assert err.startswith("admin: ")
        assert err.count("\n") == 1
        assert part in err
        assert "word@" not in err
    assert not (tmp_path / "none").exists()
    assert (await node.db.users.find_one({"_id": "ann"})).get("suspendedAt") is None
    assert (await admin("audit", "verify", "--expect", "x"))[0] == 2
