"""PROTOCOL 1: authentication, welcome, life and death of a connection."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tests.support.device import Closed, WireDevice
from tests.support.forge import claims, part, token
from tests.support.node import SECRET, Node, NodeFactory
from tests.support.raw import CLOSE, PING, PONG, TEXT, RawSocket, frame

HS256 = {"alg": "HS256", "typ": "JWT"}


async def bare(node: Node, path: str = "/v1/ws", **options: Any) -> WireDevice:
    """An upgraded socket without a token in a header."""
    device = WireDevice(await node.http.ws_connect(node.url + path, **options), "", "")
    node._devices.append(device)
    return device


async def with_header(node: Node, value: str) -> WireDevice:
    return await bare(node, headers={"Authorization": value})


def bad_tokens(node: Node) -> dict[str, str]:
    good = node.token("ann", "phone")
    head, payload, signature = good.split(".")
    secret = SECRET.encode()
    other = b"another secret of more than thirty-two bytes"
    return {
        "expired": node.token("ann", "phone", lifetime=-1),
        "signed by somebody else": token(HS256, claims(), other),
        "alg none": token({"alg": "none", "typ": "JWT"}, claims(), None),
        "alg None with a signature": token({"alg": "None"}, claims(), secret),
        "changed payload": f"{head}.{part(json.dumps(claims('bob')).encode())}.{signature}",
        "cut signature": f"{head}.{payload}.{signature[:-4]}",
        "another audience": token(HS256, claims(aud="other"), secret),
        "no audience": token(HS256, claims(aud=None), secret),
        "no device": token(HS256, claims(dev=None), secret),
        "no expiry": token(HS256, claims(exp=None), secret),
        "no issue time": token(HS256, claims(iat=None), secret),
        "a user id outside the alphabet": token(HS256, claims("ann/phone"), secret),
        "the relay's own user": token(HS256, claims("$relay"), secret),
        "the placeholder for a device": token(HS256, claims("ann", "*"), secret),
        "an operator object for a user": token(HS256, claims(sub={"$ne": None}), secret),
        "too long a user id": token(HS256, claims("a" * 129), secret),
        "too long a device id": token(HS256, claims("ann", "d" * 65), secret),
        "unsupported crit": token({**HS256, "crit": ["x"], "x": 1}, claims(), secret),
        "no JWT": "nonsense",
        "far too long": "a" * 20_000,
    }


async def test_a_token_in_the_header_is_answered_by_welcome_with_every_promised_field(node: Node) -> None:
    before = int(time.time() * 1000)
    ann = await node.connect("ann")
    welcome = ann.welcome
    assert before <= welcome.pop("time") <= int(time.time() * 1000)
    features = welcome.pop("features")
    assert {"again", "after", "ttl", "sealed"} <= set(features)
    assert welcome == {
        "t": "welcome",
        "v": 1,
        "user": "ann",
        "device": "phone",
        "heartbeat": 25000,
        "window": 256,
        "windowBytes": 1048576,
        "limits": {"frame": 262144, "body": 65536, "ops": 256},
    }
    assert ann.socket.protocol == "relay.v1"
    assert await ann.expect("drained") == {"t": "drained", "count": 0}


async def test_the_subprotocol_is_echoed_only_when_it_is_offered(node: Node) -> None:
    plain = await node.http.ws_connect(node.url + "/v1/ws", headers=node.headers("ann", "phone"))
    assert plain.protocol is None
    await plain.close()
    both = await node.http.ws_connect(
        node.url + "/v1/ws", headers=node.headers("ann", "phone"), protocols=("other", "relay.v1")
    )
    assert both.protocol == "relay.v1"
    await both.close()


async def test_a_token_in_the_first_frame_is_answered_by_welcome(node: Node) -> None:
    device = await bare(node)
    await device.put({"t": "auth", "token": node.token("ann", "phone"), "ref": "a"})
    assert (await device.next())["t"] == "welcome"
    assert (await device.next()) == {"t": "drained", "count": 0}
    alone = await bare(node)
    await alone.socket.send_str(json.dumps([{"t": "auth", "token": node.token("bob", "phone")}]))
    assert (await alone.next())["user"] == "bob"


async def test_a_bad_token_on_the_upgrade_is_upgraded_and_closed_with_4401(node: Node) -> None:
    for name, bad in bad_tokens(node).items():
        if len(bad) > 8000:
            continue  # longer than a header may be: HTTP itself refuses it
        device = await with_header(node, f"Bearer {bad}")
        with pytest.raises(Closed) as closed:
            await device.next()
        assert closed.value.code == 4401, name
    for header in ("Basic YW5uOmFubg==", "Bearer", "Bearer "):
        assert await (await with_header(node, header)).closed() == 4401, header


async def test_a_bad_token_in_the_first_frame_is_closed_with_4401_and_no_error(node: Node) -> None:
    for name, bad in bad_tokens(node).items():
        device = await bare(node)
        await device.put({"t": "auth", "token": bad})
        with pytest.raises(Closed) as closed:
            await device.next()
        assert closed.value.code == 4401, name


async def test_a_first_frame_that_is_not_auth_closes_without_an_error(node: Node) -> None:
    good = {"t": "auth", "token": node.token("ann", "phone")}
    for wrong in (
        {"t": "ping"},
        {"t": "auth"},
        {"t": "auth", "token": {"$ne": None}},
        {**good, "user": "bob"},
        [good, {"t": "ping"}],
        [],
    ):
        device = await bare(node)
        await device.socket.send_str(json.dumps(wrong))
        with pytest.raises(Closed) as closed:
            await device.next()
        assert closed.value.code == 4401, wrong
    garbled = await bare(node)
    await garbled.socket.send_str("{")
    assert await garbled.closed() == 4400
    binary = await bare(node)
    await binary.socket.send_bytes(b"{}")
    assert await binary.closed() == 1003


async def test_who_does_not_authenticate_in_time_is_closed_with_4408(nodes: NodeFactory) -> None:
    node = await nodes.start(auth_seconds=0.4)
    silent = await bare(node)
    pinging = await RawSocket.open(node, {})
    started = time.monotonic()
    for _ in range(3):
        await pinging.send(PING, b"p")
        assert (await pinging.receive()).opcode == PONG
    assert await silent.closed() == 4408
    assert (await pinging.until(CLOSE)).code == 4408
    assert 0.3 < time.monotonic() - started < 2
    pinging.cut()


async def test_a_token_in_the_url_is_not_accepted(nodes: NodeFactory) -> None:
    node = await nodes.start(auth_seconds=0.2)
    good = node.token("ann", "phone")
    for path in (
        f"/v1/ws?token={good}",
        f"/v1/ws?access_token={good}",
        f"/v1/ws?authorization=Bearer%20{good}",
    ):
        assert await (await bare(node, path)).closed() == 4408
    async with node.http.get(f"{node.url}/v1/sync?access_token={good}") as answer:
        assert answer.status == 401


async def test_any_audience_may_be_configured_and_may_stand_in_a_list(nodes: NodeFactory) -> None:
    node = await nodes.start(jwt_audience="chat")
    device = await with_header(node, f"Bearer {token(HS256, claims(aud=['x', 'chat']), SECRET.encode())}")
    assert (await device.next())["t"] == "welcome"
    assert await (await with_header(node, f"Bearer {node.token('ann', 'phone')}")).closed() == 4401


async def test_several_secrets_are_valid_at_once_for_rotation(nodes: NodeFactory, tmp_path: Path) -> None:
    secrets = [f"secret number {n} with more than 32 bytes" for n in range(3)]
    file = tmp_path / "secrets"
    file.write_text("\n".join(secrets[:2]) + "\n")
    node = await nodes.start(jwt_secret=None, jwt_secret_file=file)
    for secret in secrets[:2]:
        device = await with_header(node, f"Bearer {token(HS256, claims(), secret.encode())}")
        assert (await device.next())["t"] == "welcome"
    retired = await with_header(node, f"Bearer {token(HS256, claims(), secrets[2].encode())}")
    assert await retired.closed() == 4401


PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def issuer(algorithm: str) -> PrivateKey:
    if algorithm == "RS256":
        return rsa.generate_private_key(65537, 2048)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def jwk(key: PrivateKey, kid: str) -> dict[str, Any]:
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        found = json.loads(RSAAlgorithm.to_jwk(public))
    elif isinstance(public, ec.EllipticCurvePublicKey):
        found = json.loads(ECAlgorithm.to_jwk(public))
    else:
        found = json.loads(OKPAlgorithm.to_jwk(public))
    return {**found, "kid": kid, "use": "sig"}


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_an_issuer_of_ones_own_is_accepted_by_its_public_key(
    nodes: NodeFactory, tmp_path: Path, algorithm: str
) -> None:
    key, stranger = issuer(algorithm), issuer(algorithm)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    file = tmp_path / "issuer.pem"
    file.write_bytes(pem)
    node = await nodes.start(jwt_secret=None, jwt_public_key_file=file)
    device = await with_header(node, f"Bearer {jwt.encode(claims(), key, algorithm=algorithm)}")
    assert (await device.next())["user"] == "ann"
    forged = {
        "another key of the same kind": jwt.encode(claims(), stranger, algorithm=algorithm),
        "the public key as an HMAC secret": token(HS256, claims(), pem),
        "alg none": token({"alg": "none"}, claims(), None),
        "the secret of a relay without an issuer": node.token("ann", "phone"),
    }
    for name, bad in forged.items():
        assert await (await with_header(node, f"Bearer {bad}")).closed() == 4401, name


async def test_issuers_of_ones_own_are_accepted_by_a_key_set(nodes: NodeFactory, tmp_path: Path) -> None:
    keys = {algorithm: issuer(algorithm) for algorithm in ("RS256", "ES256", "EdDSA")}
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [jwk(key, f"k-{name}") for name, key in keys.items()]}))
    node = await nodes.start(jwt_secret=None, jwt_jwks_file=file)
    for name, key in keys.items():
        good = jwt.encode(claims(), key, algorithm=name, headers={"kid": f"k-{name}"})
        device = await with_header(node, f"Bearer {good}")
        assert (await device.next())["t"] == "welcome", name
        unknown = jwt.encode(claims(), key, algorithm=name, headers={"kid": "k-none"})
        assert await (await with_header(node, f"Bearer {unknown}")).closed() == 4401, name


async def test_without_provision_an_unknown_device_is_refused_both_ways(nodes: NodeFactory) -> None:
    node = await nodes.start(auto_provision=False)
    assert await (await with_header(node, f"Bearer {node.token('ann', 'phone')}")).closed() == 4401
    device = await bare(node)
    await device.put({"t": "auth", "token": node.token("ann", "phone")})
    assert await device.closed() == 4401
    status, answer = await node.request("GET", "/v1/sync", "ann", "phone")
    assert (status, answer["error"]["code"]) == (401, "unauthorized")
    assert await node.db.users.count_documents({}) == await node.db.devices.count_documents({}) == 0


async def test_with_provision_user_and_device_are_created_on_first_use_and_so_are_members(node: Node) -> None:
    await node.connect("ann", "phone")
    assert await node.db.devices.distinct("_id") == ["ann/phone"]
    await node.direct("ann", "bob")
    assert sorted(await node.db.users.distinct("_id")) == ["ann", "bob"]


async def test_a_second_connection_of_a_device_replaces_the_first_with_4409(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, first = await node.connect("ann"), await node.connect("bob")
    waiting = await ann.sent(conv, "unacknowledged")
    await first.expect("msg", id=waiting["id"])
    tablet = await node.connect("bob", "tablet")
    second = await node.connect("bob")
    assert await first.closed() == 4409
    assert (await second.expect("msg"))["id"] == waiting["id"]
    await second.ack(conv, waiting["id"])
    await tablet.put({"t": "ping"})
    await tablet.expect("pong")
    live = await ann.sent(conv, "live")
    assert (await second.expect("msg"))["id"] == live["id"]


async def test_of_many_connections_of_a_device_at_once_one_remains(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await node.connect("bob", "other")

    async def end(rival: WireDevice) -> int | None:
        try:
            return await rival.closed(1)
        except TimeoutError:
            return None

    rivals = await asyncio.gather(*(node.connect("bob", welcome=False) for _ in range(8)))
    ends = await asyncio.gather(*(end(rival) for rival in rivals))
    assert sorted(map(str, ends)) == ["4409"] * 7 + ["None"]
    survivor = rivals[ends.index(None)]
    stored = await ann.sent(conv)
    assert (await survivor.expect("msg"))["id"] == stored["id"]


async def test_the_relay_keeps_a_closing_socket_until_the_client_has_answered(node: Node) -> None:
    raw = await RawSocket.open(node, node.headers("bob", "phone"))
    await raw.until(TEXT)
    await node.connect("bob")
    assert (await raw.until(CLOSE)).code == 4409
    # Cut off with bytes of the client under way, the close code may never reach it (RFC 6455 7.1.1).
    with pytest.raises(TimeoutError):
        await raw.receive(0.4)
    await raw.send(CLOSE, (4409).to_bytes(2, "big"))
    with pytest.raises(asyncio.IncompleteReadError):
        await raw.receive(1)
    raw.cut()


async def test_closes_are_counted_under_the_code_that_the_client_was_told(node: Node) -> None:
    replaced = await node.connect("bob")
    await node.connect("bob")
    assert await replaced.closed() == 4409
    async with asyncio.timeout(4):
        while "relay_closes_total{" not in (text := node.relay.context.metrics.render().decode()):
            await asyncio.sleep(0.02)
    counted = [line for line in text.splitlines() if line.startswith("relay_closes_total")]
    assert counted == ['relay_closes_total{code="4409"} 1.0']


async def test_more_connections_than_the_node_takes_are_closed_with_4429(nodes: NodeFactory) -> None:
    node = await nodes.start(max_connections=2)
    ann, bob = await node.connect("ann"), await node.connect("bob")
    cleo = await node.connect("cleo", welcome=False)
    assert await cleo.closed() == 4429
    await bob.close()
    async with asyncio.timeout(3):
        while len(node.relay.context.hub) > 1:
            await asyncio.sleep(0.01)
    await node.connect("cleo")
    await ann.put({"t": "ping"})
    await ann.expect("pong")


async def test_ping_gets_pong_with_the_time_and_the_ref(node: Node) -> None:
    ann = await node.connect("ann")
    await ann.expect("drained")
    await ann.put({"t": "ping"})
    pong = await ann.next()
    assert abs(pong.pop("time") - time.time() * 1000) < 2000
    assert pong == {"t": "pong"}
    await ann.put({"t": "ping", "ref": 'quoted "\\\u2028 ümläut 😀'})
    assert (await ann.next())["ref"] == 'quoted "\\\u2028 ümläut 😀'
    await ann.put({"t": "ping", "ref": ""})
    assert (await ann.next())["ref"] == ""


async def test_a_protocol_ping_is_answered_with_its_payload(node: Node) -> None:
    raw = await RawSocket.open(node, node.headers("ann", "phone"))
    await raw.send(PING, b"are you there")
    assert (await raw.until(PONG)).payload == b"are you there"
    raw.cut()


async def test_a_frame_in_fragments_is_one_frame(node: Node) -> None:
    raw = await RawSocket.open(node, node.headers("ann", "phone"))
    await raw.send(TEXT, b'{"t":"pi', fin=False)
    await raw.send(PING, b"between")
    await raw.send(0, b'ng","ref":"f"}')
    assert (await raw.until(PONG)).payload == b"between"
    async with asyncio.timeout(5):
        while b'"ref":"f"' not in (await raw.until(TEXT)).payload:
            pass
    raw.cut()


async def test_auth_renews_the_token_and_tells_when_it_ends(node: Node) -> None:
    ann = await node.connect("ann")
    await ann.put({"t": "auth", "token": node.token("ann", "phone", lifetime=1000), "ref": "r"})
    authed = await ann.expect("authed", ref="r")
    assert abs(authed["exp"] - time.time() - 1000) < 3
    assert set(authed) == {"t", "exp", "ref"}
    await ann.put({"t": "auth", "token": node.token("ann", "phone")})
    assert set(await ann.expect("authed")) == {"t", "exp"}


async def test_a_renewal_with_a_bad_or_foreign_token_is_an_error_and_the_connection_goes_on(
    node: Node,
) -> None:
    ann = await node.connect("ann")
    foreign = {"another user": node.token("bob", "phone"), "another device": node.token("ann", "tablet")}
    for name, bad in {**bad_tokens(node), **foreign}.items():
        if len(bad) > 8192:
            continue
        await ann.put({"t": "auth", "token": bad, "ref": name})
        error = await ann.expect("error", ref=name)
        assert (error["code"], error["retry"]) == ("unauthorized", False), name
    await ann.put({"t": "ping"})
    await ann.expect("pong")


async def test_an_expired_token_closes_with_4401_unless_it_was_renewed(nodes: NodeFactory) -> None:
    node = await nodes.start(heartbeat_seconds=1)

    async def connect(user: str) -> WireDevice:
        return await with_header(node, f"Bearer {node.token(user, 'phone', lifetime=2)}")

    expiring, renewed = await connect("ann"), await connect("bob")
    await renewed.put({"t": "auth", "token": node.token("bob", "phone")})
    await renewed.expect("authed")
    answering = asyncio.create_task(renewed.closed(3.2), name="renewed")
    started = time.monotonic()
    assert await expiring.closed() == 4401
    assert 0.9 < time.monotonic() - started < 3.5
    with pytest.raises(TimeoutError):
        await answering


async def test_a_client_that_answers_nothing_is_pinged_and_closed_with_4408_after_two_heartbeats(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(heartbeat_seconds=0.5)
    raw = await RawSocket.open(node, node.headers("ann", "phone"))
    started = time.monotonic()
    seen = []
    while (found := await raw.receive()).opcode != CLOSE:
        seen.append(found.opcode)
    elapsed = time.monotonic() - started
    assert found.code == 4408
    assert seen.count(PING) == 1
    assert 0.9 < elapsed < 3
    raw.cut()
    async with asyncio.timeout(4):
        while len(node.relay.context.hub):
            await asyncio.sleep(0.02)


async def test_every_kind_of_life_keeps_a_connection_open(nodes: NodeFactory) -> None:
    node = await nodes.start(heartbeat_seconds=0.5)
    ponging = await RawSocket.open(node, node.headers("ann", "phone"))
    pinging = await RawSocket.open(node, node.headers("bob", "phone"))
    slow = await RawSocket.open(node, node.headers("cleo", "phone"))
    closes: list[str] = []

    async def pong() -> None:
        while True:
            found = await ponging.receive()
            if found.opcode == PING:
                await ponging.send(PONG, found.payload)
            elif found.opcode == CLOSE:
                closes.append("answers pongs")

    async def ping() -> None:
        while True:
            await asyncio.sleep(0.3)
            await pinging.send(TEXT, b'{"t":"ping"}')

    async def listen(name: str, socket: RawSocket) -> None:
        while True:
            if (await socket.receive()).opcode == CLOSE:
                closes.append(name)

    tasks = [
        asyncio.create_task(pong(), name="pong"),
        asyncio.create_task(ping(), name="ping"),
        asyncio.create_task(listen("sends pings", pinging), name="listen"),
    ]
    text = frame(TEXT, b'{"t":"ping","ref":"slow but whole"}')
    for byte in text[:14]:
        slow.writer.write(bytes([byte]))
        await slow.writer.drain()
        await asyncio.sleep(0.2)
    assert closes == []
    assert len(node.relay.context.hub) == 3
    slow.writer.write(text[14:])
    async with asyncio.timeout(3):
        while True:
            found = await slow.receive()
            assert found.opcode != CLOSE
            if b"slow but whole" in found.payload:
                break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for socket in (ponging, pinging, slow):
        socket.cut()


async def test_a_plain_request_to_the_socket_is_an_http_error(node: Node) -> None:
    async with node.http.get(node.url + "/v1/ws", headers=node.headers("ann", "phone")) as answer:
        assert 400 <= answer.status < 500


async def test_a_connection_closed_by_its_client_is_forgotten_and_its_messages_wait(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.socket.close(code=aiohttp.WSCloseCode.OK)
    async with asyncio.timeout(3):
        while node.relay.context.hub.get("bob/phone") is not None:
            await asyncio.sleep(0.01)
    stored = await ann.sent(conv)
    again = await node.connect("bob")
    assert (await again.expect("msg"))["id"] == stored["id"]
