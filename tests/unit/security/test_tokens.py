"""Access tokens: which are accepted, which are refused, and which keys can be configured."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from relay.security.tokens import (
    MAX_KEYS,
    MAX_TOKEN,
    Identity,
    KeyConfigurationError,
    TokenError,
    VerificationKey,
    Verifier,
    generate_secret,
    load_keys,
    mint,
)

NOW = 1_800_000_000.0
SECRET = "k7Qv2mXc9RzT4wLp8NsD1fGh6JbY3eUa"
OTHER = "another secret that is long enough to be used"
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
ASYMMETRIC: list[tuple[str, Any]] = [("RS256", RSA), ("ES256", EC), ("EdDSA", ED)]


def claims(**changes: object) -> dict[str, Any]:
    """Good claims, with changes; None removes one."""
    found = {"sub": "ann", "dev": "phone", "aud": "relay", "iat": int(NOW), "exp": int(NOW) + 600, **changes}
    return {name: value for name, value in found.items() if value is not None}


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: bytes, payload: bytes, secret: bytes = SECRET.encode()) -> str:
    """A token of any bytes whatever, with a good HMAC."""
    text = f"{encoded(header)}.{encoded(payload)}"
    return f"{text}.{encoded(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def token_of(header: object, **changes: object) -> str:
    return signed(json.dumps(header).encode(), json.dumps(claims(**changes)).encode())


def pem(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def loaded(**files: Any) -> list[VerificationKey]:
    names = ("secret", "secret_file", "public_key_file", "jwks_file")
    return load_keys(**{name: files.get(name) for name in names})


def from_secrets(*secrets: str) -> Verifier:
    return Verifier([key for secret in secrets for key in loaded(secret=secret)], audience="relay")


def write(path: Path, content: bytes | str | object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def jwk_of(key: Any, **changes: object) -> dict[str, Any]:
    public = key.public_key()
    family: Any = {rsa.RSAPublicKey: RSAAlgorithm, ec.EllipticCurvePublicKey: ECAlgorithm}
    reader = next((made for kind, made in family.items() if isinstance(public, kind)), OKPAlgorithm)
    found = {**reader.to_jwk(public, as_dict=True), "kid": "one", **changes}
    return {name: value for name, value in found.items() if value is not None}


VERIFIER = from_secrets(SECRET)


def refused(token: str, verifier: Verifier = VERIFIER, now: float = NOW) -> str:
    """The message with which a token is refused."""
    with pytest.raises(TokenError) as caught:
        verifier.verify(token, now)
    message = str(caught.value)
    assert "\n" not in message and len(message.encode()) <= 123, "it must fit the reason of a close frame"
    assert len(token) < 24 or token not in message
    return message


# --- what is accepted


def test_a_minted_token_gives_back_its_user_device_and_expiry() -> None:
    token = mint(SECRET, "ann@example.org", "phone:1", audience="relay", lifetime=60, now=NOW)
    assert VERIFIER.verify(token, NOW) == Identity("ann@example.org", "phone:1", int(NOW) + 60, int(NOW))


def test_a_token_minted_by_the_clock_is_accepted_by_the_clock() -> None:
    token = mint(SECRET, "ann", "phone", audience="relay", lifetime=60)
    assert VERIFIER.verify(token).user == "ann"


def test_a_list_of_audiences_is_accepted_when_it_holds_ours() -> None:
    assert VERIFIER.verify(token_of({"alg": "HS256"}, aud=["shop", "relay"]), NOW).user == "ann"


def test_unknown_claims_are_ignored() -> None:
    assert VERIFIER.verify(token_of({"alg": "HS256"}, scope="all", iss=5), NOW).device == "phone"


def test_every_active_secret_is_accepted_and_a_retired_one_is_not() -> None:
    both = from_secrets(SECRET, OTHER)
    for secret in (SECRET, OTHER):
        token = mint(secret, "ann", "phone", audience="relay", lifetime=60, now=NOW)
        assert both.verify(token, NOW).user == "ann"
    assert "signature" in refused(mint(OTHER, "ann", "phone", audience="relay", lifetime=60, now=NOW))


@pytest.mark.parametrize(("algorithm", "private"), ASYMMETRIC)
def test_the_algorithm_of_a_pem_key_follows_from_its_type(
    algorithm: str, private: Any, tmp_path: Path
) -> None:
    keys = loaded(public_key_file=write(tmp_path / "key.pem", pem(private.public_key())))
    assert [(key.algorithm, key.kid) for key in keys] == [(algorithm, None)]
    token = jwt.encode(claims(), private, algorithm=algorithm, headers={"kid": "whatever"})
    verifier = Verifier(keys, audience="relay")
    assert verifier.verify(token, NOW) == Identity("ann", "phone", int(NOW) + 600, int(NOW))
    head, payload, signature = token.split(".")
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]
    assert "signature" in refused(f"{head}.{payload}.{flipped}", verifier)
    assert "signature" in refused(f"{head}.{payload}.AAAA", verifier)


def test_keys_of_several_settings_are_active_at_once(tmp_path: Path) -> None:
    keys = loaded(
        secret=SECRET,
        secret_file=write(tmp_path / "secrets", f"\n  {OTHER}\r\n\n{'x9' * 20}\n"),
        public_key_file=write(tmp_path / "key.pem", pem(EC.public_key())),
        jwks_file=write(tmp_path / "jwks.json", {"keys": [jwk_of(ED)]}),
    )
    assert [key.algorithm for key in keys] == ["HS256", "HS256", "HS256", "ES256", "EdDSA"]
    assert keys[1].key == OTHER.encode()


def test_nothing_configured_is_an_empty_list_that_no_verifier_accepts() -> None:
    assert loaded() == []
    with pytest.raises(KeyConfigurationError, match="RELAY_JWT_SECRET: no key"):
        Verifier([], audience="relay")


# --- time


def test_a_token_is_refused_from_the_second_it_expires() -> None:
    token = token_of({"alg": "HS256"}, exp=int(NOW) + 10)
    assert VERIFIER.verify(token, NOW + 9.9).expires == int(NOW) + 10
    assert "expired" in refused(token, now=NOW + 10)


def test_a_token_from_the_future_is_refused_beyond_the_leeway() -> None:
    assert VERIFIER.verify(token_of({"alg": "HS256"}, iat=int(NOW) + 5), NOW).user == "ann"
    assert "future" in refused(token_of({"alg": "HS256"}, iat=int(NOW) + 6))


def test_not_before_is_obeyed_when_present() -> None:
    assert "not valid yet" in refused(token_of({"alg": "HS256"}, nbf=int(NOW) + 60))
    assert "`nbf`" in refused(token_of({"alg": "HS256"}, nbf="soon"))


@pytest.mark.parametrize("name", ["exp", "iat"])
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "-1", "1e400", "253402300800", "9" * 5000, "true"]
    + ['"1900000000"', "1900000000.5", "1900000000.0", "null", "[]", "{}"]
)  # fmt: skip
def test_a_time_that_is_no_whole_number_of_seconds_is_refused(name: str, value: str) -> None:
    others = json.dumps(claims(**{name: None}))
    payload = f'{others[:-1]}, "{name}": {value}}}'
    assert "claim" in refused(signed(b'{"alg":"HS256"}', payload.encode()))


# --- claims


@pytest.mark.parametrize("name", ["sub", "dev", "aud", "exp", "iat"])
def test_every_claim_is_required(name: str) -> None:
    assert f"`{name}`" in refused(token_of({"alg": "HS256"}, **{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("sub", value) for value in ["", "a b", "$relay", "ann\n", "ann/phone", "é", "x" * 129, 7, ["ann"]]]
    + [("dev", value) for value in ["", "*", "!", "a/b", "a@b", "phone\n", "x" * 65, 7, {"a": 1}]]
    + [("aud", value) for value in ["", "Relay", "relay ", [], ["shop"], ["relay", 7], 7, {"relay": 1}]],
)  # fmt: skip
def test_claims_of_a_wrong_form_are_refused_without_their_value(name: str, value: object) -> None:
    message = refused(token_of({"alg": "HS256"}, **{name: value}))
    assert f"`{name}`" in message
    assert not isinstance(value, str) or len(value) < 10 or value not in message


# --- attacks


@pytest.mark.parametrize(
    "name", ["none", "None", "NONE", "hs256", "HS384", "HS512", "RS256", "", None, 7, ["HS256"]]
)
def test_an_algorithm_without_a_key_of_its_own_is_refused(name: object) -> None:
    assert "algorithm" in refused(token_of({"alg": name}))


def test_an_unsigned_token_is_refused() -> None:
    payload = encoded(json.dumps(claims()).encode())
    header = encoded(b'{"alg":"none"}')
    unsigned = f"{header}.{payload}."
    refused(unsigned)
    assert "algorithm" in refused(unsigned + "AAAA")
    assert "algorithm" in refused(token_of({"typ": "JWT"}))


@pytest.mark.parametrize("with_secret", [False, True])
def test_a_public_key_does_not_serve_as_an_hmac_secret(with_secret: bool, tmp_path: Path) -> None:
    public = pem(RSA.public_key())
    secret = SECRET if with_secret else None
    keys = loaded(secret=secret, public_key_file=write(tmp_path / "key.pem", public))
    verifier = Verifier(keys, audience="relay")
    payload = json.dumps(claims()).encode()
    for known in (public, public.strip(), public.replace(b"\n", b"\r\n")):
        message = refused(signed(b'{"alg":"HS256"}', payload, known), verifier)
        assert ("signature" if with_secret else "algorithm") in message


def test_keys_that_a_header_brings_along_are_not_used(tmp_path: Path) -> None:
    keys = loaded(public_key_file=write(tmp_path / "key.pem", pem(RSA.public_key())))
    mine = rsa.generate_private_key(65537, 2048)
    headers = {
        "jwk": jwk_of(mine),
        "jku": "https://example.org/jwks",
        "x5u": "https://example.org/c",
        "x5c": ["AA"],
    }
    token = jwt.encode(claims(), mine, algorithm="RS256", headers=headers)
    verifier = Verifier(keys, audience="relay")
    assert "signature" in refused(token, verifier)
    good = jwt.encode(claims(), RSA, algorithm="RS256", headers=headers)
    assert verifier.verify(good, NOW).user == "ann"


@pytest.mark.parametrize(
    "extra", [{"crit": ["exp"]}, {"crit": []}, {"crit": ["b64"], "b64": True}, {"b64": False}]
)
def test_critical_extensions_are_refused(extra: dict[str, object]) -> None:
    assert refused(token_of({"alg": "HS256", **extra}))


def test_a_token_beyond_the_limit_is_refused_before_it_is_read() -> None:
    room = MAX_TOKEN - len(token_of({"alg": "HS256"}, pad=""))
    fits = token_of({"alg": "HS256"}, pad="x" * (room * 3 // 4 - 3))
    assert MAX_TOKEN - 8 < len(fits) <= MAX_TOKEN
    assert VERIFIER.verify(fits, NOW).user == "ann"
    assert "longer" in refused(token_of({"alg": "HS256"}, pad="x" * room))
    assert "longer" in refused("." * (MAX_TOKEN + 1))


@pytest.mark.parametrize("deep", [b"[" * 3000, b'{"a":' * 1000, b'{"alg":"HS256","a":' + b"[" * 3000])
def test_deep_nesting_is_refused_as_malformed(deep: bytes) -> None:
    assert "malformed" in refused(signed(deep, b"{}"))
    assert "JSON object" in refused(signed(b'{"alg":"HS256"}', deep))


@pytest.mark.parametrize("padding", ["=", "==", "\n", " ", "."])
def test_a_good_token_with_something_around_it_is_refused(padding: str) -> None:
    good = token_of({"alg": "HS256"})
    refused(good + padding)
    refused(padding + good)


@given(st.text(max_size=300) | st.text("ey.-_=A0", max_size=100))
@settings(deadline=None)
def test_any_text_is_refused_with_a_token_error(text: str) -> None:
    refused(text)


GOOD = token_of({"alg": "HS256", "typ": "JWT"})


@given(
    st.integers(0, len(GOOD) - 1),
    st.integers(0, len(GOOD)),
    st.text(max_size=4) | st.text("eyA._-", max_size=4),
)
@settings(deadline=None, max_examples=300)
def test_a_changed_token_is_refused_with_a_token_error(start: int, end: int, put: str) -> None:
    changed = GOOD[:start] + put + GOOD[end:]
    if changed != GOOD:
        refused(changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "jku", "x5c", "zip", "cty"])
CLAIMS = st.sampled_from(["sub", "dev", "aud", "iat", "exp", "nbf", "jti", "iss"])


@given(JSON | st.dictionaries(NAMES, JSON | st.just("HS256")) | st.binary(max_size=40), JSON)
@settings(deadline=None, max_examples=300)
def test_a_header_of_any_json_or_bytes_gives_no_other_exception(header: object, payload: object) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    refused(signed(raw, json.dumps(payload).encode()))


@given(JSON | st.binary(max_size=40), st.dictionaries(CLAIMS, JSON, min_size=1))
@settings(deadline=None, max_examples=300)
def test_signed_claims_of_any_json_or_bytes_give_no_other_exception(
    other: object, changes: dict[str, Any]
) -> None:
    raw = other if isinstance(other, bytes) else json.dumps(other).encode()
    refused(signed(b'{"alg":"HS256"}', raw))
    try:
        identity = VERIFIER.verify(
            signed(b'{"alg":"HS256"}', json.dumps({**claims(), **changes}).encode()), NOW
        )
    except TokenError:
        return
    assert identity.expires > NOW and identity.user == changes.get("sub", "ann")


# --- keys by name


def named_verifier(tmp_path: Path, **more: Any) -> Verifier:
    entries = [jwk_of(RSA, kid="one", alg="RS256", use="sig"), jwk_of(EC, kid="two"), jwk_of(ED, kid="three")]
    return Verifier(
        loaded(jwks_file=write(tmp_path / "jwks.json", {"keys": entries}), **more), audience="relay"
    )


def test_a_named_key_alone_verifies_the_tokens_that_name_it(tmp_path: Path) -> None:
    verifier = named_verifier(tmp_path)
    for kid, (algorithm, private) in zip(("one", "two", "three"), ASYMMETRIC, strict=True):
        good = jwt.encode(claims(), private, algorithm=algorithm, headers={"kid": kid})
        assert verifier.verify(good, NOW).user == "ann"
        wrong = jwt.encode(claims(), private, algorithm=algorithm, headers={"kid": "four"})
        assert "does not know" in refused(wrong, verifier)
        nameless = jwt.encode(claims(), private, algorithm=algorithm)
        assert verifier.verify(nameless, NOW).user == "ann"


def test_a_name_of_another_algorithm_is_refused_also_when_the_signature_is_good(tmp_path: Path) -> None:
    verifier = named_verifier(tmp_path, secret=SECRET)
    assert "does not know" in refused(token_of({"alg": "HS256", "kid": "one"}), verifier)
    assert verifier.verify(token_of({"alg": "HS256", "kid": "mine"}), NOW).user == "ann"


def test_a_key_is_not_tried_when_the_token_names_another(tmp_path: Path) -> None:
    second = rsa.generate_private_key(65537, 2048)
    entries = [jwk_of(RSA, kid="old"), jwk_of(second, kid="new")]
    verifier = Verifier(loaded(jwks_file=write(tmp_path / "jwks.json", {"keys": entries})), audience="relay")
    assert "signature" in refused(jwt.encode(claims(), RSA, "RS256", headers={"kid": "new"}), verifier)
    assert verifier.verify(jwt.encode(claims(), RSA, "RS256", headers={"kid": "old"}), NOW).user == "ann"


def test_keys_for_encryption_are_left_out_of_a_jwks(tmp_path: Path) -> None:
    entries = [jwk_of(RSA, kid="enc", use="enc", alg="RSA-OAEP"), jwk_of(EC)]
    keys = loaded(jwks_file=write(tmp_path / "jwks.json", {"keys": entries}))
    assert [(key.kid, key.algorithm) for key in keys] == [("one", "ES256")]


# --- keys that are refused


def complaint(**files: Any) -> str:
    with pytest.raises(KeyConfigurationError) as caught:
        loaded(**files)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("RELAY_JWT_")
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kty": "oct", "k": "A" * 43, "kid": "one"}, "symmetric"),
        (jwk_of(RSA, alg="RS512"), "only RS256"),
        (jwk_of(RSA, alg="HS256"), "only RS256"),
        (jwk_of(EC, alg="RS256"), "only ES256"),
        (jwk_of(RSA, alg=[]), "only RS256"),
        (jwk_of(RSA, kid=None), "no kid"),
        (jwk_of(RSA, kid=7), "no kid"),
        (jwk_of(RSA, kid=""), "no kid"),
        (jwk_of(RSA, d="AQAB"), "private"),
        (jwk_of(RSA, n=7), "not a sound RSA"),
        (jwk_of(RSA, n=None), "not a sound RSA"),
        (jwk_of(RSA, e="AQ"), "not a sound RSA"),
        (jwk_of(EC, x="A" * 43), "not a sound EC"),
        (jwk_of(EC, crv="P-999"), "not a sound EC"),
        (jwk_of(ED, x="AAAA"), "not a sound OKP"),
        (jwk_of(ed448.Ed448PrivateKey.generate()), "Ed448"),
        (jwk_of(ec.generate_private_key(ec.SECP384R1())), "secp384r1"),
        (jwk_of(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        ({"kty": "AKP", "kid": "one"}, "unknown kty"),
        ({"kty": ["RSA"], "kid": "one"}, "unknown kty"),
    ],
)
def test_a_jwks_with_an_unfit_key_is_refused(entry: object, words: str, tmp_path: Path) -> None:
    message = complaint(jwks_file=write(tmp_path / "jwks.json", {"keys": [jwk_of(EC, kid="fine"), entry]}))
    assert "RELAY_JWT_JWKS_FILE, key 2" in message and words in message


def test_a_jwks_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    message = complaint(jwks_file=write(tmp_path / "jwks.json", {"keys": [jwk_of(EC), jwk_of(RSA)]}))
    assert "kid" in message and "'one'" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"[]", b"7", b"{}", b'{"keys":{}}', b'{"keys":[7]}', b'{"keys":[]}', b"[" * 9999],
)  # fmt: skip
def test_a_file_that_is_no_jwks_is_refused(content: bytes, tmp_path: Path) -> None:
    assert "RELAY_JWT_JWKS_FILE" in complaint(jwks_file=write(tmp_path / "jwks.json", content))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no PEM public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no PEM public key"),
        (private_pem(RSA), "private key"),
        (pem(RSA.public_key()) + pem(EC.public_key()), "several PEM blocks"),
        (pem(rsa.generate_private_key(65537, 1024).public_key()), "1024 bits"),
        (pem(ec.generate_private_key(ec.SECP384R1()).public_key()), "secp384r1"),
        (pem(ec.generate_private_key(ec.SECP256K1()).public_key()), "secp256k1"),
        (pem(ed448.Ed448PrivateKey.generate().public_key()), "Ed448"),
        (b"x" * (1 << 20) + b"x", "1 MiB"),
    ],
)
def test_an_unfit_public_key_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    assert words in complaint(public_key_file=write(tmp_path / "key.pem", content))


@pytest.mark.parametrize("name", ["secret_file", "public_key_file", "jwks_file"])
def test_a_file_that_is_absent_or_a_directory_is_named(name: str, tmp_path: Path) -> None:
    assert "absent" in complaint(**{name: tmp_path / "absent"})
    assert str(tmp_path) in complaint(**{name: tmp_path})


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("", "0 bytes"),
        ("x" * 31, "31 bytes"),
        (" " * 40 + "short", "5 bytes"),
        (f"{SECRET}\n{OTHER}", "several lines"),
        (json.dumps({"kty": "oct", "k": "A" * 43}), "JSON Web Key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "PEM"),
        ("\udcff" * 40, "UTF-8"),
    ],
)
def test_an_unfit_secret_is_refused_without_showing_it(secret: str, words: str) -> None:
    message = complaint(secret=secret)
    assert words in message and (len(secret) < 9 or secret not in message)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no secret"),
        (b"\n \n", "no secret"),
        (f"{SECRET}\n# the old one, until the end of the month\n".encode(), "line 2: comments"),
        (f"{SECRET}\n\nshort\n".encode(), "line 3: the secret has 5 bytes"),
        (b"\xff" * 40, "UTF-8"),
        (private_pem(EC), "line 1"),
    ],
)
def test_an_unfit_secret_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    message = complaint(secret_file=write(tmp_path / "secrets", content))
    assert words in message and SECRET not in message


def test_a_secret_counts_in_bytes_and_is_not_shown_by_repr() -> None:
    (key,) = loaded(secret="é" * 16)
    assert key.key == "é".encode() * 16
    assert "key=" not in repr(key)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (pem(RSA.public_key()), "HS256"),
        (RSA.public_key(), "HS256"),
        (SECRET.encode(), "RS256"),
        (b"short", "HS256"),
    ],
)
def test_a_verifier_refuses_a_key_that_does_not_fit_its_algorithm(key: Any, algorithm: str) -> None:
    with pytest.raises(KeyConfigurationError):
        Verifier([VerificationKey(key, algorithm, None)], audience="relay")


def test_a_verifier_refuses_one_name_for_two_keys_too_many_keys_and_no_audience() -> None:
    keys = [VerificationKey(SECRET.encode(), "HS256", "one"), VerificationKey(OTHER.encode(), "HS256", "one")]
    with pytest.raises(KeyConfigurationError, match="kid 'one'"):
        Verifier(keys, audience="relay")
    with pytest.raises(KeyConfigurationError, match="RELAY_JWT_AUDIENCE"):
        Verifier(keys[:1], audience="")
    many = [VerificationKey(f"{number:064}".encode(), "HS256", None) for number in range(MAX_KEYS + 1)]
    token = mint(f"{0:064}", "ann", "phone", audience="relay", lifetime=60)
    assert Verifier(many[:-1], audience="relay").verify(token).user == "ann"
    with pytest.raises(KeyConfigurationError, match="at most 64"):
        Verifier(many, audience="relay")


def test_minting_refuses_ids_that_no_verifier_would_accept() -> None:
    for user, device in (("a b", "phone"), ("ann", "a/b"), ("", "phone"), ("ann", "")):
        with pytest.raises(ValueError, match="id has 1 to"):
            mint(SECRET, user, device, audience="relay", lifetime=60)
    with pytest.raises(KeyConfigurationError, match="5 bytes"):
        mint("short", "ann", "phone", audience="relay", lifetime=60)


# --- sessions


def test_a_minted_token_names_its_session() -> None:
    token = mint(SECRET, "ann", "phone", audience="relay", lifetime=60, now=NOW, session="s-1_A")
    assert VERIFIER.verify(token, NOW).session == "s-1_A"


def test_a_token_without_a_session_has_none() -> None:
    assert VERIFIER.verify(token_of({"alg": "HS256"}), NOW).session is None


@pytest.mark.parametrize("session", ["", "a b", "a.b", "a" * 65, 5, None, ["a"], {"$ne": "a"}, True, "a\n"])
def test_a_session_that_is_none_is_refused(session: Any) -> None:
    payload = json.dumps(claims() | {"sid": session}).encode()
    assert "`sid`" in refused(signed(b'{"alg":"HS256"}', payload))


@pytest.mark.parametrize("session", ["", "a b", "a" * 65])
def test_minting_refuses_a_session_that_no_verifier_would_accept(session: str) -> None:
    with pytest.raises(ValueError, match="session id has 1 to"):
        mint(SECRET, "ann", "phone", audience="relay", lifetime=60, session=session)


def test_a_session_of_an_issuer_with_a_key_of_its_own_is_not_ours(tmp_path: Path) -> None:
    keys = loaded(public_key_file=write(tmp_path / "key.pem", pem(ED.public_key())))
    for session in ("their-session", "their session", 5):
        token = jwt.encode(claims(sid=session), ED, algorithm="EdDSA")
        assert Verifier(keys, audience="relay").verify(token, NOW).session is None


# --- the generated secret


def test_a_generated_secret_is_kept_private_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "data" / "jwt.secret"
    secret = generate_secret(path)
    assert len(bytes.fromhex(secret)) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert generate_secret(path) == secret
    assert [entry.name for entry in path.parent.iterdir()] == ["jwt.secret"], "no temporary file stays"
    assert generate_secret(tmp_path / "other") != secret
    token = mint(secret, "ann", "phone", audience="relay", lifetime=60, now=NOW)
    assert Verifier(loaded(secret_file=path), audience="relay").verify(token, NOW).user == "ann"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "jwt.secret"
    secret = generate_secret(path)
    path.chmod(mode)
    with pytest.raises(KeyConfigurationError, match=f"mode {mode:04o}") as caught:
        generate_secret(path)
    assert secret not in str(caught.value)


def test_a_secret_file_that_is_empty_a_pipe_or_a_directory_is_refused(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty", tmp_path / "pipe"
    empty.touch(0o600)
    os.mkfifo(pipe, 0o600)
    for path in (empty, pipe, tmp_path, empty / "below"):
        with pytest.raises(KeyConfigurationError) as caught:
            generate_secret(path)
        assert str(path) in str(caught.value)


def test_processes_that_start_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "jwt.secret"
    program = (
        "import sys, pathlib; from relay.security.tokens import generate_secret; print('ready', flush=True); "
        "sys.stdin.readline(); print(generate_secret(pathlib.Path(sys.argv[1])))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(4)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=30)[0].strip() for process in running}
    assert answers == {path.read_text().strip()}
    assert len(answers.pop()) == 64
