"""The written protocol names what the code knows: every operation with its fields, every code with its status."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from relay.wire import errors
from relay.wire.errors import CODES, Close
from relay.wire.frames import MAX_IDS, MAX_OPERATIONS, AnyOperation, Operation

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("operation", get_args(AnyOperation), ids=lambda kind: kind.__name__)
def test_every_operation_stands_on_the_page_with_all_its_fields(operation: type[Operation]) -> None:
    row = next(line for line in ROWS if line.startswith(f"| `{operation.__struct_config__.tag}` |"))
    for field in msgspec.structs.fields(operation):
        if field.encode_name != "ref":
            assert f"`{field.encode_name}`" in row


@pytest.mark.parametrize("code", CODES)
def test_every_error_code_stands_on_the_page_with_its_status(code: errors.Code) -> None:
    row = CODES[code]
    assert any(
        line.startswith(f"| `{code}` | {row.status} | {'yes' if row.retry else 'no'} |") for line in ROWS
    ), code


def test_every_close_code_stands_on_the_page() -> None:
    closes = [value for value in vars(errors).values() if isinstance(value, Close) and value.code != 1000]
    assert closes
    for close in closes:
        assert any(line.startswith(f"| {close.code} |") for line in ROWS), close.code


def test_limits_stand_on_the_page() -> None:
    assert f"up to {MAX_OPERATIONS}" in PAGE
    assert f"up to {MAX_IDS:,}" in PAGE
