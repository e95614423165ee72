"""Examples for the descriptions: those that the models carry, else plausible values made from the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_DEPTH: Final = 8
_MOMENT: Final = 1_795_221_560_670
MESSAGE: Final = "7f9c24e8-3b1a-4f0d-9c55-0a1b2c3d4e5f"
CONVERSATION: Final = "2b0f6a3e-58d1-4c7e-8f7a-6d5c4b3a2910"

_NAMED: Final[Mapping[str, Any]] = {
    "about": "At the lake until Monday",
    "accessToken": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl",
    "agent": "relay-example/1.0",
    "by": "ann",
    "code": "bad_request",
    "conv": CONVERSATION,
    "conversation": CONVERSATION,
    "device": "phone",
    "devicesRev": "9b1c5f0e7a3d2486.0",
    "identityKey": "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb",
    "key": "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb",
    "kind": "text",
    "message": "one line for people",
    "name": "Ann",
    "password": "correct horse battery staple",
    "phone": "+4930123456",
    "platform": "android",
    "q": "bob",
    "refreshToken": "bWFkZS11cC1zZXNzaW9u.bWFkZS11cC1zZWNyZXQtZm9yLXRoZS1leGFtcGxl",
    "signature": "c2lnbmVkIHdpdGggdGhlIGlkZW50aXR5IGtleSBvZiB0aGlzIGRldmljZQ==",
    "token": "a-token-of-the-push-service",
    "user": "bob",
    "username": "ann",
    "users": ["bob"],
    "version": "1.0.0",
}
_STRINGS: Final = (
    MESSAGE,
    "bob",
    "bob/phone",
    "phone",
    "text",
    "Ann",
    "+4930123456",
    "YQ==",
    "en",
)


def sample(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str = "", depth: int = 0) -> Any:
    """A value of this JSON schema, whose references lead into ``schemas``. ``name`` is the field it is for."""
    if depth > _DEPTH:
        return None
    if "$ref" in schema:
        return sample(schemas[schema["$ref"].rpartition("/")[2]], schemas, name, depth + 1)
    for keyword in ("examples", "enum"):
        if schema.get(keyword):
            return schema[keyword][0]
    if "const" in schema:
        return schema["const"]
    if schema.get("default") is not None:
        return schema["default"]
    options = [one for word in ("anyOf", "oneOf", "allOf") for one in schema.get(word, ())]
    if options:
        chosen = next((one for one in options if one.get("type") != "null"), options[0])
        return sample(chosen, schemas, name, depth + 1)
    kind = schema.get("type")
    if kind == "object":
        return _object(schema, schemas, depth)
    if kind == "array":
        return _array(schema, schemas, name, depth)
    if kind == "string":
        return _string(schema, name)
    if kind in ("integer", "number"):
        return _number(schema, name)
    return {"boolean": False, "null": None}.get(str(kind), {})


def _object(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {
        name: sample(field, schemas, name, depth + 1) for name, field in schema.get("properties", {}).items()
    }


def _array(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str, depth: int) -> list[Any]:
    items = schema.get("items")
    if not items:
        return []
    singular = {"ids": "id", "users": "user", "members": "user", "devices": "devices"}.get(name, name)
    return [sample(items, schemas, singular, depth + 1)]


def _string(schema: Mapping[str, Any], name: str) -> str:
    pattern = schema.get("pattern")
    low, high = schema.get("minLength", 0), schema.get("maxLength", 1 << 20)
    preferred = _NAMED.get(name)
    for found in (*((preferred,) if isinstance(preferred, str) else ()), *_STRINGS, "a" * low):
        if low <= len(found) <= high and (pattern is None or re.search(pattern, found)):
            return found
    return "a" * low


def _number(schema: Mapping[str, Any], name: str) -> int:
    moment = name in ("at", "since", "time", "until") or name.endswith(("At", "Until", "Seen"))
    wanted = _MOMENT if moment else 3
    low, high = schema.get("minimum", wanted), schema.get("maximum", wanted)
    return int(min(max(wanted, low), high))
