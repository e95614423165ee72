"""Access tokens that the relay issues itself."""

from __future__ import annotations

import time

import jwt

from relay.security.issuer import Issuer
from relay.security.tokens import Verifier, load_keys

SECRET = "a secret for tests only, of more than 32 bytes"


def test_an_issued_token_is_accepted_and_names_its_session() -> None:
    issuer = Issuer(SECRET, audience="relay", lifetime=900)
    keys = load_keys(secret=SECRET, secret_file=None, public_key_file=None, jwks_file=None)
    before = int(time.time())
    found = Verifier(keys, audience="relay").verify(issuer.issue("ann", "phone", "session-1"))
    assert (found.user, found.device, found.session) == ("ann", "phone", "session-1")
    assert before <= found.issued <= time.time()
    assert found.expires == found.issued + 900


def test_an_issued_token_is_signed_with_hs256_for_the_audience() -> None:
    token = Issuer(SECRET, audience="shop", lifetime=60).issue("ann", "phone", "s")
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert jwt.decode(token, SECRET, algorithms=["HS256"], audience="shop")["sid"] == "s"
