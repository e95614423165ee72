"""Examples for the descriptions: those that the models carry, else plausible values made from the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from relay.wire.frames import MAX_OPERATIONS

_DEPTH: Final = 8
AT: Final = 1_795_221_560_670
MESSAGE: Final = "7f9c24e8-3b1a-4f0d-9c55-0a1b2c3d4e5f"
CONVERSATION: Final = "2b0f6a3e-58d1-4c7e-8f7a-6d5c4b3a2910"

_SEQ: Final = 117_651_640_200_000
_STORED: Final = {"t": "stored", "conv": CONVERSATION, "id": MESSAGE, "seq": _SEQ, "at": AT}

REQUESTS: Final[Mapping[str, dict[str, Any]]] = {
    "LoginRequest": {
        "username": "ann",
        "password": "correct horse battery",
        "device": {"id": "phone", "name": "Ann's phone", "platform": "ios"},
    },
    "CreateConversation": {
        "type": "group",
        "members": ["bob", "cleo"],
        "name": "Allotment",
        "ref": MESSAGE,
    },
}
"""Request bodies whose fields depend on each other, by model."""

_NAMED: Final[Mapping[str, Any]] = {
    "about": "At the lake until Monday",
    "accessToken": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl",
    "agent": "relay-example/1.0",
    "by": "ann",
    "body": "Hello, Ann",
    "code": "bad_request",
    "conv": CONVERSATION,
    "conversation": CONVERSATION,
    "cursor": "WzE3OTUyMjE1NjA2NzAsInRhbGsiXQ",
    "description": "Who waters when",
    "device": "phone",
    "devices": "bob/phone",
    "devicesRev": "9b1c5f0e7a3d2486.0",
    "features": "again",
    "identityKey": "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb",
    "key": "BU6pMRmRvJ7P0bnEkEgcOBoqQNOj8C1rk9mrqGmnbJdb",
    "kind": "text",
    "message": "one line for people",
    "name": "Ann",
    "next": "WzE3OTUyMjE1NjA2NzAsInRhbGsiXQ",
    "phone": "+4930123456",
    "picture": "cGljdHVyZQ",
    "platform": "android",
    "q": "bob",
    "refreshToken": "bWFkZS11cC1zZXNzaW9u.bWFkZS11cC1zZWNyZXQtZm9yLXRoZS1leGFtcGxl",
    "signature": "c2lnbmVkIHdpdGggdGhlIGlkZW50aXR5IGtleSBvZiB0aGlzIGRldmljZQ==",
    "sealed": "c2VhbGVkIGZvciB0aGlzIGRldmljZQ==",
    "text": "asks everybody for money",
    "token": "a-token-of-the-push-service",
    "user": "bob",
    "username": "ann",
    "version": "1.0.0",
}
_NUMBERS: Final[Mapping[str, int]] = {
    "body": 65_536,
    "expiresIn": 900,
    "frame": 262_144,
    "heartbeat": 25_000,
    "ops": MAX_OPERATIONS,
    "protocol": 1,
    "readUpTo": _SEQ,
    "registrationId": 11_845,
    "seq": _SEQ,
    "ttl": 2_592_000,
    "upTo": _SEQ,
    "window": 256,
    "windowBytes": 1_048_576,
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
    fields = schema.get("properties", {})
    found = {name: sample(field, schemas, name, depth + 1) for name, field in fields.items()}
    # An id is that of what the object is.
    for sign, name in (("username", "ann"), ("platform", "phone")):
        if sign in fields and isinstance(found.get("id"), str) and "examples" not in fields["id"]:
            found["id"] = name
    return found


def _array(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str, depth: int) -> list[Any]:
    items = schema.get("items")
    if not items:
        return []
    singular = {"ids": "id", "users": "user", "members": "user", "devices": "devices"}.get(name, name)
    return [sample(items, schemas, singular, depth + 1)]


def _string(schema: Mapping[str, Any], name: str) -> str:
    pattern = schema.get("pattern")
    low, high = int(schema.get("minLength", 0)), int(schema.get("maxLength", 1 << 20))
    candidates = [str(one) for one in (_NAMED.get(name),) if isinstance(one, str)]
    for found in (*candidates, *_STRINGS, "a" * low):
        if low <= len(found) <= high and (pattern is None or re.search(pattern, found)):
            return found
    return "a" * low


def _number(schema: Mapping[str, Any], name: str) -> int:
    moment = name in ("at", "since", "time", "until") or name.endswith(("At", "Until", "Seen"))
    wanted = AT if moment else _NUMBERS.get(name, 3)
    low, high = schema.get("minimum", wanted), schema.get("maximum", wanted)
    return int(min(max(wanted, low), high))


OPERATIONS: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "send": (
        {"t": "send", "id": MESSAGE, "conv": CONVERSATION, "kind": "text", "body": "Hello, Bob", "ref": "1"},
        {
            "t": "send",
            "id": MESSAGE,
            "conv": CONVERSATION,
            "kind": "text",
            "body": None,
            "sealed": {"bob/phone": "c2VhbGVkIGZvciB0aGlzIGRldmljZQ=="},
            "devicesRev": "9b1c5f0e7a3d2486.0",
            "again": True,
        },
    ),
    "ack": ({"t": "ack", "conv": CONVERSATION, "ids": [MESSAGE], "ref": "2"},),
    "status": ({"t": "status", "conv": CONVERSATION, "ids": [MESSAGE]},),
    "read": ({"t": "read", "conv": CONVERSATION, "upTo": _SEQ, "ref": "3"},),
    "typing": ({"t": "typing", "conv": CONVERSATION, "on": True},),
    "presence": ({"t": "presence", "users": ["bob", "cleo"]},),
    "ping": ({"t": "ping"},),
    "auth": ({"t": "auth", "token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"},),
}
FRAMES: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "welcome": (
        {
            "t": "welcome",
            "v": 1,
            "user": "ann",
            "device": "phone",
            "time": AT,
            "heartbeat": 25_000,
            "window": 256,
            "windowBytes": 1_048_576,
            "limits": {"frame": 262_144, "body": 65_536, "ops": MAX_OPERATIONS},
            "features": ["again", "after"],
            "gap": {"since": AT, "why": "inactive"},
        },
    ),
    "stored": (_STORED, {**_STORED, "ref": "1"}),
    "acked": ({"t": "acked", "conv": CONVERSATION, "ids": [MESSAGE], "ref": "2"},),
    "status": (
        {
            "t": "status",
            "conv": CONVERSATION,
            "items": [
                {"id": MESSAGE, "awaiting": 1, "delivered": []},
                {"id": MESSAGE, "gone": True, "fate": "delivered", "delivered": ["bob"]},
            ],
        },
    ),
    "msg": (
        {
            "t": "msg",
            "id": MESSAGE,
            "conv": CONVERSATION,
            "seq": _SEQ,
            "at": AT,
            "from": {"user": "bob", "device": "phone"},
            "kind": "text",
            "body": "Hello, Ann",
        },
    ),
    "drained": ({"t": "drained", "count": 12},),
    "receipt": (
        {
            "t": "receipt",
            "conv": CONVERSATION,
            "ids": [MESSAGE],
            "by": {"user": "bob", "device": "phone"},
            "at": AT,
        },
    ),
    "done": ({"t": "done", "ref": "3"},),
    "read": ({"t": "read", "conv": CONVERSATION, "user": "bob", "upTo": _SEQ, "at": AT},),
    "typing": ({"t": "typing", "conv": CONVERSATION, "user": "bob", "on": True},),
    "presence": (
        {"t": "presence", "user": "bob", "online": True, "lastSeen": AT},
        {"t": "presence", "user": "cleo", "online": False, "lastSeen": None},
    ),
    "pong": ({"t": "pong", "time": AT},),
    "authed": ({"t": "authed", "exp": 1_795_222_460},),
    "bye": ({"t": "bye", "retryAfter": 1500},),
    "keys": ({"t": "keys", "oneTime": 19},),
    "error": (
        {
            "t": "error",
            "code": "device_mismatch",
            "message": "the recipient devices have changed; fetch them and seal again",
            "retry": False,
            "id": MESSAGE,
            "conv": CONVERSATION,
            "missing": ["bob/tablet"],
            "extra": [],
            "stale": [],
            "devicesRev": "9b1c5f0e7a3d2486.0",
        },
    ),
}
