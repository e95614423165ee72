"""The two tables: error replies and closes."""

from __future__ import annotations

from typing import get_args

import pytest

from relay.wire import errors
from relay.wire.errors import CODES, Close, Code, FrameError, RelayError

CLOSES = [value for value in vars(errors).values() if isinstance(value, Close)]


def test_every_code_has_a_row_and_every_row_a_code() -> None:
    assert set(CODES) == set(get_args(Code))


@pytest.mark.parametrize("code", get_args(Code))
def test_an_error_tells_its_code_its_status_and_whether_to_try_again(code: Code) -> None:
    failure = RelayError(code, "what happened")
    assert failure.fields() == {"code": code, "message": "what happened", "retry": CODES[code].retry}
    assert failure.status == CODES[code].status
    assert 400 <= failure.status < 600
    assert str(failure) == "what happened"


def test_what_can_succeed_later_is_a_limit_or_a_fault_of_ours() -> None:
    assert {code for code, row in CODES.items() if row.retry} == {
        "rate_limited",
        "mailbox_full",
        "unavailable",
        "internal",
    }


def test_absent_and_not_yours_look_the_same() -> None:
    assert CODES["not_found"] == CODES["not_member"]


def test_details_and_the_time_to_wait_are_part_of_the_error() -> None:
    failure = RelayError("device_mismatch", "seal again", retry_after=5, details={"missing": ["bob/phone"]})
    assert failure.fields() == {
        "code": "device_mismatch",
        "message": "seal again",
        "retry": False,
        "retryAfter": 5,
        "missing": ["bob/phone"],
    }


@pytest.mark.parametrize("close", CLOSES, ids=lambda close: str(close.code))
def test_a_close_reason_fits_its_frame(close: Close) -> None:
    assert 0 < len(close.reason.encode()) <= 123
    assert close.code == 1000 or 1003 <= close.code <= 1012 or 4400 <= close.code <= 4499


def test_close_codes_are_unique() -> None:
    codes = [close.code for close in CLOSES]
    assert len(codes) == len(set(codes)) == 10


def test_a_frame_error_knows_its_close() -> None:
    assert FrameError(errors.NOT_JSON).close.code == 4400
