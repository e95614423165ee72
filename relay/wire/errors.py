"""Everything that can go wrong on the wire, in two tables: error replies and closes.

``RelayError`` is the only exception that handlers raise on purpose. It carries a code of ``CODES``; the session turns it
into an ``error`` frame or an HTTP error. Anything else that escapes a handler is a fault of ours: ``internal``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from relay.wire.limits import Limit

Code = Literal[
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "not_member",
    "blocked",
    "id_conflict",
    "conflict",
    "resync",
    "too_large",
    "rate_limited",
    "mailbox_full",
    "device_mismatch",
    "unavailable",
    "internal",
]


@dataclass(frozen=True, slots=True)
class CodeRow:
    """One row of the table of codes: its HTTP status, and whether sending the same again later can succeed."""

    status: int
    retry: bool


CODES: Final[Mapping[Code, CodeRow]] = {
    "bad_request": CodeRow(400, False),
    "unauthorized": CodeRow(401, False),
    "forbidden": CodeRow(403, False),
    "not_found": CodeRow(404, False),
    "not_member": CodeRow(404, False),
    "blocked": CodeRow(403, False),
    "id_conflict": CodeRow(409, False),
    "conflict": CodeRow(409, False),
    "resync": CodeRow(410, False),
    "too_large": CodeRow(413, False),
    "rate_limited": CodeRow(429, True),
    "mailbox_full": CodeRow(429, True),
    "device_mismatch": CodeRow(409, False),
    "unavailable": CodeRow(503, True),
    "internal": CodeRow(500, True),
}


class RelayError(Exception):
    """A failure that its causer is told about.

    ``message`` is one line for people; ``retry_after`` is in milliseconds; ``details`` are further fields of the error
    frame (``missing``, ``devicesRev``…). ``limit`` is counted, not told.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        retry_after: int | None = None,
        details: Mapping[str, object] | None = None,
        limit: Limit | None = None,
    ) -> None:
        super().__init__(message)
        self.code: Code = code
        self.limit = limit
        self.message = message
        self.retry_after = retry_after
        self.details = details or {}

    @property
    def retry(self) -> bool:
        """Whether the same request can succeed later."""
        return CODES[self.code].retry

    @property
    def status(self) -> int:
        """The HTTP status of this error."""
        return CODES[self.code].status

    def fields(self) -> dict[str, object]:
        """The fields of the error, as they stand in a frame or an HTTP answer."""
        found: dict[str, object] = {"code": self.code, "message": self.message, "retry": self.retry}
        if self.retry_after is not None:
            found["retryAfter"] = self.retry_after
        found.update(self.details)
        return found


@dataclass(frozen=True, slots=True)
class Close:
    """Why a WebSocket is closed: the close code and one line for people (123 bytes at most, RFC 6455 5.5)."""

    code: int
    reason: str


NORMAL: Final = Close(1000, "bye")
BINARY: Final = Close(1003, "text frames only")
TOO_BIG: Final = Close(1009, "frame too big")
RESTARTING: Final = Close(1012, "restarting")
NOT_JSON: Final = Close(4400, "a frame must be a JSON object or an array of JSON objects")
UNAUTHORIZED: Final = Close(4401, "token bad, revoked or expired")
TIMED_OUT: Final = Close(4408, "no authentication or no life in time")
REPLACED: Final = Close(4409, "another connection of this device took over")
TOO_OLD: Final = Close(4426, "this client is too old")
TOO_MANY: Final = Close(4429, "too many connections or operations")


class FrameError(Exception):
    """A frame that cannot be read at all; the connection is closed with ``close``."""

    def __init__(self, close: Close) -> None:
        super().__init__(close.reason)
        self.close = close
