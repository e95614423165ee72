"""Access tokens that no honest issuer would make, and keys of issuers of one's own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any


def part(value: bytes) -> str:
    """Base64url without padding (RFC 7515 2)."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def claims(user: str = "ann", device: str = "phone", **changes: Any) -> dict[str, Any]:
    """The claims of a good token of ten minutes; a change to None takes a claim away."""
    now = int(time.time())
    found = {"sub": user, "dev": device, "aud": "relay", "iat": now, "exp": now + 600, **changes}
    return {name: value for name, value in found.items() if value is not None}


def token(header: dict[str, Any], payload: dict[str, Any], secret: bytes | None) -> str:
    """A token with any header, signed with HMAC-SHA256, or with an empty signature when there is no secret."""
    text = f"{part(json.dumps(header).encode())}.{part(json.dumps(payload).encode())}"
    signature = b"" if secret is None else hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return f"{text}.{part(signature)}"
