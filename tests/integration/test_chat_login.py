"""The README's accounts: two people register, make a conversation, and chat with `scripts/chat` logged in by password."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

from relay.client import Device, Disconnected, Event
from tests.support.node import Node
from tests.support.terminal import terminal

PASSWORDS = {"ann": "correct horse battery", "bob": "staple staple staple", "cleo": "three words here"}


async def post(node: Node, path: str, body: Any, token: str | None = None) -> tuple[int, Any]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with node.http.post(node.url + path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def get(node: Node, path: str, token: str) -> Any:
    async with node.http.get(node.url + path, headers={"Authorization": f"Bearer {token}"}) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def register(node: Node, username: str) -> tuple[str, str]:
    """The new account's id and an access token."""
    device = {"id": "terminal", "name": "my terminal", "platform": "linux"}
    body = {
        "username": username,
        "password": PASSWORDS[username],
        "name": username.title(),
        "device": device,
    }
    status, answer = await post(node, "/v1/auth/register", body)
    assert status == 201, answer
    return answer["user"]["id"], answer["accessToken"]


async def log_in(node: Node, username: str, device: str) -> str:
    """An access token of another device."""
    described = {"id": device, "name": device, "platform": "linux"}
    status, answer = await post(
        node,
        "/v1/auth/login",
        {"username": username, "password": PASSWORDS[username], "device": described},
    )
    assert status == 200, answer
    return str(answer["accessToken"])


async def test_two_new_accounts_chat_by_password_restart_without_one_and_end_when_revoked(
    node: Node, tmp_path: Path
) -> None:
    _, token = await register(node, "ann")
    bob, _ = await register(node, "bob")
    found = await get(node, "/v1/users?q=bob", token)
    assert [item["id"] for item in found["items"]] == [bob]
    status, made = await post(node, "/v1/conversations", {"type": "direct", "members": [bob]}, token)
    assert status == 201

    async with (
        terminal(node, tmp_path, "--login", "ann", "--to", "bob", password=PASSWORDS["ann"]) as ann,
        terminal(node, tmp_path, "--login", "Bob", "--to", "ann", password=PASSWORDS["bob"]) as bobs,
    ):
        await ann.type("hello bob")
        assert await bobs.read() == "Ann\thello bob"
        await bobs.type("hello ann")
        assert await ann.read() == "Bob\thello ann"
    assert [row["_id"] async for row in node.db.conversations.find()] == [made["id"]]

    other = await log_in(node, "bob", "phone")
    async with (
        terminal(node, tmp_path, "--login", "ann", "--to", "bob") as ann,
        terminal(node, tmp_path, "--login", "bob", "--to", "ann") as bobs,
    ):
        await bobs.type("still here")
        assert await ann.read() == "Bob\tstill here"
        await ann.type("so am I")
        assert await bobs.read() == "Ann\tso am I"
        headers = {"Authorization": f"Bearer {other}"}
        async with node.http.delete(node.url + "/v1/auth/devices/terminal", headers=headers) as response:
            assert response.status == 200
        code, said = await bobs.ended()
    assert code == 1
    assert said == (
        "chat: this device is logged out: its session was ended, or not used for too long; log in again: "
        "the same command asks for the password\n"
    )
    async with terminal(node, tmp_path, "--login", "bob", "--to", "ann") as bobs:
        assert await bobs.ended() == (
            1,
            "chat: no password for bob: set RELAY_PASSWORD, or log in once in a terminal\n",
        )
    async with (
        terminal(node, tmp_path, "--login", "ann", "--to", "bob") as ann,
        terminal(node, tmp_path, "--login", "bob", "--to", "ann", password=PASSWORDS["bob"]) as bobs,
    ):
        await bobs.type("back again")
        assert await ann.read() == "Bob\tback again"


async def test_the_session_file_is_private_and_no_file_holds_the_password(node: Node, tmp_path: Path) -> None:
    await register(node, "ann")
    await register(node, "bob")
    async with terminal(node, tmp_path, "--login", "ann", "--to", "bob", password=PASSWORDS["ann"]) as ann:
        await ann.type("hello")
        while not await node.db.messages.count_documents({}):
            await asyncio.sleep(0.05)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    session = tmp_path / "chat" / "accounts" / "ann-terminal.session"
    assert session in files
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    assert not [path for path in files if PASSWORDS["ann"].encode() in path.read_bytes()]


async def test_what_cannot_work_is_told_in_one_line(node: Node, tmp_path: Path) -> None:
    await register(node, "ann")
    for arguments, password, line in (
        (
            ("--login", "ann", "--to", "bob"),
            "wrong",
            "chat: cannot log in as ann: wrong user name or password\n",
        ),
        (
            ("--login", "ann", "--to", "nobody"),
            PASSWORDS["ann"],
            "chat: nobody is called nobody here, or they do not want to be found: ask them for their user id\n",
        ),
        (
            ("--login", "ann", "--to", "ann"),
            None,
            "chat: cannot open the conversation with ann: a direct conversation has exactly one other member\n",
        ),
    ):
        async with terminal(node, tmp_path, *arguments, password=password) as ann:
            assert await ann.ended() == (1, line)


async def test_a_group_made_by_names_shows_who_did_what_by_name(node: Node, tmp_path: Path) -> None:
    people = {name: await register(node, name) for name in PASSWORDS}
    token = await log_in(node, "ann", "phone")
    async with (
        terminal(node, tmp_path, "--login", "bob", password=PASSWORDS["bob"]) as bobs,
        terminal(
            node,
            tmp_path,
            "--login",
            "ann",
            "--to",
            "bob",
            "--to",
            people["cleo"][0],
            password=PASSWORDS["ann"],
        ) as anns,
    ):
        assert await bobs.read() in (
            "$relay\tAnn made the group with Bob, Cleo",
            "$relay\tAnn made the group with Cleo, Bob",
        )
        await anns.type("hello all")
        assert await bobs.read() == "Ann\thello all"
        (group,) = (await get(node, "/v1/conversations", token))["items"]
        path = f"{node.url}/v1/conversations/{group['id']}/members/{people['cleo'][0]}"
        headers = {"Authorization": f"Bearer {token}"}
        async with node.http.patch(path, json={"role": "moderator"}, headers=headers) as response:
            assert response.status == 200
        async with node.http.delete(path, headers=headers) as response:
            assert response.status == 200
        assert await bobs.read() == "$relay\tAnn made Cleo a moderator"
        assert await bobs.read() == "$relay\tAnn removed Cleo"


async def test_a_device_outlives_its_tokens_on_one_connection(node: Node, tmp_path: Path) -> None:
    events: list[Event] = []
    async with Device(
        node.url, tmp_path / "ann", lambda: node.token("ann", "phone", 2), on_event=events.append
    ) as ann:
        await ann.drained()
        await asyncio.sleep(3.5)
        await ann.send(await node.direct("ann", "bob"), "still here")
        await ann.settled()
    assert [event for event in events if isinstance(event, Disconnected)] == []
