"""Pseudonyms: keyed hashes that stand for people in what outlives their account."""

from __future__ import annotations

import hashlib
import hmac


class Pseudonyms:
    """Makes pseudonyms with one secret key. Whoever does not have the key can neither make nor check them."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def fingerprint(self) -> str:
        """Names the key without telling it."""
        return self._mac("fingerprint", "")[:16]

    def of(self, user: str) -> str:
        """The pseudonym of a user id: 32 hexadecimal digits, always the same."""
        return self._mac("person", user)[:32]

    def seal(self, text: str) -> str:
        """The keyed hash of a text, for chains that must not be written anew without the key: 64 hexadecimal digits."""
        return self._mac("chain", text)

    def _mac(self, purpose: str, text: str) -> str:
        # The purpose keeps the kinds apart: a user id cannot be chosen so that its pseudonym is another kind's hash.
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()
