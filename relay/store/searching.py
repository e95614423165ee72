"""How people are found: the keys that they are found by, and the search.

A prefix is a range of an index, and a page begins where the one before ended, so a page costs the same at any depth. A
person whose name and user name both fit stands where the first of them does.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from models.accounts import User
from relay.wire.cursor import text_cursor_at, text_place_of
from relay.wire.errors import RelayError

KEY_LENGTH: Final = 64
END_OF_KEYS: Final = "\U0010ffff"
"""Behind every text that begins alike: MongoDB compares UTF-8 bytes, whose order is that of code points."""
_PHONE_SIGNS: Final = str.maketrans("", "", " -()./\u00a0")
_NUMBER: Final = frozenset("0123456789 -()./\u00a0")
_ROUNDS: Final = 5

_Row = Mapping[str, Any]
_Place = tuple[str, str]


def fold(text: str) -> str:
    """A text as it is compared and sorted: compatibility forms and case folded, blanks collapsed, at most ``KEY_LENGTH``
    characters. Folding twice changes nothing, but for a cut in the middle of a composed letter."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())[:KEY_LENGTH].rstrip()


def phone_key(text: str) -> str | None:
    """A telephone number as it is kept and compared (``+`` and 7 to 15 digits, E.164); None when the text is none. The
    plus sign may be missing, and blanks, dashes, dots, slashes and brackets may stand in between."""
    digits = text.translate(_PHONE_SIGNS).removeprefix("+")
    if not (digits.isascii() and digits.isdigit() and 7 <= len(digits) <= 15) or digits.startswith("0"):
        return None
    return f"+{digits}"


def search_keys(user: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What others find a user by, from the fields of the stored user: which of ``usernameKey``, ``nameKey`` and ``phoneKey``
    to set, and the names of those to unset. Who does not want to be found, is suspended or is being erased has none."""
    present = user.get("suspendedAt") is None and user.get("erasingAt") is None
    by_name = present and user.get("findableByName") is not False
    by_phone = present and user.get("findableByPhone") is not False
    keys = {
        "usernameKey": fold(user.get("username") or "") if by_name else "",
        "nameKey": fold(user.get("name") or "") if by_name else "",
        "phoneKey": (phone_key(user.get("phone") or "") or "") if by_phone else "",
    }
    return {name: key for name, key in keys.items() if key}, [name for name, key in keys.items() if not key]


def looks_like_phone(q: str) -> bool:
    """Whether a search is for a telephone number: it begins with a plus sign, or holds nothing but digits and the signs
    between them."""
    return q.startswith("+") or (_NUMBER.issuperset(q) and any(sign.isdigit() for sign in q))


async def find_people(
    q: str, *, limit: int, cursor: str | None, projection: Mapping[str, int]
) -> tuple[list[_Row], str | None]:
    """The stored users on one page, and the cursor of the next. Raises RelayError ``bad_request``."""
    if looks_like_phone(q):
        key = phone_key(q)
        fields: tuple[str, ...] = ("phoneKey",)
        low, high = key or "", key or ""
    else:
        fields = ("usernameKey", "nameKey")
        low = fold(q)
        high = low + END_OF_KEYS
    after = None if cursor is None else text_place_of(cursor)
    if after is not None and not low <= after[0] <= high:
        raise RelayError("bad_request", "cursor is of another search")
    if not low:
        return [], None
    found: list[tuple[_Place, _Row]] = []
    shown = {**projection, **dict.fromkeys(fields, 1)}
    for _ in range(_ROUNDS):
        rows = await _merged(fields, low, high, after, limit + 1, shown)
        for field, place, row in rows:
            after = place
            if field == _first(row, fields, low, high):
                found.append((place, row))
                if len(found) > limit:
                    return [row for _, row in found[:limit]], text_cursor_at(*found[limit - 1][0])
        if len(rows) <= limit:
            return [row for _, row in found], None
    # Most of what is here was shown already.
    return [row for _, row in found], None if after is None else text_cursor_at(*after)


async def _merged(
    fields: Sequence[str],
    low: str,
    high: str,
    after: _Place | None,
    limit: int,
    projection: Mapping[str, int],
) -> list[tuple[str, _Place, _Row]]:
    rows: list[tuple[str, _Place, _Row]] = []
    for field in fields:
        cursor = (
            User.get_motor_collection()
            .find(_range(field, low, high, after), projection)
            .sort([(field, 1), ("_id", 1)])
            .limit(limit)
        )
        rows += [(field, (row[field], row["_id"]), row) async for row in cursor]
    return sorted(rows, key=lambda entry: entry[1])[:limit]


def _range(field: str, low: str, high: str, after: _Place | None) -> dict[str, Any]:
    if after is None:
        return {field: {"$gte": low, "$lte": high}}
    key, name = after
    # Two ranges of one index, which MongoDB merges in order.
    return {"$or": [{field: key, "_id": {"$gt": name}}, {field: {"$gt": key, "$lte": high}}]}


def _first(row: _Row, fields: Sequence[str], low: str, high: str) -> str:
    """By which of its keys that fit a user stands in the list."""
    fitting = [
        (row[field], number) for number, field in enumerate(fields) if low <= row.get(field, "") <= high
    ]
    return fields[min(fitting)[1]]
