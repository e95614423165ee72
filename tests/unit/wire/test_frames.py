"""The operations' types: what each field takes."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from relay.wire.codec import Refused, decode
from relay.wire.errors import RelayError
from relay.wire.frames import FEATURES, MAX_MEDIA, MAX_TTL_SECONDS, AnyOperation, Operation, Send

MESSAGE = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"


def send(**fields: Any) -> Operation | Refused:
    value = {"t": "send", "id": MESSAGE, "conv": "talk", "kind": "text", "body": "x", **fields}
    return decode(json.dumps(value))[0]


def refused(found: Operation | Refused) -> RelayError:
    assert isinstance(found, Refused), found
    return found.error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", MESSAGE.upper()),
        ("id", MESSAGE + "\n"),
        ("id", MESSAGE.replace("-", "")),
        ("id", "{" + MESSAGE + "}"),
        ("id", ""),
        ("conv", ""),
        ("conv", "a b"),
        ("conv", "a\n"),
        ("conv", "a/b"),
        ("conv", "ä"),
        ("conv", "x" * 65),
        ("conv", "$talk"),
        ("kind", "Text"),
        ("kind", "1text"),
        ("kind", "text\n"),
        ("kind", "t" * 33),
        ("kind", ""),
        ("replyTo", "x"),
        ("replyTo", MESSAGE + " "),
        ("ttl", 0),
        ("ttl", -1),
        ("ttl", MAX_TTL_SECONDS + 1),
        ("ttl", "60"),
        ("ttl", True),
        ("silent", 1),
        ("silent", "true"),
        ("again", None),
        ("after", 1 << 53),
        ("after", 1.5),
        ("body", 5),
        ("body", []),
        ("body", True),
        ("media", ["a b"]),
        ("media", "m"),
        ("media", [None]),
        ("sealed", {"bob": "AAAA"}),
        ("sealed", {"bob/phone/x": "AAAA"}),
        ("sealed", {"bob/phone": ""}),
        ("sealed", {"bob/phone": 'AA"}'}),
        ("sealed", {"bob/phone": "AAAA\n"}),
        ("sealed", {"bob/*": "AAAA"}),
        ("sealed", ["AAAA"]),
        ("ref", "r" * 65),
        ("ref", 7),
        ("devicesRev", "r" * 65),
        ("unknown", 1),
        ("reply_to", MESSAGE),
        ("devices_rev", "r"),
    ],
)
def test_a_send_with_a_wrong_field_is_refused(field: str, value: object) -> None:
    assert refused(send(**{field: value})).code == "bad_request"


@pytest.mark.parametrize(
    ("field", "value", "attribute"),
    [
        ("conv", "A-z_0.9:x", "conv"),
        ("kind", "a", "kind"),
        ("kind", "withdrawn", "kind"),
        ("kind", "x-app.note-1", "kind"),
        ("replyTo", MESSAGE, "reply_to"),
        ("ttl", 1, "ttl"),
        ("ttl", MAX_TTL_SECONDS, "ttl"),
        ("after", 0, "after"),
        ("after", (1 << 53) - 1, "after"),
        ("silent", True, "silent"),
        ("again", True, "again"),
        ("media", ["m"] * MAX_MEDIA, "media"),
        ("sealed", {"bob/phone": "AA+/_-=="}, "sealed"),
        ("ref", "r" * 64, "ref"),
        ("ref", "\u00e4\U0001f600", "ref"),
        ("devicesRev", "abc", "devices_rev"),
        ("body", None, "body"),
        ("body", {}, "body"),
        ("body", "", "body"),
    ],
)
def test_a_send_takes_what_the_protocol_allows(field: str, value: object, attribute: str) -> None:
    found = send(**{field: value})
    assert isinstance(found, Send), found
    assert getattr(found, attribute) == value


def test_too_many_attachments_are_too_large() -> None:
    assert refused(send(media=["m"] * (MAX_MEDIA + 1))).code == "too_large"


@pytest.mark.parametrize("missing", ["id", "conv", "kind"])
def test_a_send_without_a_required_field_is_refused_and_the_field_is_named(missing: str) -> None:
    value = {"t": "send", "id": MESSAGE, "conv": "talk", "kind": "text", "body": "x"}
    del value[missing]
    found = decode(json.dumps(value))[0]
    assert missing in refused(found).message


@pytest.mark.parametrize(
    "value",
    [
        {"t": "ack", "conv": "talk"},
        {"t": "ack", "ids": [MESSAGE]},
        {"t": "ack", "conv": "talk", "ids": MESSAGE},
        {"t": "ack", "conv": "talk", "ids": [MESSAGE], "id": MESSAGE},
        {"t": "status", "conv": "talk", "ids": ["x"]},
        {"t": "ping", "time": 1},
        {"t": "auth"},
        {"t": "auth", "token": 1},
        {"t": "auth", "token": "x" * 8193},
    ],
)
def test_other_operations_with_wrong_fields_are_refused(value: dict[str, Any]) -> None:
    assert refused(decode(json.dumps(value))[0]).code == "bad_request"


def test_every_operation_may_carry_a_ref() -> None:
    for kind in get_args(AnyOperation):
        assert "ref" in kind.__struct_fields__
        assert kind.__struct_config__.forbid_unknown_fields
        assert kind.__struct_config__.frozen


def test_the_features_are_named_once_each() -> None:
    assert len(set(FEATURES)) == len(FEATURES)
