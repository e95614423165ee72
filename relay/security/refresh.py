"""Refresh tokens: ``<handle>.<secret>``, 128 and 256 random bits in base64url.

The handle finds the session; both are told to nobody but the device. Only a hash of either is stored, and the hash of the
handle is the session's name, which access tokens carry: who knows it cannot present a refresh token of that session. When a token has been exchanged, its successor is kept encrypted under it: whoever
still holds the former token, and nobody else, can be given the same successor again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PATTERN: Final = r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
"""What a refresh token looks like."""

_SHAPE: Final = re.compile(PATTERN)
_HANDLE_BYTES: Final = 16
_SECRET_BYTES: Final = 32
_NONCE_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token. ``str()`` is what the device is given."""

    handle: str = field(repr=False)
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.handle}.{self.secret}"

    @property
    def session(self) -> str:
        """The name of its session: 128 bits of the handle's SHA-256 in base64url."""
        digest = hashlib.sha256(b"relay session " + self.handle.encode()).digest()
        return base64.urlsafe_b64encode(digest[:_HANDLE_BYTES]).decode().rstrip("=")

    @property
    def digest(self) -> str:
        """What is stored of the secret: its SHA-256. A random 256-bit secret needs no slow hash."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


def begin() -> RefreshToken:
    """The first token of a new session."""
    return RefreshToken(secrets.token_urlsafe(_HANDLE_BYTES), secrets.token_urlsafe(_SECRET_BYTES))


def successor_of(token: RefreshToken) -> RefreshToken:
    """A new token of the same session."""
    return RefreshToken(token.handle, secrets.token_urlsafe(_SECRET_BYTES))


def parse(text: str) -> RefreshToken | None:
    """The token in a text; None when it is none."""
    if not _SHAPE.fullmatch(text):
        return None
    handle, _, secret = text.partition(".")
    return RefreshToken(handle, secret)


def seal(successor: RefreshToken, under: RefreshToken) -> str:
    """The successor's secret, encrypted so that only ``under`` opens it (AES-256-GCM, key by HKDF from its secret)."""
    nonce = os.urandom(_NONCE_BYTES)
    sealed = _cipher(under).encrypt(nonce, successor.secret.encode(), under.session.encode())
    return base64.urlsafe_b64encode(nonce + sealed).decode()


def unseal(text: str, under: RefreshToken) -> RefreshToken | None:
    """The successor that was sealed under this token; None when it was sealed under another one."""
    try:
        data = base64.urlsafe_b64decode(text.encode())
        secret = _cipher(under).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], under.session.encode())
    except (InvalidTag, binascii.Error, ValueError):
        return None
    return RefreshToken(under.handle, secret.decode())


def _cipher(under: RefreshToken) -> AESGCM:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"relay refresh successor")
    return AESGCM(key.derive(under.secret.encode()))
