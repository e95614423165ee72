"""A message as the frame that devices get."""

from __future__ import annotations

import json
from typing import Any

from relay.wire.envelope import Envelope

MESSAGE = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
OTHER = "6f9619ff-8b86-4d01-b42d-00cf4fc964fe"


def envelope(**fields: Any) -> Envelope:
    values: dict[str, Any] = {
        "user": "ann",
        "device": "phone",
        "seq": 7,
        "at": 9,
        "kind": "text",
        "body": "hello",
        "awaiting": ["bob/phone", "bob/tablet"],
        **fields,
    }
    return Envelope("talk", MESSAGE, **values)


def test_a_frame_has_the_fields_of_the_protocol_and_no_others() -> None:
    assert json.loads(envelope().frame_for("bob/phone")) == {
        "t": "msg",
        "id": MESSAGE,
        "conv": "talk",
        "seq": 7,
        "at": 9,
        "from": {"user": "ann", "device": "phone"},
        "kind": "text",
        "body": "hello",
    }


def test_optional_fields_come_when_they_are_set() -> None:
    frame = json.loads(envelope(reply_to=OTHER, media=["m1", "m2"]).frame_for("bob/phone"))
    assert frame["replyTo"] == OTHER
    assert frame["media"] == ["m1", "m2"]


def test_a_device_gets_its_own_sealed_entry_only() -> None:
    one = envelope(body=None, sealed={"bob/phone": "UGhvbmU=", "bob/tablet": "VGFibGV0"})
    phone, tablet = one.frame_for("bob/phone"), one.frame_for("bob/tablet")
    assert json.loads(phone)["sealed"] == "UGhvbmU="
    assert json.loads(tablet)["sealed"] == "VGFibGV0"
    assert "VGFibGV0" not in phone
    assert "UGhvbmU=" not in tablet
    assert "sealed" not in json.loads(one.frame_for("cleo/phone"))
    assert json.loads(phone)["body"] is None


def test_a_structured_body_is_an_object_and_a_string_of_json_stays_a_string() -> None:
    assert json.loads(envelope(body='{"a":1}', structured=True).frame_for("b/p"))["body"] == {"a": 1}
    assert json.loads(envelope(body='{"a":1}').frame_for("b/p"))["body"] == '{"a":1}'


def test_the_frame_is_encoded_once_for_all() -> None:
    one = envelope()
    assert one.frame_for("bob/phone") is one.frame_for("bob/tablet")


def test_the_document_id_names_conversation_and_message() -> None:
    assert envelope().doc_id == f"talk {MESSAGE}"
