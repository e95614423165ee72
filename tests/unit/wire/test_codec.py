"""What the codec lets in, what it refuses, and that what it lets in comes out again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.wire import errors, replies
from relay.wire.codec import (
    MAX_DEPTH,
    SAFE_INTEGER,
    Refused,
    check_ids,
    decode,
    decode_send,
    dumps,
    join,
    loads,
)
from relay.wire.envelope import Envelope
from relay.wire.errors import FrameError, RelayError
from relay.wire.frames import MAX_IDS, MAX_OPERATIONS, Ack, Operation, Ping, Send

MESSAGE = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
SEND = {"t": "send", "id": MESSAGE, "conv": "talk", "kind": "text"}

names = st.text(max_size=12).filter(lambda name: "\0" not in name)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-SAFE_INTEGER, SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(names, values, max_size=5)


def send_text(body: str, **fields: Any) -> str:
    """A send whose body is this JSON text, verbatim."""
    return json.dumps({**SEND, **fields})[:-1] + f', "body": {body}}}'


def one(text: str) -> Operation | Refused:
    found = decode(text)
    assert len(found) == 1
    return found[0]


def refusal(text: str) -> RelayError:
    found = one(text)
    assert isinstance(found, Refused), found
    return found.error


def nested(levels: int) -> str:
    """A JSON object of so many levels."""
    return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)


@given(body=objects, ascii_only=st.booleans())
def test_an_object_body_comes_out_equal(body: dict[str, Any], ascii_only: bool) -> None:
    found = one(json.dumps({**SEND, "body": body}, ensure_ascii=ascii_only))
    assert isinstance(found, Send), found
    assert isinstance(found.body, dict)
    envelope = Envelope(
        found.conv,
        found.id,
        user="ann",
        device="phone",
        seq=1,
        at=2,
        kind=found.kind,
        body=dumps(found.body),
        structured=True,
        awaiting=["bob/phone"],
    )
    assert json.loads(envelope.frame_for("bob/phone"))["body"] == body


@given(body=st.text(), ascii_only=st.booleans())
def test_a_string_body_comes_out_byte_for_byte(body: str, ascii_only: bool) -> None:
    found = one(json.dumps({**SEND, "body": body}, ensure_ascii=ascii_only))
    assert isinstance(found, Send), found
    envelope = Envelope(
        "talk",
        MESSAGE,
        user="ann",
        device="phone",
        seq=1,
        at=2,
        kind="text",
        body=found.body if isinstance(found.body, str) else None,
        awaiting=["bob/phone"],
    )
    back = json.loads(envelope.frame_for("bob/phone").encode().decode())["body"]
    assert back.encode() == body.encode()


@pytest.mark.parametrize(
    "body",
    [
        "\0",
        "a\u2028b\u2029c",
        "\x7f\x1f\x01",
        '"\\/',
        "\U0001f468\u200d\U0001f469",
        "\ufeff",
        "\uffff",
        "</script>",
        "line\r\nline",
    ],
)
def test_awkward_characters_of_a_string_body_survive(body: str) -> None:
    for ascii_only in (True, False):
        found = one(json.dumps({**SEND, "body": body}, ensure_ascii=ascii_only))
        assert isinstance(found, Send), found
        assert found.body == body
        assert json.loads(dumps(found.body)) == body


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("place", ['{{"a":{}}}', '{{"a":[1,{}]}}', '{{"a":{{"b":{}}}}}'])
def test_numbers_that_json_cannot_hold_are_refused(number: str, place: str) -> None:
    text = send_text(place.format(number))
    assert not_let_in(text)


def not_let_in(text: str) -> bool:
    """Whether the frame closes the connection or its only operation is refused."""
    try:
        found = one(text)
    except FrameError as error:
        return error.close is errors.NOT_JSON
    return isinstance(found, Refused) and found.error.code == "bad_request"


@pytest.mark.parametrize("field", ["ttl", "after", "silent"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_numbers_that_json_cannot_hold_are_refused_in_fields_too(field: str, number: str) -> None:
    text = json.dumps(SEND)[:-1] + f', "{field}": {number}}}'
    assert not_let_in(text)


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        (SAFE_INTEGER, True),
        (-SAFE_INTEGER, True),
        (SAFE_INTEGER + 1, False),
        (-SAFE_INTEGER - 1, False),
        (1 << 63, False),
        (1 << 64, False),
        (10**40, False),
        (-(10**400), False),
    ],
)
def test_integers_beyond_two_to_the_53_are_refused(number: int, passes: bool) -> None:
    found = one(send_text(f'{{"n":{number}}}'))
    if passes:
        assert isinstance(found, Send)
        assert found.body == {"n": number}
    else:
        assert isinstance(found, Refused)
        assert found.error.code == "bad_request"


@pytest.mark.parametrize("number", [1 << 53, 1 << 63, 1 << 64, 10**40, -1])
def test_a_seq_outside_its_range_is_refused(number: int) -> None:
    assert refusal(json.dumps({**SEND, "body": "x", "after": number})).code == "bad_request"


@pytest.mark.parametrize("surrogate", ["\\ud800", "\\udfff", "\\uDC00\\uD800", "a\\ud83d"])
@pytest.mark.parametrize(
    "shape",
    [
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":"{}"}}',
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":{{"a":"{}"}}}}',
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":{{"{}":1}}}}',
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":{{"a":[{{"{}":1}}]}}}}',
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":"x","ref":"{}"}}',
        '{{"t":"send","id":"{}","conv":"talk","kind":"text","body":"x"}}',
        '{{"t":"send","id":"ID","conv":"{}","kind":"text","body":"x"}}',
        '{{"t":"send","id":"ID","conv":"talk","kind":"text","body":"x","{}":1}}',
        '{{"t":"{}"}}',
        '{{"t":"ping","ref":"{}"}}',
        '{{"t":"auth","token":"{}"}}',
    ],
)
def test_lone_surrogates_are_refused_wherever_they_stand(shape: str, surrogate: str) -> None:
    found = one(shape.replace("ID", MESSAGE).format(surrogate))
    assert isinstance(found, Refused)
    assert found.error.code == "bad_request"
    replies.error(found.error, found.about).encode()


def test_a_pair_of_surrogates_is_a_character() -> None:
    found = one(send_text('"\\ud83d\\ude00"'))
    assert isinstance(found, Send)
    assert found.body == "\U0001f600"


def test_nesting_is_allowed_up_to_its_limit_and_refused_beyond() -> None:
    # The operation itself is the first level.
    found = one(send_text(nested(MAX_DEPTH - 1)))
    assert isinstance(found, Send), found
    assert refusal(send_text(nested(MAX_DEPTH))).code == "bad_request"
    assert (
        refusal(send_text('{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")).code
        == "bad_request"
    )
    assert refusal(send_text(nested(900))).code == "bad_request"


def test_nesting_that_the_parser_cannot_follow_closes_the_connection() -> None:
    with pytest.raises(FrameError) as caught:
        decode(send_text(nested(2000)))
    assert caught.value.close is errors.NOT_JSON
    with pytest.raises(FrameError):
        decode("[" * 100_000)


def test_a_message_that_nests_to_the_limit_passes_over_http_as_over_the_socket() -> None:
    text = send_text(nested(MAX_DEPTH - 1))
    assert isinstance(one(text), Send)
    value = loads(text)
    del value["t"]
    assert decode_send(value).body == one_body(text)


def one_body(text: str) -> object:
    found = one(text)
    assert isinstance(found, Send)
    return found.body


@pytest.mark.parametrize("name", ["a\\u0000", "\\u0000", "a\\u0000b"])
def test_a_nul_in_a_field_name_is_refused(name: str) -> None:
    assert refusal(send_text(f'{{"{name}":1}}')).code == "bad_request"
    assert refusal(send_text(f'{{"x":[{{"{name}":1}}]}}')).code == "bad_request"


def test_of_duplicate_keys_the_last_wins() -> None:
    found = one(send_text('{"a":1,"a":2}', ref="r"))
    assert isinstance(found, Send)
    assert found.body == {"a": 2}
    twice = one('{"t":"ping","ref":"first","ref":"last"}')
    assert isinstance(twice, Ping)
    assert twice.ref == "last"


@pytest.mark.parametrize(
    "operator", ['{"$ne":null}', '{"$gt":""}', '["x"]', "null", "1", "true", '{"$regex":".*"}']
)
def test_an_operator_object_where_an_id_belongs_is_refused(operator: str) -> None:
    for field in ("id", "conv", "kind"):
        text = json.dumps({name: value for name, value in SEND.items() if name != field})[:-1]
        assert refusal(text + f', "{field}": {operator}, "body": "x"}}').code == "bad_request"
    assert refusal(f'{{"t":"ack","conv":{operator},"ids":[]}}').code == "bad_request"
    assert refusal(f'{{"t":"ack","conv":"talk","ids":[{operator}]}}').code == "bad_request"
    assert refusal(f'{{"t":"status","conv":"talk","ids":[{operator}]}}').code == "bad_request"
    if operator not in ("null", '["x"]'):
        assert refusal(f'{{"t":"ping","ref":{operator}}}').code == "bad_request"


@pytest.mark.parametrize("t", ["null", "1", "{}", "[]", '{"$ne":1}', '"nothing"', '"Send"'])
def test_an_operation_without_a_known_name_is_refused_and_the_names_are_told(t: str) -> None:
    found = refusal(f'{{"t":{t}}}')
    assert found.code == "bad_request"
    assert "send" in found.message
    assert refusal("{}").code == "bad_request"


def test_a_frame_holds_so_many_operations_and_no_more() -> None:
    frame = [{"t": "ping", "ref": str(number)} for number in range(MAX_OPERATIONS)]
    found = decode(json.dumps(frame))
    assert [item.ref for item in found if isinstance(item, Ping)] == [item["ref"] for item in frame]
    refused = decode(json.dumps([*frame, {"t": "ping"}]))
    assert len(refused) == 1
    assert isinstance(refused[0], Refused)
    assert refused[0].error.code == "too_large"


def test_operations_of_one_frame_are_refused_alone() -> None:
    found = decode(
        json.dumps([{"t": "ping", "ref": "a"}, {"t": "wrong", "ref": "b"}, {"t": "ping", "ref": "c"}])
    )
    assert [type(item) for item in found] == [Ping, Refused, Ping]
    refused = found[1]
    assert isinstance(refused, Refused)
    assert refused.about == {"ref": "b"}


def test_a_refusal_names_what_it_is_about() -> None:
    found = one(json.dumps({**SEND, "ref": "r1", "unknown": 1}))
    assert isinstance(found, Refused)
    assert found.about == {"ref": "r1", "id": MESSAGE, "conv": "talk"}
    long = one(json.dumps({"t": "ping", "ref": "r" * 65}))
    assert isinstance(long, Refused)
    assert long.about == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1",
        '"a"',
        "null",
        "true",
        "[1]",
        "[[]]",
        '[{"t":"ping"},1]',
        "{",
        "[",
        "{]",
        "nul",
        '{"a":}',
        "\ufeff{}",
    ],
)
def test_a_frame_that_is_not_json_objects_closes_the_connection(text: str) -> None:
    with pytest.raises(FrameError) as caught:
        decode(text)
    assert caught.value.close.code == 4400


def is_answerable(found: list[Operation | Refused]) -> None:
    for item in found:
        if isinstance(item, Refused):
            frame = replies.error(item.error, item.about)
            assert json.loads(frame.encode())["t"] == "error"


@pytest.mark.parametrize("name", ["a\nb", "a\r\nb", "a\u2028b", "\x1b[31m"])
def test_a_refusal_is_one_line_whatever_the_unknown_field_is_called(name: str) -> None:
    message = refusal(json.dumps({**SEND, name: 1})).message
    assert message.isprintable(), repr(message)


@settings(max_examples=300)
@given(text=st.text() | st.text(alphabet='{}[]",:\\untrefals0123456789eE+-. t'))
def test_arbitrary_text_raises_nothing_but_a_frame_error(text: str) -> None:
    close = errors.NOT_JSON
    try:
        is_answerable(decode(text))
    except FrameError as error:
        close = error.close
    assert close is errors.NOT_JSON


@settings(max_examples=150)
@given(
    operation=st.fixed_dictionaries(
        {"t": st.sampled_from(["send", "ack", "status", "ping", "auth"])},
        optional={
            name: values | st.just(valid)
            for name, valid in {
                "id": MESSAGE,
                "conv": "talk",
                "kind": "text",
                "ids": [MESSAGE],
                "ref": "r",
                "body": "x",
                "ttl": 5,
                "after": 7,
                "sealed": {"bob/phone": "AAAA"},
                "media": ["m1"],
                "token": "t",
                "again": True,
            }.items()
        },
    ),
    extra=st.dictionaries(names, values, max_size=1),
    ascii_only=st.booleans(),
)
def test_any_object_is_an_operation_or_a_refusal_that_can_be_told(
    operation: dict[str, Any], extra: dict[str, Any], ascii_only: bool
) -> None:
    is_answerable(decode(json.dumps({**extra, **operation}, ensure_ascii=ascii_only)))


@given(value=values)
def test_json_text_comes_out_equal_of_dumps(value: Any) -> None:
    assert json.loads(dumps(value)) == value
    assert loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text", ["", "{", '"\\ud800"', "9007199254740992", "NaN", "1e400", nested(33), nested(2000)]
)
def test_http_bodies_are_refused_like_frames(text: str) -> None:
    with pytest.raises(RelayError) as caught:
        loads(text)
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize("value", [None, [], "x", {"t": "send"}, {}, {"id": "x"}, {**SEND, "t": "send"}])
def test_a_send_over_http_must_be_an_operation_without_t(value: object) -> None:
    with pytest.raises(RelayError) as caught:
        decode_send(value)
    assert caught.value.code == "bad_request"


def test_joined_frames_are_one_array() -> None:
    assert json.loads(join([replies.drained(0), replies.bye(5)])) == [
        {"t": "drained", "count": 0},
        {"t": "bye", "retryAfter": 5},
    ]


def test_a_list_of_too_many_ids_is_too_large() -> None:
    check_ids([MESSAGE] * MAX_IDS)
    found = one(json.dumps({"t": "ack", "conv": "talk", "ids": [MESSAGE] * (MAX_IDS + 1)}))
    assert isinstance(found, Ack)
    with pytest.raises(RelayError) as caught:
        check_ids(found.ids)
    assert caught.value.code == "too_large"
