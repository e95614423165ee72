"""What the relay says."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from relay.wire import replies
from relay.wire.errors import RelayError

refs = st.text(max_size=64)


@given(ref=st.none() | refs)
def test_a_ref_comes_back_as_it_was_given(ref: str | None) -> None:
    expected = {} if ref is None else {"ref": ref}
    assert json.loads(replies.stored("talk", "m1", 5, 6, ref)) == {
        "t": "stored",
        "conv": "talk",
        "id": "m1",
        "seq": 5,
        "at": 6,
        **expected,
    }
    assert json.loads(replies.pong(7, ref)) == {"t": "pong", "time": 7, **expected}
    assert json.loads(replies.authed(8, ref)) == {"t": "authed", "exp": 8, **expected}
    item = {"id": "m1", "awaiting": 2, "delivered": ["bob"]}
    assert json.loads(replies.status("talk", [item], ref)) == {
        "t": "status",
        "conv": "talk",
        "items": [item],
        **expected,
    }


@given(ref=refs)
def test_a_durable_acknowledgement_names_its_ids_and_ref(ref: str) -> None:
    assert json.loads(replies.acked("talk", ["m1", "m2"], ref)) == {
        "t": "acked",
        "conv": "talk",
        "ids": ["m1", "m2"],
        "ref": ref,
    }


def test_a_receipt_names_the_device_that_has_the_messages() -> None:
    assert json.loads(replies.receipt("talk", ["m1", "m2"], "bob", "phone", 9)) == {
        "t": "receipt",
        "conv": "talk",
        "ids": ["m1", "m2"],
        "by": {"user": "bob", "device": "phone"},
        "at": 9,
    }


@given(ref=refs, message=st.text(max_size=40))
def test_an_error_names_what_failed(ref: str, message: str) -> None:
    failure = RelayError("rate_limited", message, retry_after=250)
    assert json.loads(replies.error(failure, {"ref": ref, "id": None, "conv": "talk"})) == {
        "t": "error",
        "code": "rate_limited",
        "message": message,
        "retry": True,
        "retryAfter": 250,
        "ref": ref,
        "conv": "talk",
    }


def test_the_rest_is_as_the_protocol_says() -> None:
    assert json.loads(replies.drained(3)) == {"t": "drained", "count": 3}
    assert json.loads(replies.bye(1500)) == {"t": "bye", "retryAfter": 1500}
    assert json.loads(replies.welcome({"user": "ann"})) == {"t": "welcome", "v": 1, "user": "ann"}
