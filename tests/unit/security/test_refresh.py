"""Refresh tokens: their shape, what is stored of them, and who can open a successor."""

from __future__ import annotations

import base64
import hashlib

import pytest

from relay.security.refresh import RefreshToken, begin, parse, seal, successor_of, unseal


def test_a_token_is_parsed_back_from_its_text() -> None:
    token = begin()
    assert parse(str(token)) == token


def test_a_session_has_128_random_bits_and_a_secret_256() -> None:
    tokens = [begin() for _ in range(100)]
    for token in tokens:
        assert len(base64.urlsafe_b64decode(token.handle + "==")) == 16
        assert len(base64.urlsafe_b64decode(token.secret + "=")) == 32
    assert len({token.handle for token in tokens}) == len({token.secret for token in tokens}) == 100


def test_who_knows_the_name_of_a_session_cannot_present_a_token_of_it() -> None:
    token = begin()
    found = parse(f"{token.session}.{begin().secret}")
    assert found is not None
    assert found.session != token.session, "a name does not name itself"
    assert RefreshToken(token.handle, begin().secret).session == token.session
    assert token.handle not in repr(token)


def test_a_successor_keeps_the_session_and_has_another_secret() -> None:
    token = begin()
    successor = successor_of(token)
    assert successor.session == token.session
    assert successor.secret != token.secret


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a.b",
        "x" * 66,
        "a" * 22 + "." + "b" * 44,
        "a" * 22 + "." + "b" * 42 + "=",
        "ü" * 22 + "." + "b" * 43,
    ]
    + [f"{'a' * 22}.{'b' * 43}\n", f" {'a' * 22}.{'b' * 43}"],
)
def test_what_is_no_token_is_not_parsed(text: str) -> None:
    assert parse(text) is None


def test_only_a_hash_is_stored_and_the_secret_is_not_shown() -> None:
    token = begin()
    assert token.digest == hashlib.sha256(token.secret.encode()).hexdigest()
    assert token.secret not in repr(token)


def test_a_sealed_successor_is_opened_by_its_predecessor() -> None:
    token = begin()
    successor = successor_of(token)
    sealed = seal(successor, token)
    assert successor.secret not in sealed
    assert unseal(sealed, token) == successor


def test_a_sealed_successor_is_opened_by_nobody_else() -> None:
    token = begin()
    sealed = seal(successor_of(token), token)
    assert unseal(sealed, successor_of(token)) is None
    assert unseal(sealed, RefreshToken(begin().handle, token.secret)) is None, "another session's"
    assert unseal(sealed[:-8] + "AAAAAAAA", token) is None
    assert unseal("", token) is None
    assert unseal("é", token) is None


def test_the_same_successor_sealed_twice_looks_different() -> None:
    token = begin()
    successor = successor_of(token)
    assert seal(successor, token) != seal(successor, token)
